"""The whole vision tower: 27 layers of 1152, random bf16 weights, one picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from _measure import Bar, Peer, Row
from _vision_geometry import SIGLIP, TINY, num_flops
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from transformers.models.paddleocr_vl import modeling_paddleocr_vl as paddle
from transformers.models.paddleocr_vl.configuration_paddleocr_vl import PaddleOCRVisionConfig

from kvkeye.layers import pack_weights
from kvkeye.models.keye.config import VisionConfig
from kvkeye.models.keye.positions import MediaGrid
from kvkeye.models.keye.vision import VisionTower


def tower_row(side: int, quick: bool) -> Row:
    """Ours beside the tower of PaddleOCR-VL, the same architecture, with SDPA, in bf16 and in fp32."""
    config, grid = (TINY, (1, 6, 8)) if quick else (SIGLIP, (1, side // 14, side // 14))
    tower = random_tower(config)
    pixels = torch.randn(grid[1] * grid[2], config.patch_dim, generator=torch.Generator().manual_seed(1))
    pixels = pixels.to(torch.bfloat16)
    items = [MediaGrid("image", grid)]
    peers = [
        Peer("transformers, SDPA", str(dtype).removeprefix("torch."), paddle_side(tower, dtype, pixels, grid))
        for dtype in (torch.bfloat16, torch.float32)
    ]
    pack_weights(tower)  # as the engine does once a checkpoint is loaded
    name = f"tower of {config.num_hidden_layers} layers of {config.hidden_size}, {14 * grid[2]} x {14 * grid[1]}, bf16"
    bars = [Bar("transformers, SDPA", 2.5)] if side == 1036 else []
    return Row(name, peers, bars, lambda: tower(pixels, items), agree, flops=num_flops(config, grid[1] * grid[2]))


def random_tower(config: VisionConfig) -> VisionTower:
    """Weights that keep the signal's size from layer to layer."""
    with torch.device("meta"):
        tower = VisionTower(config, joint_frames=True)
    tower = tower.to(torch.bfloat16).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            std = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.1
            parameter.normal_(0, std, generator=generator)
            if "layernorm" in name.replace("_", "") and name.endswith("weight"):
                parameter.add_(1)
    return tower


def paddle_side(
    tower: VisionTower, dtype: torch.dtype, pixels: Tensor, grid: tuple[int, int, int]
) -> Callable[[], Tensor]:
    config = tower.config
    settings = PaddleOCRVisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )
    settings._attn_implementation = "sdpa"
    with no_init_weights():
        model = paddle.PaddleOCRVisionModel._from_config(settings, dtype=dtype).eval()
    missing, unexpected = model.load_state_dict(hub_weights(tower), strict=False)
    if unexpected or any("packing_position_embedding" not in name for name in missing):
        raise AssertionError(f"weights of the peer: missing {missing}, unexpected {unexpected}")
    images = pixels.to(dtype).view(1, -1, 3, config.patch_size, config.patch_size)
    grids = torch.tensor([grid])
    return lambda: model(pixel_values=images, grid_thw=grids).last_hidden_state


def hub_weights(tower: VisionTower) -> dict[str, Tensor]:
    """Our parameters under the peer's names; ours keep q, k and v in one matrix."""
    parameters: dict[str, nn.Parameter] = dict(tower.named_parameters())
    side, patch = tower.config.grid_size, tower.config.patch_size
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        kind = name.rpartition(".")[2]
        if name.startswith("patch_embedding") and kind == "weight":
            found[f"embeddings.{name}"] = parameter.view(-1, tower.config.num_channels, patch, patch)
        elif name == "position_embedding":
            found["embeddings.position_embedding.weight"] = parameter.view(side * side, -1)
        elif "qkv_proj" in name:
            for part, rows in zip("qkv", parameter.chunk(3)):
                found["encoder." + name.replace("qkv", part)] = rows
        else:
            outer = "encoder." if name.startswith("layers") else "embeddings." if "embedding" in name else ""
            found[outer + name] = parameter
    return {f"vision_model.{name}": tensor.detach() for name, tensor in found.items()}


def agree(outputs: list[Tensor]) -> None:
    """Each patch's features point the same way as the peer's, as far as bf16 through the layers lets them."""
    mine, *others = (output.float() for output in outputs)
    for other in others:
        if mine.shape != other.shape:
            raise AssertionError(f"tower: features {tuple(mine.shape)}, the peer's {tuple(other.shape)}")
        similarity = torch.nn.functional.cosine_similarity(mine, other, dim=-1).min().item()
        if similarity < 0.995:
            raise AssertionError(f"tower: least cosine with the peer's features is {similarity:.4f}")
