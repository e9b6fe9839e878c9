"""SGLang Diffusion's plugin: its own logic here, the real engine in `test_integration_sglang_engine`.

A worker here is a stand-in with real modules, bound by a real hook to a real store; what SGLang would do is
passed in, as it passes it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hooked import Faulty
from torch import nn

from engine_hooks.hook import EngineHook
from engine_hooks.integrations import sglang_diffusion
from engine_hooks.integrations.sglang_diffusion import derived, engine, loading, ownership, plugin, targets
from engine_hooks.integrations.sglang_diffusion.names import Example, name_map
from engine_hooks.integrations.sglang_diffusion.settings import Settings, settings
from engine_hooks.lifecycle import State
from weightstore import Store
from weightstore.errors import AttachError, UsageError
from weightstore.local import local_store
from weightstore.names.router import Router

CPU = torch.device("cpu")


# -- names -----------------------------------------------------------------------------------------


def renamed(pairs: dict[str, str], layers: int) -> list[Example]:
    """Examples of renames, `#` standing for the number of each layer in turn."""
    return [
        Example(f"transformer.{source.replace('#', str(i))}", f"transformer.{target.replace('#', str(i))}")
        for i in range(layers)
        for source, target in pairs.items()
    ]


def joined(sources: list[str], target: str, layers: int, rows: list[int]) -> list[Example]:
    return [
        Example(
            f"transformer.{source.replace('#', str(i))}",
            f"transformer.{target.replace('#', str(i))}",
            piece,
            len(sources),
            rows[piece],
        )
        for i in range(layers)
        for piece, source in enumerate(sources)
    ]


WAN = {
    "patch_embedding.weight": "patch_embedding.proj.weight",
    "condition_embedder.time_embedder.linear_1.weight": "condition_embedder.time_embedder.mlp.fc_in.weight",
    "blocks.#.attn1.to_q.weight": "blocks.#.to_q.weight",
    "blocks.#.attn1.to_q.bias": "blocks.#.to_q.bias",
    "blocks.#.attn1.to_out.0.weight": "blocks.#.to_out.weight",
    "blocks.#.attn2.to_out.0.weight": "blocks.#.attn2.to_out.weight",
    "blocks.#.ffn.net.0.proj.weight": "blocks.#.ffn.fc_in.weight",
    "blocks.#.ffn.net.2.weight": "blocks.#.ffn.fc_out.weight",
    "blocks.#.norm2.weight": "blocks.#.self_attn_residual_norm.norm.weight",
    "blocks.#.attn2.to_q.weight": "blocks.#.attn2.to_q.weight",
    "scale_shift_table": "scale_shift_table",
}
"""What SGLang's loader makes of some of Wan2.1's names."""


def test_layers_share_a_rule_and_what_keeps_its_name_has_none() -> None:
    names = name_map(renamed(WAN, layers=30))
    assert len(names.rules) == 8
    routes = Router(names)
    assert routes.route("transformer.blocks.7.attn1.to_q.bias").targets == ("transformer.blocks.7.to_q.bias",)
    assert routes.route("transformer.blocks.0.attn1.to_out.0.weight").targets == (
        "transformer.blocks.0.to_out.weight",
    )
    assert routes.route("transformer.blocks.2.ffn.net.2.weight").targets == (
        "transformer.blocks.2.ffn.fc_out.weight",
    )
    for untouched in ("transformer.scale_shift_table", "vae.blocks.7.attn1.to_q.bias"):
        assert routes.route(untouched) == (untouched, (untouched,), (), None, 0, ())


def test_trainers_wrappers_are_still_taken_off() -> None:
    names = name_map(renamed(WAN, layers=2))
    given = "transformer._fsdp_wrapped_module.blocks.1.attn1.to_q.base_layer.weight"
    assert Router(names).route(given).targets == ("transformer.blocks.1.to_q.weight",)


def test_joined_tensors_become_fuse_rules_in_their_order() -> None:
    pieces = [f"transformer_blocks.#.attn.add_{x}_proj.weight" for x in "qkv"]
    other = [name.replace("weight", "bias") for name in pieces]
    examples = joined(pieces, "transformer_blocks.#.attn.to_added_qkv.weight", 3, [8, 8, 8])
    examples += joined(other, "transformer_blocks.#.attn.to_added_qkv.bias", 3, [8, 8, 8])
    names = name_map(reversed(examples))
    (rule,) = names.rules
    assert rule.into == "transformer.transformer_blocks.*.attn.to_added_qkv"  # type: ignore[union-attr]
    assert Router(names).route("transformer.transformer_blocks.2.attn.add_v_proj.bias").piece == 2


def test_only_the_attention_that_was_joined_is() -> None:
    """SANA joins q, k and v of attn1, and k and v of attn2."""
    first = joined([f"b.#.attn1.to_{x}.weight" for x in "qkv"], "b.#.attn1.to_qkv.weight", 2, [4, 4, 4])
    second = joined([f"b.#.attn2.to_{x}.weight" for x in "kv"], "b.#.attn2.to_kv.weight", 2, [4, 4])
    routes = Router(
        name_map([*first, *second, *renamed({"b.#.attn2.to_q.weight": "b.#.attn2.to_q.weight"}, 2)])
    )
    assert routes.route("transformer.b.1.attn2.to_q.weight").targets == ("transformer.b.1.attn2.to_q.weight",)
    assert routes.route("transformer.b.1.attn2.to_v.weight").piece == 1
    assert routes.route("transformer.b.1.attn1.to_v.weight").piece == 2


def test_unequal_pieces_declare_their_proportion() -> None:
    names = name_map(
        joined(["l.#.q.weight", "l.#.k.weight", "l.#.mlp.weight"], "l.#.qkv_mlp.weight", 2, [8, 4, 24])
    )
    assert names.rules[0].shares == (2, 1, 6)  # type: ignore[union-attr]


def test_what_became_nothing_is_dropped_in_every_layer() -> None:
    names = name_map([Example(f"transformer.blocks.{i}.attn2.norm_added_q.weight", None) for i in range(3)])
    assert len(names.rules) == 1
    assert Router(names).route("transformer.blocks.2.attn2.norm_added_q.weight").targets == ()


def test_where_numbers_mislead_the_name_gets_a_rule_of_its_own() -> None:
    """What the first example leaves open would say something else of the second."""
    examples = [Example("t.a.5.y.5.w", "t.b.5.w"), Example("t.a.3.y.5.w", "t.b.7.w")]
    routes = Router(name_map(examples))
    assert [routes.route(example.source).targets for example in examples] == [("t.b.5.w",), ("t.b.7.w",)]


def test_contradictions_and_missing_pieces_are_refused() -> None:
    with pytest.raises(UsageError, match="no name map"):
        name_map([Example("t.a.w", "t.b.w"), Example("t.a.w", "t.c.w")])
    with pytest.raises(UsageError, match=r"3 pieces, of which the checkpoint has t\.q"):
        name_map([Example("t.q", "t.qkv", 0, 3, 4)])


def test_a_trainer_writes_the_checkpoints_names_without_knowing_the_engine(store: Store) -> None:
    """The map travels with the model; q, k and v land where the engine's joined weight has them."""
    with store.refit("m") as refit:
        refit.put("transformer.b.0.to_qkv.weight", torch.zeros(12, 4))
    examples = joined([f"b.#.attn.to_{x}.weight" for x in "qkv"], "b.#.to_qkv.weight", 1, [4, 4, 4])
    store.publish_names("m", name_map(examples))
    pieces = [torch.randn(4, 4) for _ in "qkv"]
    with store.refit("m") as refit:
        for x, piece in zip("qkv", pieces, strict=True):
            refit.put(f"transformer.b.0.attn.to_{x}.weight", piece)
    with store.lease("m") as snapshot:
        assert torch.equal(snapshot["transformer.b.0.to_qkv.weight"], torch.cat(pieces))


