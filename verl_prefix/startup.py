"""The start-up check: everything that would fail or mislead later is refused on the driver, before Ray starts."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import types
import warnings

import wrapt
from omegaconf import DictConfig, ListConfig, OmegaConf

from verl_prefix import __version__, redaction, training_data
from verl_prefix.config import PrefixConfig
from verl_prefix.exceptions import PrefixConfigError
from verl_prefix.names import AGENT_NAME, LOSS_MODE, TRAINER_MODES


def check_before_validation(config_module: types.ModuleType) -> None:
    """Import hook: `main_ppo` validates its configuration once, on the driver, before Ray starts."""

    def checked(wrapped, instance, args, kwargs):
        result = wrapped(*args, **kwargs)
        config = kwargs["config"] if "config" in kwargs else args[0]
        if concerns(config):
            for warning in check(config):
                warnings.warn(f"[verl_prefix] {warning}", UserWarning, stacklevel=2)
            print(banner(config), flush=True)
        return result

    wrapt.wrap_function_wrapper(config_module, "validate_config", checked)


def concerns(config: DictConfig) -> bool:
    """Whether the run uses anything of the plugin's: its section, or one of its names in verl's keys."""
    from verl_prefix.advantage import ESTIMATORS

    return (
        config.get("prefix") is not None
        or config.trainer.v1.trainer_mode in TRAINER_MODES
        or config.algorithm.adv_estimator in ESTIMATORS
        or OmegaConf.select(config, "actor_rollout_ref.actor.policy_loss.loss_mode") == LOSS_MODE
    )


def check(config: DictConfig) -> list[str]:
    """Refuse what cannot work; return one actionable warning for each thing that is supported but unwise.

    Raises:
        PrefixConfigError: names key, value and mend.
        DemonstrationError: names file, row and mend.
    """
    if config.get("prefix") is None:
        raise PrefixConfigError(
            "prefix", None, "a name of the plugin's is set without its preset; add +prefix=prefix_rft instead."
        )
    if not isinstance(config.prefix, DictConfig):
        raise PrefixConfigError(
            "prefix",
            config.prefix,
            "the preset was not resolved: Hydra did not find the group `prefix`. Is verl_prefix installed in this "
            "environment (`python -c 'import verl_prefix.plugin'`), and VERL_USE_EXTERNAL_PLUGINS not `none`?",
        )
    prefix = PrefixConfig.of(config.prefix)
    warn = [
        *_check_trainer(config, prefix),
        *_check_lengths(config, prefix),
        *_check_model(config),
        *_check_secrets(config),
    ]
    if prefix.sampling.rollouts > 0:
        warn += _check_method(config, prefix)
        warn += training_data.check(
            prefix,
            train_files=_files(config, config.data.train_files),
            val_files=_files(config, config.data.val_files),
            tokenizer=_tokenizer(config),
            response_length=config.data.max_response_length,
        )
    return warn


def banner(config: DictConfig) -> str:
    """One line: versions, preset, what is registered, device."""
    versions = ", ".join(f"{name} {_version(name)}" for name in ("verl", "torch", "vllm", "ray"))
    trainer = config.trainer.v1.trainer_mode
    return (
        f"[verl_prefix {__version__}] preset {config.prefix.preset} | {versions} | trainer {trainer}, "
        f"agent loop {config.actor_rollout_ref.rollout.agent.default_agent_loop}, "
        f"estimator {config.algorithm.adv_estimator}, loss {config.actor_rollout_ref.actor.policy_loss.loss_mode} | "
        f"device {config.trainer.device} | python {sys.version.split()[0]}"
    )


def _check_trainer(config: DictConfig, prefix: PrefixConfig) -> list[str]:
    trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
    if not trainer.use_v1:
        raise PrefixConfigError("trainer.use_v1", False, "the deprecated V0 trainer is not supported; leave it true.")
    if trainer.v1.trainer_mode not in TRAINER_MODES:
        raise PrefixConfigError(
            "trainer.v1.trainer_mode",
            trainer.v1.trainer_mode,
            "this preset needs prefix_sync (the default) or prefix_colocate_async: verl's trainers with prefixes. "
            "separate_async is not supported: no weight transfer of its runs without GPUs, so it could not be tested.",
        )
    key = f"trainer.v1.{TRAINER_MODES[trainer.v1.trainer_mode]}.parameter_sync_step"
    if (updates := OmegaConf.select(config, key)) not in (None, 1):
        raise PrefixConfigError(
            key,
            updates,
            "a step of several updates is not supported; remove it, or lower actor.ppo_mini_batch_size.",
        )
    if rollout.agent.default_agent_loop != AGENT_NAME:
        raise PrefixConfigError(
            "actor_rollout_ref.rollout.agent.default_agent_loop",
            rollout.agent.default_agent_loop,
            f"this preset needs {AGENT_NAME}. Remove the override.",
        )
    if rollout.multi_turn.enable:
        raise PrefixConfigError(
            "actor_rollout_ref.rollout.multi_turn.enable", True, "prefixes are single-turn; set it to false."
        )
    if OmegaConf.select(config, "algorithm.rollout_correction.bypass_mode"):
        raise PrefixConfigError(
            "algorithm.rollout_correction.bypass_mode",
            True,
            "takes the rollout engine's log-probabilities for the old policy's, and prefix tokens have none. Set it to "
            "false.",
        )
    if prefix.sampling.rollouts > rollout.n:
        raise PrefixConfigError(
            "prefix.sampling.rollouts",
            prefix.sampling.rollouts,
            f"exceeds actor_rollout_ref.rollout.n={rollout.n}; lower it or raise n.",
        )
    logs = trainer.get("rollout_data_dir"), trainer.get("validation_data_dir")
    if logs[0] is not None and logs[0] == logs[1]:
        raise PrefixConfigError("trainer.validation_data_dir", logs[1], "must differ from trainer.rollout_data_dir.")
    warn = []
    if rollout.n < 2:
        warn.append(
            "actor_rollout_ref.rollout.n=1: a group of one has no baseline and advantage 0; use n=8 as the paper."
        )
    if not rollout.calculate_log_probs:
        warn.append(
            "actor_rollout_ref.rollout.calculate_log_probs=False: nobody notices if the rollout engine does not sample "
            "from the trained policy; set it to true."
        )
    if OmegaConf.select(config, "trainer.v1.sampler.sync_refill_failed_groups"):
        warn.append(
            "trainer.v1.sampler.sync_refill_failed_groups=True: where every rollout fails, verl asks for new prompts "
            "for ever instead of raising an error; watch training/rollout_failure/evicted_samples."
        )
    return warn


def _check_secrets(config: DictConfig) -> list[str]:
    return [
        f"{key} holds a secret, and verl prints its configuration and keeps it in its loggers' files. Leave it out and "
        "export it as an environment variable, on every node."
        for key in redaction.secrets(OmegaConf.to_container(config, resolve=True))
    ]


def _check_method(config: DictConfig, prefix: PrefixConfig) -> list[str]:
    from verl_prefix.advantage import ESTIMATORS

    algorithm, loss_mode = config.algorithm, config.actor_rollout_ref.actor.policy_loss.loss_mode
    if algorithm.adv_estimator not in ESTIMATORS:
        raise PrefixConfigError(
            "algorithm.adv_estimator",
            algorithm.adv_estimator,
            f"knows no prefixes; choose one of {', '.join(ESTIMATORS)}, or set prefix.sampling.rollouts=0.",
        )
    if loss_mode != LOSS_MODE:
        raise PrefixConfigError(
            "actor_rollout_ref.actor.policy_loss.loss_mode", loss_mode, f"this preset needs {LOSS_MODE}."
        )
    _check_combination(config, prefix)
    warn = []
    if algorithm.use_kl_in_reward:
        warn.append(
            "algorithm.use_kl_in_reward=True charges the policy for demonstration tokens too; prefer actor.use_kl_loss."
        )
    total = config.trainer.total_training_steps
    schedule = prefix.schedule
    end = schedule.warmup + schedule.delay + schedule.steps
    scheduled = schedule.kind != "constant" and prefix.sampling.law in ("beta", "fixed", "binomial")
    if total is not None and scheduled and end > 2 * total:
        warn.append(
            f"prefix.schedule.steps={schedule.steps}: the schedule ends at step {end}, the run at {total}; "
            f"prefixes stay long throughout. Set prefix.schedule.steps={total}."
        )
    return warn


def _check_combination(config: DictConfig, prefix: PrefixConfig) -> None:
    """Options that need each other."""
    from verl_prefix.objective import TOKEN_WEIGHTS

    sampling, n = prefix.sampling, config.actor_rollout_ref.rollout.n
    on_policy = n - sampling.rollouts
    if on_policy < 1 and (prefix.gate.max_correct is not None or prefix.advantage.baseline == "on_policy"):
        raise PrefixConfigError(
            "prefix.sampling.rollouts",
            sampling.rollouts,
            f"leaves no on-policy rollout of n={n}, which the gate or advantage.baseline=on_policy needs; raise n.",
        )
    if sampling.law == "adaptive" and sampling.rollouts > 1 and not sampling.shared:
        raise PrefixConfigError(
            "prefix.sampling.shared", False, "law=adaptive judges one prefix per prompt and step; set it to true."
        )
    own_baseline, frozen_whole = prefix.advantage.baseline == "on_policy", sampling.law == "whole"
    frozen_whole = frozen_whole and not prefix.loss.update_prefix
    if own_baseline and prefix.advantage.normalize_std and not frozen_whole:
        raise PrefixConfigError(
            "prefix.advantage.normalize_std",
            True,
            "with baseline=on_policy divides a prefixed rollout by the spread of the others, which is 0 where all "
            "fail. Set it to false, or baseline=group.",
        )
    if not own_baseline and frozen_whole:
        raise PrefixConfigError(
            "prefix.advantage.baseline",
            prefix.advantage.baseline,
            "whole demonstrations outside of the policy term are outside of the group too; set it to on_policy.",
        )
    if sampling.at_steps and sampling.law != "binomial":
        raise PrefixConfigError(
            "prefix.sampling.at_steps", True, f"counts steps for law=binomial, not {sampling.law}; set it to false."
        )
    if (prefix.loss.policy_ratio == "log") != (prefix.advantage.on_policy == "likelihood"):
        raise PrefixConfigError(
            "prefix.loss.policy_ratio",
            prefix.loss.policy_ratio,
            "`log` and prefix.advantage.on_policy=likelihood are the two halves of one form; set both or neither.",
        )
    if prefix.sft.token_weight not in TOKEN_WEIGHTS:
        raise PrefixConfigError(
            "prefix.sft.token_weight",
            prefix.sft.token_weight,
            f"choose one of {', '.join(TOKEN_WEIGHTS)}, or register it in every process (docs/extending.md).",
        )
    weights = (prefix.sft.weight.initial, prefix.sft.weight.target)
    if prefix.sft.mix == "convex" and max(weights) > 1:
        raise PrefixConfigError("prefix.sft.weight", weights, "must not exceed 1 with prefix.sft.mix=convex.")
    if not prefix.loss.update_prefix and sampling.law == "whole" and max(weights) == 0:
        raise PrefixConfigError(
            "prefix.loss.update_prefix",
            False,
            "whole demonstrations are then in no term of the objective; give prefix.sft.weight a value.",
        )


def _check_lengths(config: DictConfig, prefix: PrefixConfig) -> list[str]:
    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    max_len = config.actor_rollout_ref.rollout.max_model_len
    if max_len is not None and max_len < prompt + response:
        raise PrefixConfigError(
            "actor_rollout_ref.rollout.max_model_len",
            max_len,
            f"prompt and response need {prompt} + {response} tokens (data.max_prompt_length + max_response_length); "
            f"set it to at least {prompt + response}.",
        )
    if prefix.sampling.min_prefix_len >= response:
        raise PrefixConfigError(
            "prefix.sampling.min_prefix_len",
            prefix.sampling.min_prefix_len,
            f"leaves no room for a continuation within data.max_response_length={response}.",
        )
    return []


def _check_model(config: DictConfig) -> list[str]:
    from transformers import AutoConfig
    from verl.utils.fs import copy_to_local

    model = config.actor_rollout_ref.model
    path = copy_to_local(model.hf_config_path or model.path)
    hf_config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    if getattr(hf_config, "vision_config", None) is not None:
        raise PrefixConfigError(
            "actor_rollout_ref.model.path", model.path, "multimodal models are not supported; use a text model."
        )
    if config.trainer.device == "cpu" and getattr(hf_config, "tie_word_embeddings", False):
        # vLLM's CPU engine leaves the LM head at its dummy values then: rollouts from a uniform policy, no complaint
        raise PrefixConfigError(
            "actor_rollout_ref.model.path",
            model.path,
            "the model ties its embeddings, which vLLM's CPU engine does not reload. Save it with its own LM head "
            "(tie_word_embeddings=false in config.json), or train on a GPU.",
        )
    positions = getattr(hf_config, "max_position_embeddings", None)
    override = OmegaConf.select(config, "actor_rollout_ref.model.override_config.max_position_embeddings")
    needed = config.data.max_prompt_length + config.data.max_response_length
    if positions is not None and max(positions, override or 0) < needed:
        raise PrefixConfigError(
            "data.max_response_length",
            config.data.max_response_length,
            f"prompt and response need {needed} positions, the model has {positions} (max_position_embeddings). Lower "
            "the limits or extend the model's context (config.json: rope_theta, max_position_embeddings).",
        )
    return []


def _files(config: DictConfig, value: str | list | ListConfig) -> list[str]:
    """Local paths of the data files, fetched from hdfs:// into verl's own cache where need be."""
    from verl.utils.fs import copy_to_local

    files = [value] if isinstance(value, str) else list(value)
    cache = os.path.expanduser(config.data.get("cache_dir") or "~/.cache/verl/rlhf")
    return [copy_to_local(os.path.expanduser(file), cache_dir=cache) for file in files]


def _tokenizer(config: DictConfig):
    from verl.utils import hf_tokenizer
    from verl.utils.fs import copy_to_local

    model = config.actor_rollout_ref.model
    path = copy_to_local(model.tokenizer_path or model.path)
    return hf_tokenizer(path, trust_remote_code=model.trust_remote_code)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
