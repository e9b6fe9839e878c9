"""Real diffusers pipelines, whole and working, small enough for a CPU: prompt in, pixels out, no hub.

`build(kind, seed)` makes one with seeded weights (the same for the same seed), tokenizers and all;
`save` writes it as a pipeline directory that `from_pretrained` reads; `generate` runs it. Some
components hold what is easily lost on the way: tables that are neither parameter nor buffer
(Qwen-Image), buffers that no checkpoint has (position ids, rotary tables), ties (T5), two experts (Wan).
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

KINDS = ("flux", "qwen-image", "wan", "sd3", "sdxl")
TRAINED = {
    "flux": ("transformer",),
    "qwen-image": ("transformer",),
    "wan": ("transformer", "transformer_2"),
    "sd3": ("transformer",),
    "sdxl": ("unet",),
}
"""The components of each kind that a trainer trains; the others are frozen."""

PROMPT = "a cat on a red mat"
_WIDTH = 32


def build(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline of one of `KINDS`, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = _BUILDERS[kind]()
        for _, module in sorted(modules_of(pipe).items()):
            _fill(module)
            _cast(module, dtype)
            module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def save(pipe: Any, directory: Path, weights: bool = True) -> Path:
    """Write the pipeline directory; without `weights` only what is not a weight stays in it."""
    pipe.save_pretrained(str(directory))
    if not weights:
        drop_weights(directory)
    return directory


def drop_weights(directory: Path) -> None:
    """Delete every weight file, indexes too."""
    for pattern in ("*.safetensors", "*.bin", "*.index.json"):
        for path in directory.rglob(pattern):
            path.unlink()


def generate(pipe: Any, prompt: str = PROMPT, seed: int = 5) -> torch.Tensor:
    """Pixels in 0…1, [images or frames, …]: 2 steps of 16 × 16, in which every component has a part."""
    made = pipe(
        prompt=prompt,
        num_inference_steps=2,
        height=16,
        width=16,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="pt",
        **_OPTIONS[type(pipe).__name__],
    )
    pixels: torch.Tensor = made.frames if hasattr(made, "frames") else made.images
    return pixels


_OPTIONS: dict[str, dict[str, Any]] = {
    "FluxPipeline": {"max_sequence_length": 24},
    "QwenImagePipeline": {"true_cfg_scale": 1.0},
    "WanPipeline": {"max_sequence_length": 24, "num_frames": 5},
    "StableDiffusion3Pipeline": {"max_sequence_length": 24},
    "StableDiffusionXLPipeline": {},
}


def _fill(module: nn.Module) -> None:
    """Weights with which every component shows in the picture; those of a fresh module are too alike."""
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        else:
            nn.init.normal_(parameter, mean=1.0, std=0.1)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """As from_pretrained does, with the modules that a class keeps in float32: transformers, from float16."""
    from diffusers import ModelMixin

    kept = isinstance(module, ModelMixin) or dtype is torch.float16
    parts = (getattr(module, "_keep_in_fp32_modules", None) or ()) if kept else ()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not any(part in parts for part in name.split(".")):
            tensor.data = tensor.data.to(dtype)


# -- tokenizers: one token for each character -----------------------------------------------------------


def _byte_characters() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    tokens = [mark + end for end in ("", "</w>") for mark in _byte_characters()]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=24)


def _t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(letter, -3.0) for letter in string.ascii_lowercase]
    return T5TokenizerFast(vocab=special + letters, extra_ids=0, model_max_length=24)


def _qwen_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    tokens = [*_byte_characters(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=1024)


# -- encoders -------------------------------------------------------------------------------------------


def _clip(tokenizer: Any, projection: bool) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=37,
        projection_dim=_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def _t5(tokenizer: Any, multilingual: bool = False) -> nn.Module:
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    sizes = {
        "vocab_size": len(tokenizer),
        "d_model": _WIDTH,
        "d_kv": 8,
        "d_ff": 37,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    }
    return UMT5EncoderModel(UMT5Config(**sizes)) if multilingual else T5EncoderModel(T5Config(**sizes))


def _qwen_vl(tokenizer: Any) -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": _WIDTH,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "depth": 2,
        "hidden_size": _WIDTH,
        "intermediate_size": 37,
        "num_heads": 2,
        "out_hidden_size": _WIDTH,
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


# -- VAEs -----------------------------------------------------------------------------------------------


def _vae(quant_conv: bool = False) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
        shift_factor=0.1,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
    )


def _video_vae(qwen: bool = False) -> nn.Module:
    from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan

    make = AutoencoderKLQwenImage if qwen else AutoencoderKLWan
    return make(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 4,
        latents_std=[0.9] * 4,
    )


# -- pipelines ------------------------------------------------------------------------------------------


def _flow(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def _flux() -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    clip, t5 = _clip_tokenizer(), _t5_tokenizer()
    return FluxPipeline(
        scheduler=_flow(use_dynamic_shifting=True),
        vae=_vae(),
        text_encoder=_clip(clip, projection=False),
        tokenizer=clip,
        text_encoder_2=_t5(t5),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=_WIDTH,
            pooled_projection_dim=_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def _qwen_image() -> Any:
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    tokenizer = _qwen_tokenizer()
    return QwenImagePipeline(
        scheduler=_flow(use_dynamic_shifting=True),
        vae=_video_vae(qwen=True),
        text_encoder=_qwen_vl(tokenizer),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=_WIDTH,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def _wan() -> Any:
    from diffusers import WanPipeline, WanTransformer3DModel

    def expert() -> nn.Module:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=_WIDTH,
            freq_dim=64,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )

    tokenizer = _t5_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5(tokenizer, multilingual=True),
        vae=_video_vae(),
        scheduler=_flow(shift=7.0),
        transformer=expert(),
        transformer_2=expert(),
        boundary_ratio=0.9,
    )


def _sd3() -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    clip, t5 = _clip_tokenizer(), _t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=_WIDTH,
            joint_attention_dim=2 * _WIDTH,
            pooled_projection_dim=2 * _WIDTH,
            qk_norm="rms_norm",
        ),
        scheduler=_flow(shift=3.0),
        vae=_vae(),
        text_encoder=_clip(clip, projection=True),
        tokenizer=clip,
        text_encoder_2=_clip(clip, projection=True),
        tokenizer_2=clip,
        text_encoder_3=_t5_wide(t5),
        tokenizer_3=t5,
    )


def _t5_wide(tokenizer: Any) -> nn.Module:
    """SD3 puts its two CLIP embeddings side by side and T5's below: T5 is as wide as both."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=2 * _WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    )


def _sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer = _clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=_vae(quant_conv=True),
        text_encoder=_clip(tokenizer, projection=False),
        text_encoder_2=_clip(tokenizer, projection=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=1,
            projection_class_embeddings_input_dim=6 * 8 + _WIDTH,
            cross_attention_dim=2 * _WIDTH,
            norm_num_groups=4,
        ),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


_BUILDERS: dict[str, Callable[[], Any]] = {
    "flux": _flux,
    "qwen-image": _qwen_image,
    "wan": _wan,
    "sd3": _sd3,
    "sdxl": _sdxl,
}
