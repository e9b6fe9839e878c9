"""Many engines that follow one tag: how long after a commit has each of them the new version's records?

Every engine is a process with a connection and a following lease of its own; see `bench.followers`.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from collections.abc import Iterator

from bench import manifests
from bench.followers import NEWS, READY
from bench.host_control import WAN, wan_store
from bench.record import ROOT
from bench.rows import Row, percentile
from bench.settings import Settings
from bench.shapes import shrink
from bench.waiting import Quiet, settle


def follow(settings: Settings) -> Iterator[Row]:
    """From just before the commit until the last engine has decoded the records and taken the version."""
    specs = shrink(manifests.load(WAN))
    last, middle, commits = [], [], []
    quiet = Quiet.of(settings)
    with wan_store() as store:
        engines = subprocess.Popen(
            [sys.executable, "-m", "bench.followers", store.socket, WAN, str(settings.engines)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert engines.stdin is not None and engines.stdout is not None
        try:
            if engines.stdout.read(len(READY)) != READY:
                raise RuntimeError("the followers ended before all of them had a lease")
            for _ in range(settings.moves + 1):
                settle(store)
                refit = store.refit(WAN)
                refit.wrote(spec.name for spec in specs if spec.alias_of is None)
                quiet()
                began = time.monotonic()
                version = refit.commit()
                commits.append(time.monotonic() - began)
                taken = []
                for _ in range(settings.engines):
                    number, at = NEWS.unpack(engines.stdout.read(NEWS.size))
                    if number != version:
                        raise RuntimeError(f"an engine took version {number} instead of {version}")
                    taken.append(at - began)
                last.append(max(taken))
                middle.append(percentile(taken, 50))
        except struct.error:
            raise RuntimeError("a follower ended early; what it said is above") from None
        finally:
            engines.stdin.close()
            engines.wait()
    yield Row(
        "follow",
        f"{settings.engines} processes follow a tag of {WAN}: commit until the last has the records",
        {"measured": last[1:], "median engine": middle[1:], "commit answered": commits[1:]},
        notes=quiet.notes(),
    )
