"""A version's tensors, read in place through a lease.

Invariants:
- a snapshot shows one version; once its lease has moved on, ended, is parked or torn, asking it for a tensor
  raises instead of showing bytes that may change;
- nothing is copied: tensors and arrays lie in the arena and keep its pages mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from weightstore.errors import UnknownTensor
from weightstore.mapping import ArenaMapping
from weightstore.types import TensorRecord

if TYPE_CHECKING:
    import numpy as np
    import torch

NUMPY_NAMES: Final = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
"""Dtypes numpy lacks, and the unsigned integers their bits are shown as."""


class Snapshot(Mapping[str, "torch.Tensor"]):
    """One version's tensors by name, read in place: zero copies, in memory the kernel keeps read-only.

    Writing to a tensor of a snapshot ends the process with SIGSEGV; clone it first.

    Attributes:
        model, version: what it shows.
        records: every tensor's dtype, shape, stride (elements) and place (bytes), in the store's order.
    """

    def __init__(
        self,
        model: str,
        version: int,
        records: Mapping[str, TensorRecord],
        mapping: ArenaMapping,
        require_readable: Callable[[int], None],
    ) -> None:
        """`require_readable(version)` raises once the bytes may no longer be read."""
        self.model = model
        self.version = version
        self.records = records
        self._mapping = mapping
        self._require_readable = require_readable

    @property
    def names(self) -> list[str]:
        return list(self.records)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor as torch sees it. Raises UnknownTensor, LeaseLost, TagTorn, UsageError (parked)."""
        from weightstore.tensors import tensor_of

        return tensor_of(self._mapping, self._record(name))

    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """The tensor as an array with ``writeable=False``; bfloat16 as uint16, fp8 as uint8 bits."""
        import numpy as np

        record = self._record(name)
        dtype = np.dtype(NUMPY_NAMES.get(record.dtype, record.dtype))
        array: np.ndarray[Any, Any] = np.ndarray(
            record.shape,
            dtype,
            self._mapping.buffer,
            record.offset,
            tuple(step * dtype.itemsize for step in record.stride),
        )
        array.flags.writeable = False
        return array

    def __contains__(self, name: object) -> bool:
        return name in self.records

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    # Snapshots are compared as objects: comparing them as mappings would read every weight.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<Snapshot of {self.model!r} version {self.version}, {len(self.records)} tensors>"

    def _record(self, name: str) -> TensorRecord:
        self._require_readable(self.version)
        record = self.records.get(name)
        if record is None:
            raise UnknownTensor(
                f"version {self.version} of {self.model!r} has no tensor {name!r}; `names` lists its "
                f"{len(self.records)}",
                model=self.model,
                version=self.version,
                name=name,
            )
        return record
