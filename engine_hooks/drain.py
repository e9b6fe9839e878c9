"""Counting generations in flight, and waiting until there are none.

Invariants:
- while a drain is held, no generation runs and none begins (but for those the draining thread begins
  itself, from a callback); the caller makes sure that one thread at a time drains or holds back;
- a thread that is inside a generation never waits to begin another: the drain waits for it, so
  waiting for the drain would be a deadlock.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, get_ident

from weightstore.errors import EngineBusy


class Drain:
    """The generations of one engine."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._inside: Counter[int] = Counter()
        self._drainer: int | None = None

    @property
    def in_flight(self) -> int:
        return sum(self._inside.values())

    @contextmanager
    def running(self, admit: Callable[[], None]) -> Iterator[None]:
        """Hold a generation open. Waits while another thread drains or holds; raises what `admit` raises."""
        thread = get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._drainer in (None, thread) or self._inside[thread] > 0)
            admit()
            self._inside[thread] += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside[thread] -= 1
                if not self._inside[thread]:
                    del self._inside[thread]
                self._changed.notify_all()

    @contextmanager
    def drained(self, timeout: float | None) -> Iterator[float]:
        """Wait until nothing is in flight and keep it so; yields the seconds waited.

        Raises EngineBusy after `timeout` seconds (None waits for ever), or at once when this very
        thread is inside a generation.
        """
        thread = get_ident()
        began = time.perf_counter()
        with self._changed:
            if self._inside[thread]:
                raise EngineBusy(
                    "called inside running() on the same thread: the generation would wait for itself; "
                    "leave the `with hook.running()` block first",
                    in_flight=self.in_flight,
                )
            self._drainer = thread
            try:
                empty = self._changed.wait_for(lambda: not self._inside, timeout)
            except BaseException:
                self._let_in()
                raise
            if not empty:
                self._let_in()
                raise EngineBusy(
                    f"{self.in_flight} generations were still running after {timeout:g} s; nothing changed. "
                    "Wait for them, or give a longer drain_timeout",
                    in_flight=self.in_flight,
                )
        try:
            yield time.perf_counter() - began
        finally:
            self._let_in()

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Let no other thread begin a generation, without waiting for those in flight."""
        with self._changed:
            self._drainer = get_ident()
        try:
            yield
        finally:
            self._let_in()

    def _let_in(self) -> None:
        with self._changed:
            self._drainer = None
            self._changed.notify_all()
