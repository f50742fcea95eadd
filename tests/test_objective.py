"""The loss per token against a scalar reference with hand-derived gradients, and against finite differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from verl_prefix.config import LossConfig, SFTConfig
from verl_prefix.objective import demonstration_nll, token_policy_loss

CLIP = {"clip_low": 0.2, "clip_high": 0.28, "clip_c": 3.0}

FORMS = {
    "default": {},
    "current": {"prefix_old_log_prob": "current"},
    "own": {"prefix_clip": "own", "prefix_clip_low": 0.05, "prefix_clip_high": 0.6},
    "none": {"prefix_clip": "none"},
    "current_none": {"prefix_old_log_prob": "current", "prefix_clip": "none"},
    "p": {"prefix_ratio": "p"},
    "shaped": {"prefix_ratio": "shaped"},
    "shaped_gamma": {"prefix_ratio": "shaped", "shaping_gamma": 0.5},
    "mis": {"prefix_ratio": "mis"},
    "focus": {"prefix_focus": 0.5},
    "mis_focus": {"prefix_ratio": "mis", "prefix_focus": 0.5},
    "luffy": {"prefix_ratio": "shaped", "policy_clip": "none"},
    "policy_unclipped": {"policy_clip": "none"},
    "unclipped": {"policy_clip": "none", "prefix_clip": "none"},
    "log": {"policy_ratio": "log"},
    "srft": {"policy_ratio": "log", "prefix_ratio": "shaped"},
}
every_form = pytest.mark.parametrize("form", FORMS)


def scalar(logp, old, adv, is_prefix, config: LossConfig, clip_low, clip_high, clip_c):
    """(loss, its derivative by logp, clipped, dual-clipped) of one token, from the definition."""
    if is_prefix:
        adv *= max(1 - math.exp(logp), 0.0) ** config.prefix_focus
    if not is_prefix and config.policy_ratio == "log":
        return -adv * logp, -adv, False, False
    if is_prefix and config.prefix_ratio != "ppo":
        p, gamma = math.exp(logp), config.shaping_gamma
        if config.prefix_ratio == "mis":
            value = -adv * 2 * p / (math.exp(old) + 0.5 * (math.exp(old) + 1))
            return value, value, False, False
        if config.prefix_ratio == "p":
            return -adv * p, -adv * p, False, False
        return -adv * p / (p + gamma), -adv * p * gamma / (p + gamma) ** 2, False, False
    log_ratio, slope = logp - old, 1.0
    if abs(log_ratio) > 20:
        log_ratio, slope = math.copysign(20, log_ratio), 0.0
    if is_prefix and config.prefix_old_log_prob == "current":
        log_ratio, slope = 0.0, 1.0
    r = math.exp(log_ratio)
    if (config.prefix_clip if is_prefix else config.policy_clip) == "none":
        return -r * adv, -r * adv * slope, False, False
    if is_prefix and config.prefix_clip == "own":
        clip_low, clip_high = config.prefix_clip_low, config.prefix_clip_high
    plain, bounded = -r * adv, -min(max(r, 1 - clip_low), 1 + clip_high) * adv
    clipped = bounded > plain
    loss, gradient = (bounded, 0.0) if clipped else (plain, plain * slope)
    if adv < 0 and loss > -clip_c * adv:
        return -clip_c * adv, 0.0, clipped, True
    return loss, gradient, clipped, False


def make_tokens(seed=0, shape=(6, 200), dtype=torch.float64):
    """Ratios from 0.02 to 50 and a few beyond the clamp; advantages of both signs and 0; half of the tokens prefix."""
    rng = torch.Generator().manual_seed(seed)
    old = -torch.rand(shape, generator=rng, dtype=dtype) * 4 - 0.01
    log_ratio = torch.randn(shape, generator=rng, dtype=dtype) * torch.tensor([0.1, 0.3, 1.3, 1.3, 0.3, 0.1])[:, None]
    log_ratio[0, :3] = torch.tensor([25.0, -25.0, 19.0])
    log_ratio[:, 3:6] = 0.0
    adv = torch.randn(shape, generator=rng, dtype=dtype)
    adv[:, 6:9] = 0.0
    is_prefix = torch.arange(shape[1]) < shape[1] // 2
    is_prefix = is_prefix[torch.randperm(shape[1], generator=rng)].expand(shape).clone()
    return (old + log_ratio).requires_grad_(), old, adv, is_prefix


@every_form
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_gradient_and_masks_against_the_definition(form, seed):
    config = LossConfig(**FORMS[form])
    logp, old, adv, is_prefix = make_tokens(seed)
    got = token_policy_loss(logp, old, adv, is_prefix, config=config, **CLIP)
    (gradient,) = torch.autograd.grad(got.loss_BT.sum(), logp)
    columns = [x.detach().flatten().tolist() for x in (logp, old, adv, is_prefix)]
    expected = [scalar(*token, config, **CLIP) for token in zip(*columns, strict=True)]
    loss, slope, clipped, dual = (
        torch.tensor(column, dtype=dtype).reshape(logp.shape)
        for column, dtype in zip(
            zip(*expected, strict=True), (torch.float64, torch.float64, torch.bool, torch.bool), strict=True
        )
    )
    torch.testing.assert_close(got.loss_BT.detach(), loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-12)
    assert torch.equal(got.clipped_BT, clipped)
    assert torch.equal(got.dual_clipped_BT, dual)
    own_clipped = config.policy_ratio == "ppo" and config.policy_clip == "same"
    assert clipped[~is_prefix].any() == dual[~is_prefix].any() == own_clipped
    if form in ("default", "own"):
        assert clipped[is_prefix].any()
        assert dual[is_prefix].any()
    torch.testing.assert_close(got.log_ratio_BT, (logp - old).detach().clamp(-20, 20))
    assert not got.log_ratio_BT.requires_grad


@every_form
def test_gradient_against_finite_differences(form):
    config, step = LossConfig(**FORMS[form]), 1e-6
    logp, old, adv, is_prefix = make_tokens(2)

    def loss(at):
        # sg(log pi) is a constant to the gradient, so the difference must not move it: there, the ratio has slope 1.
        return token_policy_loss(at, old, adv, is_prefix, config=config, **CLIP).loss_BT

    (gradient,) = torch.autograd.grad(loss(logp).sum(), logp)
    with torch.no_grad():
        if config.prefix_focus:
            adv = torch.where(is_prefix, adv * (1 - logp.exp()).clamp(min=0) ** config.prefix_focus, adv)
            config = LossConfig(**{**FORMS[form], "prefix_focus": 0.0})
        if config.prefix_old_log_prob == "current":
            old = torch.where(is_prefix, logp, old)
            config = LossConfig(**{**FORMS[form], "prefix_old_log_prob": "old"})
        numeric = (loss(logp + step) - loss(logp - step)) / (2 * step)
        ratio = (logp - old).exp()
    edges = torch.tensor([1 - CLIP["clip_low"], 1 + CLIP["clip_high"], 0.95, 1.6, CLIP["clip_c"]])
    smooth = ((ratio[..., None] - edges).abs() > 1e-4).all(-1)
    assert smooth.float().mean() > 0.99
    torch.testing.assert_close(gradient[smooth], numeric[smooth], rtol=1e-5, atol=1e-7)


@every_form
def test_gradient_flows_through_log_prob_only_and_inputs_stay(form):
    logp, old, adv, is_prefix = make_tokens()
    old.requires_grad_()
    adv.requires_grad_()
    before = [x.detach().clone() for x in (logp, old, adv, is_prefix)]
    got = token_policy_loss(logp, old, adv, is_prefix, config=LossConfig(**FORMS[form]), **CLIP)
    got.loss_BT.sum().backward()
    assert logp.grad.abs().sum() > 0
    assert old.grad is None
    assert adv.grad is None
    assert all(torch.equal(x.detach(), y) for x, y in zip((logp, old, adv, is_prefix), before, strict=True))


#: forms that also change the policy's own tokens
OWN_FORMS = {"luffy", "policy_unclipped", "unclipped", "log", "srft"}


def test_every_form_gives_another_loss_or_gradient_and_the_prefix_forms_on_prefix_tokens_alone():
    logp, old, adv, is_prefix = make_tokens()
    seen = {}
    for form, options in FORMS.items():
        loss = token_policy_loss(logp, old, adv, is_prefix, config=LossConfig(**options), **CLIP).loss_BT
        (gradient,) = torch.autograd.grad(loss.sum(), logp)
        seen[form] = torch.stack([loss.detach(), gradient])
    for a, b in itertools.combinations(FORMS, 2):
        # With ratio 1 no clip ever binds.
        same = {a, b} == {"current", "current_none"}
        assert torch.equal(seen[a], seen[b]) == same
        if not {a, b} & OWN_FORMS:
            assert torch.equal(seen[a][:, is_prefix], seen[b][:, is_prefix]) == same
    for form in FORMS.keys() - OWN_FORMS:
        assert torch.equal(seen[form][:, ~is_prefix], seen["default"][:, ~is_prefix])


def test_the_default_form_does_not_look_at_the_prefix_mask():
    logp, old, adv, is_prefix = make_tokens()
    masks = (is_prefix, ~is_prefix, torch.zeros_like(is_prefix))
    results = [token_policy_loss(logp, old, adv, mask, config=LossConfig(), **CLIP) for mask in masks]
    for got in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(got, results[0], strict=True))


def test_an_own_range_equal_to_the_actors_changes_nothing():
    logp, old, adv, is_prefix = make_tokens()
    own = LossConfig(prefix_clip="own", prefix_clip_low=CLIP["clip_low"], prefix_clip_high=CLIP["clip_high"])
    got = token_policy_loss(logp, old, adv, is_prefix, config=own, **CLIP)
    expected = token_policy_loss(logp, old, adv, is_prefix, config=LossConfig(), **CLIP)
    assert torch.equal(got.loss_BT, expected.loss_BT)


@pytest.mark.parametrize("ratio_form", ["p", "shaped"])
@pytest.mark.parametrize("rest", [{"prefix_clip": "none"}, {"prefix_clip": "own"}, {"prefix_old_log_prob": "current"}])
def test_clip_and_old_policy_do_not_reach_p_and_shaped(ratio_form, rest):
    logp, old, adv, is_prefix = make_tokens()
    got = token_policy_loss(logp, old, adv, is_prefix, config=LossConfig(prefix_ratio=ratio_form, **rest), **CLIP)
    expected = token_policy_loss(logp, old, adv, is_prefix, config=LossConfig(prefix_ratio=ratio_form), **CLIP)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_on_policy_the_loss_is_minus_the_advantage_and_the_gradient_too():
    logp, _, adv, is_prefix = make_tokens()
    got = token_policy_loss(logp, logp.detach(), adv, is_prefix, config=LossConfig(), **CLIP)
    (gradient,) = torch.autograd.grad(got.loss_BT.sum(), logp)
    torch.testing.assert_close(got.loss_BT.detach(), -adv)
    torch.testing.assert_close(gradient, -adv)
    assert not got.clipped_BT.any()
    assert not got.dual_clipped_BT.any()


@every_form
def test_float32_stays_finite_at_extreme_ratios(form):
    logp = torch.tensor([[-1e-6, -200.0, -1e4, -0.5]], requires_grad=True)
    old = torch.tensor([[-300.0, -1e-6, -0.1, -1e4]])
    for sign in (1.0, -1.0):
        for inside in (True, False):
            mask = torch.full(logp.shape, inside)
            got = token_policy_loss(logp, old, sign * torch.ones(1, 4), mask, config=LossConfig(**FORMS[form]), **CLIP)
            (gradient,) = torch.autograd.grad(got.loss_BT.sum(), logp)
            assert got.loss_BT.dtype == torch.float32
            assert got.loss_BT.isfinite().all()
            assert gradient.isfinite().all()


# --- the SFT term ---

WEIGHTS = {
    "none": lambda p, h: 1.0,
    "p": lambda p, h: p,
    "p_1_p": lambda p, h: p * (1 - p),
}


def sft_inputs(seed=0, shape=(5, 30)):
    rng = torch.Generator().manual_seed(seed)
    logp = (-torch.rand(shape, generator=rng, dtype=torch.float64) * 6).requires_grad_()
    mask = torch.arange(shape[1]) < torch.randint(0, shape[1] + 1, (shape[0], 1), generator=rng)
    weight = torch.rand(shape[0], generator=rng, dtype=torch.float64)
    return logp, mask, weight, torch.rand(shape, generator=rng, dtype=torch.float64) * 2


@pytest.mark.parametrize("kind", WEIGHTS)
def test_sft_term_and_its_gradient_against_a_loop(kind):
    logp, mask, weight, entropy = sft_inputs()
    term = demonstration_nll(logp, mask, weight, config=SFTConfig(token_weight=kind), entropy_RT=entropy)
    (gradient,) = torch.autograd.grad(term, logp)
    total = 0.0
    for b in range(logp.shape[0]):
        for t in range(logp.shape[1]):
            w = weight[b].item() * WEIGHTS[kind](math.exp(logp[b, t].item()), entropy[b, t].item())
            total += -logp[b, t].item() * w if mask[b, t] else 0.0
            # the weight is a constant to the gradient
            assert gradient[b, t].item() == pytest.approx(-w if mask[b, t] else 0.0, rel=1e-12)
    assert term.item() == pytest.approx(total, rel=1e-12)


def test_trust_region_sft_has_the_gradient_of_its_paper():
    """-(1 / max(p, 0.1)) grad p, so by log p: -p / max(p, 0.1), i.e. -1 above the floor and -p / 0.1 under it."""
    logp, mask, weight, _ = sft_inputs(2)
    (gradient,) = torch.autograd.grad(
        demonstration_nll(logp, mask, weight, config=SFTConfig(token_weight="trust")), logp
    )
    p = logp.detach().exp()
    assert (p[mask] < 0.1).any()
    assert (p[mask] > 0.1).any()
    expected = torch.where(p > 0.1, -1.0, -p / 0.1) * weight[:, None] * mask
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


def test_an_empty_sft_term_is_zero_and_can_be_back_propagated():
    logp = torch.zeros(3, 4, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.long)
    mask = torch.ones(0, 4, dtype=torch.bool)
    demonstration_nll(logp[nothing], mask, torch.zeros(0), config=SFTConfig()).backward()
    assert torch.equal(logp.grad, torch.zeros(3, 4))