# -- whose memory it is ------------------------------------------------------------------------------


class Arguments:
    """SGLang's server arguments, as far as the plugin asks."""

    use_fsdp_inference = False

    def __init__(self, fsdp: tuple[str, ...] = (), **modes: str) -> None:
        self.modes, self.fsdp = modes, fsdp

    def residency_mode(self, name: str) -> str:
        return self.modes.get(name, "resident")

    def should_use_fsdp_for_component(self, name: str) -> bool:
        return name in self.fsdp


def left(modules: dict[str, nn.Module], arguments: Arguments | None = None, tp: int = 1) -> dict[str, str]:
    return ownership.left_to_sglang(modules, arguments or Arguments(), CPU, tp)


def test_resident_modules_are_the_stores() -> None:
    assert left({"transformer": nn.Linear(2, 2), "vae": nn.Conv2d(1, 1, 1)}) == {}


def test_modules_that_sglang_moves_are_left_to_it_with_the_reason() -> None:
    layerwise, snapshot = nn.Linear(2, 2), nn.Linear(2, 2)
    layerwise.layerwise_offload_managers = [SimpleNamespace(enabled=True)]  # type: ignore[assignment]
    snapshot._offload_weight_snapshot = {}  # type: ignore[assignment]

    class FSDPModule:
        pass

    class Sharded(FSDPModule, nn.Linear):
        pass

    found = left(
        {
            "transformer": layerwise,
            "vae": snapshot,
            "transformer_2": Sharded(2, 2),
            "text_encoder": nn.Linear(2, 2),
            "text_encoder_2": nn.Linear(2, 2),
            "image_encoder": nn.Linear(2, 2),
        },
        Arguments(
            fsdp=("image_encoder",), text_encoder="component-offload", text_encoder_2="snapshot-offload"
        ),
    )
    assert found == {
        "transformer": "is under layerwise-offload",
        "vae": "is under snapshot-offload",
        "transformer_2": "is sharded by FSDP",
        "text_encoder": "is under component-offload",
        "text_encoder_2": "is under snapshot-offload",
        "image_encoder": "is sharded by FSDP",
    }


