"""Published names: a map that the store keeps with a model, for whoever refits it.

An engine knows how its own names come from those its trainers use, so it publishes that once; a refit that
is given no map goes by the published one. The store keeps it as text, whose meaning is looked at here:
before it is published, and whenever it is used.
"""

from __future__ import annotations

import msgspec

from weightstore.errors import UsageError
from weightstore.names.name_map import NameMap
from weightstore.types import check_name_map


def encode_published(model: str, names: NameMap) -> str:
    """The text to publish. Raises UsageError for a map that is too large, or none."""
    if not isinstance(names, NameMap):
        raise UsageError(f"what is published for {model!r} is a NameMap, not a {type(names).__name__}")
    try:
        text = msgspec.json.encode(names).decode()
        # Reading it back runs every rule's own checks on what was assembled past them.
        NameMap.from_json(text)
    except (UsageError, UnicodeError, msgspec.EncodeError) as error:
        raise UsageError(f"the name map for {model!r} cannot be published: {error}") from None
    return check_name_map(model, text)


def decode_published(model: str, text: str) -> NameMap:
    """The map of a published text. Raises UsageError, saying what to do, if it is none."""
    try:
        return NameMap.from_json(text)
    except UsageError as error:
        raise UsageError(
            f"the name map published with {model!r} cannot be used: {error.message}; publish another "
            "(store.publish_names), or give names= to go without it"
        ) from None
