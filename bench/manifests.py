"""The tensors of real models (names, dtypes, shapes, ties), for benchmarks and tests that need real sizes.

Made by `tools/make_manifest.py --compact` from the models as diffusers and transformers build them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tools.manifest_files import read_manifest
from weightstore.types import TensorSpec

DIRECTORY = Path(__file__).parent / "manifests"
SUFFIX = ".json.gz"


def names() -> list[str]:
    """The models there are, e.g. ``flux1-dev``."""
    return sorted(path.name.removesuffix(SUFFIX) for path in DIRECTORY.glob(f"*{SUFFIX}"))


def load(model: str, components: Sequence[str] | None = None) -> list[TensorSpec]:
    """The specs of a model's tensors, names prefixed with their component; `components` selects and orders.

    Raises:
        KeyError: no such model or component.
    """
    if model not in names():
        raise KeyError(f"no manifest of {model!r}; there are {', '.join(names())}")
    parts = read_manifest(DIRECTORY / f"{model}{SUFFIX}")
    return [spec for name in (parts if components is None else components) for spec in parts[name]]
