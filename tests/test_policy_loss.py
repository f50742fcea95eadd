"""The loss as the workers call it: through verl's own ppo_loss, on nested micro-batches, however they are packed."""

from __future__ import annotations

import math
import pickle
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.metric import Metric
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from verl_prefix.config import PrefixConfig
from verl_prefix.policy_loss import policy_loss, worker_loss

PROMPT_LENS = [2, 3, 1, 2, 4, 2]
RESPONSE_LENS = [5, 3, 6, 1, 4, 2]
PREFIX_LENS = [3, 0, 2, 0, 0, 1]


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


@pytest.fixture
def rows():
    """Ragged rows: per-row tensors, and per-token log-probabilities of the whole sequence with a gradient."""
    generator = torch.Generator().manual_seed(3)

    def draw(n, scale=1.0):
        return torch.randn(n, generator=generator, dtype=torch.float64) * scale

    made = []
    for prompt, response, prefix in zip(PROMPT_LENS, RESPONSE_LENS, PREFIX_LENS, strict=True):
        log_prob = (-draw(prompt + response).abs()).requires_grad_()
        in_response = log_prob.detach()[prompt - 1 : prompt + response - 1]
        made.append(
            {
                "log_prob": log_prob,
                "entropy": draw(prompt + response).abs().requires_grad_(),
                "old": in_response + draw(response, 0.4),
                "advantage": draw(response, 2.0),
                "mask": torch.ones(response, dtype=torch.int64),
                "prompt": prompt,
                "response": response,
                "prefix": prefix,
            }
        )
    return made


def micro_batch(rows, total_tokens, total_rows):
    data = TensorDict(
        {
            "prompts": nested([torch.ones(r["prompt"], dtype=torch.int64) for r in rows]),
            "responses": nested([torch.ones(r["response"], dtype=torch.int64) for r in rows]),
            "input_ids": nested([torch.ones(r["prompt"] + r["response"], dtype=torch.int64) for r in rows]),
            "response_mask": nested([r["mask"] for r in rows]),
            "old_log_probs": nested([r["old"] for r in rows]),
            "advantages": nested([r["advantage"] for r in rows]),
            "prefix_len": torch.tensor([r["prefix"] for r in rows]),
        },
        batch_size=len(rows),
    )
    if "sft_weight" in rows[0]:
        data["sft_weight"] = torch.tensor([r["sft_weight"] for r in rows], dtype=torch.float64)
        data["entropy"] = nested([r["old_entropy"] for r in rows])
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=total_tokens, global_batch_size=total_rows)
    output = {
        "log_probs": nested([r["log_prob"] for r in rows]),
        "entropy": nested([r["entropy"] for r in rows]),
    }
    return output, data


def actor_config(loss_mode="prefix_rft", **changes):
    defaults = {
        "strategy": "fsdp2",
        "rollout_n": 1,
        "use_dynamic_bsz": True,
        "loss_agg_mode": "seq-mean-token-sum-norm",
        "loss_scale_factor": 8,
        "entropy_coeff": 0.01,
        "policy_loss": PolicyLossConfig(loss_mode=loss_mode),
    }
    return FSDPActorConfig(**{**defaults, **changes})


def run(rows, packing, loss_fn):
    """Loss, gradients and metrics of the mini-batch, accumulated over the micro-batches in `packing`."""
    for row in rows:
        row["log_prob"].grad = row["entropy"].grad = None
    tokens, total, metrics = sum(RESPONSE_LENS), 0.0, {}
    for part in packing:
        output, data = micro_batch([rows[i] for i in part], tokens, len(rows))
        loss, found = loss_fn(model_output=output, data=data)
        loss.backward()
        total += loss.item()
        for name, value in found.items():
            if isinstance(value, Metric):
                metrics.setdefault(name, value.init_list()).extend(value)
    gradients = torch.cat([torch.cat([row["log_prob"].grad, row["entropy"].grad]) for row in rows])
    return total, gradients, {name: metric.aggregate() for name, metric in metrics.items()}


