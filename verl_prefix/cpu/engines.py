"""Registrations of the CPU's training and rollout engines at verl's own seams (called as import hooks)."""

from __future__ import annotations

import os
import types

import wrapt


def use_plain_gloo(distributed: types.ModuleType) -> None:
    """verl asks for `cpu:gloo,cpu:gloo`, which torch refuses as naming one device twice."""
    initialize = distributed.initialize_global_process_group_ray

    def plain_gloo(wrapped, instance, args, kwargs):
        def call(timeout_second=None, backend=None):
            return wrapped(timeout_second=timeout_second, backend=backend or "gloo")

        return call(*args, **kwargs)

    def plain_gloo_under_torchrun(wrapped, instance, args, kwargs):
        # The SFT trainer's variant takes no backend. Nothing else of it matters here: there is no device to set.
        initialize(*args, **{"timeout_second": 36000, **kwargs, "backend": "gloo"})
        return tuple(int(os.environ[name]) for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"))

    wrapt.wrap_function_wrapper(distributed, "initialize_global_process_group_ray", plain_gloo)
    wrapt.wrap_function_wrapper(distributed, "initialize_global_process_group", plain_gloo_under_torchrun)


def register_fsdp2(engine: types.ModuleType) -> None:
    """verl's FSDP engine under the device name `cpu` (FSDP1 refuses to start without an accelerator)."""
    from verl.workers.engine.base import EngineRegistry

    EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")(engine.FSDPEngineWithLMHead)
    EngineRegistry.register(model_type="value_model", backend="fsdp2", device="cpu")(engine.FSDPEngineWithValueHead)


def keep_offload_unpinned(engine: types.ModuleType) -> None:
    """verl offloads the reference policy to pinned memory, which torch refuses to make without an accelerator."""

    def unpinned(wrapped, instance, args, kwargs):
        return wrapped(pin_memory=False)

    wrapt.wrap_function_wrapper(engine, "CPUOffloadPolicy", unpinned)


def register_vllm_replica(replica: types.ModuleType) -> None:
    """A vLLM replica whose workers can load weights more than once (see `verl_prefix.cpu.vllm_worker`)."""

    def load():
        from verl_prefix.cpu.vllm_replica import CPUReplica

        return CPUReplica

    replica.RolloutReplicaRegistry.register("vllm", load)
