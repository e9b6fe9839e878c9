"""The one place where a LoRA is added to a weight: weight ← weight + scale · B·A.

The order of operations is PEFT's, product, times scale, plus weight; the sum is rounded to the weight's dtype
once. With dtype float32 the result is what PEFT's `merge` makes of the same tensors.

Invariants, which make the result depend on nothing but the operands, the device and the library:
- products are computed in the dtype asked for, whatever the process allows matmuls to be rounded to
  (`precision`), outside of autocast;
- operands are copied to memory of their own first, so that alignment and strides cannot choose another
  kernel;
- blocks of rows are cut by shape alone.
"""

from __future__ import annotations

from typing import Final

import torch

from weightstore.lora.precision import exact_products

BLOCK: Final = 1 << 22
"""Elements of one block: scratch is this many elements of the dtype (16 MiB for float32), however large the
weight."""


def merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype) -> None:
    """Add scale · B·A to `weight` in place.

    Args:
        weight: (out, in, …), of any floating dtype and stride.
        a: (rank, in, …), on any device.
        b: (out, rank, …), its further dimensions of size 1, on any device.
        dtype: in which to compute.

    Work on a GPU is submitted to the current stream, and not waited for.
    """
    rank = a.shape[0]
    with torch.no_grad(), exact_products(weight.device, dtype):
        a = _operand(a.reshape(rank, -1), weight.device, dtype)
        b = _operand(b.reshape(b.shape[0], rank), weight.device, dtype)
        columns = a.shape[1]
        rows = max(BLOCK // max(columns, 1), 1)
        scratch = torch.empty((min(rows, len(weight)), columns), dtype=dtype, device=weight.device)
        for start in range(0, len(weight), rows):
            some = weight[start : start + rows]
            delta = scratch[: len(some)]
            torch.mm(b[start : start + rows], a, out=delta)
            delta = delta.mul_(scale).view(some.shape)
            # Adding computes in the wider of the two dtypes and rounds to the weight's.
            wide = torch.promote_types(some.dtype, dtype) == dtype
            torch.add(some if wide else some.to(dtype), delta, out=some)


def merged(
    base: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """A copy of `base` on `device`, with its dtype and stride, and scale · B·A added; see `merge`."""
    with torch.no_grad():
        weight = base.to(device, copy=True)
    merge(weight, a, b, scale, dtype)
    return weight


def _operand(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    own = torch.empty(tensor.shape, dtype=dtype, device=device)
    return own.copy_(tensor)
