"""Advantages of groups that hold prefixed rollouts: four estimators, the entropy clip, and the reshaping options.

Source: arXiv 2507.01679 (Prefix-RFT), Sec. 3, and its authors' code for all but `prefix_rft`.

Tensor names carry their dimensions: B rows (rollouts) of the batch, R the prefixed rows among them, T response
positions, G prompts. A row is *prefixed* when its `prefix_len` is positive, else it is an "empty-prefix" row (the
paper's empty set, `plain` below). A row whose `response_mask` is all zero is padding: it enters no mean and gets 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from verl_prefix.config import AdvantageConfig, EntropyClipConfig, PrefixConfig
from verl_prefix.sampling import Stream, random_word

EPSILON = 1e-6  # added to the standard deviation, as in GRPO


# --- estimators -------------------------------------------------------------------------------------------------------


def prefix_rft(
    *,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray | Sequence | Tensor,
    prefix_len: Tensor,
    entropy: Tensor | None = None,
    config: PrefixConfig | Mapping[str, Any] | None = None,
    global_step: int = 0,
) -> tuple[Tensor, Tensor]:
    """A = R - mean(R) over all rollouts of the prompt, prefixed ones included; prefix and continuation alike.

    The paper's estimator (Sec. 3.1, Dr.GRPO's advantage over the mixed group). A prompt with one rollout gets 0. With
    `prefix.advantage.baseline=on_policy` mean and deviation are those of the prompt's on-policy rollouts (a prompt
    without any gets 0), with `normalize_std` A is divided by the deviation + 1e-6 (GRPO).

    Args:
        token_level_rewards: (B, T); R of a row is its plain sum.
        response_mask: (B, T), positive on response tokens.
        index: (B,) prompt of each row; equal values form a group.
        prefix_len: (B,) int64, tokens of the response that come from a demonstration; 0 for a plain rollout.
        entropy: (B, T), entropy of the old policy in nats; None skips the entropy clip.
        config: the `prefix` section; None takes the defaults.
        global_step: keys the choice of `prefix.entropy_clip.keep=random`, nothing else.

    Returns:
        advantages (B, T) float32, 0 outside of `response_mask`; and the same tensor again as the returns.

    Raises:
        PrefixConfigError: `config` cannot be read.
        ValueError: `entropy` is NaN or infinite on a prefix token.
    """
    batch = _Batch.of(token_level_rewards, response_mask, index, prefix_len, config)
    options = batch.config.advantage
    member_B = batch.real_B if options.baseline == "group" else batch.real_B & (batch.prefix_len_B == 0)
    stats = _group_stats(batch.reward_B, batch.prompt_B, member_B)
    advantage_B = batch.reward_B - stats.mean_B
    if options.baseline == "on_policy":
        advantage_B = advantage_B.where(_any_in_group(batch.prompt_B, member_B), 0.0)
    if options.normalize_std:
        advantage_B = advantage_B / (stats.std_B + EPSILON)
    return _spread(batch, advantage_B, advantage_B, entropy, global_step)


def grpo_prefix(
    *,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray | Sequence | Tensor,
    prefix_len: Tensor,
    entropy: Tensor | None = None,
    config: PrefixConfig | Mapping[str, Any] | None = None,
    global_step: int = 0,
) -> tuple[Tensor, Tensor]:
    """Continuation: S = (R - m) / (s + 1e-6) over the rollouts with the same prefix. Prefix: (S - m_plain) / K.

    From the authors' code. s is the unbiased standard deviation; a group of one takes m = 0 and s = 1. m_plain is the
    mean R of the prompt's plain rollouts (0 where it has none), K the number of rollouts with the row's prefix: 1,
    or with `prefix.sampling.shared` all prefixed rollouts of the prompt. Note that m_plain is subtracted from the
    *already centred* S, as they do.

    Arguments, result and errors as in `prefix_rft`.
    """
    batch = _Batch.of(token_level_rewards, response_mask, index, prefix_len, config)
    group, plain_mean_B = batch.prefix_groups()
    several_B = group.count_B > 1
    mean_B = group.mean_B.where(several_B, 0.0)
    std_B = group.std_B.where(several_B, 1.0)
    score_B = (batch.reward_B - mean_B) / (std_B + EPSILON)
    return _spread(batch, score_B, (score_B - plain_mean_B) / group.count_B, entropy, global_step)


def dr_grpo_prefix(
    *,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray | Sequence | Tensor,
    prefix_len: Tensor,
    entropy: Tensor | None = None,
    config: PrefixConfig | Mapping[str, Any] | None = None,
    global_step: int = 0,
) -> tuple[Tensor, Tensor]:
    """Continuation: S = R - m over the rollouts with the same prefix, alone it keeps R. Prefix: (S - m_plain) / K.

    From the authors' code; terms as in `grpo_prefix`, arguments, result and errors as in `prefix_rft`.
    """
    batch = _Batch.of(token_level_rewards, response_mask, index, prefix_len, config)
    group, plain_mean_B = batch.prefix_groups()
    score_B = batch.reward_B - group.mean_B.where(group.count_B > 1, 0.0)
    return _spread(batch, score_B, (score_B - plain_mean_B) / group.count_B, entropy, global_step)


def dr_grpo_prefix_v2(
    *,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray | Sequence | Tensor,
    prefix_len: Tensor,
    entropy: Tensor | None = None,
    config: PrefixConfig | Mapping[str, Any] | None = None,
    global_step: int = 0,
) -> tuple[Tensor, Tensor]:
    """Continuation: S = R - m over the rollouts with the same prefix, alone it gets 0. Prefix: (S - m_plain) / K.

    From the authors' code, kept for reproduction. With one rollout per prefix S is 0, so the prefix term is -m_plain
    whatever the prefixed rollout earned: this estimator only ever pushes demonstration tokens down. Terms as in
    `grpo_prefix`, arguments, result and errors as in `prefix_rft`.
    """
    batch = _Batch.of(token_level_rewards, response_mask, index, prefix_len, config)
    group, plain_mean_B = batch.prefix_groups()
    score_B = batch.reward_B - group.mean_B
    return _spread(batch, score_B, (score_B - plain_mean_B) / group.count_B, entropy, global_step)


ESTIMATORS = {f.__name__: f for f in (prefix_rft, grpo_prefix, dr_grpo_prefix, dr_grpo_prefix_v2)}
"""Name (`algorithm.adv_estimator`) -> estimator."""


# --- masks ------------------------------------------------------------------------------------------------------------


def prefix_mask(prefix_len: Tensor, response_mask: Tensor) -> Tensor:
    """(B, T) bool, true on response tokens that come from a demonstration.

    Args:
        prefix_len: (B,) integers, 0 for a plain rollout.
        response_mask: (B, T), positive on response tokens; a prefix never reaches beyond it.
    """
    length_B1 = prefix_len.to(response_mask.device)[:, None]
    position_T = torch.arange(response_mask.shape[1], device=response_mask.device)
    return (position_T < length_B1).logical_and_(response_mask > 0)


def entropy_clip_mask(
    entropy_BT: Tensor, prefix_mask_BT: Tensor, config: EntropyClipConfig, *, seed: int = 0, global_step: int = 0
) -> Tensor:
    """(B, T) bool, true on the tokens that keep their advantage: the chosen prefix tokens and all others.

    Of n competing prefix tokens exactly ceil(share * n) are chosen (paper, Sec. 3.2: the 20 % with the highest
    entropy), with `share` read as the decimal number that it was written as. Equal entropies at the threshold go by
    position, earlier rows and tokens first: the trainer brings the rows into an order of their own first
    (`verl_prefix.credit.row_order`), so the choice depends neither on hardware nor on who finished first.

    `keep=random` ranks the tokens by one uniform number each, drawn in row order on the CPU from a `torch.Generator`
    seeded with a hash of (`seed`, `global_step`): the same on every device and whatever T is padded to.

    Args:
        entropy_BT: entropy of the old policy in nats; only prefix tokens are looked at.
        prefix_mask_BT: bool, see `prefix_mask`.
        config: which tokens (`keep`), how many (`share`), and among which (`pool`).
        seed: `prefix.seed`; with `global_step` the key of `keep=random`.
        global_step: training step.

    Raises:
        ValueError: the entropy of a prefix token is NaN or infinite.
    """
    if config.keep == "all":
        return torch.ones_like(prefix_mask_BT)
    keep_BT = prefix_mask_BT.logical_not()
    rank_N = _ranks(entropy_BT, prefix_mask_BT, config.keep, seed, global_step)
    n = rank_N.numel()
    if n == 0:
        return keep_BT
    if config.pool == "batch":
        count_P = torch.tensor([n], device=rank_N.device)
        chosen_N = _top(rank_N[None], _share_of(count_P, config.share))[0]
    else:
        count_B = _true_per_row(prefix_mask_BT)
        row_P = count_B.nonzero().squeeze(1)  # plain rows take no part
        mask_PT = prefix_mask_BT[row_P]
        rank_PT = _put(torch.full(mask_PT.shape, -torch.inf, dtype=rank_N.dtype, device=rank_N.device), mask_PT, rank_N)
        del rank_N
        chosen_N = _take(_top(rank_PT, _share_of(count_B[row_P], config.share)), mask_PT)
    return _put(keep_BT, prefix_mask_BT, chosen_N)


# --- reshaping --------------------------------------------------------------------------------------------------------


def shape_advantages(
    advantages_BT: Tensor,
    *,
    prefix_len: Tensor,
    response_mask: Tensor,
    config: AdvantageConfig,
    demo_len: Tensor,
    low: Tensor,
    high: Tensor,
    truncated: Tensor,
) -> Tensor:
    """The options of `prefix.advantage`, applied after estimator and entropy clip. The defaults change nothing.

    In this order, on prefix tokens: `prefix_transform`, times `prefix_weight`, times the position weight of
    `position_weights`. On continuation tokens of prefixed rows: 0 where `zero_truncated` and the row is truncated.

    Args:
        advantages_BT: advantages.
        prefix_len: (B,) tokens.
        response_mask: (B, T).
        config: which options.
        demo_len: (B,) tokens of the demonstration the prefix was cut from; any value on plain rows.
        low: (B,) lower bound of the prefix ratio when it was drawn; any value on plain rows.
        high: (B,) upper bound; any value on plain rows.
        truncated: (B,) bool, the rollout hit the response limit.

    Returns:
        A new (B, T) tensor.
    """
    shaped_BT = advantages_BT.clone()
    prefix_BT = prefix_mask(prefix_len, response_mask)
    if config.prefix_transform != "none":
        transform = {"relu": torch.relu, "silu": torch.nn.functional.silu}[config.prefix_transform]
        shaped_BT = torch.where(prefix_BT, transform(shaped_BT), shaped_BT)
    if config.prefix_weight != 1:
        shaped_BT = torch.where(prefix_BT, shaped_BT * config.prefix_weight, shaped_BT)
    if config.position_weight:
        shaped_BT *= position_weights(prefix_BT, demo_len=demo_len, low=low, high=high)
    if config.zero_truncated:
        cut_B = truncated.to(prefix_BT.device, torch.bool) & (prefix_len.to(prefix_BT.device) > 0)
        shaped_BT.masked_fill_(cut_B[:, None] & ~prefix_BT, 0.0)
    return shaped_BT


def likelihood_advantages(
    advantages_BT: Tensor,
    *,
    reward: Tensor,
    entropy: Tensor,
    prefix_len: Tensor,
    response_mask: Tensor,
    weight: float,
) -> Tensor:
    """`prefix.advantage.on_policy=likelihood` (SRFT, arXiv 2506.19767): A = weight * exp(H) on the tokens of on-policy
    rollouts with R > 0, H the mean entropy of the rollout's tokens, and -1 on those of the others, to be used with the
    log-likelihood form -A log pi.

    Args:
        advantages_BT: advantages; those of prefixed rows stay.
        reward: (B,) R.
        entropy: (B, T) of the old policy in nats.
        prefix_len: (B,) tokens.
        response_mask: (B, T).
        weight: the factor on rewarded rollouts (paper: 0.1).
    """
    response_BT = response_mask > 0
    mean_B = torch.where(response_BT, entropy, 0.0).sum(dim=1) / response_BT.sum(dim=1).clamp(min=1)
    signed_B = torch.where(reward > 0, weight * mean_B.exp(), -1.0).to(advantages_BT.dtype)
    return torch.where((prefix_len == 0)[:, None] & response_BT, signed_B[:, None], advantages_BT)


def position_weights(prefix_mask_BT: Tensor, *, demo_len: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(B, T) float32: 1 / f on prefix tokens, scaled to mean 1 over all of them in the batch; 1 on other tokens.

    f is the chance that a prefix of ratio l ~ U(a, b) reaches a position, as a density over positions:
    f = 2 / (a + b) if pos <= a, else 2 (b - pos) / (b^2 - a^2), with a = `low`, b = `high` and pos the middle of the
    token as a ratio of the demonstration, (t + 0.5) / |y*|. Tokens at or past b (`min_prefix_len` can put them
    there) count as the last token before b, at b - 0.5 / |y*|, which keeps 1 / f finite. For a = b every prefix
    reaches all its tokens and the weight is the same on them.

    Args:
        prefix_mask_BT: bool, see `prefix_mask`.
        demo_len: (B,) tokens, |y*|.
        low: (B,) a.
        high: (B,) b.
    """
    weight_BT = torch.ones(prefix_mask_BT.shape, device=prefix_mask_BT.device)
    row_R = prefix_mask_BT.any(dim=1).nonzero().squeeze(1)
    if row_R.numel() == 0:
        return weight_BT

    # float64, as b - pos cancels near b; that is where the weights are large.
    def column(x_B: Tensor) -> Tensor:
        return x_B.to(prefix_mask_BT.device, torch.float64)[row_R, None]

    token_R1 = 1 / column(demo_len).clamp(min=1)
    low_R1, high_R1 = column(low), column(high)
    position_RT = (torch.arange(prefix_mask_BT.shape[1], device=prefix_mask_BT.device) + 0.5) * token_R1
    # (b - pos) / (b - a), at most 1, is f up to its norm 2 / (a + b), and covers pos <= a and a = b as well.
    left_RT = torch.maximum(high_R1 - position_RT, 0.5 * token_R1)
    reach_RT = (left_RT / (high_R1 - low_R1).clamp(min=1e-12)).clamp(max=1)
    inverse_RT = (low_R1 + high_R1).clamp(min=1e-12) / 2 / reach_RT

    mask_RT = prefix_mask_BT[row_R]
    mean = torch.where(mask_RT, inverse_RT, 0.0).sum() / mask_RT.sum()
    weight_BT[row_R] = torch.where(mask_RT, inverse_RT / mean, 1.0).to(weight_BT.dtype)
    return weight_BT


