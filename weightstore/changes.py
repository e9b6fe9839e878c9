"""Waiting for the catalog to change, on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Changes:
    """`announce` runs `react` and then wakes everyone in `until`."""

    def __init__(self, react: Callable[[], None]) -> None:
        self._react = react
        self._changed = asyncio.Event()

    def announce(self) -> None:
        """The catalog may have changed."""
        self._react()
        waiting, self._changed = self._changed, asyncio.Event()
        waiting.set()

    async def until(self, condition: Callable[[], T | None], timeout: float | None) -> T | None:
        """The first true value of `condition`, looked at after every change; None after `timeout` seconds."""
        loop = asyncio.get_running_loop()
        end = None if timeout is None else loop.time() + timeout
        while True:
            value = condition()
            if value:
                return value
            left = None if end is None else end - loop.time()
            if left is not None and left <= 0:
                return None
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
