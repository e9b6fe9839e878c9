"""Having ready what the first refits would wait for: `Store.prepare`.

A refit is opened, so that the store makes room and places are known, and given up. Ranks that prepare the
same tag do so one after another.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from weightstore.errors import RefitConflict, UnknownModel, UsageError
from weightstore.trainer import Refit

if TYPE_CHECKING:
    import torch

    from weightstore.client import Store

PAUSE: Final = 0.02
"""Seconds until a tag that was being written is asked for again: preparing what is ready takes less."""


def prepare(
    store: Store,
    model: str,
    tag: str,
    components: Sequence[str] | None,
    device: torch.device | str | None,
    timeout: float,
) -> int:
    """See `Store.prepare`."""
    if not timeout >= 0:
        raise UsageError(f"a timeout of {timeout} s")
    chosen = None if device is None else _device(device)
    with _opened(store, model, tag, components, timeout) as refit:
        if not refit.base:
            raise UnknownModel(f"model {model!r} has no version yet; prepare once it has", model=model)
        places = refit.places
        if chosen is not None:
            from weightstore.cuda.uploads import uploads_into

            names = {place.name for place in places}
            with store.lease(model, tag, version=refit.base) as snapshot:
                now = [record for name, record in snapshot.records.items() if name in names]
            ranges = [(record.offset, record.nbytes) for record in (*places, *now)]
            uploads_into(refit.mapping).pin_ahead(chosen, ranges)
        refit.abort("it was to make room for the next one")
    extents = {(place.offset, place.nbytes) for place in places}
    return sum(nbytes for _, nbytes in extents)


def _device(device: torch.device | str) -> torch.device:
    import torch

    try:
        return torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"no device {device!r}: {error}") from None


def _opened(store: Store, model: str, tag: str, components: Sequence[str] | None, timeout: float) -> Refit:
    deadline = time.monotonic() + timeout
    while True:
        try:
            return store.refit(model, tag, components=components)
        except RefitConflict:
            if time.monotonic() >= deadline:
                raise
        time.sleep(PAUSE)
