"""An opened checkpoint: every header read and believed, every tensor's name, place and stride known.

Opening does all the validation there is, so that whoever reads on (`load`, the capacity planner)
meets no surprise but an I/O error or a file that changes underneath. The headers are read through
the very descriptors the data will be read through: a file renamed over the path does no harm.

Invariants of `Contents`:
- `specs` are valid for the store, unique, in the order of parts, files and file offsets, then ties;
- every spec that is no alias has a source whose dtype and shape are the spec's;
- what an index says of its shards is exactly what the shards hold.
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import msgspec

from weightstore.checkpoint.layouts import Part, find_checkpoint
from weightstore.checkpoint.safetensors_header import (
    PREFIX,
    Alias,
    FileTensor,
    Header,
    aliases_from,
    header_length,
    parse_header,
    strides_from,
)
from weightstore.errors import CheckpointError, InvalidName, InvalidTensor
from weightstore.types import TensorSpec, check_spec, contiguous_stride, nbytes_of


class SafetensorsFile:
    """A safetensors file held open: its descriptor, validated header, and whether it is still the same."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # O_NONBLOCK: opening a pipe that somebody put there must not wait for its writer.
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}", path=str(path)) from None
        try:
            self._opened = os.fstat(self.fd)
            if not stat.S_ISREG(self._opened.st_mode):
                raise CheckpointError(f"{path}: not a regular file", path=str(path))
            self.header = self._read_header()
        except BaseException:
            os.close(self.fd)
            raise

    def _read_header(self) -> Header:
        size = self._opened.st_size
        try:
            length = header_length(os.pread(self.fd, PREFIX.size, 0), size, str(self.path))
            body = os.pread(self.fd, length, PREFIX.size)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from None
        return parse_header(body, size, str(self.path))

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file was written to since it was opened."""
        now, then = os.fstat(self.fd), self._opened
        if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise CheckpointError(
                f"{self.path}: changed while it was read ({then.st_size} bytes then, {now.st_size} now)",
                path=str(self.path),
            )

    def close(self) -> None:
        os.close(self.fd)


class Source(msgspec.Struct, frozen=True):
    """Where a tensor's row-major bytes are."""

    file: SafetensorsFile
    tensor: FileTensor


class Contents:
    """The tensors of a checkpoint, with its files held open. A context manager.

    Args:
        path: anything `layouts.find_checkpoint` recognises.
        prefix: put before every name; a directory with one component alone has names without it.
        variant: which variant (such as ``fp16``) of a directory's files to read.

    Raises:
        CheckpointError: nothing recognised, an invalid file, or files that contradict each other.
    """

    def __init__(self, path: str | Path, prefix: str = "", variant: str | None = None) -> None:
        self.checkpoint = find_checkpoint(path, variant)
        self.files: list[SafetensorsFile] = []
        self.specs: list[TensorSpec] = []
        self.sources: dict[str, Source] = {}
        with ExitStack() as undo:
            undo.callback(self.close)
            for part in self.checkpoint.parts:
                self._add(part, prefix + part.prefix)
            if not self.specs:
                raise CheckpointError(f"{path}: the checkpoint holds no tensors", path=str(path))
            undo.pop_all()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, ties counted once."""
        return sum(source.tensor.nbytes for source in self.sources.values())

    def check_unchanged(self) -> None:
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        """Close the files. Idempotent."""
        while self.files:
            self.files.pop().close()

    def __enter__(self) -> Contents:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, part: Part, prefix: str) -> None:
        found: dict[str, TensorSpec] = {}
        aliases: dict[str, tuple[Alias, str]] = {}
        for path in part.files:
            file = SafetensorsFile(path)
            self.files.append(file)
            strides = strides_from(file.header)
            for tensor in file.header.tensors:
                _check_listed(part, path, tensor.name)
                stride = strides.get(tensor.name, contiguous_stride(tensor.shape))
                spec = TensorSpec(prefix + tensor.name, tensor.dtype, tensor.shape, stride)
                found[tensor.name] = _valid(spec, file.header.file)
                self.sources[spec.name] = Source(file, tensor)
            for name, alias in aliases_from(file.header).items():
                if name in aliases:
                    raise CheckpointError(
                        f"{path}: alias {name!r} is recorded in two files of the checkpoint"
                    )
                aliases[name] = alias, file.header.file
        _check_complete(part, found)
        self.specs += found.values()
        self.specs += [_tie(n, alias, found, prefix, file) for n, (alias, file) in aliases.items()]


def _check_listed(part: Part, path: Path, name: str) -> None:
    if part.weight_map is None:
        return
    listed = part.weight_map.get(name)
    if listed != path.name:
        where = f"lists it in {listed}" if listed else "does not list it"
        raise CheckpointError(f"{path}: holds tensor {name!r}, but {part.index} {where}", tensor=name)


def _check_complete(part: Part, found: dict[str, TensorSpec]) -> None:
    missing = sorted((part.weight_map or {}).keys() - found.keys())
    if missing:
        raise CheckpointError(
            f"{part.index}: {len(missing)} tensors it lists are not in its files: {', '.join(missing[:5])}",
            missing=missing,
        )


def _tie(name: str, alias: Alias, found: dict[str, TensorSpec], prefix: str, file: str) -> TensorSpec:
    target = found.get(alias.target)
    if name in found or target is None:
        problem = "is also a tensor of its own" if name in found else f"has no target {alias.target!r}"
        raise CheckpointError(f"{file}: alias {name!r} {problem}", tensor=name)
    spec = _valid(TensorSpec(prefix + name, alias.dtype, alias.shape, alias.stride, target.name), file)
    have, need = nbytes_of(target.dtype, target.shape), nbytes_of(alias.dtype, alias.shape)
    if have != need:
        raise CheckpointError(
            f"{file}: alias {name!r} has {need} bytes, its target {alias.target!r} {have}", tensor=name
        )
    return spec


def _valid(spec: TensorSpec, file: str) -> TensorSpec:
    try:
        return check_spec(spec)
    except (InvalidName, InvalidTensor) as error:
        raise CheckpointError(f"{file}: {error.message}", file=file) from None
