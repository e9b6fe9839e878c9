"""Engines with a vLLM-Omni diffusion worker, for the extension to be mixed into.

`StandIn` has the shape of it: the attributes that the extension reads, the class put together as vLLM-Omni
does, a pipeline whose transformer fuses what its trainer keeps apart. `Real` is vLLM-Omni itself: its
`WorkerWrapperBase`, `DiffusionWorker`, `DiffusionModelRunner` and `FluxPipeline`, unmodified, on a small
model read from a directory. vLLM-Omni has no CPU platform, so `use_cpu` gives it one: it says which device
and which of its attention implementations there are.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn

from engine_hooks.integrations.vllm_omni import WeightstoreWorkerExtension
from weightstore.names import NameMap

EXTENSION = "engine_hooks.integrations.vllm_omni.WeightstoreWorkerExtension"
PUBLISHED = (
    NameMap(prefix="transformer.")
    .fuse(["to_q", "to_k", "to_v"], "to_qkv")
    .fuse(["add_q_proj", "add_k_proj", "add_v_proj"], "add_kv_proj")
)
"""From diffusers' names of FLUX to vLLM-Omni's, as docs/integrations/vllm-omni.md has it."""


def importable() -> bool:
    return importlib.util.find_spec("vllm") is not None and importlib.util.find_spec("vllm_omni") is not None


# -- the stand-in -------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        out: torch.Tensor = self.to_out[0](torch.softmax(q @ k.mT, dim=-1) @ v)
        return out


class Transformer(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": Attention(width)}) for _ in range(2)])
        self.register_buffer("steps", torch.linspace(0, 1, width), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["attn"](x) * self.steps
        return x


class Pipeline(nn.Module):
    """As vLLM-Omni's: a module whose children are the components, beside things that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = str.encode
        self.text_encoder = nn.Embedding(256, 8)
        self.vae = nn.Sequential(nn.Linear(8, 12), nn.Tanh())
        self.transformer = Transformer()
        self.timer = nn.Identity()

    def forward(self, prompt: str) -> torch.Tensor:
        tokens = torch.tensor(list(self.tokenizer(prompt)))
        image: torch.Tensor = self.vae(self.transformer(self.text_encoder(tokens)))
        return image


class Runner:
    """`model_runner`. Counts what it is asked to let go of."""

    def __init__(self, pipeline: nn.Module | None) -> None:
        self.pipeline = pipeline
        self.offload_backend: object | None = None
        self.graphs_released = self.prompts_cleared = 0

    def release_captured_graphs(self) -> None:
        self.graphs_released += 1

    def clear_prompt_embed_cache(self) -> None:
        self.prompts_cleared += 1


class Worker:
    def __init__(self, rank: int = 0, **config: Any) -> None:
        torch.manual_seed(0)
        self.rank, self.stage_id = rank, 1
        self.device = torch.device("cpu")
        self.od_config = SimpleNamespace(**{"parallel_config": SimpleNamespace(), **config})
        self.model_runner: Runner | None = Runner(Pipeline())
        self.shut_down = 0

    def shutdown(self) -> None:
        self.model_runner = None
        self.shut_down += 1


def extended(**config: Any) -> Any:
    """A worker of the class that vLLM-Omni would make."""
    return type("WorkerWithExtension", (WeightstoreWorkerExtension, Worker), {})(**config)


