"""The `prefix` section of a preset, composed by Hydra without verl's own configuration (verl takes 6 s to import)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from verl_prefix import conf, hydra_group
from verl_prefix.config import PrefixConfig
from verl_prefix.exceptions import PrefixConfigError


def names() -> list[str]:
    """The presets that `+prefix=NAME` knows."""
    return sorted(file.stem for file in Path(conf.__file__).parent.glob("prefix/*.yaml"))


def compose(preset: str, overrides: Sequence[str] = ()) -> PrefixConfig:
    """The typed section that `+prefix=PRESET OVERRIDES...` gives a training run.

    Args:
        overrides: `prefix.key=value`, in Hydra's grammar.

    Raises:
        PrefixConfigError: unknown preset (with the near ones), a key outside of the section, an unknown key, a wrong
            type, a value out of range.
    """
    known = names()
    if preset not in known:
        near = difflib.get_close_matches(preset, known) or known
        raise PrefixConfigError("+prefix", preset, f"no such preset; did you mean {' or '.join(near)}?")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise PrefixConfigError(override, None, "has no value; write prefix.key=value.")
        if not key.startswith("prefix."):
            raise PrefixConfigError(key, value, "is outside of the section; write prefix.key=value.")

    import hydra
    from hydra.errors import HydraException

    hydra_group.register(hydra)
    try:
        with hydra.initialize(version_base=None, config_path=None):
            return PrefixConfig.of(hydra.compose(overrides=[f"+prefix={preset}", *overrides]).prefix)
    except HydraException as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise PrefixConfigError(
            "prefix", " ".join(overrides), f"cannot be composed: {cause}.{_near(overrides)}"
        ) from error


def _near(overrides: Sequence[str]) -> str:
    """The known key beside the first unknown one."""
    from omegaconf import OmegaConf

    known = _keys(OmegaConf.to_container(OmegaConf.structured(PrefixConfig)), "prefix.")
    for override in overrides:
        key = override.partition("=")[0]
        near = difflib.get_close_matches(key, known, n=1)
        if key not in known and near:
            return f" Did you mean {near[0]}?"
    return ""


def _keys(section: dict, prefix: str) -> list[str]:
    found = []
    for key, value in section.items():
        found += _keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return found
