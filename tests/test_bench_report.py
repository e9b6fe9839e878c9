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
        way = other["ways"][key] = made.way(f"way {key}", spent, 3)
        way["setup"]["own_image"] *= 1.3
        for cycle in way["cycles"]:
            cycle["own_images"] = [seconds * 1.3 for seconds in cycle["own_images"]]
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


def test_images_that_vary_leave_the_overhead_alone(place: Place) -> None:
    """The image's part is the median image beyond the median of those drawn again, not cycle by cycle."""
    images = {1: 0.9, 2: 0.2, 3: 0.6, 4: 0.61, 5: 0.95}
    wakes = {1: 1.0, 2: 0.8, 3: 0.64, 4: 0.63, 5: 0.62}
    run = made.run()
    for cycle in run["ways"]["1"]["cycles"]:
        cycle["phases"] |= {"image": images[cycle["number"]], "wake": wakes[cycle["number"]]}
    way = run["ways"]["1"]
    assert summary.usual_image(way) == pytest.approx(made.OWN)
    split = summary.phases(way)
    assert split["image"] == pytest.approx(0.605 - made.OWN) and split["wake"] == pytest.approx(0.635)
    assert summary.overhead(way) == pytest.approx(sum(split.values()))
    spent = sum(seconds for name, seconds in way["cycles"][1]["phases"].items() if name != "image")
    assert summary.cycle_overhead(way, way["cycles"][1]) == pytest.approx(spent), "never less than its phases"
    place.put("rl-step-a.json", run)
    page = place.page()
    steady = summary.seconds(summary.overhead(way))
    row = row_of(page, "1")
    assert row[3] == steady and row[4:10] == [summary.seconds(seconds) for seconds in split.values()]
    assert f"weightstore takes {steady}, " in page and steady in place.readme.read_text()
    for cycle in way["cycles"]:
        cycle["phases"]["image"] = 0.3
    place.put("rl-step-a.json", run)
    page = place.page()
    assert row_of(page, "1")[9] == "0"
    assert "- Cycles, with the first: 5 of 1, 1s; 2 of 2, 3, 4, 6. An image that was drawn again took" in page
    assert "took 150 ms to 950 ms." in page


def test_older_files_have_one_image_drawn_again_in_a_cycle(place: Place) -> None:
    run = made.run()
    own = {1: 0.9, 2: 0.5, 3: 0.58, 4: 0.57, 5: 0.2}  # with the one before them, 0.55: the median is 0.56
    for way in run["ways"].values():
        for cycle in way["cycles"]:
            del cycle["own_images"]
            cycle |= {"own_image": own[cycle["number"]], "overhead": 123.0}
    assert summary.usual_image(run["ways"]["1"]) == pytest.approx(0.56)
    place.put("rl-step-a.json", run)
    assert row_of(place.page(), "1")[3] == summary.seconds(sum(made.TAKES["1"]) - 0.56)


def test_frozen_parts_that_wake_during_the_refit_are_ours_too(place: Place) -> None:
    run = made.run()
    place.put("rl-step-a.json", run)
    page = place.page()
    ours, staged = (sum(made.TAKES[key]) - made.OWN for key in ("1", "1s"))
    bound = 0.43 + 0.62
    also = (
        f"In a run where weightstore took {summary.seconds(ours)} so, it took {summary.seconds(staged)} with "
        f"the frozen parts waking during the refit, {staged / bound:.2f} × that run's link "
        f"({summary.seconds(bound)})."
    )
    assert also in page and also in place.readme.read_text()
    assert page.index("| 1 | ") < page.index("| 1s | ") < page.index("| 2 | ")
    assert row_of(page, "1s")[10] == f"{staged / ours:.1f}"
    (group,) = read(place.results)
    checks = {check.key: check for check in group.checks}
    assert checks["link.1s"].value == pytest.approx(staged / bound) and checks["link.1s"].met
    del run["ways"]["1s"]
    place.put("rl-step-a.json", run)
    assert "frozen parts" not in place.page()
    (group,) = read(place.results)
    assert "link.1s" not in {check.key for check in group.checks}


def test_one_cycle_is_not_judged_as_a_steady_one(place: Place) -> None:
    run = made.run()
    for key in ("1", "1s"):
        run["ways"][key]["cycles"] = run["ways"][key]["cycles"][:1]
    place.put("rl-step-a.json", run)
    assert "frozen parts wake during the refit, " not in place.page()
    (group,) = read(place.results)
    assert not [check for check in group.checks if check.key.startswith("link")]


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
    through = sum(made.SGLANG["plugin"])
    assert checks["faster.5p"].value == pytest.approx((stock - made.OWN) / (through - made.OWN))
    first = (stock * 1.3 - made.OWN) / (through * 1.3 - made.OWN)
    assert checks["faster.5p.first"].value == pytest.approx(first)
    place.put("sglang-a.json", made.sglang("Another GPU"))
    assert_not_run(place.page())


