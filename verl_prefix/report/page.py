"""The HTML file: data as inert JSON, one script, one style sheet, and a policy that allows nothing else.

Text from models reaches the page only inside the JSON block, escaped so that it cannot end it, and from there only as
`textContent`. Should that fail, the Content-Security-Policy admits no script but the one whose hash it names, and no
request at all.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any

from verl_prefix import comparison
from verl_prefix.comparison import Run
from verl_prefix.report import curves, differences, rollouts

#: rollouts keep at least this share of the size limit
_ROLLOUT_SHARE = 0.25
_FEWEST_POINTS = 60

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>verl_prefix report</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main id="main"><noscript>This page is drawn by the script it contains, and scripts are switched off.</noscript></main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def build(runs: Sequence[Run], budget: int) -> tuple[str, str]:
    """The page (ASCII data, at most about `budget` bytes) and a sentence about the rollouts left out of it."""
    content = _without_rollouts(runs, int(budget * (1 - _ROLLOUT_SHARE)))
    room = budget - len(rollouts.dump(content)) - len(_asset("page.js")) - len(_asset("page.css")) - len(_TEMPLATE)
    samples = [rollouts.sample(run.folder / "rollouts", max(room, 0) // len(runs)) for run in runs]
    prompts: dict[str, int] = {}
    content["groups"] = [
        [
            number,
            group["step"],
            group["row"],
            prompts.setdefault(group["prompt"], len(prompts)),
            group["truth"],
            group["rollouts"],
        ]
        for number, sample in enumerate(samples)
        for group in sample.groups
    ]
    content["prompts"] = list(prompts)
    for entry, sample in zip(content["runs"], samples, strict=True):
        entry["rollouts"] = sample.left_out()
    kept, read = sum(s.rollouts_kept for s in samples), sum(s.rollouts_read for s in samples)
    steps, logged = sum(s.steps for s in samples), sum(s.log_steps for s in samples)
    if not logged:
        content["sample"] = "No rollout log (trainer.rollout_data_dir)."
    else:
        content["sample"] = (
            f"Rollouts: {kept:,} of the {read:,} in the step files read, of {steps:,} of {logged:,} step files."
        )
    content["shortened"] = rollouts.HEAD + rollouts.TAIL
    return render(content), content["sample"]


def render(content: dict[str, Any]) -> str:
    """The HTML with `content` as its data. Raises ValueError on numbers that are not finite."""
    script, style = _asset("page.js"), _asset("page.css")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_source(script)}",
            f"style-src {_source(style)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    return _TEMPLATE.format(policy=policy, style=style, script=script, data=rollouts.dump(content))


def _without_rollouts(runs: Sequence[Run], budget: int) -> dict[str, Any]:
    found = [result for run in runs for result in comparison.results(run)]
    configs = [comparison.configuration(run) for run in runs]
    clean = rollouts.clean
    content: dict[str, Any] = {
        "runs": [{"name": clean(r.name), "method": clean(r.method), "seed": r.seed} for r in runs],
        "results": [
            {key: clean(value) if isinstance(value, str) else value for key, value in entry.items()}
            for entry in comparison.as_json(found)["runs"]
        ],
        "methods": [
            {key: clean(value) if isinstance(value, str) else value for key, value in entry.items()}
            for entry in comparison.over_seeds(found)
        ],
        "configs": sum(config is not None for config in configs),
        "differences": [
            {"key": clean(entry["key"]), "values": [v if v is None else clean(v) for v in entry["values"]]}
            for entry in differences.differences(configs, [run.folder.name for run in runs])
        ],
    }
    points = 1000
    while True:
        content |= curves.data(runs, points)
        if points < 2 * _FEWEST_POINTS or len(rollouts.dump(content)) <= budget:
            break
        points //= 2
    for panel in content["panels"]:
        panel["title"] = clean(panel["title"])
    content["points"] = points
    return content


def _asset(name: str) -> str:
    return resources.files("verl_prefix.report").joinpath(name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