def reference(rows, mode, prefix, config, scale=8):
    """The same loss as a loop over tokens."""
    rows_sum = []
    for r in rows:
        total = 0.0
        for t in range(r["response"]):
            position = r["prompt"] - 1 + t
            ratio = math.exp(r["log_prob"][position].item() - r["old"][t].item())
            a = r["advantage"][t].item()
            unclipped, clipped = ratio * a, min(max(ratio, 0.8), 1.2) * a
            value = min(unclipped, clipped)
            if a < 0:
                value = max(value, 3.0 * a)
            if t < r["prefix"] and prefix.loss.prefix_clip == "none":
                value = unclipped
            if t < r["prefix"] and prefix.loss.prefix_ratio == "shaped":
                p = math.exp(r["log_prob"][position].item())
                value = p / (p + prefix.loss.shaping_gamma) * a
            in_bonus = not (prefix.loss.entropy_bonus_on == "continuation" and t < r["prefix"])
            total -= value + (config.entropy_coeff * r["entropy"][position].item() if in_bonus else 0.0)
        rows_sum.append(total)
    return sum(rows_sum) / (sum(RESPONSE_LENS) if mode == "token-mean" else len(rows) * scale)


OPTIONS = [{}, {"prefix_clip": "none"}, {"prefix_ratio": "shaped"}, {"entropy_bonus_on": "continuation"}]
COUNTS = [f"prefix/{kind}_{what}" for kind in ("prefix", "prefixed", "on_policy") for what in ("tokens", "clipped")]
PACKINGS = [[[0], [1], [2], [3], [4], [5]], [[0, 1, 2], [3, 4, 5]], [[3, 1, 4], [5, 0], [2]], [[1, 3, 4], [0, 2, 5]]]


@pytest.mark.parametrize("mode", ["seq-mean-token-sum-norm", "token-mean"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_against_a_loop_over_tokens(rows, mode, options):
    prefix, config = PrefixConfig.of({"loss": options}), actor_config(loss_agg_mode=mode)
    loss, _, _ = run(rows, [range(6)], partial(worker_loss, config=config, prefix=prefix))
    assert loss == pytest.approx(reference(rows, mode, prefix, config), rel=1e-9)


@pytest.mark.parametrize("mode", ["seq-mean-token-sum-norm", "token-mean"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_packing_changes_nothing(rows, mode, options, packing):
    """Loss, gradient and clip counts; some micro-batches have no prefix token at all."""
    loss_fn = partial(worker_loss, config=actor_config(loss_agg_mode=mode), prefix=PrefixConfig.of({"loss": options}))
    whole = run(rows, [range(6)], loss_fn)
    parts = run(rows, packing, loss_fn)
    assert parts[0] == pytest.approx(whole[0], rel=1e-9)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-9, atol=1e-12)
    for name in (*COUNTS, "actor/pg_loss"):
        assert parts[2][name] == pytest.approx(whole[2][name], rel=1e-6)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("token_weight", ["none", "p", "p_1_p", "trust"])
@pytest.mark.parametrize("frozen", [False, True])
def test_sft_term_is_a_global_token_mean_however_packed(rows, packing, token_weight, frozen):
    """Value against a loop, gradient against the whole mini-batch; some micro-batches have no demonstration token."""
    mu, tokens = 0.7, sum(PREFIX_LENS)
    for row in rows:
        row["sft_weight"] = mu / tokens if row["prefix"] else 0.0
        row["old_entropy"] = torch.linspace(0.1, 2.0, row["response"], dtype=torch.float64)
        if frozen:
            row["mask"][: row["prefix"]] = 0
    config = {"sft": {"token_weight": token_weight, "weight": {"initial": mu}}}
    prefix, actor = PrefixConfig.of(config), actor_config()
    whole = run(rows, [range(6)], partial(worker_loss, config=actor, prefix=prefix))
    parts = run(rows, packing, partial(worker_loss, config=actor, prefix=prefix))
    assert parts[0] == pytest.approx(whole[0], rel=1e-9)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-9, atol=1e-12)

    def weigh(p):
        return {"none": 1.0, "p": p, "p_1_p": p * (1 - p)}[token_weight]

    expected = 0.0
    for row in rows:
        for t in range(row["prefix"]):
            log_prob = row["log_prob"][row["prompt"] - 1 + t].item()
            if token_weight == "trust":
                expected += -math.exp(log_prob) / max(math.exp(log_prob), 0.1)
            else:
                expected += -log_prob * weigh(math.exp(log_prob))
    expected *= mu / tokens
    assert parts[2]["sft_loss"] == pytest.approx(expected, rel=1e-6)
    if token_weight == "none":
        for row in rows:
            del row["sft_weight"]
        without = run(rows, packing, partial(worker_loss, config=actor, prefix=prefix))
        assert parts[0] - without[0] == pytest.approx(expected, rel=1e-9)


def test_without_prefixes_it_is_verls_vanilla_loss(rows):
    for row in rows:
        row["prefix"] = 0
    ours = run(rows, [range(6)], partial(worker_loss, config=actor_config(), prefix=PrefixConfig()))
    vanilla = actor_config("vanilla")
    theirs = run(rows, [range(6)], partial(ppo_loss, config=vanilla))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-9)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-9, atol=1e-12)
    assert ours[2]["prefix/prefix_tokens"] == ours[2]["prefix/prefixed_tokens"] == 0
    assert ours[2]["prefix/on_policy_tokens"] == sum(RESPONSE_LENS)
    assert 0 < ours[2]["prefix/on_policy_clipped"] < sum(RESPONSE_LENS)


