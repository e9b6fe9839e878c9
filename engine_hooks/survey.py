"""Which tensor of which module gets which place in its component's image.

Pure: it compares what the modules hold with a version's records, and either says where everything
goes or raises AttachError with every reason.

Rules:
- a tensor with a name in the version is a weight: its slot is filled from the arena;
- a tensor inside a weight's memory follows the weight, as does one tied to it under another name;
- a parameter that is neither is an error; everything else on the device is engine state and gets a
  place behind the weights;
- a stray on another device stays there, as `module.to()` would leave it; parameters and buffers move.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import nn

from engine_hooks.find import Found, Kind, find_tensors, movers, unbindable
from engine_hooks.groups import Group, group_by_memory
from engine_hooks.plan import Layout, Records, by_component, describe, lay_out
from weightstore.errors import AttachError
from weightstore.types import align_up, component_of

_SHOWN = 20
_MATCHED = 5


@dataclass(eq=False)
class Member:
    """A tensor's place: `offset` in the image, inside the slot of `room` bytes that starts at `slot`."""

    found: Found
    slot: int
    room: int
    offset: int
    stride: tuple[int, ...]
    weight: bool


@dataclass(eq=False)
class Survey:
    """One component: the layout of its weights, then engine state up to `nbytes`; who lies where."""

    component: str
    layout: Layout
    members: list[Member]
    nbytes: int
    offsets: dict[str, int]
    """Image offset of every name in the version."""
    restrided: list[str] = field(default_factory=list)
    """Weights whose memory order in the module was another than the version's, which now holds."""

    @property
    def state_offset(self) -> int:
        return self.layout.nbytes


class Reasons:
    """What keeps modules and store apart, collected so that one error names all of it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.details: dict[str, list[str]] = {}
        self.advice: list[str] = []

    def add(self, kind: str, name: str, line: str) -> None:
        self.lines.append(f"{name} {line}")
        self.details.setdefault(kind, []).append(name)

    def raise_if_any(self, what: str) -> None:
        count = len(self.lines)
        if self.lines:
            # A component that the store lacks says more than the tensors that another one lacks.
            whole = tuple(f"{name} " for name in self.details.get("components", ()))
            lines = sorted(self.lines, key=lambda line: not (whole and line.startswith(whole)))
            shown = [f"  {line}" for line in lines[:_SHOWN]]
            if count > _SHOWN:
                shown.append(f"  … and {count - _SHOWN} more (all names in .details)")
            shown += self.advice
            reasons = "1 reason" if count == 1 else f"{count} reasons"
            raise AttachError(f"{what}: {reasons}, nothing was changed\n" + "\n".join(shown), **self.details)


def publishable(components: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """The tensors a model consists of: parameters and persistent buffers, views of others left out.

    Raises AttachError if one of them has no bytes (meta) or cannot be stored.
    """
    reasons = Reasons()
    _refuse_movers(components, reasons)
    tensors = {}
    found = [f for f in find_tensors(components) if f.kind in (Kind.PARAMETER, Kind.BUFFER)]
    for group in group_by_memory(_bindable(found, reasons)):
        root = next((i for i in range(len(group.members)) if group.covers(i)), None)
        if root is None:
            _refuse_overlap(group, reasons)
            continue
        for i, item in enumerate(group.members):
            if item.is_meta:
                reasons.add("meta", item.name, "is on the meta device and has no bytes to publish")
            elif group.same_place(i, root):
                tensors.update(dict.fromkeys(item.names, item.tensor.detach()))
    reasons.raise_if_any(
        "the store does not have this model and it cannot be published from these modules "
        "(load it first: `weightstore load MODEL PATH`)"
    )
    return {name: tensors[name] for item in found for name in item.names if name in tensors}


def survey(
    components: Mapping[str, nn.Module],
    records: Records,
    ignored: Callable[[str], bool],
    device: torch.device,
) -> dict[str, Survey]:
    """Where every tensor of every component goes; AttachError with all reasons if something cannot."""
    reasons = Reasons()
    _refuse_movers(components, reasons)
    version = by_component(records, components, ignored)
    found = find_tensors(components)
    known = {name for item in found for name in item.names}
    found = [
        item
        for item in found
        if item.kind is not Kind.STRAY
        or item.is_meta
        or item.tensor.device == device
        or any(name in version[item.component] for name in item.names)
    ]
    groups = group_by_memory(_bindable(found, reasons))
    by_name = {component: _check_names(group, known, reasons) for component, group in version.items()}
    surveys = {}
    for component, weights in by_name.items():
        layout = lay_out(weights.values())
        surveys[component] = Survey(component, layout, [], layout.nbytes, layout.offsets())
        if not weights and any(f.component == component and f.kind is Kind.PARAMETER for f in found):
            others = ", ".join(sorted({component_of(name) for name in records})) or "nothing"
            reasons.add(
                "components", component, f"is not a component of the store's version, which has {others}"
            )
    for group in groups:
        sharing = {component_of(name) for item in group.members for name in item.names}
        if len(sharing) > 1:
            reasons.add(
                "shared", group.members[0].name, f"is shared by components {', '.join(sorted(sharing))}"
            )
        elif not sharing & set(reasons.details.get("components", ())):
            _place(group, surveys[group.members[0].component], version, reasons)
    _suggest(version, found, reasons)
    reasons.raise_if_any("these modules cannot be bound to the store's version bit for bit")
    return surveys


def _refuse_movers(components: Mapping[str, nn.Module], reasons: Reasons) -> None:
    for path, why in movers(components):
        reasons.add("unbindable", path, f"cannot be bound: {why}; remove that hook first")


def _bindable(found: Iterable[Found], reasons: Reasons) -> list[Found]:
    kept = []
    for item in found:
        why = unbindable(item.tensor)
        if why is None:
            kept.append(item)
        else:
            reasons.add("unbindable", item.name, why)
    return kept


def _check_names(weights: Records, known: set[str], reasons: Reasons) -> Records:
    for name in sorted(weights.keys() - known):
        reasons.add(
            "unknown", name, "is in the store but not in the module (ignore=[…] skips names on purpose)"
        )
    for name, record in weights.items():
        if record.encoding != "raw":
            reasons.add(
                "mismatched", name, f"is stored as {record.encoding!r}, which this release cannot read"
            )
    return weights


def _suggest(version: Mapping[str, Records], found: list[Found], reasons: Reasons) -> None:
    """Add close matches to the first names that one side lacks: most often a prefix differs."""
    lacking = reasons.details
    stored = lacking.get("unknown") or [name for weights in version.values() for name in weights]
    held = lacking.get("missing") or [name for item in found for name in item.names]
    for kind, others in (("missing", stored), ("unknown", held)):
        for name in lacking.get(kind, [])[:_MATCHED]:
            near = difflib.get_close_matches(name, others, n=2, cutoff=0.7)
            if near:
                index = next(i for i, line in enumerate(reasons.lines) if line.startswith(f"{name} "))
                reasons.lines[index] += f"; close: {', '.join(near)}"
    for component in version:
        mine = [
            [name for name in lacking.get(kind, ()) if component_of(name) == component]
            for kind in ("unknown", "missing")
        ]
        if advice := _renaming(*mine):
            reasons.advice.append(advice)


def _renaming(stored: list[str], held: list[str]) -> str:
    """The one change of prefix that makes most of these stored names the module's; empty if none does."""
    if not stored or not held:
        return ""
    nearest = max(held, key=lambda name: len(_ending(name, stored[0])))
    shared = _ending(nearest, stored[0])
    before, after = stored[0].removesuffix(shared), nearest.removesuffix(shared)
    known = set(held)
    fitting = sum(name.startswith(before) and after + name.removeprefix(before) in known for name in stored)
    if not shared or fitting < 2 or 2 * fitting < len(stored):
        return ""
    return (
        f"{fitting} of these names differ by a prefix: load the model with the name map "
        f"NameMap().rename({'^' + re.escape(before)!r}, {after!r}), or have an engine publish it"
    )


