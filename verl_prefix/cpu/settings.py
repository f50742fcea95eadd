"""The settings without which verl cannot run on a CPU, applied to the driver's configuration."""

from __future__ import annotations

import types
from typing import Any

import wrapt
from omegaconf import DictConfig, OmegaConf, open_dict

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"

#: key -> the only value that works on the CPU stack
REQUIRED: dict[str, Any] = {
    "trainer.device": "cpu",
    # FSDP1 refuses to start without an accelerator
    f"{_ACTOR}.strategy": "fsdp2",
    f"{_ACTOR}.fsdp_config.strategy": "fsdp2",
    # no flash attention: padded sdpa
    "actor_rollout_ref.model.use_remove_padding": False,
    "actor_rollout_ref.ref.strategy": "fsdp2",
    "actor_rollout_ref.ref.fsdp_config.strategy": "fsdp2",
    # vLLM's CPU engine has no sleep mode
    f"{_ROLLOUT}.free_cache_engine": False,
    f"{_ROLLOUT}.enable_sleep_mode": False,
    f"{_ROLLOUT}.enforce_eager": True,
}

#: key -> (verl's default, a value that suits a CPU); applied only where the default was left in place
SUITABLE: dict[str, tuple[Any, Any]] = {
    f"{_ACTOR}.use_torch_compile": (True, False),
    f"{_ACTOR}.fsdp_config.use_torch_compile": (True, False),
    f"{_ACTOR}.fsdp_config.dtype": ("bfloat16", "float32"),
    "actor_rollout_ref.ref.fsdp_config.dtype": ("bfloat16", "float32"),
    f"{_ROLLOUT}.dtype": ("bfloat16", "float32"),
    f"{_ROLLOUT}.tensor_model_parallel_size": (2, 1),
    f"{_ROLLOUT}.agent.num_workers": (8, 1),
    # verl's bucket is a 2 GB shared-memory segment
    f"{_ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes": (2048, 64),
    "reward.num_workers": (8, 1),
    "data.dataloader_num_workers": (8, 0),
    "actor_rollout_ref.model.enable_gradient_checkpointing": (True, False),
    # TransferQueue's storage units and verl's workers each reserve a logical CPU; with as many as a laptop has, they
    # wait for each other forever
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": (8, 1),
    "ray_kwargs.ray_init.num_cpus": (None, 32),
}
ATTENTION = "actor_rollout_ref.model.override_config.attn_implementation"
#: without it verl computes in bfloat16 autocast whatever `dtype` says, which is slower and less exact on a CPU
FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
MIXED_PRECISION = (
    "actor_rollout_ref.actor.fsdp_config.mixed_precision",
    "actor_rollout_ref.ref.fsdp_config.mixed_precision",
)


def apply(config: DictConfig) -> list[str]:
    """Put the CPU's settings into `config` (in place). Returns `key=value` of everything that was changed."""
    wanted = {**REQUIRED, ATTENTION: "sdpa"}
    for key, (default, value) in SUITABLE.items():
        if OmegaConf.select(config, key) == default:
            wanted[key] = value
    wanted.update({key: FP32 for key in MIXED_PRECISION if OmegaConf.select(config, key) is None})
    # One logical Ray slot stands for one worker process.
    wanted["ray_kwargs.ray_init.num_gpus"] = config.trainer.n_gpus_per_node * config.trainer.nnodes
    changed = []
    with open_dict(config):
        for key, value in wanted.items():
            if OmegaConf.select(config, key) != value:
                OmegaConf.update(config, key, value, force_add=True)
                changed.append(f"{key}={value}")
    return changed


def apply_before_validation(config_module: types.ModuleType) -> None:
    """Import hook: `main_ppo` validates its configuration once, on the driver, before Ray starts."""

    def with_cpu_settings(wrapped, instance, args, kwargs):
        config = kwargs["config"] if "config" in kwargs else args[0]
        changed = apply(config)
        short = [entry.replace("actor_rollout_ref.", "") for entry in changed]
        print(
            f"[verl_prefix] no accelerator: CPU platform (FSDP2 on gloo, vLLM CPU). Set {', '.join(short)}", flush=True
        )
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(config_module, "validate_config", with_cpu_settings)
