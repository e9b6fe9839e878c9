"""Weights from the trainer's device memory into the engine's, in buckets, as other tools' trainers send them.

Two buckets take turns: while the engine copies out of one, the trainer fills the other. On a GPU a bucket
is shared by its CUDA IPC handle, which torch's own reductions use; on a CPU by a file in shared memory.
`plan` is pure: which tensor lies where in which bucket.
"""

from __future__ import annotations

import base64
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from bench.rl_step.roles import wait_for_device

MIB: Final = 1 << 20
BUCKET: Final = 512 * MIB
ALIGN: Final = 256

Send = Callable[[dict[str, Any]], object]
"""Hands a message to the engine, and returns when the engine has copied what it names."""


@dataclass(frozen=True)
class Place:
    """`nbytes` bytes of a tensor from `start` on (of its own bytes), at `offset` of the bucket."""

    name: str
    start: int
    offset: int
    nbytes: int


def plan(tensors: Iterable[tuple[str, int]], bucket: int) -> list[list[Place]]:
    """(name, bytes) in order, cut into buckets; what does not fit into one goes on in the next."""
    filled: list[list[Place]] = [[]]
    at = 0
    for name, nbytes in tensors:
        start = 0
        while start < nbytes:
            if at >= bucket:
                filled.append([])
                at = 0
            part = min(nbytes - start, bucket - at)
            filled[-1].append(Place(name, start, at, part))
            start += part
            at = -(-(at + part) // ALIGN) * ALIGN
    return [places for places in filled if places]


class Bucket:
    """The trainer's side of one bucket; `handle` tells the engine where it is."""

    def __init__(self, nbytes: int, device: str) -> None:
        self.path: str | None = None
        if device == "cpu":
            handle, self.path = tempfile.mkstemp(dir="/dev/shm", prefix="bucket-")
            os.close(handle)
            self.tensor = torch.from_file(self.path, shared=True, size=nbytes, dtype=torch.uint8)
            self.handle: dict[str, Any] = {"path": self.path, "size": nbytes}
        else:
            self.tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)
            self.handle = {"cuda": [_written(part) for part in self.tensor.untyped_storage()._share_cuda_()]}

    def close(self) -> None:
        if self.path is not None:
            os.unlink(self.path)


class Sender:
    """Sends a module's parameters; the buckets stay from one time to the next, as they would in training."""

    def __init__(self, module: nn.Module, device: str, bucket: int = BUCKET) -> None:
        self._device = device
        self._flat = {name: _bytes(parameter) for name, parameter in module.named_parameters()}
        self._plan = plan(((name, flat.numel()) for name, flat in self._flat.items()), bucket)
        self._buckets = [Bucket(bucket, device) for _ in range(2)]

    def send(self, send: Send) -> int:
        """Everything once; the number of buckets."""
        pending: list[Future[object]] = []
        with ThreadPoolExecutor(1) as sender:
            for number, places in enumerate(self._plan):
                turn = number % 2
                if number >= 2:
                    pending[number - 2].result()  # the engine has copied what this one held
                for place in places:
                    source = self._flat[place.name][place.start : place.start + place.nbytes]
                    self._buckets[turn].tensor[place.offset : place.offset + place.nbytes].copy_(source)
                wait_for_device(self._device)
                message = {
                    "turn": turn,
                    "handle": self._buckets[turn].handle,
                    "places": [[p.name, p.start, p.offset, p.nbytes] for p in places],
                }
                pending.append(sender.submit(send, message))
            for sent in pending:
                sent.result()
        return len(self._plan)

    def close(self) -> None:
        for bucket in self._buckets:
            bucket.close()


class Receiver:
    """The engine's side: copies what a message names into the module's parameters."""

    def __init__(self, module: nn.Module) -> None:
        self._flat = {name: _bytes(parameter) for name, parameter in module.named_parameters()}
        self._opened: dict[int, torch.Tensor] = {}

    def take(self, message: Mapping[str, Any]) -> None:
        turn = message["turn"]
        if turn not in self._opened:
            self._opened[turn] = _open(message["handle"])
        bucket = self._opened[turn]
        for name, start, offset, nbytes in message["places"]:
            self._flat[name][start : start + nbytes].copy_(bucket[offset : offset + nbytes])


def _bytes(parameter: torch.Tensor) -> torch.Tensor:
    """All of a dense tensor's bytes, in memory order, on its own memory."""
    data = parameter.detach()
    flat = torch.empty(0, dtype=torch.uint8, device=data.device)
    offset = data.storage_offset() * data.element_size()
    return flat.set_(data.untyped_storage(), offset, (math.prod(data.shape) * data.element_size(),), (1,))


def _open(handle: Mapping[str, Any]) -> torch.Tensor:
    if "path" in handle:
        return torch.from_file(handle["path"], shared=True, size=handle["size"], dtype=torch.uint8)
    torch.cuda.init()
    storage = torch.UntypedStorage._new_shared_cuda(*[_read(part) for part in handle["cuda"]])
    found = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return found.set_(storage)


def _written(part: Any) -> Any:
    return {"bytes": base64.b64encode(part).decode()} if isinstance(part, bytes) else part


def _read(part: Any) -> Any:
    return base64.b64decode(part["bytes"]) if isinstance(part, dict) else part
