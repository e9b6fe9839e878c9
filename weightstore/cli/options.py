"""Options and parameter types that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from weightstore.errors import InvalidName, UsageError
from weightstore.sizes import parse_size
from weightstore.types import check_name

if TYPE_CHECKING:
    from weightstore.client import Store

F = TypeVar("F", bound=Callable[..., Any])


class Size(click.ParamType):
    """Bytes, written as '64GiB', '500MB' or a plain number."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except UsageError as error:
            self.fail(error.message, param, ctx)


class Name(click.ParamType):
    """A model, tag or arena name that the store would accept."""

    def __init__(self, kind: str) -> None:
        self.name = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return check_name(self.name, value)
        except InvalidName as error:
            self.fail(error.message, param, ctx)


SIZE = Size()
MODEL = Name("model")
TAG = Name("tag")


def socket_option(command: F) -> F:
    """Add --socket PATH."""
    return click.option(
        "--socket",
        metavar="PATH",
        type=click.Path(),
        help="Socket of the store.  [default: $WEIGHTSTORE_SOCKET, else "
        "$XDG_RUNTIME_DIR/weightstore/store.sock, else /tmp/weightstore-UID/store.sock]",
    )(command)


def connect(socket: str | None) -> Store:
    """A client of the store on `socket` (None: the default path); used as a context manager."""
    from weightstore.client import connect as connect_client

    return connect_client(socket)
