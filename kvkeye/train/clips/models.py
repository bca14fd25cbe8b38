"""The components of the tiny pipelines, built offline, and their export in diffusers' folder layout."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kvkeye.train.clips.motion import vocabulary
from kvkeye.train.clips.recipe import VideoRecipe

RATIO = 2  # of the VAE in time
SPATIAL_RATIO = 4  # in both sides
_PATCH = 2  # pixels that become channels before the first layer, as in Wan 2.2's VAE
MAX_LATENT_FRAMES = 128  # of the positional table
MAX_TOKENS = 16  # of a caption
PADDED_TOKENS = 512  # to which the pipelines pad captions with zeros unless told


def build_vae(recipe: VideoRecipe) -> Any:
    """An `AutoencoderKLWan`, causal in time; its shortcuts (Wan 2.2) spare it a long start at the mean picture."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(recipe.seed)
    z = recipe.vae.z_dim
    return AutoencoderKLWan(
        base_dim=recipe.vae.base_dim,
        z_dim=z,
        dim_mult=[1, 1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True],
        in_channels=3 * _PATCH**2,
        out_channels=3 * _PATCH**2,
        patch_size=_PATCH,
        is_residual=True,
        latents_mean=[0.0] * z,
        latents_std=[1.0] * z,
        scale_factor_temporal=RATIO,
        scale_factor_spatial=SPATIAL_RATIO,
    )


def build_text(recipe: VideoRecipe) -> tuple[Any, Any]:
    """A tokenizer of the captions' words and a small encoder, which learns with the denoiser."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    vocab = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )
    torch.manual_seed(recipe.seed + 1)
    config = UMT5Config(
        vocab_size=len(vocab),
        d_model=recipe.text_dim,
        d_kv=recipe.text_dim // 4,
        d_ff=2 * recipe.text_dim,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
    )
    return fast, UMT5EncoderModel(config)


def build_denoiser(recipe: VideoRecipe, guided: bool = True) -> Any:
    """A `WanTransformer3DModel`; if `guided` it also takes mask and latents of a guide frame, zero for none."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(recipe.seed + 2)
    sizes, z = recipe.denoiser, recipe.vae.z_dim
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_dim,
        in_channels=z + (RATIO + z if guided else 0),
        out_channels=z,
        text_dim=recipe.text_dim,
        freq_dim=128,
        ffn_dim=sizes.ffn,
        num_layers=sizes.layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=MAX_LATENT_FRAMES,
    )


def without_guide(recipe: VideoRecipe, denoiser: Any) -> Any:
    """The text-to-video denoiser inside the guided one: what it computes where there is no guide."""
    plain, weights = build_denoiser(recipe, guided=False), denoiser.state_dict()
    weights["patch_embedding.weight"] = weights["patch_embedding.weight"][:, : recipe.vae.z_dim]
    plain.load_state_dict(weights)
    return plain


def encode_captions(tokenizer: Any, encoder: nn.Module, captions: list[str], length: int = MAX_TOKENS) -> Tensor:
    """Embeddings [B, length, D], zero behind a caption's end, as `WanPipeline` makes them."""
    tokens = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    states: Tensor = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    kept = states * tokens.attention_mask[..., None]
    return pad(kept, (0, 0, 0, length - MAX_TOKENS))


def export(recipe: VideoRecipe, parts: dict[str, Any]) -> dict[str, Path]:
    """Writes `tiny-t2v` and `tiny-i2v` folders below `recipe.output`, weights in fp16; returns them by stage."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline

    found = {}
    parts = {**parts, "i2v": parts["denoiser"], "t2v": without_guide(recipe, parts["denoiser"])}
    parts = {name: deepcopy(part).half() if isinstance(part, nn.Module) else part for name, part in parts.items()}
    for stage, kind in (("t2v", WanPipeline), ("i2v", WanImageToVideoPipeline)):
        pipe = kind(
            tokenizer=parts["tokenizer"],
            text_encoder=parts["text"],
            vae=parts["vae"],
            scheduler=FlowMatchEulerDiscreteScheduler(shift=recipe.denoiser.shift),
            transformer=parts[stage],
        )
        folder = recipe.output / f"{recipe.name}-{stage}"
        pipe.save_pretrained(folder, safe_serialization=True)
        defaults = {
            "num_frames": recipe.num_frames,
            "height": recipe.size,
            "width": recipe.size,
            "fps": recipe.fps,
            "num_inference_steps": recipe.sampling_steps,
            "guidance_scale": recipe.guidance,
            "max_sequence_length": MAX_TOKENS,
        }
        (folder / "video_defaults.json").write_text(json.dumps(defaults, indent=1) + "\n")
        found[stage] = folder
    return found
