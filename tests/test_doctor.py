from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from weightstore import doctor
from weightstore.admission import Admission
from weightstore.arena import Arena
from weightstore.cuda import doctor as cuda_doctor
from weightstore.doctor import Finding, Host, arenas, kernel, memory
from weightstore.errors import DeviceError
from weightstore.layout import MIB, Header, pack_header

GIB = 1 << 30


def fake(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def mountinfo(host_shm: Path, options: str) -> str:
    return (
        f"22 1 0:21 / /proc rw - proc proc rw\n30 1 0:30 / {host_shm} rw shared:9 - tmpfs tmpfs {options}\n"
    )


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


# -- memory ---------------------------------------------------------------------------------------


def test_this_hosts_shared_memory() -> None:
    stats = os.statvfs("/dev/shm")
    finding = only(memory.check_shared_memory(Host()))
    assert finding.name == "shared memory" and "/dev/shm has" in finding.seen
    too_much = only(memory.check_shared_memory(Host(), stats.f_blocks * stats.f_frsize + 1))
    assert too_much.status == "fail" and "less than the capacity" in too_much.seen
    assert "mount -o remount,size=" in too_much.advice and "--shm-size" in too_much.advice


def test_missing_shared_memory_fails(tmp_path: Path) -> None:
    finding = only(memory.check_shared_memory(Host(shm=tmp_path / "shm")))
    assert finding.status == "fail" and "mount -t tmpfs" in finding.advice


@pytest.mark.parametrize(
    ("blocks", "free", "status"),
    [(64 * MIB, 64 * MIB, "fail"), (64 * GIB, 2 * GIB, "warn"), (64 * GIB, 60 * GIB, "ok"), (0, 0, "ok")],
)
def test_size_of_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, free: int, status: str
) -> None:
    stats = os.statvfs_result((4096, 4096, blocks // 4096, free // 4096, free // 4096, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: stats)
    finding = only(memory.check_shared_memory(Host(shm=tmp_path, proc=tmp_path)))
    assert finding.status == status
    assert bool(finding.advice) == (status != "ok")


def test_a_cgroup_below_what_shared_memory_offers_is_a_warning(tmp_path: Path) -> None:
    stats = os.statvfs("/dev/shm")
    proc = fake(
        tmp_path / "proc",
        {"self/cgroup": "0::/pod\n", "meminfo": f"MemTotal: {64 << 20} kB\nMemAvailable: {32 << 20} kB\n"},
    )
    cgroup = fake(
        tmp_path / "cg", {"pod/memory.max": f"{100 * MIB}\n", "pod/memory.current": f"{40 * MIB}\n"}
    )
    assert stats.f_blocks * stats.f_frsize > 100 * MIB
    host = Host(proc=proc, cgroup=cgroup)
    limit, ram = memory.check_memory_limits(host)
    assert (limit.name, limit.status) == ("cgroup limit", "warn")
    assert "60 MiB of 100 MiB available" in limit.seen and "looks like" in limit.seen
    assert "--memory" in limit.advice
    assert (ram.name, ram.status, ram.advice) == ("host memory", "ok", "")
    limit, ram = memory.check_memory_limits(host, capacity=48 * GIB)
    assert (limit.status, ram.status) == ("fail", "fail")
    assert "32 GiB of 64 GiB available, less than the capacity of 48 GiB" in ram.seen


def test_no_cgroup_limit_is_said(tmp_path: Path) -> None:
    finding = only(memory.check_memory_limits(Host(proc=tmp_path)))
    assert finding == Finding("cgroup limit", "ok", "no memory limit on this process or above it")


@pytest.mark.parametrize(
    ("options", "knob", "status", "advice"),
    [
        (
            "rw,size=1k",
            "always within_size advise [never] deny force",
            "warn",
            "mount -o remount,huge=advise",
        ),
        ("rw,huge=never", "always within_size advise [never] deny force", "warn", "4.3 times"),
        ("rw,huge=advise", "always within_size advise [never] deny force", "ok", ""),
        ("rw,size=1k,huge=always,inode64", "always within_size [advise] never deny force", "ok", ""),
        ("rw", "always within_size advise never deny [force]", "ok", ""),
        ("rw,huge=always", "always within_size advise never [deny] force", "warn", "echo never > "),
        ("rw", "always within_size advise never [deny] force", "warn", ", and mount -o remount,huge=advise"),
    ],
)
def test_huge_pages(tmp_path: Path, options: str, knob: str, status: str, advice: str) -> None:
    shm = tmp_path / "shm"
    proc = fake(tmp_path / "proc", {"self/mountinfo": mountinfo(shm, options)})
    sysfs = fake(tmp_path / "sys", {"kernel/mm/transparent_hugepage/shmem_enabled": knob})
    finding = only(memory.check_huge_pages(Host(shm=shm, proc=proc, sys=sysfs)))
    assert finding.status == status
    assert advice in finding.advice and bool(advice) == bool(finding.advice)


def test_the_last_mount_at_a_point_counts(tmp_path: Path) -> None:
    shm = tmp_path / "shm"
    text = mountinfo(shm, "rw,huge=always") + mountinfo(shm, "rw")
    proc = fake(tmp_path / "proc", {"self/mountinfo": text})
    sysfs = fake(tmp_path / "sys", {"kernel/mm/transparent_hugepage/shmem_enabled": "[never]"})
    assert only(memory.check_huge_pages(Host(shm=shm, proc=proc, sys=sysfs))).status == "warn"


def test_a_kernel_without_huge_pages(tmp_path: Path) -> None:
    finding = only(memory.check_huge_pages(Host(proc=tmp_path, sys=tmp_path)))
    assert finding.status == "warn" and "absent" in finding.seen


def test_locked_memory() -> None:
    assert only(memory.check_locked_memory(resource.RLIM_INFINITY)).advice == ""
    finding = only(memory.check_locked_memory(8 << 20))
    assert "8 MiB" in finding.seen and "memlock=-1" in finding.advice
    assert only(memory.check_locked_memory()).name == "locked memory"


# -- kernel ---------------------------------------------------------------------------------------


def test_kernel_features_are_tried_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("populate", "process handles", "peer handles")
    assert tuple(finding.name for finding in kernel.check_kernel(Host())) == names
    for probe in ("populates", "opens_pidfds", "knows_peers"):
        monkeypatch.setattr(kernel, probe, lambda: False)
    missing = kernel.check_kernel(Host())
    assert [finding.status for finding in missing] == ["warn", "fail", "ok"]
    assert all("does not work" in finding.seen and finding.advice for finding in missing)


def test_probes_see_what_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel.opens_pidfds()
    monkeypatch.setattr(kernel, "MADV_POPULATE_WRITE", 9999)
    assert not kernel.populates()
    monkeypatch.setattr(kernel, "SO_PEERPIDFD", 9999)
    assert not kernel.knows_peers()


# -- arenas ---------------------------------------------------------------------------------------


@pytest.fixture
def name() -> Iterator[str]:
    name = f"weightstore-test-{uuid4().hex[:12]}"
    yield name
    Path("/dev/shm", name).unlink(missing_ok=True)


def about(findings: list[Finding], name: str) -> Finding:
    return only([finding for finding in findings if name in finding.seen])


def test_an_arena_held_by_a_store_and_one_left_behind(name: str) -> None:
    with Arena.open(name, 16 * MIB, 4 * MIB, Admission()) as arena:
        arena.commit_data(4 * MIB)
        held = about(arenas.check_arenas(Host()), name)
        assert held.status == "ok" and f"held by the store with pid {os.getpid()}" in held.seen
        assert "16 MiB capacity, 4 MiB committed" in held.seen
    left = about(arenas.check_arenas(Host()), name)
    assert left.status == "warn" and "no living store holds it" in left.seen
    assert f"weightstore serve --arena {name}" in left.advice and f"rm /dev/shm/{name}" in left.advice
    with Arena.open(name, MIB, MIB, Admission()) as again:  # looking took no lock with it
        assert again.adopted


def test_a_holder_that_proc_locks_does_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arenas, "lock_holder", lambda fd: None)
    with Arena.open(name, MIB, MIB, Admission()):
        assert "another pid namespace" in about(arenas.check_arenas(Host()), name).seen
    assert about(arenas.check_arenas(Host()), name).status == "warn"


def test_arenas_are_known_by_name_or_by_content(tmp_path: Path) -> None:
    host = Host(shm=tmp_path)
    assert only(arenas.check_arenas(host)).seen == f"none in {tmp_path}"
    assert only(arenas.check_arenas(Host(shm=tmp_path / "absent"))).status == "ok"
    (tmp_path / "other-program").write_bytes(b"x" * 5000)
    (tmp_path / "directory").mkdir()
    (tmp_path / "weightstore-link").symlink_to("other-program")
    (tmp_path / "my-own-name").write_bytes(pack_header(Header(uuid4(), MIB, MIB, 0.0)))
    (tmp_path / "weightstore-odd").write_bytes(b"not an arena, whatever its name says" * 3)
    odd_name, by_content = sorted(
        arenas.check_arenas(host), key=lambda finding: "my-own-name" in finding.seen
    )
    assert "1 MiB capacity, 0 B committed" in by_content.seen
    assert odd_name.status == "warn" and "not a weightstore arena" in odd_name.seen
    assert (tmp_path / "weightstore-odd").exists()


def test_looking_is_read_only(name: str) -> None:
    path = Path("/dev/shm", name)
    path.write_bytes(b"")
    before = path.stat()
    arenas.check_arenas(Host())
    after = path.stat()
    assert (before.st_mtime_ns, before.st_size, before.st_blocks) == (after.st_mtime_ns, 0, after.st_blocks)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# -- cuda -----------------------------------------------------------------------------------------


def test_no_gpu_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_doctor, "driver_version", lambda: None)
    finding = only(cuda_doctor.check_cuda(Host(dev=tmp_path)))
    assert finding.status == "ok" and "host backend" in finding.seen
    (tmp_path / "nvidia0").touch()
    finding = only(cuda_doctor.check_cuda(Host(dev=tmp_path)))
    assert finding.status == "fail" and "libcuda" in finding.seen


