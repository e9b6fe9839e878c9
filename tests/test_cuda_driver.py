"""The driver module where there is no usable GPU: importable, and clear about what is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from weightstore.cuda import driver
from weightstore.errors import DependencyMissing, DeviceError


def test_without_a_device_it_says_why_and_raises_nothing_else() -> None:
    usable, reason = driver.available()
    if usable:
        pytest.skip("a GPU is here: tests/gpu covers it")
    assert reason
    with pytest.raises(DeviceError, match="no CUDA device can be used") as caught:
        driver.device(0)
    assert reason in caught.value.message


def test_without_cuda_bindings_the_message_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['cuda.bindings'] = None\n"
        "from weightstore.cuda import driver, copies, pinning\n"
        "print(driver.available())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("(False, ")
    assert "weightstore[cuda]" in done.stdout


def test_a_missing_package_is_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    driver.api.cache_clear()
    try:
        with pytest.raises(DependencyMissing, match="cuda-bindings"):
            driver.call("cuInit", 0)
    finally:
        driver.api.cache_clear()
