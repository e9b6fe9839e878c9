"""What a trainer holds, as specs: state dicts, modules and spec lists, whatever the tensors in them are.

Only names, dtypes and shapes are looked at, so tensors may be on meta or sharded (a DTensor's shape is that
of the whole tensor).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from weightstore.errors import InvalidTensor
from weightstore.names.rows import Given
from weightstore.types import ITEMSIZE, TensorSpec


def given_of(tensors: Any, prefix: str = "") -> list[Given]:
    """`tensors` is a state dict, pairs of name and tensor, an `nn.Module`, or TensorSpecs.

    Raises:
        InvalidTensor: something that is no tensor, or of a dtype that the store does not hold.
    """
    torch = sys.modules.get("torch")  # whoever has a module or a tensor has imported it
    items: Iterable[Any]
    if torch is not None and isinstance(tensors, torch.nn.Module):
        from weightstore.sources import module_tensors

        items = module_tensors(tensors)
    else:
        items = tensors.items() if isinstance(tensors, Mapping) else tensors
    return [Given(prefix + each.name, each.dtype, each.shape) for each in _described(items)]


def _described(items: Iterable[Any]) -> Iterator[Given]:
    for item in items:
        if isinstance(item, (TensorSpec, Given)):
            yield Given(item.name, item.dtype, tuple(item.shape))
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
            yield describe(*item)
        else:
            raise InvalidTensor(
                f"{type(item).__name__} {str(item)[:60]!r} is neither a TensorSpec nor a name with its tensor"
            )


def describe(name: str, value: Any) -> Given:
    """Name, dtype and shape of one tensor, array or spec.

    Raises:
        InvalidTensor: neither, or of a dtype that the store does not hold.
    """
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        raise InvalidTensor(
            f"tensor {name!r} is a {type(value).__name__}; give a torch tensor, an array or a TensorSpec",
            name=name,
        )
    # torch.float32, numpy's dtype('float32') and the store's own "float32" all end in its name.
    known = str(getattr(dtype, "name", dtype)).removeprefix("torch.")
    if known not in ITEMSIZE:
        raise InvalidTensor(
            f"tensor {name!r} has dtype {known}; the store holds {', '.join(sorted(ITEMSIZE))}",
            name=name,
            dtype=known,
        )
    return Given(name, known, tuple(int(size) for size in shape))
