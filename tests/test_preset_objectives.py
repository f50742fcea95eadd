"""Every preset against its published formula, worked out for six rollouts of two prompts.

The left side is the project's whole path: gate, advantages, SFT weights, and the loss as verl calls it. The right
side is written from the papers' equations, preset by preset, in plain floats.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tests_support import PRESETS, compose_in_process
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig, PolicyLossConfig

from verl_prefix import credit, gate
from verl_prefix.advantage import ESTIMATORS
from verl_prefix.config import PrefixConfig
from verl_prefix.policy_loss import worker_loss
from verl_prefix.schedule import value_at
from verl_prefix.sft_weight import entropy_factor, sft_row_weights

STEP = 1
LIMIT = 8  # data.max_response_length
PROMPT = [0, 0, 0, 1, 1, 1]
REWARD = [0.9, 0.4, 0, 1, 0, -0.5]  # prompt 1 is a failing one: none of its own rollouts is right
P = [0.5, 0.6, 0.3, 0.9]  # current policy on tokens 0..3 of every rollout
OLD = [0.4, 0.6, 0.6, 0.9]
RATIO = [p / old for p, old in zip(P, OLD, strict=True)]  # 1.25 is clipped at 1.2 for A > 0, 0.5 at 0.8 for A < 0
ENTROPY = [[1.0 + b / 100, 0.2, 0.5, 0.1] for b in range(6)]
DEMONSTRATIONS = (0, 3)
OWN = (1, 2, 4, 5)


def prefix_lens(config: PrefixConfig) -> list[int]:
    """Prefix tokens of the six rollouts of 4 tokens: the whole, or two of the first or of all in a group."""
    if config.sampling.rollouts == 0:
        return [0] * 6
    length = 4 if config.sampling.law == "whole" else 2
    return [length if b % 3 < config.sampling.rollouts else 0 for b in range(6)]


def ours(config) -> float:
    """The loss of the six rollouts under a composed configuration, entropy bonus and KL (verl's own) left out."""
    prefix, actor = PrefixConfig.of(config.prefix), config.actor_rollout_ref.actor
    prefix_len = torch.tensor(prefix_lens(prefix))
    frozen = not prefix.loss.update_prefix
    mask = torch.tensor([[0 if frozen and t < prefix_len[b] else 1 for t in range(4)] for b in range(6)])
    rewards = torch.zeros(6, 4)
    rewards[:, -1] = torch.tensor(REWARD)
    uid = [f"p{i}" for i in PROMPT]
    keep = torch.tensor(gate.apply(prefix.gate, group=uid, reward=REWARD, prefixed=(prefix_len > 0).tolist()).keep)
    dropped_tokens = int(prefix_len[~keep].sum())
    prefix_len, mask, rewards = prefix_len[keep], mask[keep], rewards[keep]
    n = len(mask)
    rows = {
        "prefix_len": prefix_len,
        "demo_len": torch.full((n,), 4),
        "low": torch.full((n,), 0.95),
        "high": torch.full((n,), 0.95),
        "hit_limit": torch.zeros(n, dtype=torch.bool),
    }
    name = config.algorithm.adv_estimator
    index = np.array(uid, dtype=object)[keep.numpy()]
    if name == "grpo":
        from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

        advantages, _ = compute_grpo_outcome_advantage(rewards, mask, index)
    else:
        advantages = credit.assign(
            ESTIMATORS[name],
            config=prefix,
            token_level_rewards=rewards,
            response_mask=mask,
            index=index,
            entropy=torch.tensor(ENTROPY)[keep],
            rows=rows,
            global_step=STEP,
        ).advantages

    def nested(rows):
        return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)

    ones = torch.ones(n, 4, dtype=torch.int64)
    fields = {
        "prompts": nested(ones[:, :1]),
        "responses": nested(ones),
        "input_ids": nested(torch.ones(n, 5, dtype=torch.int64)),
        "response_mask": nested(mask),
        "old_log_probs": nested(torch.tensor([OLD] * n, dtype=torch.float64).log()),
        "advantages": nested(advantages.double()),
        "entropy": nested(torch.tensor(ENTROPY, dtype=torch.float64)[keep]),
        "prefix_len": prefix_len,
    }
    weight = value_at(prefix.sft.weight, STEP)
    if weight > 0:
        real = torch.ones(n, dtype=torch.bool)
        factor = 1.0
        if prefix.sft.row_weight == "entropy":
            factor = entropy_factor(torch.tensor(ENTROPY)[keep], prefix_len, sign=prefix.sft.entropy_sign)
        shares = {"mini_batches": 1, "dropped_tokens": dropped_tokens, "factor": factor}
        weights = sft_row_weights(prefix_len, real, weight=weight, **shares)
        fields["sft_weight"] = weights.double()
    data = TensorDict(fields, batch_size=n)
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=6)
    log_probs = nested(torch.tensor([[*P, 1.0]] * n, dtype=torch.float64).log())
    actor_config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        use_dynamic_bsz=True,
        loss_agg_mode=actor.loss_agg_mode,
        loss_scale_factor=actor.loss_scale_factor,
        clip_ratio_low=actor.clip_ratio_low,
        clip_ratio_high=actor.clip_ratio_high,
        clip_ratio_c=actor.clip_ratio_c,
        policy_loss=PolicyLossConfig(loss_mode="prefix_rft"),
    )
    loss, _ = worker_loss(actor_config, {"log_probs": log_probs}, data, prefix=prefix)
    return loss.item()