def assert_not_run(page: str) -> None:
    for key in ("5", "5p"):
        assert set(row_of(page, key)[2:]) == {"–"}
    reason = "no run of `python -m bench sglang --only stock,plugin,step` on this device is in bench/results"
    assert page.count(f"**No numbers: not run**: {reason}.") == 2


def test_sglang_is_missed_only_where_it_could_run(place: Place) -> None:
    """That is with its one pipeline, on a GPU."""
    cpu, other = made.run(), made.run()
    cpu["settings"]["device"], cpu["limit"]["device"] = "cpu", {"device": "cpu"}
    other["model"]["name"] = "sd3.5-medium"
    for found in (cpu, other):
        place.put("rl-step-a.json", found)
        assert "SGLang" not in place.page()


def test_sglang_with_another_transformer_has_no_factor(place: Place) -> None:
    place.put("rl-step-a.json", made.run())
    place.put("sglang-a.json", made.sglang(trained_bytes=2_400_000_000))
    page = place.page()
    assert row_of(page, "5")[3] != "–" and row_of(page, "5")[10] == "" == row_of(page, "5p")[10]
    assert "its transformer has 2.4 GB (theirs 23.8 GB), so there is no factor" in page
    (group,) = read(place.results)
    found = [check.key for check in group.checks if check.key.startswith("faster.5")]
    assert found == ["faster.5p", "faster.5p.first"]  # against itself, with the same transformer


def test_sglang_without_the_step_or_cut_short(place: Place) -> None:
    """A part of the weights, or a run that ended early, must not pass for the whole."""
    place.put("rl-step-a.json", made.run())
    found = made.sglang()
    step = found["sections"].pop("step")
    place.put("sglang-a.json", found)
    assert_not_run(place.page())
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


def test_a_newer_run_that_was_cut_after_one_cycle_does_not_hide_steady_ones(place: Place) -> None:
    place.put("rl-step-a.json", made.run())
    later = made.run()
    later["machine"] |= {"date": "2031-01-01T00:00:00+00:00", "changed_files": 13}
    later["ways"] = {"1": made.way("way 1", (0.003,) * 6, 3), "2": made.way("way 2", (0.003,) * 6, 1)}
    later["ways"]["2"]["status"] = "cut"
    place.put("rl-step-b.json", later)
    page = place.page()
    assert row_of(page, "2")[3] == summary.seconds(sum(made.TAKES["2"]) - made.OWN)
    assert "- 1 (run 2): " in page and "- 2 (run 1): " in page
    assert page.count("and changes in 13 files since") == 1


def test_rows_by_the_number_of_engines_that_are_missing_have_a_reason(place: Place) -> None:
    run = made.run()
    rows = run["sharing"]
    run |= {"sharing": rows[:2], "sharing_left_out": "after 2 of 4 rows it ended; its log ends with\nwords"}
    place.put("rl-step-a.json", run)
    page = place.page()
    assert "number of engines, left out: after 2 of 4 rows it ended." in page and "words" not in page
    assert "| 2 | 128 MiB" in page and "| 4 | 128 MiB" not in page and "most of 1, 2 engines" in page
    place.put("rl-step-a.json", run | {"sharing": [], "sharing_left_out": "the time was over"})
    page = place.page()
    assert "number of engines, left out: the time was over." in page and "### Host memory" not in page
    old = made.run(sharing=[], complete=False)
    place.put("rl-step-a.json", old)
    assert "number of engines, left out: the run ended before that." in place.page()
    del old["sharing"]
    place.put("rl-step-a.json", old)
    assert "left out" not in place.page(), "nobody asked for them"


def test_a_group_must_hold_only_what_it_has(place: Place) -> None:
    """Rows by the number of engines are where they were measured, and nowhere else."""
    gpu, cpu = made.run(sharing=[]), made.run()
    cpu["model"] |= {"name": "tiny", "whole_bytes": 700_000}
    cpu["settings"]["device"], cpu["limit"]["device"] = "cpu", {"device": "cpu"}
    place.put("rl-step-a.json", gpu)
    place.put("rl-step-b.json", cpu)
    first, _, second = place.page().partition("## tiny on a CPU")
    assert "## flux1-dev on Some GPU" in first and "### What must hold" in first
    for words in ("host copies", "### Host memory by the number of engines", "engines.png"):
        assert words not in first and words in second


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
