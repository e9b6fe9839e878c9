"""Ranks of a trainer whose model is sharded over them; `bench.refit` starts and drives them.

    python -m bench.refit_rank

imports torch once, then forks the ranks of a `Group` for every line of JSON on its standard input. Each rank
connects to the group's Unix socket and says who it is. Every line it gets there names a way to get the model
into the store; the answer, a line of JSON, are the seconds it took from when all ranks were ready until the
version was committed, and GPU memory at its peak.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator

import msgspec
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from bench import manifests
from bench.shapes import cut
from weightstore.client import Store, connect
from weightstore.sharding import Split, pieces_of
from weightstore.types import TensorSpec

STORED = "bench"


class Ranks:
    """The model as FSDP2 has it: every tensor a DTensor with rows of it on each rank."""

    def __init__(self, store: Store, specs: list[TensorSpec], device: str) -> None:
        self.store = store
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(device)
        mesh = init_device_mesh(self.device.type, (self.world,))
        self.module = nn.Module()
        for spec in specs:
            lo, hi = self.rows(spec.shape, self.rank)
            dtype = getattr(torch, spec.dtype)
            local = torch.empty((hi - lo, *spec.shape[1:]), dtype=dtype, device=self.device)
            local.view(torch.uint8).fill_(len(spec.name))
            whole = DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=torch.Size(spec.shape), stride=spec.stride
            )
            self._register(spec.name, nn.Parameter(whole, requires_grad=False))

    def _register(self, name: str, parameter: nn.Parameter) -> None:
        module = self.module
        *path, leaf = name.split(".")
        for step in path:
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        module.register_parameter(leaf, parameter)

    def rows(self, shape: tuple[int, ...], rank: int) -> tuple[int, int]:
        """Which rows of a tensor a rank has."""
        boxes = [piece.box for piece in pieces_of(shape, (self.world,), (rank,), [Split(0)])]
        return (boxes[0].lo[0], boxes[0].hi[0]) if boxes else (0, 0)

    def tensors(self) -> Iterator[tuple[str, DTensor]]:
        for name, parameter in self.module.named_parameters():
            assert isinstance(parameter, DTensor)
            yield name, parameter

    # -- ways to get it into the store -------------------------------------------------------------

    def sharded(self) -> None:
        """Every rank writes what it has."""
        with self.store.refit(STORED, key="step") as refit:
            refit.put_module(self.module)

    def gathered(self) -> None:
        """Tensor by tensor: rank 0 receives the rows of all, straight into a whole, and writes that. Needs
        the least memory of all ways that gather."""
        if self.rank:
            for _, tensor in self.tensors():
                if tensor.to_local().numel():
                    dist.send(tensor.to_local(), 0)
            return
        with self.store.refit(STORED) as refit:
            for name, tensor in self.tensors():
                whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
                for rank in range(self.world):
                    lo, hi = self.rows(tuple(tensor.shape), rank)
                    if not rank:
                        whole[lo:hi].copy_(tensor.to_local())
                    elif lo < hi:
                        dist.recv(whole[lo:hi], rank)
                refit.put(name, whole)

    def state_dict(self) -> None:
        """torch's own way: the full state dict on rank 0's CPU, then one put of all of it."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole = get_model_state_dict(self.module, options=options)
        if not self.rank:
            with self.store.refit(STORED) as refit:
                refit.put_many(whole)

    def timed(self, way: str) -> dict[str, float]:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        dist.barrier()
        began = time.perf_counter()
        getattr(self, way)()
        dist.barrier()
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "gpu": torch.cuda.max_memory_allocated() - before if cuda else 0}


class Group(msgspec.Struct):
    """Ranks to be forked: how many, where they meet each other and their driver, what they hold and where."""

    world: int
    meeting: str
    link: str
    store: str
    device: str
    model: str
    components: tuple[str, ...]
    limit: int


def serve(group: Group, rank: int) -> None:
    cuda = group.device == "cuda"
    device = f"cuda:{rank}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(rank)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // group.world))
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{group.meeting}",
        rank=rank,
        world_size=group.world,
        device_id=torch.device(device) if cuda else None,
    )
    specs = cut(manifests.load(group.model, group.components), group.limit)
    with connect(group.store, timeout=60.0) as store, socket.socket(socket.AF_UNIX) as link:
        ranks = Ranks(store, specs, device)
        link.connect(group.link)
        stream = link.makefile("rw")
        print(json.dumps({"rank": rank, "pid": os.getpid()}), file=stream, flush=True)
        for line in stream:
            print(json.dumps(ranks.timed(line.strip())), file=stream, flush=True)
    dist.destroy_process_group()


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who drives a rank sees it end
    for line in sys.stdin:
        group = msgspec.json.decode(line, type=Group)
        for rank in range(group.world):
            if os.fork() == 0:
                code = 1
                try:
                    serve(group, rank)
                    code = 0
                except Exception:
                    traceback.print_exc()
                finally:
                    os._exit(code)


if __name__ == "__main__":
    main()
