"""Did the writers write exactly what the refit declared? Every element once, nothing else.

Writers report what they wrote as whole tensors or as boxes of elements. Coverage is judged per
extent, so writing one of several tied names is writing them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from math import prod

from weightstore.errors import CoverageError
from weightstore.types import Box, TensorRecord, component_of
from weightstore.wire import Write

_SHOWN = 8
STEPS = 1 << 20
STEPS_A_PART = 8
"""What one commit's parts may cost to compare, in looks at a part: a mesh needs one a dimension."""


def check_coverage(
    targets: Mapping[str, TensorRecord],
    writes: Iterable[Write],
    what: str,
    staying: Mapping[str, TensorRecord] = {},
) -> None:
    """Raise CoverageError unless `writes` cover every tensor of `targets` and `staying` exactly once.

    Parts that are very many and cut without any regularity are refused as "irregular".
    `targets` are the tensors the refit has a place for: everything it declared, or what it reserved.
    A write to any other name is unknown. `staying` are tensors of the base that have none: of each some
    writer has to say that it `kept` it. `what` names the refit in the message.
    """
    problems: dict[str, dict[str, None]] = {}

    def report(kind: str, name: str) -> None:
        problems.setdefault(kind, {})[name] = None

    # Within one refit an offset is an extent. Empty tensors share none worth the name; each is by itself.
    whole: dict[int | str, Write] = {}
    parted: dict[int | str, list[Write]] = {}
    """Written in parts, or more than once."""
    writes = list(writes)
    for write in writes:
        record = (staying if write.kept else targets).get(write.name)
        if record is None:
            report("duplicate" if write.kept and write.name in targets else "unknown", write.name)
        elif write.box is not None and not _fits(write.box, record.shape):
            report("mismatched", write.name)
        else:
            key = record.offset if record.nbytes else record.name
            if key in parted:
                parted[key].append(write)
            elif key in whole:
                parted[key] = [whole.pop(key), write]
            elif write.box is None:
                whole[key] = write
            else:
                parted[key] = [write]

    work = _Work(STEPS + STEPS_A_PART * sum(map(len, parted.values())))
    for parts in parted.values():
        name, kept = parts[0].name, parts[0].kept
        boxes = [part.box for part in parts if part.box is not None]
        if len(boxes) < len(parts):
            report("duplicate", parts[-1].name)
            continue
        problem = _problem_with(boxes, (staying if kept else targets)[name].shape, work)
        if problem:
            report(problem, name)

    for name, record in (*targets.items(), *staying.items()):
        key = record.offset if record.nbytes else name
        if key not in whole and key not in parted:
            report("missing", name)
    if problems:
        names = {kind: list(found) for kind, found in problems.items()}
        written = (write.name for write in writes if write.name in targets or write.name in staying)
        advice = _whole_components(names.get("missing", ()), written)
        raise CoverageError(describe_problems(what, names, advice), **names)


def describe_problems(what: str, problems: Mapping[str, list[str]], advice: str = "") -> str:
    """One sentence with every kind of problem, its count and its first names, and what may mend it."""
    parts = []
    for kind, names in problems.items():
        shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
        parts.append(f"{len(names)} {kind} ({shown})")
    return f"{what}: {'; '.join([*parts, *filter(None, [advice])])}; nothing was changed"


def _whole_components(missing: Iterable[str], written: Iterable[str]) -> str:
    """What to declare if somebody trains only the components that were written."""
    some = {component_of(name) for name in written}
    left = {component_of(name) for name in missing} - some
    if not some or not left or len(some) > _SHOWN or len(left) > _SHOWN:
        return ""
    untouched = ", ".join(sorted(left))
    return f"nothing of {untouched} was written; if that is meant, declare components={sorted(some)}"


def _fits(box: Box, shape: tuple[int, ...]) -> bool:
    return len(box.lo) == len(box.hi) == len(shape) and all(
        0 <= lo <= hi <= size for lo, hi, size in zip(box.lo, box.hi, shape, strict=True)
    )


def _problem_with(boxes: list[Box], shape: tuple[int, ...], work: _Work) -> str:
    """What keeps these boxes from covering `shape` exactly: two that meet, or volumes that do not add up."""
    boxes = [box for box in boxes if box.numel]
    try:
        if _meet(boxes, work):
            return "overlapping"
    except _TooIrregular:
        return "irregular"
    return "" if sum(box.numel for box in boxes) == prod(shape) else "holes"


class _TooIrregular(Exception):
    """Parts that straight cuts do not separate, and too many to compare each with each."""


class _Work:
    """Comparing may take as long as a commit's parts are many, not the square of that."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise _TooIrregular


def _meet(boxes: list[Box], work: _Work) -> bool:
    """Whether any two of these non-empty boxes meet.

    Straight cuts between boxes, in one dimension after the other, part meshes of any number of
    dimensions into single boxes; only what no cut separates is compared pair by pair.
    """
    undecided = [boxes]
    while undecided:
        group = undecided.pop()
        if len(group) < 2:
            continue
        for dim in range(len(group[0].lo)):
            work.spend(len(group))
            parts = _cut(group, dim)
            if len(parts) > 1:
                undecided += parts
                break
        else:
            work.spend(len(group) * (len(group) - 1) // 2)
            if any(a.intersects(b) for a, b in combinations(group, 2)):
                return True
    return False


def _cut(boxes: list[Box], dim: int) -> list[list[Box]]:
    """The groups into which the planes across dimension `dim` that run through no box cut `boxes`."""
    groups: list[list[Box]] = []
    end = -1
    for box in sorted(boxes, key=lambda b: b.lo[dim]):
        if box.lo[dim] >= end:
            groups.append([])
        groups[-1].append(box)
        end = max(end, box.hi[dim])
    return groups