@pytest.mark.parametrize(
    ("built", "driver", "status"),
    [
        (None, 13000, "warn"),
        ("", 13000, "warn"),
        ("13.0", 12080, "fail"),
        ("12.8", 13000, "ok"),
        ("13.0", 13000, "ok"),
    ],
)
def test_torch_against_the_driver(built: str | None, driver: int, status: str) -> None:
    assert cuda_doctor.judge_torch(built, driver).status == status


@pytest.mark.parametrize(
    ("version", "built", "driver", "status", "advice"),
    [
        (None, None, 13000, "fail", "weightstore[cuda]"),
        (None, "12.8", 13000, "fail", "cupy-cuda12x"),
        (None, "", 12080, "fail", "cupy-cuda12x"),
        ("13.0.1", "13.0", 12080, "fail", "for CUDA 13"),
        ("13.0.1", "12.8", 13000, "warn", "cuda-bindings>=12.8,<13"),
        ("13.0.1", "13.0", 13000, "ok", ""),
        ("12.9.0", "12.8", 13000, "ok", ""),
        ("13.0.1", None, 14000, "ok", ""),
    ],
)
def test_bindings_against_torch_and_driver(
    version: str | None, built: str | None, driver: int, status: str, advice: str
) -> None:
    finding = cuda_doctor.judge_bindings(version, built, driver)
    assert finding.status == status
    assert advice in finding.advice and bool(advice) == bool(finding.advice)


