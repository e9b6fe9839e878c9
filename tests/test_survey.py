from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from paper_store import Paper
from torch import nn

from engine_hooks.plan import matcher
from engine_hooks.survey import Survey, publishable, survey
from weightstore.errors import AttachError
from weightstore.names import NameMap
from weightstore.types import ALIGN, TensorRecord


def refusal(paper: Paper, modules: dict[str, nn.Module], ignore: tuple[str, ...] = ()) -> AttachError:
    with pytest.raises(AttachError) as caught:
        paper.survey(modules, matcher(ignore))
    return caught.value


def places(surveyed: Survey) -> dict[str, tuple[int, bool]]:
    return {name: (m.offset, m.weight) for m in surveyed.members for name in m.found.names}


def linear() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"net": nn.Linear(8, 4)}


class TestPlaces:
    def test_weights_come_first_and_state_behind_each_aligned(self) -> None:
        modules = linear()
        paper = Paper(modules)
        modules["net"].register_buffer("mask", torch.ones(3), persistent=False)
        modules["net"].table = torch.ones(5)
        surveyed = paper.survey(modules)["net"]
        where = places(surveyed)
        assert {n for n, (_, weight) in where.items() if weight} == {"net.weight", "net.bias"}
        assert all(offset % ALIGN == 0 for offset, _ in where.values())
        assert min(where["net.mask"][0], where["net.table"][0]) == surveyed.state_offset
        assert surveyed.nbytes == surveyed.state_offset + 2 * ALIGN

    def test_a_persistent_buffer_is_a_weight_only_if_the_version_has_it(self) -> None:
        modules: dict[str, nn.Module] = {"net": nn.BatchNorm1d(4)}
        paper = Paper(modules)
        assert places(paper.survey(modules)["net"])["net.running_mean"][1]
        del paper.records["net.running_mean"]
        assert not places(paper.survey(modules)["net"])["net.running_mean"][1]

    def test_any_tensor_with_a_stored_name_is_a_weight(self) -> None:
        modules = linear()
        modules["net"].table = torch.ones(5)
        paper = Paper(modules)
        paper.records["net.table"] = TensorRecord("net.table", "float32", (5,), (1,), 4096, 20)
        assert places(paper.survey(modules)["net"])["net.table"][1]

    def test_ties_share_a_place_in_either_spelling(self) -> None:
        modules = tiny_models.build("text_encoder")
        paper = Paper(modules)
        both = paper.survey(modules)["text_encoder"]
        assert [m.offset for m in both.members if "text_encoder.shared.weight" in m.found.names] == [0]
        # A checkpoint file names a tie once.
        del paper.records["text_encoder.encoder.embed_tokens.weight"]
        assert places(paper.survey(modules)["text_encoder"]).keys() >= {
            "text_encoder.shared.weight",
            "text_encoder.encoder.embed_tokens.weight",
        }

    def test_what_the_store_ties_becomes_tied(self) -> None:
        modules: dict[str, nn.Module] = {"net": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])}
        paper = Paper(modules)
        record = paper.records["net.0.weight"]
        paper.records["net.1.weight"] = TensorRecord("net.1.weight", *(getattr(record, f) for f in (
            "dtype", "shape", "stride", "offset", "nbytes")))  # fmt: skip
        where = places(paper.survey(modules)["net"])
        assert where["net.0.weight"] == where["net.1.weight"]

    def test_views_follow_the_weight_they_lie_in(self) -> None:
        modules = linear()
        paper = Paper(modules)
        weight = modules["net"].weight.detach()
        modules["net"].rows = [weight[1:3], weight.t()]
        modules["net"].again = nn.Parameter(weight.view(-1)[8:16])  # unknown to the store, but inside
        where = places(paper.survey(modules)["net"])
        start = where["net.weight"][0]
        assert where["net.rows.0"] == (start + 32, True)
        assert where["net.rows.1"] == (start, True)
        assert where["net.again"] == (start + 32, True)

    def test_state_that_overlaps_keeps_its_distances_and_alignment(self) -> None:
        modules = linear()
        paper = Paper(modules)
        base = torch.zeros(64, dtype=torch.uint8)
        modules["net"].small = base[7:9]
        modules["net"].wide = base[8:24].view(torch.int64)
        where = places(paper.survey(modules)["net"])
        assert where["net.wide"][0] - where["net.small"][0] == 1
        assert where["net.wide"][0] % 8 == 0

    def test_neighbours_in_one_storage_are_apart(self) -> None:
        # As loaders make them that read a whole file into one buffer.
        flat = torch.arange(12.0)
        module = nn.Module()
        module.a, module.b = nn.Parameter(flat[:4]), nn.Parameter(flat[4:])
        modules = {"net": module}
        where = places(Paper(modules).survey(modules)["net"])
        assert abs(where["net.a"][0] - where["net.b"][0]) == ALIGN

    def test_meta_modules_are_placed_like_real_ones(self) -> None:
        modules = tiny_models.build("transformer", "text_encoder")
        paper = Paper(modules)
        meta = {name: copy.deepcopy(module).to("meta") for name, module in modules.items()}
        for name, surveyed in paper.survey(meta).items():
            assert places(surveyed) == places(paper.survey(modules)[name])

    def test_strays_on_another_device_stay_there(self) -> None:
        modules = linear()
        paper = Paper(modules)
        modules["net"].table = torch.ones(5)
        elsewhere = survey(modules, paper.records, matcher(()), torch.device("cuda", 0))["net"]
        assert "net.table" not in places(elsewhere)
        assert "net.weight" in places(elsewhere)

    def test_the_versions_memory_order_wins_and_is_named(self) -> None:
        modules = tiny_models.build("vae")
        paper = Paper(modules)
        assert paper.survey(modules)["vae"].restrided == []
        plain = {"vae": copy.deepcopy(modules["vae"])}
        for parameter in plain["vae"].parameters():
            parameter.data = parameter.data.contiguous()
        surveyed = paper.survey(plain)["vae"]
        assert surveyed.restrided
        for member in surveyed.members:
            assert (
                member.stride
                == dict(modules["vae"].named_parameters())[member.found.name.removeprefix("vae.")].stride()
            )

    def test_strides_of_dimensions_of_size_one_mean_nothing(self) -> None:
        modules: dict[str, nn.Module] = {"net": nn.Conv3d(2, 2, 1)}
        paper = Paper(modules)
        modules["net"].to(memory_format=torch.channels_last_3d)
        surveyed = paper.survey(modules)["net"]
        assert surveyed.restrided == []
        strides = {m.found.name: m.stride for m in surveyed.members}
        assert strides["net.weight"] == modules["net"].weight.stride()


