"""`weightstore plan`: what of a checkpoint would become which stored tensor, before a byte moves."""

from __future__ import annotations

import json

import click
import msgspec

from weightstore.casts import check_mode
from weightstore.cli.options import MODEL, TAG, connect, map_option, published_map, read_map, socket_option
from weightstore.types import DEFAULT_TAG, TensorRecord

PLAIN_WIDTH = 160
"""Columns where the output is no terminal and has no width of its own."""


@click.command("plan")
@socket_option
@click.option("--tag", type=TAG, default=DEFAULT_TAG, show_default=True, help="Tag that would be written.")
@map_option
@click.option("--components", metavar="A,B,…", help="Components that would be declared.  [default: all]")
@click.option("--partial", is_flag=True, help="Any subset of the tensors may be written.")
@click.option("--extend", is_flag=True, help="Tensors that the base lacks may be written too.")
@click.option(
    "--cast",
    type=click.Choice(["safe", "any", "never"]),
    default="safe",
    show_default=True,
    help="As a refit's.",
)
@click.option("--fresh", is_flag=True, help="Start from nothing, as `load` does; asks no store.")
@click.option("--prefix", default="", help="Put before every name of the checkpoint.")
@click.option("--variant", help="Which variant of a directory's files to read, e.g. fp16.")
@click.option("--json", "as_json", is_flag=True, help="Print every row as JSON.")
@click.argument("model", type=MODEL)
@click.argument("path", type=click.Path())
@click.pass_context
def plan_command(
    ctx: click.Context,
    socket: str | None,
    tag: str,
    map_file: str | None,
    components: str | None,
    partial: bool,
    extend: bool,
    cast: str,
    fresh: bool,
    prefix: str,
    variant: str | None,
    as_json: bool,
    model: str,
    path: str,
) -> None:
    """Say what a refit of MODEL with the tensors of the checkpoint at PATH would do.

    Reads the headers of the safetensors files only. The base is what a refit of the tag would start from: the
    tag's version, else that of 'latest'. Names go through the map in FILE, else, as in a refit, through the
    one published with the model; a FILE of '{"strip": false}' takes them as they are. Exits with 1 if the
    refit would not commit.
    """
    from weightstore.checkpoint.contents import Contents
    from weightstore.names import AS_STORED, Given, Stored, plan

    names = read_map(map_file)
    published = None if names is not None or fresh else published_map(socket, model)
    declared = None if components is None else frozenset(part.strip() for part in components.split(","))
    with Contents(path, prefix, variant) as contents:
        given = [Given(spec.name, spec.dtype, spec.shape) for spec in contents.specs]
    on, records = ("", {}) if fresh else _base(socket, model, tag)
    through = ", through the published name map" if published is not None else ""
    what = f"refit of {model!r} tag {tag!r}{on}{through}"
    stored = Stored(what, records, declared, bool(on) and not extend, partial, check_mode(cast))
    planned = plan(names or published or AS_STORED, given, stored)
    if as_json:
        click.echo(msgspec.json.format(json.dumps(planned.to_builtins()), indent=2))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=PLAIN_WIDTH)
        console.print(planned)
    ctx.exit(0 if planned.ok else 1)


def _base(socket: str | None, model: str, tag: str) -> tuple[str, dict[str, TensorRecord]]:
    """What a refit would start from: how a message names it, and its records."""
    with connect(socket) as store:
        found = tag if tag in store.tags(model) else DEFAULT_TAG
        with store.lease(model, found) as snapshot:
            return f" on version {snapshot.version}", dict(snapshot.records)
