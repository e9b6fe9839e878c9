"""What of a checkpoint becomes which stored tensor: as it is, or through a name map.

Invariant: `reads` of all records that are no alias read every byte of the version exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from weightstore.checkpoint.contents import Contents, Source
from weightstore.errors import CheckpointError
from weightstore.names import Given, NameMap, Row, Stored, plan
from weightstore.names.rows import WRITTEN
from weightstore.types import ITEMSIZE, Box, TensorRecord, TensorSpec, contiguous_stride, nbytes_of


class Read(msgspec.Struct, frozen=True):
    """Row-major bytes of a file, from byte `begin` on, that become the tensor `place`, or a part of one
    (whose stride leaves gaps then)."""

    source: Source
    begin: int
    place: TensorRecord


class Piece(msgspec.Struct, frozen=True):
    """`part` of a file's tensor (None: all) becomes `box` of a stored one (None: all)."""

    source: Source
    part: Box | None = None
    box: Box | None = None


class Intake(msgspec.Struct, frozen=True):
    """What to reserve, and what of the files goes there.

    Attributes:
        specs: of every stored name; aliases have their bytes from another.
        pieces: of every stored name that is no alias.
    """

    specs: list[TensorSpec]
    pieces: dict[str, list[Piece]]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(nbytes_of(spec.dtype, spec.shape) for spec in self.specs if spec.name in self.pieces)

    def reads(self, records: Iterable[TensorRecord]) -> Iterator[Read]:
        for record in records:
            for piece in self.pieces.get(record.name, ()):
                tensor = piece.source.tensor
                skipped = 0 if piece.part is None else _offset(piece.part.lo, contiguous_stride(tensor.shape))
                place = record if piece.box is None else _inside(record, piece.box)
                yield Read(piece.source, tensor.begin + skipped * ITEMSIZE[tensor.dtype], place)


def intake(contents: Contents, names: NameMap | None, what: str) -> Intake:
    """All of `contents` under its own names, or under those that `names` gives it.

    Raises:
        CoverageError: the map does not make one version of it, or one of its rules matches nothing.
        CheckpointError: a cut that the files do not allow for.
    """
    if names is None:
        return Intake(contents.specs, {name: [Piece(source)] for name, source in contents.sources.items()})
    given = [Given(spec.name, spec.dtype, spec.shape) for spec in contents.specs]
    planned = plan(names, given, Stored(what, {}, closed=False))
    planned.raise_for_problems()
    rows = [row for row in planned.rows if row.kind in WRITTEN]
    specs = {spec.name: spec for spec in contents.specs}
    moved = {row.source: row.target for row in rows if row.part is None and row.box is None}
    made: dict[str, TensorSpec] = {}
    pieces: dict[str, list[Piece]] = {}
    for row in rows:
        assert row.source is not None and row.target is not None
        spec = specs[row.source]
        if spec.alias_of in moved and row.part is None and row.box is None:
            made[row.target] = TensorSpec(
                row.target, spec.dtype, spec.shape, spec.stride, moved[spec.alias_of]
            )
            continue
        source = contents.sources[spec.alias_of or spec.name]
        _check_cut(row, spec, specs[spec.alias_of or spec.name])
        made[row.target] = _made(row, spec)
        pieces.setdefault(row.target, []).append(Piece(source, row.part, row.box))
    return Intake(list(made.values()), pieces)


def _made(row: Row, spec: TensorSpec) -> TensorSpec:
    """The stored tensor that `row` belongs to. One that is not a whole tensor of the files is contiguous."""
    assert row.target is not None
    if row.box is None and row.part is None:
        return TensorSpec(row.target, row.dtype, row.shape, spec.stride)
    shape = row.whole or row.shape
    if row.part is not None:
        shape = tuple(hi - lo for lo, hi in zip(row.part.lo, row.part.hi, strict=True))
    return TensorSpec(row.target, row.dtype, shape, contiguous_stride(shape))


def _check_cut(row: Row, spec: TensorSpec, in_file: TensorSpec) -> None:
    if row.part is not None and not _is_range(row.part, row.shape):
        raise CheckpointError(
            f"tensor {row.source!r} cannot be split as it is read: {row.target!r} is strewn over the file. "
            "Split along dimension 0 only, or load it whole and refit",
            tensor=row.source,
        )
    if (spec.shape, spec.stride) != (in_file.shape, in_file.stride):
        raise CheckpointError(
            f"tensor {row.source!r} is another view of {in_file.name!r} and cannot be taken apart from it",
            tensor=row.source,
        )


def _is_range(box: Box, shape: tuple[int, ...]) -> bool:
    """Whether `box` of a row-major tensor is one range of its elements."""
    spans = list(zip(box.lo, box.hi, shape, strict=True))
    while spans and spans[-1][:2] == (0, spans[-1][2]):
        spans.pop()
    return not box.numel or all(hi - lo == 1 for lo, hi, _ in spans[:-1])


def _offset(index: tuple[int, ...], stride: tuple[int, ...]) -> int:
    return sum(i * step for i, step in zip(index, stride, strict=True))


def _inside(record: TensorRecord, box: Box) -> TensorRecord:
    """`box` of a tensor as a tensor: same stride, its own start, the bytes of its elements."""
    size = ITEMSIZE[record.dtype]
    shape = tuple(hi - lo for lo, hi in zip(box.lo, box.hi, strict=True))
    at = record.offset + _offset(box.lo, record.stride) * size
    return TensorRecord(record.name, record.dtype, shape, record.stride, at, box.numel * size)
