"""Tiny random pipelines of every supported family, built offline; prompts are given as embeddings."""

from __future__ import annotations

from typing import Any

import torch

PIXELS = 16


def text(length: int, size: int, seed: int = 3, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, size, generator=torch.Generator().manual_seed(seed))


def wan_vae() -> Any:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def wan_transformer(seed: int = 1, i2v: bool = False, image_dim: int | None = None, max_len: int = 64) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36 if i2v else 16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=max_len,
        image_dim=image_dim,
        added_kv_proj_dim=24 if image_dim else None,
    ).eval()


def flow_euler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def unipc() -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


WORDS = ("a", "red", "blue", "disc", "square", "moves", "left", "right")


def text_encoder() -> tuple[Any, Any]:
    """A tokenizer of a few words and a random T5 encoder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    vocab = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=len(vocab), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    return fast, UMT5EncoderModel(config).eval()


def wan(scheduler: Any = None, two: bool = False, expand: bool = False, reads: bool = False) -> Any:
    """`reads`: with a tokenizer and a text encoder."""
    from diffusers import WanPipeline

    tokenizer, encoder = text_encoder() if reads else (None, None)
    return quiet(
        WanPipeline(
            tokenizer=tokenizer,
            text_encoder=encoder,
            vae=wan_vae(),
            scheduler=scheduler or flow_euler(),
            transformer=wan_transformer(),
            transformer_2=wan_transformer(seed=2) if two else None,
            boundary_ratio=0.875 if two else None,
            expand_timesteps=expand,
        )
    )


def wan_call(num_frames: int, **changes: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": text(8, 32),
        "negative_prompt_embeds": text(8, 32, seed=4),
        "guidance_scale": 3.0,
        **_call(num_frames),
        **changes,
    }


def _call(num_frames: int) -> dict[str, Any]:
    return {
        "height": PIXELS,
        "width": PIXELS,
        "num_frames": num_frames,
        "num_inference_steps": 3,
        "generator": torch.Generator().manual_seed(5),
        "output_type": "latent",
    }


def clip_vision(hidden: int = 4, image: int = 4, projection: int = 4) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=hidden,
            projection_dim=projection,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=image,
            intermediate_size=16,
            patch_size=1 if image < 16 else image // 4,
        )
    ).eval()


def clip_images(size: int) -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(crop_size=size, size=size)


def wan_i2v(scheduler: Any = None, clip: bool = False) -> Any:
    from diffusers import WanImageToVideoPipeline

    return quiet(
        WanImageToVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=wan_vae(),
            scheduler=scheduler or flow_euler(),
            transformer=wan_transformer(i2v=True, image_dim=4 if clip else None),
            image_encoder=clip_vision() if clip else None,
            image_processor=clip_images(4) if clip else None,
        )
    )


def picture(seed: int = 7) -> torch.Tensor:
    return torch.rand(1, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(seed))


def wan_i2v_call(num_frames: int, clip: bool = False, **changes: Any) -> dict[str, Any]:
    call = wan_call(num_frames, image=picture())
    if clip:  # the processor of image tokens takes exactly 512 text tokens
        call |= {"prompt_embeds": text(512, 32), "negative_prompt_embeds": text(512, 32, seed=4)}
    return call | changes


def hunyuan_transformer(in_channels: int = 4, image_condition_type: str | None = None) -> Any:
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(1)
    return HunyuanVideoTransformer3DModel(
        in_channels=in_channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=image_condition_type != "latent_concat",
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        image_condition_type=image_condition_type,
    ).eval()


def hunyuan_vae() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(0)
    return AutoencoderKLHunyuanVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        act_fn="silu",
        norm_num_groups=4,
        scaling_factor=0.476986,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        mid_block_add_attention=True,
    ).eval()


def hunyuan(scheduler: Any = None) -> Any:
    from diffusers import HunyuanVideoPipeline

    return quiet(
        HunyuanVideoPipeline(
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=hunyuan_transformer(),
            vae=hunyuan_vae(),
            scheduler=scheduler or flow_euler(),
        )
    )


def hunyuan_call(num_frames: int, **changes: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": text(6, 16),
        "pooled_prompt_embeds": torch.randn(1, 8, generator=torch.Generator().manual_seed(4)),
        "prompt_attention_mask": torch.ones(1, 6),
        **_call(num_frames),
        **changes,
    }


def hunyuan_i2v(kind: str, scheduler: Any = None) -> Any:
    from diffusers import HunyuanVideoImageToVideoPipeline

    in_channels = 9 if kind == "latent_concat" else 4
    return quiet(
        HunyuanVideoImageToVideoPipeline(
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=hunyuan_transformer(in_channels, kind),
            vae=hunyuan_vae(),
            scheduler=scheduler or flow_euler(),
            image_processor=None,
        )
    )


def cogvideox_transformer(in_channels: int = 4, learned: bool = False) -> Any:
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(1)
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=2,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=learned,
    ).eval()


def cogvideox_vae() -> Any:
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()


def cogvideox(scheduler: Any = None) -> Any:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    return quiet(
        CogVideoXPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=cogvideox_vae(),
            transformer=cogvideox_transformer(),
            scheduler=scheduler or CogVideoXDDIMScheduler(),
        )
    )


def cogvideox_i2v(scheduler: Any = None) -> Any:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline

    return quiet(
        CogVideoXImageToVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=cogvideox_vae(),
            transformer=cogvideox_transformer(in_channels=8),
            scheduler=scheduler or CogVideoXDDIMScheduler(),
        )
    )


def cogvideox_call(num_frames: int, **changes: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": text(16, 32),
        "negative_prompt_embeds": text(16, 32, seed=4),
        "guidance_scale": 3.0,
        **_call(num_frames),
        **changes,
    }


def ltx(scheduler: Any = None) -> Any:
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    torch.manual_seed(1)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    ).eval()
    torch.manual_seed(0)
    vae = AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    ).eval()
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return quiet(
        LTXPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler or flow_euler(),
        )
    )


def ltx_call(num_frames: int, **changes: Any) -> dict[str, Any]:
    mask = torch.ones(1, 8, dtype=torch.bool)
    return {
        "prompt_embeds": text(8, 32),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": text(8, 32, seed=4),
        "negative_prompt_attention_mask": mask,
        "guidance_scale": 3.0,
        **_call(num_frames),
        "height": 32,
        "width": 32,
        **changes,
    }


def svd(scheduler: Any = None) -> Any:
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )

    torch.manual_seed(1)
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32,
        num_attention_heads=8,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    ).eval()
    torch.manual_seed(0)
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=[32, 64],
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        latent_channels=4,
    ).eval()
    return quiet(
        StableVideoDiffusionPipeline(
            vae=vae,
            image_encoder=clip_vision(32, 224, 32),
            unet=unet,
            scheduler=scheduler
            or EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True, sigma_max=700.0),
            feature_extractor=clip_images(224),
        )
    )


def svd_call(num_frames: int, **changes: Any) -> dict[str, Any]:
    return {"image": picture(), "max_guidance_scale": 2.0, **_call(num_frames), **changes}
