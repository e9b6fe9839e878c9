"""From tensors given and records stored to rows: which elements go where, and what is wrong.

Invariants:
- every tensor given has a row, or one per piece; none is left out silently;
- rows of a good kind (`WRITTEN`) fit their target in dtype and shape, and no two of them meet in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate

import msgspec

from weightstore.casts import refusal
from weightstore.errors import InvalidName, InvalidTensor
from weightstore.names.router import Route, Router
from weightstore.names.rows import WRITTEN, Given, Kind, Row, Stored
from weightstore.names.rules import Drop, Fuse, Split
from weightstore.types import Box, TensorSpec, check_spec, contiguous_stride


class Member(msgspec.Struct, frozen=True):
    """One tensor on its way into a fused one."""

    given: Given
    route: Route


def resolve(router: Router, given: Iterable[Given], stored: Stored) -> list[Row]:
    """Where each of `given` goes, in their order; pieces of fused tensors where the first of them stands."""
    rows: list[Row | None] = []
    groups: dict[tuple[str, tuple[int, ...]], list[tuple[int, Member]]] = {}
    for tensor in given:
        route = router.route(tensor.name)
        if isinstance(route.end, Drop):
            rows.append(_row(Kind.DROPPED, tensor, None, route, note=str(route.end)))
        elif isinstance(route.end, Fuse):
            if route.end.keep:
                rows.append(_whole(tensor, route, route.name, stored))
            key = (route.targets[0], route.rules[-1:])
            groups.setdefault(key, []).append((len(rows), Member(tensor, route)))
            rows.append(None)
        elif isinstance(route.end, Split):
            rows += _split(tensor, route, route.end, stored)
        else:
            rows.append(_whole(tensor, route, route.targets[0], stored))
    for members in groups.values():
        for (at, _), row in zip(members, _fuse([member for _, member in members], stored), strict=True):
            rows[at] = row
    return _conflicts([row for row in rows if row is not None], stored)


# -- one tensor, one name -----------------------------------------------------------------------------


def _whole(tensor: Given, route: Route, target: str, stored: Stored) -> Row:
    kind, note = _judge(target, tensor.dtype, tensor.shape, stored)
    good = Kind.MATCHED if target == tensor.name else Kind.RENAMED
    return _row(kind or good, tensor, target, route, note=note)


def _row(
    kind: Kind,
    tensor: Given,
    target: str | None,
    route: Route,
    part: Box | None = None,
    box: Box | None = None,
    whole: tuple[int, ...] | None = None,
    note: str = "",
) -> Row:
    return Row(
        kind, tensor.name, target, tensor.dtype, tensor.shape, part, box, whole, note, rules=route.rules
    )


def _judge(target: str, dtype: str, shape: tuple[int, ...], stored: Stored) -> tuple[Kind | None, str]:
    """What keeps a tensor of this dtype and shape from being `target`: a kind and a note. None: nothing, and
    the note says what becomes of its dtype."""
    if not stored.in_scope(target):
        return Kind.UNDECLARED, "its component is not declared"
    record = stored.records.get(target)
    if record is None:
        if stored.closed:
            return Kind.UNKNOWN, ""
        try:
            check_spec(TensorSpec(target, dtype, shape, contiguous_stride(shape)))
        except (InvalidName, InvalidTensor) as error:
            return Kind.UNKNOWN, error.message
    elif record.shape != shape:
        return Kind.MISMATCHED, f"{list(shape)}, stored {list(record.shape)}"
    elif why := refusal(dtype, record.dtype, stored.cast):
        return Kind.MISMATCHED, _dtypes(dtype, record.dtype, why, stored)
    return None, "" if record is None else _cast(dtype, record.dtype)


def _cast(given: str, stored: str) -> str:
    return "" if given == stored else f"{given} cast to {stored}"


def _dtypes(given: str, dtype: str, why: str, stored: Stored) -> str:
    return f"{given}, stored {dtype}" + (f"; {why}" if stored.cast != "never" else "")


# -- several tensors, one name ------------------------------------------------------------------------


def _fuse(members: Sequence[Member], stored: Stored) -> list[Row]:
    """Rows for those of one fused tensor's pieces that are given, in their order."""
    route = members[0].route
    rule, target = route.end, route.targets[0]
    assert isinstance(rule, Fuse)
    record = stored.records.get(target)
    pieces: dict[int, Given] = {}
    for member in members:
        pieces.setdefault(member.route.piece, member.given)
    first = members[0].given

    def bad(kind: Kind, note: str) -> list[Row]:
        return [_row(kind, m.given, target, m.route, note=note) for m in members]

    if record is None and len(pieces) < len(rule.sources) and not stored.closed and stored.in_scope(target):
        lacking = [name for i, name in enumerate(route.siblings) if i not in pieces]
        return bad(
            Kind.UNKNOWN, f"a new tensor must be given whole, in one call: {', '.join(lacking)} missing"
        )
    shape, dtype = (record.shape, record.dtype) if record is not None else (first.shape, first.dtype)
    dim = rule.dim + (len(shape) if rule.dim < 0 else 0)
    if not 0 <= dim < len(shape) or any(len(piece.shape) != len(shape) for piece in pieces.values()):
        shapes = ", ".join(str(list(piece.shape)) for piece in pieces.values())
        return bad(Kind.MISMATCHED, f"{shapes} cannot become {list(shape)} along dimension {rule.dim}")
    given_sizes = [pieces[i].shape[dim] if i in pieces else None for i in range(len(rule.sources))]
    total = record.shape[dim] if record is not None else sum(size or 0 for size in given_sizes)
    whole = (*shape[:dim], total, *shape[dim + 1 :])
    kind, note = _judge(target, dtype, whole, stored)
    if kind is not None:
        return bad(kind, note)
    sizes = _sizes(given_sizes, total, rule.shares)
    if isinstance(sizes, str):
        return bad(Kind.MISMATCHED, sizes)
    starts = [0, *accumulate(sizes)]
    rows = []
    for member in members:
        tensor, piece = member.given, member.route.piece
        if pieces[piece] is not tensor:
            rows.append(
                _row(Kind.CONFLICT, tensor, target, member.route, note=_also(tensor.name, pieces[piece].name))
            )
            continue
        fits = (*shape[:dim], sizes[piece], *shape[dim + 1 :])
        if tensor.shape != fits:
            note = f"{list(tensor.shape)}, its piece of {list(whole)} is {list(fits)}"
            rows.append(_row(Kind.MISMATCHED, tensor, target, member.route, note=note))
        elif why := refusal(tensor.dtype, dtype, "never" if record is None else stored.cast):
            note = _dtypes(tensor.dtype, dtype, why, stored)
            rows.append(_row(Kind.MISMATCHED, tensor, target, member.route, note=note))
        else:
            box = _along(whole, dim, starts[piece], starts[piece + 1])
            note = _cast(tensor.dtype, dtype)
            rows.append(_row(Kind.FUSED, tensor, target, member.route, None, box, whole, note))
    return rows


