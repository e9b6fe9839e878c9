"""What checkpoint a path is: one safetensors file, a sharded index, or a diffusers pipeline directory.

Looks at directory listings and the two kinds of index, never at tensors. File names inside an index are
untrusted: only a plain name in the index's own directory is accepted, so no index can make us read
elsewhere. (What a plain name links to is the owner's business: the Hugging Face cache links to blobs.)

Which files of a directory are its weights, in this order:
1. a base name diffusers or transformers read (`diffusion_pytorch_model`, `model`) before any other name;
2. of one base name the files without a variant, else the only variant there is (such as `fp16`), or
   the variant asked for;
3. anything still ambiguous is refused with the choices; so are shards without their index.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import msgspec

from weightstore.checkpoint.safetensors_header import parse_json_object
from weightstore.errors import CheckpointError, InvalidName
from weightstore.types import check_name

SUFFIX: Final = ".safetensors"
PIPELINE_INDEX: Final = "model_index.json"
BASE_NAMES: Final = ("diffusion_pytorch_model", "model")
MAX_INDEX: Final = 100_000_000
"""Cap on an index file in bytes."""

_COMPONENT: Final = re.compile(
    r"(transformer|unet|prior|controlnet|vae|vqvae|vqmodel|movq|text_encoder|image_encoder|text_model"
    r"|vision_model|safety_checker|projection_model|connectors|vocoder|audio_vae)(_\d+)?"
)
_SHARD: Final = re.compile(r".+-\d{5}-of-\d{5}(?:\.[\w-]+)?\.safetensors")
_INDEX: Final = re.compile(r"(?P<base>.+)\.safetensors\.index(?:\.(?P<variant>[\w-]+))?\.json")
_OTHER_WEIGHTS: Final = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf")


class Part(msgspec.Struct, frozen=True):
    """One set of tensors whose names get `prefix`. `weight_map` (name → file name) is the index's, if any."""

    prefix: str
    files: tuple[Path, ...]
    index: Path | None = None
    weight_map: dict[str, str] | None = None


class Checkpoint(msgspec.Struct, frozen=True):
    """`layout` is ``file``, ``sharded`` or ``pipeline``. `skipped` names a pipeline's sub-directories that
    hold weights but that its model_index.json does not mention."""

    path: Path
    layout: str
    parts: tuple[Part, ...]
    skipped: tuple[str, ...] = ()


class _Choice(msgspec.Struct, frozen=True):
    path: Path
    base: str
    variant: str | None


def find_checkpoint(path: str | Path, variant: str | None = None) -> Checkpoint:
    """Say what `path` is, and which files hold its weights.

    Raises:
        CheckpointError: nothing there, nothing in safetensors format, or more than one possibility;
            the message lists them.
    """
    path = Path(path)
    try:
        return _find(path, variant)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}", path=str(path)) from None


def is_component(name: str) -> bool:
    """Whether diffusers pipelines use this name for a component with weights, as in ``text_encoder_2``."""
    return _COMPONENT.fullmatch(name) is not None


def _find(path: Path, variant: str | None) -> Checkpoint:
    if path.is_dir():
        if (path / PIPELINE_INDEX).is_file():
            return _indexed_pipeline(path, variant)
        choices = _choices(path)
        if not choices and (components := [d.name for d in _directories(path) if _choices(d)]):
            return _pipeline(path, components, variant, skipped=())
        part = _directory_part(path, "", variant)
        return Checkpoint(path, "file" if part.index is None else "sharded", (part,))
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory", path=str(path))
    if path.name.endswith(SUFFIX):
        return Checkpoint(path, "file", (Part("", (path,)),))
    if _INDEX.fullmatch(path.name):
        return Checkpoint(path, "sharded", (_read_index(path, ""),))
    raise CheckpointError(
        f"{path}: not a checkpoint weightstore reads; give a .safetensors file, a .safetensors.index.json, "
        f"or a directory holding either or a {PIPELINE_INDEX}",
        path=str(path),
    )


def _indexed_pipeline(path: Path, variant: str | None) -> Checkpoint:
    index = path / PIPELINE_INDEX
    components = []
    for name, value in parse_json_object(_read(index), str(index)).items():
        if name.startswith("_") or not isinstance(value, list) or len(value) != 2 or None in value:
            continue
        try:
            check_name("component", name)
        except InvalidName as error:
            raise CheckpointError(f"{index}: {error.message}", path=str(index)) from None
        if "." in name:
            raise CheckpointError(f"{index}: component name {name!r} contains a dot", path=str(index))
        components.append(name)
    loadable = [name for name in components if _must_have_weights(path, name)]
    if not loadable:
        raise CheckpointError(
            f"{path}: of the components in {PIPELINE_INDEX} ({', '.join(components) or 'empty'}) none "
            "has safetensors weights",
            path=str(path),
        )
    skipped = tuple(d.name for d in _directories(path) if d.name not in components and _choices(d))
    return _pipeline(path, loadable, variant, skipped)


