"""What the plugin registers in verl, one function per seam (each runs as an import hook of the module it extends)."""

from __future__ import annotations

import types

import wrapt


def register_algorithms(core_algos: types.ModuleType) -> None:
    """The advantage estimators and the policy loss, under their names in verl's registries."""
    from verl_prefix import estimator, names, policy_loss

    for name, function in estimator.REGISTERED.items():
        core_algos.register_adv_est(name)(function)
    core_algos.register_policy_loss(names.LOSS_MODE)(policy_loss.policy_loss)


def register_trainer(trainer_sync: types.ModuleType) -> None:
    """The trainers of `names.TRAINER_MODES` (verl's registration decorator runs on import)."""
    from verl_prefix import trainer  # noqa: F401


#: the registry's entry; `_without_hydra` knows it by its identity, so a user's own entry of that name stays hydra's
_AGENT_LOOP = {"_target_": "verl_prefix.agent_loop.shared_agent_loop"}


def register_agent_loop(single_turn_agent_loop: types.ModuleType) -> None:
    """The agent loop `prefix_agent`, by name: it is imported when a worker first needs it (idempotent)."""
    import hydra.utils
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry

    from verl_prefix.names import AGENT_NAME

    _agent_loop_registry[AGENT_NAME] = _AGENT_LOOP
    if not isinstance(hydra.utils.instantiate, wrapt.FunctionWrapper):
        wrapt.wrap_function_wrapper("hydra.utils", "instantiate", _without_hydra)


def _without_hydra(wrapped, instance, args, kwargs):
    """`hydra.utils.instantiate`, which verl calls for every rollout. Hydra builds and merges two configurations around
    the arguments, which costs ten times as much as the rollout's own bookkeeping (benchmarks/bench_agent_loop.py).
    """
    if kwargs.get("config") is not _AGENT_LOOP:
        return wrapped(*args, **kwargs)
    from verl_prefix.agent_loop import shared_agent_loop

    return shared_agent_loop(**{name: value for name, value in kwargs.items() if name != "config"})
