"""Which file a tensor goes to, and how ties and strides are written down."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightstore.checkpoint.safetensors_header import ALIASES_KEY, STRIDES_KEY
from weightstore.checkpoint.save_plan import SavePlan, choose_layout, plan_save
from weightstore.errors import CheckpointError
from weightstore.types import TensorRecord, contiguous_stride, nbytes_of


def record(
    name: str, nbytes: int = 4, offset: int | None = None, dtype: str = "uint8", stride: tuple[int, ...] = ()
) -> TensorRecord:
    shape = (nbytes,)
    at = 256 * (1 + sum(map(ord, name))) if offset is None else offset
    return TensorRecord(name, dtype, shape, stride or contiguous_stride(shape), at, nbytes_of(dtype, shape))


def plan(records: list[TensorRecord], layout: str = "sharded", shard: int = 1 << 40) -> SavePlan:
    return plan_save(records, layout, "w.safetensors", lambda part: f"{part or 'top'}_base", shard)


@pytest.mark.parametrize(
    ("layout", "target", "names", "expected"),
    [
        ("auto", "x/w.safetensors", ["transformer.a"], "file"),
        ("auto", "x", ["transformer.a", "text_encoder_2.b", "vae.c"], "pipeline"),
        ("auto", "x", ["transformer_blocks.0.w", "proj_out.w"], "sharded"),
        ("auto", "x", ["transformer.a", "scale"], "sharded"),
        ("auto", "x", ["transformer"], "sharded"),
        ("pipeline", "x", ["mine.a"], "pipeline"),
        ("sharded", "x", ["transformer.a"], "sharded"),
        ("file", "w.safetensors", ["a"], "file"),
    ],
)
def test_layout_follows_path_and_names(layout: str, target: str, names: list[str], expected: str) -> None:
    assert choose_layout(layout, target, names) == expected


@pytest.mark.parametrize(
    ("layout", "target", "message"),
    [
        ("zip", "x", "layout 'zip' is unknown; use auto, file, sharded, pipeline"),
        ("file", "x", "layout 'file' needs the path of a .safetensors file"),
        ("sharded", "w.safetensors", "layout 'sharded' needs a directory"),
        ("pipeline", "w.safetensors", "layout 'pipeline' needs a directory"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout: str, target: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        choose_layout(layout, target, ["a"])


def test_a_small_part_is_one_file_without_index() -> None:
    (part,) = plan([record("a"), record("b")]).parts
    assert [f.name for f in part.files] == ["top_base.safetensors"]
    assert part.index() is None
    assert part.files[0].metadata == {"format": "pt"}


def test_shards_are_filled_in_order_and_indexed() -> None:
    sizes = {"a": 6, "b": 4, "c": 5, "huge": 30, "d": 1}
    (part,) = plan([record(name, n) for name, n in sizes.items()], shard=10).parts
    assert [(f.name, list(f.tensors)) for f in part.files] == [
        ("top_base-00001-of-00004.safetensors", ["a", "b"]),
        ("top_base-00002-of-00004.safetensors", ["c"]),
        ("top_base-00003-of-00004.safetensors", ["huge"]),
        ("top_base-00004-of-00004.safetensors", ["d"]),
    ]
    index = json.loads(part.index() or b"")
    assert part.index_name == "top_base.safetensors.index.json"
    assert index["metadata"] == {"total_size": 46}
    assert index["weight_map"]["huge"] == "top_base-00003-of-00004.safetensors"
    assert index["weight_map"].keys() == sizes.keys()


def test_a_tie_is_stored_once_and_recorded_where_its_target_is() -> None:
    tied = TensorRecord("t", "uint8", (2, 2), (1, 2), 512, 4)
    (part,) = plan([record("x"), record("w", offset=512), record("y"), tied], shard=4).parts
    assert [list(f.tensors) for f in part.files] == [["x"], ["w"], ["y"]]
    assert part.ties == 1
    assert json.loads(part.files[1].metadata[ALIASES_KEY]) == {
        "t": {"target": "w", "dtype": "uint8", "shape": [2, 2], "stride": [1, 2]}
    }
    assert ALIASES_KEY not in part.files[0].metadata
    assert "t" not in json.loads(part.index() or b"")["weight_map"]


def test_empty_tensors_are_not_ties() -> None:
    (part,) = plan([record("a", 0, offset=0), record("b", 0, offset=0)]).parts
    assert list(part.files[0].tensors) == ["a", "b"] and part.ties == 0


def test_strides_are_recorded_only_where_they_are_not_row_major() -> None:
    strided = TensorRecord("s", "float32", (2, 3), (1, 2), 0, 24)
    (part,) = plan([record("a"), strided]).parts
    assert json.loads(part.files[0].metadata[STRIDES_KEY]) == {"s": [1, 2]}


def test_a_pipeline_has_a_directory_per_component() -> None:
    made = plan([record("vae.a.b"), record("text_encoder.x"), record("vae.c")], "pipeline")
    assert [(p.directory, [list(f.tensors) for f in p.files]) for p in made.parts] == [
        ("vae", [["a.b", "c"]]),
        ("text_encoder", [["x"]]),
    ]
    assert made.parts[0].files[0].name == "vae_base.safetensors"


def test_a_tie_across_components_is_written_to_both_and_reported() -> None:
    made = plan([record("a.w", offset=512), record("b.w", offset=512), record("b.v", offset=512)], "pipeline")
    assert [list(p.files[0].tensors) for p in made.parts] == [["w"], ["w"]]
    assert [p.ties for p in made.parts] == [0, 1]
    assert made.untied == ("b.w", "b.v")


@pytest.mark.parametrize("name", ["scale", "vae.", "../x.w", ".hidden.w", "a/b.w", "/etc.w", "-x.w"])
def test_names_cannot_lead_out_of_the_target(name: str) -> None:
    with pytest.raises(CheckpointError, match="has no"):
        plan([record(name)], "pipeline")


def test_a_shard_size_must_be_positive() -> None:
    with pytest.raises(CheckpointError, match="shards of 0 bytes"):
        plan([record("a")], shard=0)


def test_leftovers_of_earlier_saves_are_recognised() -> None:
    (part,) = plan([record("a")]).parts
    for name in (
        "top_base.safetensors",
        "top_base-00003-of-00007.safetensors",
        "top_base.safetensors.index.json",
    ):
        assert part.supersedes(name)
    for name in (
        "config.json",
        "top_base.fp16.safetensors",
        "other.safetensors",
        "top_base-1-of-2.safetensors",
    ):
        assert not part.supersedes(name)


names = st.text("ab.", min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            names, st.sampled_from(["uint8", "bfloat16", "complex64"]), st.integers(0, 9), st.integers(0, 4)
        ),
        unique_by=lambda t: t[0],
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 40),
)
def test_every_record_is_in_one_file_or_an_alias(
    tensors: list[tuple[str, str, int, int]], shard: int
) -> None:
    records = [record(name, n, offset=256 * slot, dtype=dtype) for name, dtype, n, slot in tensors]
    (part,) = plan(records, shard=shard).parts
    stored = [name for file in part.files for name in file.tensors]
    aliases = [a for f in part.files for a in json.loads(f.metadata.get(ALIASES_KEY, "{}"))]
    assert sorted(stored + aliases) == sorted(r.name for r in records)
    assert len(aliases) == part.ties
    for file in part.files:
        assert len(file.tensors) == 1 or sum(r.nbytes for r in file.tensors.values()) <= shard
        for alias in json.loads(file.metadata.get(ALIASES_KEY, "{}")).values():
            assert alias["target"] in file.tensors
