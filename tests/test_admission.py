from __future__ import annotations

import os
from pathlib import Path

import pytest

from weightstore.admission import Admission, Limit
from weightstore.errors import ArenaFull

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def meminfo(available: int, total: int = 64 * GIB) -> str:
    return (
        f"MemTotal: {total >> 10} kB\nMemFree: 1 kB\nMemAvailable: {available >> 10} kB\nHugePages_Free: 0\n"
    )


def limits(admission: Admission, prefix: str) -> dict[str, Limit]:
    return {limit.source: limit for limit in admission.available() if limit.source.startswith(prefix)}


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    return tmp_path / "nothing-here"


def test_host_memory_less_the_reserve(tmp_path: Path, nowhere: Path) -> None:
    proc = write(tmp_path, {"meminfo": meminfo(10 * GIB)})
    admission = Admission(reserve=4 * GIB, shm_path=nowhere, proc_root=proc)
    assert admission.available() == [Limit("MemAvailable", 10 * GIB, 64 * GIB, 4 * GIB)]
    admission.check(6 * GIB)
    with pytest.raises(
        ArenaFull, match=r"MemAvailable has 10 GiB of 64 GiB left, 4 GiB of that reserved"
    ) as caught:
        admission.check(6 * GIB + 1)
    assert caught.value.details["requested"] == 6 * GIB + 1
    assert caught.value.details["usable"] == 6 * GIB
    assert caught.value.details["limits"][0]["source"] == "MemAvailable"


def test_reserve_above_what_is_there_leaves_nothing(tmp_path: Path, nowhere: Path) -> None:
    proc = write(tmp_path, {"meminfo": meminfo(GIB)})
    admission = Admission(reserve=2 * GIB, shm_path=nowhere, proc_root=proc)
    assert admission.available()[0].usable == 0
    admission.check(0)
    with pytest.raises(ArenaFull):
        admission.check(1)


def test_v2_every_ancestor_counts_and_inactive_file_is_given_back(tmp_path: Path, nowhere: Path) -> None:
    proc = write(tmp_path / "proc", {"meminfo": meminfo(60 * GIB), "self/cgroup": "0::/pod/job/store\n"})
    root = write(
        tmp_path / "cgroup",
        {
            "memory.stat": "inactive_file 0\n",
            "pod/memory.max": f"{8 * GIB}\n",
            "pod/memory.current": f"{6 * GIB}\n",
            "pod/memory.stat": f"anon 5\ninactive_file {3 * GIB}\nactive_file {GIB}\n",
            "pod/job/memory.max": "max\n",
            "pod/job/memory.current": f"{6 * GIB}\n",
            "pod/job/store/memory.max": f"{20 * GIB}\n",
            "pod/job/store/memory.current": f"{GIB}\n",
        },
    )
    admission = Admission(shm_path=nowhere, proc_root=proc, cgroup_root=root)
    assert limits(admission, "cgroup") == {
        f"cgroup {root}/pod/memory.max": Limit(f"cgroup {root}/pod/memory.max", 5 * GIB, 8 * GIB),
        f"cgroup {root}/pod/job/store/memory.max": Limit(
            f"cgroup {root}/pod/job/store/memory.max", 19 * GIB, 20 * GIB
        ),
    }
    admission.check(5 * GIB)
    with pytest.raises(
        ArenaFull, match=r"pod/memory\.max has 5 GiB of 8 GiB left.*Raise the memory limit"
    ) as caught:
        admission.check(5 * GIB + 4096)
    assert "MemAvailable: 60 GiB" in str(caught.value)


def test_usage_above_the_limit_is_not_negative(tmp_path: Path, nowhere: Path) -> None:
    proc = write(tmp_path / "proc", {"self/cgroup": "0::/a\n"})
    root = write(tmp_path / "cg", {"a/memory.max": "1000\n", "a/memory.current": "2000\n"})
    (limit,) = Admission(shm_path=nowhere, proc_root=proc, cgroup_root=root).available()
    assert limit.available == 0


