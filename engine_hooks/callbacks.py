"""What an engine derives from weights and keeps outside of them has to follow them: who is told, and of what.

Invariants:
- a name that changed is told once, at the next telling, however many operations that takes;
- every callback is called, whatever those before it raise;
- a callback is part of the operation that tells it, so it may begin no other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from weightstore.errors import UsageError

Callback = Callable[[tuple[str, ...]], object]

_log = logging.getLogger("engine_hooks")


class Callbacks:
    """Those of one engine. Used under the hook's lock, which callbacks run under too."""

    def __init__(self) -> None:
        self._all: list[Callback] = []
        self._untold: dict[str, None] = {}
        self._telling = False

    @property
    def untold(self) -> tuple[str, ...]:
        """Names that changed since the last telling, each once, in the order in which they did."""
        return tuple(self._untold)

    def add(self, callback: Callback) -> None:
        self._all.append(callback)

    def changed(self, names: Iterable[str]) -> None:
        """These are yet to be told."""
        self._untold.update(dict.fromkeys(names))

    def tell(self) -> None:
        """Call them all with what is untold, also if that is nothing; then raise the first one's error."""
        first: Exception | None = None
        changed, self._untold = self.untold, {}
        self._telling = True
        try:
            for callback in self._all:
                try:
                    callback(changed)
                except Exception as error:
                    _log.exception("an after_refit callback failed")
                    first = first or error
        finally:
            self._telling = False
        if first is not None:
            raise first

    def tell_on_the_way_out(self) -> None:
        """As `tell`, if something is untold, while another error is being raised: that one goes on."""
        if self._untold:
            try:
                self.tell()
            except Exception as error:
                _log.debug("logged above: %s", error)

    def refuse_within(self) -> None:
        """Raise UsageError in a callback."""
        if self._telling:
            raise UsageError(
                "an after_refit callback cannot sleep, wake, refit, verify or close: it is part of one"
            )
