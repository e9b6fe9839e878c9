"""`python -m bench host` in its quick setting: every row is there and its numbers are numbers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench.__main__ import main
from bench.host import SECTIONS
from bench.record import Record, cells
from bench.rows import Goal, Row, alternate, fastest, percentile
from bench.settings import QUICK, Settings
from bench.shapes import cut, modules_of, shrink, total_bytes
from weightstore.types import TensorSpec, contiguous_stride, nbytes_of

ROOT = Path(__file__).resolve().parent.parent

ROWS = {
    "put": {"put", "refit", "first put"},
    "wake": {"wake", "wake/warm", "sleep"},
    "load": {"load", "first load"},
    "trip": {"trip p50", "trip p99", "status p50", "status p99"},
    "lease": {"lease + plan", "unpark + plan"},
    "commit": {"commit", "begin", "begin + reserve"},
    "start": {"start", "start/torch"},
    "follow": {"follow"},
}
RATIOS = {"put", "refit", "first put", "wake", "wake/warm", "load", "first load"}
GOALS = {"put", "wake", "load", "lease + plan", "unpark + plan", "commit", "start", "start/torch"}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("bench") / "host.json"
    command = [sys.executable, "-m", "bench", "host", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    for row in found["rows"]:
        assert row["what"].split(":")[0].split(",")[0][:30] in " ".join(done.stdout.split())
    return found


def test_every_section_gives_its_rows(result: dict[str, Any]) -> None:
    assert set(ROWS) == set(SECTIONS)
    assert {row["key"] for row in result["rows"]} == set().union(*ROWS.values())
    assert result["complete"] is True
    assert result["settings"]["quick"] is True and result["settings"]["sections"] == list(SECTIONS)


def test_ratios_and_times_are_finite_and_come_from_samples(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        assert math.isfinite(row["measured"]) and row["measured"] >= 0, row["key"]
        assert all(math.isfinite(s) and s > 0 for samples in row["samples"].values() for s in samples)
        assert (row["ratio"] is not None) == (row["key"] in RATIOS), row["key"]
        if row["ratio"] is not None:
            assert len(row["ratios"]) == QUICK.rounds and all(
                math.isfinite(ratio) and ratio > 0 for ratio in [row["ratio"], *row["ratios"]]
            )
            assert row["reference"] in row["references"] and row["nbytes"] > 0
            assert set(row["samples"]) == {"measured", *row["references"]}
        assert (row["goal"] is not None) == (row["met"] is not None) == (row["key"] in GOALS), row["key"]


def test_the_machine_and_the_code_are_named(result: dict[str, Any]) -> None:
    machine = result["machine"]
    assert machine["cpu"] and machine["cores"] >= 1 and machine["kernel"] and machine["date"]
    assert len(result["load"]["before"]) == len(result["load"]["after"]) == 3
    assert {"revision", "changed_files", "huge_pages", "torch"} <= machine.keys()


def test_a_service_that_has_answered_has_loaded_no_tensor_library(result: dict[str, Any]) -> None:
    (row,) = [row for row in result["rows"] if row["key"] == "start/torch"]
    assert row["measured"] == 0 and row["met"] is True, row["notes"]


def test_sections_can_be_chosen_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "trip.json"
    done = CliRunner().invoke(main, ["host", "--quick", "--only", "trip", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert {row["key"] for row in json.loads(out.read_text())["rows"]} == ROWS["trip"]
    wrong = CliRunner().invoke(main, ["host", "--only", "trip,nonsense"])
    assert wrong.exit_code == 2 and "nonsense" in wrong.output and "put" in wrong.output


def test_help_lists_the_commands_without_importing_them() -> None:
    script = (
        "import sys; from bench.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'rich', 'bench.host', 'bench.gpu') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "host" in done.stdout and done.stdout.rstrip().endswith("[]")


def test_results_are_whole_after_every_row(tmp_path: Path) -> None:
    record = Record(tmp_path / "new" / "r.json", {"rounds": 1})
    for number, key in enumerate(("a", "b"), 1):
        record.add(Row(key, f"row {key}", {"measured": [0.5, 0.25, 1.0]}))
        found = json.loads((tmp_path / "new" / "r.json").read_text())
        assert len(found["rows"]) == number and not found["complete"]
        assert found["rows"][-1]["samples"] == {"measured": [0.5, 0.25, 1.0]}
    record.write(complete=True)
    assert json.loads((tmp_path / "new" / "r.json").read_text())["complete"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["r.json"]


def test_a_ratio_is_the_median_over_rounds() -> None:
    row = Row(
        "put",
        "x",
        {"plain": [1.0, 4.0, 1.0], "measured": [2.0, 2.0, 1.0]},
        reference="plain",
        goal=Goal(0.9, at_least=True),
    )
    assert row.ratios == [0.5, 2.0, 1.0] and row.ratio == 1.0 and row.met is True
    assert cells(row)[3] == "1.00"
    late = Row("start", "x", {"measured": [0.4, 0.6, 0.7]}, goal=Goal(0.5, at_least=False))
    assert late.ratio is None and late.measured == 0.6 and late.met is False
    assert Row("n", "x", {}, value=0.0, unit="things").met is None


def test_ways_take_turns_and_the_order_changes() -> None:
    calls: list[str] = []
    pauses: list[int] = []

    def way(name: str, seconds: float) -> float:
        calls.append(name)
        return seconds + len(calls)

    ways = {"a": lambda: way("a", 0), "b": lambda: way("b", 100)}
    samples = alternate(ways, rounds=2, warm=1, before=lambda: pauses.append(len(calls)))
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert pauses == [2, 3, 4, 5]  # ahead of each sample that counts
    assert samples == {"a": [3, 6], "b": [104, 105]}
    assert fastest(samples, ["a", "b"]) == "a"


def test_percentiles_are_samples() -> None:
    samples = [float(n) for n in range(100, 0, -1)]
    assert [percentile(samples, p) for p in (1, 50, 99, 100)] == [1, 50, 99, 100]
    assert percentile([7.0], 99) == 7.0


def test_real_shapes_are_cut_and_shrunk() -> None:
    specs = QUICK.specs()
    assert specs and 0 < total_bytes(specs) <= QUICK.limit and all(s.alias_of is None for s in specs)
    assert len(Settings().specs()) > 50
    tie = TensorSpec("t.tie", "float16", (64, 64), (64, 1), alias_of="t.w")
    large = TensorSpec("t.w", "float16", (64, 64), (64, 1))
    small = TensorSpec("t.b", "float32", (3,), (1,))
    assert [s.name for s in cut([small, tie, small], nbytes_of("float16", (64, 64)) + 12)] == ["t.b", "t.tie"]
    assert [s.name for s in cut([large, small, tie], 100)] == ["t.b"]
    shrunk = shrink([large, small, tie], limit=100)
    assert [(s.name, s.alias_of) for s in shrunk] == [("t.w", None), ("t.b", None), ("t.tie", "t.w")]
    assert shrunk[0].shape == shrunk[2].shape == (8, 8) and shrunk[1].shape == (3,)
    assert all(s.stride == contiguous_stride(s.shape) for s in shrunk)
    module = modules_of([large, small], device="meta")["t"]
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {"w": (64, 64), "b": (3,)}


def test_followers_without_a_store_say_so_and_fail(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.followers", str(tmp_path / "none.sock"), "m", "2"]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr.count(b"weightstore.errors.StoreGone") == 2
