"""Modules from their configs alone. That they equal those of from_pretrained, the pipelines' tests say."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from tiny_pipelines import build as pipeline
from torch import nn

from engine_hooks.integrations.from_config import build, default_dtype, parameters_on_meta
from weightstore.errors import AttachError


def test_parameters_are_on_meta_and_buffers_are_not() -> None:
    with parameters_on_meta():
        module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert all(parameter.is_meta for parameter in module.parameters())
    assert torch.equal(module[1].running_var, torch.ones(3))
    assert not nn.Linear(2, 2).weight.is_meta


def test_objects_ties_and_flags_stay() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Parameter(torch.ones(4, 3).t(), requires_grad=False)
            self.own.mark = "kept"  # type: ignore[attr-defined]
            shared = nn.Parameter(torch.ones(2))
            self.first, self.second, self.none = shared, shared, None
            self.kept = [shared]

    with parameters_on_meta():
        module = Tied()
    assert module.first is module.second is module.kept[0]
    assert module.own.is_meta
    assert (module.own.stride(), module.own.requires_grad, module.own.mark) == ((1, 3), False, "kept")


def test_other_threads_build_as_ever() -> None:
    built: list[nn.Module] = []
    with parameters_on_meta():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
    assert not built[0].weight.is_meta


def test_a_constructor_that_fails_leaves_all_as_it_was() -> None:
    register = nn.Module.register_parameter
    with pytest.raises(ZeroDivisionError), default_dtype(torch.bfloat16), parameters_on_meta():
        raise ZeroDivisionError
    assert nn.Module.register_parameter is register
    assert torch.get_default_dtype() is torch.float32


def test_tied_encoders_are_tied(tmp_path: Path) -> None:
    encoder = pipeline("flux").text_encoder_2
    encoder.config.save_pretrained(tmp_path)
    built = build("text_encoder_2", type(encoder), tmp_path, torch.bfloat16)
    assert built.shared.weight is built.encoder.embed_tokens.weight
    assert {parameter.dtype for parameter in built.parameters()} == {torch.bfloat16}
    assert not built.training


def test_how_a_model_generates_is_read(tmp_path: Path) -> None:
    encoder = pipeline("qwen-image").text_encoder
    encoder.generation_config.max_new_tokens = 17
    encoder.config.save_pretrained(tmp_path)
    encoder.generation_config.save_pretrained(tmp_path)
    built = build("text_encoder", type(encoder), tmp_path, torch.float32)
    assert built.generation_config.max_new_tokens == 17


@pytest.mark.parametrize(
    ("kind", "dtype", "reason"),
    [
        (nn.Linear, torch.float32, "is neither a model of diffusers nor of transformers"),
        (nn.Linear, torch.float8_e4m3fn, "cannot be built in torch.float8_e4m3fn"),
    ],
)
def test_what_no_config_says_is_refused(
    tmp_path: Path, kind: type[nn.Module], dtype: torch.dtype, reason: str
) -> None:
    with pytest.raises(AttachError, match=reason) as caught:
        build("part", kind, tmp_path, dtype)
    assert caught.value.details == {"components": ["part"]}
