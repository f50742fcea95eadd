"""docs/config.md, read off the dataclasses of `verl_prefix/config.py`.

    python docs/make_config.py          # rewrites the page

A test compares the page with `page()`, so that neither can rot.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

from verl_prefix import presets
from verl_prefix.config import PrefixConfig, Section

FILE = Path(__file__).with_name("config.md")

HEAD = """\
# The `prefix` section

<!-- written by docs/make_config.py from verl_prefix/config.py; do not edit -->

Every option of the plugin; the defaults are Prefix-RFT as published. Set like any other key of verl's:

```bash
python -m verl.trainer.main_ppo +prefix=prefix_rft prefix.schedule.steps=300 prefix.entropy_clip.share=0.5 ...
```

An unknown key or a wrong type fails when the command line is parsed, a value out of range before Ray starts; the error
names key, value and range. What the presets set is in `verl_prefix/conf/prefix/` and, as a table, in
[methods.md](methods.md). "set by" names presets whose value differs from the default.
"""


def page() -> str:
    """The whole page."""
    composed = {name: presets.compose(name) for name in presets.names()}
    return HEAD + "".join(_section(section, composed) for section in _sections(PrefixConfig()))


def _sections(section: Section) -> list[Section]:
    """The section and those in it, depth first, in the order of their fields."""
    fields = [getattr(section, f.name) for f in dataclasses.fields(section)]
    return [section, *(found for value in fields if isinstance(value, Section) for found in _sections(value))]


def _section(section: Section, composed: dict[str, PrefixConfig]) -> str:
    options = [f for f in dataclasses.fields(section) if "doc" in f.metadata]
    if not options:
        return ""
    lines = ["| key | type, range | default | meaning | set by |", "| --- | --- | --- | --- | --- |"]
    for f in options:
        meaning = f.metadata["doc"].replace("|", "\\|")
        cells = (f"`{section.key}.{f.name}`", _kind(f), _shown(getattr(section, f.name)), meaning)
        lines.append("| " + " | ".join((*cells, _set_by(section, f.name, composed))) + " |")
    text = inspect.getdoc(type(section))
    return f"\n## {section.key}\n\n{text}\n\n" + "\n".join(lines) + "\n"


def _kind(f: dataclasses.Field) -> str:
    meta = f.metadata
    if meta["choices"]:
        return ", ".join(f"`{choice}`" for choice in meta["choices"])
    low, high = (None if meta[end] is None else f"{meta[end]:g}" for end in ("low", "high"))
    bounds = f"{low} to {high}" if low and high else f"at least {low}" if low else f"at most {high}" if high else ""
    kind = str(f.type).replace(" | None", " or null")
    return f"{kind}, {bounds}" if bounds else kind


def _shown(value: object) -> str:
    return "`null`" if value is None else f"`{value}`" if not isinstance(value, bool) else f"`{str(value).lower()}`"


def _set_by(section: Section, name: str, composed: dict[str, PrefixConfig]) -> str:
    """Presets that set the option to something else, by value."""
    if f"{section.key}.{name}" == "prefix.preset":
        return ""
    values: dict[str, list[str]] = {}
    for preset, config in composed.items():
        found: object = config
        for part in (*section.key.split(".")[1:], name):
            found = getattr(found, part)
        if found != getattr(section, name):
            values.setdefault(_shown(found), []).append(preset)
    return "; ".join(f"{value}: {', '.join(names)}" for value, names in values.items())


if __name__ == "__main__":
    FILE.write_text(page())
