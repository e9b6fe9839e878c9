"""`python -m bench report`: the pages say what the files say, and nothing that they do not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import bench_results as made
import pytest
from click.testing import CliRunner

from bench.__main__ import main
from bench.report.results import read
from bench.rl_step import summary

ROOT = Path(__file__).resolve().parent.parent
README = "# A project\n\n<!-- rl-step -->\nold 123 s\n<!-- /rl-step -->\n\nThe rest.\n"


class Place:
    """Results, docs and a README in a directory of their own."""

    def __init__(self, root: Path) -> None:
        self.results, self.docs, self.readme = root / "results", root / "docs", root / "README.md"
        self.results.mkdir()
        self.readme.write_text(README)

    def put(self, name: str, found: dict[str, Any]) -> None:
        (self.results / name).write_text(json.dumps(found))

    def report(self, *more: str) -> Any:
        options = ["--results", str(self.results), "--docs", str(self.docs), "--readme", str(self.readme)]
        return CliRunner().invoke(main, ["report", *options, *more])

    def page(self) -> str:
        done = self.report()
        assert done.exit_code == 0, done.output
        return (self.docs / "benchmarks.md").read_text()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def row_of(page: str, key: str) -> list[str]:
    line = next(line for line in page.splitlines() if line.startswith(f"| {key} | "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_way_has_its_medians_or_its_reason(place: Place) -> None:
    run = made.run()
    place.put("rl-step-a.json", run)
    page = place.page()
    for key, takes in made.TAKES.items():
        row = row_of(page, key)
        overhead = sum(takes) - made.OWN
        assert row[2] == summary.seconds(sum(takes) * 1.3 - made.OWN), key
        assert row[3] == summary.seconds(overhead)
        shown = [*takes[:-1], takes[-1] - made.OWN]
        assert row[4:10] == [summary.seconds(seconds) for seconds in shown]
        assert row[11] == "equal"
        if key != "1":
            assert row[10] == f"{overhead / (sum(made.TAKES['1']) - made.OWN):.1f}"
    assert set(row_of(page, "7")[2:]) == {"–"}
    assert "**No numbers: cannot run**: not installed here: zmq." in page and "more of a log" not in page


def test_numbers_follow_the_file(place: Place) -> None:
    """Every number on the page comes from the file: with other ones there is none of the old left."""
    place.put("rl-step-a.json", made.run())
    before = place.page()
    takes = {key: tuple(seconds * 1.7 for seconds in spent) for key, spent in made.TAKES.items()}
    other = made.run()
    for key, spent in takes.items():
        other["ways"][key] = made.way(f"way {key}", spent, 3)
    other["limit"]["h2d"]["seconds"] = [1.3]
    other["limit"]["d2h"]["seconds"] = [0.9]
    place.put("rl-step-a.json", other)
    after = place.page()
    measured = re.compile(r"\d+(?:\.\d+)? (?:ms|s|GB/s)\b")
    assert len(set(measured.findall(before))) > 20
    shared = set(measured.findall(before)) & set(measured.findall(after))
    assert len(shared) <= 3, shared  # coincidences of two digits


def test_the_prose_has_no_measured_number() -> None:
    """What is typed in the page's source has no seconds, rates or factors in it."""
    for path in sorted((ROOT / "bench" / "report").glob("*.py")):
        found = re.findall(r"\b\d+(?:\.\d+)? ?(?:ms|s|GB/s|GB|GiB|×|%)(?=[\s.,;)])", path.read_text())
        assert not found, f"{path.name}: {found}"


def test_goals_are_judged(place: Place) -> None:
    place.put("rl-step-a.json", made.run())
    (group,) = read(place.results)
    checks = {check.key: check for check in group.checks}
    bound = 0.43 + 0.62
    assert checks["link"].value == pytest.approx((sum(made.TAKES["1"]) - made.OWN) / bound)
    assert not checks["link"].met and checks["faster.3"].met and checks["faster.6"].met
    assert checks["sharing.frozen"].met and checks["sharing.trained"].value == pytest.approx(2.0)
    page = place.page()
    assert page.count("**missed**") == 1


def test_sglang_is_merged_for_the_same_device_only(place: Place) -> None:
    place.put("rl-step-a.json", made.run())
    place.put("sglang-a.json", made.sglang("Some GPU"))
    page = place.page()
    ours = sum(made.TAKES["1"]) - made.OWN
    ours_first = sum(made.TAKES["1"]) * 1.3 - made.OWN
    for key, name in (("5", "stock"), ("5p", "plugin")):
        total = sum(made.SGLANG[name])
        row = row_of(page, key)
        assert row[2:4] == [summary.seconds(total * 1.3 - made.OWN), summary.seconds(total - made.OWN)]
        assert row[10] == f"{(total - made.OWN) / ours:.1f}" and row[11] == "equal"
    assert "the whole transformer (23.8 GB in 780 tensors) in 12 flattened buckets" in page
    assert "the pipeline has 24.3 GB (theirs 33.8 GB" in page
    assert "again: `python -m bench sglang --model-dir FLUX.1-dev" in page
    (group,) = read(place.results)
    checks = {check.key: check for check in group.checks}
    stock = sum(made.SGLANG["stock"])
    assert checks["faster.5"].value == pytest.approx((stock - made.OWN) / ours)
    assert checks["faster.5.first"].value == pytest.approx((stock * 1.3 - made.OWN) / ours_first)
    assert checks["faster.5"].met and not checks["faster.5.first"].met
    place.put("sglang-a.json", made.sglang("Another GPU"))
    assert "SGLang Diffusion, stock" not in place.page()


