"""Independent public implementations with the weights of our model, and real pictures to show them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.paddleocr_vl import modeling_paddleocr_vl as paddle
from transformers.models.paddleocr_vl.configuration_paddleocr_vl import PaddleOCRVisionConfig, PaddleOCRVLConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from kvkeye.models.keye.config import TextConfig
from kvkeye.models.keye.model import KeyeModel
from kvkeye.models.keye.positions import MediaGrid
from kvkeye.models.keye.weights import places


def hub_tensors(model: KeyeModel, prefix: str = "") -> dict[str, Tensor]:
    """The model's weights under the Hub's names, those below `prefix` without it."""
    parameters = dict(model.named_parameters())
    found = {name: place.view(parameters).clone() for name, place in places(model.config).items()}
    return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}


def hub_gradients(model: KeyeModel, prefix: str) -> dict[str, Tensor]:
    """The gradients of the parameters, cut and named like `hub_tensors`."""
    gradients = {name: torch.nn.Parameter(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    found = {
        name: place.view(gradients) for name, place in places(model.config).items() if place.parameter in gradients
    }
    return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}


def vision_tower(model: KeyeModel) -> paddle.PaddleOCRVisionModel:
    """PaddleOCR-VL's tower: attends per frame, as 1.5 does."""
    config = _paddle_vision_config(model)
    reference = paddle.PaddleOCRVisionModel(config).eval()
    missing, unexpected = reference.load_state_dict(hub_tensors(model, "visual."), strict=False)
    assert not unexpected and not [name for name in missing if "packing_position_embedding" not in name]
    return reference


def _paddle_vision_config(model: KeyeModel) -> PaddleOCRVisionConfig:
    vision = model.config.vision
    config = PaddleOCRVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_hidden_layers,
        num_attention_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
    )
    config._attn_implementation = "eager"
    return config


def projector(model: KeyeModel) -> paddle.PaddleOCRProjector:
    config = PaddleOCRVLConfig(vision_config=_paddle_vision_config(model))
    config.text_config.hidden_size = model.config.text.hidden_size
    reference = paddle.PaddleOCRProjector(config).eval()
    reference.load_state_dict(hub_tensors(model, "mlp_AR."))
    return reference


def language_model(model: KeyeModel) -> Qwen3ForCausalLM:
    text = model.config.text
    reference = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            rms_norm_eps=text.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
            max_position_embeddings=text.max_position_embeddings,
            tie_word_embeddings=text.tie_word_embeddings,
            attn_implementation="eager",
        )
    ).eval()
    tensors = {n: t for n, t in hub_tensors(model).items() if n.startswith(("model.", "lm_head."))}
    missing, unexpected = reference.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if text.tie_word_embeddings else set())
    return reference


def mrope_table(text: TextConfig) -> Qwen2_5_VLRotaryEmbedding:
    """Called with (x, positions [3, B, T]), returns cos and sin [B, T, D], sections already chosen."""
    rope = {"rope_type": "default", "rope_theta": text.rope_theta, "mrope_section": list(text.mrope_section)}
    return Qwen2_5_VLRotaryEmbedding(
        Qwen2_5_VLTextConfig(
            hidden_size=text.num_attention_heads * text.head_dim,
            num_attention_heads=text.num_attention_heads,
            rope_parameters=rope,
        )
    )


def inject_positions(reference: Qwen3ForCausalLM, text: TextConfig, positions: Tensor) -> None:
    """Makes the reference rotate by these positions [3, T] whatever it is called with."""
    table = mrope_table(text)
    reference.model.rotary_emb.forward = lambda x, position_ids: table(x, positions[:, None])


def photograph(name: str, rows: int, columns: int) -> Tensor:
    """A picture shipped with scikit-image, resized to a grid of patches: [rows * columns, 588] in -1..1."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None and spec.origin is not None, "the tests need scikit-image for its pictures"
    with Image.open(Path(spec.origin).parent / "data" / name) as image:
        pixels = np.asarray(image.convert("RGB").resize((columns * 14, rows * 14), Image.Resampling.BICUBIC))
    unit = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1  # [3, H, W]
    patches = unit.unflatten(1, (rows, 14)).unflatten(3, (columns, 14))  # [3, rows, 14, columns, 14]
    return patches.permute(1, 3, 0, 2, 4).flatten(0, 1).flatten(1)


def two_photographs() -> tuple[Tensor, list[MediaGrid]]:
    """A wide and a tall picture in one pack."""
    pixels = torch.cat((photograph("astronaut.png", 8, 12), photograph("rocket.jpg", 10, 6)))
    return pixels, [MediaGrid("image", (1, 8, 12)), MediaGrid("image", (1, 10, 6))]


def grid_tensor(items: list[MediaGrid]) -> Tensor:
    return torch.tensor([item.grid_thw for item in items])


def as_images(pixel_values: Tensor) -> Tensor:
    """[N, 588] -> [1, N, 3, 14, 14], what the reference towers take."""
    return pixel_values.view(1, -1, 3, 14, 14)
