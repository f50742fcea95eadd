"""Entry point `verl.plugins`: what verl imports at the end of `import verl`, in every process of a run.

Importing this module only registers hooks. The verl modules it extends are imported when verl itself needs them, and
each hook runs right after its module was imported. verl swallows a plugin's exceptions, so a failure is reported here.
"""

from __future__ import annotations

import sys
import traceback
import types

import wrapt

#: verl module -> hook, in the order of registration
_HOOKS: dict[str, str] = {
    "hydra": "verl_prefix.hydra_group:register",
    "verl.utils.config": "verl_prefix.startup:check_before_validation",
    "verl.utils.device": "verl_prefix.sft:select_before_training",
    "verl.trainer.ppo.core_algos": "verl_prefix.registration:register_algorithms",
    "verl.trainer.ppo.v1.trainer_sync": "verl_prefix.registration:register_trainer",
    "verl.experimental.agent_loop.single_turn_agent_loop": "verl_prefix.registration:register_agent_loop",
}

# A reload of this module keeps its globals, and what is registered stays so.
_active = globals().get("_active", False)


def _lazy(target: str):
    """A hook that imports its implementation only when it runs."""

    def hook(module: types.ModuleType) -> None:
        import importlib

        name, function = target.split(":")
        try:
            getattr(importlib.import_module(name), function)(module)
        except Exception:
            _report(f"could not extend {module.__name__}")
            raise

    return hook


def _report(what: str) -> None:
    print(f"\n[verl_prefix] ERROR: {what}; this process runs WITHOUT the plugin.", file=sys.stderr, flush=True)
    traceback.print_exc()


def activate() -> None:
    """Register every hook once per process."""
    global _active
    if _active:
        return
    for module, target in _HOOKS.items():
        wrapt.when_imported(module)(_lazy(target))
    from verl_prefix import cpu

    cpu.activate()
    _active = True


try:
    activate()
except Exception:
    _report("the plugin failed to load")
    raise
