"""Seam: V1 trainers that know which tokens are prefixes.

`prefix_sync` and `prefix_colocate_async` are verl's `sync` and `colocate_async` trainers with the plugin's columns lent
to the advantage estimator, the plugin's loss on the workers, prefix metrics, and a rollout log that says where a prefix
ends. No step of verl's is written again.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.protocol import DataProto
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.debug.metrics import calculate_debug_metrics

from verl_prefix import columns, credit, gate, rollout_log, run_log
from verl_prefix.adaptive import Intervals
from verl_prefix.agent_loop import INTERVAL, RECORD
from verl_prefix.config import PrefixConfig
from verl_prefix.exceptions import RolloutError
from verl_prefix.faults import LostLines, WholeLines, discard, require_finite, skipped_update
from verl_prefix.metrics import CorrelationWatch, clip_fractions, grader_metrics, prefix_metrics
from verl_prefix.names import LOSS_MODE, TRAINER_MODES
from verl_prefix.policy_loss import SFT_WEIGHT, worker_loss
from verl_prefix.schedule import value_at
from verl_prefix.sft_weight import entropy_factor, mini_batches, sft_row_weights

logger = logging.getLogger(__name__)

#: training batches of prompts that an asynchronous buffer may ask for again before one is complete
MOST_REFILLED = 32


class PrefixTrainer(PPOTrainer):
    """What the plugin adds to any of verl's V1 trainers."""

    def __init__(self, config: DictConfig):
        # verl compares the mode with its own names in several places (replay buffer, checkpoint, data loader).
        mode = config.trainer.v1.trainer_mode
        with open_dict(config):
            config.trainer.v1.trainer_mode = TRAINER_MODES.get(mode, mode)
        self._begin(config)
        super().__init__(config)

    def _begin(self, config: DictConfig) -> None:
        """The plugin's own state."""
        self.prefix = PrefixConfig.of(config.get("prefix"))
        self._correlation = CorrelationWatch(self.prefix.monitor.min_probs_correlation)
        self._step_columns: dict[str, Any] = {}
        self._dropped: KVBatchMeta | None = None
        self._dropped_tokens = 0
        self._intervals = Intervals(self.prefix.sampling.adaptive_threshold)
        self._batch: KVBatchMeta | None = None
        self._rollouts_logged = 0  # step
        self._lost_rollouts, self._lost_metrics = LostLines("rollout log"), LostLines("metrics")

    def _build_replay_buffer(self):
        replay_buffer = super()._build_replay_buffer()
        replay_buffer.poll_interval = self.prefix.poll_interval
        return replay_buffer

    def _setup(self) -> None:
        super()._setup()
        actor = self.config.actor_rollout_ref.actor
        if actor.policy_loss.loss_mode == LOSS_MODE:
            loss = partial(worker_loss, config=omega_conf_to_dataclass(actor), prefix=self.prefix)
            self.actor_rollout_wg.set_loss_fn(loss)

    # --- faults -------------------------------------------------------------------------------------------------------

    def _step_once(self, *args: Any, **kwargs: Any) -> KVBatchMeta:
        try:
            self._batch = super()._step_once(*args, **kwargs)
            return self._batch
        except RuntimeError as error:
            if "no materializable trajectories" not in str(error):
                raise
            raise RolloutError(
                f"step {self.global_steps}: none of its rollouts came back. The log has a traceback for each "
                "under 'Error in _run_prompt': the rollout engine or the reward function fails on every request."
            ) from error

    def fit(self, *args: Any, **kwargs: Any) -> None:
        trainer = self.config.trainer
        if "file" in trainer.logger:  # verl opens it anew, also on a resume
            run_log.set_aside(run_log.file_of(trainer.project_name, trainer.experiment_name))
        super().fit(*args, **kwargs)

    def on_train_begin(self) -> None:
        super().on_train_begin()
        if file_logger := self.logger.logger.get("file"):
            file_logger.fp = WholeLines(file_logger.fp, self._lost_metrics)

    def _write_generations(
        self, inputs, outputs, gts, scores, reward_extra_infos_dict, dump_path, global_steps
    ) -> None:
        """In verl's thread for it, which would hand an error to a later step, and so end the run."""
        kept, trainer = self.prefix.monitor.rollout_log_steps, self.config.trainer
        if kept and dump_path == trainer.get("rollout_data_dir"):
            rollout_log.delete_up_to(Path(dump_path), global_steps - kept)  # first, since the disk may be full
        try:
            super()._write_generations(inputs, outputs, gts, scores, reward_extra_infos_dict, dump_path, global_steps)
            self._lost_rollouts.written()
        except OSError as error:
            file = Path(dump_path) / f"{global_steps}.jsonl"
            self._lost_rollouts.add(len(inputs), file, error)
            discard(file)

    def _lost_lines(self) -> dict[str, float]:
        trainer, lost = self.config.trainer, {}
        if trainer.get("rollout_data_dir") or trainer.get("validation_data_dir"):
            lost["prefix/rollout_log_lost"] = float(self._lost_rollouts.count)
        if "file" in trainer.logger:
            lost["prefix/metrics_log_lost"] = float(self._lost_metrics.count)
        return lost

    @property
    def _reads_entropy(self) -> bool:
        """Whether an advantage or a weight depends on the entropy; a metric alone may be NaN."""
        prefix = self.prefix
        return (
            (prefix.entropy_clip.keep in ("top", "bottom") and prefix.sampling.rollouts > 0)
            or prefix.advantage.on_policy == "likelihood"
            or prefix.sft.row_weight != "none"
        )

    # --- adaptive prefix lengths --------------------------------------------------------------------------------------

    @property
    def _adaptive(self) -> bool:
        return self.prefix.sampling.law == "adaptive" and self.prefix.sampling.rollouts > 0

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        if self._adaptive:
            batch[INTERVAL] = torch.tensor([self._intervals.of(row) for row in _as_list(batch["index"])])
        return super()._submit_batch_to_rollout(batch)

    def _move_intervals(self, batch: KVBatchMeta) -> None:
        names = ["uid", "index", "rm_scores", "extra_fields"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        rewards = data["rm_scores"].sum(-1).tolist()
        columns_of_rows = (*(_as_list(data[name]) for name in ("uid", "index", "extra_fields")), rewards)
        # by group: a batch can hold a row twice, at an epoch's end or in asynchronous mode
        outcomes: dict[tuple, list[tuple[float, float]]] = {}
        for uid, row, fields, reward in zip(*columns_of_rows, strict=True):
            if fields[RECORD]["demo_len"]:
                outcomes.setdefault((uid, row), []).append((fields[RECORD]["ratio"], reward))
        self._intervals.update(
            (row, pairs[0][0], sum(reward for _, reward in pairs) / len(pairs)) for (_, row), pairs in outcomes.items()
        )

    def _save_checkpoint(self) -> None:
        # A resumed run begins after this step, so its rollouts are logged before the checkpoint counts.
        if (folder := self.config.trainer.get("rollout_data_dir")) and self._batch is not None:
            self._log_rollout_data(self._batch, self.timing_raw, folder)
            for written in self._dump_futures:
                written.result()
        if self._adaptive:  # before verl writes the tracker that makes the checkpoint count
            self._intervals.save(Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}")
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self._adaptive and self.global_steps > 0:
            trainer = self.config.trainer
            folder = Path(trainer.default_local_dir) / f"global_step_{self.global_steps}"
            self._intervals.load(Path(trainer.resume_from_path) if trainer.resume_mode == "resume_path" else folder)

    # --- gate ---------------------------------------------------------------------------------------------------------

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, **kwargs: Any) -> KVBatchMeta:
        """Before the first forward pass: move the prompts' intervals, and drop what the gate does not let through."""
        if self._adaptive:
            self._move_intervals(batch)
        if self.prefix.gate.max_correct is None:
            return super()._balance_batch(batch, metrics, **kwargs)
        batch = super()._balance_batch(self._gate(batch, metrics), metrics, **kwargs)
        # verl appends the padding that fills the gaps, and cuts mini-batches in this order.
        ranks = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
        batch.reorder(gate.spread(len(batch), ranks, seed=self.prefix.seed, step=self.global_steps))
        return batch

    def _gate(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["uid", "rm_scores", "prefix_len"]
        )
        require_finite(self.global_steps, batch.keys, rewards=data["rm_scores"])
        prefix_len = data["prefix_len"].reshape(-1)
        generated = data["rm_scores"].offsets().diff() - prefix_len
        decision = gate.apply(
            self.prefix.gate,
            group=_as_list(data["uid"]),
            reward=data["rm_scores"].sum(-1).tolist(),
            prefixed=(prefix_len > 0).tolist(),
        )
        dropped = torch.from_numpy(~decision.keep)
        metrics["gate/failing_share"] = decision.failing_groups / decision.groups
        metrics["gate/dropped_rollouts"] = float(dropped.sum())
        metrics["gate/dropped_tokens"] = float(generated[dropped].sum())
        self._dropped_tokens = int(prefix_len[dropped].sum())
        # What is dropped stays in the store until it is in the rollout log.
        self._dropped = _select(batch, ~decision.keep)
        return _select(batch, decision.keep)

    def _log_rollout_data(self, batch: KVBatchMeta, timing_raw: dict, rollout_data_dir: str) -> None:
        if self._rollouts_logged == self.global_steps:  # by `_save_checkpoint`
            return
        self._rollouts_logged = self.global_steps
        if self._dropped is not None and len(self._dropped):
            dropped = self._dropped
            self._step_columns = _joined(self._step_columns, self._fetch_prefix_columns(dropped, trained=False))
            batch = dataclasses.replace(batch, keys=batch.keys + dropped.keys, tags=batch.tags + dropped.tags)
        super()._log_rollout_data(batch, timing_raw, rollout_data_dir)

    def on_step_begin(self) -> None:
        super().on_step_begin()
        if self._dropped is not None and len(self._dropped):
            tq.kv_clear(keys=self._dropped.keys, partition_id=self._dropped.partition_id)
        self._dropped = None

    # --- old policy, advantages, metrics ------------------------------------------------------------------------------

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._compute_old_log_prob(batch, metrics)
        self._step_columns = self._fetch_prefix_columns(batch)
        if self._sft_weight > 0:
            self._put_sft_weights(batch)
            metrics["sft/weight"] = self._sft_weight
        metrics.update(grader_metrics(self._step_columns["reward_info"], self._step_columns["real"].tolist()))
        if self.config.actor_rollout_ref.rollout.calculate_log_probs:
            metrics.update(self._neutralise_prefix_rollout_log_probs(batch))
        else:
            data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["old_log_probs"])
            require_finite(self.global_steps, batch.keys, old_log_probs=data["old_log_probs"])
        self._correlation.check(metrics, self.global_steps)
        return batch

    def _fetch_prefix_columns(self, batch: KVBatchMeta, trained: bool = True) -> dict[str, Any]:
        """Per-row columns (B,) of the batch in its present order."""
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["prefix_len", "extra_fields", "index"]
        )
        # Synthetic padding rows copy a real row's columns.
        real = torch.tensor([not tag.get("is_padding", False) for tag in batch.tags])
        extra = _as_list(data["extra_fields"])
        records = [fields[RECORD] for fields in extra]
        names = [key.rsplit("_", 2) for key in batch.keys]  # {uid}_{session}_{index}
        fetched = {key: torch.tensor([record[key] for record in records]) for key in records[0]}
        return {
            **fetched,
            "prefix_len": torch.where(real, data["prefix_len"].reshape(-1).long(), 0),
            "real": real,
            "trained": real & trained,
            "keys": list(batch.keys),
            "row_index": _as_list(data["index"]),
            "group": [uid for uid, _, _ in names],
            "session": [int(session) for _, session, _ in names],
            "reward_info": [fields.get("reward_extra_info") or {} for fields in extra],
            # filled by `_estimate`; verl's own estimators have no entropy clip
            "clip_kept": torch.zeros(0, dtype=torch.bool),
            # for the rollout log, filled by `_prefix_metrics`; what the gate has dropped has none
            "advantages": [torch.zeros(0)] * len(records),
        }

    def _neutralise_prefix_rollout_log_probs(self, batch: KVBatchMeta) -> dict[str, Any]:
        """Give prefix tokens the old policy's log-probability as their rollout log-probability.

        The rollout engine never sampled them. Equal values are neutral (ratio 1) in verl's rollout correction. The
        rollout/actor comparison is made again on generated tokens alone; returns its metrics.
        """
        names = ["rollout_log_probs", "old_log_probs"]
        nested = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        require_finite(self.global_steps, batch.keys, **{name: nested[name] for name in names})
        rollout, old = (nested[name] for name in names)
        rollout_rows, old_rows = rollout.unbind(), old.unbind()  # views
        # Every agent loop of the plugin's trains on all it generated, so the mask need not be fetched.
        generated = torch.zeros(rollout.values().numel(), dtype=torch.bool)
        prefix_len, start = self._step_columns["prefix_len"].tolist(), rollout.offsets().tolist()
        for row, real in enumerate(self._step_columns["real"].tolist()):
            rollout_rows[row][: prefix_len[row]] = old_rows[row][: prefix_len[row]]
            generated[start[row] + prefix_len[row] : start[row + 1]] = real
        if prefixed := [row for row, length in enumerate(prefix_len) if length]:
            changed = torch.nested.as_nested_tensor([rollout_rows[row] for row in prefixed], layout=torch.jagged)
            tq.kv_batch_put(
                keys=[batch.keys[row] for row in prefixed],
                partition_id=batch.partition_id,
                fields=TensorDict({"rollout_log_probs": changed}, batch_size=len(prefixed)),
            )
        # One long row, which needs no padding. Of the responses verl reads only how long they are.
        flat = {"rollout_log_probs": rollout.values(), "old_log_probs": old.values(), "response_mask": generated}
        flat = {name: column[None] for name, column in {**flat, "responses": generated}.items()}
        return calculate_debug_metrics(DataProto(batch=TensorDict(flat, batch_size=1)))

    @property
    def _sft_weight(self) -> float:
        """mu_t of this step."""
        return value_at(self.prefix.sft.weight, self.global_steps)

    def _put_sft_weights(self, batch: KVBatchMeta) -> None:
        actor, rollout = self.config.actor_rollout_ref.actor, self.config.actor_rollout_ref.rollout
        weights = sft_row_weights(
            self._step_columns["prefix_len"],
            self._step_columns["real"],
            weight=self._sft_weight,
            mini_batches=mini_batches(
                actor.loss_agg_mode,
                planned=math.ceil(self.config.data.train_batch_size / actor.ppo_mini_batch_size),
                left=len(batch) // (actor.ppo_mini_batch_size * rollout.n),
            ),
            dropped_tokens=self._dropped_tokens,
            factor=self._demonstration_factor(batch),
        )
        fields = TensorDict({SFT_WEIGHT: weights}, batch_size=len(batch))
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    def _demonstration_factor(self, batch: KVBatchMeta) -> torch.Tensor | float:
        if self.prefix.sft.row_weight == "none":
            return 1.0
        entropy, prefix_len = self._entropy(batch), self._step_columns["prefix_len"]
        return entropy_factor(entropy, prefix_len, sign=self.prefix.sft.entropy_sign)

    def _entropy(self, batch: KVBatchMeta) -> torch.Tensor:
        """(B, T) of the old policy in nats."""
        nested = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["entropy"])
        return nested.to_padded_tensor()["entropy"]

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        entropy, known = self._entropy(batch), {}
        if self._reads_entropy:
            require_finite(self.global_steps, batch.keys, entropy=entropy)
        with columns.lend(estimate=partial(self._estimate, entropy, known)):
            batch = super()._compute_advantage(batch, metrics)
        metrics.update(self._prefix_metrics(batch, entropy, known))
        metrics.update(self._lost_lines())
        return batch

    def _estimate(
        self, entropy: torch.Tensor, known: dict[str, torch.Tensor], estimator, **given: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a registered estimator does inside this trainer. Leaves in `known` what the metrics want as well."""
        result = credit.assign(
            estimator,
            config=self.prefix,
            entropy=entropy,
            rows=self._step_columns,
            order=credit.row_order(self._step_columns["row_index"], self._step_columns["session"]),
            global_step=self.global_steps,
            **given,
        )
        self._step_columns["clip_kept"] = result.clip_kept
        known.update(advantages=result.advantages, response_mask=given["response_mask"])
        return result.advantages, result.returns

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._update_actor(batch, metrics)
        metrics.update(clip_fractions(metrics))
        metrics.update(skipped_update(metrics, self.global_steps))
        return batch

    def _prefix_metrics(
        self, batch: KVBatchMeta, entropy: torch.Tensor, known: dict[str, torch.Tensor]
    ) -> dict[str, float]:
        """`known` has advantages and response mask (B, T), or is empty: verl's own estimators do not pass by here."""
        fields = ["uid", "rm_scores", *({"response_mask", "advantages"} - known.keys())]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        uid, rewards = np.array(_as_list(data.pop("uid")), dtype=object), data.pop("rm_scores")
        padded = {**data.to_padded_tensor(), **known}
        require_finite(self.global_steps, batch.keys, rewards=rewards, advantages=padded["advantages"])
        response_len = rewards.offsets().diff()
        if self.config.trainer.get("rollout_data_dir"):  # without a log they need not outlive the estimator
            lengths = torch.where(self._step_columns["real"], response_len, 0).tolist()
            self._step_columns["advantages"] = [row[:n] for row, n in zip(padded["advantages"], lengths, strict=True)]
        rollout = self.config.actor_rollout_ref.rollout
        return prefix_metrics(
            reward=rewards.sum(-1),
            advantages=padded["advantages"],
            entropy=entropy,
            response_mask=padded["response_mask"],
            response_len=response_len,
            group=uid,
            rows=self._step_columns,
            expected_groups=self.config.data.train_batch_size,
            rollouts_per_group=rollout.n,
            dropped_rollouts=0 if self._dropped is None else len(self._dropped),
        )

    def _dump_generations(self, inputs, outputs, gts, scores, reward_extra_infos_dict, dump_path) -> None:
        if dump_path == self.config.trainer.get("rollout_data_dir", None):
            reward_extra_infos_dict = {
                **reward_extra_infos_dict,
                **self._rollout_log_columns(reward_extra_infos_dict["uid"], outputs),
            }
        super()._dump_generations(inputs, outputs, gts, scores, reward_extra_infos_dict, dump_path)

    def _rollout_log_columns(self, keys: list[str], outputs: list[str]) -> dict[str, list]:
        """The plugin's columns of the rollout log, in the order of `keys` (`{uid}_{session}_{index}`)."""
        order = {key: row for row, key in enumerate(self._step_columns["keys"])}
        rows = [order[key] for key in keys]
        prefix_len, advantages = self._step_columns["prefix_len"].tolist(), self._step_columns["advantages"]
        response_ids: list[list[int]] = [[] for _ in keys]
        # Responses are the longest column of all; the other rows' are not needed.
        if needed := [at for at, row in enumerate(rows) if prefix_len[row] or _varies(advantages[row])]:
            data = tq.kv_batch_get(keys=[keys[at] for at in needed], partition_id="train", select_fields=["responses"])
            for at, response in zip(needed, data["responses"].unbind(), strict=True):
                response_ids[at] = response.tolist()
        return rollout_log.columns(
            rows=rows,
            outputs=outputs,
            response_ids=response_ids,
            step_columns=self._step_columns,
            decode=partial(self.tokenizer.decode, skip_special_tokens=True),
        )


@register_trainer("prefix_sync")
class PrefixTrainerSync(PrefixTrainer, PPOTrainerSync):
    pass


@register_trainer("prefix_colocate_async")
class PrefixTrainerColocateAsync(PrefixTrainer, PPOTrainerColocateAsync):
    """A prompt's schedule and prefix are those of the step at which it was issued; the gate, the entropy clip and the
    SFT weight those of the step that trains on it."""

    def _build_replay_buffer(self):
        replay_buffer = super()._build_replay_buffer()
        replay_buffer.refill_fn = self._refill
        return replay_buffer

    def _refill(self, prompts: int) -> int:
        """In the place of prompts whose rollouts failed, or that have become too old."""
        self._refilled += prompts
        if (
            self._refilled > MOST_REFILLED * self.config.data.train_batch_size
            and self._resolve_filter_groups_metric() is None
        ):
            raise RolloutError(
                f"step {self.global_steps}: {self._refilled} prompts were issued in the place of others and still no "
                "batch is complete. The log has a traceback for each rollout that failed under 'Error in _run_prompt'; "
                "without one, rollouts are dropped as too old (trainer.v1.sampler.max_off_policy_threshold)."
            )
        return self._add_prompts_to_generate(prompts)

    def on_sample_begin(self) -> None:
        super().on_sample_begin()
        self._refilled = 0


def _select(batch: KVBatchMeta, chosen: np.ndarray) -> KVBatchMeta:
    keys = [key for key, yes in zip(batch.keys, chosen, strict=True) if yes]
    tags = [tag for tag, yes in zip(batch.tags, chosen, strict=True) if yes]
    return dataclasses.replace(batch, keys=keys, tags=tags)


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two sets of per-row columns, one after the other."""
    join = {True: lambda a, b: torch.cat([a, b]), False: lambda a, b: a + b}
    return {name: join[isinstance(column, torch.Tensor)](column, second[name]) for name, column in first.items()}


def _varies(values: torch.Tensor) -> bool:
    return values.numel() > 0 and bool((values != values[0]).any())


def _as_list(column: Any) -> list:
    """A non-tensor column as a plain list; TransferQueue returns it as an array, a NonTensorStack or a list."""
    return list(column.tolist() if hasattr(column, "tolist") else column)