def _along(shape: Sequence[int], dim: int, lo: int, hi: int) -> Box:
    """All of `shape` but for `dim`, of which `lo` to `hi`."""
    start, end = [0] * len(shape), list(shape)
    start[dim], end[dim] = lo, hi
    return Box(tuple(start), tuple(end))


def _sizes(given: Sequence[int | None], total: int, shares: Sequence[int] | None) -> list[int] | str:
    """Sizes of the pieces of `total` elements, or what is wrong.

    Those given, if all are; else by `shares`, else equal ones.
    """
    known = [size for size in given if size is not None]
    parts = shares or (1,) * len(given)
    if len(known) == len(given):
        if sum(known) != total:
            return f"{' + '.join(map(str, known))} = {sum(known)} elements, stored {total}"
        if shares is not None and any(
            size * sum(shares) != total * share for size, share in zip(known, shares, strict=True)
        ):
            return f"sizes {known} are not in the proportion {list(shares)} that the rule declares"
        return known
    if total % sum(parts):
        return f"{total} elements cannot be shared out as {' : '.join(map(str, parts))}; declare shares="
    return [total // sum(parts) * share for share in parts]


# -- one tensor, several names ------------------------------------------------------------------------


def _split(tensor: Given, route: Route, rule: Split, stored: Stored) -> list[Row]:
    shape = tensor.shape
    dim = rule.dim + (len(shape) if rule.dim < 0 else 0)

    def bad(note: str) -> list[Row]:
        return [_row(Kind.MISMATCHED, tensor, target, route, note=note) for target in route.targets]

    if not 0 <= dim < len(shape):
        return bad(f"{list(shape)} has no dimension {rule.dim}")
    records = [stored.records.get(target) for target in route.targets]
    sizes = _sizes(
        [r.shape[dim] if r and dim < len(r.shape) else None for r in records], shape[dim], rule.shares
    )
    if isinstance(sizes, str):
        return bad(sizes)
    rows = []
    starts = [0, *accumulate(sizes)]
    for i, target in enumerate(route.targets):
        part = _along(shape, dim, starts[i], starts[i + 1])
        kind, note = _judge(target, tensor.dtype, (*shape[:dim], sizes[i], *shape[dim + 1 :]), stored)
        rows.append(_row(kind or Kind.SPLIT, tensor, target, route, part, note=note))
    return rows


# -- two for one place ----------------------------------------------------------------------------


def _conflicts(rows: list[Row], stored: Stored) -> list[Row]:
    """Rows that would write what an earlier one writes become conflicts. What is tied may be given under
    each of its names, if it is in the same form."""
    seen: defaultdict[object, list[Row]] = defaultdict(list)
    judged = []
    for row in rows:
        if row.kind in WRITTEN and row.target is not None:
            earlier = seen[stored.bytes_of(row.target)]
            other = next((o for o in earlier if _collide(row, o)), None)
            if other is not None:
                row = msgspec.structs.replace(row, kind=Kind.CONFLICT, note=_also(row.source, other.source))
            else:
                earlier.append(row)
        judged.append(row)
    return judged


def _also(source: str | None, other: str | None) -> str:
    return "given twice" if source == other else f"{other} writes it too"


def _collide(a: Row, b: Row) -> bool:
    if a.box is None and b.box is None:
        return a.target == b.target
    if a.box is None or b.box is None or a.whole != b.whole:
        return True
    if not a.box.numel or not b.box.numel:
        return a.rules[-1:] != b.rules[-1:]  # pieces of one tensor, then; without elements they never meet
    return a.target == b.target if a.box == b.box else a.box.intersects(b.box)
