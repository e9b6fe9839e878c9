"""The trainer of `python -m bench sglang`: a process of its own, whose tensors lie on the engine's device.

Commands and answers are lines of JSON, as in `sglang_role`. It holds the checkpoint's transformer, or parts
of it, and hands that over in both ways: to the engine's scheduler by SGLang's own request, in flattened
buckets that go through CUDA IPC, and to the store.

Step number n turns over the lowest bits of every weight: they are those of the checkpoint, exclusive or n.
So every weight changes, by a few last places; it is exact, the same in every run, and step 0 brings the
checkpoint back.

SGLang is imported after the first answer: so the engine's own start need not wait for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from bench.rl_step.roles import taken

PREFIX: Final = "transformer."
ENDING: Final = 5.0
"""Seconds to wait for an engine to let go of buckets."""
SLACK: Final = 1 << 20
_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def buckets(tensors: Iterable[tuple[str, int]], limit: int) -> list[list[str]]:
    """Names by bucket, in order: as many as fit into `limit` bytes; a larger tensor has one for itself."""
    found: list[list[str]] = []
    room = 0
    for name, nbytes in tensors:
        if not found or nbytes > room:
            found.append([])
            room = limit
        found[-1].append(name)
        room -= nbytes
    return found


def turn(tensors: Iterable[torch.Tensor], bits: int) -> None:
    """Turn over these bits of every element, where it lies."""
    for tensor in tensors:
        tensor.view(_INTEGERS[tensor.element_size()]).bitwise_xor_(bits)


def read(model: Path, prefixes: list[str] | None, device: str) -> dict[str, torch.Tensor]:
    """The checkpoint's transformer, of it the names that begin so, straight onto the device."""
    from safetensors import safe_open

    tensors = {}
    for path in sorted((model / "transformer").glob("*.safetensors")):
        with safe_open(path, framework="pt", device=device) as file:
            for name in file.keys():
                if prefixes is None or name.startswith(tuple(prefixes)):
                    tensors[name] = file.get_tensor(name)
    return tensors