def test_a_model_that_reads_its_checkpoint_again_is_left() -> None:
    class Rereads(nn.Linear):
        def validate_weight_update_source(self, *, weights_path: str | None) -> None:
            if weights_path is None:
                raise ValueError("no directory")

    assert left({"transformer": Rereads(2, 2)}) == {
        "transformer": "takes no weights from memory: no directory"
    }
    assert loading.computed(Rereads(2, 2)) == "its model takes no weights from memory: no directory"


def test_disabled_layerwise_offload_is_none() -> None:
    module = nn.Linear(2, 2)
    module.layerwise_offload_managers = [SimpleNamespace(enabled=False)]  # type: ignore[assignment]
    assert left({"transformer": module}) == {}


def test_what_cannot_lie_in_an_image_is_left() -> None:
    sparse = nn.Linear(2, 2)
    sparse.weight = nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False)
    shared = nn.Linear(2, 2)
    found = left({"a": sparse, "b": nn.ReLU(), "c": shared, "d": shared})
    assert (
        "layout" in found["a"] and found["b"] == "has no weights" and found["d"] == "is the same module as c"
    )
    assert "c" not in found
    with_lora = Arguments()
    with_lora.lora_path = "adapter"  # type: ignore[attr-defined]
    assert left({"transformer_2": nn.Linear(2, 2), "vae": nn.Linear(2, 2)}, with_lora) == {
        "transformer_2": "has a LoRA from the command line merged into it"
    }
    assert left({"c": shared}, tp=2) == {"c": "is divided among 2 tensor parallel ranks"}
    elsewhere = ownership.left_to_sglang({"c": shared}, Arguments(), torch.device("cuda:0"), 1)
    assert elsewhere["c"].startswith("is not on cuda:0: c.weight is on cpu")


# -- what was derived --------------------------------------------------------------------------------


