"""A plain PyTorch stand-in for a training run on the CPU testbed: the same draws, gate, advantages, objective and
aggregation, through the same functions, with neither Ray nor vLLM. About ten times faster than a run through verl.

It is for finding settings; what is reported is measured through verl. One optimizer step a batch, so old and current
policy are the same and the PPO clip never binds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging as transformers_logging

from data_prep.testbed import task
from data_prep.testbed.grader import compute_score
from data_prep.testbed.tokenizer import prompt_ids
from verl_prefix import credit, gate
from verl_prefix.adaptive import Intervals
from verl_prefix.advantage import ESTIMATORS, prefix_mask
from verl_prefix.config import PrefixConfig
from verl_prefix.demonstrations import DemonstrationTokenizer, offered
from verl_prefix.objective import demonstration_nll, token_policy_loss
from verl_prefix.sampling import cut_prefix, prefix_record
from verl_prefix.schedule import value_at
from verl_prefix.sft_weight import entropy_factor, sft_row_weights

transformers_logging.disable_progress_bar()

RESPONSE_LENGTH = 32
PROMPTS = 16
SFT_ROWS = 64


@dataclass
class Curve:
    """Held-out accuracy by optimizer step; `tokens` are those generated in training up to there."""

    steps: list[int] = field(default_factory=list)
    easy: list[float] = field(default_factory=list)
    hard: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class StandIn:
    """One run. `rl` and `sft` may be called one after the other on the same policy.

    Args:
        testbed: folder made by `python -m data_prep.testbed`.
        seed: of data order, sampling and prefixes.
        lr: AdamW's constant learning rate (betas 0.9 and 0.95, gradients clipped at norm 1).
    """

    def __init__(self, testbed: Path, seed: int, lr: float, *, weight_decay: float = 0.0, check_every: int = 25):
        self.tokenizer = AutoTokenizer.from_pretrained(testbed / "model")
        self.model = AutoModelForCausalLM.from_pretrained(testbed / "model", dtype=torch.float32)
        self.seed, self.check_every, self.curve = seed, check_every, Curve()
        self.restart_optimizer(lr, weight_decay)
        self.rows = pq.read_table(testbed / "train.parquet").to_pylist()
        self.val = pq.read_table(testbed / "val.parquet").to_pylist()
        self.order = np.random.default_rng(seed)
        self.step = self.generated = 0
        torch.manual_seed(seed)

    def restart_optimizer(self, lr: float, weight_decay: float = 0.0) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)

    # --- one method ---------------------------------------------------------------------------------------------------

    def rl(self, config: Any, steps: int) -> None:
        """`steps` updates by a composed verl configuration, `+prefix=PRESET` included."""
        prefix, actor = PrefixConfig.of(config.prefix), config.actor_rollout_ref.actor
        demonstrations = DemonstrationTokenizer(self.tokenizer, RESPONSE_LENGTH)
        intervals = Intervals(prefix.sampling.adaptive_threshold)
        reference = None
        if actor.use_kl_loss:
            reference = AutoModelForCausalLM.from_pretrained(self.model.config._name_or_path, dtype=torch.float32)
            reference.load_state_dict(self.model.state_dict())
        self._check()
        for step in range(1, steps + 1):
            rows = self._draw(PROMPTS)
            batch = self._rollout(rows, config, prefix, demonstrations, intervals, step)
            kept, dropped_tokens = self._gate(batch, prefix)
            self._update(batch, kept, dropped_tokens, config, prefix, reference, step)
            self._count(step == steps)

    def sft(self, steps: int) -> None:
        """`steps` updates on the demonstrations: global token mean of -log p, whole demonstrations and an EOS."""
        rows = [row for row in self.rows if row["demos"]]
        self._check()
        for step in range(1, steps + 1):
            chosen = [rows[i] for i in self.order.permutation(len(rows))[:SFT_ROWS]]
            ids = [[*self._ids(row["demos"][0]), self.tokenizer.eos_token_id] for row in chosen]
            response_BT, mask_BT = _pad(ids)
            log_prob_BT, _ = self._forward(_prompts(self.tokenizer, chosen), response_BT)
            self._optimise(-(log_prob_BT * mask_BT).sum() / mask_BT.sum())
            self._count(step == steps)

    # --- parts --------------------------------------------------------------------------------------------------------

    def _draw(self, count: int) -> list[dict]:
        """The next `count` rows of a shuffled pass through the training file."""
        if getattr(self, "_queue", None) is None or len(self._queue) < count:
            self._queue = list(self.order.permutation(len(self.rows)))
        taken, self._queue = self._queue[:count], self._queue[count:]
        return [self.rows[i] for i in taken]

    def _rollout(self, rows, config, prefix, demonstrations, intervals, step) -> dict[str, Any]:
        n = config.actor_rollout_ref.rollout.n
        repeated = [row for row in rows for _ in range(n)]
        heads, records, lengths = [], [], []
        for i, row in enumerate(repeated):
            index = row["extra_info"]["index"]
            draw, ids = cut_prefix(
                prefix,
                demonstrations,
                offered(row["demos"], row["demos_correct"]),
                step=step,
                row_index=index,
                session_id=i % n,
                interval=intervals.of(index),
            )
            heads.append(ids)
            records.append(prefix_record(draw, hit_limit=False))
            lengths.append(len(ids))
        prompt_BP = _prompts(self.tokenizer, repeated)
        response_BT, mask_BT = _sample(self.model, self.tokenizer.eos_token_id, prompt_BP, heads)
        length_B = torch.tensor(lengths)
        self.generated += int((mask_BT.sum(-1) - length_B).sum())
        texts = _texts(self.tokenizer, response_BT, mask_BT)
        reward = [_score(text, row) for text, row in zip(texts, repeated, strict=True)]
        eos_B = (response_BT * mask_BT == self.tokenizer.eos_token_id).any(-1)
        columns = {key: torch.tensor([record[key] for record in records]) for key in records[0]}
        if prefix.sampling.law == "adaptive":
            for group in range(len(rows)):
                own = [i for i in range(group * n, (group + 1) * n) if records[i]["demo_len"]]
                if own:
                    mean = sum(reward[i] for i in own) / len(own)
                    intervals.update([(rows[group]["extra_info"]["index"], records[own[0]]["ratio"], mean)])
        return {
            "prompt": prompt_BP,
            "response": response_BT,
            "mask": mask_BT,
            "reward": torch.tensor(reward),
            "group": np.repeat(np.arange(len(rows)), n),
            "rows": {**columns, "prefix_len": length_B, "hit_limit": ~eos_B},
        }

    def _gate(self, batch: dict[str, Any], prefix: PrefixConfig) -> tuple[Tensor, int]:
        length_B = batch["rows"]["prefix_len"]
        decision = gate.apply(
            prefix.gate,
            group=[str(group) for group in batch["group"]],
            reward=batch["reward"].tolist(),
            prefixed=(length_B > 0).tolist(),
        )
        kept = torch.from_numpy(decision.keep)
        return kept, int(length_B[~kept].sum())

    def _update(self, batch, kept, dropped_tokens, config, prefix, reference, step) -> None:
        from verl.trainer.ppo.core_algos import agg_loss, compute_grpo_outcome_advantage, kl_penalty

        actor = config.actor_rollout_ref.actor
        prompt_BP, response_BT, whole_BT = batch["prompt"][kept], batch["response"][kept], batch["mask"][kept]
        rows = {name: column[kept] for name, column in batch["rows"].items()}
        group_B = batch["group"][kept.numpy()]
        prefix_BT = prefix_mask(rows["prefix_len"], whole_BT)
        mask_BT = whole_BT if prefix.loss.update_prefix else whole_BT * ~prefix_BT
        rewards_BT = torch.zeros(whole_BT.shape)
        rewards_BT[torch.arange(len(whole_BT)), whole_BT.sum(-1) - 1] = batch["reward"][kept].float()

        log_prob_BT, entropy_BT = self._forward(prompt_BP, response_BT)
        given = {"token_level_rewards": rewards_BT, "response_mask": mask_BT, "index": group_B}
        if config.algorithm.adv_estimator in ESTIMATORS:
            estimator = ESTIMATORS[config.algorithm.adv_estimator]
            entropy = entropy_BT.detach()
            advantages_BT = credit.assign(
                estimator, config=prefix, entropy=entropy, rows=rows, global_step=step, **given
            ).advantages
        else:
            advantages_BT, _ = compute_grpo_outcome_advantage(**given)
        tokens = token_policy_loss(
            log_prob_BT,
            log_prob_BT.detach(),
            advantages_BT,
            prefix_BT & (mask_BT > 0),
            config=prefix.loss,
            clip_low=actor.clip_ratio_low,
            clip_high=actor.clip_ratio_high,
            clip_c=actor.clip_ratio_c,
        )

        def aggregate(matrix_BT: Tensor) -> Tensor:
            scale = {"loss_scale_factor": RESPONSE_LENGTH} if actor.loss_scale_factor else {}
            return agg_loss(
                matrix_BT,
                mask_BT,
                actor.loss_agg_mode,
                dp_size=1,
                batch_num_tokens=max(int(mask_BT.sum()), 1),
                global_batch_size=len(mask_BT),
                **scale,
            )

        loss = aggregate(tokens.loss_BT)
        if actor.entropy_coeff:
            loss = loss - actor.entropy_coeff * aggregate(entropy_BT)
        if reference is not None:
            with torch.no_grad():
                reference_BT, _ = self._forward(prompt_BP, response_BT, reference)
            loss = loss + actor.kl_loss_coef * aggregate(kl_penalty(log_prob_BT, reference_BT, actor.kl_loss_type))
        if (weight := value_at(prefix.sft.weight, step)) > 0:
            length_B, entropy_BT, factor = rows["prefix_len"], entropy_BT.detach(), 1.0
            if prefix.sft.row_weight == "entropy":
                factor = entropy_factor(entropy_BT, length_B, sign=prefix.sft.entropy_sign)
            row_weight_B = sft_row_weights(
                length_B,
                torch.ones(len(mask_BT), dtype=torch.bool),
                weight=weight,
                mini_batches=1,
                dropped_tokens=dropped_tokens,
                factor=factor,
            )
            loss = loss + demonstration_nll(
                log_prob_BT, prefix_BT, row_weight_B, config=prefix.sft, entropy_RT=entropy_BT
            )
        self._optimise(loss)

    def _optimise(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def _forward(self, prompt_BP: Tensor, response_BT: Tensor, model=None) -> tuple[Tensor, Tensor]:
        """(B, T) log pi of the response and entropy of every position, both with gradient."""
        model = model or self.model
        ids = torch.cat([prompt_BP, response_BT], dim=1)
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state[:, prompt_BP.shape[1] - 1 :]
        log_probs_BTV = torch.log_softmax(model.lm_head(hidden), dim=-1)
        entropy_BT = -(log_probs_BTV.exp() * log_probs_BTV).sum(-1)
        return log_probs_BTV.gather(-1, response_BT[..., None])[..., 0], entropy_BT

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _count(self, last: bool) -> None:
        self.step += 1
        if last or self.step % self.check_every == 0:
            self._check()

    def _check(self) -> None:
        if self.curve.steps and self.curve.steps[-1] == self.step:
            return
        accuracy = _accuracy(self.model, self.tokenizer, self.val, self.seed + 7919 * (self.step + 1))
        self.curve.steps.append(self.step)
        self.curve.tokens.append(self.generated)
        for kind, value in accuracy.items():
            getattr(self.curve, kind).append(value)


def heldout_accuracy(testbed: Path, model: Path, seed: int) -> dict[str, float]:
    """Accuracy by kind of a model on the testbed's held-out problems, as verl's validation measures it: T = 1, one
    sample a problem, no prefixes."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = pq.read_table(testbed / "val.parquet").to_pylist()
    return _accuracy(loaded, AutoTokenizer.from_pretrained(testbed / "model"), rows, seed)


