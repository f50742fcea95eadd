"""What the plugin registers in verl, one function per seam (each runs as an import hook of the module it extends)."""

from __future__ import annotations

import types


def register_algorithms(core_algos: types.ModuleType) -> None:
    """The advantage estimators and the policy loss, under their names in verl's registries."""
    from verl_prefix import estimator, names, policy_loss

    for name, function in estimator.REGISTERED.items():
        core_algos.register_adv_est(name)(function)
    core_algos.register_policy_loss(names.LOSS_MODE)(policy_loss.policy_loss)


def register_trainer(trainer_sync: types.ModuleType) -> None:
    """The trainer `prefix_sync` (verl's registration decorator runs on import)."""
    from verl_prefix import trainer  # noqa: F401


def register_agent_loop(single_turn_agent_loop: types.ModuleType) -> None:
    """The agent loop `prefix_agent`."""
    from verl_prefix import agent_loop

    agent_loop.register()
