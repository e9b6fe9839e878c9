"""Did the writers write exactly what the refit declared? Every element once, nothing else.

Writers report what they wrote as whole tensors or as boxes of elements. Coverage is judged per
extent, so writing one of several tied names is writing them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from math import prod

from weightstore.errors import CoverageError
from weightstore.types import Box, Extent, TensorRecord
from weightstore.wire import Write

_SHOWN = 8


def check_coverage(
    targets: Mapping[str, TensorRecord],
    writes: Iterable[Write],
    what: str,
) -> None:
    """Raise CoverageError unless `writes` cover every tensor of `targets` exactly once.

    `targets` are the tensors the refit has a place for: everything it declared, or what it reserved.
    A write to any other name is unknown. `what` names the refit in the message.
    """
    problems: dict[str, list[str]] = {}

    def report(kind: str, name: str) -> None:
        names = problems.setdefault(kind, [])
        if name not in names:
            names.append(name)

    written: dict[Extent | str, list[tuple[str, Box | None]]] = {}
    for write in writes:
        record = targets.get(write.name)
        if record is None:
            report("unknown", write.name)
        elif write.box is not None and not _fits(write.box, record.shape):
            report("mismatched", write.name)
        else:
            # Empty tensors share no extent worth the name; each stands for itself.
            key = record.extent if record.nbytes else record.name
            written.setdefault(key, []).append((write.name, write.box))

    for parts in written.values():
        name, box = parts[0]
        if len(parts) == 1 and box is None:
            continue
        if any(part is None for _, part in parts):
            report("duplicate", parts[-1][0])
            continue
        _check_boxes(targets[name], [part for _, part in parts if part is not None], report)

    for name, record in targets.items():
        if (record.extent if record.nbytes else record.name) not in written:
            report("missing", name)
    if problems:
        raise CoverageError(describe_problems(what, problems), **problems)


def describe_problems(what: str, problems: Mapping[str, list[str]]) -> str:
    """One sentence with every kind of problem, its count and its first names."""
    parts = []
    for kind, names in problems.items():
        shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
        parts.append(f"{len(names)} {kind} ({shown})")
    return f"{what}: {'; '.join(parts)}; nothing was changed"


def _fits(box: Box, shape: tuple[int, ...]) -> bool:
    return len(box.lo) == len(box.hi) == len(shape) and all(
        0 <= lo <= hi <= size for lo, hi, size in zip(box.lo, box.hi, shape, strict=True)
    )


def _check_boxes(record: TensorRecord, boxes: list[Box], report: Callable[[str, str], None]) -> None:
    """Exact cover: volumes add up and no two boxes meet. Shards of one dimension sort linearly."""
    boxes = sorted((b for b in boxes if b.numel), key=lambda b: b.lo)
    if _chain(boxes):
        meets = False
    else:
        meets = any(a.intersects(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    if meets:
        report("overlapping", record.name)
    elif sum(b.numel for b in boxes) != prod(record.shape):
        report("holes", record.name)


def _chain(boxes: list[Box]) -> bool:
    """Whether sorted boxes are visibly disjoint because each ends, in dimension 0, before the next."""
    return all(a.hi[:1] <= b.lo[:1] and bool(a.hi) for a, b in pairwise(boxes))
