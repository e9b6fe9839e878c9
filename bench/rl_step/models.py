"""Real pipelines at their real sizes with random weights, made on the device in seconds, and their pictures.

Configurations are those of the published models; no tokenizer is needed, since prompts are token ids that go
through the text encoders. A tensor's values depend on its name and the seed alone, so that two processes
make the same weights, and a trainer needs no copy of the engine's.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from engine_hooks.integrations.from_config import build as build_from_config

GIB: Final = 1 << 30
TRAINED: Final = "transformer"
"""The component that the trainer trains; the others are frozen."""
PROMPT_SEED: Final = 11
IMAGE_SEED: Final = 42

_CLIP: Final = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_CLIP_BIG: Final = _CLIP | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_T5: Final = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "is_encoder_decoder": True,
}
_VAE: Final = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_FLUX_SCHEDULER: Final = {"use_dynamic_shifting": True, "shift": 3.0}


@dataclass(frozen=True)
class Component:
    """One model of a pipeline: ``library.Class`` and the config that it is built from."""

    kind: str
    config: Mapping[str, Any]

    @property
    def library(self) -> str:
        return self.kind.partition(".")[0]

    @property
    def name(self) -> str:
        return self.kind.partition(".")[2]

    def cls(self) -> Any:
        return getattr(import_module(self.library), self.name)


@dataclass(frozen=True)
class Model:
    """A pipeline to be built, and the picture it is asked for.

    Attributes:
        pipeline: its class in diffusers; `absent` are components it is to do without.
        side, steps, tokens: of the picture: pixels, denoising steps, tokens for the long text encoder.
        warm: bytes of host memory to touch before anything is measured (see `gpu_common.touch_memory`).
    """

    name: str
    pipeline: str
    components: Mapping[str, Component]
    scheduler: Mapping[str, Any]
    dtype: torch.dtype = torch.bfloat16
    side: int = 512
    steps: int = 4
    tokens: int = 256
    window: int = GIB
    warm: int = 0
    absent: tuple[str, ...] = field(default=())


_FLUX_ABSENT: Final = ("tokenizer", "tokenizer_2", "image_encoder", "feature_extractor")
_SD3_ABSENT: Final = ("tokenizer", "tokenizer_2", "tokenizer_3", "image_encoder", "feature_extractor")

MODELS: Final[dict[str, Model]] = {
    "flux1-dev": Model(
        "flux1-dev",
        "FluxPipeline",
        {
            "text_encoder": Component("transformers.CLIPTextModel", _CLIP),
            "text_encoder_2": Component("transformers.T5EncoderModel", _T5),
            "vae": Component(
                "diffusers.AutoencoderKL", _VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}
            ),
            TRAINED: Component(
                "diffusers.FluxTransformer2DModel",
                {
                    "patch_size": 1,
                    "in_channels": 64,
                    "num_layers": 19,
                    "num_single_layers": 38,
                    "attention_head_dim": 128,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 4096,
                    "pooled_projection_dim": 768,
                    "guidance_embeds": True,
                    "axes_dims_rope": [16, 56, 56],
                },
            ),
        },
        _FLUX_SCHEDULER,
        warm=88 * GIB,
        absent=_FLUX_ABSENT,
    ),
    "sd3.5-medium": Model(
        "sd3.5-medium",
        "StableDiffusion3Pipeline",
        {
            "text_encoder": Component("transformers.CLIPTextModelWithProjection", _CLIP),
            "text_encoder_2": Component("transformers.CLIPTextModelWithProjection", _CLIP_BIG),
            "text_encoder_3": Component("transformers.T5EncoderModel", _T5),
            "vae": Component(
                "diffusers.AutoencoderKL", _VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609}
            ),
            TRAINED: Component(
                "diffusers.SD3Transformer2DModel",
                {
                    "sample_size": 128,
                    "patch_size": 2,
                    "in_channels": 16,
                    "out_channels": 16,
                    "num_layers": 24,
                    "attention_head_dim": 64,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 4096,
                    "caption_projection_dim": 1536,
                    "pooled_projection_dim": 2048,
                    "pos_embed_max_size": 384,
                    "dual_attention_layers": list(range(13)),
                    "qk_norm": "rms_norm",
                },
            ),
        },
        {"shift": 3.0},
        warm=40 * GIB,
        absent=_SD3_ABSENT,
    ),
    "tiny": Model(
        "tiny",
        "FluxPipeline",
        {
            "text_encoder": Component(
                "transformers.CLIPTextModel",
                {
                    "hidden_size": 32,
                    "intermediate_size": 37,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "vocab_size": 300,
                    "max_position_embeddings": 24,
                    "projection_dim": 32,
                    "bos_token_id": 298,
                    "eos_token_id": 299,
                },
            ),
            "text_encoder_2": Component(
                "transformers.T5EncoderModel",
                {
                    "vocab_size": 300,
                    "d_model": 32,
                    "d_kv": 8,
                    "d_ff": 37,
                    "num_layers": 2,
                    "num_heads": 4,
                    "feed_forward_proj": "gated-gelu",
                    "tie_word_embeddings": False,
                },
            ),
            "vae": Component(
                "diffusers.AutoencoderKL",
                {
                    "block_out_channels": [8, 16],
                    "down_block_types": ["DownEncoderBlock2D"] * 2,
                    "up_block_types": ["UpDecoderBlock2D"] * 2,
                    "latent_channels": 4,
                    "norm_num_groups": 4,
                    "sample_size": 16,
                    "scaling_factor": 0.5,
                    "shift_factor": 0.1,
                    "use_quant_conv": False,
                    "use_post_quant_conv": False,
                },
            ),
            TRAINED: Component(
                "diffusers.FluxTransformer2DModel",
                {
                    "patch_size": 1,
                    "in_channels": 16,
                    "num_layers": 1,
                    "num_single_layers": 2,
                    "attention_head_dim": 16,
                    "num_attention_heads": 2,
                    "joint_attention_dim": 32,
                    "pooled_projection_dim": 32,
                    "guidance_embeds": True,
                    "axes_dims_rope": [4, 4, 8],
                },
            ),
        },
        _FLUX_SCHEDULER,
        dtype=torch.float32,
        side=16,
        steps=2,
        tokens=16,
        window=4 << 20,
        absent=_FLUX_ABSENT,
    ),
}


# -- configurations on disk -----------------------------------------------------------------------------


def write_configs(model: Model, directory: Path) -> Path:
    """A pipeline directory with everything but weights and tokenizers."""
    import diffusers

    index: dict[str, Any] = {"_class_name": model.pipeline, "_diffusers_version": diffusers.__version__}
    for name, component in model.components.items():
        index[name] = [component.library, component.name]
        home = directory / name
        home.mkdir(parents=True, exist_ok=True)
        if component.library == "transformers":
            component.cls().config_class(**component.config).save_pretrained(str(home))
        else:
            (home / "config.json").write_text(
                json.dumps({"_class_name": component.name, **component.config}, indent=1)
            )
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    diffusers.FlowMatchEulerDiscreteScheduler(**model.scheduler).save_pretrained(str(directory / "scheduler"))
    index |= {name: [None, None] for name in model.absent}
    (directory / "model_index.json").write_text(json.dumps(index, indent=1))
    return directory


# -- weights --------------------------------------------------------------------------------------------


def build(model: Model, name: str, directory: Path, device: str, seed: int) -> nn.Module:
    """One component with random weights, made on the device; `directory` is what `write_configs` wrote."""
    module = build_from_config(name, model.components[name].cls(), directory / name, model.dtype)
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for leaf, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(
                        torch.empty_like(parameter, device=device), requires_grad=False
                    )
                part._parameters[leaf] = made[id(parameter)]  # a tie stays one
    module.to(device)
    fill(module, name, seed)
    return module.requires_grad_(False).eval()


def fill(module: nn.Module, prefix: str, seed: int) -> None:
    """Random values at which signals neither die nor blow up, by the parameter's name."""
    for name, parameter in module.named_parameters():
        random = generator(parameter.device, seed, f"{prefix}.{name}")
        with torch.no_grad():
            if parameter.dim() >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=random)
            elif name.endswith("bias"):
                parameter.normal_(std=0.02, generator=random)
            else:
                parameter.normal_(mean=1.0, std=0.05, generator=random)


