"""`weightstore tag | rm | verify`: the catalog's small verbs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from weightstore.cli.options import MODEL, TAG, connect, socket_option, version_or_tag
from weightstore.errors import UnknownModel
from weightstore.sizes import format_size

if TYPE_CHECKING:
    from weightstore.wire import ModelStatus, Status, Verified

SHOWN: Final = 20
"""Corrupt tensors named before the rest is only counted."""


@click.command("tag")
@socket_option
@click.option(
    "--delete", "-d", is_flag=True, help="Remove the tag. The version it named is freed when unused."
)
@click.argument("model", type=MODEL, required=False)
@click.argument("tag", type=TAG, required=False)
@click.argument("target", type=version_or_tag, metavar="[VERSION|TAG]", required=False)
def tag_command(
    socket: str | None, delete: bool, model: str | None, tag: str | None, target: int | str | None
) -> None:
    """List, move or delete tags.

    \b
      weightstore tag                         every tag of every model
      weightstore tag MODEL                   the tags of one model
      weightstore tag MODEL TAG VERSION       have TAG name a version
      weightstore tag MODEL TAG OTHER-TAG     …or what another tag names
      weightstore tag --delete MODEL TAG
    """
    if delete and (model is None or tag is None or target is not None):
        raise click.UsageError("--delete takes MODEL and TAG")
    if not delete and tag is not None and target is None:
        raise click.UsageError("MODEL TAG needs the VERSION (or another tag) that TAG is to name")
    with connect(socket) as store:
        if delete and model is not None and tag is not None:
            store.remove_tag(model, tag)
            click.echo(f"{model}: removed tag {tag}")
        elif model is not None and tag is not None and target is not None:
            version = store.tag(model, tag, target)
            click.echo(f"{model}: {tag} is version {version}")
        else:
            for line in _tags(store.status(), model):
                click.echo(line)


def _tags(status: Status, model: str | None) -> list[str]:
    width = max((len(tag) for each in status.models for tag in each.tags), default=0)
    return [
        f"{each.name}  {tag.ljust(width)}  {number}{'  torn' if tag in each.torn else ''}"
        for each in _chosen(status, model)
        for tag, number in sorted(each.tags.items())
    ]


def _chosen(status: Status, model: str | None) -> list[ModelStatus]:
    known = [each for each in status.models if each.versions]
    chosen = [each for each in known if model in (None, each.name)]
    if model is not None and not chosen:
        names = ", ".join(each.name for each in known) or "none"
        raise UnknownModel(f"no model {model!r} in the store; it has: {names}")
    return chosen


@click.command("rm")
@socket_option
@click.argument("models", metavar="MODEL...", type=MODEL, nargs=-1, required=True)
def rm_command(socket: str | None, models: tuple[str, ...]) -> None:
    """Remove models with all their tags, and their name maps.

    Versions that somebody leases stay until they are released. To remove a single version, delete the tags
    that name it.
    """
    with connect(socket) as store:
        for model in models:
            store.remove_model(model)
            click.echo(f"removed {model}")


@click.command("verify")
@socket_option
@click.option("--tag", type=TAG, help="Only what this tag names.")
@click.option("--version", type=click.IntRange(min=1), help="Only this version.")
@click.argument("model", type=MODEL, required=False)
@click.pass_context
def verify_command(
    ctx: click.Context, socket: str | None, tag: str | None, version: int | None, model: str | None
) -> None:
    """Recompute the checksums of MODEL's versions (of every model without one) and compare.

    They were computed after each commit; a version that has none yet gets them now. Exits with 1 if any
    tensor differs.
    """
    if tag is not None and version is not None:
        raise click.UsageError("--tag and --version exclude each other")
    if model is None and (tag is not None or version is not None):
        raise click.UsageError("--tag and --version need a MODEL")
    sound = True
    with connect(socket) as store:
        if model is not None and (tag is not None or version is not None):
            wanted = [(model, tag, version)]
        else:
            models = _chosen(store.status(), model)
            wanted = [
                (each.name, None, number) for each in models for number in sorted(set(each.tags.values()))
            ]
        for name, its_tag, number in wanted:
            sound = _report(name, store.verify(name, tag=its_tag, version=number)) and sound
    ctx.exit(0 if sound else 1)


def _report(model: str, verified: Verified) -> bool:
    """Print one line (and the corrupt tensors) and return whether the version is sound."""
    what = f"{model} version {verified.version}: {verified.tensors} tensors, {format_size(verified.nbytes)}"
    if not verified.corrupt:
        new = f" ({verified.computed} checksums are new)" if verified.computed else ""
        click.echo(f"{what}, intact{new}, digest {verified.digest}")
        return True
    click.echo(f"{what}, {len(verified.corrupt)} CORRUPT:", err=True)
    for name in verified.corrupt[:SHOWN]:
        click.echo(f"  {name}", err=True)
    if len(verified.corrupt) > SHOWN:
        click.echo(f"  … and {len(verified.corrupt) - SHOWN} more", err=True)
    return False
