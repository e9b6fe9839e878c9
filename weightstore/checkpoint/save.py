"""A version from the arena to disk, in a layout that `load` and the Hugging Face libraries read.

The store holds weights, so weights are what is written: a pipeline's configs and tokenizers are not
there, and whoever wants a complete pipeline saves into a copy of the original directory.

Every file is written under a hidden temporary name, synced and renamed, after all files have been
written. Of a part with shards the old index goes first and the new one comes last: a crash between
two renames leaves shards without an index, which every reader refuses, and never a mixture that one
would believe.

Invariant: until all bytes are on disk and the lease has proved still valid, no existing file is touched.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from weightstore.checkpoint.layouts import BASE_NAMES, PIPELINE_INDEX, SUFFIX
from weightstore.checkpoint.safetensors_header import build_header
from weightstore.checkpoint.save_plan import FilePlan, PartPlan, SavePlan, choose_layout, plan_save
from weightstore.checkpoint.transfer import (
    Job,
    Progress,
    cut,
    is_row_major,
    move_all,
    piece_job,
    strided_jobs,
)
from weightstore.errors import CheckpointError, StorageError
from weightstore.types import DEFAULT_TAG

if TYPE_CHECKING:
    from weightstore.client import Store

MAX_SHARD_BYTES = 5_000_000_000
"""Default size of a shard in bytes: what the Hugging Face libraries use."""

_TRANSFORMERS = ("text_encoder", "image_encoder", "text_model", "vision_model", "safety_checker")


class SaveReport(msgspec.Struct, frozen=True):
    """What was written. `nbytes` are tensor bytes; `weights_only` says that the target has no configs.

    `untied` lists names whose tie reached into another component: their bytes are in both files.
    """

    model: str
    version: int
    layout: str
    files: tuple[str, ...]
    tensors: int
    ties: int
    untied: tuple[str, ...]
    nbytes: int
    seconds: float
    weights_only: bool


def save_checkpoint(
    store: Store,
    model: str,
    path: str | Path,
    tag: str = DEFAULT_TAG,
    version: int | None = None,
    layout: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> SaveReport:
    """Write what `tag` names (or `version`) to `path`, replacing what an earlier save left there.

    Args:
        path: a .safetensors file, or a directory, made if need be.
        layout: ``file``; ``sharded``: one directory, with an index if there is more than one file;
            ``pipeline``: one sub-directory per component, weights only; ``auto``: by path and names.
        max_shard_bytes: largest file of the last two.
        progress: called on this thread with (bytes written, bytes in all).

    Raises:
        CheckpointError: the layout does not fit the path or the names, or the directory holds other
            weights that a reader could take for these. Nothing was written.
        StorageError: writing failed (disk full, no permission). Until the last step, giving the files
            their names, nothing that existed was touched.
        UnknownModel, UnknownTag, UnknownVersion, TagTorn, LeaseLost: as for any lease.
    """
    started = time.perf_counter()
    path = Path(path)
    lease = store.lease(model, tag=tag, version=version)
    try:
        snapshot = lease.snapshot
        records = list(snapshot.records.values())
        chosen = choose_layout(layout, str(path), snapshot.records)
        root = path.parent if chosen == "file" else path
        plan = plan_save(records, chosen, path.name, lambda part: _base(root, part), max_shard_bytes)
        _refuse_mixtures(root, plan)
        try:
            with ExitStack() as undo:
                _make_directories(root, plan, undo)
                writing = [
                    _Writing(root / part.directory, file, undo) for part in plan.parts for file in part.files
                ]
                move_all([job for file in writing for job in file.jobs(lease.mapping.buffer)], progress)
                for file in writing:
                    file.sync()
                lease.require_readable(snapshot.version)
                _install(root, plan, writing)
                undo.pop_all()
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error}", path=str(path)) from None
        return SaveReport(
            model=model,
            version=snapshot.version,
            layout=chosen,
            files=tuple(str(file.target) for file in writing),
            tensors=sum(len(file.plan.tensors) for file in writing),
            ties=sum(part.ties for part in plan.parts),
            untied=plan.untied,
            nbytes=sum(record.nbytes for file in writing for record in file.plan.tensors.values()),
            seconds=time.perf_counter() - started,
            weights_only=chosen == "pipeline" and not (path / PIPELINE_INDEX).exists(),
        )
    finally:
        lease.release()


class _Writing:
    """A file on its way: written under a temporary name beside its target, removed by `undo`."""

    def __init__(self, directory: Path, plan: FilePlan, undo: ExitStack) -> None:
        self.plan = plan
        self.target = directory / plan.name
        self.temporary = directory / f".{plan.name}.{secrets.token_hex(4)}.tmp"
        self.head, self.header = build_header(plan.specs, plan.metadata, str(self.target))
        self._fd = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        undo.callback(self._remove)

    def jobs(self, arena: memoryview) -> list[Job]:
        os.pwrite(self._fd, self.head, 0)
        os.ftruncate(self._fd, self.header.file_size)
        straight, jobs = [], []
        name = str(self.target)
        for tensor in self.header.tensors:
            record = self.plan.tensors[tensor.name]
            if is_row_major(record.shape, record.stride):
                straight.append((tensor.begin, record.offset, record.nbytes))
            else:
                jobs += strided_jobs(os.pwritev, self._fd, tensor.begin, record, arena, name)
        return [piece_job(os.pwritev, self._fd, piece, arena, name) for piece in cut(straight)] + jobs

    def sync(self) -> None:
        os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1

    def _remove(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        with suppress(FileNotFoundError):  # renamed already
            self.temporary.unlink()


def _install(root: Path, plan: SavePlan, writing: list[_Writing]) -> None:
    """Give the files their names, part by part: old index away, files, leftovers away, new index."""
    ready = {file.target: file for file in writing}
    for part in plan.parts:
        directory = root / part.directory
        index = directory / part.index_name
        if plan.layout != "file":
            index.unlink(missing_ok=True)
        names = {file.name for file in part.files}
        for name in names:
            os.replace(ready[directory / name].temporary, directory / name)
        if plan.layout != "file":
            for old in directory.iterdir():
                if part.supersedes(old.name) and old.name not in names:
                    old.unlink()
            _write_index(directory, part)
        _sync_directory(directory)


def _write_index(directory: Path, part: PartPlan) -> None:
    text = part.index()
    if text is None:
        return
    temporary = directory / f".{part.index_name}.{secrets.token_hex(4)}.tmp"
    with open(temporary, "xb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / part.index_name)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_directories(root: Path, plan: SavePlan, undo: ExitStack) -> None:
    for part in plan.parts:
        missing = []
        directory = root / part.directory
        while not directory.exists():
            missing.append(directory)
            directory = directory.parent
        for directory in reversed(missing):
            directory.mkdir()
            undo.callback(_remove_if_empty, directory)


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):  # somebody else put something there
        directory.rmdir()


def _refuse_mixtures(root: Path, plan: SavePlan) -> None:
    """Weights under the other base name would make the directory ambiguous to every reader."""
    if plan.layout == "file":
        return
    for part in plan.parts:
        for other in BASE_NAMES:
            found = [root / part.directory / f"{other}{end}" for end in (SUFFIX, f"{SUFFIX}.index.json")]
            clash = [p.name for p in found if other != part.base and p.exists()]
            if clash:
                raise CheckpointError(
                    f"{root / part.directory}: holds {clash[0]}; saving {part.base}{SUFFIX} beside it would "
                    "leave two sets of weights. Remove it, or save elsewhere",
                    path=str(root / part.directory),
                )


def _base(root: Path, component: str) -> str:
    """The base name that the library which loads a component looks for.

    The target's own model_index.json or config.json decides; without them, the component's usual kind.
    """
    diffusers, transformers = BASE_NAMES
    if component:
        entry = _json(root / PIPELINE_INDEX).get(component)
        if isinstance(entry, list) and entry and entry[0] in ("diffusers", "transformers"):
            return diffusers if entry[0] == "diffusers" else transformers
        return transformers if component.startswith(_TRANSFORMERS) else diffusers
    return diffusers if "_class_name" in _json(root / "config.json") else transformers


def _json(path: Path) -> dict[str, object]:
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}  # absent or not JSON: then it says nothing about names
    return table if isinstance(table, dict) else {}
