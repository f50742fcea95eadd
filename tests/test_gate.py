"""The gate against a loop over prompts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from verl_prefix import gate
from verl_prefix.config import GateConfig

rollout = st.tuples(st.integers(0, 4), st.sampled_from([-1.0, 0.0, 0.5, 1.0]), st.booleans())


@given(
    rollouts=st.lists(rollout, min_size=1, max_size=40),
    max_correct=st.integers(0, 3),
    demonstrations=st.sampled_from(["always", "failing"]),
    on_policy=st.sampled_from(["always", "passing"]),
    above=st.sampled_from([0.0, 0.5]),
)
def test_against_a_loop(rollouts, max_correct, demonstrations, on_policy, above):
    config = GateConfig(max_correct, above, demonstrations, on_policy)
    prompts, rewards, prefixed = (list(column) for column in zip(*rollouts, strict=True))
    got = gate.apply(config, group=[f"u{p}" for p in prompts], reward=rewards, prefixed=prefixed)
    failing = {
        p
        for p in prompts
        if sum(q == p and not x and r > above for q, r, x in zip(prompts, rewards, prefixed, strict=True))
        <= max_correct
    }
    shown = {p for p, x in zip(prompts, prefixed, strict=True) if x}
    for p, x, keep in zip(prompts, prefixed, got.keep, strict=True):
        if x:
            assert keep == (demonstrations == "always" or p in failing)
        else:
            assert keep == (on_policy == "always" or p not in failing or p not in shown)
    assert (got.failing_groups, got.groups) == (len(failing), len(set(prompts)))


def test_hpt_trains_every_prompt_on_one_thing_only():
    config = GateConfig(max_correct=0, demonstrations="failing", on_policy="passing")
    got = gate.apply(
        config, group=list("aaabbb"), reward=[1, 0, 1, 1, 0, 0], prefixed=[True, False, False, True, False, False]
    )
    assert got.keep.tolist() == [False, True, True, True, False, False]


def test_without_a_threshold_nothing_is_dropped():
    got = gate.apply(GateConfig(), group=["a", "a"], reward=[0, 0], prefixed=[True, False])
    assert got.keep.all()
    assert (got.failing_groups, got.groups) == (0, 1)


@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 3))
def test_spread_keeps_each_workers_share(ranks, share, step):
    order = gate.spread(ranks * share, ranks, seed=0, step=step)
    for rank in range(ranks):
        mine = order[rank * share : (rank + 1) * share]
        assert sorted(mine) == list(range(rank * share, (rank + 1) * share))


def test_spread_mixes_and_is_reproducible():
    order = gate.spread(1152, 8, seed=0, step=3)
    assert order == gate.spread(1152, 8, seed=0, step=3) != gate.spread(1152, 8, seed=0, step=4)
    # padding stands last in each worker's share; after it, about half of it is in the first of two mini-batches
    padding = [place for rank in range(8) for place in range(rank * 144 + 100, (rank + 1) * 144)]
    first_halves = {place for rank in range(8) for place in order[rank * 144 : rank * 144 + 72]}
    assert 0.4 < len(first_halves & set(padding)) / len(padding) < 0.6
