from __future__ import annotations

import torch

from weightstore.cuda.doctor import check_cuda
from weightstore.doctor import Host


def test_findings_on_a_real_device() -> None:
    findings = check_cuda(Host())
    assert [finding.name for finding in findings[:3]] == ["cuda driver", "torch", "cuda-bindings"]
    gpus = findings[3:]
    assert [finding.name for finding in gpus] == [f"gpu {n}" for n in range(torch.cuda.device_count())]
    for number, finding in enumerate(gpus):
        assert finding.status == "ok" and torch.cuda.get_device_name(number) in finding.seen
