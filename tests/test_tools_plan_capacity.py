"""The capacity planner against numbers worked out by hand, and against the store's own allocator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tools.manifest_files import FORMAT
from tools.plan_capacity import Model, component_of_specs, main, make_plan, read_components
from weightstore.allocator import Allocator
from weightstore.types import TensorSpec, contiguous_stride, nbytes_of

MIB = 1 << 20


def write_manifest(path: Path, components: dict[str, list[list[object]]]) -> Path:
    parts = {name: {"cls": "x", "tensors": rows} for name, rows in components.items()}
    path.write_text(json.dumps({"format": FORMAT, "model": "m", "components": parts}))
    return path


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """transformer: 2 MiB + 512 (300 rounded up) + 0; vae: 256 (2 rounded up) + 1 MiB, one tie."""
    return write_manifest(
        tmp_path / "m.json",
        {
            "transformer": [["w", "bfloat16", [1024, 1024]], ["b", "uint8", [300]], ["e", "float32", [0, 4]]],
            "vae": [["s", "float16", []], ["w", "float32", [512, 512]], ["t", "float32", [512, 512], "w"]],
        },
    )


def planned(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, object]:
    assert main([*args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


TRAINED = 2 * MIB + 512
FROZEN = MIB + 256


def test_one_model(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, str(manifest), "--window", "1MiB")
    assert plan["steady"] == TRAINED + FROZEN == 3 * MIB + 768
    assert plan["peak_refit"] == 5 * MIB + 1280
    assert plan["peak_lagging"] == 7 * MIB + 1792
    assert plan["peak_in_place"] == 3 * MIB + 768
    assert plan["peak_reload"] == 6 * MIB + 1536
    assert plan["capacity"] == 6 * MIB  # 5 MiB + 1280 in whole windows
    assert plan["capacity_in_place"] == 4 * MIB
    assert plan["shm"] == 70 * MIB and plan["shm_in_place"] == 68 * MIB  # and the store's own 64 MiB
    assert plan["private_copies"] == 3 * MIB + 302
    (model,) = plan["models"]  # type: ignore[misc]
    assert [(c["name"], c["tensors"], c["ties"], c["nbytes"]) for c in model["components"]] == [
        ("transformer", 3, 0, 2 * MIB + 300),
        ("vae", 2, 1, MIB + 2),
    ]


def test_tags_share_frozen_components_and_engines_cost_nothing(
    manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = planned(capsys, str(manifest), "--window", "1MiB", "--tags", "3")
    many = planned(capsys, str(manifest), "--window", "1MiB", "--tags", "3", "--engines", "8")
    assert one["steady"] == many["steady"] == 3 * TRAINED + FROZEN
    assert one["peak_refit"] == many["peak_refit"] == 4 * TRAINED + FROZEN
    assert one["capacity"] == many["capacity"] == 10 * MIB  # 9 MiB + 2304
    assert one["private_copies"] == 3 * MIB + 302
    assert many["private_copies"] == 8 * (3 * MIB + 302)


def test_refits_at_the_same_time_need_a_copy_each_but_no_more_than_there_are_tags(
    manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = (str(manifest), "--window", "1MiB", "--tags", "2", "--refits")
    assert planned(capsys, *args, "2")["peak_refit"] == 4 * TRAINED + FROZEN
    assert planned(capsys, *args, "5")["peak_refit"] == 4 * TRAINED + FROZEN
    assert planned(capsys, *args, "5")["capacity"] == 10 * MIB


def test_several_models_each_keep_a_spare_and_room_for_fragments(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_manifest(tmp_path / "o.json", {"unet": [["w", "uint8", [5 * MIB]]]})
    args = (f"a={manifest}", f"b={other}", "--window", "1MiB", "--tags", "b=2", "--engines", "a=4")
    plan = planned(capsys, *args)
    assert plan["steady"] == TRAINED + FROZEN + 2 * 5 * MIB
    assert plan["peak_refit"] == TRAINED + FROZEN + 3 * 5 * MIB
    # 2 (TRAINED) + FROZEN + 3 × 5 MiB = 20 MiB + 1280, and two largest tensors of 5 MiB for fragments
    assert plan["capacity"] == 31 * MIB
    assert plan["private_copies"] == 4 * (3 * MIB + 302) + 5 * MIB


def test_what_is_trained_can_be_chosen(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, f"m={manifest}", "--trained", "vae", "--tags", "2")
    assert plan["steady"] == TRAINED + 2 * FROZEN
    plan = planned(
        capsys, f"m={manifest}", "--trained", "vae", "--trained", "m=transformer,vae", "--tags", "2"
    )
    assert plan["steady"] == 2 * TRAINED + 2 * FROZEN
    assert plan["capacity"] == 1 << 30  # the default window


def test_safetensors_headers_count_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for component, tensors in {
        "transformer": {"w": torch.zeros(1000, dtype=torch.bfloat16), "b": torch.zeros(3)},
        "vae": {"w": torch.zeros(256, dtype=torch.uint8)},
    }.items():
        (tmp_path / "pipe" / component).mkdir(parents=True)
        save_file(tensors, tmp_path / "pipe" / component / "model.safetensors")
    plan = planned(capsys, f"pipe={tmp_path / 'pipe'}", "--tags", "2")
    assert plan["steady"] == 2 * (2048 + 256) + 256
    # A component's file alone has names without a prefix: one component, and it is what is trained.
    plan = planned(capsys, str(tmp_path / "pipe/transformer"), "--tags", "2")
    assert plan["steady"] == 2 * (2048 + 256)


def test_real_models_as_measured(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "flux1-dev", "--engines", "8")
    assert round(plan["steady"] / 2**30, 1) == 31.4  # type: ignore[operator]
    transformer = sum(
        -(-nbytes_of(s.dtype, s.shape) // 256) * 256 for s in read_components("flux1-dev")["transformer"]
    )
    assert plan["peak_refit"] - plan["steady"] == transformer == 23_802_816_768  # type: ignore[operator]
    assert plan["capacity"] == 54 << 30


def test_the_table_gives_the_numbers_serve_takes(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(manifest), "--window", "1MiB", "--engines", "8"]) == 0
    out = capsys.readouterr().out
    assert "--capacity 6MiB   /dev/shm at least 70MiB" in out
    assert "transformer (trained)" in out and "8 of m" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "nowhere: no such file, directory or bundled model (flux1-dev, "),
        (["../manifests/flux1-dev"], "no such file, directory or bundled model"),
        (["flux1-dev", "--trained", "unet"], "flux1-dev has no component unet"),
        (["flux1-dev", "--tags", "0"], "--tags 0: must be a whole number, at least 1"),
        (["flux1-dev", "--tags", "x=2"], "there is no model x"),
        (["flux1-dev", "--window", "big"], "'big' is not a size"),
        (["flux1-dev", "flux1-dev"], "two models are called 'flux1-dev'"),
        (["pyproject.toml"], "not a checkpoint weightstore reads"),
    ],
)
def test_mistakes_are_named(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("{}", "[]", "not json", '{"format": "weightstore manifest 1"}'):
        (tmp_path / "m.json").write_text(text)
        assert main([str(tmp_path / "m.json")]) == 2
        assert "not a manifest" in capsys.readouterr().err


def test_it_runs_as_a_script_and_imports_no_torch() -> None:
    script = Path(__file__).parent.parent / "tools/plan_capacity.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and "--engines" in done.stdout
    code = (
        "import sys; from tools import plan_capacity; plan_capacity.main(['flux1-dev']);"
        " sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=script.parent.parent)
    assert done.returncode == 0, done.stderr


sizes = st.lists(st.integers(1, 40_000), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(sizes, sizes, st.integers(1, 3)), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=40),
)
def test_refits_fit_in_the_recommended_capacity(
    shapes: list[tuple[list[int], list[int], int]], refits: list[tuple[int, int]]
) -> None:
    """The planned models, loaded, tagged and refitted in any order, with the store's allocator."""

    def specs(component: str, sizes: list[int]) -> list[TensorSpec]:
        return [
            TensorSpec(f"{component}.{i}", "uint8", (n,), contiguous_stride((n,)))
            for i, n in enumerate(sizes)
        ]

    models = [
        Model(
            str(i),
            tags,
            1,
            [
                component_of_specs("transformer", specs("transformer", trained), True, tags),
                component_of_specs("vae", specs("vae", frozen), False, tags),
            ],
        )
        for i, (trained, frozen, tags) in enumerate(shapes)
    ]
    plan = make_plan(models, 4096)
    arena = Allocator(0, plan.capacity)
    held = []
    for trained, frozen, tags in shapes:
        arena.reserve(frozen)
        held.append([arena.reserve(trained) for _ in range(tags)])
    assert arena.used_bytes == plan.steady
    for model, tag in refits:
        copies = held[model % len(held)]
        tag %= len(copies)
        new = arena.reserve(shapes[model % len(held)][0])
        assert arena.used_bytes <= plan.peak_refit
        arena.release(copies[tag])
        copies[tag] = new
    assert arena.used_bytes == plan.steady
