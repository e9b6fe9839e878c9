"""Real diffusers and transformers modules, a few hundred kilobytes each, with seeded weights, and inputs.

Between them: ties (T5), memory orders (`channels_last_3d` VAE), strays that are neither parameter nor
buffer and complex (Qwen-Image), and mixed dtypes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build().eval().requires_grad_(False)


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )


def run_flux(model: nn.Module) -> torch.Tensor:
    make = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 16, 4, generator=make).to(dtype),
            encoder_hidden_states=torch.randn(1, 8, 32, generator=make).to(dtype),
            pooled_projections=torch.randn(1, 32, generator=make).to(dtype),
            timestep=torch.tensor([0.5], dtype=dtype),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(8, 3),
            guidance=torch.tensor([3.5], dtype=dtype),
        ).sample


def vae() -> nn.Module:
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)
    return model


def run_vae(model: nn.Module) -> torch.Tensor:
    latents = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model.decode(latents).sample


def t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    )


def run_t5(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12).reshape(1, 12)).last_hidden_state


def qwen() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def run_qwen(model: nn.Module) -> torch.Tensor:
    make = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 16, 16, generator=make),
            encoder_hidden_states=torch.randn(1, 7, 16, generator=make),
            encoder_hidden_states_mask=torch.ones(1, 7, dtype=torch.long),
            timestep=torch.tensor([0.3]),
            img_shapes=[(1, 4, 4)],
        ).sample


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "transformer": flux,
    "vae": vae,
    "text_encoder": t5,
    "qwen": qwen,
}
RUNNERS: dict[str, Callable[[nn.Module], torch.Tensor]] = {
    "transformer": run_flux,
    "vae": run_vae,
    "text_encoder": run_t5,
    "qwen": run_qwen,
}


def build(*names: str, seed: int = 0) -> dict[str, nn.Module]:
    """Components by name, each with the same weights for the same seed."""
    return {name: seeded(BUILDERS[name], seed) for name in names}


def outputs(modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {name: RUNNERS[name](module) for name, module in modules.items()}
