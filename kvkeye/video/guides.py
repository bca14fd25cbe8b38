"""Image-to-video families: how a guide frame in float reaches each pipeline, and where latents keep their time axis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvkeye.errors import ConfigError
from kvkeye.video.memo import memoised
from kvkeye.video.overrides import replaced


@dataclass(frozen=True)
class GuideAdapter:
    """One family.

    denoisers     names of the denoising modules
    frame_first   latents are [B, T, C, h, w] instead of [B, C, T, h, w]
    encoders      methods whose results all candidates of a chunk share
    scaled        (pipe, latents of the VAE) -> latents of the denoiser
    accept        (pipe) -> replacements of methods that would otherwise take the guide through 8 bits
    repeats_guide (pipe) -> whether a chunk begins with the guide itself
    image_per_clip  a batch of candidates needs a batch of guides
    """

    family: str
    denoisers: tuple[str, ...]
    frame_first: bool
    encoders: tuple[str, ...]
    scaled: Callable[[Any, Tensor], Tensor]
    accept: Callable[[Any], dict[str, Callable[..., Any]]]
    repeats_guide: Callable[[Any], bool] = lambda pipe: True
    image_per_clip: bool = True

    def modules(self, pipe: Any) -> list[Any]:
        return [module for name in self.denoisers if (module := getattr(pipe, name, None)) is not None]

    def canonical(self, latents: Tensor) -> Tensor:
        """Latents as [B, C, T, h, w]; its own inverse."""
        return latents.transpose(1, 2) if self.frame_first else latents

    @contextmanager
    def sharing(self, pipe: Any) -> Iterator[None]:
        """Within this block guides may be float tensors, and equal encodings are computed once."""
        with ExitStack() as stack:
            for name, method in self.accept(pipe).items():
                stack.enter_context(replaced(pipe, name, method))
            for name in self.encoders:
                stack.enter_context(replaced(pipe, name, memoised(getattr(pipe, name))))
            stack.enter_context(replaced(pipe.vae, "encode", memoised(pipe.vae.encode)))
            yield

    @torch.no_grad()
    def guide_latent(self, pipe: Any, guide: Tensor, height: int, width: int) -> Tensor:
        """The guide frame among the denoiser's latents: [C, h, w] fp32."""
        pixels = pipe.video_processor.preprocess(guide, height=height, width=width)
        pixels = pixels.to(pipe._execution_device, pipe.vae.dtype)
        encoded = pipe.vae.encode(pixels if self.family == "SVD" else pixels.unsqueeze(2)).latent_dist.mode()
        scaled = self.scaled(pipe, encoded.float())
        return scaled[0] if scaled.ndim == 4 else scaled[0, :, 0]


def _wan_scaled(pipe: Any, x: Tensor) -> Tensor:
    mean, std = (torch.tensor(getattr(pipe.vae.config, f"latents_{name}")).to(x) for name in ("mean", "std"))
    return (x - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)


def _wan_accept(pipe: Any) -> dict[str, Callable[..., Any]]:
    def encode_image(image: Any, device: Any = None) -> Any:
        scaled = {"do_rescale": False} if isinstance(image, Tensor) else {}
        inputs = pipe.image_processor(images=image, return_tensors="pt", **scaled).to(device or pipe._execution_device)
        return pipe.image_encoder(**inputs, output_hidden_states=True).hidden_states[-2]

    return {"encode_image": encode_image}


def _svd_accept(pipe: Any) -> dict[str, Callable[..., Any]]:
    from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing

    encode = pipe._encode_image

    def encode_image(image: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(image, Tensor):  # resized as the pipeline resizes PIL images
            image = (_resize_with_antialiasing(image.float() * 2 - 1, (224, 224)) + 1) / 2
        return encode(image, *args, **kwargs)

    return {"_encode_image": encode_image}


def _hunyuan_accept(pipe: Any) -> dict[str, Callable[..., Any]]:
    encode = pipe.encode_prompt

    def encode_prompt(image: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(image, Tensor):  # the language model's own picture is 8-bit; the VAE sees floats
            image = pipe.video_processor.numpy_to_pil(pipe.video_processor.pt_to_numpy(image))
            image = image[0] if len(image) == 1 else image
        return encode(image, *args, **kwargs)

    return {"encode_prompt": encode_prompt}


def _times(name: str) -> Callable[[Any, Tensor], Tensor]:
    def scaled(pipe: Any, x: Tensor) -> Tensor:
        return x * float(getattr(pipe.vae.config, name))

    return scaled


def _cogvideox_scaled(pipe: Any, x: Tensor) -> Tensor:
    factor = float(pipe.vae.config.scaling_factor)
    return x / factor if pipe.vae.config.invert_scale_latents else x * factor


GUIDES = {
    "WanImageToVideoPipeline": GuideAdapter(
        "Wan",
        ("transformer", "transformer_2"),
        False,
        ("encode_prompt", "encode_image"),
        _wan_scaled,
        _wan_accept,
        image_per_clip=False,
    ),
    "CogVideoXImageToVideoPipeline": GuideAdapter(
        "CogVideoX", ("transformer",), True, ("encode_prompt",), _cogvideox_scaled, lambda pipe: {}
    ),
    "HunyuanVideoImageToVideoPipeline": GuideAdapter(
        "HunyuanVideo",
        ("transformer",),
        False,
        ("encode_prompt",),
        _times("scaling_factor"),
        _hunyuan_accept,
        # with latent_concat the pipeline itself cuts the guide's latent off
        repeats_guide=lambda pipe: pipe.transformer.config.image_condition_type != "latent_concat",
    ),
    "StableVideoDiffusionPipeline": GuideAdapter(
        "SVD", ("unet",), True, ("_encode_image",), _times("scaling_factor"), _svd_accept
    ),
}


def guide_adapter_of(pipe: Any) -> GuideAdapter:
    """The adapter of an image-to-video pipeline. Raises ConfigError that lists the supported classes."""
    for kind in type(pipe).__mro__:
        if kind.__name__ in GUIDES:
            return GUIDES[kind.__name__]
    raise ConfigError(
        f"ChunkRollout: got a {type(pipe).__name__}; supported are {', '.join(GUIDES)}. Load one of these; text to "
        "video is VideoMerge's."
    )
