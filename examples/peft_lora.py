"""PEFT LoRA on a diffusers transformer: merged on write, or sent as A and B for the engine to add.

Run ``python examples/peft_lora.py [--adapters-only] [--socket PATH]``; without a socket it starts a store.
"""

import argparse
import copy

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model_state_dict

import weightstore
from engine_hooks import EngineHook

TINY = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2}
SIZES = dict.fromkeys(("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim"), 16)


def velocity(model: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    text, pooled, time = (torch.ones(shape).to(latents) for shape in ((1, 5, 16), (1, 16), (1,)))
    return model(latents, text, pooled, time).sample


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket")
    parser.add_argument("--adapters-only", action="store_true")
    socket, adapters_only = vars(parser.parse_args()).values()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    engine = SD3Transformer2DModel(**TINY, **SIZES, attention_head_dim=8)
    trained = copy.deepcopy(engine)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    trained.requires_grad_(False).to(device).add_adapter(config)
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
    opened = weightstore.connect(socket) if socket else weightstore.local_store("64MiB")
    with (
        opened as store,
        EngineHook.attach(store, "lora", {"transformer": engine}, device=device, tag="policy") as hook,
    ):
        store.tag("lora", "ref", "policy")  # the pristine base of every step
        for step in range(3):
            hook.sleep()
            latents = torch.randn(1, 4, 8, 8, device=device)
            loss = (velocity(trained, latents) + latents).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with store.refit("lora", tag="policy", base="ref", partial=True, extend=adapters_only) as refit:
                write = refit.put_adapter if adapters_only else refit.put_lora
                write(get_peft_model_state_dict(trained), config=config, prefix="transformer.")
            merged, wrote = hook.wake().merged, refit.report.nbytes
            with hook.running(), torch.no_grad():
                torch.testing.assert_close(velocity(engine, latents), velocity(trained, latents))
            print(f"step {step}: loss {loss.item():.3f}, wrote {wrote} bytes, the engine merged {merged}")


if __name__ == "__main__":
    main()
