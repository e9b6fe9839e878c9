#!/usr/bin/env python3
"""Make the manifest of a model from its configuration: every tensor it will have, without any weights.

Models are built on torch's meta device, so a 60 GiB pipeline takes seconds and no memory. PATH is

  a pipeline directory   model_index.json and one config.json per component; tokenizers and schedulers
                         are passed over
  a config.json          of one component, or the directory that holds it, with --cls naming its class
  a manifest             made earlier, to be summarised or made compact

Without --out or --compact only a summary is printed.

  make_manifest.py FLUX.1-dev/ --out manifests/ --compact flux1-dev.json.gz --model flux1-dev
  make_manifest.py Wan2.2-T2V/ --dtype vae=float32
  make_manifest.py config.json --cls diffusers.FluxTransformer2DModel --component transformer
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a script from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.manifest_files import ManifestError, write_compact
from weightstore.sizes import format_size

if TYPE_CHECKING:
    import torch

KIB, MIB = 1 << 10, 1 << 20
BINS = (
    ("<1K", KIB),
    ("1K-4K", 4 * KIB),
    ("4K-16K", 16 * KIB),
    ("16K-64K", 64 * KIB),
    ("64K-1M", MIB),
    ("1M-8M", 8 * MIB),
    ("8M-32M", 32 * MIB),
    ("32M-64M", 64 * MIB),
    ("64M-256M", 256 * MIB),
)


def find_class(library: str, name: str) -> type:
    """The class a model_index.json entry [library, name] means, as diffusers resolves it."""
    places = [library] if library in ("diffusers", "transformers") else [f"diffusers.pipelines.{library}"]
    for place in places:
        try:
            found = getattr(importlib.import_module(place), name, None)
        except ImportError as error:
            raise ManifestError(f"{library}.{name}: cannot import {place} ({error})") from None
        if isinstance(found, type):
            return found
    raise ManifestError(f"{library} has no class {name}; is the installed version too old for this pipeline?")


def named_class(dotted: str) -> type:
    """The class of a dotted name such as ``diffusers.FluxTransformer2DModel``."""
    module, _, name = dotted.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None) if module else None
    except ImportError as error:
        raise ManifestError(f"--cls {dotted}: cannot import {module} ({error})") from None
    if not isinstance(found, type):
        raise ManifestError(f"--cls {dotted}: no such class; write it as module.Class")
    return found


def build(cls: Any, config: Mapping[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    """The module a checkpoint of this class and config is loaded into with `dtype`, on the meta device.

    diffusers casts what it loads, except modules in `_keep_in_fp32_modules`; non-persistent buffers
    of such classes keep the dtype they were made with. transformers builds under the default dtype, so
    what a class asks for explicitly (inverse frequencies, position ids) keeps its own, and
    `_keep_in_fp32_modules_strict` (for bf16) is kept in fp32.
    """
    import torch

    if hasattr(cls, "config_class") and cls.config_class is not None:
        with default_dtype(dtype), torch.device("meta"):
            model = cls(cls.config_class.from_dict(dict(config)))
        keep = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        _cast(model, keep, None, torch.float32)
    else:
        with torch.device("meta"):
            model = cls.from_config(dict(config))
        keep = set(getattr(cls, "_keep_in_fp32_modules", None) or ())
        if keep and dtype in (torch.float16, torch.bfloat16):
            _cast(model, keep, dtype, torch.float32)
        else:
            torch.nn.Module.to(model, dtype)  # ModelMixin.to would warn of an empty list
    built: torch.nn.Module = model.eval()
    return built


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _cast(model: torch.nn.Module, keep: set[str], rest: torch.dtype | None, kept: torch.dtype) -> None:
    """Cast parameters and persistent buffers: `kept` if `keep` has a segment of the name."""
    import torch

    stored = model.state_dict(keep_vars=True)
    for name, tensor in stored.items():
        dtype = kept if keep & set(name.split(".")) else rest
        if dtype is not None and tensor.is_floating_point():
            tensor.data = torch.empty(tensor.shape, dtype=dtype, device="meta")


def make_manifest(
    model: str, component: str, cls: type, config: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """The full manifest of one component; `dtype` is a torch dtype's name.

    Raises:
        ManifestError: the class cannot be built from the config.
    """
    import torch

    try:
        module = build(cls, config, getattr(torch, dtype))
    except Exception as error:  # whatever a foreign constructor raises
        raise ManifestError(f"{model}.{component}: {cls.__name__} cannot be built: {error!r}") from error
    tensors = list(_tensors(module))
    name = f"{cls.__module__}.{cls.__qualname__}"
    return {
        "model": model,
        "component": component,
        "cls": name,
        "config_in": dict(config),
        "config_full": _full_config(module.config),
        "stats": _stats(module, name, tensors),
        "tensors": tensors,
    }


def _full_config(config: Any) -> dict[str, Any]:
    full = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    if "_use_default_values" in full:
        full["_use_default_values"] = sorted(full["_use_default_values"])  # diffusers lists a set
    return full


def _tensors(module: torch.nn.Module) -> Iterator[dict[str, Any]]:
    first: dict[int, str] = {}
    persistent = module.state_dict().keys()
    kinds = (
        ("param", module.named_parameters(remove_duplicate=False)),
        ("buffer", module.named_buffers(remove_duplicate=False)),
    )
    for kind, named in kinds:
        for name, tensor in named:
            shape = list(tensor.shape)
            if id(tensor) in first:
                yield {"name": name, "kind": kind, "alias_of": first[id(tensor)], "shape": shape}
                continue
            first[id(tensor)] = name
            yield {
                "name": name,
                "kind": kind,
                "persistent": name in persistent,
                "dtype": _dtype(tensor),
                "shape": shape,
                "nbytes": tensor.nbytes,
            }


def _stats(module: torch.nn.Module, cls: str, tensors: list[dict[str, Any]]) -> dict[str, Any]:
    own = [t for t in tensors if "alias_of" not in t]
    params = [t for t in own if t["kind"] == "param"]
    buffers = [t for t in own if t["kind"] == "buffer"]
    by_size = sorted(params, key=lambda t: -t["nbytes"])
    kept, lost = ([b for b in buffers if b["persistent"] is flag] for flag in (True, False))
    dtypes: dict[str, list[int]] = {}
    for t in params:
        count = dtypes.setdefault(t["dtype"], [0, 0])
        count[0] += 1
        count[1] += t["nbytes"]
    shared: dict[str, list[str]] = {}
    for t in tensors:
        if "alias_of" in t:
            shared.setdefault(t["alias_of"], [t["alias_of"]]).append(t["name"])
    return {
        "params": sum(p.numel() for p in module.parameters()),
        "n_params": len(params),
        "n_state_dict_keys": len(module.state_dict()),
        "param_bytes": sum(t["nbytes"] for t in params),
        "n_buffers": len(buffers),
        "persistent_buffers": [[b["name"], b["dtype"], b["shape"]] for b in kept],
        "n_persistent_buffers": len(kept),
        "nonpersistent_buffers": [[b["name"], b["dtype"], b["shape"]] for b in lost],
        "shared": list(shared.values()),
        "dtypes": dtypes,
        "largest": [[t["name"], t["shape"], t["nbytes"]] for t in by_size[:4]],
        "smallest": [[t["name"], t["shape"], t["nbytes"]] for t in by_size[-2:]],
        "hist": _histogram([t for t in own if t["persistent"]]),
        "keep_in_fp32": list(getattr(module, "_keep_in_fp32_modules", None) or ()),
        "keep_strict": list(getattr(module, "_keep_in_fp32_modules_strict", None) or ()),
        "cls": cls,
        "names_head": list(module.state_dict())[:3],
        "unregistered_tensor_attrs": list(_strays(module)),
    }


def _histogram(stored: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Size class → [tensors, bytes], small classes first, empty classes left out."""
    counts = {name: [0, 0] for name, _ in (*BINS, (">=256M", 0))}
    for t in stored:
        name = next((name for name, limit in BINS if t["nbytes"] < limit), ">=256M")
        counts[name][0] += 1
        counts[name][1] += t["nbytes"]
    return {name: count for name, count in counts.items() if count[0]}