def _ending(one: str, other: str) -> str:
    """The segments in which both names end."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    same = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return ".".join(reversed(same))


def _place(group: Group, into: Survey, version: Mapping[str, Records], reasons: Reasons) -> None:
    weights = version[into.component]
    rooted = [i for i, item in enumerate(group.members) if any(name in weights for name in item.names)]
    if not rooted:
        _place_state(group, into, reasons)
        return
    root = next((i for i in rooted if group.covers(i)), None)
    if root is None:
        _refuse_overlap(group, reasons)
        return
    base = group.members[root]
    record = next(weights[name] for name in base.names if name in weights)
    slot = into.offsets[record.name]
    for i in rooted:
        _compare(group.members[i], weights, reasons)
    stride = base.tensor.stride()
    if not _same_order(base.tensor.shape, stride, record.stride):
        into.restrided.append(base.name)
        stride = record.stride
    for i, item in enumerate(group.members):
        tied = group.same_place(i, root)
        for name in item.names:
            if name in weights and (not tied or weights[name].extent != record.extent):
                reasons.add(
                    "tied", name, f"shares memory with {base.name} in the module, but not in the store"
                )
        if not tied and stride != base.tensor.stride():
            reasons.add(
                "mismatched",
                item.name,
                f"is a view inside {base.name}, which has another order in the store: {describe(record)}",
            )
        own = stride if tied else item.tensor.stride()
        into.members.append(Member(item, slot, record.nbytes, slot + group.starts[i], own, weight=True))


def _refuse_overlap(group: Group, reasons: Reasons) -> None:
    names = ", ".join(item.name for item in group.members)
    reasons.add(
        "overlapping",
        group.members[0].name,
        f"shares part of its memory with others, none of which holds all: {names}",
    )


def _compare(item: Found, weights: Records, reasons: Reasons) -> None:
    """Note where shape or dtype of a weight differ from its records."""
    dtype = str(item.tensor.dtype).removeprefix("torch.")
    for name in item.names:
        record = weights.get(name)
        if record is not None and (record.dtype != dtype or record.shape != tuple(item.tensor.shape)):
            held = f"{dtype}{list(item.tensor.shape)}"
            reasons.add("mismatched", name, f"is {held} in the module, {describe(record)} in the store")


def _same_order(shape: Iterable[int], one: Iterable[int], other: Iterable[int]) -> bool:
    """Whether two strides mean the same memory order: those of dimensions of size 1 mean nothing."""
    sizes = list(shape)
    return 0 in sizes or all(a == b for size, a, b in zip(sizes, one, other, strict=True) if size > 1)


def _place_state(group: Group, into: Survey, reasons: Reasons) -> None:
    for item in group.members:
        if item.kind is Kind.PARAMETER:
            reasons.add("missing", item.name, "is a parameter of the module but not in the store's version")
        elif item.is_meta:
            reasons.add(
                "meta",
                item.name,
                f"is a {item.kind.value} on the meta device and not in the store: its bytes cannot be made "
                "up; build it on a real device",
            )
    slot = into.nbytes
    into.nbytes = align_up(slot + group.lead + group.nbytes)
    for item, start in zip(group.members, group.starts, strict=True):
        offset = slot + group.lead + start
        into.members.append(
            Member(item, slot, group.lead + group.nbytes, offset, item.tensor.stride(), weight=False)
        )
