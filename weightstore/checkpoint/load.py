"""A checkpoint from disk into the arena, as one new version.

Everything that can be known before a byte is read is checked first (`contents`), then the space is
reserved in one request, and the files are read straight into it by several threads. The refit is
`fresh`: the new version has exactly the checkpoint's names, whatever the model had before.

Invariant: an error at any point aborts the refit, after the reading threads have ended, and the
store serves what it served before.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from weightstore.checkpoint.contents import Contents, SafetensorsFile
from weightstore.checkpoint.intake import Intake, intake
from weightstore.checkpoint.transfer import (
    Job,
    Progress,
    cut,
    is_row_major,
    move_all,
    piece_job,
    strided_jobs,
)
from weightstore.names import AS_STORED, NameMap
from weightstore.types import DEFAULT_TAG, TensorRecord, is_dense

if TYPE_CHECKING:
    from weightstore.client import Store
    from weightstore.mapping import ArenaMapping


class LoadReport(msgspec.Struct, frozen=True):
    """What was loaded. `nbytes` counts ties once; `seconds` is everything, `read_seconds` the reading.

    `layout` is ``file``, ``sharded`` or ``pipeline``; `skipped` names sub-directories of a pipeline that
    hold weights but that its model_index.json does not mention.
    """

    model: str
    tag: str
    version: int
    layout: str
    files: int
    tensors: int
    ties: int
    nbytes: int
    seconds: float
    read_seconds: float
    skipped: tuple[str, ...]

    @property
    def gbps(self) -> float:
        """Reading speed in 10⁹ bytes per second."""
        return self.nbytes / self.read_seconds / 1e9 if self.read_seconds else 0.0


def load_checkpoint(
    store: Store,
    model: str,
    path: str | Path,
    tag: str = DEFAULT_TAG,
    progress: Progress | None = None,
    *,
    prefix: str = "",
    variant: str | None = None,
    names: NameMap | None = None,
) -> LoadReport:
    """Make the checkpoint at `path` the next version of `model`, and `tag` name it.

    Args:
        path: a safetensors file, a sharded index, a directory with either, or a pipeline directory,
            whose components become prefixes such as ``transformer.``.
        progress: called on this thread with (bytes read, bytes in all).
        prefix: put before every name: ``transformer.`` for a directory with that component alone.
        variant: which variant of a directory's files to read, such as ``fp16``.
        names: how the checkpoint's names, `prefix` included, become stored names; None: as they are.

    Raises:
        CoverageError: `names` does not make one version of it. Nothing was changed in the store.
        CheckpointError: nothing there, a file or index that is not what it should be, or one that
            changed while it was read. Nothing was changed in the store.
        StorageError: reading failed. Nothing was changed in the store.
        ArenaFull, RefitConflict, StoreGone: as for any refit.
    """
    started = time.perf_counter()
    with Contents(path, prefix, variant) as contents:
        taken = intake(contents, names, f"loading {model!r} tag {tag!r}")
        # What is loaded has been named here, with or without `names`: a published map is not asked again.
        with store.refit(model, tag=tag, fresh=True, names=AS_STORED) as refit:
            records = refit.reserve(taken.specs)
            reading = time.perf_counter()
            move_all(_jobs(contents, taken, records, refit.mapping), progress)
            contents.check_unchanged()
            read_seconds = time.perf_counter() - reading
            refit.wrote(taken.pieces)
        return LoadReport(
            model=model,
            tag=tag,
            version=refit.report.version,
            layout=contents.checkpoint.layout,
            files=len(contents.files),
            tensors=len(taken.pieces),
            ties=len(taken.specs) - len(taken.pieces),
            nbytes=taken.nbytes,
            seconds=time.perf_counter() - started,
            read_seconds=read_seconds,
            skipped=contents.checkpoint.skipped,
        )


def _jobs(
    contents: Contents, taken: Intake, records: Iterable[TensorRecord], mapping: ArenaMapping
) -> list[Job]:
    """What to read: per file the tensors whose bytes lie in the arena as in the file, then the others."""
    placed: dict[SafetensorsFile, list[tuple[int, int, int]]] = {file: [] for file in contents.files}
    strided = []
    arena = mapping.buffer
    for read in taken.reads(records):
        place, file = read.place, read.source.file
        if is_row_major(place.shape, place.stride) and is_dense(place.shape, place.stride):
            placed[file].append((read.begin, place.offset, place.nbytes))
        else:
            strided += strided_jobs(os.preadv, file.fd, read.begin, place, arena, str(file.path))
    straight = [
        piece_job(os.preadv, file.fd, piece, arena, str(file.path), mapping.prefault)
        for file, triples in placed.items()
        for piece in cut(triples)
    ]
    return straight + strided
