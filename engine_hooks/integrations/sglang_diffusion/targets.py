"""What of SGLang is wrapped, and whether it is.

SGLang logs and ignores a hook whose target it does not find. A worker of which only some methods are wrapped
would let SGLang move memory that is the hook's, so an engine is attached only if all of them are.
"""

from __future__ import annotations

from typing import Any, Final

WORKER: Final = "sglang.multimodal_gen.runtime.managers.gpu_worker.GPUWorker"
_SCHEDULER: Final = "sglang.multimodal_gen.runtime.managers.scheduler.Scheduler"
_LOADER: Final = "sglang.multimodal_gen.runtime.loader"

HOOKS: Final[dict[str, str]] = {
    f"{_LOADER}.component_loaders.component_loader.PipelineComponentLoader.load_component": "load_component",
    f"{_LOADER}.fsdp_load.load_model_from_full_model_state_dict": "load_weights",
    f"{WORKER}.init_device_and_model": "init_device_and_model",
    f"{WORKER}.release_memory_occupation": "release",
    f"{WORKER}.resume_memory_occupation": "resume",
    f"{WORKER}.is_sleeping": "is_sleeping",
    f"{WORKER}.update_weights_from_disk": "update_from_disk",
    f"{WORKER}.update_weights_from_tensor": "update_from_tensor",
    f"{WORKER}.update_weights_from_tensor_checker": "check_tensors",
    f"{WORKER}.get_weights_checksum": "checksum",
    f"{WORKER}.set_lora": "set_lora",
    f"{WORKER}.merge_lora_weights": "merge_lora",
    f"{WORKER}.unmerge_lora_weights": "merge_lora",
    f"{_SCHEDULER}._handle_update_weights_from_disk": "schedule_update_from_disk",
}
"""What of SGLang is wrapped, and by which method of `Plugin`. Each gets the original first."""


def unhooked(worker: Any) -> list[str]:
    """Methods of the worker's class that ought to be wrapped and are not."""
    names = [target.removeprefix(f"{WORKER}.") for target in HOOKS if target.startswith(f"{WORKER}.")]
    return [name for name in names if not hasattr(getattr(type(worker), name, None), "__wrapped__")]
