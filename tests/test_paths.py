from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from weightstore.errors import UsageError
from weightstore.paths import MAX_SOCKET_PATH, arena_name, default_socket, private_directory, socket_path


def test_argument_before_environment_before_default(tmp_path: Path) -> None:
    environment = {"WEIGHTSTORE_SOCKET": "/a/s", "XDG_RUNTIME_DIR": "/run/user/7"}
    assert socket_path(tmp_path / "s", environment) == str(tmp_path / "s")
    assert socket_path(None, environment) == "/a/s"
    assert socket_path(None, {"XDG_RUNTIME_DIR": "/run/user/7"}) == "/run/user/7/weightstore/store.sock"
    assert socket_path(None, {}) == f"/tmp/weightstore-{os.getuid()}/store.sock" == default_socket({})


def test_a_relative_path_means_the_same_after_chdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert socket_path("x/s") == str(tmp_path / "x/s")


@pytest.mark.parametrize("path", ["", "/" + "x" * MAX_SOCKET_PATH])
def test_paths_no_socket_can_have_are_refused(path: str) -> None:
    with pytest.raises(UsageError):
        socket_path(path)


def test_the_longest_path_the_kernel_takes_is_allowed() -> None:
    path = "/" + "x" * (MAX_SOCKET_PATH - 1)
    assert socket_path(path) == path
    with pytest.raises(
        UsageError, match=f"of {MAX_SOCKET_PATH + 1} bytes: the kernel allows {MAX_SOCKET_PATH}"
    ):
        socket_path(path + "x")


def test_the_arena_follows_from_the_real_path(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    name = arena_name(str(tmp_path / "real/s"))
    assert re.fullmatch(rf"weightstore-{os.getuid()}-[0-9a-f]{{12}}", name)
    assert arena_name(str(tmp_path / "link/s")) == name
    assert arena_name(str(tmp_path / "real/t")) != name


def test_a_new_directory_is_private(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    assert private_directory(str(path)) == str(path)
    assert path.stat().st_mode & 0o777 == 0o700
    private_directory(str(path))  # and is recognised the next time


def test_a_directory_others_can_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o770)
    with pytest.raises(UsageError, match=r"writable by others \(mode 0770\)"):
        private_directory(str(tmp_path))
    tmp_path.chmod(0o755)
    private_directory(str(tmp_path))


def test_a_link_or_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="not a directory"):
        private_directory(str(tmp_path / "link"))


@pytest.mark.skipif(os.getuid() != 0, reason="giving a directory away needs root")
def test_somebody_elses_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(tmp_path, 4242, -1)
    with pytest.raises(UsageError, match="belongs to uid 4242"):
        private_directory(str(tmp_path))
