"""The demo's parts, and one run of the whole with few steps."""

from __future__ import annotations

import io
import mmap
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from engine_hooks.demo import digits
from engine_hooks.demo.memory import MemorySampler, private_bytes, segment_bytes
from engine_hooks.demo.pictures import Grid, paint_grids, paint_memory
from engine_hooks.demo.role import Role
from engine_hooks.demo.timeline import Span, Timeline
from weightstore.errors import CircumstanceError, EngineAsleep

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def role(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    with Role("echo", "tests.echo_role", {"seed": 3}) as role:
        yield role


def test_role_answers_after_its_progress(role: Role) -> None:
    progress: list[dict] = []
    answer = role.ask("echo", progress.append, text="abc")
    assert answer == {"text": "abc", "config": {"seed": 3}}
    assert progress == [{"done": 1}, {"done": 2}, {"done": 3}]


def test_role_raises_what_the_child_raised_and_goes_on(role: Role) -> None:
    with pytest.raises(EngineAsleep, match="echo: asleep since 3 s") as caught:
        role.ask("refuse")
    assert caught.value.details == {"seconds": 3}
    assert role.ask("echo", text="")["text"] == ""


def test_role_that_dies_is_told_with_its_exit_code(role: Role) -> None:
    with pytest.raises(CircumstanceError, match="echo process ended with code 7"):
        role.ask("crash")


def test_role_is_ended_with_its_driver(role: Role) -> None:
    role.ask("echo", text="")
    role.close()
    assert private_bytes(role.pid) == 0


def test_judge_reads_real_digits_and_not_noise() -> None:
    judge = digits.Judge()
    images, labels = digits.load()
    assert images.shape == (1797, 8, 8)
    assert (images.min(), images.max()) == (-1, 1)
    assert judge.skill > 0.95
    assert judge.share_read(images[:100], labels[:100]) > 0.95
    noise = np.random.default_rng(0).uniform(-1, 1, (200, 8, 8)).astype(np.float32)
    assert judge.share_read(noise, np.repeat(np.arange(10), 20)) < 0.4


def test_private_bytes_sees_memory_come_and_go() -> None:
    before = private_bytes(os.getpid())
    with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(b"x" * len(memory))
        during = private_bytes(os.getpid())
        memory.madvise(mmap.MADV_DONTNEED)
        after = private_bytes(os.getpid())
    # The bytes object written from came and went too, so the allocator may keep a little.
    assert during - before >= 64 << 20
    assert during - after >= 60 << 20


def test_sampler_has_one_value_of_each_source_per_time() -> None:
    sampler = MemorySampler(time.monotonic(), interval=0.001)
    counts = {"first": 0, "later": 0}
    enough = {label: threading.Event() for label in counts}

    def count(label: str) -> int:
        counts[label] += 1
        if counts[label] == 3:
            enough[label].set()
        return counts[label]

    sampler.watch("first", lambda: count("first"))
    sampler.start()
    assert enough["first"].wait(30)
    sampler.watch("later", lambda: count("later"))
    assert enough["later"].wait(30)
    sampler.close()
    assert len(sampler.times) == counts["first"]
    assert sampler.series["first"] == list(range(1, counts["first"] + 1))
    missed = counts["first"] - counts["later"]
    assert missed >= 3
    assert sampler.series["later"] == [0] * missed + list(range(1, counts["later"] + 1))


def test_no_segment_has_no_bytes() -> None:
    assert segment_bytes("weightstore-no-such-arena") == 0


def test_timeline_prints_digits_without_colour() -> None:
    out = io.StringIO()
    timeline = Timeline(Console(file=out, width=60, color_system=None))
    image = np.full((8, 8), -1, dtype=np.float32)
    image[0] = 1
    image[3] = 1
    image[6:] = 1
    timeline.show_digits(np.stack([image] * 10))
    rows = [line[16:24] for line in out.getvalue().splitlines()]
    assert rows == ["▀" * 8, "▄" * 8, " " * 8, "█" * 8]


def test_timeline_remembers_spans() -> None:
    timeline = Timeline(Console(file=io.StringIO()))
    with pytest.raises(RuntimeError), timeline.span("engine", "draws", "v1", since=-1.0) as span:
        raise RuntimeError
    assert timeline.spans == [span]
    assert span.start == -1.0 and span.end >= 0


def test_pictures_are_painted(tmp_path: Path) -> None:
    images = np.zeros((20, 8, 8), dtype=np.float32)
    grids = [Grid(version=n, steps=n * 10, images=images, share_read=0.5) for n in (1, 2, 3)]
    paint_grids(tmp_path / "grids.png", grids)
    spans = [Span("engine", "asleep", 0.5, 1.5, "1 MiB\nfreed"), Span("trainer", "trains", 0.5, 1.4)]
    series = {"engine, private": [0, 5 << 20, 4 << 20], "arena, shared by both": [0, 0, 1 << 20]}
    paint_memory(tmp_path / "memory.png", [0.0, 1.0, 2.0], series, spans, "host memory")
    from matplotlib.image import imread

    assert imread(tmp_path / "grids.png").shape[1] > 800
    assert imread(tmp_path / "memory.png").std() > 0


def test_wrong_rounds_are_refused() -> None:
    command = [sys.executable, "-m", "engine_hooks.demo", "--rounds", "3,x"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "'3,x' is not a list of numbers" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_the_whole_demo_in_small(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engine_hooks.demo", "--device", "cpu"]
    command += ["--out", str(tmp_path / "pictures"), "--rounds", "2,3", "--per-digit", "1"]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=170, env=os.environ | {"COLUMNS": "200"}
    )
    assert ended.returncode == 0, ended.stderr
    for line in (
        r"published version 1, untrained: \d+ tensors",
        r"a request that comes now is refused with EngineAsleep",
        r"refitted to version 3",
        r"awake on version 3",
        r"all \d+ tensors equal the trainer's, bit for bit",
        r"keeps 1 of 3 versions of \d+",
    ):
        assert re.search(line, ended.stdout), f"{line!r} is missing in:\n{ended.stdout}"
    freed = [float(size) for size in re.findall(r"ms: ([\d.]+) MiB freed", ended.stdout)]
    assert len(freed) == 2
    assert min(freed) > 5
    assert sorted(os.listdir(tmp_path / "pictures")) == ["digits.png", "memory.png"]
    arena = re.search(r"process \d+ serves arena ([\w-]+)", ended.stdout)
    assert arena is not None
    assert segment_bytes(arena[1]) == 0
