"""Private stores: nothing is left of them, however they end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import weightstore
from weightstore.errors import StoreGone
from weightstore.local import local_store
from weightstore.paths import arena_name

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 30.0


def left_of(socket: str) -> list[str]:
    """What a store on `socket` has left behind."""
    paths = [Path(socket).parent, Path("/dev/shm") / arena_name(socket)]
    return [str(path) for path in paths if path.exists()]


def wait_gone(pid: int) -> None:
    """Until process `pid`, which need not be our child, has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], PATIENCE)[0], f"process {pid} goes on"
    finally:
        os.close(fd)


def test_a_store_for_a_block(tmp_path: Path) -> None:
    with weightstore.local_store(capacity="64MiB", window="8MiB") as store:
        assert len(left_of(store.socket)) == 2
        assert os.stat(Path(store.socket).parent).st_mode & 0o777 == 0o700
        with store.refit("m") as refit:
            refit.put("t.w", torch.arange(5))
        with weightstore.connect(store.socket) as other, other.lease("m") as snapshot:
            assert snapshot["t.w"].tolist() == [0, 1, 2, 3, 4]
        pid = store.status().pid
        assert store.status().arena.capacity == 64 << 20
        tensor = store.lease("m").snapshot["t.w"]
    assert left_of(store.socket) == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert tensor.tolist() == [0, 1, 2, 3, 4]  # its pages live as long as it


def test_sizes_may_be_numbers() -> None:
    with local_store(capacity=32 << 20, window=4 << 20) as store:
        assert (store.status().arena.capacity, store.status().arena.window) == (32 << 20, 4 << 20)


def test_an_exception_in_the_block_leaves_nothing() -> None:
    with pytest.raises(ZeroDivisionError), local_store(capacity="32MiB", window="4MiB") as store:
        _ = 1 / 0
    assert left_of(store.socket) == []


def test_a_killed_service_leaves_nothing() -> None:
    with local_store(capacity="32MiB", window="4MiB") as store:
        pid = store.status().pid
        os.kill(pid, signal.SIGKILL)
        wait_gone(pid)
        with pytest.raises(StoreGone):
            store.status()
    assert left_of(store.socket) == []


def test_a_service_that_cannot_start_is_quoted() -> None:
    before = set(os.listdir("/dev/shm"))
    with pytest.raises(StoreGone, match=r"(?s)ended with exit code \d+\. It said:.*much.*is not a size"):
        with local_store(capacity="much"):
            pytest.fail("there is no such store")
    assert set(os.listdir("/dev/shm")) <= before


def test_the_service_ends_with_the_process_that_started_it() -> None:
    script = """
import os, signal
from weightstore.local import local_store
with local_store(capacity="32MiB", window="4MiB") as store:
    print(store.status().pid, store.socket, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    pid, socket = ran.stdout.split()
    wait_gone(int(pid))
    # The service itself removed its arena and its socket; the directory was the dead process's to remove.
    assert left_of(socket) == [str(Path(socket).parent)]
    assert not os.path.exists(socket)
    for path in Path(socket).parent.iterdir():
        path.unlink()
    Path(socket).parent.rmdir()


def test_a_long_temporary_directory_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    monkeypatch.setattr("tempfile.tempdir", None)
    with local_store(capacity="32MiB", window="4MiB") as store:
        assert store.models() == []
    assert list(deep.iterdir()) == [] and left_of(store.socket) == []


def test_two_stores_are_two() -> None:
    with (
        local_store(capacity="32MiB", window="4MiB") as one,
        local_store(capacity="32MiB", window="4MiB") as other,
    ):
        assert one.socket != other.socket and one.mapping.uuid != other.mapping.uuid
