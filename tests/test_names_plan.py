"""Plans: what they count, what they say, and `weightstore plan` and `load --map` on real files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from test_names import record, stored

import weightstore as ws
from weightstore.cli import main
from weightstore.errors import CoverageError
from weightstore.names import Given, Kind, NameMap, Plan, Stored, plan
from weightstore.names import hints as hints_module
from weightstore.names.hints import Hints

MODEL = [
    record("t.blocks.0.qkv.w", (6, 2)),
    record("t.blocks.0.norm.w", (2,)),
    record("t.blocks.1.qkv.w", (6, 2)),
    record("t.blocks.1.norm.w", (2,)),
    record("v.conv.w", (3,)),
]
NAMES = NameMap(prefix="t.").fuse(["q", "k", "v"], "qkv").drop("lora")
GIVEN = [
    *(Given(f"blocks.{i}.{n}.w", "float32", (2, 2)) for i in range(2) for n in "qkv"),
    *(Given(f"blocks.{i}.norm.w", "float32", (2,)) for i in range(2)),
    Given("blocks.0.lora.w", "float32", (7,)),
]


def counted(planned: Plan) -> dict[str, int]:
    return {kind.value: count for kind, count in planned.counts.items() if count}


def kinds(planned: Plan, kind: Kind) -> list[tuple[str | None, str | None]]:
    return [(row.source, row.target) for row in planned.rows if row.kind is kind]


# -- what it counts -----------------------------------------------------------------------------------


def test_a_plan_that_would_commit() -> None:
    planned = plan(NAMES, GIVEN, stored(*MODEL, components=["t"]))
    assert planned.ok
    assert counted(planned) == {"renamed": 2, "fused": 6, "dropped": 1}
    assert planned.problems == ()
    planned.raise_for_problems()


def test_everything_that_would_keep_it_from_committing() -> None:
    wrong = [
        *GIVEN[:6],
        Given("blocks.0.norm.w", "float32", (3,)),
        Given("blocks.1.nrom.w", "float32", (2,)),
        Given("module.blocks.0.q.w", "float32", (2, 2)),
    ]
    planned = plan(NAMES.rename("xyz", "").drop("zyx", optional=True), wrong, stored(*MODEL))
    assert not planned.ok
    assert counted(planned) == {"fused": 6, "missing": 2, "unknown": 1, "mismatched": 1, "conflict": 1}
    assert kinds(planned, Kind.MISSING) == [(None, "t.blocks.1.norm.w"), (None, "v.conv.w")]
    assert planned.unused == ("drop('lora')", "rename('xyz' to '')")
    with pytest.raises(
        CoverageError, match=r"1 unknown \(blocks.1.nrom.w as t.blocks.1.nrom.w: perhaps"
    ) as caught:
        planned.raise_for_problems()
    assert caught.value.details == {
        "missing": ["t.blocks.1.norm.w", "v.conv.w"],
        "unknown": ["t.blocks.1.nrom.w"],
        "mismatched": ["t.blocks.0.norm.w"],
        "duplicate": ["t.blocks.0.qkv.w"],
    }


def test_a_piece_that_is_missing_is_told_with_those_that_are_there() -> None:
    lacking = [each for each in GIVEN if each.name != "blocks.1.k.w"]
    planned = plan(NAMES, lacking, stored(*MODEL, components=["t"]))
    [row] = [row for row in planned.rows if row.kind is Kind.MISSING]
    assert row.target == "t.blocks.1.qkv.w"
    assert row.note == "only in part: blocks.1.q.w, blocks.1.v.w"


def test_a_partial_refit_misses_nothing_but_pieces() -> None:
    def partial(*given: Given) -> Plan:
        whole = stored(*MODEL)
        return plan(NAMES, given, Stored(whole.what, whole.records, None, True, partial=True))

    assert partial(GIVEN[6]).ok
    assert partial(*GIVEN[:3]).ok
    assert counted(partial(*GIVEN[:2])) == {"fused": 2, "missing": 1}


def test_zero_matches_are_an_error_whatever_was_declared() -> None:
    whole = stored(*MODEL)
    anything = Stored(whole.what, whole.records, None, False, partial=True)
    for given in ([], [GIVEN[-1]]):
        planned = plan(NAMES, given, anything)
        assert not planned.ok
        assert planned.problems == (
            f"nothing would be written: of {len(given)} tensors given none has a place",
        )
        with pytest.raises(CoverageError, match="nothing would be written"):
            planned.raise_for_problems()
    assert not plan(NameMap(), [], stored()).ok


def test_ties_are_given_by_any_of_their_names() -> None:
    tied = {name: record(name, (4,), offset=512) for name in ("t.a", "t.b")}
    into = Stored("m", {**tied, "t.c": record("t.c", (0,)), "t.d": record("t.d", (0,))})
    one = [Given("t.b", "float32", (4,)), Given("t.c", "float32", (0,)), Given("t.d", "float32", (0,))]
    assert plan(NameMap(), one, into).ok
    # Empty tensors share an offset with others and are tied to none.
    assert kinds(plan(NameMap(), one[:2], into), Kind.MISSING) == [(None, "t.d")]
    assert kinds(plan(NameMap(), one[1:], into), Kind.MISSING) == [(None, "t.a"), (None, "t.b")]


def test_tied_fused_tensors_are_filled_by_either() -> None:
    tied = {name: record(name, (4,), offset=512) for name in ("a.qk", "b.qk")}
    names = NameMap().fuse(["q", "k"], "qk")
    given = [Given(name, "float32", (2,)) for name in ("a.q", "a.k", "b.q", "b.k")]
    assert plan(names, given, Stored("m", tied)).ok
    assert plan(names, given[:2], Stored("m", tied)).ok
    assert counted(plan(names, [given[0], given[2]], Stored("m", tied))) == {"fused": 2, "missing": 2}


def test_empty_pieces_fill_an_empty_tensor() -> None:
    into = stored(record("qk", (0, 2)), record("w", (1,)))
    given = [Given(name, "float32", (0, 2)) for name in "qk"]
    planned = plan(NameMap().fuse(["q", "k"], "qk"), [*given, Given("w", "float32", (1,))], into)
    assert planned.ok


# -- what it says -------------------------------------------------------------------------------------


def test_a_missing_prefix_is_seen_through() -> None:
    planned = plan(
        NameMap(), [Given(r.name.removeprefix("t."), r.dtype, r.shape) for r in MODEL[:4]], stored(*MODEL)
    )
    assert planned.advice == "4 unknown names would match with prefix='t.'"
    assert "would match with prefix='t.'" in str(planned)


def test_layers_that_are_alike_are_one_line() -> None:
    text = str(plan(NAMES, GIVEN, stored(*MODEL, components=["t"])))
    assert "fused     blocks.*.q.w      t.blocks.*.qkv.w[0:2]   ×2" in text
    assert "fused     blocks.*.v.w      t.blocks.*.qkv.w[4:6]   ×2" in text
    assert "drop('lora')" in text
    assert text.endswith("2 renamed, 6 fused, 1 dropped\nit would commit")


def test_boxes_are_shown_as_indices() -> None:
    across = NameMap().fuse(["a", "b"], "ab", dim=1)
    given = [Given("a", "float32", (2, 3, 4)), Given("b", "float32", (2, 1, 4))]
    assert "ab[:, 3:4]" in str(plan(across, given, stored()))
    assert "ab[4:6]" in str(
        plan(NameMap().split("ab", ["a", "b"], shares=[2, 1]), [Given("ab", "int8", (6,))], stored())
    )


def test_a_long_list_is_cut_in_the_table_and_whole_in_json() -> None:
    given = [Given(f"name_{i}.w", "float32", (1,)) for i in range(100)]
    planned = plan(NameMap(), given, stored(record("other", (1,))))
    assert "… and 60 more" in str(planned)
    assert len(planned.to_builtins()["rows"]) == 101


def test_json_says_everything() -> None:
    plain = json.loads(json.dumps(plan(NAMES, GIVEN[:1], stored(*MODEL[:2])).to_builtins()))
    assert plain["ok"] is False
    assert plain["counts"]["fused"] == 1 and plain["counts"]["missing"] == 2
    assert plain["rows"][0] == {
        "kind": "fused",
        "source": "blocks.0.q.w",
        "target": "t.blocks.0.qkv.w",
        "dtype": "float32",
        "shape": [2, 2],
        "box": [[0, 0], [2, 2]],
        "whole": [6, 2],
        "rules": [0],
    }
    assert plain["problems"] == [
        "2 missing",
        "drop('lora') matches nothing; declare it optional if it need not",
    ]


def test_hints_prefer_the_same_layer_and_ignore_strangers() -> None:
    names = [f"transformer.blocks.{i}.attn.{p}.weight" for i in range(30) for p in ("to_q", "to_k", "norm_q")]
    hints = Hints(names)
    assert hints.closest("blocks.17.attn.to_q.weight") == "transformer.blocks.17.attn.to_q.weight"
    assert hints.closest("transformer.blocks.9.attn.toq.weight") == "transformer.blocks.9.attn.to_q.weight"
    assert hints.closest("transformer.blocks.8.attn.toq.weight") == "transformer.blocks.8.attn.to_q.weight"
    assert hints.closest("blocks.99.attn.to_q.weight") in names
    assert hints.closest("vae.decoder.conv_in.bias") is None
    assert hints.closest("transformer.blocks.99.attn.to_k.weight") != "transformer.blocks.99.attn.to_k.weight"
    assert Hints([]).closest("a") is None
    assert Hints(["colour"]).closest("color") == "colour"


def test_hints_for_thousands_of_names_compare_few(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0

    class Counting(SequenceMatcher[str]):
        def ratio(self) -> float:
            nonlocal compared
            compared += 1
            return super().ratio()

    monkeypatch.setattr(hints_module, "SequenceMatcher", Counting)
    records = [record(f"t.blocks.{i}.layer_{j}.weight", (1,)) for i in range(60) for j in range(40)]
    given = [Given(r.name.replace("layer", "lyer"), r.dtype, r.shape) for r in records]
    planned = plan(NameMap(), given, stored(*records))
    assert planned.rows[-1].hint == "t.blocks.59.lyer_39.weight"
    # Of 2400 unknown and 2400 missing names, the 40 of one layer are looked for, among a handful each.
    assert 0 < compared <= 2 * 40 * 9


# -- the command line ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store() -> Iterator[ws.Store]:
    with ws.local_store("64MiB", window="8MiB") as store:
        yield store


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(3)
    shapes = {f"blocks.{i}.{n}.w": (2, 4) for i in range(2) for n in "qkv"}
    shapes |= {f"blocks.{i}.mlp.w": (6, 4) for i in range(2)}
    return {name: torch.randn(shape, generator=make) for name, shape in {**shapes, "norm.w": (4,)}.items()}


SPLIT = NameMap(prefix="t.").fuse(["q", "k", "v"], "qkv").split("mlp", ["up", "down"], shares=[2, 1])


def run(store: ws.Store, *arguments: object) -> Result:
    command, *rest = map(str, arguments)
    return CliRunner().invoke(main, [command, "--socket", store.socket, *rest])


def write_map(path: Path, names: NameMap) -> Path:
    path.write_text(names.to_json())
    return path


def test_load_through_a_map_then_plan(
    store: ws.Store, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file, names = tmp_path / "model.safetensors", write_map(tmp_path / "map.json", SPLIT)
    save_file(state, file)
    loaded = run(store, "load", "--map", names, "m", file)
    assert loaded.exit_code == 0, loaded.output
    with store.lease("m") as snapshot:
        assert len(snapshot) == 7
        for i in range(2):
            qkv = torch.cat([state[f"blocks.{i}.{n}.w"] for n in "qkv"])
            assert torch.equal(snapshot[f"t.blocks.{i}.qkv.w"], qkv)
            assert torch.equal(snapshot[f"t.blocks.{i}.up.w"], state[f"blocks.{i}.mlp.w"][:4])
            assert torch.equal(snapshot[f"t.blocks.{i}.down.w"], state[f"blocks.{i}.mlp.w"][4:])
        assert torch.equal(snapshot["t.norm.w"], state["norm.w"])

    planned = run(store, "plan", "--map", names, "m", file)
    assert planned.exit_code == 0, planned.output
    assert planned.output.rstrip().endswith("it would commit")
    without = run(store, "plan", "m", file)
    assert without.exit_code == 1
    assert "nothing would be written" in without.output
    as_json = run(store, "plan", "--json", "--tag", "policy", "--map", names, "m", file)
    assert as_json.exit_code == 0
    assert json.loads(as_json.output)["counts"]["fused"] == 6
    assert json.loads(as_json.output)["what"] == "refit of 'm' tag 'policy' on version 1"
    assert store.tags("m") == {"latest": 1}


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], 1),
        (["--partial"], 0),
        (["--components", "t"], 0),
        (["--components", "t, v"], 1),
        (["--components", "v"], 1),
        (["--prefix", "v."], 1),
        (["--prefix", "v.", "--extend", "--partial"], 0),
        (["--fresh"], 0),
    ],
)
def test_plan_takes_the_declaration_of_a_refit(
    store: ws.Store, tmp_path: Path, options: Sequence[str], code: int
) -> None:
    file = tmp_path / "t.safetensors"
    save_file({"t.a": torch.zeros(2)}, file)
    with store.refit("declared", fresh=True) as refit:
        refit.put_many({"t.a": torch.ones(2), "v.b": torch.ones(3)})
    planned = run(store, "plan", *options, "declared", file)
    assert planned.exit_code == code, planned.output


def test_what_cannot_be_planned(store: ws.Store, tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    save_file({"t.a": torch.zeros(2)}, file)
    for arguments, says in [
        (["nobody", file], "no model 'nobody'"),
        (["m", tmp_path / "none.safetensors"], "no such file"),
        (["--map", tmp_path / "none.json", "m", file], "none.json: No such file"),
        (["--map", file, "m", file], "not a name map"),
    ]:
        result = run(store, "plan", *arguments)
        assert result.exit_code == 1
        assert says in result.output, result.output


def test_a_map_that_does_not_fit_loads_nothing(store: ws.Store, tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    save_file({"t.a": torch.zeros(2)}, file)
    for names, says in [
        (NameMap().drop("b"), "drop('b') matches nothing"),
        (NameMap().drop("a"), "nothing would be written"),
        (NameMap().fuse(["a", "b"], "ab"), "t.b missing"),
        (NameMap().rename("a", " "), "not allowed"),
    ]:
        result = run(store, "load", "--map", write_map(tmp_path / "map.json", names), "unloaded", file)
        assert result.exit_code == 1
        assert says in result.output, result.output
    assert "unloaded" not in store.models()
