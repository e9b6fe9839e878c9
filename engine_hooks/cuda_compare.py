"""Comparing an image with the arena bit by bit, on the GPU, at the speed of the copy.

The arena's bytes are copied through two device buffers; while one fills, the other is compared with the image
by torch kernels. Nothing is read back until the end: each chunk leaves one flag on the device. Only
chunks whose flag is up are looked at again, run by run, to name what differs.

Invariants:
- scratch memory is two buffers of at most `CHUNK` bytes and a compare mask an eighth that size, whatever the
  image's size;
- a buffer is overwritten only after the kernel that read it (an event), and read only after the copy
  into it (another);
- every byte of every run is compared, and no byte outside the runs can make a run differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import torch

from engine_hooks.backend import Run
from weightstore.cuda.copies import Copier
from weightstore.cuda.driver import Device

CHUNK: Final = 128 << 20
GAP: Final = 512
"""Runs this close to each other are staged by one copy: padding between tensors costs less than calls."""

_cuda: Any = (
    torch.cuda
)  # its streams and events are partly untyped, and which parts depends on torch's version


class Chunk(NamedTuple):
    """A stretch of the image staged at once, and the parts of runs in it: (index of the run, part)."""

    source: int
    target: int
    nbytes: int
    parts: tuple[tuple[int, Run], ...]


def chunks_of(runs: Sequence[Run], limit: int = CHUNK) -> list[Chunk]:
    """Cut and group the runs into stretches of at most `limit` bytes, adjacent ones together. Pure."""
    chunks: list[Chunk] = []
    parts: list[tuple[int, Run]] = []
    for index in sorted(range(len(runs)), key=lambda i: runs[i].target):
        source, target, nbytes = runs[index]
        while nbytes > 0:
            if parts:
                head, tail = parts[0][1], parts[-1][1]
                gap = target - (tail.target + tail.nbytes)
                joins = 0 <= gap <= GAP and source - target == tail.source - tail.target
                room = limit - (target - head.target)
                if not joins or room <= 0:
                    chunks.append(_close(parts))
                    parts = []
                    continue
            else:
                room = limit
            size = min(nbytes, room)
            parts.append((index, Run(source, target, size)))
            source, target, nbytes = source + size, target + size, nbytes - size
    if parts:
        chunks.append(_close(parts))
    return chunks


def _close(parts: Sequence[tuple[int, Run]]) -> Chunk:
    head, tail = parts[0][1], parts[-1][1]
    return Chunk(head.source, head.target, tail.target + tail.nbytes - head.target, tuple(parts))


def differing_runs(image: torch.Tensor, runs: Sequence[Run], copier: Copier, device: Device) -> list[Run]:
    """The runs whose bytes in `image` (uint8, on the device) differ from the arena's, in the given order."""
    chunks = chunks_of(runs)
    if not chunks:
        return []
    with _Staging(image.device, max(chunk.nbytes for chunk in chunks), copier, device) as staging:
        suspects = [
            chunk
            for chunk, flag in zip(
                chunks, staging.flags(image, ((c, [(0, c.target, c.nbytes)]) for c in chunks)), strict=True
            )
            if flag[0]
        ]
        if not suspects:
            return []
        exact = (
            (c, [(part.target - c.target, part.target, part.nbytes) for _, part in c.parts]) for c in suspects
        )
        found = {
            index
            for chunk, flags in zip(suspects, staging.flags(image, exact), strict=True)
            for (index, _), flag in zip(chunk.parts, flags, strict=True)
            if flag
        }
    return [run for index, run in enumerate(runs) if index in found]


class _Staging:
    """Two device buffers, the copy stream that fills them and the stream that compares them."""

    def __init__(self, device: torch.device, nbytes: int, copier: Copier, owner: Device) -> None:
        self._device = device
        self._copier = copier
        self._owner = owner
        self._copy = _cuda.Stream(device)
        self._compare = _cuda.Stream(device)
        # 64-bit words, with room to start a chunk at any of the eight phases of an unaligned target.
        size = -(-nbytes // 8) * 8 + 8
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._masks = torch.empty(size // 8, dtype=torch.bool, device=device)
        self._filled = [_cuda.Event() for _ in range(2)]
        self._free = [_cuda.Event() for _ in range(2)]
        # The allocator's memory may come with work pending on the current stream.
        self._copy.wait_stream(torch.cuda.current_stream(device))
        self._compare.wait_stream(torch.cuda.current_stream(device))

    def __enter__(self) -> _Staging:
        return self

    def __exit__(self, *_: object) -> None:
        # Before the buffers go back to the allocator: both streams may still use them after an error.
        self._copy.synchronize()
        self._compare.synchronize()
        self._buffers.clear()

    def flags(
        self, image: torch.Tensor, work: Iterable[tuple[Chunk, Sequence[tuple[int, int, int]]]]
    ) -> list[list[bool]]:
        """For each chunk, whether each of its (offset in chunk, target, nbytes) stretches differs."""
        results: list[torch.Tensor] = []
        counts: list[int] = []
        for turn, (chunk, stretches) in enumerate(work):
            slot = turn % 2
            if turn >= 2:
                self._copy.wait_event(self._free[slot])
            phase = chunk.target % 8
            staged = self._buffers[slot][phase : phase + chunk.nbytes]
            self._copier.to_device([(staged.data_ptr(), chunk.source, chunk.nbytes)], self._copy.cuda_stream)
            self._filled[slot].record(self._copy)
            self._compare.wait_event(self._filled[slot])
            with torch.cuda.device(self._device), torch.cuda.stream(self._compare):
                result = torch.empty(len(stretches), dtype=torch.bool, device=self._device)
                for i, (at, target, nbytes) in enumerate(stretches):
                    self._differs(staged[at : at + nbytes], image[target : target + nbytes], result[i])
                results.append(result)
            counts.append(len(stretches))
            self._free[slot].record(self._compare)
        with torch.cuda.device(self._device), torch.cuda.stream(self._compare):
            # Waits for the comparisons; a copy that failed shows here as well.
            flat: list[bool] = torch.cat(results).tolist()
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        return [flat[end - count : end] for end, count in zip(ends, counts, strict=True)]

    def _differs(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        """Enqueue `out = any byte of a and b differs`. Both start at the same phase of a 64-bit word."""
        head = min(-a.storage_offset() % 8, a.numel())
        words = (a.numel() - head) // 8
        tail = head + words * 8
        answers = [torch.ne(a[lo:hi], b[lo:hi]).any() for lo, hi in ((0, head), (tail, a.numel())) if lo < hi]
        if words:
            mask = self._masks[:words]
            torch.ne(a[head:tail].view(torch.int64), b[head:tail].view(torch.int64), out=mask)
            answers.append(mask.any())
        torch.any(torch.stack(answers), dim=0, out=out) if len(answers) > 1 else out.copy_(answers[0])