def generator(device: torch.device | str, seed: int, name: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed << 32 | zlib.crc32(name.encode()))


def assemble(model: Model, modules: Mapping[str, nn.Module], directory: Path) -> Any:
    """The pipeline of these modules."""
    import diffusers

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(str(directory / "scheduler"))
    kind = getattr(diffusers, model.pipeline)
    return kind(**modules, scheduler=scheduler, **dict.fromkeys(required_absent(model)))


def required_absent(model: Model) -> list[str]:
    """What the pipeline is to do without, and its constructor must be told so."""
    return [name for name in model.absent if name.startswith("tokenizer")]


def import_classes(model: Model) -> None:
    """Import all that building the pipeline will need, which is most of the time that a launch takes."""
    import diffusers

    getattr(diffusers, model.pipeline)
    for component in model.components.values():
        component.cls()


def bytes_of(module: nn.Module) -> int:
    """Bytes of what its checkpoint has, ties once."""
    return sum({id(tensor): tensor.nbytes for tensor in module.state_dict(keep_vars=True).values()}.values())


# -- pictures -------------------------------------------------------------------------------------------


def draw(model: Model, pipe: Any, device: str) -> torch.Tensor:
    """Exact pixels in 0…1, float32 on the CPU, of the one picture that all are asked for: through every
    component, from the same ids and the same noise."""
    with torch.no_grad():
        embeds, pooled = _flux_prompt(model, pipe, device) if _is_flux(model) else _sd3(model, pipe, device)
        options = {"guidance_scale": 3.5} if _is_flux(model) else {"guidance_scale": 1.0}
        made = pipe(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            height=model.side,
            width=model.side,
            num_inference_steps=model.steps,
            generator=torch.Generator("cpu").manual_seed(IMAGE_SEED),
            output_type="pt",
            **options,
        )
        pixels: torch.Tensor = made.images.float().cpu().contiguous()
    return pixels


