"""`python -m bench report`: from the JSON files of bench/results to docs/benchmarks.md and the README's part.

Nothing in those pages is typed: every number comes from a file, through `bench.rl_step.summary`. Running it
again changes nothing unless a file changed, and `--check` says whether the pages are what the files say.
"""

from __future__ import annotations

from pathlib import Path

import click

from bench.record import RESULTS, ROOT
from bench.report import charts, pages
from bench.report.results import Group, read

BEGIN = "<!-- rl-step -->"
END = "<!-- /rl-step -->"


@click.command("report")
@click.option(
    "--results",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=RESULTS,
    help="Where the JSON files are.  [default: bench/results]",
)
@click.option(
    "--docs",
    type=click.Path(file_okay=False, path_type=Path),
    default=ROOT / "docs",
    help="Where benchmarks.md goes, and pictures/ beside it.  [default: docs]",
)
@click.option(
    "--readme",
    type=click.Path(dir_okay=False, path_type=Path),
    default=ROOT / "README.md",
    help="Filled between its markers.  [default: README.md]",
)
@click.option("--check", is_flag=True, help="Write nothing; fail if the pages are not what the files say.")
def report_command(results: Path, docs: Path, readme: Path, check: bool) -> None:
    """Make docs/benchmarks.md, its charts and the README's part of it from the results."""
    groups = read(results)
    wanted = {docs / "benchmarks.md": pages.benchmarks(groups)}
    if readme.exists():
        wanted[readme] = filled(readme.read_text(), pages.readme(groups))
    if check:
        stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
        if stale:
            names = ", ".join(path.name for path in stale)
            raise click.ClickException(f"{names}: not what the results say; run python -m bench report")
        return
    pictures = docs / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for group in groups:
        _draw(group, pictures)
    for path, text in wanted.items():
        path.write_text(text)
        click.echo(f"written to {path}")


def _draw(group: Group, pictures: Path) -> None:
    if group.measured and group.on_gpu:
        charts.phases(group, pictures / pages.phases_picture(group))
        charts.memory(group, pictures / pages.memory_picture(group))
    if group.sharing:
        charts.sharing(group, pictures / pages.sharing_picture(group))


def filled(text: str, part: str) -> str:
    """The text with `part` between its markers; unchanged if it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return text
    return f"{before}{BEGIN}\n{part}{END}{after}"
