"""How adapters lie in a version: the names of their tensors, and what makes a set of them whole.

    lora.<dtype>.<target>.A        (rank, in, …)   any floating dtype
    lora.<dtype>.<target>.B        (out, rank, 1 …)
    lora.<dtype>.<target>.scale    ()              float64

`target` is the stored name of the weight they are added to, `dtype` what the sum is computed in: it is a part
of the version because the bits of the sum depend on it. The component ``lora`` holds nothing else.

Pure: records in, adapters or reasons out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from weightstore.types import TensorRecord, component_of

COMPONENT: Final = "lora"
A: Final = "A"
B: Final = "B"
SCALE: Final = "scale"
ROLES: Final = (A, B, SCALE)

WEIGHTS: Final = frozenset({"float64", "float32", "bfloat16", "float16"})
"""Dtypes in which a sum is computed, and stored. Others (fp8, integers) are quantised: their numbers mean
nothing without scales that lie elsewhere."""


class Adapter(NamedTuple):
    """One weight's: to `target` is added scale · B·A, computed in `dtype`."""

    target: str
    dtype: str
    a: TensorRecord
    b: TensorRecord
    scale: TensorRecord

    @property
    def records(self) -> tuple[TensorRecord, TensorRecord, TensorRecord]:
        return self.a, self.b, self.scale

    def same_bytes(self, other: Adapter | None) -> bool:
        """Of adapters in two versions that were alive at one moment."""
        return other is not None and self.dtype == other.dtype and self.places == other.places

    @property
    def places(self) -> tuple[int, ...]:
        return tuple(record.offset for record in self.records)


def tensor_name(target: str, dtype: str, role: str) -> str:
    return f"{COMPONENT}.{dtype}.{target}.{role}"


def adapter_names(records: Iterable[str]) -> list[str]:
    """The names among `records` that belong to adapters."""
    return [name for name in records if name.startswith(f"{COMPONENT}.")]


def adapters_in(records: Mapping[str, TensorRecord]) -> tuple[dict[str, Adapter], list[str]]:
    """The adapters of a version by target, and why others of its adapter tensors are none."""
    found: dict[tuple[str, str], dict[str, TensorRecord]] = {}
    reasons = []
    for name in adapter_names(records):
        parts = _parsed(name)
        if parts is None:
            reasons.append(f"{name} is not named lora.<dtype>.<target>.<A, B or scale>")
        else:
            dtype, target, role = parts
            found.setdefault((target, dtype), {})[role] = records[name]
    adapters: dict[str, Adapter] = {}
    extents: dict[int, str] = {}
    for (target, dtype), roles in found.items():
        lacking = [role for role in ROLES if role not in roles]
        weight = records.get(target)
        if lacking:
            reasons.append(f"the adapter of {target} lacks its {' and '.join(lacking)}")
        elif weight is None:
            reasons.append(f"there is an adapter for {target}, but no such tensor")
        elif (other := extents.setdefault(weight.offset, target)) != target or target in adapters:
            reasons.append(
                f"{target} has two adapters" + (f" (it is tied to {other})" if other != target else "")
            )
        else:
            adapter = Adapter(target, dtype, roles[A], roles[B], roles[SCALE])
            why = misfit(weight, adapter.a.shape, adapter.b.shape)
            if why or adapter.scale.dtype != "float64" or adapter.scale.shape:
                reasons.append(f"the adapter of {target}: {why or 'its scale is not one float64'}")
            else:
                adapters[target] = adapter
    return adapters, reasons


def _parsed(name: str) -> tuple[str, str, str] | None:
    dtype, _, rest = name.removeprefix(f"{COMPONENT}.").partition(".")
    target, _, role = rest.rpartition(".")
    if dtype not in WEIGHTS or not target or role not in ROLES or component_of(target) == COMPONENT:
        return None
    return dtype, target, role


def misfit(weight: TensorRecord, a: tuple[int, ...], b: tuple[int, ...]) -> str:
    """Why B·A of these shapes cannot be added to `weight`; empty if it can."""
    if weight.dtype not in WEIGHTS:
        return f"it is stored as {weight.dtype}; adapters are added to {', '.join(sorted(WEIGHTS))}"
    if len(a) < 2 or len(a) != len(b) or a[0] != b[1] or any(size != 1 for size in b[2:]):
        return f"A {list(a)} and B {list(b)} are not (rank, in, …) and (out, rank, …)"
    if (b[0], *a[1:]) != weight.shape:
        return f"B·A is {[b[0], *a[1:]]}, stored {list(weight.shape)}"
    return ""