def digest(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()


def _is_flux(model: Model) -> bool:
    return model.pipeline == "FluxPipeline"


def _ids(encoder: Any, tokens: int, device: str) -> torch.Tensor:
    """Token ids that end as CLIP's do: with the highest."""
    vocabulary: int = encoder.config.vocab_size
    random = torch.Generator("cpu").manual_seed(PROMPT_SEED)
    ids = torch.randint(3, vocabulary - 2, (1, tokens), generator=random)
    ids[0, -1] = vocabulary - 1
    return ids.to(device)


def _clip_tokens(encoder: Any) -> int:
    found: int = encoder.config.max_position_embeddings
    return found


def _flux_prompt(model: Model, pipe: Any, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    clip, t5 = pipe.text_encoder, pipe.text_encoder_2
    pooled = clip(_ids(clip, _clip_tokens(clip), device)).pooler_output
    return t5(_ids(t5, model.tokens, device))[0], pooled


def _sd3(model: Model, pipe: Any, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, pooled = [], []
    for clip in (pipe.text_encoder, pipe.text_encoder_2):
        found = clip(_ids(clip, _clip_tokens(clip), device), output_hidden_states=True)
        hidden.append(found.hidden_states[-2])
        pooled.append(found[0])
    t5 = pipe.text_encoder_3(_ids(pipe.text_encoder_3, model.tokens, device))[0]
    both = torch.cat(hidden, dim=-1)
    both = nn.functional.pad(both, (0, t5.shape[-1] - both.shape[-1]))
    return torch.cat([both, t5], dim=-2), torch.cat(pooled, dim=-1)


def frozen(model: Model) -> Iterator[str]:
    return (name for name in model.components if name != TRAINED)


def save(modules: Mapping[str, Any], directory: Path, names: Collection[str]) -> int:
    """Write components as `save_pretrained` does, over what is there; bytes of the weight files."""
    total = 0
    for name in names:
        home = directory / name
        for old in home.glob("*.safetensors*"):
            old.unlink()  # first: a disk need not hold two
        modules[name].save_pretrained(str(home))
        total += sum(path.stat().st_size for path in home.glob("*.safetensors"))
    return total