def _strays(module: torch.nn.Module) -> Iterator[list[Any]]:
    """Tensors that are neither parameters nor buffers but plain attributes: engines must find them too."""
    import torch

    for path, child in module.named_modules():
        for name, value in vars(child).items():
            if isinstance(value, torch.Tensor):
                yield [f"{path}.{name}" if path else name, list(value.shape), str(value.dtype)]


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# -- command line -----------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(table, dict):
        raise ManifestError(f"{path}: not a JSON object")
    return table


def pipeline_manifests(
    path: Path, model: str, only: list[str], dtypes: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Manifests of the components of a pipeline directory that are torch modules."""
    import torch

    entries = {
        name: entry
        for name, entry in read_json(path / "model_index.json").items()
        if not name.startswith("_") and isinstance(entry, list) and None not in entry and len(entry) == 2
    }
    if unknown := set(only) - entries.keys():
        raise ManifestError(
            f"{path}: no component {', '.join(sorted(unknown))}; there are {', '.join(entries)}"
        )
    made = []
    for name, (library, class_name) in entries.items():
        if only and name not in only:
            continue
        cls = find_class(library, class_name)
        if issubclass(cls, torch.nn.Module):
            config = read_json(path / name / "config.json")
            made.append(make_manifest(model, name, cls, config, dtypes.get(name, dtypes[""])))
    return made


def manifests_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    path: Path = args.path
    dtypes = parse_dtypes(args.dtype)
    if (path / "model_index.json").is_file():
        return pipeline_manifests(path, args.model or path.resolve().name, args.component, dtypes)
    config = read_json(path / "config.json" if path.is_dir() else path)
    if "tensors" in config and "component" in config:
        return [config]
    if args.cls is None:
        raise ManifestError(f"{path} is no pipeline directory: --cls must name the component's class")
    component = args.component[0] if args.component else "model"
    model = args.model or path.resolve().parent.name
    return [make_manifest(model, component, named_class(args.cls), config, dtypes.get(component, dtypes[""]))]


def parse_dtypes(values: list[str]) -> dict[str, str]:
    """['float16', 'vae=float32'] → {'': 'float16', 'vae': 'float32'}; '' is for the other components."""
    dtypes = {"": "bfloat16"}
    for value in values:
        component, _, dtype = value.rpartition("=")
        if dtype not in ("float16", "bfloat16", "float32", "float64"):
            raise ManifestError(f"--dtype {value}: use float16, bfloat16, float32 or float64")
        dtypes[component] = dtype
    return dtypes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, nargs="+", metavar="PATH", help="pipeline, config or manifest")
    parser.add_argument("--model", help="the model's name (default: the directory's)")
    parser.add_argument("--component", action="append", default=[], help="only this component (repeatable)")
    parser.add_argument("--cls", help="class of a single component, as module.Class")
    parser.add_argument(
        "--dtype",
        action="append",
        default=[],
        help="dtype the model is loaded with (default bfloat16), or COMPONENT=DTYPE (repeatable)",
    )
    parser.add_argument("--out", type=Path, help="directory for MODEL.COMPONENT.json, the full manifests")
    parser.add_argument(
        "--compact", type=Path, help="file for the compact manifest of all components (.json.gz)"
    )
    args = parser.parse_args(argv)
    try:
        manifests = []
        for path in args.path:
            manifests += manifests_of(argparse.Namespace(**vars(args) | {"path": path}))
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            for m in manifests:
                (args.out / f"{m['model']}.{m['component']}.json").write_text(json.dumps(m))
        if args.compact is not None:
            write_compact(args.compact, args.model or manifests[0]["model"], manifests)
    except ManifestError as error:
        print(f"make_manifest: {error}", file=sys.stderr)
        return 2
    for m in manifests:
        print(summary(m))
    return 0


def summary(manifest: Mapping[str, Any]) -> str:
    own = [t for t in manifest["tensors"] if t.get("persistent")]
    nbytes = sum(t["nbytes"] for t in own)
    ties = len([t for t in manifest["tensors"] if "alias_of" in t])
    strays = len(manifest["stats"]["unregistered_tensor_attrs"])
    lost = len(manifest["stats"]["nonpersistent_buffers"])
    counts = f"{len(own)} tensors, {format_size(nbytes)}, {ties} ties, {lost} non-persistent buffers"
    return (
        f"{manifest['model']}.{manifest['component']}: {counts}, {strays} unregistered tensors  "
        f"({manifest['cls']})"
    )


if __name__ == "__main__":
    sys.exit(main())
