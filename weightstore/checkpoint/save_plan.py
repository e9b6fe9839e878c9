"""Which files a version becomes: names, shards, ties and strides. Pure.

safetensors stores a tensor once, row-major, under one name. A tie is stored under its first name, the
others are recorded in the metadata of the file that holds it; so is a stride that is not row-major's.
`contents` reads both back. Other readers see the tensors they expect, without the tied names, as when
transformers saves a model.

Invariant: every record of the version is in exactly one file, or an alias of a tensor in the same part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import msgspec

from weightstore.checkpoint.layouts import SUFFIX, is_component
from weightstore.checkpoint.safetensors_header import ALIASES_KEY, STRIDES_KEY, Alias, file_order
from weightstore.errors import CheckpointError, InvalidName
from weightstore.types import Extent, TensorRecord, check_name, component_of, contiguous_stride

LAYOUTS: Final = ("auto", "file", "sharded", "pipeline")


class FilePlan(msgspec.Struct, frozen=True):
    """One safetensors file: tensor names in it, in file order, and their records."""

    name: str
    tensors: dict[str, TensorRecord]
    metadata: dict[str, str]

    @property
    def specs(self) -> list[tuple[str, str, tuple[int, ...]]]:
        return [(name, record.dtype, record.shape) for name, record in self.tensors.items()]


class PartPlan(msgspec.Struct, frozen=True):
    """The files of one directory (`directory` is relative, "" for the target itself), and their index.

    `ties` counts names recorded as aliases.
    """

    directory: str
    base: str
    files: tuple[FilePlan, ...]
    ties: int

    @property
    def index_name(self) -> str:
        return f"{self.base}{SUFFIX}.index.json"

    def index(self) -> bytes | None:
        """The JSON index, if there is more than one file."""
        if len(self.files) == 1:
            return None
        weight_map = {name: file.name for file in self.files for name in file.tensors}
        total = sum(record.nbytes for file in self.files for record in file.tensors.values())
        table = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return msgspec.json.format(msgspec.json.encode(table), indent=2) + b"\n"

    def supersedes(self, name: str) -> bool:
        """Whether a file name is one that an earlier save of this part may have used."""
        shard = re.fullmatch(rf"{re.escape(self.base)}(-\d{{5}}-of-\d{{5}})?{re.escape(SUFFIX)}", name)
        return shard is not None or name == self.index_name


class SavePlan(msgspec.Struct, frozen=True):
    """`untied` lists names tied to a tensor of another part: each part gets the bytes, the tie is lost."""

    layout: str
    parts: tuple[PartPlan, ...]
    untied: tuple[str, ...]


def choose_layout(layout: str, target: str, names: Iterable[str]) -> str:
    """Resolve ``auto``: a name ending in .safetensors means a file; names that all start with a
    pipeline's component mean a pipeline; anything else is one directory of shards."""
    if layout not in LAYOUTS:
        raise CheckpointError(f"layout {layout!r} is unknown; use {', '.join(LAYOUTS)}")
    is_file = target.endswith(SUFFIX)
    if layout == "auto":
        if is_file:
            return "file"
        components = {component_of(name) if "." in name else "" for name in names}
        return "pipeline" if all(map(is_component, components)) else "sharded"
    if (layout == "file") != is_file:
        need = f"the path of a {SUFFIX} file" if layout == "file" else "a directory"
        raise CheckpointError(f"{target}: layout {layout!r} needs {need}", path=target)
    return layout


def plan_save(
    records: Iterable[TensorRecord],
    layout: str,
    file_name: str,
    base_of: Callable[[str], str],
    max_shard_bytes: int,
) -> SavePlan:
    """Assign every record to a file.

    Args:
        records: a version's, in the store's order, which the files keep.
        layout: ``file``, ``sharded`` or ``pipeline``.
        file_name: name of the file, for layout ``file``.
        base_of: directory of a part → base name of its files.
        max_shard_bytes: no shard of several tensors is larger.
    """
    if max_shard_bytes < 1:
        raise CheckpointError(f"shards of {max_shard_bytes} bytes cannot hold anything; give at least 1 byte")
    groups: dict[str, dict[str, TensorRecord]] = {}
    for record in records:
        directory = _component_directory(record.name) if layout == "pipeline" else ""
        name = record.name[len(directory) + 1 :] if directory else record.name
        groups.setdefault(directory, {})[name] = record
    if layout == "file":
        plan = _part("", file_name.removesuffix(SUFFIX), groups[""], max_shard_bytes=1 << 62)
        return SavePlan(layout, (plan,), ())
    parts = [_part(d, base_of(d), members, max_shard_bytes) for d, members in groups.items()]
    first: dict[Extent, str] = {}
    untied = [
        record.name
        for directory, members in groups.items()
        for record in members.values()
        if record.nbytes and first.setdefault(record.extent, directory) != directory
    ]
    return SavePlan(layout, tuple(parts), tuple(untied))


def _component_directory(name: str) -> str:
    """The directory of a tensor in a pipeline. Names come from whoever wrote the version: trust no path."""
    component, dot, rest = name.partition(".")
    try:
        check_name("component", component)
    except InvalidName as error:
        raise CheckpointError(f"tensor {name!r} has no place in a pipeline: {error.message}") from None
    if not dot or not rest:
        raise CheckpointError(
            f"tensor {name!r} has no component prefix such as 'transformer.'; use layout 'sharded' or 'file'",
            tensor=name,
        )
    return component


def _part(directory: str, base: str, members: Mapping[str, TensorRecord], max_shard_bytes: int) -> PartPlan:
    owner: dict[Extent, str] = {}
    aliases: dict[str, str] = {}
    for name, record in members.items():
        if record.nbytes and owner.setdefault(record.extent, name) != name:
            aliases[name] = owner[record.extent]
    own = {name: record for name, record in members.items() if name not in aliases}
    shards = _shards(own, max_shard_bytes)
    files = []
    for i, shard in enumerate(shards):
        suffix = f"-{i + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        order = file_order((name, own[name].dtype, own[name].shape) for name in shard)
        tensors = {name: own[name] for name, _, _ in order}
        metadata = _metadata(tensors, {n: members[n] for n, t in aliases.items() if t in tensors}, aliases)
        files.append(FilePlan(f"{base}{suffix}{SUFFIX}", tensors, metadata))
    return PartPlan(directory, base, tuple(files), len(aliases))


def _shards(own: Mapping[str, TensorRecord], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, record in own.items():
        if shards[-1] and size + record.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += record.nbytes
    return shards


def _metadata(
    tensors: Mapping[str, TensorRecord], ties: Mapping[str, TensorRecord], targets: Mapping[str, str]
) -> dict[str, str]:
    """`format` is what transformers insists on; ours only where there is something to say."""
    metadata = {"format": "pt"}
    strides = {n: r.stride for n, r in tensors.items() if r.stride != contiguous_stride(r.shape)}
    aliases = {n: Alias(targets[n], r.dtype, r.shape, r.stride) for n, r in ties.items()}
    if strides:
        metadata[STRIDES_KEY] = msgspec.json.encode(strides).decode()
    if aliases:
        metadata[ALIASES_KEY] = msgspec.json.encode(aliases).decode()
    return metadata
