from __future__ import annotations

from weightstore.report import RefitReport


def test_numbers_a_person_can_read() -> None:
    report = RefitReport("flux1-dev", "policy", 4, 3, 1160, 23_800_000_000, 2.0)
    assert report.gb_per_s == 11.9
    assert str(report) == (
        "flux1-dev: policy is now version 4 on version 3: 1160 tensors, 22.2 GiB in 2 s (11.9 GB/s)"
    )


def test_a_first_version_of_one_tensor_in_no_time() -> None:
    report = RefitReport("m", "latest", 1, 0, 1, 0, 0.0)
    assert "on version" not in str(report) and "1 tensor," in str(report)
    assert report.gb_per_s == 0
