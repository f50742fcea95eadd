"""One check for each name of verl, vLLM, TransferQueue and Hydra that the plugin builds on.

An upgrade that moves one of them fails here with its name, instead of silently at run time.
"""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import version
from pathlib import Path

import pytest

SUPPORTED_VERL = "0.9.1"

#: module, attribute path, names that must be among its parameters (None: not callable or not of interest)
NAMES = [
    ("verl.trainer.ppo.v1.trainer_base", "register_trainer", ["name"]),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._build_replay_buffer", ["self"]),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._setup", ["self"]),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._compute_old_log_prob", ["batch", "metrics"]),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._compute_advantage", ["batch", "metrics"]),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._update_actor", ["batch", "metrics"]),
    (
        "verl.trainer.ppo.v1.trainer_base",
        "PPOTrainer._dump_generations",
        ["inputs", "outputs", "gts", "scores", "reward_extra_infos_dict", "dump_path"],
    ),
    (
        "verl.trainer.ppo.v1.trainer_base",
        "PPOTrainer._write_generations",
        ["inputs", "outputs", "gts", "scores", "reward_extra_infos_dict", "dump_path", "global_steps"],
    ),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._step_once", ["metrics", "timing_raw", "sample_batch_size"]),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer.on_train_begin", ["self"]),
    ("verl.utils.tracking", "FileLogger.log", ["data", "step"]),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._add_prompts_to_generate", ["num_prompts"]),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer.on_sample_begin", ["self"]),
    ("verl.trainer.ppo.v1.trainer_sync", "PPOTrainerSync", None),
    ("verl.trainer.ppo.v1.trainer_colocate_async", "PPOTrainerColocateAsync", None),
    ("verl.trainer.ppo.v1.replay_buffer", "ReplayBufferAsync.__init__", ["refill_fn"]),
    ("verl.trainer.ppo.v1.replay_buffer", "ReplayBuffer.__init__", ["poll_interval"]),
    ("verl.trainer.ppo.core_algos", "register_adv_est", ["name_or_enum"]),
    ("verl.trainer.ppo.core_algos", "register_policy_loss", ["name"]),
    (
        "verl.trainer.ppo.core_algos",
        "agg_loss",
        ["loss_mat", "loss_mask", "loss_agg_mode", "dp_size", "batch_num_tokens", "global_batch_size"],
    ),
    ("verl.workers.utils.losses", "ppo_loss", ["config", "model_output", "data", "dp_group"]),
    ("verl.workers.utils.padding", "response_to_nested", ["tensor", "response_mask"]),
    ("verl.workers.engine_workers", "ActorRolloutRefWorker.set_loss_fn", ["loss_fn"]),
    ("verl.utils.metric", "Metric", None),
    ("verl.utils.metric", "AggregationType.SUM", None),
    ("verl.utils.debug.metrics", "calculate_debug_metrics", ["data"]),
    ("verl.utils.config", "validate_config", ["config"]),
    ("verl.utils.config", "omega_conf_to_dataclass", ["config"]),
    ("verl.utils.torch_functional", "masked_mean", ["values", "mask"]),
    ("verl.experimental.agent_loop.agent_loop", "_agent_loop_registry", None),
    ("verl.experimental.agent_loop.agent_loop", "AgentLoopOutput.as_dict", ["self"]),
    ("verl.experimental.agent_loop.agent_loop", "AgentLoopMetrics", None),
    ("verl.experimental.agent_loop.agent_loop", "hydra.utils.instantiate", ["config"]),
    ("verl.experimental.agent_loop.agent_loop", "AgentLoopBase._cap_text_prompt_length", ["prompt_ids"]),
    ("verl.plugin.platform.platform_base", "PlatformBase", None),
    ("verl.plugin.platform.platform_manager", "PlatformRegistry.register", ["platform"]),
    ("verl.utils.fs", "copy_to_local", ["src", "cache_dir"]),
    ("verl.utils.rollout_trace", "rollout_trace_op", ["func"]),
    ("verl.workers.engine.base", "EngineRegistry.register", ["model_type", "backend", "device"]),
    ("verl.workers.engine.fsdp.transformer_impl", "FSDPEngineWithLMHead", None),
    ("verl.utils.distributed", "initialize_global_process_group_ray", ["timeout_second", "backend"]),
    ("verl.utils.distributed", "initialize_global_process_group", ["timeout_second"]),
    ("verl.utils.device", "auto_set_device", ["config"]),
    ("verl.workers.utils.losses", "sft_loss", ["config", "model_output", "data", "dp_group"]),
    ("verl.utils.tokenizer.continuous_token", "ContinuousTokenBuilder.build_initial_tokens", ["messages"]),
    ("verl.utils.dataset.dataset_utils", "DatasetPadMode.NO_PADDING", None),
    ("verl.workers.rollout.replica", "RolloutReplicaRegistry.register", ["name", "loader"]),
    ("verl.workers.rollout.vllm_rollout.vllm_async_server", "vLLMHttpServer._get_worker_extension_cls", ["self"]),
    (
        "verl.workers.rollout.vllm_rollout.utils",
        "vLLMColocateWorkerExtension.update_weights_from_ipc",
        ["peft_config", "base_sync_done", "use_shm"],
    ),
    (
        "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer",
        "BucketedWeightReceiver.receive_weights",
        ["on_bucket_received"],
    ),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.reload_weights", ["weights_iterator"]),
    ("transfer_queue", "kv_batch_get", ["keys", "partition_id", "select_fields"]),
    ("transfer_queue", "kv_batch_put", ["keys", "partition_id", "fields"]),
    ("hydra.plugins.search_path_plugin", "SearchPathPlugin.manipulate_search_path", ["search_path"]),
    ("hydra.core.plugins", "Plugins.register", ["clazz"]),
]


