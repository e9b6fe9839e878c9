"""From adapted modules to stored weights: through the refit's name map, into fused and out of split tensors.

Invariant: every module given has its weight among the stored ones, with B·A of its shape, or all are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
import torch

from weightstore.errors import CoverageError
from weightstore.lora.state_dict import Module
from weightstore.lora.stored import WEIGHTS
from weightstore.names.name_map import NameMap
from weightstore.names.plan import Plan, hinted
from weightstore.names.resolve import resolve
from weightstore.names.router import Router
from weightstore.names.rows import Given, Row, Stored

if TYPE_CHECKING:
    from weightstore.types import Box

_SHOWN: Final = 6
_ANY: Final = "float32"
"""An adapter's dtype need not be its weight's, so names are resolved as if all had this one."""


class Update(NamedTuple):
    """What is added to one stored weight: scale · B·A, of the weight's shape."""

    target: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float


def updates_of(
    modules: Sequence[Module], names: NameMap | None, prefix: str, stored: Stored, dtype: torch.dtype
) -> list[Update]:
    """The update of every stored weight that `modules` adapt.

    Where several modules are fused into one weight their A lie one below the other, and their B block by
    block;
    if their scales differ, B is multiplied by them in `dtype`.

    Raises:
        CoverageError: modules without a weight, or with one of another shape or not of a dtype to add to;
            with likely names. Also if all of them are dropped by the map.
    """
    named = {f"{prefix}{module.name}.weight": module for module in modules}
    records = {n: msgspec.structs.replace(r, dtype=_ANY) for n, r in stored.records.items()}
    place = Stored(f"{stored.what}, LoRA", records, stored.components, closed=True, partial=True)
    given = [Given(name, _ANY, module.shape) for name, module in named.items()]
    # Not `plan`: of a fused weight a part may stay as it is.
    rows = hinted(resolve(Router(names or NameMap()), given, place), [], place)
    Plan(place.what, tuple(rows), ()).raise_for_problems()
    pieces: dict[str, list[tuple[Row, Module]]] = {}
    for row in rows:
        if row.target is not None and row.source is not None:
            pieces.setdefault(row.target, []).append((row, named[row.source]))
    _refuse_quantised(pieces, stored)
    updates = [_update(target, stored.records[target].shape, some, dtype) for target, some in pieces.items()]
    return updates


def _refuse_quantised(targets: Iterable[str], stored: Stored) -> None:
    wrong = [name for name in targets if stored.records[name].dtype not in WEIGHTS]
    if wrong:
        raise CoverageError(
            f"{stored.what}, LoRA: {len(wrong)} weights are stored as {stored.records[wrong[0]].dtype}, to "
            f"which nothing can be added: {', '.join(wrong[:_SHOWN])}{', …' if len(wrong) > _SHOWN else ''}",
            mismatched=wrong,
        )


def _update(
    target: str, shape: tuple[int, ...], pieces: Sequence[tuple[Row, Module]], dtype: torch.dtype
) -> Update:
    parts = [_cut(module, row.part) for row, module in pieces]
    scales = [module.scale for _, module in pieces]
    if pieces[0][0].box is None:
        return Update(target, *parts[0], scales[0])
    common = len(set(scales)) == 1
    device, rank = parts[0][0].device, sum(len(a) for a, _ in parts)
    kind = torch.promote_types(parts[0][0].dtype, parts[0][1].dtype)
    for a, b in parts:
        kind = torch.promote_types(kind, torch.promote_types(a.dtype, b.dtype))
    whole_a = torch.zeros((rank, *shape[1:]), dtype=kind, device=device)
    whole_b = torch.zeros(
        (shape[0], rank, *(1,) * (len(shape) - 2)), dtype=kind if common else dtype, device=device
    )
    at = 0
    for (row, _), (a, b), scale in zip(pieces, parts, scales, strict=True):
        assert row.box is not None
        own = slice(at, at + len(a))
        rows, *columns = (slice(lo, hi) for lo, hi in zip(row.box.lo, row.box.hi, strict=True))
        whole_a[(own, *columns)].copy_(a)
        whole_b[rows, own].copy_(b if common else b.to(device, dtype) * scale)
        at += len(a)
    return Update(target, whole_a, whole_b, scales[0] if common else 1.0)


def _cut(module: Module, part: Box | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a part of the module's weight."""
    if part is None:
        return module.a, module.b
    rows, *columns = (slice(lo, hi) for lo, hi in zip(part.lo, part.hi, strict=True))
    return module.a[(slice(None), *columns)], module.b[rows]
