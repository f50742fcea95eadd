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
