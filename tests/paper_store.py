"""Records and bytes of modules as a store would hold them, without a store: for tests of pure parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from engine_hooks.find import Kind, find_tensors
from engine_hooks.groups import raw_bytes
from engine_hooks.survey import Survey, survey
from weightstore.types import TensorRecord, align_up

CPU = torch.device("cpu")


def nothing(name: str) -> bool:
    return False


class Paper:
    """`records` and an `arena` (a uint8 tensor) holding the modules' parameters and persistent buffers."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.records: dict[str, TensorRecord] = {}
        chunks: list[torch.Tensor] = []
        cursor = 0
        for found in find_tensors(modules):
            if found.kind not in (Kind.PARAMETER, Kind.BUFFER):
                continue
            tensor = found.tensor.detach()
            for name in found.names:
                self.records[name] = TensorRecord(
                    name,
                    str(tensor.dtype).removeprefix("torch."),
                    tuple(tensor.shape),
                    tensor.stride(),
                    cursor,
                    tensor.numel() * tensor.itemsize,
                )
            raw = raw_bytes(tensor)
            chunks += [raw, torch.zeros(-raw.numel() % 256, dtype=torch.uint8)]
            cursor = align_up(cursor + raw.numel())
        self.arena = torch.cat(chunks)

    def survey(
        self, modules: Mapping[str, nn.Module], ignored: Callable[[str], bool] = nothing
    ) -> dict[str, Survey]:
        return survey(modules, self.records, ignored, CPU)

    def fill(self, surveyed: Survey, image: torch.Tensor) -> None:
        for name, offset in surveyed.offsets.items():
            record = self.records[name]
            image[offset : offset + record.nbytes] = self.arena[record.offset : record.offset + record.nbytes]