# --- parts ------------------------------------------------------------------------------------------------------------


class _GroupStats(NamedTuple):
    """Statistics of its group for every row: mean, unbiased standard deviation, number of members (at least 1)."""

    mean_B: Tensor
    std_B: Tensor
    count_B: Tensor


class _Batch(NamedTuple):
    """The inputs of an estimator, reduced to one value per row where they can be."""

    reward_B: Tensor  # float64, so that the mean of equal rewards is that reward to the last bit
    prompt_B: Tensor  # int64 in 0..G-1
    real_B: Tensor  # bool, not padding
    prefix_len_B: Tensor
    response_BT: Tensor  # bool
    config: PrefixConfig

    @classmethod
    def of(cls, rewards_BT, response_mask_BT, index, prefix_len_B, config) -> _Batch:
        device = response_mask_BT.device
        config = PrefixConfig() if config is None else PrefixConfig.of(config)
        response_BT = response_mask_BT > 0
        index = index.detach().cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)
        prompt_B = np.unique(index, return_inverse=True)[1].reshape(-1)
        return cls(
            reward_B=rewards_BT.detach().sum(dim=-1).to(device, torch.float64),
            prompt_B=torch.from_numpy(prompt_B).to(device, torch.int64),
            real_B=response_BT.any(dim=1),
            prefix_len_B=prefix_len_B.to(device),
            response_BT=response_BT,
            config=config,
        )

    def prefix_groups(self) -> tuple[_GroupStats, Tensor]:
        """Statistics over the rollouts with the row's prefix, and m_plain of the row's prompt (B,)."""
        n_rows = self.prompt_B.numel()  # more than prompts, so that the ranges below are disjoint
        own_B = torch.arange(n_rows, device=self.prompt_B.device)
        prefixed_id_B = n_rows + (self.prompt_B if self.config.sampling.shared else own_B)
        prefixed_B = self.prefix_len_B > 0
        groups = _group_stats(self.reward_B, prefixed_id_B.where(prefixed_B, self.prompt_B), self.real_B)
        plain = _group_stats(self.reward_B, self.prompt_B, self.real_B & ~prefixed_B)
        return groups, plain.mean_B


