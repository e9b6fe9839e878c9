"""An engine's module with everything that is easy to lose: ties, memory orders, odd dtypes, state."""

from __future__ import annotations

import torch
from torch import nn

WIDTH = 512


class Toy(nn.Module):
    """bf16 linears and a tied embedding, a channels_last_3d convolution, fp8 weights, a 0-dim buffer, one
    that is not persistent and a complex tensor that is neither parameter nor buffer."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 1000, bias=False)
        self.head.weight = self.embed.weight
        self.conv = nn.Conv3d(8, 16, 3).to(memory_format=torch.channels_last_3d)
        self.eight = nn.Parameter(torch.randn(64, WIDTH).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("scale", torch.tensor(1.25))
        self.register_buffer("calls", torch.tensor(3), persistent=False)
        self.rotary = torch.polar(torch.ones(33), torch.linspace(0, 3, 33))
        self.to(torch.bfloat16)
        self.eight.data = torch.randn(64, WIDTH).to(torch.float8_e4m3fn)
        self.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + torch.nn.functional.gelu(layer(x))
        x = x * self.scale + self.eight.to(x.dtype).sum(0)
        video = self.conv(x.reshape(-1)[: 8 * 4**3].reshape(1, 8, 4, 4, 4))
        turn = torch.view_as_real(self.rotary).sum().to(x.dtype)
        return self.head(x) + video.sum() + turn


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Everything a Toy holds, by name."""
    found = dict(module.state_dict(keep_vars=True))
    found["calls"] = module.get_buffer("calls")
    found["rotary"] = module.rotary
    return found


def bits(module: nn.Module) -> dict[str, bytes]:
    """The bytes, layout and dtype of everything a Toy holds."""
    return {
        name: repr((tensor.dtype, tuple(tensor.shape), tensor.stride())).encode()
        + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors(module).items()
    }


def changed(module: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """New values of the same layout, on the same device, for everything in the state dict; tied ones once."""
    make = torch.Generator().manual_seed(seed)
    new = {}
    for name, tensor in module.state_dict().items():
        if name == "head.weight":
            continue
        values = torch.randn(tensor.shape, generator=make).to(tensor.dtype).to(tensor.device)
        new[name] = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
        new[name].copy_(values)
    return new