class TestRefusals:
    def test_names_on_either_side_with_close_matches(self) -> None:
        modules = tiny_models.build("transformer")
        paper = Paper(modules)
        names = [n for n in paper.records if ".proj_out." in n]
        assert names
        for name in names:
            record = paper.records.pop(name)
            paper.records[name.replace("proj_out", "module.proj_out")] = record
        error = refusal(paper, modules)
        assert sorted(error.details["missing"]) == sorted(names)
        assert len(error.details["unknown"]) == len(names)
        for name in names[:3]:
            assert f"{name} is a parameter" in error.message
        assert "close: transformer.module.proj_out" in error.message
        assert error.message.count("close: ") >= 2

    def test_a_prefix_that_a_checkpoint_has_is_named_with_the_map_that_takes_it_away(self) -> None:
        modules = {"other": linear()["net"]} | tiny_models.build("text_encoder")
        paper = Paper(modules)
        names = [name for name in paper.records if name.startswith("text_encoder.")]
        assert len(names) == 20
        for name in names:
            into = name.replace("text_encoder.", "text_encoder.text_model.", 1)
            paper.records[into] = paper.records.pop(name)
        message = refusal(paper, modules).message
        advised = r"NameMap().rename('^text_encoder\\.text_model\\.', 'text_encoder.')"
        # Two are tied, and one parameter of the module.
        assert message.splitlines()[-1].startswith("19 of these names differ by a prefix")
        assert advised in message
        renamed = NameMap().rename(r"^text_encoder\.text_model\.", "text_encoder.")
        assert repr(renamed.rules[0].pattern) in advised
        for name in names[2:]:
            into = name.replace("text_encoder.", "text_encoder.text_model.", 1)
            paper.records[f"{into}.odd"] = paper.records.pop(into)
        assert "NameMap" not in refusal(paper, modules).message

    def test_ignored_names_may_be_lacking_in_the_module(self) -> None:
        modules = linear()
        paper = Paper(modules)
        paper.records["net.lora_A"] = TensorRecord("net.lora_A", "float32", (2,), (1,), 1 << 20, 8)
        assert refusal(paper, modules).details == {"unknown": ["net.lora_A"]}
        assert "net.lora_A" not in paper.survey(modules, matcher(["*.lora_?"]))["net"].layout.records

    @pytest.mark.parametrize(
        "wrong",
        [
            TensorRecord("net.weight", "float32", (8, 4), (4, 1), 0, 128),
            TensorRecord("net.weight", "bfloat16", (4, 8), (8, 1), 0, 64),
        ],
        ids=["shape", "dtype"],
    )
    def test_shape_and_dtype(self, wrong: TensorRecord) -> None:
        modules = linear()
        paper = Paper(modules)
        paper.records["net.weight"] = wrong
        error = refusal(paper, modules)
        assert error.details == {"mismatched": ["net.weight"]}
        assert "float32[4, 8] in the module" in error.message
        assert wrong.dtype in error.message

    def test_an_unknown_encoding(self) -> None:
        modules = linear()
        paper = Paper(modules)
        record = paper.records["net.bias"]
        paper.records["net.bias"] = TensorRecord(
            "net.bias", "float32", (4,), (1,), record.offset, 12, "packed"
        )
        assert "'packed', which this release cannot read" in refusal(paper, modules).message

    def test_a_component_the_version_lacks(self) -> None:
        modules = linear()
        error = refusal(Paper(modules), {"nett": modules["net"]})
        assert error.details == {"components": ["nett"]}
        assert "which has net" in error.message

    def test_meta_tensors_whose_bytes_nobody_has(self) -> None:
        modules = linear()
        paper = Paper(modules)
        modules["net"].register_buffer("mask", torch.ones(3, device="meta"), persistent=False)
        modules["net"].tables = [torch.ones(3, device="meta")]
        error = refusal(paper, modules)
        assert error.details == {"meta": ["net.mask", "net.tables.0"]}
        assert "non-persistent buffer on the meta device" in error.message

    def test_tied_in_the_module_apart_in_the_store(self) -> None:
        modules = tiny_models.build("text_encoder")
        paper = Paper(modules)
        record = paper.records["text_encoder.shared.weight"]
        paper.records["text_encoder.shared.weight"] = TensorRecord(
            record.name, record.dtype, record.shape, record.stride, 1 << 24, record.nbytes
        )
        error = refusal(paper, modules)
        assert error.details.keys() == {"tied"}

    def test_a_view_that_the_store_holds_apart(self) -> None:
        modules = linear()
        module = modules["net"]
        module.part = nn.Parameter(module.weight.detach()[:2])
        paper = Paper(modules)
        assert refusal(paper, modules).details == {"tied": ["net.part"]}

    def test_weights_that_overlap_partly(self) -> None:
        flat = torch.arange(12.0)
        module = nn.Module()
        module.a, module.b = nn.Parameter(flat[:8]), nn.Parameter(flat[4:])
        modules = {"net": module}
        assert refusal(Paper(modules), modules).details.keys() == {"overlapping"}
        with pytest.raises(AttachError, match="shares part of its memory"):
            publishable(modules)

    def test_a_tensor_in_two_components(self) -> None:
        shared = nn.Linear(2, 2)
        modules: dict[str, nn.Module] = {"a": nn.Sequential(shared), "b": nn.Sequential(shared)}
        error = refusal(Paper(modules), modules)
        assert error.details.keys() == {"shared"}
        assert "components a, b" in error.message

    def test_what_cannot_be_rebound_is_named_with_everything_else(self) -> None:
        modules = linear()
        paper = Paper(modules)
        modules["net"].adjacency = torch.ones(2, 2).to_sparse()
        paper.records["net.gone"] = TensorRecord("net.gone", "float32", (2,), (1,), 1 << 20, 8)
        error = refusal(paper, modules)
        assert error.details == {"unbindable": ["net.adjacency"], "unknown": ["net.gone"]}
        assert error.message.startswith(
            "these modules cannot be bound to the store's version bit for bit: 2 reasons"
        )

    def test_a_long_list_is_cut_in_the_message_only(self) -> None:
        modules: dict[str, nn.Module] = {"net": nn.ModuleList([nn.Linear(1, 1) for _ in range(40)])}
        paper = Paper(modules)
        for name in [n for n in paper.records if n != "net.0.bias"]:
            del paper.records[name]
        error = refusal(paper, modules)
        assert len(error.details["missing"]) == 79
        assert "and 59 more" in error.message

    def test_a_component_that_the_store_lacks_is_told_first(self) -> None:
        modules: dict[str, nn.Module] = {"a": nn.ModuleList([nn.Linear(1, 1) for _ in range(40)])}
        paper = Paper(modules)
        modules["a"] = nn.ModuleList()
        modules["unet"] = nn.Linear(1, 1)
        error = refusal(paper, modules)
        assert len(error.details["unknown"]) == 80
        assert "81 reasons, nothing was changed\n  unet is not a component" in error.message
        assert ": 1 reason, nothing" in refusal(Paper(linear()), {"nett": linear()["net"]}).message


