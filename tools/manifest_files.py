"""Manifests: what tensors a model has, without their bytes. Two forms, read and written here.

The *full* form is one JSON file per component, as `make_manifest.py` prints it: every parameter and
buffer, with statistics. The *compact* form is one gzipped JSON file per model with what a checkpoint
would hold: parameters and persistent buffers, with their ties. Neither needs torch to be read.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from weightstore.errors import UsageError
from weightstore.types import TensorSpec, check_spec, contiguous_stride

FORMAT = "weightstore manifest 1"

_DAMAGE = (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError, UsageError)
"""What reading a file that is no manifest, or half of one, raises."""


class ManifestError(Exception):
    """A file that is no manifest, or a model that none can be made of."""


def stored_tensors(manifest: Mapping[str, Any]) -> list[list[Any]]:
    """The compact rows [name, dtype, shape] or [name, dtype, shape, alias_of] of a full manifest."""
    dtypes = {t["name"]: t["dtype"] for t in manifest["tensors"] if "alias_of" not in t}
    rows = []
    for tensor in manifest["tensors"]:
        if "alias_of" in tensor:
            rows.append([tensor["name"], dtypes[tensor["alias_of"]], tensor["shape"], tensor["alias_of"]])
        elif tensor["persistent"]:
            rows.append([tensor["name"], tensor["dtype"], tensor["shape"]])
    return rows


def write_compact(path: Path, model: str, manifests: Iterable[Mapping[str, Any]]) -> None:
    """Write the components of one model as a compact manifest; the same input gives the same bytes."""
    components = {m["component"]: {"cls": m["cls"], "tensors": stored_tensors(m)} for m in manifests}
    text = json.dumps({"format": FORMAT, "model": model, "components": components}, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def read_manifest(path: Path) -> dict[str, list[TensorSpec]]:
    """Component → its tensors' specs, names with the component's prefix, from either form.

    Raises:
        ManifestError: the file is not a manifest.
    """
    try:
        data = path.read_bytes()
        table = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
        if table.get("format") == FORMAT:
            rows = {name: part["tensors"] for name, part in table["components"].items()}
        else:
            rows = {table["component"]: stored_tensors(table)}
        return {name: [_spec(name, *row) for row in part] for name, part in rows.items()}
    except _DAMAGE as error:
        raise ManifestError(f"{path}: not a manifest of make_manifest.py: {error!r}") from None


def _spec(component: str, name: str, dtype: str, shape: list[int], alias_of: str | None = None) -> TensorSpec:
    target = None if alias_of is None else f"{component}.{alias_of}"
    spec = TensorSpec(f"{component}.{name}", dtype, tuple(shape), contiguous_stride(shape), target)
    return check_spec(spec)