# --- the papers ---


def mean(values):
    return sum(values) / len(values)


def ppo(t, a):
    """PPO's surrogate loss of token t at advantage a (no case here reaches the dual clip)."""
    return -min(RATIO[t] * a, min(max(RATIO[t], 0.8), 1.2) * a)


def std(values):
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))


def group(b, members=range(6)):
    return [REWARD[c] for c in members if PROMPT[c] == PROMPT[b]]


def dr(b, members=range(6)):
    return REWARD[b] - mean(group(b, members))


def normalised(b, members=range(6)):
    return dr(b, members) / (std(group(b, members)) + 1e-6)


def dr_grpo_sum(terms):
    """Dr.GRPO: over all tokens, divided by the number of rollouts and the constant length."""
    return sum(terms) / (6 * LIMIT)


def nll(tokens):
    return mean([-math.log(P[t]) for t in tokens])


def prefix_rft(chosen=None, weight=1.0, prefixed=DEMONSTRATIONS):
    """`chosen`: (rollout, token) of the prefix tokens that keep their advantage (None: all)."""
    terms = []
    for b in range(6):
        for t in range(4):
            in_prefix = b in prefixed and t < 2
            if in_prefix and chosen is not None and (b, t) not in chosen:
                continue
            terms.append(ppo(t, dr(b) * (weight if in_prefix else 1)))
    return dr_grpo_sum(terms)


def continuations(advantage, aggregate=mean, rows=range(6)):
    """The policy term outside of a prefix of two tokens that every rollout in `rows` has."""
    return aggregate([ppo(t, advantage(b)) for b in rows for t in (2, 3)])


def luffy():
    terms = [-(P[t] / (P[t] + 0.1)) * dr(b) for b in DEMONSTRATIONS for t in range(4)]
    return dr_grpo_sum(terms + [-RATIO[t] * dr(b) for b in OWN for t in range(4)])


def rl_plus():
    terms = [ppo(t, normalised(b)) for b in OWN for t in range(4)]
    for b in DEMONSTRATIONS:
        for t in range(4):
            ratio = 2 * P[t] / (OLD[t] + 0.5 * (OLD[t] + 1))
            terms.append(-ratio * normalised(b) * (1 - P[t]) ** 0.5)
    return mean(terms)


def srft():
    terms = [-(P[t] / (P[t] + 0.1)) * normalised(b) for b in DEMONSTRATIONS for t in range(4)]
    for b in OWN:
        for t in range(4):
            terms.append(0.1 * math.exp(mean(ENTROPY[b])) * -math.log(P[t]) if REWARD[b] > 0 else math.log(P[t]))
    sft = mean([math.exp(-mean(ENTROPY[b])) * -math.log(P[t]) for b in DEMONSTRATIONS for t in range(4)])
    return mean(terms) + 0.5 * sft


def own_only(advantage, aggregate=mean):
    return aggregate([ppo(t, advantage(b, OWN)) for b in OWN for t in range(4)])


def gated(advantage):
    """HPT, SuperRL: prompt 0 has a right rollout of its own and trains on those; prompt 1 copies its demonstration,
    with half the weight, as it is one of two prompts."""
    return dr_grpo_sum([ppo(t, advantage(b, OWN)) for b in (1, 2) for t in range(4)]) + nll(range(4)) / 2


