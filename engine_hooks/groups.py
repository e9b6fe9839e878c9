"""Tensors grouped by the memory they share, so that ties stay ties and views follow what they view.

Invariants:
- two tensors are in one group exactly when a chain of overlapping byte spans joins them; mere
  neighbours in one storage (as checkpoint loaders make them) are apart;
- a group's offsets keep the distances the tensors have now, and its start keeps its alignment;
- tensors without elements share nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch

from engine_hooks.find import Found

_LEAD: Final = 16
"""The largest element in bytes (complex128): a group starts at the same offset modulo this as now."""


def span(shape: Iterable[int], stride: Iterable[int], itemsize: int) -> int:
    """Bytes from the first to the last element, both included; 0 without elements."""
    last = 0
    for size, step in zip(shape, stride, strict=True):
        if size == 0:
            return 0
        last += (size - 1) * step
    return (last + 1) * itemsize


def span_of(tensor: torch.Tensor) -> int:
    return span(tensor.shape, tensor.stride(), tensor.itemsize)


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's span as a flat uint8 view, gaps and all; lazy conjugation plays no part."""
    nbytes = span_of(tensor)
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    if nbytes:
        start = tensor.storage_offset() * tensor.itemsize
        flat.set_(tensor.untyped_storage(), start, (nbytes,), (1,))
    return flat


@dataclass(eq=False)
class Group:
    """Tensors that share memory. `starts` are byte offsets from the group's start, parallel to `members`."""

    members: list[Found]
    starts: list[int]
    nbytes: int
    lead: int
    """The start's distance from a 16-byte border."""

    def covers(self, member: int) -> bool:
        """Whether every other tensor lies inside this one."""
        return self.starts[member] == 0 and span_of(self.members[member].tensor) == self.nbytes

    def same_place(self, one: int, other: int) -> bool:
        a, b = self.members[one].tensor, self.members[other].tensor
        return (
            self.starts[one] == self.starts[other]
            and a.shape == b.shape
            and a.dtype == b.dtype
            and a.stride() == b.stride()
        )


def group_by_memory(found: Iterable[Found]) -> list[Group]:
    """Groups in the order in which their first tensors were found."""
    found = list(found)
    spaces: dict[tuple[str, int], list[tuple[int, int, Found]]] = {}
    groups: list[Group] = []
    for item in found:
        tensor = item.tensor
        nbytes = span_of(tensor)
        if not nbytes:
            groups.append(Group([item], [0], 0, 0))
        elif item.is_meta:
            # No memory: two meta tensors overlap if they do inside one (imaginary) storage.
            space = ("meta", tensor.untyped_storage()._cdata)
            start = int(tensor.storage_offset()) * tensor.itemsize
            spaces.setdefault(space, []).append((start, nbytes, item))
        else:
            spaces.setdefault((str(tensor.device), 0), []).append((tensor.data_ptr(), nbytes, item))
    for spans in spaces.values():
        spans.sort(key=lambda entry: entry[:2])
        start = end = -1
        for address, nbytes, item in spans:
            if address >= end:
                start = end = address
                groups.append(Group([], [], 0, address % _LEAD))
            groups[-1].members.append(item)
            groups[-1].starts.append(address - start)
            end = max(end, address + nbytes)
            groups[-1].nbytes = end - start
    order = {id(item): index for index, item in enumerate(found)}
    return sorted(groups, key=lambda group: min(order[id(item)] for item in group.members))
