"""What the demo trains and runs: a text-conditioned flow-matching pipeline of real diffusers parts.

Two components, as in the pipelines people post-train: `unet` (UNet2DConditionModel, 0.7 M
parameters) is trained, `text_encoder` (T5EncoderModel with a tied embedding) is frozen and holds
nearly all the bytes. The text encoder is randomly initialised, since no pretrained one comes with a
package; frozen random features still give every prompt its own fixed embedding, which is all the
UNet needs to tell ten digits apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine_hooks.demo.digits import SIDE, WORDS

PROMPTS = tuple(f"a handwritten {word}" for word in WORDS)
NO_PROMPT = ""

TEXT_SIZES: dict[str, dict[str, int]] = {
    "full": {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "d_kv": 64},  # 101 MB
    "small": {"d_model": 256, "d_ff": 512, "num_layers": 4, "num_heads": 4, "d_kv": 64},  # 11 MB
}


def pick_device(wanted: str) -> str:
    """`wanted`, or for "auto": "cuda" where torch sees a GPU and the CUDA extra is installed."""
    if wanted != "auto":
        return wanted
    from importlib.util import find_spec

    return "cuda" if torch.cuda.is_available() and find_spec("cuda") is not None else "cpu"


def build_unet(device: str) -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        unet: nn.Module = UNet2DConditionModel(
            sample_size=SIDE,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            mid_block_type="UNetMidBlock2D",
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=2,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=TEXT_SIZES["full"]["d_model"],
        )
    return unet


def build_text_encoder(size: str, device: str) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    with torch.device(device):
        config = T5Config(
            vocab_size=384, feed_forward_proj="gated-gelu", dropout_rate=0.0, **TEXT_SIZES[size]
        )
        encoder: nn.Module = T5EncoderModel(config)
    return encoder.eval().requires_grad_(False)


def tokenise(prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Byte-level tokens (byte + 3, then 1 for the end, padded with 0) and their mask, each (n, length)."""
    rows = [[byte + 3 for byte in prompt.encode()] + [1] for prompt in prompts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
    return ids, (ids != 0).long()


@torch.no_grad()
def embed(text_encoder: nn.Module, prompts: Sequence[str]) -> Tensor:
    """One embedding per prompt, shape (n, 512): the mean over its tokens, zero-padded to full width."""
    ids, mask = tokenise(prompts, next(text_encoder.parameters()).device)
    hidden = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    return nn.functional.pad(mean, (0, TEXT_SIZES["full"]["d_model"] - mean.shape[1]))


def velocity(unet: nn.Module, noisy: Tensor, time: Tensor, embedding: Tensor) -> Tensor:
    """What the UNet takes for d(sample)/d(time); time 0 is data, 1 is noise. All per sample."""
    output: Tensor = unet(noisy, time * 1000, None, class_labels=embedding, return_dict=False)[0]
    return output


@torch.no_grad()
def draw(
    unet: nn.Module, text_encoder: nn.Module, per_digit: int, *, steps: int, guidance: float, seed: int
) -> Tensor:
    """Draw `per_digit` images of every digit, from the same noise for the same seed.

    Returns shape (10 * per_digit, 8, 8), digits in order, values -1 (paper) to 1 (ink), on the CPU.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    device = next(unet.parameters()).device
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps, device=device)
    count = len(PROMPTS) * per_digit
    asked = embed(text_encoder, PROMPTS).repeat_interleave(per_digit, dim=0)
    embeddings = torch.cat([asked, embed(text_encoder, [NO_PROMPT]).expand(count, -1)])
    # The noise is drawn on the CPU, so that a GPU starts from the same one.
    sample = torch.randn(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).to(device)
    for step in scheduler.timesteps:
        time = (step / 1000).expand(2 * count)
        towards, without = velocity(unet, sample.repeat(2, 1, 1, 1), time, embeddings).chunk(2)
        guided = without + guidance * (towards - without)
        sample = scheduler.step(guided, step, sample, return_dict=False)[0]
    return sample[:, 0].clamp(-1, 1).float().cpu()


def digests(components: Mapping[str, nn.Module]) -> dict[str, str]:
    """SHA-256 of every tensor's bytes, by the name it has in the store."""
    return {
        f"{component}.{name}": hashlib.sha256(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        ).hexdigest()
        for component, module in components.items()
        for name, tensor in module.state_dict().items()
    }
