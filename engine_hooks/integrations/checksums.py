"""Checksums of what an engine holds, as SGLang Diffusion defines them, so that its clients can compare.

A module's is the SHA-256 of its parameters in the order of their names, each as its name and its bytes. A
tensor's is the SHA-256 of its dtype, its shape and its bytes. Bytes are those of the contiguous tensor, so
memory order does not matter. (Source: sglang 0.5.23, `multimodal_gen/runtime/loader/weight_utils.py` and
`multimodal_gen/runtime/post_training/tensor_update_checker.py`.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from engine_hooks.find import unwrap


def module_checksum(module: nn.Module) -> str:
    """Of the parameters, on whatever device; tied ones count once, buffers do not. As hexadecimal digits."""
    total = hashlib.sha256()
    for name, parameter in sorted(unwrap(module).named_parameters(), key=lambda pair: pair[0]):
        total.update(name.encode())
        total.update(_bytes(parameter))
    return total.hexdigest()


def tensor_checksum(tensor: Tensor) -> str:
    """Of one tensor, as hexadecimal digits."""
    total = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)!r}".encode())
    total.update(_bytes(tensor))
    return total.hexdigest()


def tensor_checksums(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Of those of a module's parameters and buffers that are named; others of the names are left out."""
    inner = unwrap(module)
    tensors = dict(inner.named_buffers(remove_duplicate=False))
    tensors.update(inner.named_parameters(remove_duplicate=False))
    return {name: tensor_checksum(tensors[name]) for name in names if name in tensors}


def _bytes(tensor: Tensor) -> Any:
    """A tensor's bytes in the order of its elements: an array on the host, copied only where it has to be."""
    with torch.no_grad():
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy()
