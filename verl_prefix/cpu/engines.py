"""Registrations of the CPU's training and rollout engines at verl's own seams (called as import hooks)."""

from __future__ import annotations

import types

import wrapt


def use_plain_gloo(distributed: types.ModuleType) -> None:
    """verl asks for `cpu:gloo,cpu:gloo`, which torch refuses as naming one device twice."""

    def plain_gloo(wrapped, instance, args, kwargs):
        def call(timeout_second=None, backend=None):
            return wrapped(timeout_second=timeout_second, backend=backend or "gloo")

        return call(*args, **kwargs)

    wrapt.wrap_function_wrapper(distributed, "initialize_global_process_group_ray", plain_gloo)


def register_fsdp2(engine: types.ModuleType) -> None:
    """verl's FSDP engine under the device name `cpu` (FSDP1 refuses to start without an accelerator)."""
    from verl.workers.engine.base import EngineRegistry

    EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")(engine.FSDPEngineWithLMHead)
    EngineRegistry.register(model_type="value_model", backend="fsdp2", device="cpu")(engine.FSDPEngineWithValueHead)


def register_vllm_replica(replica: types.ModuleType) -> None:
    """A vLLM replica whose workers can load weights more than once (see `verl_prefix.cpu.vllm_worker`)."""

    def load():
        from verl_prefix.cpu.vllm_replica import CPUReplica

        return CPUReplica

    replica.RolloutReplicaRegistry.register("vllm", load)
