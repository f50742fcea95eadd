"""A CPU platform for verl's platform registry (verl.plugin.platform)."""

from __future__ import annotations

import os
import types
from contextlib import contextmanager
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def _memory_info(*_: Any) -> tuple[int, int]:
    import psutil

    memory = psutil.virtual_memory()
    return memory.available, memory.total


def build_device_module() -> types.ModuleType:
    """`torch.cpu` plus the functions that verl calls on a device module and `torch.cpu` lacks."""
    module = types.ModuleType("verl_prefix.cpu.device", "torch.cpu with the rest of an accelerator module's surface.")
    module.__dict__.update({name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("__")})

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def zero(*_: Any, **__: Any) -> int:
        return 0

    for name in ("empty_cache", "ipc_collect", "set_device", "synchronize", "set_per_process_memory_fraction"):
        setattr(module, name, nothing)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, zero)
    module.reset_peak_memory_stats = nothing
    module.get_device_name = lambda *_: "CPU"
    module.mem_get_info = _memory_info
    module.get_rng_state = lambda *_: torch.get_rng_state()
    module.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    module.manual_seed = module.manual_seed_all = torch.manual_seed
    return module


class PlatformCPU(PlatformBase):
    """verl on the CPU. Ray's logical `GPU` slots stand for worker processes."""

    _device_module: types.ModuleType | None = None

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> types.ModuleType:
        if PlatformCPU._device_module is None:
            PlatformCPU._device_module = build_device_module()
        return PlatformCPU._device_module

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        # Probed last in verl's detection (registered last), so that any accelerator goes first.
        return True

    def current_device(self) -> str:  # type: ignore[override]
        # Not an index: callers hand this to tensor.to(), where 0 would mean an accelerator.
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        return None

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def rollout_env_vars(self) -> dict[str, str]:
        keep = os.environ.get
        return {
            "VLLM_CPU_KVCACHE_SPACE": keep("VLLM_CPU_KVCACHE_SPACE", "1"),
            # Pinning vLLM's threads to cores starves the other processes of a small machine.
            "VLLM_CPU_OMP_THREADS_BIND": keep("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        }

    @contextmanager
    def nvtx_range(self, msg: str):
        yield

    def profiler_start(self) -> None:
        return None

    def profiler_stop(self) -> None:
        return None

    def cudart(self) -> None:
        return None


def register() -> None:
    """Make `cpu` known to verl's platform registry (idempotent)."""
    if PlatformRegistry.get("cpu") is not PlatformCPU:
        PlatformRegistry.register(platform="cpu")(PlatformCPU)
