"""A copy of a model with a longer context: other rotary base, more positions, the same weights.

verl's `model.override_config` cannot do this: it sets attributes on the trainer's configuration only, where
transformers 5 no longer looks for `rope_theta`, and vLLM reads config.json for itself, so that rollouts would come from
another model than the one that is trained. config.json is the one place that both read.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from verl_prefix.exceptions import PrefixConfigError


def extended(config: dict[str, Any], *, rope_theta: float, positions: int) -> dict[str, Any]:
    """`config` (a config.json) with another rotary base and number of positions.

    Both spellings of the base are kept in step: top-level `rope_theta` (transformers 4, and vLLM with it) and
    `rope_parameters` (transformers 5). Sliding-window limits that equal the old number of positions move with it.

    Raises:
        PrefixConfigError: no rotary base to change, scaled rotary embeddings (their base alone says little), one
            base for each type of layer, or fewer positions than there are.
    """
    old = config.get("max_position_embeddings")
    if not isinstance(old, int) or positions < old:
        raise PrefixConfigError("positions", positions, f"the model has max_position_embeddings={old!r}; give more.")
    rope = config.get("rope_parameters")
    scaling = config.get("rope_scaling") or rope or {}
    nested = any(isinstance(value, dict) for value in scaling.values())
    if nested or scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise PrefixConfigError(
            "rope_scaling",
            scaling,
            "the rotary embeddings are scaled already or differ between layers; edit config.json by hand.",
        )
    if "rope_theta" not in config and "rope_theta" not in (rope or {}):
        raise PrefixConfigError(
            "rope_theta", None, "config.json has none at its top level or in rope_parameters; is it a rotary model?"
        )
    result = {**config, "max_position_embeddings": positions}
    if "rope_theta" in config or rope is None:
        result["rope_theta"] = rope_theta
    if rope is not None:
        result["rope_parameters"] = {**rope, "rope_theta": rope_theta}
    if config.get("sliding_window") == old:
        result["sliding_window"] = positions
    return result


def extend(model: Path, out: Path, *, rope_theta: float, positions: int) -> dict[str, Any]:
    """Write `out`: links to the files of `model`, and config.json changed by `extended`. Returns the new configuration.

    Raises:
        PrefixConfigError: `model` has no config.json, `out` exists, or what `extended` raises. Nothing is written then.
    """
    source = model / "config.json"
    if not source.is_file():
        raise PrefixConfigError("MODEL_DIR", str(model), "has no config.json; give the folder of a Hugging Face model.")
    if out.exists() or out.is_symlink():
        raise PrefixConfigError("OUT_DIR", str(out), "exists; remove it or give another folder.")
    config = extended(json.loads(source.read_text()), rope_theta=rope_theta, positions=positions)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for file in sorted(model.iterdir()):
            if file.name != "config.json":
                # resolved: a hub cache's own links are relative
                (scratch / file.name).symlink_to(file.resolve())
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        scratch.chmod(0o755)
        scratch.rename(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return config
