"""How a comparison is cut into chunks, without a GPU."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine_hooks.backend import Run
from engine_hooks.cuda_compare import GAP, chunks_of

LIMIT = 5000


@st.composite
def runs(draw: st.DrawFn) -> list[Run]:
    found, target = [], draw(st.integers(0, 20))
    for _ in range(draw(st.integers(0, 20))):
        nbytes = draw(st.integers(0, 12_000))
        source = target + draw(st.sampled_from([0, 0, 0, 100_000, 7]))
        found.append(Run(source, target, nbytes))
        target += nbytes + draw(st.sampled_from([0, 1, 255, GAP, GAP + 1, 9000]))
    return draw(st.permutations(found))


@given(runs())
def test_chunks_hold_every_byte_of_every_run_once(given_runs: list[Run]) -> None:
    chunks = chunks_of(given_runs, LIMIT)
    covered: dict[int, list[Run]] = {}
    for chunk in chunks:
        assert 0 < chunk.nbytes <= LIMIT
        for index, part in chunk.parts:
            assert chunk.target <= part.target
            assert part.target + part.nbytes <= chunk.target + chunk.nbytes
            assert part.source - chunk.source == part.target - chunk.target
            covered.setdefault(index, []).append(part)
    for index, run in enumerate(given_runs):
        at = 0
        for part in covered.get(index, []):
            assert (part.source, part.target) == (run.source + at, run.target + at)
            at += part.nbytes
        assert at == run.nbytes


def test_neighbours_share_a_chunk_and_strangers_do_not() -> None:
    near = [Run(1000, 0, 100), Run(1256, 256, 100)]
    assert len(chunks_of(near, LIMIT)) == 1
    elsewhere = [Run(1000, 0, 100), Run(1257, 256, 100)]
    assert len(chunks_of(elsewhere, LIMIT)) == 2
