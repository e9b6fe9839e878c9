from __future__ import annotations

import threading

import pytest
import torch

from weightstore.cuda import driver
from weightstore.errors import DeviceError, DeviceMemoryError


def test_call_names_the_call_and_the_result(device: driver.Device) -> None:
    with (
        device.current(),
        pytest.raises(DeviceError, match="cuMemHostUnregister failed: CUDA_ERROR_") as caught,
    ):
        driver.call("cuMemHostUnregister", 4096)
    assert caught.value.details["call"] == "cuMemHostUnregister"
    assert caught.value.details["result"].startswith("CUDA_ERROR_")


def test_out_of_memory_has_its_own_class(device: driver.Device) -> None:
    with device.current(), pytest.raises(DeviceMemoryError):
        driver.call("cuMemAlloc", 1 << 50)
    torch.zeros(1, device="cuda")  # the failure left nothing behind for an unrelated call


def test_context_is_right_in_a_new_thread_and_put_back(device: driver.Device) -> None:
    seen: dict[str, int] = {}

    def work() -> None:
        seen["before"] = int(driver.call("cuCtxGetCurrent"))
        with device.current():
            seen["inside"] = int(driver.call("cuCtxGetCurrent"))
            address = driver.call("cuMemAlloc", 1 << 20)
            driver.call("cuMemFree", address)
        seen["after"] = int(driver.call("cuCtxGetCurrent"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == {"before": 0, "inside": int(device.context), "after": 0}


def test_it_is_the_context_that_torch_uses(device: driver.Device) -> None:
    torch.zeros(1, device="cuda:0")
    assert int(driver.call("cuCtxGetCurrent")) == int(device.context)


def test_memory_follows_allocations(device: driver.Device) -> None:
    free, total = device.memory()
    with device.current():
        address = driver.call("cuMemAlloc", 256 << 20)
        less, _ = device.memory()
        driver.call("cuMemFree", address)
    assert total > free >= less + (256 << 20)


def test_events_tell_when_a_stream_got_there(device: driver.Device) -> None:
    stream, event = driver.Stream(device), driver.Event(device)
    assert event.done()
    torch_stream = torch.cuda.ExternalStream(int(stream.handle))
    with torch.cuda.stream(torch_stream):
        torch.cuda._sleep(200_000_000)
    event.record(stream)
    assert not event.done()
    event.synchronize()
    assert event.done()
    event.close()
    stream.close()
    stream.close()
