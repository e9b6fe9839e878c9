"""Waiting for a store to have nothing to do, so that a measurement does not share a core with it."""

from __future__ import annotations

import time

from weightstore.client import Store

_POLL = 0.005


def settle(store: Store) -> None:
    """Wait until the store has summed all its versions, which it does in the background."""
    while not all(v.checksummed for m in store.status().models for v in m.versions):
        time.sleep(_POLL)