@pytest.mark.parametrize(("module", "path", "parameters"), NAMES, ids=[f"{m}.{p}" for m, p, _ in NAMES])
def test_upstream_name(module, path, parameters):
    found = importlib.import_module(module)
    for part in path.split("."):
        assert hasattr(found, part), f"{module}.{path} is gone; verl_prefix supports verl {SUPPORTED_VERL}"
        found = getattr(found, part)
    if parameters is not None:
        missing = set(parameters) - set(inspect.signature(found).parameters)
        assert not missing, f"{module}.{path} lost {sorted(missing)}; verl_prefix supports verl {SUPPORTED_VERL}"


def test_supported_version_is_the_one_installed():
    assert version("verl") == SUPPORTED_VERL


def test_trainer_mode_is_compared_with_sync_where_the_plugin_expects_it():
    """`prefix_sync` hides behind "sync" because of these comparisons."""
    from verl.trainer.ppo.v1 import trainer_base

    source = inspect.getsource(trainer_base)
    assert source.count('trainer_mode == "sync"') + source.count('trainer_mode != "sync"') >= 5


def test_asynchronous_buffer_asks_for_prompts_through_the_attribute_that_the_trainer_replaces():
    from verl.trainer.ppo.v1.replay_buffer import ReplayBufferAsync

    assert "self.refill_fn(" in inspect.getsource(ReplayBufferAsync.wait_for_sampleable)


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        # the same call as in the FSDP engine, and a sum over micro-batches that Megatron divides by their number
        (
            "workers/engine/megatron/transformer_impl.py",
            [
                "loss, metrics = loss_function(model_output=model_output, data=data, dp_group=",
                'scaled_loss = loss * data["num_micro_batch"]',
                "tu.assign_non_tensor(data, dp_size=self.get_data_parallel_size())",
            ],
        ),
        # a limit on the new tokens of a request, and the fields of its answer that the agent loop reads
        (
            "workers/rollout/sglang_rollout/async_sglang_server.py",
            ['elif "max_tokens" in sampling_params:', "token_ids=token_ids,", "log_probs=log_probs,"],
        ),
    ],
)
def test_what_the_plugin_needs_of_engines_that_cannot_be_imported_here(file, parts):
    source = (Path(importlib.import_module("verl").__file__).parent / file).read_text()
    for part in parts:
        assert part in source, f"{file} has moved; verl_prefix supports verl {SUPPORTED_VERL}"


def test_ppo_loss_hands_the_policy_loss_what_it_needs():
    from verl.workers.utils import losses

    source = inspect.getsource(losses.ppo_loss)
    for name in (
        "old_log_prob=",
        "log_prob=",
        "advantages=",
        "response_mask=",
        "loss_agg_mode=",
        "rollout_is_weights=",
    ):
        assert name in source
