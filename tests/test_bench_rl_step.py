"""`python -m bench rl-step` on the CPU with a tiny pipeline: real engines and trainers, in every way."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from test_bench_sglang import Pair, measured

from bench.__main__ import main
from bench.record import command_line
from bench.rl_step import buckets, models, summary
from bench.rl_step.command import share
from bench.rl_step.found import Found
from bench.rl_step.processes import Engine, Trainer, WayFailed
from bench.rl_step.ways import PHASES, WAYS, FrozenBeside

ROOT = Path(__file__).resolve().parent.parent
RUNNABLE = ("1", "1s", "2", "3", "4")
PATIENCE = 150.0


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench", "rl-step", "--model", "tiny", "--out", str(out), *options]
    env = {**os.environ, "TMPDIR": str(out.parent)}
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=env)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("rl") / "run.json"
    with start(
        out, "--ways", "1,1s,2,3,4,6,7", "--cycles", "2", "--slow-cycles", "1", "--engines", "1,2"
    ) as process:
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    result: dict[str, Any] = json.loads(out.read_text())
    assert result["complete"], said
    return result


def test_all_ways_that_can_run_end_with_numbers(found: dict[str, Any]) -> None:
    for key in RUNNABLE:
        way = found["ways"][key]
        assert way["status"] == "ok", way["reason"]
        assert [cycle["number"] for cycle in way["cycles"]] == ([1, 2] if key in ("1", "1s") else [1])
        for cycle in way["cycles"]:
            assert tuple(cycle["phases"]) == PHASES
            assert all(math.isfinite(seconds) and seconds > 0 for seconds in cycle["phases"].values())
            assert len(cycle["own_images"]) == 2 and "overhead" not in cycle, "that needs all cycles"
        assert summary.overhead(way) == pytest.approx(sum(summary.phases(way).values()))


def test_every_way_draws_the_same_picture_after_the_same_steps(found: dict[str, Any]) -> None:
    pictures = {
        key: [cycle["image"] for cycle in found["ways"][key]["cycles"]] for key in RUNNABLE
    }  # bit for bit: SHA-256 of float32 pixels
    assert len({drawn[0] for drawn in pictures.values()}) == 1, pictures
    assert len(set(pictures["1"])) == 2, "a step changes the picture"
    for key in RUNNABLE:
        assert all(cycle["same"] and cycle["spread"] > 0.05 for cycle in found["ways"][key]["cycles"])


def test_frozen_parts_wake_within_the_refit(found: dict[str, Any]) -> None:
    """In the real engine. (If anything else wakes then, or the update copies anything, the way fails.)"""
    way = found["ways"]["1s"]
    spent = way["notes"]["frozen_wake_seconds"]
    assert len(spent) == len(way["cycles"])
    for seconds, cycle in zip(spent, way["cycles"], strict=True):
        assert 0 < seconds <= cycle["phases"]["refit"]


class Both:
    """An engine and a trainer, made up; in the refit neither answers before the other has been asked."""

    def __init__(self, **answers: dict[str, Any]) -> None:
        self.asked: list[tuple[str, Any]] = []
        self._met = threading.Barrier(2, timeout=PATIENCE)
        self._answers = answers

    def post(self, path: str, message: Any = None) -> dict[str, Any]:
        self.asked.append((path, message))
        partial = message is not None
        if partial:
            self._met.wait()
        answer = {
            "success": True,
            "version": 3,
            "seconds": 0.1,
            "copied_bytes": 0,
            "components": ["transformer"],
        }
        if partial:
            answer |= {"version": 2, "components": ["vae", "text_encoder"]}
        return answer | self._answers.get("part" if partial else path.split("_")[0].strip("/"), {})

    def do(self, command: str) -> dict[str, Any]:
        self._met.wait()
        self.asked.append((command, None))
        return {"version": 3}


def staged(both: Any) -> FrozenBeside:
    bench: Any = types.SimpleNamespace(model="tiny")
    way = FrozenBeside(bench)
    way.engine = way.trainer = both
    way._frozen, way._trained = ["text_encoder", "vae"], "transformer"
    return way


def test_refit_and_the_wake_of_frozen_parts_are_at_the_same_time() -> None:
    both = Both()
    way = staged(both)
    way.refit()
    assert sorted(both.asked) == [
        ("/resume_memory_occupation", {"tags": ["text_encoder", "vae"]}),
        ("refit", None),
    ]
    both.asked.clear()
    way.wake()
    assert both.asked == [("/update_weights_from_store", None), ("/resume_memory_occupation", None)]


@pytest.mark.parametrize(
    ("wrong", "answer", "says"),
    [
        ("part", {"components": ["vae", "transformer"]}, "text_encoder, vae were to wake"),
        ("update", {"version": 2}, "was updated on .*wrote version 3"),
        ("update", {"copied_bytes": 7}, "copied 7 bytes"),
        ("resume", {"version": 2}, "woke on .*wrote version 3"),
        ("resume", {"components": []}, "transformer were to wake"),
    ],
)
def test_a_staged_wake_that_is_not_what_it_should_be_fails(
    wrong: str, answer: dict[str, Any], says: str
) -> None:
    way = staged(Both(**{wrong: answer}))
    with pytest.raises(WayFailed, match=says):
        way.refit()
        way.wake()


def test_phases_follow_each_other(found: dict[str, Any]) -> None:
    for key in RUNNABLE:
        for cycle in found["ways"][key]["cycles"]:
            order = [name for name, _, _ in cycle["spans"]]
            assert order == ["drain", "sleep", "memory", "step", *WAYS[key].after, "image"]
            times = [time for _, began, ended in cycle["spans"] for time in (began, ended)]
            assert times == sorted(times)


def test_a_way_that_cannot_run_says_why_and_has_no_number(found: dict[str, Any]) -> None:
    for key in ("6", "7"):
        way = found["ways"][key]
        assert way["status"] == "cannot run" and "GPU" in way["reason"] and way["cycles"] == []
        assert not summary.has_numbers(way)


def test_memory_is_counted(found: dict[str, Any]) -> None:
    ours = found["ways"]["1"]["cycles"][-1]["memory"]
    assert ours["awake"]["arena"] >= found["model"]["whole_bytes"] + found["model"]["trained_bytes"]
    assert ours["asleep"]["processes"] > 0 and ours["awake"]["device"] is None
    assert found["ways"]["4"]["cycles"][-1]["memory"]["awake"]["arena"] == 0, "the store is gone by then"
    for row in found["sharing"]:
        assert summary.copies_of_one(row) == pytest.approx(1.0, abs=0.001)
        assert summary.copies_of_trained(row) == pytest.approx(2.0, abs=0.001)


def test_nothing_is_judged_against_a_link_on_a_cpu(found: dict[str, Any]) -> None:
    assert {check.key for check in summary.checks(found)} == {"sharing.frozen", "sharing.trained"}


def test_a_run_killed_in_the_middle_leaves_a_file_that_can_be_read(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    with start(out, "--ways", "1", "--cycles", "500") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "cycle 2:" in line:
                break
        process.send_signal(signal.SIGKILL)
    found = json.loads(out.read_text())
    assert not found["complete"] and found["limit"]["h2d"]["seconds"]
    assert len(found["ways"]["1"]["cycles"]) >= 2 and found["ways"]["1"]["status"] == "running"
    assert summary.has_numbers(found["ways"]["1"] | {"status": "ok"})


def test_what_there_is_no_time_for_is_skipped_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    with start(out, "--ways", "4,6", "--budget", "0.01", "--engines", "1") as process:
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    found = json.loads(out.read_text())
    assert found["ways"]["4"]["status"] == "skipped" and "--budget" in found["ways"]["4"]["reason"]
    assert found["ways"]["4"]["cycles"] == []
    assert found["complete"] and found["sharing"] == [] and "--budget" in found["sharing_left_out"]


def test_rows_that_came_before_the_time_was_over_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    found = Found(out)

    def remaining() -> float:
        return 0.0 if found.all["sharing"] else PATIENCE

    share(found, [1, 2], tmp_path / "log", remaining)
    kept = json.loads(out.read_text())
    assert [row["engines"] for row in kept["sharing"]] == [1]
    assert kept["sharing_left_out"].startswith("after 1 of 2 rows the sharing did not answer in the time")


def test_rows_that_cannot_be_measured_have_what_it_said_as_the_reason(tmp_path: Path) -> None:
    found = Found(None)
    nobody: Any = ["nobody"]
    share(found, nobody, tmp_path / "log", lambda: PATIENCE)
    assert found.all["sharing"] == [] and "ended with 1" in found.all["sharing_left_out"]
    assert "nobody" in found.all["sharing_left_out"]


def test_the_command_has_no_path_of_the_machine(
    found: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert found["command"].startswith("python -m bench rl-step --model tiny --out run.json --ways 1,")
    inside = ROOT / "bench" / "results" / "x.json"
    words = ["--out", str(inside), "--scratch=/somewhere/deep/ckpt", "--ways", "1,2", "--also", "../up/y"]
    monkeypatch.setattr(sys, "argv", ["bench", "rl-step", *words, "there/z"])
    given = [inside, Path("/somewhere/deep/ckpt"), Path("../up/y"), Path("there/z")]
    shown = "--out bench/results/x.json --scratch=ckpt --ways 1,2 --also y there/z"
    assert command_line("rl-step", given) == f"python -m bench rl-step {shown}"


def test_sglang_draws_two_images_again_in_each_cycle(tmp_path: Path) -> None:
    """And says so if one of them is another."""
    found = measured(tmp_path, "stock", Pair(None), {})
    way = found.all["sections"]["step"]["stock"]
    assert [len(cycle["own_images"]) for cycle in way["cycles"]] == [2, 2, 2]
    assert summary.overhead(way) == pytest.approx(sum(summary.phases(way).values()))
    pair: Any = Pair(None)
    ask, drawn = pair.ask, []

    def flaky(command: str, **more: Any) -> dict[str, Any]:
        answer: dict[str, Any] = ask(command, **more)
        if command == "generate":
            drawn.append(answer)
            if len(drawn) == 6:  # the last of the second cycle
                answer["pixels"] = "other"
        return answer

    pair.ask = flaky
    cycles = measured(tmp_path, "stock", pair, {}).all["sections"]["step"]["stock"]["cycles"]
    assert [cycle["differs"] for cycle in cycles] == [None, "from one drawn right after it", None]


def test_unknown_ways_are_refused() -> None:
    done = CliRunner().invoke(main, ["rl-step", "--ways", "1,nonsense"])
    assert done.exit_code == 2 and "nonsense" in done.output and WAYS["3"].title in done.output


def test_a_child_that_fails_is_quoted(tmp_path: Path) -> None:
    with Engine("tiny", tmp_path / "log", lambda: PATIENCE) as engine:
        wrong = {"device": "cpu", "resident": "random", "model": "tiny", "seed": 7, "directory": "/nowhere"}
        engine.start(wrong)
        with pytest.raises(WayFailed, match=r"(?s)the engine ended with 1; its log ends with.*nowhere"):
            engine.ready()


def test_buckets_carry_all_weights_between_processes(tmp_path: Path) -> None:
    """As way 6 sends them, through shared memory instead of a GPU's: the engine then draws what ours draw."""
    model = models.MODELS["tiny"]
    configs = models.write_configs(model, tmp_path / "configs")
    config = {"model": "tiny", "device": "cpu", "seed": 7, "directory": str(configs), "tag": "policy"}
    with (
        Trainer("tiny", tmp_path / "trainer.log", lambda: PATIENCE) as trainer,
        Engine("tiny", tmp_path / "engine.log", lambda: PATIENCE) as engine,
    ):
        trainer.start(config)
        engine.start(config | {"resident": "buckets"})
        trainer.ready()
        engine.ready()
        before = engine.image()[0]["x-pixels-sha256"]
        trainer.do("take", nbytes=1 << 20)
        trainer.do("step", number=1)
        assert trainer.do("send", port=engine.port)["buckets"] > 2
        sent = engine.image()[0]["x-pixels-sha256"]
        trainer.do("save", directory=str(tmp_path / "saved"))
        modules = {name: models.build(model, name, configs, "cpu", 7) for name in model.components}
        kind = model.components[models.TRAINED].cls()
        modules[models.TRAINED] = kind.from_pretrained(str(tmp_path / "saved" / models.TRAINED))
        pipe = models.assemble(model, modules, configs)
        pipe.set_progress_bar_config(disable=True)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            expected = models.digest(models.draw(model, pipe, "cpu"))
        finally:
            torch.set_num_threads(threads)
        assert sent == expected != before


@given(
    st.lists(st.integers(min_value=1, max_value=3000), min_size=1, max_size=20),
    st.integers(min_value=1, max_value=8).map(lambda n: n * buckets.ALIGN),
)
def test_a_plan_of_buckets_covers_every_byte_once(sizes: list[int], bucket: int) -> None:
    filled = buckets.plan([(str(i), nbytes) for i, nbytes in enumerate(sizes)], bucket)
    covered: dict[str, int] = {}
    for places in filled:
        end = 0
        for place in places:
            assert place.offset % buckets.ALIGN == 0 and end <= place.offset
            end = place.offset + place.nbytes
            assert end <= bucket and place.nbytes > 0
            assert place.start == covered.get(place.name, 0)
            covered[place.name] = place.start + place.nbytes
    assert covered == {str(i): nbytes for i, nbytes in enumerate(sizes)}