def _group_stats(value_B: Tensor, group_B: Tensor, member_B: Tensor) -> _GroupStats:
    """Statistics of `value_B` over the members of each row's group; mean and deviation 0 where it has none."""

    def total(x_B: Tensor) -> Tensor:
        x_G = x_B.new_zeros(2 * x_B.numel())  # group ids stay below 2 B, see `prefix_groups`
        return x_G.index_add_(0, group_B, x_B.where(member_B, 0.0))[group_B]

    count_B = total(torch.ones_like(value_B))
    mean_B = total(value_B) / count_B.clamp(min=1)
    std_B = (total((value_B - mean_B).square()) / (count_B - 1).clamp(min=1)).sqrt()
    return _GroupStats(mean_B, std_B, count_B.clamp(min=1))


def _any_in_group(group_B: Tensor, member_B: Tensor) -> Tensor:
    """(B,) bool, whether the row's group has a member."""
    return torch.zeros_like(group_B).index_add_(0, group_B, member_B.to(group_B.dtype))[group_B] > 0


def _spread(
    batch: _Batch, continuation_B: Tensor, prefix_B: Tensor, entropy_BT: Tensor | None, global_step: int
) -> tuple[Tensor, Tensor]:
    """One advantage per row and kind of token -> (B, T), entropy-clipped; the same tensor twice, as verl wants it."""
    continuation_B1, prefix_B1 = continuation_B[:, None].float(), prefix_B[:, None].float()
    prefixed_B = batch.real_B & (batch.prefix_len_B > 0)
    # Everything about prefixes is done on the prefixed rows alone; a slice, where it is all of them, copies nothing.
    rows = slice(None) if prefixed_B.all() else prefixed_B.nonzero().squeeze(1)
    response_RT = batch.response_BT[rows]
    mask_RT = prefix_mask(batch.prefix_len_B[rows], response_RT)
    clip, keep_RT = batch.config.entropy_clip, response_RT
    if entropy_BT is not None and clip.keep != "all":
        seed = batch.config.seed
        entropy_RT = entropy_BT[rows].to(mask_RT.device)
        keep_RT = keep_RT & entropy_clip_mask(entropy_RT, mask_RT, clip, seed=seed, global_step=global_step)
        del entropy_RT
    # The prefixed rows come first, while the full-size result does not exist yet: this bounds the memory.
    part_RT = torch.where(mask_RT, prefix_B1[rows], continuation_B1[rows]).masked_fill_(~keep_RT, 0.0)
    advantages_BT = torch.where(batch.response_BT, continuation_B1, 0.0)
    advantages_BT[rows] = part_RT
    return advantages_BT, advantages_BT