def _accuracy(model, tokenizer, rows: Sequence[dict], seed: int) -> dict[str, float]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids_BT, mask_BT = _sample(model, tokenizer.eos_token_id, _prompts(tokenizer, rows), [[]] * len(rows))
    texts = _texts(tokenizer, ids_BT, mask_BT)
    right = {kind: [] for kind in task.KINDS}
    for text, row in zip(texts, rows, strict=True):
        right[row["extra_info"]["kind"]].append(_score(text, row))
    return {kind: sum(scores) / len(scores) for kind, scores in right.items()}


def _score(text: str, row: dict) -> float:
    return compute_score(None, text, row["reward_model"]["ground_truth"])["score"]


def _texts(tokenizer, ids_BT: Tensor, mask_BT: Tensor) -> list[str]:
    kept = [ids[mask.bool()] for ids, mask in zip(ids_BT, mask_BT, strict=True)]
    return tokenizer.batch_decode(kept, skip_special_tokens=True)


def _prompts(tokenizer, rows: Sequence[dict]) -> Tensor:
    """(B, P) prompt ids; all prompts of the testbed are equally long."""
    return torch.tensor([prompt_ids(tokenizer, row["prompt"][0]["content"]) for row in rows])


@torch.no_grad()
def _sample(model, eos: int, prompt_BP: Tensor, heads: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Responses that begin with `heads`, sampled at T = 1 up to the limit: ids and mask (B, T)."""
    head_BT, forced_BT = _pad(heads, RESPONSE_LENGTH)
    cache, ids_BT, done_B = DynamicCache(), prompt_BP, torch.zeros(len(heads), dtype=torch.bool)
    response, mask = [], []
    for t in range(RESPONSE_LENGTH):
        logits_BV = model(input_ids=ids_BT, past_key_values=cache, use_cache=True).logits[:, -1]
        sampled_B = torch.multinomial(torch.softmax(logits_BV, dim=-1), 1)[:, 0]
        token_B = torch.where(forced_BT[:, t] > 0, head_BT[:, t], sampled_B)
        response.append(torch.where(done_B, eos, token_B))
        mask.append(~done_B)
        done_B = done_B | (token_B == eos)
        ids_BT = token_B[:, None]
        if done_B.all():
            break
    return torch.stack(response, 1), torch.stack(mask, 1).long()


def _pad(ids: Sequence[Sequence[int]], width: int | None = None) -> tuple[Tensor, Tensor]:
    """(B, T) ids, 0 where there are none, and their mask."""
    width = width or max(map(len, ids))
    padded, mask = torch.zeros(len(ids), width, dtype=torch.long), torch.zeros(len(ids), width, dtype=torch.long)
    for row, tokens in enumerate(ids):
        padded[row, : len(tokens)] = torch.tensor(list(tokens), dtype=torch.long)
        mask[row, : len(tokens)] = 1
    return padded, mask
