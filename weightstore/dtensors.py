"""What a DTensor says of itself: which elements of the whole lie on this rank, and who else has them.

Invariant: a placement that is not understood to the element is refused by name, never guessed at.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from weightstore.errors import InvalidTensor
from weightstore.sharding import Split, pieces_of, slices
from weightstore.tensors import as_tensor, dtype_name
from weightstore.types import Box


class Holding(NamedTuple):
    """What this rank has of a tensor of `shape` and `dtype` (`stride` in the whole, in elements).

    `parts` are boxes with their elements. All of `replicas` ranks have the very same; this is number
    `replica` of them.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    parts: list[tuple[Box, torch.Tensor]]
    replica: int = 0
    replicas: int = 1


def holding_of(name: str, tensor: Any) -> Holding:
    """What this rank has of a DTensor. Its collectives under way are waited for; none is begun.

    Raises:
        InvalidTensor: a placement whose elements are not values of the whole tensor (Partial), or that is
            unknown; a local shard that is not what the placements say.
    """
    shape, stride, mesh = tuple(tensor.shape), tuple(tensor.stride()), tensor.device_mesh
    dtype = dtype_name(name, tensor.dtype)
    splits = [_split_of(name, placement, len(shape)) for placement in tensor.placements]
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this rank is not in the mesh
        return Holding(shape, stride, dtype, [])
    sizes = tuple(mesh.shape)
    with torch.no_grad():
        local = tensor.to_local()
        local = local.wait() if hasattr(local, "wait") else local
    local = as_tensor(name, local)
    pieces = pieces_of(shape, sizes, coordinate, splits)
    replica, replicas = 0, 1
    for size, rank, split in zip(sizes, coordinate, splits, strict=True):
        if split is None:
            replica, replicas = replica * size + rank, replicas * size
    if 0 in shape:
        parts = [(piece.box, local.new_empty(shape)) for piece in pieces]
        return Holding(shape, stride, dtype, parts, replica, replicas)
    parts = [(piece.box, local[slices(piece.within())]) for piece in pieces]
    if any(part.numel() != box.numel for box, part in parts) or local.numel() != sum(
        b.numel for b, _ in parts
    ):
        raise InvalidTensor(
            f"tensor {name!r}: this rank holds {list(local.shape)} of {list(shape)}, which is not what "
            f"{list(tensor.placements)} on a mesh {list(sizes)} at {list(coordinate)} gives it; distribute "
            "it with torch.distributed.tensor, or write it with put_part",
            name=name,
        )
    return Holding(shape, stride, dtype, parts, replica, replicas)


def _split_of(name: str, placement: Any, dims: int) -> Split | None:
    kind = type(placement).__name__
    if kind == "Replicate":
        return None
    if kind in ("Shard", "_StridedShard"):
        return Split(placement.dim % dims, int(getattr(placement, "split_factor", 1)))
    what = "its values are not summed up yet" if placement.is_partial() else "of a kind unknown here"
    raise InvalidTensor(
        f"tensor {name!r} is placed as {placement!r}, {what}; redistribute it to Shard or Replicate first",
        name=name,
    )