class Norm(nn.LayerNorm):
    """As SGLang's FP32LayerNorm keeps its copies."""

    def cached(self) -> torch.Tensor:
        key = (self.weight.data_ptr(), self.weight._version, self.weight.device, CPU, self.weight.dtype)
        kept = vars(self).get("_weight_fp32_cache")
        if kept is None or kept[0] != key:
            vars(self)["_weight_fp32_cache"] = (key, self.weight.detach().float())
        return vars(self)["_weight_fp32_cache"][1]


def test_fp32_norms_are_renewed_where_they_are() -> None:
    norm = Norm(4).to(torch.bfloat16)
    with torch.inference_mode():
        copy = norm.cached()
    with torch.no_grad():
        norm.weight.fill_(3.0)
    assert derived.renew_fp32_norms(nn.Sequential(norm)) == 1
    assert norm.cached() is copy and copy.tolist() == [3.0] * 4


def test_only_what_changed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Model(nn.Linear):
        def refresh_weight_derived_caches(self, *, weights_path: str | None) -> None:
            told.append(("caches", self.in_features, weights_path))

        def reset_teacache_state(self) -> None:
            told.append(("steps", self.in_features))

    monkeypatch.setattr(derived, "forget_conditioning", lambda: told.append("conditioning"))
    modules = {"transformer": Model(1, 1), "vae": Model(2, 2)}
    derived.renew(modules, [])
    assert told == []
    derived.renew(modules, ["vae.weight", "vae.bias"])
    assert told == ["conditioning", ("caches", 2, None), ("steps", 2)]


# -- a transformer without its files -----------------------------------------------------------------


class Transformer(nn.Module):
    """Two layers and a buffer, under the names of SGLang's kind: `to_qkv` where checkpoints have three."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(4, 12)
        self.out = nn.Linear(12, 2)
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.to_qkv(x))


def mapped(name: str) -> tuple[str | None, int | None, int | None]:
    """As SGLang's own for such a model."""
    found = re.fullmatch(r"to_([qkv])\.(weight|bias)", name)
    if found:
        return f"to_qkv.{found[2]}", "qkv".index(found[1]), 3
    return ("", None, None) if name == "junk" else (name, None, None)


def checkpoint(model: Transformer) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in model.state_dict().items():
        if name.startswith("to_qkv"):
            for x, piece in zip("qkv", tensor.chunk(3), strict=True):
                yield name.replace("qkv", x), piece
        else:
            yield name, tensor
    yield "junk", torch.zeros(())


