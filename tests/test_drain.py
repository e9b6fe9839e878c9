from __future__ import annotations

import threading

import pytest

from engine_hooks.drain import Drain
from weightstore.errors import EngineAsleep, EngineBusy

PATIENCE = 20.0


def admit() -> None:
    pass


class Generation:
    """A generation in another thread; `began` is set once it is inside, `end()` lets it go."""

    def __init__(self, drain: Drain) -> None:
        self.began = threading.Event()
        self._finish = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(drain,), daemon=True)
        self._thread.start()

    def _run(self, drain: Drain) -> None:
        with drain.running(admit):
            self.began.set()
            assert self._finish.wait(PATIENCE)

    def end(self) -> None:
        self._finish.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


def test_a_drain_waits_for_what_is_in_flight_and_holds_back_what_comes() -> None:
    drain = Drain()
    first = Generation(drain)
    assert first.began.wait(PATIENCE)
    drained, release = threading.Event(), threading.Event()

    def drainer() -> None:
        with drain.drained(PATIENCE):
            assert drain.in_flight == 0
            drained.set()
            assert release.wait(PATIENCE)

    thread = threading.Thread(target=drainer, daemon=True)
    thread.start()
    assert not drained.is_set()
    first.end()
    assert drained.wait(PATIENCE)
    second = Generation(drain)
    assert not second.began.wait(0.05)  # held back: nothing but the end of the drain can set it
    release.set()
    assert second.began.wait(PATIENCE)
    second.end()
    thread.join(PATIENCE)


def test_a_timeout_leaves_everything_open() -> None:
    drain = Drain()
    running = Generation(drain)
    assert running.began.wait(PATIENCE)
    with pytest.raises(EngineBusy, match="1 generations were still running after 0 s"), drain.drained(0):
        raise AssertionError("not drained")
    other = Generation(drain)
    assert other.began.wait(PATIENCE)
    running.end()
    other.end()
    with drain.drained(PATIENCE):
        pass


def test_draining_from_inside_a_generation_is_refused_at_once() -> None:
    drain = Drain()
    with drain.running(admit):
        with pytest.raises(EngineBusy, match="same thread"), drain.drained(None):
            raise AssertionError("not drained")
    with drain.drained(0):
        pass


def test_a_thread_inside_may_begin_another_while_somebody_waits() -> None:
    # Two requests interleaved on one event loop: were the second held back, neither would ever end.
    drain = Drain()
    waiting = threading.Event()

    def drainer() -> None:
        waiting.set()
        with drain.drained(PATIENCE):
            pass

    with drain.running(admit):
        thread = threading.Thread(target=drainer, daemon=True)
        thread.start()
        assert waiting.wait(PATIENCE)
        with drain.running(admit):
            assert drain.in_flight == 2
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_the_draining_thread_may_run_a_generation_itself() -> None:
    drain = Drain()
    with drain.drained(0), drain.running(admit):
        assert drain.in_flight == 1
    with drain.held_back(), drain.running(admit):
        assert drain.in_flight == 1


def test_holding_back_does_not_wait_for_what_is_in_flight() -> None:
    drain = Drain()
    running = Generation(drain)
    assert running.began.wait(PATIENCE)
    with drain.held_back():
        late = Generation(drain)
        assert not late.began.wait(0.05)
    assert late.began.wait(PATIENCE)
    late.end()
    running.end()


def test_who_is_not_admitted_is_not_counted() -> None:
    drain = Drain()

    def refuse() -> None:
        raise EngineAsleep("asleep")

    with pytest.raises(EngineAsleep), drain.running(refuse):
        raise AssertionError("admitted")
    assert drain.in_flight == 0


def test_an_error_in_the_drained_block_lets_generations_in_again() -> None:
    drain = Drain()
    with pytest.raises(ZeroDivisionError), drain.drained(0):
        raise ZeroDivisionError
    with drain.running(admit):
        pass
