"""Who holds a GPU's memory: what remains in use while an engine sleeps, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine_hooks.cuda_image import CudaImage
from weightstore.cuda import driver

_cuda: Any = torch.cuda  # partly untyped, and which parts depends on torch's version


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one device, as counted now.

    Attributes:
        total, in_use: the whole device, all processes, as the driver counts.
        images: mapped by weightstore images of this process.
        torch_allocated: tensors of this process that torch allocated (among them cuBLAS workspaces).
        torch_cached: held by torch's allocator of this process, not in use by a tensor; of this,
            `torch_graph_pools` are reserved for captured CUDA graphs and empty_cache() cannot free them.
        elsewhere: the rest: CUDA contexts and loaded kernels of this process, and other processes.
    """

    total: int
    in_use: int
    images: int
    torch_allocated: int
    torch_cached: int
    torch_graph_pools: int

    @property
    def elsewhere(self) -> int:
        return self.in_use - self.images - self.torch_allocated - self.torch_cached


def device_memory(ordinal: int, images: Sequence[CudaImage] = ()) -> DeviceMemory:
    """Account for the device's memory. Waits for nothing; a few milliseconds."""
    free, total = driver.device(ordinal).memory()
    allocated = torch.cuda.memory_allocated(ordinal)
    reserved = torch.cuda.memory_reserved(ordinal)
    segments: list[dict[str, Any]] = _cuda.memory_snapshot()
    pools = [
        int(segment["total_size"])
        for segment in segments
        if segment["device"] == ordinal and tuple(segment["segment_pool_id"]) != (0, 0)
    ]
    return DeviceMemory(
        total=total,
        in_use=total - free,
        images=sum(image.mapped_bytes for image in images),
        torch_allocated=allocated,
        torch_cached=reserved - allocated,
        torch_graph_pools=sum(pools),
    )
