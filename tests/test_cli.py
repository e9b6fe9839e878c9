"""The command line as people use it: real processes, exit codes, what they print and where."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from processes import eventually
from safetensors.numpy import load_file, save_file

import weightstore as ws
from weightstore import paths
from weightstore.cli import COMMANDS, main

MIB = 1 << 20
COMMAND = [sys.executable, "-m", "weightstore"]

Result = subprocess.CompletedProcess[str]


def weightstore(*arguments: object, **options: Any) -> Result:
    """Run the command line to its end. Whatever happens, no traceback may be shown."""
    command = [*COMMAND, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    assert "Traceback" not in result.stdout + result.stderr, result.stderr
    return result


def works(*arguments: object, **options: Any) -> str:
    result = weightstore(*arguments, **options)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def fails(*arguments: object, code: int = 1, **options: Any) -> str:
    """The one line on stderr of a command that must fail with `code`."""
    result = weightstore(*arguments, **options)
    assert result.returncode == code, (result.stdout, result.stderr)
    if code == 1:
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


class Served:
    """A store process started through the command line."""

    def __init__(self, socket: Path, *options: object, **popen: Any) -> None:
        self.socket = socket
        command = [*COMMAND, "serve", "--socket", str(socket), *map(str, options)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
        )
        assert self.process.stdout is not None
        self.banner = self.process.stdout.readline()
        match = re.search(r"arena ([^ ,]+),", self.banner)
        self.arena = match[1] if match else ""

    @property
    def shm(self) -> Path:
        return Path("/dev/shm", self.arena)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """(exit code, stderr) after a signal."""
        self.process.send_signal(number)
        self.last_words, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    started: list[Served] = []

    def start(*options: object, socket: Path = tmp_path / "run" / "store.sock", **popen: Any) -> Served:
        defaults = [] if "--capacity" in options else ["--capacity", "64MiB", "--window", "4MiB"]
        started.append(Served(socket, *defaults, *options, **popen))
        return started[-1]

    yield start
    for served in started:
        if served.process.poll() is None:
            served.end(signal.SIGKILL)
        if served.arena:
            served.shm.unlink(missing_ok=True)


# -- help and usage -------------------------------------------------------------------------------


def test_help_names_every_command_and_imports_none() -> None:
    code = (
        "import sys; from weightstore.cli import main\n"
        "try: main(['--help'], prog_name='weightstore')\n"
        "except SystemExit: pass\n"
        "loaded = [name for name in sys.modules if name.startswith('weightstore.cli.')]\n"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in COMMANDS:
        assert f"\n  {command}" in result.stdout


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "demo"])
def test_every_command_has_help_and_takes_a_socket(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert "--socket PATH" in result.output
    assert len(result.output.splitlines()) > 5


def test_the_demo_shows_its_own_help() -> None:
    assert "--rounds" in works("demo", "--help")


def test_version() -> None:
    assert re.fullmatch(r"weightstore \d+\.\d+\.\d+\S*\n", works("--version"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["dance"],
        ["serve", "--capacity", "12 parsecs"],
        ["serve", "--capacity", "96"],
        ["serve", "--arena", "a/b"],
        ["serve", "--grace", "-1"],
        ["serve", "--allow-uid", "root"],
        ["load", "model"],
        ["rm"],
        ["rm", "no spaces allowed"],
        ["status", "--yaml"],
        ["tag", "m", "--delete"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert "Usage:" in fails(*arguments, code=2)


# -- serve ----------------------------------------------------------------------------------------


def test_serve_announces_itself_and_leaves_nothing_behind(serve: Serve) -> None:
    served = serve()
    assert served.banner == (
        f"serving on {served.socket} (arena {paths.arena_name(str(served.socket))}, 64 MiB), "
        f"pid {served.process.pid}\n"
    )
    assert served.socket.stat().st_mode & 0o777 == 0o600
    assert served.socket.parent.stat().st_mode & 0o777 == 0o700
    assert served.shm.stat().st_mode & 0o777 == 0o600
    code, errors = served.end()
    assert (code, errors) == (0, "")
    assert not served.shm.exists() and not served.socket.exists()


def test_serve_ends_on_ctrl_c(serve: Serve) -> None:
    served = serve()
    assert served.end(signal.SIGINT) == (0, "")
    assert not served.shm.exists()


def test_a_kept_arena_is_adopted_under_the_same_name(serve: Serve) -> None:
    first = serve("--arena", "weightstore-test-cli", "--keep")
    assert first.arena == "weightstore-test-cli"
    assert first.end()[0] == 0 and first.shm.exists()
    assert first.last_words == (
        "ended; arena weightstore-test-cli with 0 models is left: "
        f"the next `weightstore serve --socket {first.socket}` adopts it\n"
    )
    second = serve("--arena", "weightstore-test-cli")
    assert "adopted with 0 models" in second.banner
    assert second.end()[0] == 0 and not second.shm.exists()


def test_a_capacity_that_cannot_be_had_is_told_at_once(serve: Serve) -> None:
    served = serve("--capacity", "60TiB", "--window", "4MiB")
    assert "60 TiB" in served.banner
    code, errors = served.end()
    assert code == 0
    assert errors.count("\n") == 1 and "the capacity is 60 TiB, but " in errors and "doctor" in errors


def test_a_store_whose_output_nobody_reads_serves_all_the_same(tmp_path: Path) -> None:
    socket = tmp_path / "store.sock"
    command = [*COMMAND, "serve", "--socket", str(socket), "--capacity", "64MiB", "--window", "4MiB"]
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    eventually(lambda: socket.exists() or process.poll() is not None, "it serves")
    with ws.connect(socket) as store:
        assert store.models() == []
    process.terminate()
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 0
    assert not Path("/dev/shm", paths.arena_name(str(socket))).exists()


def test_until_eof_ends_the_store_with_its_parent(serve: Serve) -> None:
    read, write = os.pipe()
    served = serve("--until-eof", read, pass_fds=[read])
    os.close(read)
    assert served.process.poll() is None
    os.close(write)
    assert served.process.wait(30) == 0
    assert not served.shm.exists()


def test_two_stores_do_not_share_a_socket_or_an_arena(serve: Serve, tmp_path: Path) -> None:
    served = serve()
    message = fails("serve", "--socket", served.socket, "--capacity", "64MiB")
    assert "already serves" in message
    other = "weightstore-test-other"
    message = fails("serve", "--socket", served.socket, "--capacity", "64MiB", "--arena", other)
    assert "already serves" in message
    assert not Path("/dev/shm", other).exists()
    message = fails("serve", "--socket", tmp_path / "b.sock", "--capacity", "64MiB", "--arena", served.arena)
    assert f"in use by pid {served.process.pid}" in message
    assert served.process.poll() is None and served.shm.exists()


def test_serve_says_what_is_wrong_with_the_socket(tmp_path: Path) -> None:
    assert "kernel allows" in fails("serve", "--socket", tmp_path / ("x" * 200))
    (tmp_path / "file").write_text("not a socket")
    message = fails("serve", "--socket", tmp_path / "file", "--capacity", "64MiB")
    assert "not a socket" in message
    assert (tmp_path / "file").read_text() == "not a socket"
    assert not Path("/dev/shm", paths.arena_name(str(tmp_path / "file"))).exists()


def test_serve_needs_no_numerics() -> None:
    code = (
        "import sys, weightstore.cli.serve, weightstore.service, weightstore.__main__;"
        "sys.exit(' '.join({'torch', 'numpy', 'rich'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# -- doctor ---------------------------------------------------------------------------------------


def test_doctor_lists_findings_and_fails_only_for_failures(serve: Serve) -> None:
    served = serve()
    output = works("doctor", "--no-gpu", "--socket", served.socket)
    assert "shared memory" in output and "huge pages" in output
    assert f"held by the store with pid {served.process.pid}" in output
    assert f"pid {served.process.pid} answers on {served.socket}" in output
    assert re.search(r"\d+ ok, \d+ warnings, 0 failures", output)
    result = weightstore("doctor", "--no-gpu", "--capacity", "1000TiB", "--json", "--socket", served.socket)
    assert result.returncode == 1
    failed = {finding["name"] for finding in json.loads(result.stdout) if finding["status"] == "fail"}
    assert failed == {"shared memory", "host memory"}


def test_doctor_without_a_store(tmp_path: Path) -> None:
    result = weightstore("doctor", "--no-gpu", "--socket", tmp_path / "none.sock")
    assert result.returncode == 1, "a store was named, so it should be there"
    assert "FAIL  store" in result.stdout and "weightstore serve" in result.stdout
    environment = {**os.environ, "WEIGHTSTORE_SOCKET": str(tmp_path / "none.sock")}
    assert "OK    store" in works("doctor", "--no-gpu", env=environment)


# -- models ---------------------------------------------------------------------------------------


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """Two components, 72 bytes of weights."""
    path = tmp_path / "tiny.safetensors"
    weights = {
        "transformer.proj.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "transformer.proj.bias": np.zeros(4, np.float16),
        "vae.scale": np.ones((2, 2), np.float32),
    }
    save_file(weights, path)
    return path


def test_load_tag_status_verify_save_and_remove(serve: Serve, tmp_path: Path, model_file: Path) -> None:
    """A day in the life of an operator, through a store that --socket or the environment names."""
    served = serve()
    here = ["--socket", served.socket]
    output = works("load", "tiny", model_file, *here)
    assert re.fullmatch(
        r"tiny version 1 \(latest\): 3 tensors, 72 B from 1 file in [\d.]+ s \(read at [\d.]+ GB/s\)\n",
        output,
    )
    environment = {**os.environ, "WEIGHTSTORE_SOCKET": str(served.socket)}
    assert works("load", "-q", "tiny", model_file, "--tag", "policy", env=environment) == ""

    assert works("tag", "tiny", "ref", "1", *here) == "tiny: ref is version 1\n"
    assert works("tag", "tiny", "old", "policy", *here) == "tiny: old is version 2\n"
    listing = "tiny  latest  1\ntiny  old     2\ntiny  policy  2\ntiny  ref     1\n"
    assert works("tag", *here) == works("tag", "tiny", *here) == listing
    assert works("tag", "--delete", "tiny", "old", *here) == "tiny: removed tag old\n"

    page = works("status", *here)
    assert f"pid {served.process.pid}" in page and str(served.socket) in page and served.arena in page
    assert re.search(r"^tiny +transformer 56 B +vae 16 B", page, re.MULTILINE)
    assert re.search(r"^ +2 +policy +3 +72 B", page, re.MULTILINE)
    assert re.search(r"^ +1 +latest, ref +3 +72 B", page, re.MULTILINE)
    assert re.search(r"of 64 MiB used \(\d+%\)", page)

    status = json.loads(works("status", "--json", *here))
    assert status["pid"] == served.process.pid
    assert status["arena"]["capacity"] == 64 * MIB
    assert [model["name"] for model in status["models"]] == ["tiny"]
    assert status["models"][0]["tags"] == {"latest": 1, "policy": 2, "ref": 1}
    assert status["leases"] == status["refits"] == []
    assert "id" not in status and "type" not in status

    report = works("verify", *here)
    assert re.fullmatch(r"(tiny version [12]: 3 tensors, 72 B, intact.*, digest \w+\n){2}", report)
    assert works("verify", "tiny", "--tag", "policy", *here).startswith("tiny version 2")
    assert works("verify", "tiny", "--version", "1", *here).startswith("tiny version 1")

    saved = tmp_path / "saved.safetensors"
    assert str(saved) in works("save", "tiny", saved, "--tag", "policy", *here)
    assert {name: array.tobytes() for name, array in load_file(saved).items()} == {
        name: array.tobytes() for name, array in load_file(model_file).items()
    }
    assert works("rm", "tiny", *here) == "removed tiny\n"
    assert "no models yet" in works("status", *here)
    assert served.end() == (0, "")


def test_status_shows_leases_and_refits(serve: Serve, model_file: Path) -> None:
    served = serve()
    here = ["--socket", served.socket]
    works("load", "tiny", model_file, "--tag", "policy", *here)
    with ws.connect(served.socket) as store:
        lease = store.lease("tiny", "policy", follow=True)
        lease.park()
        refit = store.refit("tiny", tag="policy", components=["transformer"])
        page = works("status", *here)
        status = json.loads(works("status", "--json", *here))
        refit.abort()
        lease.release()
    assert re.search(r"^1 lease *$", page, re.MULTILINE)
    assert re.search(rf"pid {os.getpid()}.* tiny +policy +1 +parked", page)
    assert re.search(r"^1 refit open *$", page, re.MULTILINE)
    assert re.search(r"^tiny +policy +1 +\S+ \S+ +0 of 1 done", page, re.MULTILINE)
    assert status["leases"][0]["parked"] and status["refits"][0]["base"] == 1


def test_an_adopted_store_says_so(serve: Serve, model_file: Path) -> None:
    first = serve("--grace", "600")
    works("load", "tiny", model_file, "--socket", first.socket)
    first.end(signal.SIGKILL)
    second = serve("--grace", "600")
    assert "adopted with 1 model)" in second.banner
    assert "grace period after a restart: nothing is freed for" in works("status", "--socket", second.socket)
    assert works("verify", "--socket", second.socket).startswith("tiny version 1: 3 tensors")
    works("rm", "tiny", "--socket", second.socket)
    second.end(signal.SIGKILL)
    third = serve()
    assert "adopted with 0 models)" in third.banner
    assert third.end() == (0, "")
    assert "0 models is removed (--keep would leave it)" in third.last_words


def test_verify_exits_with_1_and_names_what_is_corrupt(serve: Serve, model_file: Path) -> None:
    served = serve()
    here = ["--socket", served.socket]
    works("load", "tiny", model_file, *here)
    works("verify", *here)
    with ws.connect(served.socket) as store, store.lease("tiny") as snapshot:
        record = snapshot.records["vae.scale"]
    with served.shm.open("r+b") as arena:
        arena.seek(record.offset)
        arena.write(b"\xff")
    result = weightstore("verify", *here)
    assert result.returncode == 1
    assert "1 CORRUPT" in result.stderr and "vae.scale" in result.stderr and "proj" not in result.stderr


def test_errors_are_one_line_and_exit_with_1(serve: Serve, tmp_path: Path, model_file: Path) -> None:
    nowhere = ["--socket", tmp_path / "none.sock"]
    for command in (
        ["status"],
        ["tag"],
        ["rm", "m"],
        ["verify"],
        ["load", "m", model_file],
        ["save", "m", "x"],
    ):
        message = fails(*command, *nowhere)
        assert "none.sock" in message and "weightstore serve" in message
    here = ["--socket", serve().socket]
    assert "'absent'" in fails("rm", "absent", *here)
    assert "'absent'" in fails("verify", "absent", *here)
    assert "'absent'" in fails("tag", "absent", *here)
    assert "'absent'" in fails("save", "absent", tmp_path / "x.safetensors", *here)
    works("load", "tiny", model_file, *here)
    assert "99" in fails("tag", "tiny", "ref", "99", *here)
    assert "nightly" in fails("tag", "--delete", "tiny", "nightly", *here)
    assert "nightly" in fails("verify", "tiny", "--tag", "nightly", *here)
    missing = tmp_path / "missing.safetensors"
    assert str(missing) in fails("load", "tiny", missing, *here)
    model_file.write_bytes(model_file.read_bytes()[:-8])
    assert str(model_file) in fails("load", "tiny", model_file, *here)
    assert works("tag", *here) == "tiny  latest  1\n", "nothing changed"


def test_a_model_that_does_not_fit_says_how_much_is_missing(serve: Serve, tmp_path: Path) -> None:
    served = serve("--capacity", "1MiB", "--window", "1MiB")
    big = tmp_path / "big.safetensors"
    save_file({"transformer.weight": np.zeros(2 * MIB, np.uint8)}, big)
    assert "2 MiB" in fails("load", "big", big, "--socket", served.socket)
    assert "no models yet" in works("status", "--socket", served.socket)


def test_a_reader_that_leaves_early_is_no_error(serve: Serve, model_file: Path) -> None:
    served = serve()
    works("load", "tiny", model_file, "--socket", served.socket)
    read, write = os.pipe()
    os.close(read)
    command = [*COMMAND, "status", "--json", "--socket", str(served.socket)]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert "Traceback" not in result.stderr and "Error" not in result.stderr
