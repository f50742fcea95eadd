"""Errors that users of the plugin meet. All are picklable, so that Ray can carry them to the driver."""

from __future__ import annotations


class PrefixError(Exception):
    """Root of every error this package raises on purpose."""


class PrefixConfigError(PrefixError, ValueError):
    """A configuration value that cannot work.

    Usual causes: a typo in an override, a preset combined with a trainer mode or data file it does not
    support. The message names the key, the value and the mend.
    """

    def __init__(self, key: str, value: object, mend: str):
        self.key, self.value, self.mend = key, value, mend
        super().__init__(key, value, mend)

    def __str__(self) -> str:
        return f"{self.key}={self.value!r}: {self.mend}"


class DemonstrationError(PrefixError, ValueError):
    """A data file whose demonstrations cannot be used.

    Usual causes: the demonstration column is missing, holds something other than a list of strings, or every
    demonstration is longer than the response limit. The message names the file, the row and the mend.
    """


class RolloutError(PrefixError, RuntimeError):
    """A training step without a single rollout, or without a complete batch however often prompts are replaced.

    Usual causes: the rollout engine or the reward function fails on every request. The message names the step and where
    the cause is written.
    """


class NotFiniteError(PrefixError, ArithmeticError):
    """NaN or infinity where a training step needs numbers.

    Usual causes: a reward function that returns NaN, weights that diverged, a rollout engine whose precision overflows.
    The message names the step, the quantity and the rollouts.
    """

    _CAUSES = {
        "rewards": "the reward function returned it; mend it to return a number",
        "old_log_probs": "the training engine computed it: the weights diverged, or a token has probability 0",
        "rollout_log_probs": "the rollout engine computed it: its weights or its precision are broken",
        "entropy": "the training engine computed it from logits that are NaN or infinite",
        "advantages": "the estimator or the KL penalty made it from finite rewards",
    }

    def __init__(self, step: int, name: str, bad: dict[str, int]):
        self.step, self.name, self.bad = step, name, bad
        super().__init__(step, name, bad)

    def __str__(self) -> str:
        first = ", ".join(list(self.bad)[:3])
        return (
            f"step {self.step}: {self.name} is NaN or infinite on {sum(self.bad.values())} values of {len(self.bad)} "
            f"rollouts ({first}{', ...' if len(self.bad) > 3 else ''}); {self._CAUSES[self.name]}. No update was made "
            "in this step: resume from the last checkpoint once it is mended."
        )


class RunFolderError(PrefixError, ValueError):
    """A run folder that cannot be read.

    Usual causes: a wrong path, a run without verl's `file` logger, a folder named twice. The message names the folder
    or file and the mend.
    """


class EvaluationError(PrefixError, ValueError):
    """An evaluation that cannot start, go on or be counted.

    Usual causes: a checkpoint without merged weights, an evaluation file that lacks a column, results of other
    arguments in the output folder, a server that does not answer. The message names file, row or key, and the mend.
    """