def test_the_loss_travels_to_the_workers():
    loss = partial(worker_loss, config=actor_config(), prefix=PrefixConfig())
    copy = pickle.loads(pickle.dumps(loss))
    assert copy.keywords["prefix"] == PrefixConfig()


def test_the_name_alone_is_refused_with_the_mend():
    with pytest.raises(RuntimeError, match=r"loss_mode=prefix_rft.*\+prefix=prefix_rft"):
        policy_loss(*[torch.zeros(1, 1)] * 4)


def test_the_estimator_alone_is_refused_with_the_mend():
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    with pytest.raises(RuntimeError, match=r"adv_estimator=prefix_rft.*\+prefix=prefix_rft"):
        get_adv_estimator_fn("prefix_rft")(
            token_level_rewards=torch.zeros(1, 1), response_mask=torch.ones(1, 1), index=["a"], config=None
        )


def test_a_mini_batch_without_a_token_in_the_policy_term_keeps_its_sft_term(rows):
    """After a gate a mini-batch may hold nothing but demonstrations outside of the policy term."""
    for row in rows:
        row["mask"][:] = 0
        row["sft_weight"], row["old_entropy"] = 0.1 if row["prefix"] else 0.0, row["old"] * 0
    output, data = micro_batch(rows, 0, len(rows))
    prefix = PrefixConfig.of({"sft": {"weight": {"initial": 1.0}}})
    loss, metrics = worker_loss(
        actor_config(loss_agg_mode="token-mean", loss_scale_factor=None), output, data, prefix=prefix
    )
    loss.backward()
    assert loss.item() == pytest.approx(sft_sum(rows), rel=1e-9)
    assert all(torch.isfinite(row["log_prob"].grad).all() for row in rows)


def test_the_sft_term_counts_once_for_every_worker_whose_gradients_are_averaged(rows):
    for row in rows:
        row["sft_weight"], row["old_entropy"] = 0.1 if row["prefix"] else 0.0, row["old"] * 0
    output, data = micro_batch(rows, sum(RESPONSE_LENS), len(rows))
    tu.assign_non_tensor(data, dp_size=2)
    prefix = PrefixConfig.of({"sft": {"weight": {"initial": 1.0}}})
    _, metrics = worker_loss(actor_config(), output, data, prefix=prefix)
    assert metrics["sft_loss"].values[0] == pytest.approx(2 * sft_sum(rows), rel=1e-6)


def sft_sum(rows):
    return sum(-0.1 * row["log_prob"][row["prompt"] - 1 + t].item() for row in rows for t in range(row["prefix"]))
