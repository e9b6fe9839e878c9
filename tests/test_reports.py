"""What a report prints stays one short line, however many weights there are."""

from __future__ import annotations

from engine_hooks.reports import AttachReport, RefitReport, SleepReport, VerifyReport, WakeReport

MIB = 1 << 20
MANY = tuple(f"transformer.blocks.{i}.weight" for i in range(2000))


def test_attaching() -> None:
    assert str(AttachReport(1, True, ("a", "b"), 2, 0, MIB, 3 * MIB, 0, 1, (), 0.25)) == (
        "a, b published as version 1 in 0.25 s: 3 MiB copied, 1 MiB of engine state"
    )
    assert "a attached to version 7" in str(AttachReport(7, False, ("a",), 2, 0, 0, 0, 0, 1, MANY, 0.25))


def test_sleeping() -> None:
    assert str(SleepReport(("a",), ("b",), 5 * MIB, 2 * MIB, 5 * MIB, 12, 0.0, 0.5)) == (
        "a asleep in 0.5 s: 5 MiB freed, 2 MiB still in use, 12 B of engine state saved"
    )
    assert str(SleepReport((), ("a", "b"), 0, 0, 0, 0, 0.0, 0.5)) == "a, b slept already"


def test_waking() -> None:
    assert str(WakeReport(("a",), (), 4, MANY, 5 * MIB, 0, 0, 0, 1, 0.5)) == (
        "a awake on version 4 in 0.5 s: 5 MiB copied, 2000 weights may have changed"
    )
    assert str(WakeReport((), ("a",), 4, (), 0, 0, 0, 0, 0, 0.5)) == "a awake already, on version 4"


def test_refitting() -> None:
    assert str(RefitReport(4, 3, False, MANY[:1], 2 * MIB, 0, 1, 0.0, 0.5)) == (
        "from version 3 to 4 in 0.5 s: 1 weight changed, 2 MiB copied"
    )
    assert str(RefitReport(4, 4, False, (), 0, 0, 0, 0.0, 0.5)) == "on version 4 already"
    assert str(RefitReport(5, 4, True, (), 0, 0, 0, 0.0, 0.5)) == "asleep; a wake brings version 5"


def test_verifying() -> None:
    good = VerifyReport(4, ("a", "b"), (), 2 * MIB, 0, (), (), 0.5)
    assert good.ok
    assert str(good) == "version 4, 2 MiB of a, b: equal, bit for bit"
    bad = VerifyReport(4, ("a",), (), 2 * MIB, 0, MANY, MANY[:1], 0.5)
    assert str(bad).startswith("version 4, 2 MiB of a: 2000 weights differ (transformer.blocks.0.weight, ")
    assert str(bad).endswith("blocks.4.weight, …); 1 moved (transformer.blocks.0.weight)")
