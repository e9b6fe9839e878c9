"""Checks of the GPU side for `weightstore doctor`: driver, bindings, torch's build, and what devices can do.

Looks without leaving a trace: no CUDA context is created and torch is not imported.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import Any, Final

from weightstore.cuda import driver
from weightstore.doctor.finding import Finding, Host
from weightstore.errors import DeviceError
from weightstore.sizes import format_size

INSTALL: Final = {
    12: "pip install 'cuda-bindings>=12.8,<13' cupy-cuda12x",
    13: "pip install 'weightstore[cuda]'",
}
"""What to install, by CUDA major version."""


def check_cuda(host: Host) -> list[Finding]:
    """Findings about CUDA; on a host without a GPU a single one that says so."""
    runs = driver_version()
    if runs is None:
        if not any(host.dev.glob("nvidia[0-9]*")):
            return [Finding("cuda", "ok", "no NVIDIA GPU here: engines use the host backend (device='cpu')")]
        advice = (
            "Install the NVIDIA driver's libcuda.so.1, or start the container with GPU support (--gpus all)."
        )
        return [Finding("cuda driver", "fail", "a GPU is there, but libcuda.so.1 cannot be loaded", advice)]
    findings = [Finding("cuda driver", "ok", f"supports CUDA {_dotted(runs)}")]
    bindings = bindings_version()
    built = torch_cuda(find_torch())
    findings.append(judge_torch(built, runs))
    findings.append(judge_bindings(bindings, built, runs))
    if findings[-1].status != "fail":
        findings += _devices()
    return findings


def judge_torch(built: str | None, runs: int) -> Finding:
    """`built`: the CUDA version torch was built for ('' for a CPU build), None without torch."""
    name = "torch"
    if built is None:
        return Finding(
            name, "warn", "torch is not installed", "Engines need it: https://pytorch.org/get-started"
        )
    if not built:
        advice = "Install a CUDA build (https://pytorch.org/get-started); weightstore will not replace it."
        return Finding(name, "warn", "torch is a CPU build, although a GPU is here", advice)
    if _major(built) > runs // 1000:
        advice = f"Update the driver, or install a torch built for CUDA {runs // 1000}."
        return Finding(
            name, "fail", f"torch is built for CUDA {built}, the driver has {_dotted(runs)}", advice
        )
    return Finding(name, "ok", f"built for CUDA {built}")


def judge_bindings(version: str | None, built: str | None, runs: int) -> Finding:
    """`version`: of cuda-bindings, None if it cannot be imported."""
    name = "cuda-bindings"
    # torch decides where there is one: both must agree with each other more than with the driver.
    wanted = min(max(_major(built) if built else runs // 1000, 12), 13)
    install = f"{INSTALL[wanted]}  (for CUDA {wanted})"
    if version is None:
        seen = "not importable, although a GPU is here: engines can only use the host backend"
        return Finding(name, "fail", seen, install)
    if _major(version) > runs // 1000:
        return Finding(name, "fail", f"{version} is newer than the driver's CUDA {_dotted(runs)}", install)
    if _major(version) != wanted:
        return Finding(name, "warn", f"{version}, while torch is built for CUDA {built or '(none)'}", install)
    return Finding(name, "ok", version)


def driver_version() -> int | None:
    """The CUDA version of the driver as 1000 × major + 10 × minor, or None without a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if cuda.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def bindings_version() -> str | None:
    """The version of cuda-bindings, or None where its driver module cannot be imported."""
    try:
        import cuda.bindings.driver  # noqa: F401
    except ImportError:
        return None
    return importlib.metadata.version("cuda-bindings")


def find_torch() -> Path | None:
    """Where torch is installed, without importing it (which takes seconds)."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def torch_cuda(torch: Path | None) -> str | None:
    """The CUDA version the torch in directory `torch` was built for, '' for none; None without torch."""
    if torch is None:
        return None
    try:
        text = (torch / "version.py").read_text()
    except OSError:
        return ""
    match = re.search(r"^cuda\b[^=\n]*= *['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match[1] if match else ""


def _devices() -> list[Finding]:
    usable, reason = driver.available()
    if not usable:
        advice = (
            "nvidia-smi shows whether the driver sees it; in containers, --gpus all and CUDA_VISIBLE_DEVICES."
        )
        return [Finding("gpu", "fail", reason, advice)]
    try:
        return [_device(ordinal) for ordinal in range(driver.call("cuDeviceGetCount"))]
    except DeviceError as error:
        return [Finding("gpu", "fail", error.message, "nvidia-smi may say more; a lost GPU needs a reset.")]


def _device(ordinal: int) -> Finding:
    name = f"gpu {ordinal}"
    handle = driver.call("cuDeviceGet", ordinal)
    model = driver.call("cuDeviceGetName", 128, handle).split(b"\0", 1)[0].decode(errors="replace")
    seen = f"{model}, {format_size(int(driver.call('cuDeviceTotalMem', handle)))}"
    if not _attribute(handle, "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED"):
        advice = "Engines cannot sleep on this device: it needs CUDA's virtual memory management."
        return Finding(name, "fail", f"{seen}, no virtual memory management", advice)
    if not _attribute(handle, "HOST_REGISTER_SUPPORTED"):
        advice = "Waking will copy through a staging buffer instead, several times slower."
        return Finding(name, "warn", f"{seen}, cannot pin existing host memory", advice)
    if not _attribute(handle, "READ_ONLY_HOST_REGISTER_SUPPORTED"):
        advice = "Engines will copy from the read-only arena through a staging buffer, several times slower."
        return Finding(name, "warn", f"{seen}, cannot pin read-only memory", advice)
    return Finding(name, "ok", f"{seen}, pins read-only memory")


def _attribute(handle: Any, name: str) -> int:
    attribute = getattr(driver.api().CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}", None)
    if attribute is None:
        return 0
    try:
        return int(driver.call("cuDeviceGetAttribute", attribute, handle))
    except DeviceError:
        return 0


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _major(version: str) -> int:
    return int(version.partition(".")[0])
