"""The typed `prefix` section: defaults are the paper's, errors name key, value and mend."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from verl_prefix.config import PrefixConfig
from verl_prefix.exceptions import PrefixConfigError


def test_class_defaults_are_the_published_setting():
    config = PrefixConfig.of(None)
    schedule, sampling, clip = config.schedule, config.sampling, config.entropy_clip
    assert (schedule.kind, schedule.initial, schedule.target, schedule.steps) == ("cosine", 0.95, 0.05, 500)
    assert (sampling.rollouts, sampling.high, sampling.beta_a, sampling.beta_b) == (1, 0.95, 1.0, 1.0)
    assert (clip.keep, clip.share, clip.pool) == ("top", 0.2, "batch")
    assert config.loss.prefix_ratio == "ppo"
    assert config.advantage.prefix_transform == "none"


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"seed": -1}, "prefix.seed"),
        ({"schedule": {"initial": 1.5}}, "prefix.schedule.initial"),
        ({"schedule": {"steps": 0}}, "prefix.schedule.steps"),
        ({"schedule": {"kind": "step"}}, "prefix.schedule.kind"),
        ({"sampling": {"high": 0.5}}, "prefix.sampling.high"),
        ({"sampling": {"rollouts": -1}}, "prefix.sampling.rollouts"),
        ({"sampling": {"min_prefix_len": 0}}, "prefix.sampling.min_prefix_len"),
        ({"demonstrations": {"demo_ratio": 1.1}}, "prefix.demonstrations.demo_ratio"),
        ({"entropy_clip": {"share": -0.1}}, "prefix.entropy_clip.share"),
        ({"entropy_clip": {"keep": "middle"}}, "prefix.entropy_clip.keep"),
        ({"loss": {"prefix_ratio": "q"}}, "prefix.loss.prefix_ratio"),
        ({"unknown": 1}, "unknown"),
        ({"schedule": {"steps": "many"}}, "steps"),
    ],
)
def test_bad_value_names_its_key(section, key):
    with pytest.raises(PrefixConfigError) as caught:
        PrefixConfig.of(section)
    assert key in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_every_field_is_documented():
    def fields(cls):
        for f in dataclasses.fields(cls):
            if "doc" in f.metadata:
                yield f
            else:
                yield from fields(f.default_factory)

    documented = list(fields(PrefixConfig))
    assert len(documented) > 25
    assert all(len(f.metadata["doc"]) > 10 for f in documented)
