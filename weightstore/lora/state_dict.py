"""An adapter's state dict, read: which modules it adapts, and A, B and scale of each.

Understood are PEFT's (``base_model.model.X.lora_A.weight``, with or without an adapter's name, also of
embeddings and convolutions) and diffusers' (``transformer.X.lora_A.weight``, ``X.lora_down.weight``,
``X.alpha``). Everything in it has to be understood: a key that is not a part of a plain LoRA is refused by
name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from weightstore.errors import InvalidTensor, UsageError
from weightstore.lora.config import Scaling

if TYPE_CHECKING:
    import torch

_SHOWN: Final = 6

_KEY: Final = re.compile(
    r"(?P<module>.+)\.(?:"
    r"lora_(?P<letter>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
    r"|lora_embedding_(?P<embedding>[AB])(?:\.(?P<embedding_adapter>[^.]+))?"
    r"|lora[_.](?P<direction>down|up)\.weight"
    r"|(?P<alpha>alpha)"
    r")"
)

_REFUSED: Final = (
    (re.compile(r"lora_magnitude_vector|dora_scale"), "DoRA"),
    (re.compile(r"\.lora_[AB](\.[^.]+)?\.bias$|\.lora[_.](down|up)\.bias$"), "biases of the adapter"),
    (re.compile(r"\.(hada|lokr|oft|glora|ia3)_"), "another method than LoRA"),
    (re.compile(r"^lora_(unet|te\d?)_"), "kohya's names; convert it with diffusers"),
)
_OTHER: Final = "no part of a LoRA; put whole tensors (biases, modules_to_save) with put_many"


class Module(NamedTuple):
    """One adapted module: its weight, ``name`` + ".weight", gets scale · B·A.

    `a` is (rank, in, …), `b` (out, rank, …); of an embedding B·A is (entries, width).
    """

    name: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of B·A."""
        return (self.b.shape[0], *self.a.shape[1:])


class _Found:
    """What a state dict has for one module."""

    def __init__(self) -> None:
        self.a: Any = None
        self.b: Any = None
        self.alpha: Any = None
        self.embedding = False


def read_adapter(
    state_dict: Mapping[str, Any], config: Any, alpha: float | str | None, adapter: str | None
) -> list[Module]:
    """The modules of an adapter's state dict, in its order.

    Args:
        config, alpha: where scales come from; see `config.Scaling`. Alphas in the state dict go before
            `config`'s.
        adapter: which one, if keys name several.

    Raises:
        UsageError: it holds nothing, several adapters, something else than plain LoRA, a half of a pair, or
            nothing tells the scale.
        InvalidTensor: A and B that do not fit together, or are no tensors.
    """
    scaling = Scaling(config, alpha)
    found = _collect(state_dict, adapter)
    halves = [name for name, one in found.items() if one.a is None or one.b is None]
    if halves:
        raise UsageError(f"A or B is missing for {_listed(halves)}", missing=halves)
    if not found:
        raise UsageError("the adapter's state dict is empty; nothing was written")
    modules, unscaled = [], []
    for name, one in found.items():
        a, b = _pair(name, one)
        scale = scaling.scale(_bare(name), a.shape[0], None if one.alpha is None else float(one.alpha))
        if scale is None:
            unscaled.append(name)
        else:
            modules.append(Module(name, a, b, scale))
    if unscaled:
        raise UsageError(
            f"nothing tells the scale of {_listed(unscaled)}: give config= (model.peft_config['default']) or "
            'alpha= (what LoraConfig calls lora_alpha; "rank" for scale 1, as diffusers has it where '
            "a file says nothing)",
            unscaled=unscaled,
        )
    return modules


def _collect(state_dict: Mapping[str, Any], adapter: str | None) -> dict[str, _Found]:
    found: dict[str, _Found] = {}
    refused: dict[str, list[str]] = {}
    adapters: set[str] = set()
    for key, value in state_dict.items():
        match = _KEY.fullmatch(key)
        why = next((why for pattern, why in _REFUSED if pattern.search(key)), "" if match else _OTHER)
        if why or match is None:
            refused.setdefault(why, []).append(key)
            continue
        name = match["adapter"] or match["embedding_adapter"]
        if name is not None:
            adapters.add(name)
            if adapter is not None and name != adapter:
                continue
        one = found.setdefault(match["module"], _Found())
        if match["alpha"]:
            one.alpha = value
        elif match["letter"] == "A" or match["direction"] == "down" or match["embedding"] == "A":
            one.a = value
        else:
            one.b = value
        one.embedding |= match["embedding"] is not None
    if refused:
        kinds = "; ".join(f"{_listed(keys)}: {why}" for why, keys in refused.items())
        raise UsageError(
            f"not a plain LoRA, nothing was written: {kinds}",
            refused=[k for keys in refused.values() for k in keys],
        )
    if adapter is None and len(adapters) > 1:
        raise UsageError(
            f"the state dict holds adapters {', '.join(sorted(adapters))}; choose one with adapter="
        )
    if adapter is not None and adapters and adapter not in adapters:
        raise UsageError(f"the state dict has no adapter {adapter!r}; it holds {', '.join(sorted(adapters))}")
    return found


def _pair(name: str, one: _Found) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B such that B·A is what the weight gets. Raises InvalidTensor."""
    from weightstore.sharding import is_dtensor
    from weightstore.tensors import as_tensor

    if is_dtensor(one.a) or is_dtensor(one.b):
        raise InvalidTensor(
            f"LoRA of {name!r} is sharded, and its sum needs all of it; give the whole, on all ranks: "
            "{name: tensor.full_tensor() for name, tensor in adapter.items()}",
            name=name,
        )
    a, b = as_tensor(f"{name}.lora_A", one.a).detach(), as_tensor(f"{name}.lora_B", one.b).detach()
    if one.embedding:  # F.embedding reads rows of (entries, width), the transpose of what PEFT computes
        a, b = b.T, a.T
    shapes = f"A {list(a.shape)} and B {list(b.shape)}"
    if a.dim() < 2 or b.dim() != a.dim() or a.shape[0] != b.shape[1] or any(n != 1 for n in b.shape[2:]):
        raise InvalidTensor(f"LoRA of {name!r}: {shapes} are not (rank, in, …) and (out, rank, …)", name=name)
    if not (a.is_floating_point() and b.is_floating_point()):
        raise InvalidTensor(
            f"LoRA of {name!r}: A is {a.dtype} and B {b.dtype}; they must be floating", name=name
        )
    return a, b


def _bare(name: str) -> str:
    """The module's name as PEFT's patterns know it: inside the model that was wrapped."""
    from weightstore.names.wrappers import strip_wrappers

    return strip_wrappers(f"{name}.weight", after_component=False).removesuffix(".weight")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
