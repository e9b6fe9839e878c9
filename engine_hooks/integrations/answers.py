"""What control endpoints answer: a status and a JSON body, in shapes that SGLang's and vLLM's clients know.

200   it is as was asked for, also if it was before
400   refused, and nothing changed; the message says what to change
503   the store does not answer; ask again later
500   it failed, and the log has a traceback
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from weightstore.errors import EngineAsleep, StoreGone, StoreTimeout, UsageError

Shape = Callable[[str], dict[str, Any]]
"""The body that says why something was refused or failed."""


class Answer(NamedTuple):
    """What an endpoint answers. No body: the status says it all."""

    status: int
    body: dict[str, Any] | None

    @property
    def ok(self) -> bool:
        return self.status == 200


def status_of(error: Exception) -> int:
    """400 for what the caller can mend, 503 for a store that does not answer, 500 for the rest."""
    if isinstance(error, UsageError):
        return 400
    return 503 if isinstance(error, StoreGone | StoreTimeout) else 500


def unsuccessful(message: str) -> dict[str, Any]:
    """SGLang's, of most verbs."""
    return {"success": False, "message": message}


def plain_error(message: str) -> dict[str, Any]:
    """SGLang's, of checksums."""
    return {"error": message}


def vllm_error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}


def generation_refused(error: Exception) -> Answer:
    """What a server answers a generation that met EngineAsleep (400, as SGLang) or EngineBroken (503)."""
    if isinstance(error, EngineAsleep):
        return Answer(
            400, {"detail": f"the server is sleeping; call resume_memory_occupation first ({error})"}
        )
    return Answer(503, {"detail": f"the server is not ready ({error})"})