def _ranks(entropy_BT: Tensor, prefix_mask_BT: Tensor, keep: str, seed: int, global_step: int) -> Tensor:
    """(N,) float, one per prefix token in row order; larger is kept first."""
    if keep == "random":
        rng = torch.Generator().manual_seed(random_word(Stream.ENTROPY_CLIP, seed, global_step))
        return torch.rand(int(_true_per_row(prefix_mask_BT).sum()), generator=rng).to(prefix_mask_BT.device)
    entropy_BT = entropy_BT.detach()
    rank_N = _take(entropy_BT.to(torch.promote_types(entropy_BT.dtype, torch.float32)), prefix_mask_BT)
    if rank_N.numel() and not all(extreme.isfinite() for extreme in rank_N.aminmax()):
        raise ValueError(
            f"entropy is not finite on {int((~rank_N.isfinite()).sum())} prefix tokens, so the entropy clip cannot "
            "rank them. Usual cause: logits of -inf or NaN. Mend those, or set prefix.entropy_clip.keep=all."
        )
    return rank_N.neg_() if keep == "bottom" else rank_N


def _top(rank_PN: Tensor, k_P: Tensor) -> Tensor:
    """(P, N) bool: the k_P largest of each row, at equal rank the first ones. -inf is never chosen."""
    threshold_P1 = _kth_largest(rank_PN, k_P)[:, None]
    chosen_PN, tie_PN = rank_PN > threshold_P1, rank_PN == threshold_P1
    left_P = k_P - _true_per_row(chosen_PN)
    if (_true_per_row(tie_PN) > left_P).any():
        tie_PN &= tie_PN.cumsum(dim=1, dtype=torch.int32) <= left_P[:, None]
    return chosen_PN.logical_or_(tie_PN)


