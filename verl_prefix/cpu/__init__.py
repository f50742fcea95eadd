"""The same stack on a machine without an accelerator: verl's FSDP2 on gloo, vLLM's CPU engine.

Everything in this package is active only when verl finds no accelerator (or `VERL_PLATFORM=cpu` says so).
`activate` is called once per process by the plugin; it registers, and changes nothing that is already loaded.
"""

from __future__ import annotations

import os

import wrapt

CPU_PLATFORM = "cpu"


def chosen() -> bool:
    """Whether this process should run on the CPU platform.

    `VERL_PLATFORM` decides if set; otherwise the CPU is taken only if no accelerator platform that verl knows is
    available (the same test that verl's own detection makes, so CPU-only Ray actors on GPU nodes are not misled).
    With `RAY_ADDRESS` set the work happens on another machine, and this one's lack of an accelerator says nothing.
    """
    asked = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if asked:
        return asked == CPU_PLATFORM
    if os.environ.get("RAY_ADDRESS"):
        return False
    from verl.plugin.platform.platform_manager import PlatformRegistry

    others = (PlatformRegistry.get(name) for name in PlatformRegistry.registered_names() if name != CPU_PLATFORM)
    return not any(platform().is_platform_available(use_smi_check=True) for platform in others)


def activate() -> bool:
    """Register the CPU platform and, if it is the chosen one, the seams that it needs. True if it is chosen."""
    from verl_prefix.cpu import platform

    platform.register()
    if not chosen():
        return False
    # Ray actors and vLLM workers inherit the decision instead of probing again.
    os.environ["VERL_PLATFORM"] = CPU_PLATFORM

    from verl_prefix.cpu import engines, packages, settings

    packages.answer_for_vllm()
    wrapt.when_imported("verl.utils.distributed")(engines.use_plain_gloo)
    wrapt.when_imported("verl.workers.engine.fsdp.transformer_impl")(engines.register_fsdp2)
    wrapt.when_imported("verl.workers.engine.fsdp.transformer_impl")(engines.keep_offload_unpinned)
    wrapt.when_imported("verl.workers.rollout.replica")(engines.register_vllm_replica)
    wrapt.when_imported("verl.utils.config")(settings.apply_before_validation)
    return True
