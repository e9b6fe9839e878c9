"""Telling, without an engine; `test_hook` has the operations that tell."""

from __future__ import annotations

import pytest

from engine_hooks.callbacks import Callbacks
from weightstore.errors import UsageError


def test_what_changed_is_told_once_and_in_order() -> None:
    callbacks = Callbacks()
    told: list[tuple[str, ...]] = []
    callbacks.add(told.append)
    callbacks.changed(["b", "a"])
    callbacks.changed(["c", "a"])
    assert callbacks.untold == ("b", "a", "c")
    callbacks.tell()
    callbacks.tell()
    assert told == [("b", "a", "c"), ()]


def test_all_are_called_and_the_first_error_is_raised() -> None:
    callbacks = Callbacks()
    told: list[tuple[str, ...]] = []

    def fails(changed: tuple[str, ...]) -> None:
        raise KeyError(*changed)

    for callback in (fails, lambda changed: 1 / 0, told.append):
        callbacks.add(callback)
    callbacks.changed(["a"])
    with pytest.raises(KeyError, match="a"):
        callbacks.tell()
    assert told == [("a",)] and callbacks.untold == ()


def test_on_the_way_out_errors_stay_and_nothing_new_is_nothing_told() -> None:
    callbacks = Callbacks()
    told: list[tuple[str, ...]] = []
    callbacks.add(lambda changed: 1 / 0)
    callbacks.add(told.append)
    callbacks.tell_on_the_way_out()
    assert told == []
    callbacks.changed(["a"])
    callbacks.tell_on_the_way_out()
    assert told == [("a",)]


def test_a_callback_may_begin_nothing_also_after_one_that_failed() -> None:
    callbacks = Callbacks()
    callbacks.add(lambda changed: 1 / 0)
    callbacks.add(lambda changed: callbacks.refuse_within())
    with pytest.raises(ZeroDivisionError):
        callbacks.tell()
    callbacks.refuse_within()
    alone = Callbacks()
    alone.add(lambda changed: alone.refuse_within())
    with pytest.raises(UsageError, match="part of one"):
        alone.tell()
