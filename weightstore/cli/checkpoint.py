"""`weightstore load | save`: checkpoints into the store and back, with a progress bar on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from weightstore.cli import options
from weightstore.cli.options import MODEL, TAG, connect, map_option, read_map, size, socket_option
from weightstore.errors import UnknownModel
from weightstore.sizes import format_size
from weightstore.types import DEFAULT_TAG

if TYPE_CHECKING:
    from weightstore.names import NameMap

Progress = Callable[[int, int], None]


@click.command("load")
@socket_option
@click.option(
    "--tag", type=TAG, default=DEFAULT_TAG, show_default=True, help="Tag that is to name the version."
)
@click.option(
    "--prefix", default="", help="Put before every name, e.g. 'transformer.' for that component alone."
)
@click.option("--variant", help="Which variant of a directory's files to read, e.g. fp16.")
@map_option
@click.option("--published-map", is_flag=True, help="Put the names through the map published with MODEL.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar, no summary.")
@click.argument("model", type=MODEL)
@click.argument("path", type=click.Path())
def load_command(
    socket: str | None,
    tag: str,
    prefix: str,
    variant: str | None,
    map_file: str | None,
    published_map: bool,
    quiet: bool,
    model: str,
    path: str,
) -> None:
    """Load the checkpoint at PATH as the next version of MODEL.

    PATH is a safetensors file, the index of a sharded checkpoint, or a directory: of either, or a diffusers
    pipeline, whose components become prefixes such as 'transformer.'.

    Its names are those that are stored, as 'save' writes them, unless a map says otherwise.
    """
    from weightstore.checkpoint.load import load_checkpoint

    if published_map and map_file is not None:
        raise click.UsageError("--map and --published-map exclude each other")
    names = _published(socket, model) if published_map else read_map(map_file)
    with connect(socket) as store, _bar(f"loading {model}", quiet) as progress:
        report = load_checkpoint(
            store, model, path, tag, progress, prefix=prefix, variant=variant, names=names
        )
    if quiet:
        return
    ties = f" and {report.ties} ties" if report.ties else ""
    click.echo(
        f"{model} version {report.version} ({tag}): {report.tensors} tensors{ties}, "
        f"{format_size(report.nbytes)} from {report.files} {'file' if report.files == 1 else 'files'} in "
        f"{report.seconds:.2f} s (read at {report.gbps:.1f} GB/s)"
    )
    for name in report.skipped:
        click.echo(f"skipped {name}: it holds weights, but model_index.json does not mention it", err=True)


def _published(socket: str | None, model: str) -> NameMap:
    names = options.published_map(socket, model)
    if names is None:
        raise UnknownModel(f"no name map is published with model {model!r}", model=model)
    return names


@click.command("save")
@socket_option
@click.option("--tag", type=TAG, default=DEFAULT_TAG, show_default=True, help="Tag that names the version.")
@click.option("--version", type=click.IntRange(min=1), help="A version by its number instead.")
@click.option(
    "--layout",
    type=click.Choice(["auto", "file", "sharded", "pipeline"]),
    default="auto",
    show_default=True,
    help="One file, one directory of shards, or a directory per component; auto goes by PATH and names.",
)
@click.option("--max-shard-size", metavar="SIZE", type=size, default="5GB", show_default=True)
@click.option("--quiet", "-q", is_flag=True, help="No progress bar, no summary.")
@click.argument("model", type=MODEL)
@click.argument("path", type=click.Path())
def save_command(
    socket: str | None,
    tag: str,
    version: int | None,
    layout: str,
    max_shard_size: int,
    quiet: bool,
    model: str,
    path: str,
) -> None:
    """Save a version of MODEL to PATH, as safetensors that `load` and Hugging Face libraries read.

    Files are written under temporary names, and renamed once all are complete on disk.
    """
    from weightstore.checkpoint.save import save_checkpoint

    with connect(socket) as store, _bar(f"saving {model}", quiet) as progress:
        report = save_checkpoint(store, model, path, tag, version, layout, max_shard_size, progress)
    if quiet:
        return
    files = report.files[0] if len(report.files) == 1 else f"{len(report.files)} files in {path}"
    what = f"{report.tensors} tensors, {format_size(report.nbytes)}"
    click.echo(f"{model} version {report.version}: {what} to {files} in {report.seconds:.2f} s")
    if report.weights_only:
        click.echo(
            f"weights only: {path} has no model_index.json, configs or tokenizers; copy those of the "
            "original pipeline to make it complete",
            err=True,
        )
    if report.untied:
        click.echo(f"written twice, because tied across components: {', '.join(report.untied)}", err=True)


@contextmanager
def _bar(description: str, quiet: bool) -> Iterator[Progress | None]:
    """A progress bar on stderr that is gone when done; None where nobody would watch it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich import progress as rich
    from rich.console import Console

    with rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.DownloadColumn(binary_units=True),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bars:
        task = bars.add_task(description, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
