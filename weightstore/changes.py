"""Waiting for the catalog to change, on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Changes:
    """`announce` runs `react` and then wakes everyone in `until`."""

    def __init__(self, react: Callable[[], None]) -> None:
        self._react = react
        self._waiting: set[asyncio.Future[None]] = set()

    def announce(self) -> None:
        """The catalog may have changed."""
        self._react()
        for waiter in self._waiting:
            _wake(waiter)
        self._waiting.clear()

    async def until(self, condition: Callable[[], T | None], timeout: float | None) -> T | None:
        """The first true value of `condition`, looked at after every change; None after `timeout` s."""
        # Not asyncio.wait_for: before Python 3.12 it forgets a cancellation that comes together with a
        # change, and whoever cancelled then waits for ever.
        loop = asyncio.get_running_loop()
        end = None if timeout is None else loop.time() + timeout
        while True:
            value = condition()
            if value:
                return value
            if end is not None and loop.time() >= end:
                return None
            waiter: asyncio.Future[None] = loop.create_future()
            self._waiting.add(waiter)
            alarm = None if end is None else loop.call_at(end, _wake, waiter)
            try:
                await waiter
            finally:
                self._waiting.discard(waiter)
                if alarm is not None:
                    alarm.cancel()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
