"""What the trainers and the engine of `test_in_place` do, each in a process of its own (see `children`)."""

from __future__ import annotations

import torch
from children import Step
from torch import nn

from engine_hooks import EngineHook
from weightstore.client import connect
from weightstore.errors import WeightstoreError

ROWS = 700
NAMES = ("a", "b", "c")


def state_dict(value: float, rows: int = ROWS) -> dict[str, torch.Tensor]:
    """A transformer whose every element is `value`."""
    return {f"transformer.{name}": torch.full((rows, 100), value) for name in NAMES}


class Transformer(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        for name in NAMES:
            self.register_parameter(name, nn.Parameter(torch.empty(rows, 100, device="meta")))


def train(step: Step, socket: str, model: str, value: float, rows: int = ROWS) -> int:
    """An in-place refit that stops before each tensor, and at the end; told to fail or hang up, it does."""
    with connect(socket) as store, store.refit(model, components=["transformer"], in_place=True) as refit:
        for name, tensor in state_dict(value, rows).items():
            order = step(f"before {name}")
            if order == "fail":
                raise WeightstoreError("the loss is NaN")
            if order == "hang up":
                store.link.connect().close()
                step("hung up")
            refit.put(name, tensor)
        step("all written")
        return refit.commit()


def train_rank(step: Step, socket: str, model: str, value: float, rank: int) -> int:
    """One of two ranks of an in-place refit; it has half of the rows."""
    half = ROWS // 2
    with connect(socket) as store:
        refit = store.refit(
            model, components=["transformer"], in_place=True, key="step", rank=rank, world_size=2
        )
        with refit:
            for name, tensor in state_dict(value).items():
                refit.put_part(name, tensor[rank * half : (rank + 1) * half], at=(rank * half, 0))
            step("half written")
        return refit.report.version


def engine(step: Step, socket: str, model: str, rows: int = ROWS) -> None:
    """Does what it is told: the name of a method of its hook, or `close`. Answers with its state, its version
    and the values its weights have; or with the error."""
    with connect(socket) as store:
        module = Transformer(rows)
        hook = EngineHook.attach(store, model, {"transformer": module})
        fact: object = "attached"
        while True:
            command = step("waiting", fact)
            if command == "close":
                break
            try:
                getattr(hook, command)()
                values = []
                if hook.state.name == "AWAKE":
                    values = sorted({value for p in module.parameters() for value in p.unique().tolist()})
                fact = {"state": hook.state.name, "version": hook.version, "values": values}
            except WeightstoreError as error:
                fact = {"state": hook.state.name, "error": type(error).__name__, "message": error.message}
        hook.close()
