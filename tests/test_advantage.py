"""Estimators, entropy clip and reshaping against direct float64 loops over rows and tokens, and in every odd case."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_prefix import advantage
from verl_prefix.advantage import ESTIMATORS, entropy_clip_mask, position_weights, prefix_mask, shape_advantages
from verl_prefix.config import AdvantageConfig, EntropyClipConfig, PrefixConfig, SamplingConfig

NO_CLIP = PrefixConfig(entropy_clip=EntropyClipConfig(keep="all"))


# --- references, straight from the definitions ---


def reference_advantages(name, *, token_level_rewards, response_mask, index, prefix_len, shared=False, **_):
    """One (continuation, prefix) advantage per row, spread over the response; without entropy clip."""
    rewards, mask, prefix_len = token_level_rewards.double().tolist(), response_mask.tolist(), prefix_len.tolist()
    out = [[0.0] * len(row) for row in mask]
    real = [b for b in range(len(mask)) if any(x > 0 for x in mask[b])]
    score = {b: math.fsum(rewards[b]) for b in real}
    for b in real:
        prompt = [c for c in real if index[c] == index[b]]
        plain = [score[c] for c in prompt if prefix_len[c] == 0]
        if prefix_len[b] == 0:
            group = plain
        else:
            group = [score[c] for c in prompt if prefix_len[c] > 0] if shared else [score[b]]
        k = len(group)
        mean = math.fsum(group) / k
        plain_mean = math.fsum(plain) / len(plain) if plain else 0.0
        if name == "prefix_rft":
            continuation = on_prefix = score[b] - math.fsum(score[c] for c in prompt) / len(prompt)
        else:
            if name == "grpo_prefix":
                std = math.sqrt(math.fsum((x - mean) ** 2 for x in group) / (k - 1)) if k > 1 else 1.0
                continuation = (score[b] - (mean if k > 1 else 0.0)) / (std + 1e-6)
            elif name == "dr_grpo_prefix":
                continuation = score[b] - mean if k > 1 else score[b]
            else:
                continuation = score[b] - mean if k > 1 else 0.0
            on_prefix = (continuation - plain_mean) / k
        for t, inside in enumerate(mask[b]):
            if inside > 0:
                out[b][t] = on_prefix if t < prefix_len[b] else continuation
    return torch.tensor(out, dtype=torch.float64)


def reference_kept(entropy, response_mask, prefix_len, *, share, keep="top", pool="batch"):
    """(B, T) bool: true but on the prefix tokens that lose their advantage."""
    kept = torch.ones(response_mask.shape, dtype=torch.bool)
    tokens = [
        (b, t)
        for b in range(len(prefix_len))
        for t in range(response_mask.shape[1])
        if t < prefix_len[b] and response_mask[b, t] > 0
    ]
    pools = [tokens] if pool == "batch" else [[at for at in tokens if at[0] == b] for b in range(len(prefix_len))]
    sign = -1 if keep == "top" else 1
    for members in pools:
        order = sorted(members, key=lambda at: (sign * float(entropy[at]), at))
        for at in order[math.ceil(round(share * len(order), 6)) :]:
            kept[at] = False
    return kept


def make_batch(seed, *, rows=24, tokens=13, rewards="binary", ties=False):
    """A ragged batch: groups of every size and mix, padding rows, holes in the mask, prefixes longer than it."""
    rng = np.random.default_rng(seed)
    mask = np.arange(tokens) < rng.integers(1, tokens + 1, rows)[:, None]
    mask &= rng.random((rows, tokens)) > 0.1
    mask[rng.random(rows) < 0.1] = False
    prefix_len = np.where(rng.random(rows) < 0.4, rng.integers(1, tokens + 1, rows), 0)
    value = rng.integers(0, 2, rows) if rewards == "binary" else rng.normal(size=rows)
    reward = np.zeros((rows, tokens))
    reward[np.arange(rows), rng.integers(0, tokens, rows)] = value
    entropy = rng.integers(0, 3, (rows, tokens)) / 2 if ties else rng.permutation(rows * tokens).reshape(rows, tokens)
    return {
        "token_level_rewards": torch.tensor(reward, dtype=torch.float32),
        "response_mask": torch.tensor(mask, dtype=torch.int64),
        "index": np.array([f"p{i}" for i in rng.integers(0, max(rows // 4, 1), rows)], dtype=object),
        "prefix_len": torch.tensor(prefix_len, dtype=torch.int64),
        "entropy": torch.tensor(entropy, dtype=torch.float32),
    }


def clip_config(**options) -> PrefixConfig:
    return PrefixConfig(entropy_clip=EntropyClipConfig(**options))


def close(got, expected):
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-6)


every_estimator = pytest.mark.parametrize("name", ESTIMATORS)


# --- estimators ---


@every_estimator
@pytest.mark.parametrize("rewards", ["binary", "normal"])
@pytest.mark.parametrize("shared", [False, True])
def test_estimators_against_the_loop(name, rewards, shared):
    config = PrefixConfig(sampling=SamplingConfig(shared=shared), entropy_clip=EntropyClipConfig(keep="all"))
    for seed in range(15):
        batch = make_batch(seed, rewards=rewards)
        advantages, returns = ESTIMATORS[name](**batch, config=config)
        assert returns is advantages
        assert advantages.dtype == torch.float32
        close(advantages, reference_advantages(name, **batch, shared=shared))


@every_estimator
@pytest.mark.parametrize("pool", ["batch", "sequence"])
@pytest.mark.parametrize("keep", ["top", "bottom"])
def test_estimators_with_clip_against_the_loop(name, pool, keep):
    for seed in range(8):
        batch = make_batch(seed, ties=bool(seed % 2))
        got, _ = ESTIMATORS[name](**batch, config=clip_config(share=0.3, pool=pool, keep=keep))
        kept = reference_kept(
            batch["entropy"], batch["response_mask"], batch["prefix_len"], share=0.3, pool=pool, keep=keep
        )
        close(got, reference_advantages(name, **batch) * kept)


def test_the_four_by_hand():
    """Two plain rollouts (1 and 0) and a prefixed one (1): 2 prefix tokens, 1 continuation token."""
    batch = {
        "token_level_rewards": torch.tensor([[0, 0, 1.0], [0, 0, 0], [0, 0, 1.0]]),
        "response_mask": torch.ones(3, 3, dtype=torch.int64),
        "index": ["p", "p", "p"],
        "prefix_len": torch.tensor([0, 0, 2]),
    }
    expected = {
        "prefix_rft": [[1 / 3] * 3, [-2 / 3] * 3, [1 / 3] * 3],
        "grpo_prefix": [[math.sqrt(0.5)] * 3, [-math.sqrt(0.5)] * 3, [0.5, 0.5, 1.0]],
        "dr_grpo_prefix": [[0.5] * 3, [-0.5] * 3, [0.5, 0.5, 1.0]],
        "dr_grpo_prefix_v2": [[0.5] * 3, [-0.5] * 3, [-0.5, -0.5, 0.0]],
    }
    for name, estimator in ESTIMATORS.items():
        torch.testing.assert_close(estimator(**batch)[0], torch.tensor(expected[name]), rtol=1e-5, atol=1e-5)


def test_names():
    assert list(ESTIMATORS) == ["prefix_rft", "grpo_prefix", "dr_grpo_prefix", "dr_grpo_prefix_v2"]


@every_estimator
def test_group_ids_of_any_kind(name):
    batch = make_batch(3)
    expected, _ = ESTIMATORS[name](**batch)
    numbers = [int(prompt[1:]) * 10 - 7 for prompt in batch["index"]]
    for index in (list(batch["index"]), numbers, np.array(numbers), torch.tensor(numbers)):
        assert torch.equal(ESTIMATORS[name](**{**batch, "index": index})[0], expected)


@every_estimator
def test_config_may_be_a_mapping_or_absent(name):
    batch = make_batch(4)
    clipped, _ = ESTIMATORS[name](**batch)
    assert torch.equal(ESTIMATORS[name](**batch, config=PrefixConfig())[0], clipped)
    assert torch.equal(ESTIMATORS[name](**batch, config={"entropy_clip": {"share": 0.2}})[0], clipped)
    unclipped, _ = ESTIMATORS[name](**batch, config={"entropy_clip": {"keep": "all"}})
    assert torch.equal(ESTIMATORS[name](**{**batch, "entropy": None})[0], unclipped)
    assert not torch.equal(clipped, unclipped)


@every_estimator
def test_inputs_are_left_alone(name):
    batch = make_batch(5)
    before = {key: value.clone() if isinstance(value, torch.Tensor) else value.copy() for key, value in batch.items()}
    ESTIMATORS[name](**batch)
    for key, value in batch.items():
        assert np.array_equal(np.asarray(value), np.asarray(before[key])), key


@every_estimator
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), pool=st.sampled_from(["batch", "sequence"]), keep=st.sampled_from(["top", "bottom"]))
def test_invariant_to_row_order_and_to_padding(name, seed, pool, keep):
    batch, config = make_batch(seed, rows=16, rewards="normal"), clip_config(pool=pool, keep=keep)
    expected, _ = ESTIMATORS[name](**batch, config=config)

    order = np.random.default_rng(seed).permutation(16)
    permuted, _ = ESTIMATORS[name](**{key: value[order] for key, value in batch.items()}, config=config)
    close(permuted, expected[order])

    def pad(x_BT):
        return torch.nn.functional.pad(x_BT, (0, 5))

    wide = {
        key: pad(value) if key in ("token_level_rewards", "response_mask", "entropy") else value
        for key, value in batch.items()
    }
    close(ESTIMATORS[name](**wide, config=config)[0], pad(expected))

    copies = np.arange(4)  # padding rows copy real ones but for the mask, as verl's do
    tall = {key: np.concatenate([value, value[copies]]) for key, value in batch.items()}
    tall = {key: value if key == "index" else torch.from_numpy(value) for key, value in tall.items()}
    tall["response_mask"][16:] = 0
    padded, _ = ESTIMATORS[name](**tall, config=config)
    close(padded[:16], expected)
    assert not padded[16:].any()


# --- degenerate batches ---


def group_batch(reward, prefix_len, tokens=4):
    """One prompt; the reward on the last token."""
    rows = len(reward)
    rewards = torch.zeros(rows, tokens)
    rewards[:, -1] = torch.tensor(reward)
    return {
        "token_level_rewards": rewards,
        "response_mask": torch.ones(rows, tokens, dtype=torch.int64),
        "index": np.array(["p"] * rows, dtype=object),
        "prefix_len": torch.tensor(prefix_len),
        "entropy": torch.arange(rows * tokens, dtype=torch.float32).reshape(rows, tokens),
    }


@every_estimator
@pytest.mark.parametrize(
    ("reward", "prefix_len"),
    [
        ([0.7], [0]),
        ([0.7], [2]),
        ([1.0, 0.0, 0.3], [1, 2, 3]),
        ([1.0, 0.0, 0.3], [0, 0, 0]),
        ([0.1, 0.1, 0.1], [0, 0, 0]),
        ([0.1, 0.1, 0.1], [0, 2, 0]),
        ([1.0, 0.0], [0, 4]),
    ],
)
def test_degenerate_groups_are_finite_and_as_defined(name, reward, prefix_len):
    batch = group_batch(reward, prefix_len)
    got, _ = ESTIMATORS[name](**batch)
    assert got.isfinite().all()
    kept = reference_kept(batch["entropy"], batch["response_mask"], batch["prefix_len"], share=0.2)
    close(got, reference_advantages(name, **batch) * kept)


@every_estimator
@pytest.mark.parametrize("value", [0.1, 1.0, -0.3, 1e-8, 12345.678])
def test_equal_rewards_give_exactly_zero(name, value):
    got, _ = ESTIMATORS[name](**group_batch([value] * 7, [0] * 7))
    assert not got.any()
    if name == "prefix_rft":
        assert not ESTIMATORS[name](**group_batch([value] * 7, [0, 3] + [0] * 5))[0].any()


def test_a_group_of_one():
    for prefix_len, expected in ((0, (0, 0.5, 0.5, 0)), (2, (0, 0.5, 0.5, 0))):
        batch = {**group_batch([0.5], [prefix_len]), "entropy": None}
        for estimator, value in zip(ESTIMATORS.values(), expected, strict=True):
            close(estimator(**batch)[0], torch.full((1, 4), float(value)))


@every_estimator
def test_padding_rows_count_in_no_mean(name):
    batch = group_batch([1.0, 0.0, 50.0, float("nan")], [0, 0, 3, 0])
    batch["response_mask"][2:] = 0
    got, _ = ESTIMATORS[name](**batch)
    close(got[:2], ESTIMATORS[name](**{**group_batch([1.0, 0.0], [0, 0])})[0])
    assert torch.equal(got[2:], torch.zeros(2, 4))


@every_estimator
@pytest.mark.parametrize(("rows", "tokens"), [(0, 5), (3, 0), (0, 0)])
def test_empty_batches(name, rows, tokens):
    got, _ = ESTIMATORS[name](
        token_level_rewards=torch.zeros(rows, tokens),
        response_mask=torch.zeros(rows, tokens, dtype=torch.int64),
        index=np.array(["p"] * rows, dtype=object),
        prefix_len=torch.ones(rows, dtype=torch.int64),
        entropy=torch.zeros(rows, tokens),
    )
    assert got.shape == (rows, tokens)


@every_estimator
def test_a_prefix_outside_the_mask_is_frozen(name):
    """`update_prefix=False` leaves the prefix out of the response mask: no advantage there, the rest as ever."""
    batch = {**make_batch(6), "entropy": None}
    free, _ = ESTIMATORS[name](**batch)
    is_prefix = prefix_mask(batch["prefix_len"], batch["response_mask"])
    frozen_mask = batch["response_mask"] * ~is_prefix
    has_continuation = (frozen_mask > 0).any(1) | (batch["response_mask"] == 0).all(1)
    rows = has_continuation.numpy()
    whole = {key: value[rows] for key, value in batch.items() if value is not None}
    frozen, _ = ESTIMATORS[name](**{**whole, "response_mask": frozen_mask[rows]})
    free, _ = ESTIMATORS[name](**whole)
    close(frozen, free * frozen_mask[rows])


# --- prefix mask and entropy clip ---


def test_prefix_mask_meets_the_response_mask():
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    got = prefix_mask(torch.tensor([4, 0, 3, 3]), mask)
    assert got.tolist() == [[True, True, False, True], [False] * 4, [False] * 4, [True, False, False, False]]
    assert torch.equal(prefix_mask(torch.tensor([4, 0, 3, 3]), mask.bool()), got)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    share=st.sampled_from([0.0, 0.01, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 1.0]),
    keep=st.sampled_from(["top", "bottom", "random"]),
    pool=st.sampled_from(["batch", "sequence"]),
    ties=st.booleans(),
)
def test_the_clip_keeps_exactly_its_share(seed, share, keep, pool, ties):
    batch = make_batch(seed, ties=ties)
    is_prefix = prefix_mask(batch["prefix_len"], batch["response_mask"])
    config = EntropyClipConfig(keep=keep, share=share, pool=pool)
    kept = entropy_clip_mask(batch["entropy"], is_prefix, config, seed=seed)
    assert kept[~is_prefix].all()
    counts = [int(is_prefix.sum())] if pool == "batch" else is_prefix.sum(1).tolist()
    got = [int((kept & is_prefix).sum())] if pool == "batch" else (kept & is_prefix).sum(1).tolist()
    assert got == [math.ceil(round(share * n, 6)) for n in counts]
    if keep != "random":
        expected = reference_kept(
            batch["entropy"], batch["response_mask"], batch["prefix_len"], share=share, keep=keep, pool=pool
        )
        assert torch.equal(kept, expected)


@pytest.mark.parametrize(
    ("share", "n", "k"), [(0.2, 15, 3), (0.2, 16, 4), (0.1, 30, 3), (0.3, 50, 15), (0.55, 100, 55)]
)
def test_the_share_is_free_of_float_error(share, n, k):
    for pool in ("batch", "sequence"):
        kept = entropy_clip_mask(
            torch.rand(1, n), torch.ones(1, n, dtype=torch.bool), EntropyClipConfig(share=share, pool=pool)
        )
        assert int(kept.sum()) == k


def test_ties_go_to_the_first_positions():
    is_prefix = torch.tensor([[False, True, True, True], [True, True, True, True]])
    entropy = torch.tensor([[9.0, 1, 1, 2], [1, 1, 1, 0]])
    kept = entropy_clip_mask(entropy, is_prefix, EntropyClipConfig(share=0.5))  # 4 of 7: the 2, then three of the 1s
    assert kept.tolist() == [[True, True, True, True], [True, False, False, False]]
    kept = entropy_clip_mask(entropy, is_prefix, EntropyClipConfig(share=0.5, pool="sequence"))
    assert kept.tolist() == [[True, True, False, True], [True, True, False, False]]
    same = entropy_clip_mask(torch.zeros(3, 5), torch.ones(3, 5, dtype=torch.bool), EntropyClipConfig(share=0.4))
    assert same.flatten().tolist() == [True] * 6 + [False] * 9


def test_pools_and_ends_differ():
    batch = make_batch(8)
    is_prefix = prefix_mask(batch["prefix_len"], batch["response_mask"])
    masks = [
        entropy_clip_mask(batch["entropy"], is_prefix, EntropyClipConfig(keep=keep, pool=pool))
        for keep in ("top", "bottom", "random")
        for pool in ("batch", "sequence")
    ]
    masks.append(entropy_clip_mask(batch["entropy"], is_prefix, EntropyClipConfig(keep="all")))
    assert masks[-1].all()
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


@pytest.mark.parametrize("pool", ["batch", "sequence"])
def test_random_is_keyed_by_seed_and_step_and_blind_to_entropy_and_padding(pool):
    is_prefix = torch.arange(40) < torch.randint(10, 41, (30, 1), generator=torch.Generator().manual_seed(0))
    config = EntropyClipConfig(keep="random", pool=pool)

    def kept(seed, step, entropy=0.0, pad=0):
        mask = torch.nn.functional.pad(is_prefix, (0, pad))
        return entropy_clip_mask(torch.full(mask.shape, entropy), mask, config, seed=seed, global_step=step)[:, :40]

    first = kept(0, 0)
    state = torch.random.get_rng_state()
    assert torch.equal(kept(0, 0, entropy=float("nan"), pad=7), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(kept(0, 1), first)
    assert not torch.equal(kept(1, 0), first)
    assert not torch.equal(kept(1, 0), kept(0, 1))
    often = torch.stack([kept(0, step) for step in range(400)])[:, is_prefix].float().mean(0)
    assert often.mean() == pytest.approx(0.2, abs=0.03)
    assert often.min() > 0.08  # every token has its chance: 0.2, six standard deviations of 0.02 around
    assert often.max() < 0.38


@every_estimator
def test_random_reaches_the_estimator_with_step_and_seed(name):
    batch = make_batch(9, rows=40, rewards="normal")
    config = clip_config(keep="random", share=0.5)
    first, _ = ESTIMATORS[name](**batch, config=config, global_step=3)
    is_prefix = prefix_mask(batch["prefix_len"], batch["response_mask"])
    kept = entropy_clip_mask(batch["entropy"], is_prefix, config.entropy_clip, seed=config.seed, global_step=3)
    close(first, reference_advantages(name, **batch) * kept)
    assert not torch.equal(ESTIMATORS[name](**batch, config=config, global_step=4)[0], first)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_entropy_that_cannot_be_ranked_is_refused(value):
    entropy, is_prefix = torch.rand(2, 4), torch.tensor([[True, True, False, False], [False] * 4])
    entropy[0, 3] = entropy[1, 0] = value
    assert entropy_clip_mask(entropy, is_prefix, EntropyClipConfig()).any()  # nobody asks on other tokens
    entropy[0, 1] = value
    with pytest.raises(ValueError, match="on 1 prefix tokens"):
        entropy_clip_mask(entropy, is_prefix, EntropyClipConfig())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_of_entropy(dtype):
    is_prefix = torch.ones(2, 50, dtype=torch.bool)
    entropy = torch.rand(2, 50).to(dtype)
    got = entropy_clip_mask(entropy, is_prefix, EntropyClipConfig())
    assert torch.equal(got, reference_kept(entropy.double(), is_prefix, [50, 50], share=0.2))


@pytest.mark.parametrize("pool", ["batch", "sequence"])
@pytest.mark.parametrize("keep", ["top", "bottom", "random"])
def test_the_path_of_other_devices_agrees(monkeypatch, keep, pool):
    """What runs on an accelerator, run on the CPU."""
    config = EntropyClipConfig(keep=keep, pool=pool, share=0.3)
    for seed in range(10):
        batch = make_batch(seed, ties=bool(seed % 2))
        is_prefix = prefix_mask(batch["prefix_len"], batch["response_mask"])
        expected = entropy_clip_mask(batch["entropy"], is_prefix, config)
        with monkeypatch.context() as patch:
            patch.setattr(advantage, "_numpy_sees", lambda x: False)
            assert torch.equal(entropy_clip_mask(batch["entropy"], is_prefix, config), expected)


# --- reshaping ---


def make_shape_inputs(seed=0, rows=20, tokens=30):
    rng = torch.Generator().manual_seed(seed)
    demo_len = torch.randint(3, tokens + 5, (rows,), generator=rng)
    low = 0.1 + 0.4 * torch.rand(rows, generator=rng)
    high = 0.6 + 0.4 * torch.rand(rows, generator=rng)
    ratio = low + (high - low) * torch.rand(rows, generator=rng)
    prefix_len = (ratio * demo_len).long().clamp(min=1)
    prefix_len[::3] = 0
    low[::3] = high[::3] = float("nan")  # plain rows have no bounds
    return {
        "advantages": torch.randn(rows, tokens, generator=rng),
        "prefix_len": prefix_len,
        "response_mask": (torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1), generator=rng)).long(),
        "demo_len": demo_len,
        "low": low,
        "high": high,
        "truncated": torch.rand(rows, generator=rng) < 0.5,
    }


def shape(inputs, **options):
    given_inputs = {key: value for key, value in inputs.items() if key != "advantages"}
    return shape_advantages(inputs["advantages"], **given_inputs, config=AdvantageConfig(**options))


def reference_weights(is_prefix, demo_len, low, high):
    """1 / f with mean 1 over prefix tokens, 1 elsewhere."""
    weights = torch.ones(is_prefix.shape, dtype=torch.float64)
    tokens = is_prefix.nonzero().tolist()
    for b, t in tokens:
        a, top, n = float(low[b]), float(high[b]), int(demo_len[b])
        pos = min((t + 0.5) / n, top - 0.5 / n)
        f = 2 / (a + top) if pos <= a or a == top else 2 * (top - pos) / (top**2 - a**2)
        weights[b, t] = 1 / f
    weights[is_prefix] /= weights[is_prefix].mean()
    return weights


def test_the_defaults_change_nothing():
    inputs = make_shape_inputs()
    got = shape(inputs)
    assert torch.equal(got, inputs["advantages"])
    assert got.data_ptr() != inputs["advantages"].data_ptr()


@pytest.mark.parametrize(
    ("options", "on_prefix"),
    [
        ({"prefix_transform": "relu"}, lambda a: a.clamp(min=0)),
        ({"prefix_transform": "silu"}, lambda a: a / (1 + (-a).exp())),
        ({"prefix_weight": 0.001}, lambda a: a * 0.001),
        ({"prefix_transform": "silu", "prefix_weight": 2.0}, lambda a: 2 * a / (1 + (-a).exp())),
    ],
)
def test_prefix_tokens_are_transformed_and_no_others(options, on_prefix):
    inputs = make_shape_inputs()
    before = inputs["advantages"].clone()
    is_prefix = prefix_mask(inputs["prefix_len"], inputs["response_mask"])
    assert is_prefix.any()
    got = shape(inputs, **options)
    torch.testing.assert_close(got[is_prefix], on_prefix(before[is_prefix]))
    assert torch.equal(got[~is_prefix], before[~is_prefix])
    assert torch.equal(inputs["advantages"], before)


def test_position_weights_against_the_formula():
    for seed in range(5):
        inputs = make_shape_inputs(seed)
        is_prefix = prefix_mask(inputs["prefix_len"], inputs["response_mask"])
        expected = reference_weights(is_prefix, inputs["demo_len"], inputs["low"], inputs["high"])
        got = shape(inputs, position_weight=True)
        torch.testing.assert_close(got.double(), inputs["advantages"].double() * expected, rtol=1e-4, atol=1e-5)
        weights = position_weights(is_prefix, demo_len=inputs["demo_len"], low=inputs["low"], high=inputs["high"])
        assert weights[is_prefix].double().mean().item() == pytest.approx(1, abs=1e-6)
        assert weights[is_prefix].std() > 0.1
        assert (weights[~is_prefix] == 1).all()


def test_position_weights_undo_the_chance_to_be_reached():
    """Over many prefixes of one demonstration, every position up to the longest prefix gets the same total weight."""
    n, rows = 40, 8000
    rng = torch.Generator().manual_seed(0)
    length = (torch.rand(rows, generator=rng, dtype=torch.float64) * 0.6 + 0.3) * n
    is_prefix = torch.arange(n) + 0.5 < length[:, None]  # rounded to the nearest token, to match a token's middle
    weights = position_weights(
        is_prefix, demo_len=torch.full((rows,), n), low=torch.full((rows,), 0.3), high=torch.full((rows,), 0.9)
    )
    total = (weights * is_prefix).sum(0)[:33]
    assert total.std() / total.mean() < 0.03
    assert is_prefix.sum(0)[:33].float().std() / is_prefix.sum(0)[:33].float().mean() > 0.3


@pytest.mark.parametrize(("low", "high"), [(0.95, 0.95), (0.0, 0.0), (0.0, 1.0), (0.949999, 0.95), (0.0, 0.01)])
def test_position_weights_stay_finite(low, high):
    """a = b, an empty range, and tokens that `min_prefix_len` puts past b."""
    is_prefix = torch.arange(20) < torch.tensor([[19], [0], [7]])
    demo_len = torch.tensor([20, 0, 8])
    limits = {"low": torch.full((3,), low), "high": torch.full((3,), high)}
    weights = position_weights(is_prefix, demo_len=demo_len, **limits)
    assert weights.isfinite().all()
    assert (weights > 0).all()
    assert weights[is_prefix].mean().item() == pytest.approx(1, abs=1e-5)
    if low == high:
        torch.testing.assert_close(weights, torch.ones_like(weights))


def test_position_weights_without_a_prefix_token():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    column = torch.zeros(2)
    assert torch.equal(position_weights(nothing, demo_len=column, low=column, high=column), torch.ones(2, 3))


def test_zero_truncated_touches_continuations_of_truncated_prefixed_rows():
    inputs = make_shape_inputs(rows=6)
    inputs["prefix_len"] = torch.tensor([3, 3, 0, 0, 3, 0])
    inputs["truncated"] = torch.tensor([True, False, True, False, True, True])
    inputs["response_mask"] = torch.ones(6, 30, dtype=torch.int64)
    got, before = shape(inputs, zero_truncated=True), inputs["advantages"]
    expected = before.clone()
    expected[0, 3:] = expected[4, 3:] = 0
    assert torch.equal(got, expected)


# --- baselines of the peers ---


@pytest.mark.parametrize("baseline", ["group", "on_policy"])
@pytest.mark.parametrize("normalize_std", [False, True])
@pytest.mark.parametrize("rewards", ["binary", "normal"])
@pytest.mark.parametrize("seed", range(3))
def test_baseline_and_deviation_against_a_loop(baseline, normalize_std, rewards, seed):
    batch = make_batch(seed, rewards=rewards)
    config = PrefixConfig(
        entropy_clip=EntropyClipConfig(keep="all"),
        advantage=AdvantageConfig(baseline=baseline, normalize_std=normalize_std),
    )
    got, _ = advantage.prefix_rft(**{**batch, "entropy": None}, config=config)
    mask, prefix_len = batch["response_mask"], batch["prefix_len"]
    score = batch["token_level_rewards"].double().sum(-1).tolist()
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for b in range(len(mask)):
        members = [
            score[c]
            for c in range(len(mask))
            if batch["index"][c] == batch["index"][b] and mask[c].any() and (baseline == "group" or prefix_len[c] == 0)
        ]
        if not members:
            continue
        mean = math.fsum(members) / len(members)
        spread = math.sqrt(math.fsum((x - mean) ** 2 for x in members) / max(len(members) - 1, 1))
        expected[b] = (score[b] - mean) / (spread + 1e-6 if normalize_std else 1) * mask[b]
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_likelihood_advantages_by_hand():
    got = advantage.likelihood_advantages(
        torch.full((3, 3), 9.0),
        reward=torch.tensor([1.0, 0.0, 1.0]),
        entropy=torch.tensor([[0.0, math.log(4), 7.0]] * 3),  # mean over two tokens: log 2
        prefix_len=torch.tensor([0, 0, 2]),
        response_mask=torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]]),
        weight=0.1,
    )
    torch.testing.assert_close(got, torch.tensor([[0.2, 0.2, 9.0], [-1.0, -1.0, -1.0], [9.0, 9.0, 9.0]]))


def test_a_prompt_without_on_policy_rollouts_has_no_baseline_and_gets_nothing():
    config = PrefixConfig(advantage=AdvantageConfig(baseline="on_policy"))
    got, _ = advantage.prefix_rft(
        token_level_rewards=torch.tensor([[1.0], [0.0], [1.0]]),
        response_mask=torch.ones(3, 1),
        index=["a", "a", "b"],
        prefix_len=torch.tensor([1, 1, 0]),
        config=config,
    )
    assert got.flatten().tolist() == [0.0, 0.0, 0.0]
