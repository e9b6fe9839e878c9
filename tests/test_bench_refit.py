"""`python -m bench refit` in its quick setting: every row is there, and every way puts the same bytes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from bench.refit import QUICK, REFERENCES, RefitSettings, pss
from bench.shapes import total_bytes

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_every_row_is_there_and_its_numbers_are_numbers(tmp_path: Path) -> None:
    out = tmp_path / "refit.json"
    command = [sys.executable, "-m", "bench", "refit", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["complete"] and found["settings"]["ranks"] == list(QUICK.ranks)
    rows = {row["key"]: row for row in found["rows"]}
    assert list(rows) == ["refit/2", "memory/2", "rise/2"]
    for row in rows.values():
        assert set(row["samples"]) == {"measured", *REFERENCES}
        assert all(math.isfinite(s) for samples in row["samples"].values() for s in samples)
    assert rows["refit/2"]["nbytes"] == total_bytes(QUICK.specs())
    assert min(s for samples in rows["refit/2"]["samples"].values() for s in samples) > 0
    assert rows["memory/2"]["measured"] > 100  # two processes with torch


def test_pss_counts_what_is_mapped_and_written() -> None:
    import os

    before = pss(os.getpid())
    block = bytearray(64 << 20)
    assert pss(os.getpid()) - before > 60 << 20
    del block


def test_the_full_run_is_a_cut_of_a_real_model() -> None:
    settings = RefitSettings()
    assert 0.9 * settings.limit < total_bytes(settings.specs()) <= settings.limit