def test_sglang_with_another_transformer_has_no_factor(place: Place) -> None:
    place.put("rl-step-a.json", made.run())
    place.put("sglang-a.json", made.sglang(trained_bytes=2_400_000_000))
    page = place.page()
    assert row_of(page, "5")[3] != "–" and row_of(page, "5")[10] == "" == row_of(page, "5p")[10]
    assert "its transformer has 2.4 GB (theirs 23.8 GB), so there is no factor" in page
    (group,) = read(place.results)
    assert not [check for check in group.checks if check.key.startswith("faster.5")]


def test_sglang_without_the_step_or_cut_short(place: Place) -> None:
    """A part of the weights, or a run that ended early, must not pass for the whole."""
    place.put("rl-step-a.json", made.run())
    found = made.sglang()
    step = found["sections"].pop("step")
    place.put("sglang-a.json", found)
    assert "SGLang" not in place.page()
    step["stock"] |= {"status": "running", "cycles": step["stock"]["cycles"][:1]}
    step["plugin"] |= {"status": "failed", "reason": "resume: out of memory", "cycles": []}
    found["sections"]["step"] = step
    place.put("sglang-a.json", found)
    page = place.page()
    assert row_of(page, "5")[3] == "–" and "Cut short: its run ended after 1 cycles" in page
    assert "**No numbers: failed**: resume: out of memory" in page
    (group,) = read(place.results)
    assert [check.key for check in group.checks if check.key.startswith("faster.5")] == ["faster.5.first"]


def test_two_runs_are_one_table(place: Place) -> None:
    """Ways of a second run join the first's; a newer failure does not hide numbers."""
    first, second = made.run(), made.run()
    ways = second.pop("ways")
    for key in ("3", "4"):
        del first["ways"][key]
    ways["6"] = {"title": "way 6", "what": "", "status": "failed", "reason": "out of memory", "cycles": []}
    second |= {"ways": ways, "machine": first["machine"] | {"date": "2031-01-01T00:00:00+00:00"}}
    place.put("rl-step-a.json", first)
    place.put("rl-step-b.json", second)
    page = place.page()
    assert row_of(page, "3")[3] != "–" and row_of(page, "6")[3] != "–"
    assert "Run 1, 2030-01-02" in page and "Run 2, 2031-01-01" in page


def test_a_run_that_was_cut_off_is_reported(place: Place) -> None:
    run = made.run(complete=False, sharing=[])
    run["ways"] = {"1": run["ways"]["1"] | {"status": "cut", "reason": "1 of 5 cycles: no time"}}
    run["ways"]["1"]["cycles"] = run["ways"]["1"]["cycles"][:1]
    run["ways"]["2"] = made.way("way 2", made.TAKES["2"]) | {"status": "running", "cycles": []}
    place.put("rl-step-a.json", run)
    page = place.page()
    assert "It was cut off after 500 s" in page and "Cut short: 1 of 5 cycles" in page
    assert row_of(page, "1")[3] == "–", "one cycle says nothing of steady ones"


def test_pictures_that_differ_are_named(place: Place) -> None:
    run = made.run()
    run["ways"]["4"]["cycles"][1] |= {"same": False, "differs": "from way 1: 3.00% of the values"}
    place.put("rl-step-a.json", run)
    page = place.page()
    assert row_of(page, "4")[11] == "differ" and "Pictures differ from way 1: 3.00% of the values" in page


def test_charts_are_drawn_and_the_readme_is_filled(place: Place) -> None:
    place.put("rl-step-a.json", made.run())
    page = place.page()
    pictures = re.findall(r"\((pictures/[^)]+\.png)\)", page)
    assert len(pictures) == 3
    for name in pictures:
        assert (place.docs / name).read_bytes().startswith(b"\x89PNG"), name
    text = place.readme.read_text()
    assert text.startswith("# A project\n") and text.endswith("\nThe rest.\n") and "old 123 s" not in text
    assert "docs/pictures/rl-step-flux1-dev.png" in text
    assert summary.seconds(sum(made.TAKES["1"]) - made.OWN) in text


def test_check_finds_pages_that_are_stale(place: Place) -> None:
    place.put("rl-step-a.json", made.run())
    assert place.report("--check").exit_code == 1
    place.page()
    assert place.report("--check").exit_code == 0
    text = (place.docs / "benchmarks.md").read_text()
    (place.docs / "benchmarks.md").write_text(text.replace("equal", "equalled", 1))
    done = place.report("--check")
    assert done.exit_code == 1 and "benchmarks.md" in done.output


def test_without_results_the_pages_say_so(place: Place) -> None:
    assert "No results yet" in place.page()
    assert "No results yet" in place.readme.read_text()


def test_the_repository_has_what_its_results_say() -> None:
    done = CliRunner().invoke(main, ["report", "--check"])
    assert done.exit_code == 0, done.output
