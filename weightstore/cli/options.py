"""Options and parameter types that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from weightstore.errors import InvalidName, UsageError
from weightstore.sizes import parse_size
from weightstore.types import check_name

if TYPE_CHECKING:
    from weightstore.client import Store
    from weightstore.names import NameMap

F = TypeVar("F", bound=Callable[..., Any])


def size(text: str) -> int:
    """Parameter type: bytes, written as '64GiB', '500MB' or a plain number."""
    try:
        return parse_size(text)
    except UsageError as error:
        raise click.BadParameter(error.message) from None


def name(kind: str) -> Callable[[str], str]:
    """Parameter type: a name that the store would accept for a `kind` (model, tag, arena)."""

    def check(text: str) -> str:
        try:
            return check_name(kind, text)
        except InvalidName as error:
            raise click.BadParameter(error.message) from None

    check.__name__ = kind
    return check


def version_or_tag(text: str) -> int | str:
    """Parameter type: a version number, or the name of a tag."""
    return int(text) if text.isdigit() else TAG(text)


MODEL = name("model")
TAG = name("tag")


def socket_option(command: F) -> F:
    """Add --socket PATH."""
    return click.option(
        "--socket",
        metavar="PATH",
        type=click.Path(),
        help="Socket of the store.  [default: $WEIGHTSTORE_SOCKET, else "
        "$XDG_RUNTIME_DIR/weightstore/store.sock, else /tmp/weightstore-UID/store.sock]",
    )(command)


def map_option(command: F) -> F:
    """Add --map FILE; `read_map` reads it."""
    return click.option(
        "--map",
        "map_file",
        metavar="FILE",
        type=click.Path(),
        help="Name map (JSON) to put the names through.",
    )(command)


def read_map(path: str | None) -> NameMap | None:
    """The name map in a file; None for no file."""
    if path is None:
        return None
    from weightstore.names import NameMap

    try:
        return NameMap.from_json(Path(path).read_bytes())
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}") from None


def published_map(socket: str | None, model: str) -> NameMap | None:
    """The map published with the model, as a refit applies it: no rule need match."""
    with connect(socket) as store:
        names = store.names(model)
    return None if names is None else names.relaxed()


def connect(socket: str | None) -> Store:
    """A client of the store on `socket` (None: the default path); used as a context manager."""
    from weightstore.client import connect as connect_client

    return connect_client(socket)
