"""The trainer's process: teaches the UNet, and refits the store with the average of its weights."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
from torch import nn

import weightstore
from engine_hooks.demo import MODEL, TAG, digits, model
from engine_hooks.demo.role import Emit, Handler, serve

BATCH = 64
PEAK_RATE = 3e-3
WARM_UP = 30
AVERAGE = 0.99
"""Decay per step of the moving average of the weights: the average draws better than the weights."""
UNPROMPTED = 0.1
"""Share of a batch trained without its prompt, which is what makes guidance possible."""


class Trainer:
    """Flow matching: the UNet learns the velocity from data to noise at random points in between."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._device = model.pick_device(config["device"])
        torch.manual_seed(config["seed"])
        # Made on the CPU, then moved: every device starts from the same weights.
        self._unet = model.build_unet("cpu").to(self._device)
        self._text_encoder: nn.Module | None = model.build_text_encoder(config["text_size"], "cpu")
        self._average = copy.deepcopy(self._unet).eval().requires_grad_(False)
        self._embeddings = model.embed(self._text_encoder, [*model.PROMPTS, model.NO_PROMPT]).to(self._device)
        images, labels = digits.load()
        self._images = torch.from_numpy(images)[:, None].to(self._device)
        self._labels = torch.from_numpy(labels).to(self._device)
        self._optimizer = torch.optim.AdamW(
            self._unet.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.0
        )
        self._random = torch.Generator().manual_seed(config["seed"])
        self._total = config["total_steps"]
        self._step = 0
        self._frozen_digests: dict[str, str] = {}
        self._store = weightstore.connect(config["socket"])

    def publish(self, emit: Emit) -> dict[str, Any]:
        """Put both components into the store as a version of its own, and let go of the frozen one."""
        frozen = self._text_encoder
        if frozen is None:
            raise weightstore.errors.UsageError("the model was already published; refit it instead")
        with self._store.refit(MODEL, tag=TAG, fresh=True) as refit:
            refit.put_module(self._average, prefix="unet.")
            refit.put_module(frozen, prefix="text_encoder.")
        self._frozen_digests = model.digests({"text_encoder": frozen})
        self._text_encoder = None
        return {
            "device": self._device,
            "unet_parameters": sum(p.numel() for p in self._unet.parameters()),
            "text_parameters": sum(p.numel() for p in frozen.parameters()),
            **_told(refit.report),
        }

    def train(self, emit: Emit, steps: int) -> dict[str, Any]:
        started = time.monotonic()
        loss_sum = torch.zeros((), device=self._device)
        self._unet.train()
        for done in range(1, steps + 1):
            loss_sum += self._train_step()
            if done % 5 == 0 or done == steps:
                emit({"done": done})
        return {"loss": float(loss_sum) / max(steps, 1), "seconds": time.monotonic() - started}

    def refit(self, emit: Emit) -> dict[str, Any]:
        """Put the averaged UNet into the store; the text encoder stays where it is, shared by versions."""
        with self._store.refit(MODEL, tag=TAG, components=["unet"]) as refit:
            refit.put_module(self._average, prefix="unet.")
        return _told(refit.report)

    def digests(self, emit: Emit) -> dict[str, Any]:
        return {"digests": self._frozen_digests | model.digests({"unet": self._average})}

    def _train_step(self) -> torch.Tensor:
        rate = PEAK_RATE * min(1.0, (self._step + 1) / WARM_UP)
        rate *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, self._step / self._total)))
        for group in self._optimizer.param_groups:
            group["lr"] = rate

        # Random numbers come from the CPU: every device trains on the same batches.
        pick = torch.randint(len(self._images), (BATCH,), generator=self._random).to(self._device)
        prompt = self._labels[pick].clone()
        prompt[(torch.rand(BATCH, generator=self._random) < UNPROMPTED).to(self._device)] = len(model.PROMPTS)
        time_ = torch.sigmoid(torch.randn(BATCH, generator=self._random)).to(self._device)
        clean = self._images[pick]
        noise = torch.randn(clean.shape, generator=self._random).to(self._device)

        mix = time_[:, None, None, None]
        predicted = model.velocity(
            self._unet, (1 - mix) * clean + mix * noise, time_, self._embeddings[prompt]
        )
        loss = (predicted - (noise - clean)).square().mean()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._unet.parameters(), 1.0)
        self._optimizer.step()

        self._step += 1
        decay = min(AVERAGE, self._step / (self._step + 10))
        with torch.no_grad():
            for average, weight in zip(self._average.parameters(), self._unet.parameters(), strict=True):
                average.lerp_(weight, 1 - decay)
        return loss.detach()


def _told(report: weightstore.RefitReport) -> dict[str, Any]:
    return {
        "version": report.version,
        "tensors": report.tensors,
        "bytes": report.nbytes,
        "seconds": report.seconds,
    }


def _start(config: dict[str, Any]) -> dict[str, Handler]:
    trainer = Trainer(config)
    return {
        "publish": trainer.publish,
        "train": trainer.train,
        "refit": trainer.refit,
        "digests": trainer.digests,
    }


if __name__ == "__main__":
    serve(_start)
