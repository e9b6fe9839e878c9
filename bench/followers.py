"""`python -m bench.followers SOCKET MODEL COUNT`: that many processes that follow the default tag of MODEL.

Forked from one that has imported the client but not connected, so that each is cheap and none shares a
connection. Prints READY when all have their lease, then a NEWS record for each version that one has taken;
ends at the end of its standard input. Imports no torch.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
import time
import traceback

from weightstore.client import connect
from weightstore.reader import Lease

READY = b"ready"
NEWS = struct.Struct("<qd")
"""Version, and the time.monotonic() (one clock for all processes) at which the records were there."""


def follow(socket: str, model: str, ready: int) -> None:
    """In a child: take every offer at once and say so, until killed by the end of standard input."""

    def take(lease: Lease) -> None:
        lease.advance()
        # A write this short into a pipe is one piece, whoever else writes.
        os.write(sys.stdout.fileno(), NEWS.pack(lease.version, time.monotonic()))

    with connect(socket, timeout=60.0) as store:
        lease = store.lease(model, follow=True, on_offer=take)
        os.write(ready, b"1")
        ended = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.buffer.read(), ended.set()), daemon=True).start()
        ended.wait()
        lease.release()


def main(socket: str, model: str, count: int) -> None:
    readable, ready = os.pipe()
    children = []
    for _ in range(count):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                follow(socket, model, ready)
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)  # not through what the parent has registered for its own end
        children.append(pid)
    os.close(ready)
    waiting = count
    while waiting and (said := os.read(readable, waiting)):
        waiting -= len(said)
    if not waiting:
        os.write(sys.stdout.fileno(), READY)
    failed = [pid for pid in children if os.waitpid(pid, 0)[1]]
    if failed:
        sys.exit(f"{len(failed)} of {count} followers failed")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
