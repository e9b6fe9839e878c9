"""Models of diffusers and transformers from their configs alone: as `from_pretrained` makes them, on meta.

What a config-only build must get right, because no checkpoint has it: buffers and tables that the
constructor computes (position ids, rotary frequencies), and the dtype of every weight, down to what
a class keeps in float32. So the constructor runs on the CPU under the same default dtype as in
`from_pretrained`, and only its parameters go to the meta device, one by one, as they are registered.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from weightstore.errors import AttachError

DTYPES: Final = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
"""What modules can be built in. Weights of other dtypes are quantised, and need more than their config."""


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within, parameters that this thread registers become meta tensors; the objects, and so ties, stay."""
    thread = threading.get_ident()
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is None or param.device.type == "meta" or threading.get_ident() != thread:
            return
        meta = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
        meta.__class__ = type(param)
        meta.__dict__.update(param.__dict__)
        torch.utils.swap_tensors(param, meta)  # type: ignore[no-untyped-call]

    nn.Module.register_parameter = registered  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(name: str, kind: type[nn.Module], directory: Path, dtype: torch.dtype) -> nn.Module:
    """The model of class `kind` whose config lies in `directory`, as `from_pretrained` would build it.

    Args:
        name: what to call it in an error: the component.

    Raises:
        AttachError: a model that its config alone does not determine: quantised, or of another library.
    """
    if dtype not in DTYPES:
        raise AttachError(
            f"{name} cannot be built in {dtype}: such weights are quantised, and a config does not say how; "
            "build it with from_pretrained and use attach_pipeline",
            components=[name],
        )
    how = _library(kind)
    if how is None:
        raise AttachError(
            f"{name} is a {kind.__module__}.{kind.__name__}, which is neither a model of diffusers nor of "
            f"transformers and cannot be built from a config; build it yourself: components={{{name!r}: …}}",
            components=[name],
        )
    return how(name, kind, directory, dtype)


def _library(kind: type[nn.Module]) -> Callable[[str, Any, Path, torch.dtype], nn.Module] | None:
    import diffusers
    import transformers

    if issubclass(kind, diffusers.ModelMixin):
        return _diffusers
    return _transformers if issubclass(kind, transformers.PreTrainedModel) else None


def _diffusers(name: str, kind: Any, directory: Path, dtype: torch.dtype) -> nn.Module:
    config = kind.load_config(str(directory), local_files_only=True)
    _refuse_quantised(name, config.get("quantization_config"))
    with default_dtype(dtype), parameters_on_meta():
        module: Any = kind.from_config(config)
    kept = kind._keep_in_fp32_modules or []
    parts = {kept} if isinstance(kept, str) else set(kept)
    _cast(module, dtype, lambda path: not parts.isdisjoint(path.split(".")))
    module.register_to_config(_name_or_path=str(directory))
    done: nn.Module = module.eval()
    return done


def _transformers(name: str, kind: Any, directory: Path, dtype: torch.dtype) -> nn.Module:
    config = kind.config_class.from_pretrained(str(directory), local_files_only=True)
    _refuse_quantised(name, getattr(config, "quantization_config", None))
    config.name_or_path = str(directory)
    with parameters_on_meta():
        module: Any = kind._from_config(config, dtype=dtype)
    # Some are kept in float32 because float16 overflows, some whatever the half precision is.
    patterns = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if dtype is torch.float16:
        patterns |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    kept = re.compile("|".join(pattern.replace("*", ".*") for pattern in sorted(patterns)))
    _cast(module, dtype, lambda path: bool(patterns) and kept.search(path) is not None)
    if module.can_generate() and (directory / "generation_config.json").is_file():
        from transformers import GenerationConfig

        module.generation_config = GenerationConfig.from_pretrained(str(directory), local_files_only=True)
    done: nn.Module = module.eval()
    return done


def _refuse_quantised(name: str, config: object) -> None:
    if config:
        raise AttachError(
            f"{name} is quantised (its config has a quantization_config), and what its weights are only its "
            f"loader knows; leave it to from_pretrained and out of the store: skip=[{name!r}]",
            components=[name],
        )


def _cast(module: nn.Module, dtype: torch.dtype, in_float32: Callable[[str], bool]) -> None:
    """Give whatever a checkpoint has the dtype that loading it would; other buffers stay as computed."""
    for path, tensor in module.state_dict(keep_vars=True).items():
        wanted = torch.float32 if in_float32(path) else dtype
        if tensor.is_floating_point() and tensor.dtype is not wanted:
            tensor.data = tensor.data.to(wanted)
