"""An image in CUDA virtual memory: an address range reserved once, backed by memory while mapped.

Invariants:
- the address never changes from reserve to close, so captured graphs and pointers stay valid;
- [address, address + mapped_bytes) is backed by physical memory, the rest is not; pieces are mapped in
  order and each is mapped and accessible, or not there at all;
- a piece's handle is released as soon as it is mapped, so unmapping alone gives the memory back;
- the address range outlives every tensor made over it: it is given back to the driver when the image is
  closed (or nobody holds it any more) and the last such tensor is gone, so a stale pointer can fault but
  never meets foreign memory.

Driver behaviour this relies on: one cuMemUnmap may cover several adjacent mappings; memory is freed when its
last mapping and handle are gone; a pointer can be identified (as torch does) only while it is mapped.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch

from weightstore.cuda.driver import Device, api, call
from weightstore.errors import DeviceError
from weightstore.types import align_up


@functools.cache
def _placement(device: Device) -> tuple[Any, Any]:
    """(allocation properties, access descriptor) of ordinary memory on the device."""
    driver = api()
    place = driver.CUmemAllocationProp()
    place.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    place.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    place.location.id = device.ordinal
    access = driver.CUmemAccessDesc()
    access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = device.ordinal
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return place, access


@functools.cache
def granularity(device: Device) -> int:
    """Bytes in which the device reserves and maps memory best (2 MiB on all current GPUs)."""
    flag = api().CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
    with device.current():
        return int(call("cuMemGetAllocationGranularity", _placement(device)[0], flag))


class _Backing:
    """What the driver has given for one image: the addresses, and how much of them is backed by memory."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.device = device
        self.nbytes = nbytes
        self.mapped_bytes = 0
        with device.current():
            self.address = int(call("cuMemAddressReserve", nbytes, 0, 0, 0))

    def unmap(self) -> None:
        """Idempotent."""
        if self.mapped_bytes:
            with self.device.current():
                call("cuMemUnmap", self.address, self.mapped_bytes)
            self.mapped_bytes = 0

    def free(self) -> None:
        if self.mapped_bytes:  # its owner never closed it; work of his may still be touching it
            self.device.synchronize()
            self.unmap()
        with self.device.current():
            call("cuMemAddressFree", self.address, self.nbytes)


class _Range:
    """A reserved address range; what torch keeps alive for as long as a tensor over it lives."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.backing = _Backing(device, nbytes)
        self.address = self.backing.address
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
        }
        # Not at exit: by then the driver may be gone, and the process takes its addresses with it.
        weakref.finalize(self, self.backing.free).atexit = False


class CudaImage:
    """One reserved address range on a CUDA device (see `engine_hooks.backend.Image`)."""

    def __init__(self, device: Device, nbytes: int) -> None:
        """Reserve at least `nbytes` bytes. Maps and unmaps one granule, so that torch can tell whose
        pointer it is.

        Raises:
            DeviceMemoryError: not even a granule (2 MiB) is free.
            DeviceError: the driver refused.
        """
        self._device = device
        self.nbytes = align_up(max(nbytes, 1), granularity(device))
        self._range: _Range | None = _Range(device, self.nbytes)
        self._backing = self._range.backing
        self.address = self._range.address
        self.map_next(granularity(device))
        try:
            self._tensor: torch.Tensor | None = torch.as_tensor(
                self._range, device=torch.device("cuda", device.ordinal)
            )
        finally:
            self.unmap()
        if self._tensor.data_ptr() != self.address:
            raise DeviceError(
                f"torch copied an image instead of aliasing it ({self._tensor.data_ptr():#x} is not "
                f"{self.address:#x}); this torch ({torch.__version__}) cannot be used with CUDA images"
            )

    @property
    def mapped_bytes(self) -> int:
        return self._backing.mapped_bytes

    @property
    def mapped(self) -> bool:
        return self.mapped_bytes == self.nbytes

    def tensor(self) -> torch.Tensor:
        """uint8 tensor of shape (nbytes,) over the whole range; touch its bytes only while mapped."""
        if self._tensor is None:
            raise DeviceError(f"the image at {self.address:#x} is closed")
        return self._tensor

    def map_next(self, nbytes: int) -> tuple[int, int]:
        """Back up to `nbytes` more bytes, a multiple of the granularity, with memory of undefined
        content; return their (start, end) in the image. DeviceMemoryError if there is no memory left.
        """
        start = self.mapped_bytes
        size = min(nbytes, self.nbytes - start)
        place, access = _placement(self._device)
        address = self.address + start
        with self._device.current():
            handle = call("cuMemCreate", size, place, 0)
            try:
                call("cuMemMap", address, size, 0, handle, 0)
            finally:
                call("cuMemRelease", handle)
            try:
                call("cuMemSetAccess", address, size, [access], 1)
            except DeviceError:
                call("cuMemUnmap", address, size)
                raise
        self._backing.mapped_bytes = start + size
        return start, start + size

    def unmap(self) -> None:
        """Give the memory back. The caller has waited for all work that touches it. Idempotent."""
        self._backing.unmap()

    def close(self) -> None:
        """Unmap, and let go of the address once no tensor needs it. Idempotent."""
        self.unmap()
        self._tensor = None
        self._range = None
