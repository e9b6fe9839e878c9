"""Ranks of a trainer in processes of their own, driven over sockets; `ranks.py` is the other end.

    python rank_process.py

imports torch once, then forks a rank for every line on its standard input, which is the path of the Unix
socket that the rank connects to. A rank answers each request, a line of JSON, with one of its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import weightstore as ws
from weightstore.errors import WeightstoreError
from weightstore.trainer import Refit


class Block(nn.Module):
    """Odd sizes, a tied weight, buffers, and a tensor large enough to be shared out."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, width)
        self.up = nn.Linear(width, 13)
        self.down = nn.Linear(13, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 9, bias=False)
        self.head.weight = self.embed.weight
        self.wide = nn.Parameter(torch.randn(1501, 503))
        self.scalar = nn.Parameter(torch.randn(1))
        self.register_buffer("freqs", torch.randn(3, 2))
        self.register_buffer("scratch", torch.randn(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.embed(x))
        hidden = hidden + self.down(torch.relu(self.up(hidden)))
        return self.head(hidden) * self.scalar + self.wide.sum()


class Rank:
    """What a rank holds between requests. Each public method answers one."""

    def __init__(self) -> None:
        self.device = "cpu"
        self.model: nn.Module = nn.Module()
        self.store: ws.Store | None = None
        self.refit: Refit | None = None

    def start(self, path: str, rank: int, world_size: int, device: str = "cpu") -> int:
        self.device = device
        if device == "cuda":
            torch.cuda.set_device(rank)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{path}", rank=rank, world_size=world_size)
        return os.getpid()

    def connect(self, store: str) -> None:
        self.store = ws.connect(store, timeout=60)

    def build(self, kind: str, seed: int = 0, dtype: str = "float32") -> list[str]:
        """Make the same model on every rank, spread as `kind` says; how its parameters lie."""
        torch.manual_seed(seed)
        world = dist.get_world_size()
        model: nn.Module = Block(8 if kind == "fsdp_tp" else 7).to(self.device, getattr(torch, dtype))
        if kind == "fsdp":
            fully_shard(model, mesh=init_device_mesh(self.device, (world,)))
        elif kind == "mixed":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            fully_shard(model, mesh=init_device_mesh(self.device, (world,)), mp_policy=policy)
        elif kind == "layers":
            mesh = init_device_mesh(self.device, (world,))
            for layer in (model.up, model.down):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        elif kind == "hsdp":
            mesh = init_device_mesh(self.device, (2, world // 2), mesh_dim_names=("replicas", "shards"))
            fully_shard(model, mesh=mesh)
        elif kind == "fsdp_tp":
            mesh = init_device_mesh(self.device, (world // 2, 2), mesh_dim_names=("dp", "tp"))
            parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
            for layer in (model.up, model.down):
                fully_shard(layer, mesh=mesh["dp"])
        elif kind == "columns":
            mesh = init_device_mesh(self.device, (world,))
            model = nn.Module()
            weight = distribute_tensor(torch.arange(35.0, device=self.device).view(5, 7), mesh, [Shard(1)])
            model.register_parameter("w", nn.Parameter(weight))
        elif kind == "ddp":
            model = DistributedDataParallel(model)
        elif kind == "partial":
            mesh = init_device_mesh(self.device, (world,))
            model = nn.Module()
            model.register_parameter("fine", nn.Parameter(torch.ones(3)))
            model.register_parameter("w", nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()])))
        elif kind == "stages":
            model = nn.ModuleDict({f"stage{dist.get_rank()}": nn.Linear(4, 3)})
        else:
            raise ValueError(kind)
        self.model = model
        return [f"{name}: {getattr(p, 'placements', 'whole')}" for name, p in model.named_parameters()]

    def train(self, steps: int = 1, forward: bool = True) -> None:
        """Real steps; then, as after a validation, one forward that leaves parameters gathered."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        tokens = torch.arange(6, device=self.device).view(2, 3) % 9
        for _ in range(steps):
            self.model(tokens).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if forward:
            self.model(tokens)

    def shown(self) -> list[str]:
        """The types its parameters have at the moment."""
        return sorted({type(parameter).__name__ for parameter in self.model.parameters()})

    def save(self, path: str) -> None:
        """What the whole model is, gathered by torch: the reference. Rank 0 writes it."""
        state = self.model.state_dict()
        full = {n: (t.full_tensor() if isinstance(t, DTensor) else t).contiguous() for n, t in state.items()}
        if dist.get_rank() == 0:
            save_file({name.removeprefix("module."): tensor.clone() for name, tensor in full.items()}, path)

    def open(self, model: str, key: str | None = "step", **options: Any) -> None:
        assert self.store is not None
        names = options.pop("names", None)
        names = None if names is None else ws.NameMap.from_json(names)
        self.refit = self.store.refit(model, key=key, names=names, **options)

    def put(self, prefix: str = "t.", **options: Any) -> dict[str, int]:
        """put_module, counting torch's collectives on the way."""
        assert self.refit is not None
        with CommDebugMode() as traffic:
            self.refit.put_module(self.model, prefix, **options)
        return {"collectives": traffic.get_total_counts()}

    def put_half(self, prefix: str = "t.") -> int:
        """Some of the tensors, as a rank that is interrupted."""
        assert self.refit is not None
        items = [(f"{prefix}{name}", tensor) for name, tensor in self.model.state_dict().items()]
        some = items[: len(items) // 2]
        self.refit.put_many(some, replicated=True)
        return len(some)

    def commit(self) -> dict[str, Any]:
        assert self.refit is not None
        self.refit.commit()
        report = self.refit.report
        return {"version": report.version, "tensors": report.tensors, "nbytes": report.nbytes}

    def abort(self, reason: str) -> None:
        assert self.refit is not None
        self.refit.abort(reason)

    def write(self, model: str, prefix: str = "t.", **options: Any) -> dict[str, Any]:
        """A refit from beginning to end."""
        self.open(model, **options)
        assert self.refit is not None
        with self.refit:
            counted = self.put(prefix)
        report = self.refit.report
        written = {"version": report.version, "tensors": report.tensors, "nbytes": report.nbytes}
        return counted | written | {"unchanged": report.unchanged}

    def write_mine(self, model: str, count: int, scale: float) -> dict[str, Any]:
        """Whole tensors, each given by one of the ranks only."""
        self.open(model, skip_unchanged=True)
        assert self.refit is not None
        with self.refit:
            for i in range(dist.get_rank(), count, dist.get_world_size()):
                self.refit.put(f"t.{i}", torch.full((5,), i * (scale if i == 3 else 1.0)))
        return {"tensors": self.refit.report.tensors, "unchanged": self.refit.report.unchanged}


def serve(path: str) -> None:
    torch.set_num_threads(1)
    rank = Rank()
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(path)
        stream = link.makefile("rw")
        for line in stream:
            request: dict[str, Any] = json.loads(line)
            method: Callable[..., Any] = getattr(rank, request.pop("do"))
            try:
                answer = {"value": method(**request)}
            except WeightstoreError as error:
                answer = {"error": type(error).__name__, "message": error.message, "details": error.details}
            stream.write(json.dumps(answer) + "\n")
            stream.flush()


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for ranks; a killed one leaves at once
    print("ready", flush=True)
    for line in sys.stdin:
        if os.fork() == 0:
            status = 1
            try:
                serve(line.rstrip("\n"))
                status = 0
            finally:
                os._exit(status)


if __name__ == "__main__":
    main()