class StandIn:
    """A worker and what a test does with it."""

    kind: ClassVar[str] = "stand-in"
    prompt: ClassVar[str] = "a tree"

    def __init__(self, directory: Path) -> None:
        self.worker = extended()

    @property
    def pipeline(self) -> Any:
        return self.worker.model_runner.pipeline

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.worker, method)(*args, **kwargs)

    def generate(self) -> torch.Tensor:
        with torch.inference_mode():
            image: torch.Tensor = self.pipeline(self.prompt)
            return image.clone()

    def trained(self) -> dict[str, torch.Tensor]:
        """The trainer's transformer after a step, under the trainer's names."""
        torch.manual_seed(1)
        state = {}
        for name, value in Transformer().state_dict().items():
            if ".to_qkv." in name:
                parts = zip("qkv", value.chunk(3), strict=True)
                state.update({name.replace("to_qkv", f"to_{p}"): part.clone() for p, part in parts})
            else:
                state[name] = value
        return state

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Put a trainer's weights into the engine's own transformer, as the engine would."""
        mine = dict(self.pipeline.transformer.named_parameters())
        with torch.no_grad():
            for name, value in mine.items():
                if ".to_qkv." in name:
                    value.copy_(torch.cat([state[name.replace("to_qkv", f"to_{p}")] for p in "qkv"]))
                else:
                    value.copy_(state[name])

    def close(self) -> None:
        """Idempotent, as far as a worker can be shut down twice."""
        self.worker.shutdown()


# -- the real one -------------------------------------------------------------------------------------


class Real(StandIn):
    kind = "vllm-omni"

    def __init__(self, directory: Path) -> None:
        use_cpu()
        import tiny_pipelines
        from vllm_omni.diffusion.data import OmniDiffusionConfig, TransformerConfig
        from vllm_omni.diffusion.worker.diffusion_worker import WorkerWrapperBase

        self._directory = tiny_pipelines.save(
            tiny_pipelines.build("flux", dtype=torch.bfloat16), directory / "flux"
        )
        self.config = OmniDiffusionConfig(
            model=str(self._directory),
            model_class_name="FluxPipeline",
            num_gpus=1,
            enforce_eager=True,
            dtype=torch.bfloat16,
        )
        sizes = json.loads((self._directory / "transformer" / "config.json").read_text())
        self.config.tf_model_config = TransformerConfig.from_dict(sizes)
        self.wrapper = WorkerWrapperBase(gpu_id=0, od_config=self.config, worker_extension_cls=EXTENSION)
        self.worker = self.wrapper.worker

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self.wrapper.execute_method(method, *args, **kwargs)

    def generate(self) -> torch.Tensor:
        from vllm_omni.diffusion.request import OmniDiffusionRequest
        from vllm_omni.inputs.data import OmniDiffusionSamplingParams

        how = OmniDiffusionSamplingParams(
            height=16, width=16, num_inference_steps=2, seed=5, max_sequence_length=24, output_type="pt"
        )
        request = OmniDiffusionRequest(prompt=self.prompt, sampling_params=how, request_id="one")
        image: torch.Tensor = self.wrapper.execute_model(request, self.config).output
        return image.clone()

    def trained(self) -> dict[str, torch.Tensor]:
        import tiny_pipelines

        pipe = tiny_pipelines.build("flux", seed=1, dtype=torch.bfloat16)
        state: dict[str, torch.Tensor] = pipe.transformer.state_dict()
        return state

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.pipeline.transformer.load_weights(iter(state.items()))

    def close(self) -> None:
        self.wrapper.shutdown()


def use_cpu() -> None:
    """Give vLLM and vLLM-Omni a platform for this machine. Before anything else of them is imported."""
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.interface import PlatformEnum

    class Host(CpuPlatform):  # type: ignore[misc]
        _enum = PlatformEnum.OOT  # the layers' own torch code instead of compiled kernels

    vllm.platforms._current_platform = Host()
    import vllm_omni.platforms
    from vllm_omni.platforms.interface import UnspecifiedOmniPlatform

    def answering(value: Any) -> Any:
        def answer(cls: type, *args: Any, **kwargs: Any) -> Any:
            return value

        return classmethod(answer)

    answers: dict[str, Any] = {
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "max_memory_reserved": 0,
        "max_memory_allocated": 0,
        "get_free_memory": 1 << 33,
        "get_device_total_memory": 1 << 34,
        "get_device_count": 1,
        "supports_torch_inductor": False,
        "get_diffusion_attn_backend_cls": "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend",
    }
    methods = {name: answering(value) for name, value in answers.items()}
    vllm_omni.platforms.current_omni_platform = type("HostOmni", (UnspecifiedOmniPlatform, Host), methods)()
    from vllm_omni.diffusion.attention.backends.sdpa import SDPAImpl

    SDPAImpl.forward = SDPAImpl.forward_cuda  # plain torch; its dispatch knows no CPU


ENGINES: dict[str, Callable[[Path], StandIn]] = {"stand-in": StandIn, "vllm-omni": Real}