class TestPublishable:
    def test_parameters_and_persistent_buffers_in_the_modules_order_with_ties(self) -> None:
        modules = tiny_models.build("text_encoder", "transformer")
        modules["transformer"].register_buffer("kept", torch.ones(2))
        modules["transformer"].register_buffer("dropped", torch.ones(2), persistent=False)
        tensors = publishable(modules)
        expected = [f"{c}.{n}" for c, m in modules.items() for n in m.state_dict()]
        assert sorted(tensors) == sorted(expected)
        first = [f"text_encoder.{n}" for n, _ in modules["text_encoder"].named_parameters()]
        assert [n for n in tensors if n in first] == first
        tied = [
            tensors[f"text_encoder.{n}"].data_ptr() for n in ("shared.weight", "encoder.embed_tokens.weight")
        ]
        assert tied[0] == tied[1]

    def test_views_inside_others_are_left_out(self) -> None:
        modules = linear()
        modules["net"].part = nn.Parameter(modules["net"].weight.detach()[:2])
        assert set(publishable(modules)) == {"net.weight", "net.bias"}

    def test_meta_cannot_be_published(self) -> None:
        with pytest.raises(AttachError, match="no bytes to publish") as caught:
            publishable({"net": nn.Linear(2, 2, device="meta")})
        assert caught.value.details == {"meta": ["net.weight", "net.bias"]}
        assert "weightstore load" in caught.value.message