def chord(mu, weight):
    sft = mean([-math.log(P[t]) * weight(P[t]) for t in range(4)])
    return (1 - mu) * own_only(normalised) + mu * sft


def cosine(initial, target, steps):
    return target + 0.5 * (1 + math.cos(math.pi * STEP / steps)) * (initial - target)


EXPECTED = {
    # 4 prefix tokens, entropies 1.00, 0.2 and 1.03, 0.2; ceil(0.2 * 4) = 1 keeps its advantage
    "prefix_rft": lambda: prefix_rft([(3, 0)]),
    "prefix_rft_top50": lambda: prefix_rft([(3, 0), (0, 0)]),
    "prefix_rft_top80": lambda: prefix_rft([(3, 0), (0, 0), (0, 1), (3, 1)]),
    "prefix_rft_bottom": lambda: prefix_rft([(0, 1)]),  # a tie, the earlier row first
    "prefix_rft_no_clip": prefix_rft,
    "prefix_rft_frozen": lambda: prefix_rft([]),
    "prefix_rft_static": lambda: prefix_rft(weight=0.001),
    "prefix_rft_uniform": lambda: prefix_rft([(3, 0)]),
    "prefix_rft_10_percent": lambda: prefix_rft([(3, 0)]),
    # 12 prefix tokens, of which ceil(0.2 * 12) = 3 keep theirs: the first of the last three rollouts
    "prefix_rft_sft": lambda: prefix_rft([(3, 0), (4, 0), (5, 0)], prefixed=range(6)) + 0.1 * nll([0, 1]),
    "prefix_rft_shared": lambda: continuations(dr, dr_grpo_sum),
    "dr_grpo": lambda: dr_grpo_sum([ppo(t, dr(b)) for b in range(6) for t in range(4)]),
    "grpo": lambda: mean([ppo(t, normalised(b)) for b in range(6) for t in range(4)]),
    "luffy": luffy,
    "rl_sft_loss": lambda: own_only(dr, dr_grpo_sum) + nll(range(4)),
    "rl_plus": rl_plus,
    "srft": srft,
    "uft": lambda: continuations(normalised) + 0.001 * nll([0, 1]),
    "hpt": lambda: gated(dr),
    "superrl": lambda: gated(normalised),
    "chord_mu": lambda: chord(cosine(0.9, 0.05, 200), lambda p: 1),
    "chord_phi": lambda: chord(0.1, lambda p: p * (1 - p)),
    "trsft": lambda: (
        mean([ppo(t, normalised(b)) for b in range(6) for t in range(4) if b in OWN or t >= 2])
        - mean([P[t] / max(P[t], 0.1) for t in (0, 1)])
    ),
    "r3": lambda: continuations(normalised),
    "hint": lambda: continuations(normalised),
    "adaptive": lambda: continuations(normalised),
}


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "prefix_rft_random"])
def test_against_the_paper(preset):
    config = compose_in_process(f"+prefix={preset}", f"data.max_response_length={LIMIT}")
    assert ours(config) == pytest.approx(EXPECTED[preset](), rel=1e-5)


@pytest.mark.parametrize("key", ["max_correct=null", "demonstrations=always", "on_policy=always"])
@pytest.mark.parametrize("preset", ["hpt", "superrl"])
def test_every_part_of_the_gate_matters_here(preset, key):
    plain = compose_in_process(f"+prefix={preset}", f"data.max_response_length={LIMIT}", f"prefix.gate.{key}")
    assert ours(plain) != pytest.approx(EXPECTED[preset](), rel=1e-3)


def test_random_keeps_one_of_four_prefix_tokens():
    config = compose_in_process("+prefix=prefix_rft_random", f"data.max_response_length={LIMIT}")
    one_each = [prefix_rft([(b, t)]) for b in DEMONSTRATIONS for t in range(2)]
    assert any(ours(config) == pytest.approx(expected, rel=1e-5) for expected in one_each)


def test_the_numbers_are_not_all_the_same():
    """The example tells the methods apart, so that a preset cannot pass with another one's formula."""
    drawn = {"prefix_rft_uniform", "prefix_rft_10_percent", "hint", "adaptive"}  # differ in what is drawn
    # all of 4 tokens are 80 %, and without a clip a prefix counts like any token
    coincide = {"prefix_rft_top80", "dr_grpo"}
    same_here = drawn | coincide
    values = [round(formula(), 9) for name, formula in EXPECTED.items() if name not in same_here]
    assert len(set(values)) == len(values)
