"""One table for the terminal and for a Markdown page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = (self.head, ["---"] * len(self.head), *self.rows)
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def rich(self) -> RichTable:
        made = RichTable(*self.head)
        for row in self.rows:
            made.add_row(*(cell.replace("`", "") for cell in row))
        return made