def _pipeline(path: Path, components: list[str], variant: str | None, skipped: tuple[str, ...]) -> Checkpoint:
    parts = tuple(_directory_part(path / name, f"{name}.", variant) for name in components)
    return Checkpoint(path, "pipeline", parts, skipped)


def _must_have_weights(pipeline: Path, name: str) -> bool:
    """Whether a component is a model (config.json or weights) and not a tokenizer, scheduler or processor."""
    directory = pipeline / name
    if not directory.is_dir():
        raise CheckpointError(
            f"{pipeline / PIPELINE_INDEX} names a component {name!r}, but there is no directory {directory}; "
            "is the download complete?",
            path=str(directory),
        )
    return (directory / "config.json").is_file() or bool(_choices(directory))


def _directory_part(directory: Path, prefix: str, variant: str | None) -> Part:
    choice = _choose(directory, _choices(directory), variant)
    if _INDEX.fullmatch(choice.path.name):
        return _read_index(choice.path, prefix)
    return Part(prefix, (choice.path,))


def _choose(directory: Path, choices: list[_Choice], variant: str | None) -> _Choice:
    if not choices:
        raise CheckpointError(f"{directory}: {_why_nothing(directory)}", path=str(directory))
    listing = ", ".join(c.path.name for c in choices)
    known = [c for c in choices if c.base in BASE_NAMES] or choices
    if variant is not None:
        wanted = [c for c in known if c.variant == variant]
        if not wanted:
            raise CheckpointError(
                f"{directory}: no weights of variant {variant!r}; there are {listing}",
                path=str(directory),
                choices=[c.path.name for c in choices],
            )
    else:
        wanted = [c for c in known if c.variant is None] or known
    if len(wanted) > 1:
        raise CheckpointError(
            f"{directory}: which weights? There are {listing}; give the path of one, or a variant",
            path=str(directory),
            choices=[c.path.name for c in choices],
        )
    return wanted[0]


def _why_nothing(directory: Path) -> str:
    names = [p.name for p in sorted(directory.iterdir())]
    if shards := [n for n in names if n.endswith(SUFFIX)]:
        return f"{len(shards)} shards such as {shards[0]} but no .safetensors.index.json that lists them"
    if other := [n for n in names if n.endswith(_OTHER_WEIGHTS)]:
        return f"no safetensors weights, only {', '.join(other[:3])}; convert them to safetensors first"
    return f"no safetensors weights and no {PIPELINE_INDEX}"


def _choices(directory: Path) -> list[_Choice]:
    """The single files and indices in a directory; shards are not choices, their index is."""
    found = []
    for path in sorted(directory.iterdir()):
        name = path.name
        if name.startswith("."):
            continue  # hidden files: unfinished downloads and saves
        if index := _INDEX.fullmatch(name):
            stem, variant = index["base"], index["variant"]
        elif name.endswith(SUFFIX) and not _SHARD.fullmatch(name):
            stem, variant = name.removesuffix(SUFFIX), None
        else:
            continue
        base, _, inner = stem.partition(".")
        # Only of the known base names is it known that a dot ends them: `sd3.5_medium` has no variant.
        if base in BASE_NAMES:
            found.append(_Choice(path, base, variant or inner or None))
        else:
            found.append(_Choice(path, stem, variant))
    return found


def _directories(path: Path) -> list[Path]:
    return [p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")]


def _read_index(index: Path, prefix: str) -> Part:
    weight_map = parse_json_object(_read(index), str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map that maps tensors to files", path=str(index))
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(SUFFIX) or not _is_plain(name):
            raise CheckpointError(
                f"{index}: tensor {ascii(tensor)[:120]} is said to be in {ascii(name)[:120]}; only a "
                f"{SUFFIX} file in the index's own directory is allowed",
                path=str(index),
            )
    names = sorted(set(weight_map.values()))
    if missing := [n for n in names if not (index.parent / n).exists()]:
        raise CheckpointError(
            f"{index}: {len(missing)} of its {len(names)} files are missing: {', '.join(missing[:5])}",
            path=str(index),
            missing=missing,
        )
    return Part(prefix, tuple(index.parent / n for n in names), index, weight_map)


def _is_plain(name: str) -> bool:
    return name.isprintable() and not name.startswith(".") and not set(name) & set('/\\:"')


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise CheckpointError(f"{path}: not a regular file", path=str(path))
    size = path.stat().st_size
    if size > MAX_INDEX:
        raise CheckpointError(f"{path}: {size} bytes are too many for an index; allowed are {MAX_INDEX}")
    return path.read_bytes()