@pytest.mark.parametrize(
    ("line", "built"),
    [
        ("cuda: Optional[str] = '12.8'", "12.8"),
        ("cuda = '13.0'", "13.0"),
        ("cuda: Optional[str] = None", ""),
        ("hip: Optional[str] = '6.4'", ""),
    ],
)
def test_torchs_build_is_read_without_importing_it(tmp_path: Path, line: str, built: str) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.11.0'\n{line}\ngit_version = 'cuda = 1'\n")
    assert cuda_doctor.torch_cuda(tmp_path) == built
    assert cuda_doctor.torch_cuda(None) is None


def test_a_device_that_fails_while_it_is_asked_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, *arguments: object) -> int:
        raise DeviceError(f"{name} failed: CUDA_ERROR_UNKNOWN")

    monkeypatch.setattr(cuda_doctor, "driver_version", lambda: 13000)
    monkeypatch.setattr(cuda_doctor, "bindings_version", lambda: "13.0.1")
    monkeypatch.setattr(cuda_doctor.driver, "available", lambda: (True, ""))
    monkeypatch.setattr(cuda_doctor.driver, "call", fail)
    assert cuda_doctor.check_cuda(Host())[-1].status == "fail"


# -- all of it ------------------------------------------------------------------------------------


def test_examine_asks_everything_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from weightstore.doctor import examine; names = {f.name for f in examine()};"
        "print(*sorted(names), sep='|'); sys.exit(bool({'torch', 'numpy', 'rich'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {"shared memory", "host memory", "cgroup limit", "huge pages", "locked memory", "populate"} <= set(
        result.stdout.strip().split("|")
    )
    assert "cuda" in result.stdout


def test_the_capacity_reaches_the_checks() -> None:
    findings = {finding.name: finding for finding in doctor.examine(capacity=1 << 60, gpu=False)}
    assert findings["shared memory"].status == findings["host memory"].status == "fail"
    assert not any("cuda" in name for name in findings)
