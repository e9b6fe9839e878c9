"""The CUDA tensors on their way into one mapping, from all threads and devices of this process.

A refit hands its CUDA tensors over here and goes on; it waits with `drain` before it tells the store
anything about them. Uploaders, and the windows they pinned, live as long as the mapping: a trainer pays for
pinning once, not at every refit.

Importing this module imports neither torch nor CUDA.

Invariants:
- after `put_all` work submitted to the caller's current stream runs after the copies, so that a source may be
  overwritten or freed in stream order, as after any torch operation;
- an uploader is used by one thread at a time;
- before the mapping lets go of its pages every copy has landed and every window is unregistered.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from weightstore.errors import DependencyMissing, DeviceError
from weightstore.mapping import ArenaMapping

if TYPE_CHECKING:
    import torch

    from weightstore.cuda.upload import Uploader

log = logging.getLogger(__name__)


class Uploads:
    """The uploads into one writable mapping. Thread-safe. Made by `uploads_into`."""

    def __init__(self, mapping: ArenaMapping) -> None:
        self._mapping = mapping
        self._lock = threading.Lock()
        self._uploaders: dict[torch.device, Uploader | None] = {}
        self._under_way = False

    def put_all(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Enqueue the copies of (place in the mapping, CUDA source) pairs, equal in shape.

        Where uploading is impossible (no cuda-bindings, another vendor's device) torch copies, slower, and
        the bytes have landed on return; that is logged once.

        Raises:
            DeviceError: the device refused a copy.
        """
        by_device: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for place, source in pairs:
            by_device.setdefault(source.device, []).append((place, source))
        with self._lock:
            for device, mine in by_device.items():
                uploader = self._uploader(device)
                if uploader is None:
                    for place, source in mine:
                        place.copy_(source)
                    continue
                self._under_way = True
                uploader.put(mine)
                uploader.fence()

    def unchanged(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[bool]:
        """For each (place in the mapping, CUDA tensor), equal in shape: whether they have the same bits, once
        the tensor is of the place's dtype.

        Raises:
            DeviceError: a device refused.
        """
        from weightstore.tensors import same_pieces

        found = [False] * len(pairs)
        devices = {tensor.device for _, tensor in pairs}
        with self._lock:
            for device in devices:
                numbers = [n for n, (_, tensor) in enumerate(pairs) if tensor.device == device]
                mine = [pairs[n] for n in numbers]
                uploader = self._uploader(device)
                if uploader is None:
                    same = [same_pieces(place, tensor) for place, tensor in mine]
                else:
                    same = uploader.unchanged(mine)
                for number, equal in zip(numbers, same, strict=True):
                    found[number] = equal
        return found

    def pin_ahead(self, device: torch.device, ranges: Iterable[tuple[int, int]]) -> None:
        """Have a background thread pin the windows of these (offset, nbytes) ranges for copies from `device`;
        does nothing for a device that is not CUDA's."""
        import torch

        if device.type != "cuda":
            return
        # With its number, as tensors' devices are, so that their puts find this uploader.
        current = torch.cuda.current_device() if torch.cuda.is_available() else 0
        chosen = torch.device("cuda", current if device.index is None else device.index)
        with self._lock:
            uploader = self._uploader(chosen)
            if uploader is not None:
                uploader.pin_ahead(ranges)

    @property
    def under_way(self) -> bool:
        """Whether copies were handed over since the last drain."""
        return self._under_way

    def drain(self) -> None:
        """Wait until every copy handed over so far has landed.

        Raises:
            DeviceError: one failed; what its place holds is undefined.
        """
        with self._lock:
            self._under_way = False
            for uploader in self._uploaders.values():
                if uploader is not None:
                    uploader.drain()

    def close(self) -> None:
        """Drain, then unpin the mapping. Idempotent."""
        with self._lock:
            uploaders, self._uploaders = self._uploaders, {}
            for uploader in uploaders.values():
                if uploader is not None:
                    uploader.close()

    def _uploader(self, device: torch.device) -> Uploader | None:
        if device not in self._uploaders:
            from weightstore.cuda.upload import Uploader

            try:
                self._uploaders[device] = Uploader(self._mapping, device)
            except (DependencyMissing, DeviceError) as error:
                log.warning(
                    "tensors on %s are copied by torch, slower than the link: %s", device, error.message
                )
                self._uploaders[device] = None
        return self._uploaders[device]


_all: WeakKeyDictionary[ArenaMapping, Uploads] = WeakKeyDictionary()
_guard = threading.Lock()


def uploads_into(mapping: ArenaMapping) -> Uploads:
    """The uploads of `mapping`, closed when it closes."""
    with _guard:
        found = _all.get(mapping)
        if found is None:
            found = _all[mapping] = Uploads(mapping)
            mapping.before_close(found.close)
        return found


def drain_uploads(mapping: ArenaMapping) -> None:
    """As `Uploads.drain`; does nothing if no CUDA tensor was ever put into `mapping`."""
    with _guard:
        found = _all.get(mapping)
    if found is not None:
        found.drain()


def uploads_under_way(mapping: ArenaMapping) -> bool:
    """Whether CUDA tensors were put into `mapping` since they were last waited for."""
    with _guard:
        found = _all.get(mapping)
    return found is not None and found.under_way