class Trainer:
    def __init__(self, config: Mapping[str, Any]) -> None:
        self.model = Path(config["model"])
        self.device = "cpu" if config["cpu"] else "cuda"
        self._name: str = config["name"]
        self._socket: str = config["socket"]
        self._tensors: dict[str, torch.Tensor] = {}
        self._turned = 0
        self._workspace: torch.Tensor | None = None
        self._store: Any = None
        self._context = 0
        self._held = 0  # of torch's allocator, by the tensors
        if self.device == "cuda":
            torch.zeros(1, device=self.device)
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            self._context = total - free  # nothing else is on the device yet

    def imports(self) -> None:
        """What is needed later and takes long; nothing of it is to be timed."""
        import zmq  # noqa: F401
        from sglang.multimodal_gen.runtime.entrypoints.post_training import io_struct  # noqa: F401
        from sglang.multimodal_gen.runtime.pipelines_core import schedule_batch  # noqa: F401
        from sglang.srt.utils import MultiprocessingSerializer  # noqa: F401
        from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket  # noqa: F401

        import weightstore

        if self.device == "cuda":
            monkey_patch_torch_reductions()  # both ends name the GPU by its UUID
        else:
            torch.multiprocessing.set_sharing_strategy("file_system")  # the other asks a parent's key
        self._store = weightstore.connect(self._socket)

    def facts(self) -> dict[str, Any]:
        """Of the device's memory: what is this process's, what is free."""
        if self.device == "cpu":
            return {"own": 0}
        self._wait()
        own = _by_driver(os.getpid())
        free, total = torch.cuda.mem_get_info()
        return {
            "own": self._context + torch.cuda.memory_reserved() if own is None else own,
            "by": "torch" if own is None else "driver",
            "context": self._context,
            "reserved": torch.cuda.memory_reserved(),
            "free": free,
            "total": total,
            "name": torch.cuda.get_device_name(),
        }

    # -- the weights -------------------------------------------------------------------------------

    def load(self, prefixes: list[str] | None = None) -> dict[str, Any]:
        """Have the checkpoint's transformer on the device, or the names that begin so."""
        self.drop()
        began = time.perf_counter()
        self._tensors = read(self.model, prefixes, self.device)
        self._wait()
        self._held = torch.cuda.memory_allocated() if self.device == "cuda" else 0
        return {"seconds": time.perf_counter() - began, "bytes": self._bytes, "tensors": len(self._tensors)}

    def prepare(self) -> dict[str, Any]:
        """Before anything is timed: room for a second version, pinned by the first refit."""
        nbytes = self._store.prepare(self._name, components=["transformer"], device=self.device)
        return {"bytes": nbytes}

    def take(self, nbytes: int) -> dict[str, Any]:
        """Get the device memory that a step needs, as soon as it is there."""
        self._workspace = taken(nbytes, self.device, self._give_back)
        return {"bytes": nbytes}

    def step(self, number: int) -> dict[str, Any]:
        """The weights of that step; the memory taken for it is given back."""
        turn(self._tensors.values(), self._turned ^ number)
        self._turned = number
        self._workspace = None
        self._give_back()
        return {"step": number}

    def drop(self) -> dict[str, Any]:
        """Give all of the device's memory back but the context; how much of it came free."""
        before = self._free()
        self._tensors.clear()
        self._held = self._turned = 0
        self._workspace = None
        self._give_back()
        return {"freed": self._free() - before}

    # -- handing it over ---------------------------------------------------------------------------

    def push(self, endpoint: str, bucket: int) -> dict[str, Any]:
        """SGLang's way: `update_weights_from_tensor`, one request for each flattened bucket.

        `prepare` is this side's part of `seconds`: to flatten and to serialize. It ends with the first error.
        """
        from sglang.multimodal_gen.runtime.entrypoints.post_training.io_struct import (
            UpdateWeightFromTensorReqInput,
        )
        from sglang.srt.utils import MultiprocessingSerializer
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

        began = time.perf_counter()
        prepare = 0.0
        requests: list[float] = []
        error: str | None = None
        for names in buckets(((name, tensor.nbytes) for name, tensor in self._tensors.items()), bucket):
            started = time.perf_counter()
            flat = FlattenedTensorBucket(named_tensors=[(name, self._tensors[name]) for name in names])
            payload = MultiprocessingSerializer.serialize(
                {
                    "transformer": {
                        "flattened_tensor": flat.get_flattened_tensor(),
                        "metadata": flat.get_metadata(),
                    }
                },
                output_str=True,
            )
            sent = time.perf_counter()
            answer = _ask(
                endpoint,
                UpdateWeightFromTensorReqInput(
                    serialized_named_tensors=[payload],
                    load_format="flattened_bucket",
                    target_modules=["transformer"],
                ),
            )
            requests.append(time.perf_counter() - sent)
            prepare += sent - started
            error = answer.error
            if error is not None:
                break
        seconds = time.perf_counter() - began
        return {
            "seconds": seconds,
            "prepare": prepare,
            "requests": requests,
            "bytes": self._bytes,
            "tensors": len(self._tensors),
            "error": error,
        }

    def put(self, partial: bool) -> dict[str, Any]:
        """Into the store: the whole transformer, or these tensors of it."""
        began = time.perf_counter()
        with self._store.refit(self._name, components=["transformer"], partial=partial) as refit:
            refit.put_many({f"{PREFIX}{name}": tensor for name, tensor in self._tensors.items()})
        return {
            "put_and_commit": time.perf_counter() - began,
            "bytes": self._bytes,
            "tensors": len(self._tensors),
            "version": refit.report.version,
        }

    def end(self) -> None:
        self.drop()
        if self._store is not None:
            self._store.close()

    # -- memory ------------------------------------------------------------------------------------

    @property
    def _bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _free(self) -> int:
        return torch.cuda.mem_get_info()[0] if self.device == "cuda" else 0

    def _give_back(self) -> None:
        """Return what torch keeps for later, buckets too as soon as the engine has let go of them."""
        if self.device == "cpu":
            return
        torch.cuda.synchronize()
        ending = time.perf_counter() + ENDING
        while True:
            torch.cuda.ipc_collect()
            if torch.cuda.memory_allocated() <= self._held + SLACK or time.perf_counter() > ending:
                break
            time.sleep(0.002)
        torch.cuda.empty_cache()


def _ask(endpoint: str, request: Any) -> Any:
    """As SGLang's own client asks: a request and its answer on a socket of their own."""
    import zmq

    context = zmq.Context.instance()
    with context.socket(zmq.REQ) as asking:
        asking.setsockopt(zmq.LINGER, 0)
        asking.connect(endpoint)
        asking.send_pyobj(request)
        return asking.recv_pyobj()


def _by_driver(pid: int) -> int | None:
    """What the driver says a process has of the first GPU; None where it does not tell processes apart."""
    try:
        import pynvml
    except ImportError:
        return None
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0)):
            if process.pid == pid and process.usedGpuMemory:
                return int(process.usedGpuMemory)
    return None


def main() -> None:
    config = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints must not break the protocol
    if config["cpu"]:
        os.environ["SGLANG_DIFFUSION_PLATFORM_OVERRIDE"] = "cpu"
    trainer = Trainer(config)
    print(json.dumps({"started": trainer.facts()}), file=answers, flush=True)
    trainer.imports()
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("command")
        try:
            answer = getattr(trainer, name)(**command)
        except Exception as error:  # whatever it is, it is the answer
            answer = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps(answer), file=answers, flush=True)
    trainer.end()


if __name__ == "__main__":
    main()
