"""FSDP2 full fine-tune: each rank writes the shards it holds, nothing is gathered, and its engine follows.

Run ``torchrun --nproc-per-node 2 examples/fsdp2_finetune.py [--socket PATH]``; else rank 0 starts a store.
"""

import argparse
import os
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import weightstore
from engine_hooks import EngineHook


def denoiser() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 16))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket")
    socket = [parser.parse_args().socket]
    dist.init_process_group()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    trained, engine = denoiser().to(device), denoiser().bfloat16()  # float32 masters, a bfloat16 engine
    for layer in (*trained[::2], trained):
        fully_shard(layer)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    with ExitStack() as held:
        if socket[0] is None and dist.get_rank() == 0:
            socket = [held.enter_context(weightstore.local_store("64MiB")).socket]
        dist.broadcast_object_list(socket)
        store = held.enter_context(weightstore.connect(socket[0]))
        hook = EngineHook.attach(store, "fsdp2", {"net": engine}, device=device, tag="policy")
        held.enter_context(hook)
        torch.manual_seed(dist.get_rank())
        for step in range(3):
            hook.sleep()
            noise = torch.randn(32, 16, device=device)
            loss = (trained(noise) - noise.tanh()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with store.refit("fsdp2", tag="policy", key=f"step {step}") as refit:
                refit.put_module(trained, prefix="net.")
            version = hook.wake().version
            for mine, theirs in zip(trained.parameters(), engine.parameters(), strict=True):
                assert torch.equal(mine.full_tensor().bfloat16(), theirs)
            if dist.get_rank() == 0:
                print(f"step {step}: loss {loss.item():.3f}, engines on version {version}", flush=True)
        dist.barrier()  # rank 0's store must outlive the others' use of it


if __name__ == "__main__":
    main()
