"""What the environment asks of the plugin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from weightstore.types import DEFAULT_TAG


class Settings(NamedTuple):
    """`socket` None is the store's default."""

    model: str
    tag: str
    socket: str | None


def settings(environ: Mapping[str, str]) -> Settings | None:
    """What the environment asks for; None if it names no model."""
    model = environ.get("WEIGHTSTORE_MODEL", "").strip()
    if not model:
        return None
    tag = environ.get("WEIGHTSTORE_TAG", "").strip() or DEFAULT_TAG
    return Settings(model, tag, environ.get("WEIGHTSTORE_SOCKET", "").strip() or None)
