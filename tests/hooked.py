"""What the hook's tests share: a small engine, backends that fail on demand, a look at modules bit by bit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from engine_hooks.backend import Image, Meanwhile, Run
from engine_hooks.host import HostBackend
from weightstore.client import Store
from weightstore.errors import DeviceError, DeviceMemoryError
from weightstore.mapping import ArenaMapping

PATIENCE = 20.0

_numbers = itertools.count()


def fresh_model() -> str:
    """A model name no other test of this run uses."""
    return f"model-{next(_numbers)}"


def addresses(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    return {f"{c}.{n}": t.data_ptr() for c, m in modules.items() for n, t in m.state_dict().items()}


def scaled(module: nn.Module, factor: float, prefix: str, only: str = "") -> dict[str, torch.Tensor]:
    """Next-version tensors: the module's parameters times `factor`, those whose names contain `only`."""
    return {
        f"{prefix}.{name}": tensor.detach() * factor
        for name, tensor in module.state_dict().items()
        if only in name
    }


def publish(
    store: Store, model: str, modules: Mapping[str, nn.Module], tag: str = "latest", **how: object
) -> int:
    with store.refit(model, tag=tag, **how) as refit:  # type: ignore[arg-type]
        for name, module in modules.items():
            refit.put_module(module, prefix=f"{name}.")
    return refit.report.version


class Net(nn.Module):
    """Two layers as weights, a step counter and a cache as engine state."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)
        self.cache = [torch.zeros(3, dtype=torch.complex64)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return self.second(torch.relu(self.first(x)))


def net(seed: int = 0, width: int = 32) -> Net:
    torch.manual_seed(seed)
    return Net(width).eval().requires_grad_(False)


X = torch.linspace(-1, 1, 64).reshape(2, 32)


def leases(store: Store, model: str) -> list[int]:
    return [lease.version for lease in store.status().leases if lease.model == model]


class Faulty(HostBackend):
    """Does half of what it is told and then fails, as often as `fail` says for each method."""

    def __init__(self) -> None:
        super().__init__()
        self.fail: dict[str, int] = {}

    def _fails(self, method: str) -> bool:
        left = self.fail.get(method, 0)
        self.fail[method] = max(0, left - 1)
        return left > 0

    def wake(
        self,
        fills: Sequence[tuple[Image, Sequence[Run]]],
        source: ArenaMapping,
        meanwhile: Meanwhile | None = None,
    ) -> None:
        if self._fails("wake"):
            raise DeviceMemoryError("no memory today")
        super().wake(fills, source, meanwhile)

    def update(
        self,
        fills: Sequence[tuple[Image, Sequence[Run]]],
        source: ArenaMapping,
        meanwhile: Meanwhile | None = None,
    ) -> None:
        half = [(image, runs[: max(1, len(runs) // 2)]) for image, runs in fills[:1]]
        if self._fails("update"):
            super().update(half, source)
            raise DeviceError("the copy engine stopped")
        if self._fails("landing"):  # found out only when the copies are waited for
            super().update(half, source, meanwhile)
            raise DeviceError("the copy engine stopped")
        super().update(fills, source, meanwhile)

    def unmap(self, images: Sequence[Image]) -> None:
        if self._fails("unmap"):
            super().unmap(images[: len(images) // 2])
            raise DeviceError("the driver lost count")
        super().unmap(images)
