"""Seam: the synchronous V1 trainer that knows which tokens are prefixes.

`prefix_sync` is verl's `sync` trainer with the plugin's columns lent to the advantage estimator, the plugin's loss on
the workers, prefix metrics, and a rollout log that says where a prefix ends. No step of verl's is written again.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from transfer_queue import KVBatchMeta
from verl.protocol import DataProto
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.debug.metrics import calculate_debug_metrics
from verl.workers.utils.padding import response_to_nested

from verl_prefix import columns, rollout_log
from verl_prefix.advantage import entropy_clip_mask, prefix_mask, shape_advantages
from verl_prefix.agent_loop import RECORD
from verl_prefix.config import PrefixConfig
from verl_prefix.metrics import CorrelationWatch, prefix_metrics
from verl_prefix.names import LOSS_MODE, TRAINER_MODE
from verl_prefix.policy_loss import worker_loss

logger = logging.getLogger(__name__)


@register_trainer(TRAINER_MODE)
class PrefixTrainerSync(PPOTrainerSync):
    def __init__(self, config: DictConfig):
        # verl compares the mode with "sync" in several places (replay buffer, checkpoint, data loader); under any other
        # name it takes the run for an asynchronous one.
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"
        self.prefix = PrefixConfig.of(config.get("prefix"))
        self._correlation = CorrelationWatch(self.prefix.monitor.min_probs_correlation)
        self._step_columns: dict[str, Any] = {}
        super().__init__(config)

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

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._compute_old_log_prob(batch, metrics)
        self._step_columns = self._fetch_prefix_columns(batch)
        if self.config.actor_rollout_ref.rollout.calculate_log_probs:
            metrics.update(self._neutralise_prefix_rollout_log_probs(batch))
        self._correlation.check(metrics, self.global_steps)
        return batch

    def _fetch_prefix_columns(self, batch: KVBatchMeta) -> dict[str, Any]:
        """Per-row columns (B,) of the batch in its present order."""
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["prefix_len", "extra_fields"]
        )
        # Synthetic padding rows copy a real row's columns.
        real = torch.tensor([not tag.get("is_padding", False) for tag in batch.tags])
        records = [fields[RECORD] for fields in _as_list(data["extra_fields"])]
        fetched = {key: torch.tensor([record[key] for record in records]) for key in records[0]}
        return {
            **fetched,
            "prefix_len": torch.where(real, data["prefix_len"].reshape(-1).long(), 0),
            "real": real,
            "keys": list(batch.keys),
            # filled by `_estimate`; verl's own estimators have no entropy clip
            "clip_kept": torch.zeros(0, dtype=torch.bool),
        }

    def _neutralise_prefix_rollout_log_probs(self, batch: KVBatchMeta) -> dict[str, Any]:
        """Give prefix tokens the old policy's log-probability as their rollout log-probability.

        The rollout engine never sampled them. Equal values are neutral (ratio 1) in verl's rollout correction. The
        rollout/actor comparison is made again on generated tokens alone; returns its metrics.
        """
        names = ["responses", "response_mask", "rollout_log_probs", "old_log_probs"]
        nested = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        lengths = nested["response_mask"]
        data = DataProto(batch=nested.to_padded_tensor())
        is_prefix = prefix_mask(self._step_columns["prefix_len"], torch.ones_like(data.batch["response_mask"]))
        rollout = torch.where(is_prefix, data.batch["old_log_probs"], data.batch["rollout_log_probs"])
        filled = type(nested)({"rollout_log_probs": response_to_nested(rollout, lengths)}, batch_size=len(batch))
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=filled)
        data.batch["rollout_log_probs"] = rollout
        data.batch["response_mask"] = data.batch["response_mask"] * ~is_prefix
        return calculate_debug_metrics(data)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        nested = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["entropy"])
        entropy = nested.to_padded_tensor()["entropy"]
        with columns.lend(estimate=partial(self._estimate, entropy)):
            return super()._compute_advantage(batch, metrics)

    def _estimate(
        self, entropy: torch.Tensor, estimator, *, token_level_rewards, response_mask, index
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a registered estimator does inside this trainer: estimate, clip by entropy, shape, measure."""
        rows = self._step_columns
        advantages, returns = estimator(
            token_level_rewards=token_level_rewards,
            response_mask=response_mask,
            index=index,
            prefix_len=rows["prefix_len"],
            entropy=entropy,
            config=self.prefix,
            global_step=self.global_steps,
        )
        is_prefix = prefix_mask(rows["prefix_len"], response_mask)
        kept = entropy_clip_mask(
            entropy, is_prefix, self.prefix.entropy_clip, seed=self.prefix.seed, global_step=self.global_steps
        )
        rows["clip_kept"] = kept[is_prefix]
        shaped = shape_advantages(
            advantages,
            prefix_len=rows["prefix_len"],
            response_mask=response_mask,
            config=self.prefix.advantage,
            demo_len=rows["demo_len"],
            low=rows["low"],
            high=rows["high"],
            truncated=rows["hit_limit"],
        )
        return shaped, returns

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._update_actor(batch, metrics)
        metrics.update(self._prefix_metrics(batch, metrics))
        return batch

    def _prefix_metrics(self, batch: KVBatchMeta, step_metrics: dict) -> dict[str, float]:
        fields = ["uid", "response_mask", "rm_scores", "advantages", "entropy"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        uid = np.array(_as_list(data.pop("uid")), dtype=object)
        padded = data.to_padded_tensor()
        lengths = data["response_mask"].offsets().diff()
        rollout = self.config.actor_rollout_ref.rollout
        return prefix_metrics(
            reward=padded["rm_scores"].sum(-1),
            advantages=padded["advantages"],
            entropy=padded["entropy"],
            response_mask=padded["response_mask"],
            response_len=lengths,
            group=uid,
            rows=self._step_columns,
            expected_groups=self.config.data.train_batch_size,
            rollouts_per_group=rollout.n,
            step_metrics=step_metrics,
        )

    def _dump_generations(self, inputs, outputs, gts, scores, reward_extra_infos_dict, dump_path) -> None:
        if dump_path == self.config.trainer.get("rollout_data_dir", None):
            reward_extra_infos_dict = {
                **reward_extra_infos_dict,
                **self._rollout_log_columns(reward_extra_infos_dict["uid"]),
            }
        super()._dump_generations(inputs, outputs, gts, scores, reward_extra_infos_dict, dump_path)

    def _rollout_log_columns(self, keys: list[str]) -> dict[str, list]:
        """The plugin's columns of the rollout log, in the order of `keys` (`{uid}_{session}_{index}`)."""
        data = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=["responses", "index"])
        order = {key: row for row, key in enumerate(self._step_columns["keys"])}
        return rollout_log.columns(
            keys=keys,
            rows=[order[key] for key in keys],
            responses=data["responses"].unbind(),
            row_index=_as_list(data["index"]),
            step_columns=self._step_columns,
            decode=partial(self.tokenizer.decode, skip_special_tokens=True),
        )


def _as_list(column: Any) -> list:
    """A non-tensor column as a plain list; TransferQueue returns it as an array, a NonTensorStack or a list."""
    return list(column.tolist() if hasattr(column, "tolist") else column)
