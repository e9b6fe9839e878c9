"""The life of a component on the device, as one table.

Theory of operation. A component's image is ASLEEP (address reserved, no memory behind it), AWAKE
(memory mapped, its bytes are one version's) or BROKEN (memory mapped, its bytes are of no one
version, because an update failed half way). Failed wakes are not events: they leave the state as it
was. Asking for the state one is in is not an event either; `EngineHook` answers it without a move.
"""

from __future__ import annotations

import enum
from typing import Final

from weightstore.errors import EngineAsleep, EngineBroken, WeightstoreError


class State(enum.Enum):
    AWAKE = "awake"
    ASLEEP = "asleep"
    BROKEN = "broken"


class Event(enum.Enum):
    SLEPT = "slept"
    """The memory was given back."""
    WOKE = "woke"
    """The whole image was filled from one version."""
    REFITTED = "refitted"
    """What changed between two versions was copied."""
    FAILED = "failed"
    """An update or an unmap ended half way."""


TRANSITIONS: Final[dict[tuple[State, Event], State]] = {
    (State.ASLEEP, Event.WOKE): State.AWAKE,
    (State.AWAKE, Event.SLEPT): State.ASLEEP,
    (State.AWAKE, Event.REFITTED): State.AWAKE,
    (State.AWAKE, Event.FAILED): State.BROKEN,
    (State.BROKEN, Event.WOKE): State.AWAKE,
    (State.BROKEN, Event.SLEPT): State.ASLEEP,
    (State.BROKEN, Event.FAILED): State.BROKEN,
}


def refusal(state: State, what: str) -> WeightstoreError:
    """The error for `what` (e.g. "forward of transformer") needing weights in a state without them."""
    if state is State.ASLEEP:
        return EngineAsleep(f"{what}: its weights are not on the device; call wake() first")
    return EngineBroken(
        f"{what}: an update failed half way, its weights are of no one version; call wake() to fill them anew"
    )


def advance(state: State, event: Event, component: str) -> State:
    """The state after `event`; EngineAsleep or EngineBroken, and no change, if the table lacks the move."""
    after = TRANSITIONS.get((state, event))
    if after is None:
        raise refusal(state, f"component {component!r} cannot be {event.value}")
    return after
