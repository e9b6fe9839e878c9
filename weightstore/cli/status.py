"""`weightstore status`: the store's state as a page for people, or as JSON for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click
import msgspec

from weightstore.cli.options import connect, socket_option
from weightstore.paths import socket_path

if TYPE_CHECKING:
    from weightstore.wire import Status


@click.command("status")
@socket_option
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def status_command(socket: str | None, as_json: bool) -> None:
    """Show models, versions, tags, leases, refits and arena use."""
    with connect(socket) as store:
        status = store.status()
    if as_json:
        click.echo(json.dumps(to_builtins(status), indent=2))
        return
    from weightstore.cli.render import print_status

    print_status(status, socket_path(socket))


def to_builtins(status: Status) -> dict[str, Any]:
    """Every field of `status`, without what only the protocol needs."""
    fields = {name: getattr(status, name) for name in status.__struct_fields__ if name != "id"}
    plain: dict[str, Any] = msgspec.to_builtins(fields)
    return plain