def load(model: nn.Module, weights: Any, *args: Any, **kwargs: Any) -> str:
    """SGLang's own load, as far as it matters: it reads everything and assigns."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        target, _, _ = kwargs["param_names_mapping"](name)
        if target:
            state[target] = torch.cat([state[target], tensor]) if target in state else tensor
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return "read"


def worker_of(modules: dict[str, nn.Module], **arguments: str) -> Any:
    class Worker:
        def __init__(self) -> None:
            self.rank = 0
            self.server_args = Arguments(**arguments)
            self.pipeline = SimpleNamespace(modules=modules, is_lora_merged={})

    return Worker()


@pytest.fixture
def store() -> Iterator[Store]:
    with local_store("32MiB", window="4MiB") as running:
        yield running


@pytest.fixture
def made(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[plugin.Plugin]:
    monkeypatch.setattr(plugin, "_modules", lambda pipeline: pipeline.modules)
    monkeypatch.setattr(plugin, "_device", lambda: CPU)
    monkeypatch.setattr(plugin, "unhooked", lambda worker: [])
    monkeypatch.setattr(plugin, "_tensor_parallel", lambda: 1)
    monkeypatch.setattr(derived, "forget_conditioning", lambda: None)
    made = plugin.Plugin(Settings("m", "latest", store.socket))
    yield made
    if made._opened is not None:  # a worker's stays until its process ends
        made._opened.close()


def start(made: plugin.Plugin, reference: Transformer, weights: Any, **arguments: str) -> Any:
    """A worker that builds its pipeline as SGLang does: each component by `load_component`."""
    with torch.device("meta"):
        model = Transformer()
    modules: dict[str, nn.Module] = {"transformer": model, "vae": nn.Linear(3, 3)}
    worker = worker_of(modules, **arguments)

    def build(worker: Any) -> None:
        def component(name: str, path: str, library: str, server_args: Any) -> Any:
            if name == "transformer":
                return made.load_weights(load, model, weights, CPU, param_names_mapping=mapped)
            return None

        for name in modules:
            made.load_component(component, name, "path", "diffusers", worker.server_args)

    made.init_device_and_model(build, worker)
    return worker


def never() -> Iterator[tuple[str, torch.Tensor]]:
    raise AssertionError("a file was opened")
    yield


def test_the_first_engine_reads_its_files_and_publishes(made: plugin.Plugin, store: Store) -> None:
    reference = Transformer()
    worker = start(made, reference, checkpoint(reference))
    assert made.engine_of(worker).hook.attached.published
    model = worker.pipeline.modules["transformer"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    names = store.names("m")
    assert names is not None
    with store.refit("m", components=["transformer"]) as refit:
        refit.put_many({f"transformer.{name}": tensor for name, tensor in checkpoint(Transformer())})


def test_the_next_engine_reads_none(made: plugin.Plugin, store: Store) -> None:
    reference = Transformer()
    start(made, reference, checkpoint(reference))
    again = start(made, reference, never())
    model = again.pipeline.modules["transformer"]
    x = torch.randn(3, 4)
    assert torch.equal(model(x), reference(x))
    assert torch.equal(model.table, reference.table)
    hook = made.engine_of(again).hook
    assert not hook.attached.published and hook.verify().differing == ()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_the_store_has_otherwise_is_read_and_then_refused_by_name(
    made: plugin.Plugin, store: Store
) -> None:
    with store.refit("m") as refit:
        refit.put("transformer.other", torch.zeros(2))
        refit.put("vae.weight", torch.zeros(3, 3))
        refit.put("vae.bias", torch.zeros(3))
    reference = Transformer()
    with pytest.raises(AttachError, match=r"transformer\.to_qkv"):
        start(made, reference, checkpoint(reference))


def test_a_model_without_any_of_the_engines_modules_is_refused(made: plugin.Plugin, store: Store) -> None:
    with store.refit("m") as refit:
        refit.put("unet.weight", torch.zeros(2))
    reference = Transformer()
    with pytest.raises(AttachError, match="none of this engine's modules"):
        start(made, reference, checkpoint(reference))


def test_offloaded_modules_are_read_and_left(
    made: plugin.Plugin, store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_controller", lambda worker, modules: Controller(modules))
    reference = Transformer()
    start(made, reference, checkpoint(reference))
    with caplog.at_level(logging.WARNING):
        worker = start(made, reference, checkpoint(reference), transformer="layerwise-offload")
    assert "left to SGLang: transformer is under layerwise-offload" in caplog.text
    assert set(made.engine_of(worker).hook.modules) == {"vae"}
    assert not worker.pipeline.modules["transformer"].out.weight.is_meta


def test_quantised_layers_are_read_from_files(store: Store) -> None:
    model = Transformer()
    assert loading.computed(model) is None
    model.out.quant_method = SimpleNamespace()  # type: ignore[assignment]
    assert loading.computed(model) == "out is quantised by SimpleNamespace"


def test_placeholders_take_no_memory_and_keep_what_parameters_carry() -> None:
    with torch.device("meta"):
        model = nn.Linear(1 << 20, 1 << 20)
    model.weight.weight_loader = "loader"  # type: ignore[attr-defined]
    loading.fill_with_placeholders(model, CPU)
    weight = model.weight
    assert weight.device == CPU and weight.untyped_storage().nbytes() == 4
    assert weight.weight_loader == "loader"  # type: ignore[attr-defined]
    loading.to_meta(model)
    assert model.weight is weight and weight.is_meta and not weight.requires_grad
    assert weight.weight_loader == "loader"  # type: ignore[attr-defined]
    assert weight.is_contiguous()


# -- sleep, wake, refit ------------------------------------------------------------------------------


class Controller:
    """SGLang's controller of sleep, over the modules that it was left."""

    def __init__(self, modules: dict[str, nn.Module], fails: bool = False) -> None:
        self.modules, self.asleep, self.fails = modules, False, fails

    def release_memory_occupation(self) -> None:
        if self.fails:
            raise RuntimeError("no pinned memory")
        self.asleep = True

    def resume_memory_occupation(self) -> None:
        if self.fails:
            raise RuntimeError("no memory")
        self.asleep = False

    def is_sleeping(self) -> bool:
        return self.asleep


