"""Matrix products in the precision of their dtype, whatever this process otherwise allows.

Trainers and engines let float32 products be rounded to TF32 or bfloat16, and half-precision sums be kept in
half precision, by flags of the whole process. Two processes that are to compute the same bits must agree on
them, so they are set for the moment and put back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch

_SETTING: Final = threading.RLock()
"""Held while the flags are changed: of two threads one would put back what the other had set."""

_REDUCED: Final = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@contextmanager
def exact_products(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within the block products of `dtype` on `device` are not rounded to anything less.

    The flags are the process's: products that other threads compute meanwhile are as exact, and slower.
    """
    with _SETTING, ExitStack() as undo:
        undo.enter_context(torch.autocast(device.type, enabled=False))
        if dtype is torch.float32:
            _full_float32(undo, device)
        elif device.type == "cuda" and dtype in _REDUCED:
            _full_sums(undo, _REDUCED[dtype])
        yield


def _full_float32(undo: ExitStack, device: torch.device) -> None:
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    flags = getattr(backend, "matmul", None)
    # torch 2.9 has a flag for each backend, and refuses questions by the older name once somebody used the
    # newer.
    if hasattr(flags, "fp32_precision"):
        _set(undo, flags, "fp32_precision", "ieee")
    else:
        undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")


def _full_sums(undo: ExitStack, short: str) -> None:
    flags = torch.backends.cuda.matmul
    name = f"allow_{short}_reduced_precision_reduction"
    before: Any = getattr(flags, name)
    if hasattr(flags, f"{name}_split_k"):
        before = (before, getattr(flags, f"{name}_split_k"))
    undo.callback(setattr, flags, name, before)
    setattr(flags, name, False)
    if short == "fp16" and hasattr(flags, "allow_fp16_accumulation"):
        _set(undo, flags, "allow_fp16_accumulation", False)


def _set(undo: ExitStack, flags: Any, name: str, value: Any) -> None:
    undo.callback(setattr, flags, name, getattr(flags, name))
    setattr(flags, name, value)
