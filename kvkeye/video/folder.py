"""A pipeline's folder in diffusers' layout: what its JSON files say before any weight is read, and its loading.

`video_defaults.json`, which is ours, may name num_frames (of one clip), height, width, fps, num_inference_steps,
guidance_scale and max_sequence_length.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvkeye.errors import ConfigError, WeightError

NEEDED = ("Wan 2.1", "Wan 2.2", "HunyuanVideo", "CogVideoX", "LTX", "Stable Video Diffusion")
_FALLBACK: dict[str, Any] = {
    "num_frames": 49,
    "height": 480,
    "width": 720,
    "fps": 16.0,
    "num_inference_steps": 50,
    "guidance_scale": None,
    "max_sequence_length": None,
}
_BY_CLASS: dict[str, dict[str, Any]] = {
    "WanPipeline": {"num_frames": 81, "width": 832},
    "WanImageToVideoPipeline": {"num_frames": 81, "width": 832},
    "HunyuanVideoPipeline": {"num_frames": 129, "height": 720, "width": 1280, "fps": 24.0},
    "HunyuanVideoImageToVideoPipeline": {"num_frames": 129, "height": 720, "width": 1280, "fps": 24.0},
    "CogVideoXPipeline": {"fps": 8.0},
    "CogVideoXImageToVideoPipeline": {"fps": 8.0},
    "LTXPipeline": {"num_frames": 161, "height": 512, "width": 704, "fps": 24.0},
    "StableVideoDiffusionPipeline": {"num_frames": 25, "height": 576, "width": 1024, "fps": 7.0},
}


@dataclass(frozen=True)
class PipelineFolder:
    """Facts of a folder. `denoiser` has the denoiser's `config` alone, enough for an adapter's limits.

    `guidance_scale` and `max_sequence_length` (of the prompt, padding included) None: the pipeline's own default.
    """

    path: Path
    kind: str
    denoiser: Any
    ratio: int
    channels: int
    scale: int
    weight_bytes: int
    num_frames: int
    height: int
    width: int
    fps: float
    num_inference_steps: int
    guidance_scale: float | None
    max_sequence_length: int | None

    def latent_frames(self, num_frames: int) -> int:
        return (num_frames - 1) // self.ratio + 1

    def latent_bytes(self, num_frames: int, height: int, width: int) -> int:
        """Of one clip's latents in fp32."""
        return 4 * self.channels * self.latent_frames(num_frames) * (height // self.scale) * (width // self.scale)

    def pass_bytes(self, latent_frames: int, height: int, width: int, itemsize: int) -> int:
        """About what one forward pass over this many latent frames holds at a time: 12 rows per token."""
        config = vars(self.denoiser.config)
        rows = int(config.get("num_attention_heads") or 8) if isinstance(config.get("num_attention_heads"), int) else 8
        size = rows * int(config.get("attention_head_dim") or 64)
        patch = config.get("patch_size") or 2
        side = int(patch[-1]) if isinstance(patch, (list, tuple)) else int(patch)
        tokens = latent_frames * (height // self.scale // side) * (width // self.scale // side)
        return 12 * tokens * size * itemsize


def read_folder(path: Path) -> PipelineFolder:
    """Reads the folder's JSON files. Raises WeightError where it is no pipeline's folder."""
    index = _json(path / "model_index.json")
    kind = str(index.get("_class_name"))
    denoiser = _json(path / ("unet" if "unet" in index else "transformer") / "config.json")
    vae = _json(path / "vae" / "config.json")
    defaults = _FALLBACK | _BY_CLASS.get(kind, {})
    own = path / "video_defaults.json"
    if own.exists():
        defaults |= {key: value for key, value in _json(own).items() if key in _FALLBACK}
    temporal = 1 if kind.startswith("StableVideo") else _temporal(vae)
    return PipelineFolder(
        path=path,
        kind=kind,
        denoiser=SimpleNamespace(config=SimpleNamespace(**denoiser)),
        ratio=temporal,
        channels=int(vae.get("z_dim") or vae.get("latent_channels") or 16),
        scale=_spatial(vae),
        weight_bytes=sum(file.stat().st_size for file in path.rglob("*.safetensors")),
        **defaults,
    )


def _temporal(vae: dict[str, Any]) -> int:
    for name in ("temporal_compression_ratio", "scale_factor_temporal"):
        if vae.get(name):
            return int(vae[name])
    downs = vae.get("temperal_downsample")
    return 2 ** sum(downs) if downs else 4


def _spatial(vae: dict[str, Any]) -> int:
    for name in ("spatial_compression_ratio", "scale_factor_spatial"):
        if vae.get(name):
            return int(vae[name])
    blocks = vae.get("block_out_channels")
    return 2 ** (len(blocks) - 1) if blocks else 8


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightError(
            f"{path}: {error}. A pipeline's folder in diffusers' layout is required ({', '.join(NEEDED)})."
        ) from error
    if not isinstance(found, dict):
        raise WeightError(f"{path}: an object is required. Download the folder again.")
    return found


def load_pipeline(folder: PipelineFolder, dtype: Any, device: str, offload: bool) -> Any:
    """The pipeline, from safetensors alone, without network or code from the folder. Raises WeightError."""
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(
            folder.path, torch_dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
        raise WeightError(f"{folder.path}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def check_kind(folder: PipelineFolder, supported: dict[str, Any], method: str) -> None:
    """Raises ConfigError where a method does not run on this pipeline."""
    if folder.kind not in supported:
        raise ConfigError(
            f"--pipeline {folder.path}: a {folder.kind}; method {method} needs one of {', '.join(supported)}. Choose "
            "another folder or method."
        )
