"""Waiting for changes: nothing is missed, and whoever stops waiting has stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from weightstore.changes import Changes

T = TypeVar("T")


def run(scenario: Callable[[], Awaitable[T]]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(scenario(), 60.0)

    return asyncio.run(bounded())


def test_a_condition_is_looked_at_first_and_after_every_change() -> None:
    async def scenario() -> tuple[int | None, int | None, list[str]]:
        seen: list[str] = []
        state = {"value": 7}
        changes = Changes(lambda: seen.append("reacted"))
        at_once = await changes.until(lambda: state["value"], None)
        state["value"] = 0
        waiting = asyncio.create_task(changes.until(lambda: state["value"], None))
        for value in (0, 0, 9):
            await asyncio.sleep(0)
            state["value"] = value
            changes.announce()
        return at_once, await waiting, seen

    assert run(scenario) == (7, 9, ["reacted"] * 3)


def test_time_runs_out() -> None:
    async def scenario() -> list[object]:
        changes = Changes(lambda: None)
        found = [await changes.until(lambda: None, timeout) for timeout in (-1.0, 0.0, 0.001)]
        late = asyncio.create_task(changes.until(lambda: None, 0.02))
        for _ in range(5):  # changes that do not matter do not prolong it
            await asyncio.sleep(0.001)
            changes.announce()
        return [*found, await late]

    assert run(scenario) == [None] * 4


def test_a_cancellation_that_comes_with_a_change_is_not_forgotten() -> None:
    """It would leave its connection waiting for a task that never ends."""

    async def scenario(turns: int) -> bool:
        changes = Changes(lambda: None)
        waiting = asyncio.create_task(changes.until(lambda: None, 50.0))
        await asyncio.sleep(0.001)
        changes.announce()
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        cancelled = waiting.cancelled()
        waiting.cancel()
        return cancelled

    assert [run(lambda turns=turns: scenario(turns)) for turns in range(6)] == [True] * 6


def test_nobody_is_remembered_who_does_not_wait() -> None:
    async def scenario() -> int:
        changes = Changes(lambda: None)
        tasks = [
            asyncio.create_task(changes.until(lambda: None, timeout)) for timeout in (None, 1e300, 0.001)
        ]
        await asyncio.sleep(0)
        assert len(changes._waiting) == 3
        await tasks[2]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return len(changes._waiting)

    assert run(scenario) == 0