def test_v1_hierarchy_and_its_unlimited_value(tmp_path: Path, nowhere: Path) -> None:
    cgroup = "12:cpu,cpuacct:/x\n4:memory:/docker/abc\n1:name=systemd:/\n"
    proc = write(tmp_path / "proc", {"self/cgroup": cgroup})
    root = write(
        tmp_path / "cgroup",
        {
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/memory.usage_in_bytes": "5\n",
            "memory/docker/abc/memory.limit_in_bytes": f"{4 * GIB}\n",
            "memory/docker/abc/memory.usage_in_bytes": f"{3 * GIB}\n",
            # inactive_file is this cgroup's alone, total_inactive_file its descendants' too: as is the usage
            "memory/docker/abc/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\n",
        },
    )
    (limit,) = Admission(shm_path=nowhere, proc_root=proc, cgroup_root=root).available()
    assert limit.source == f"cgroup {root}/memory/docker/abc/memory.limit_in_bytes"
    assert (limit.available, limit.total) == (2 * GIB, 4 * GIB)


def test_mounts_are_found_in_mountinfo_of_both_versions(tmp_path: Path, nowhere: Path) -> None:
    v1, v2 = tmp_path / "v 1", tmp_path / "v2"
    write(v1, {"memory.limit_in_bytes": f"{GIB}\n", "memory.usage_in_bytes": "0\n"})
    write(v2, {"inner/memory.max": f"{2 * GIB}\n", "inner/memory.current": "0\n"})
    escaped = str(v1).replace(" ", r"\040")
    mountinfo = (
        "22 1 0:21 / /proc rw - proc proc rw\n"
        # the container's own v1 cgroup is mounted as if it were the root, on a path with a space
        f"30 25 0:26 /docker/abc {escaped} ro shared:1 - cgroup cgroup rw,memory\n"
        f"31 25 0:27 / {tmp_path}/wrong ro - cgroup cgroup rw,cpu\n"
        f"32 25 0:28 / {v2} rw - cgroup2 cgroup2 rw\n"
        "malformed\n"
    )
    proc = write(
        tmp_path / "proc", {"self/cgroup": "4:memory:/docker/abc\n0::/inner\n", "self/mountinfo": mountinfo}
    )
    admission = Admission(shm_path=nowhere, proc_root=proc)
    assert [(limit.source, limit.total) for limit in admission.available()] == [
        (f"cgroup {v1}/memory.limit_in_bytes", GIB),
        (f"cgroup {v2}/inner/memory.max", 2 * GIB),
    ]


@pytest.mark.parametrize("path", ["/../../host.slice/pod", "/kubepods/pod123", "/"])
def test_a_path_outside_the_mount_falls_back_to_the_mount(tmp_path: Path, nowhere: Path, path: str) -> None:
    root = write(tmp_path / "cg", {"memory.max": "4096\n", "memory.current": "0\n"})
    proc = write(tmp_path / "proc", {"self/cgroup": f"0::{path}\n"})
    (limit,) = Admission(shm_path=nowhere, proc_root=proc, cgroup_root=root).available()
    assert limit.source == f"cgroup {root}/memory.max"


def test_shm_file_system_is_a_limit_without_reserve(tmp_path: Path) -> None:
    admission = Admission(reserve=1 << 60, shm_path="/dev/shm", proc_root=tmp_path)
    stats = os.statvfs("/dev/shm")
    (limit,) = admission.available()
    assert (limit.source, limit.total) == ("/dev/shm", stats.f_blocks * stats.f_frsize)
    assert 0 < limit.usable == limit.available <= limit.total
    with pytest.raises(ArenaFull, match=r"/dev/shm has .* left\. Make it larger \(mount -o remount,size="):
        admission.check(limit.total + 1)


def test_nothing_is_cached(tmp_path: Path, nowhere: Path) -> None:
    admission = Admission(shm_path=nowhere, proc_root=write(tmp_path, {"meminfo": meminfo(2 * GIB)}))
    admission.check(2 * GIB)
    write(tmp_path, {"meminfo": meminfo(GIB)})
    with pytest.raises(ArenaFull):
        admission.check(2 * GIB)


def test_nothing_readable_refuses_nothing(nowhere: Path) -> None:
    admission = Admission(shm_path=nowhere, proc_root=nowhere, cgroup_root=nowhere)
    assert admission.available() == []
    admission.check(1 << 50)


def test_this_host() -> None:
    admission = Admission()
    assert {"MemAvailable", "/dev/shm"} <= {limit.source for limit in admission.available()}
    usable = [limit.usable for limit in admission.available()]
    assert usable == sorted(usable)
    with pytest.raises(ArenaFull):
        admission.check(1 << 55)
