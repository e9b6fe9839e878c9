from __future__ import annotations

import pytest

from engine_hooks.lifecycle import TRANSITIONS, Event, State, advance
from weightstore.errors import EngineAsleep, EngineBroken


def test_the_table_is_what_the_design_says() -> None:
    # Nothing but a whole fill makes weights usable again, and nothing broken is ever patched.
    usable = {move for move, after in TRANSITIONS.items() if after is State.AWAKE}
    assert usable == {
        (State.ASLEEP, Event.WOKE),
        (State.BROKEN, Event.WOKE),
        (State.AWAKE, Event.REFITTED),
    }


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_moves_outside_the_table_raise(state: State, event: Event) -> None:
    if (state, event) in TRANSITIONS:
        assert advance(state, event, "c") is TRANSITIONS[state, event]
    else:
        with pytest.raises(EngineAsleep if state is State.ASLEEP else EngineBroken, match="'c' cannot be"):
            advance(state, event, "c")