def stock(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("SGLang's own was called")


@pytest.fixture
def worker(made: plugin.Plugin) -> Any:
    reference = Transformer()
    return start(made, reference, checkpoint(reference))


def write(store: Store, value: float) -> None:
    with store.refit("m", partial=True) as refit:
        refit.put("transformer.out.bias", torch.full((2,), value))


def test_release_and_resume_answer_as_sglang_and_bring_the_newest(
    made: plugin.Plugin, store: Store, worker: Any
) -> None:
    bias = worker.pipeline.modules["transformer"].out.bias
    assert not made.is_sleeping(stock, worker)
    first = made.release(stock, worker)
    assert (first["success"], first["sleeping"]) == (True, True) and made.is_sleeping(stock, worker)
    assert made.release(stock, worker)["message"] == "already sleeping"
    write(store, 7.0)
    second = made.resume(stock, worker)
    assert (second["success"], second["sleeping"], second["version"]) == (True, False, 2)
    assert made.resume(stock, worker)["message"] == "already awake"
    assert bias.tolist() == [7.0, 7.0]


def test_an_update_from_disk_takes_the_stores_version(made: plugin.Plugin, store: Store, worker: Any) -> None:
    write(store, 5.0)
    ok, message = made.update_from_disk(stock, worker, "weightstore:m@latest")
    assert ok and "version 2" in message
    assert worker.pipeline.modules["transformer"].out.bias.tolist() == [5.0, 5.0]
    assert made.update_from_disk(stock, worker, "weightstore:", target_modules=["transformer"])[0]
    for path in ("weightstore:other", "weightstore:m@policy"):
        ok, message = made.update_from_disk(stock, worker, path)
        assert not ok and "this engine follows" in message
    ok, message = made.update_from_disk(stock, worker, "weightstore:", target_modules=["tokenizer"])
    assert not ok and "tokenizer" in message


def test_an_update_while_asleep_comes_with_the_wake(made: plugin.Plugin, store: Store, worker: Any) -> None:
    made.release(stock, worker)
    write(store, 4.0)
    ok, message = made.update_from_disk(stock, worker, "weightstore:m")
    assert ok and "sleeps" in message and made.is_sleeping(stock, worker)
    made.resume(stock, worker)
    assert worker.pipeline.modules["transformer"].out.bias.tolist() == [4.0, 4.0]


def test_updates_past_the_store_are_refused(made: plugin.Plugin, worker: Any) -> None:
    for ok, message in (
        made.update_from_disk(stock, worker, "/models/other"),
        made.update_from_disk(stock, worker, "/models/other", target_modules=["vae"]),
        made.update_from_tensor(stock, worker, SimpleNamespace(target_modules=None)),
    ):
        assert not ok and "would be lost at the next sleep" in message
    request = SimpleNamespace(target_modules=["image_encoder"])
    assert made.update_from_tensor(lambda worker, req: (True, "stock"), worker, request) == (True, "stock")


class Decoder(nn.Module):
    """Turns its weights to channels_last and back as requests want it, as SGLang's decoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 1)
        self.wanted = True
        self._sgl_channels_last = False
        self.turned = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.wanted != self._sgl_channels_last:
            self.to(memory_format=torch.channels_last if self.wanted else torch.contiguous_format)
            self._sgl_channels_last = self.wanted
            self.turned += 1
        return self.last(self.first(x))


@pytest.mark.parametrize("stored", ["by this engine", "contiguous"])
def test_a_decoder_that_changes_its_memory_order_sleeps_and_wakes(
    made: plugin.Plugin, store: Store, stored: str
) -> None:
    torch.manual_seed(0)
    reference, decoder = Decoder(), Decoder()
    decoder.load_state_dict(reference.state_dict())
    x = torch.randn(1, 3, 8, 8)
    expected = reference(x)
    if stored == "contiguous":
        with store.refit("m") as refit:
            refit.put_module(decoder, prefix="vae.")
    worker = worker_of({"vae": decoder})
    made.init_device_and_model(lambda worker: None, worker)
    for wanted in (True, True, False, True):
        decoder.wanted = wanted
        assert torch.allclose(decoder(x), expected, atol=1e-6)
        assert made.release(stock, worker)["success"]
        assert made.resume(stock, worker)["success"]
        assert torch.equal(decoder.first.weight, reference.first.weight)
    assert decoder.turned == (3 if stored == "contiguous" else 1)
    held = made.engine_of(worker)
    assert held is not None and held.hook.verify().ok


def test_what_reads_weights_is_refused_while_they_are_away(made: plugin.Plugin, worker: Any) -> None:
    made.release(stock, worker)
    assert "sleeping" in made.checksum(stock, worker)["error"]
    assert made.check_tensors(stock, worker, None)[0] is False
    made.resume(stock, worker)
    assert made.checksum(lambda worker, names: {"vae": "sum"}, worker) == {"vae": "sum"}


def test_loras_go_beside_the_weights_never_into_them(
    made: plugin.Plugin, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_failed", lambda message: ("failed", message))

    def set_lora(worker: Any, nickname: str, path: str | None = None, merge_mode: str | None = None) -> str:
        return "set"

    worker.pipeline.modules["transformer"].param_names_mapping = {}
    assert made.set_lora(set_lora, worker, "nick", merge_mode="dynamic") == "set"
    for refused in (
        made.set_lora(set_lora, worker, "nick"),
        made.set_lora(set_lora, worker, "nick", "path", "merge"),
        made.merge_lora(stock, worker),
    ):
        assert refused[0] == "failed" and "lost at the next sleep" in refused[1]
    made.release(stock, worker)
    assert "sleeping" in made.set_lora(set_lora, worker, "nick", merge_mode="dynamic")[1]
    del worker.pipeline.modules["transformer"].param_names_mapping
    made.resume(stock, worker)
    assert made.merge_lora(lambda worker: "merged", worker) == "merged"


def test_a_merged_lora_forbids_sleep(made: plugin.Plugin, worker: Any) -> None:
    worker.pipeline.is_lora_merged = {"transformer": True}
    body = made.release(stock, worker)
    assert not body["success"] and not body["sleeping"] and "unmerge" in body["message"]
    worker.pipeline.is_lora_merged = {"transformer": False}
    assert made.release(stock, worker)["success"]


def test_the_rest_sleeps_with_the_hook_or_neither_does(
    store: Store, made: plugin.Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_controller", lambda worker, modules: Controller(modules))
    held, rest = nn.Linear(2, 2), nn.Linear(2, 2)
    rest.param_names_mapping = {}  # type: ignore[assignment]
    worker = worker_of({"vae": held, "transformer": rest})
    dropped: list[str] = []
    worker._drop_breakable_cuda_graphs = dropped.append
    with EngineHook.attach(store, "m", {"vae": held}) as hook:
        both = engine.Engine(worker, hook, {"transformer": rest})
        both.release()
        assert both.sleeping and both._others.is_sleeping()
        both.resume()
        assert not both.sleeping and not both._others.is_sleeping()
        assert dropped == ["weights of transformer moved by resume"]
        both._others.fails = True
        with pytest.raises(RuntimeError, match="no pinned memory"):
            both.release()
        assert not both.sleeping
        both._others.fails = False
        both.release()
        both._others.fails = True
        with pytest.raises(RuntimeError, match="no memory"):
            both.resume()
        assert both.sleeping and hook.state is State.ASLEEP and both._others.is_sleeping()
        both._others.fails = False
        with store.refit("m", in_place=True) as refit:
            assert not both.resume()["success"]  # torn
            assert both._others.is_sleeping()
            refit.put_module(nn.Linear(2, 2), prefix="vae.")
        both.resume()
        assert not both.sleeping


def test_the_rest_goes_to_sleep_with_a_broken_hook(
    store: Store, made: plugin.Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_controller", lambda worker, modules: Controller(modules))
    held, rest, backend = nn.Linear(2, 2), nn.Linear(2, 2), Faulty()
    worker = worker_of({"vae": held, "text_encoder": rest})
    with EngineHook.attach(store, "m", {"vae": held}, backend=backend) as hook:
        both = engine.Engine(worker, hook, {"text_encoder": rest})
        with store.refit("m") as refit:
            refit.put_module(nn.Linear(2, 2), prefix="vae.")
        backend.fail["update"] = 1
        assert not both.refit("weightstore:m", None)[0]
        assert hook.state is State.BROKEN and both.sleeping
        assert both.release()["success"]
        assert hook.state is State.ASLEEP and both._others.is_sleeping()
        both.resume()
        assert not both.sleeping and hook.version == 2


def test_a_worker_without_anything_of_the_stores_is_sglangs(made: plugin.Plugin) -> None:
    worker = worker_of({})

    def own(*args: Any) -> str:
        return "stock"

    made.init_device_and_model(lambda worker: None, worker)
    assert made.release(own, worker) == made.resume(own, worker) == "stock"
    assert made.is_sleeping(lambda worker: True, worker) is True
    assert made.update_from_disk(lambda *args: (True, "stock"), worker, "/models/x") == (True, "stock")
    ok, message = made.update_from_disk(own, worker, "weightstore:m")
    assert not ok and "the log says why" in message


def test_an_engine_of_which_only_some_is_hooked_is_refused(made: plugin.Plugin) -> None:
    def wrapped() -> None:
        pass

    wrapped.__wrapped__ = wrapped  # type: ignore[attr-defined]
    hooked = {target.rpartition(".")[2]: wrapped for target in targets.HOOKS if "GPUWorker" in target}
    assert targets.unhooked(type("Worker", (), hooked)()) == []
    hooked["release_memory_occupation"] = lambda: None
    assert targets.unhooked(type("Worker", (), hooked)()) == ["release_memory_occupation"]
    del hooked["is_sleeping"]
    assert targets.unhooked(type("Worker", (), hooked)()) == ["release_memory_occupation", "is_sleeping"]


# -- switching on ------------------------------------------------------------------------------------


def test_settings() -> None:
    assert settings({}) is None
    assert settings({"WEIGHTSTORE_MODEL": " "}) is None
    assert settings({"WEIGHTSTORE_MODEL": "m"}) == ("m", "latest", None)
    everything = {"WEIGHTSTORE_MODEL": "m", "WEIGHTSTORE_TAG": "policy", "WEIGHTSTORE_SOCKET": "/s"}
    assert settings(everything) == ("m", "policy", "/s")


def test_activate(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    registered: dict[str, Any] = {}
    seam = ModuleType("sglang.multimodal_gen.runtime.platforms.plugins")
    seam.HookRegistry = SimpleNamespace(  # type: ignore[attr-defined]
        register=lambda target, hook, kind: registered.update({target: (hook, kind)})
    )
    seam.HookType = SimpleNamespace(AROUND="around")  # type: ignore[attr-defined]
    parts = seam.__name__.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(__import__("sys").modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    monkeypatch.setitem(__import__("sys").modules, seam.__name__, seam)
    monkeypatch.delenv("WEIGHTSTORE_MODEL", raising=False)
    sglang_diffusion.activate()
    assert not registered and "WEIGHTSTORE_MODEL is not set" in caplog.text
    monkeypatch.setenv("WEIGHTSTORE_MODEL", "m")
    sglang_diffusion.activate()
    assert registered.keys() == sglang_diffusion.HOOKS.keys()
    assert {kind for _, kind in registered.values()} == {"around"}