def _kth_largest(rank_PN: Tensor, k_P: Tensor) -> Tensor:
    """(P,) the k_P-th largest of each row; +inf where k_P is 0."""
    n = rank_PN.shape[1]
    at_P = (n - k_P).clamp(max=n - 1)
    if not _numpy_sees(rank_PN):
        ascending_PN = rank_PN.sort(dim=1).values
    else:  # in place, where torch adds an int64 index per element, and faster
        values = rank_PN.numpy().copy()
        if len(values) == 1:
            values.partition(int(at_P), axis=1)
        else:
            values.sort(axis=1)
        ascending_PN = torch.from_numpy(values)
    return ascending_PN.gather(1, at_P[:, None]).squeeze(1).where(k_P > 0, torch.inf)


def _share_of(n: Tensor, share: float) -> Tensor:
    """ceil(share * n) in integers: in floats 0.55 * 100 is above 55, and its ceiling 56."""
    fraction = Fraction(repr(float(share))).limit_denominator(10**9)  # times n < 2**33 still fits int64
    return -(-n * fraction.numerator // fraction.denominator)


def _true_per_row(mask_BT: Tensor) -> Tensor:
    """(B,) int64. In blocks of rows, as the sum of a bool tensor first copies it to int64."""
    return torch.cat([block.sum(dim=1) for block in mask_BT.split(64)])


def _take(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """(N,) the values under the mask, in row order."""
    if _numpy_sees(mask_BT):  # torch's own on the CPU takes 10 times as long and 4 times the memory
        return torch.from_numpy(values_BT.numpy()[mask_BT.numpy()])
    return values_BT[mask_BT]


def _put(target_BT: Tensor, mask_BT: Tensor, values_N: Tensor) -> Tensor:
    """`target_BT` with `values_N` under the mask, in row order. In place."""
    if _numpy_sees(mask_BT):
        target_BT.numpy()[mask_BT.numpy()] = values_N.numpy()
        return target_BT
    return target_BT.masked_scatter_(mask_BT, values_N)


def _numpy_sees(x: Tensor) -> bool:
    return x.device.type == "cpu"
