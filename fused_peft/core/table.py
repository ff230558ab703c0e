"""Rows of text as a table: aligned for a terminal, escaped HTML for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def text(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = (), least: int = 0) -> str:
    """Aligned columns, two spaces apart; those in ``right`` to the right, and at least ``least`` wide."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(least if i in right else 0, *(len(line[i]) for line in lines)) for i in range(len(head))]

    def cells(line: list[str]) -> list[str]:
        return [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]

    return "\n".join("  ".join(cells(line)).rstrip() for line in lines)


def html(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A <table> with every cell escaped."""

    def row(cells: Sequence[str], tag: str) -> str:
        sides = ["right" if i in right else "left" for i in range(len(cells))]
        made = (
            f'<{tag} style="text-align: {side}">{escape(str(cell))}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        )
        return f"<tr>{''.join(made)}</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return f"<table>\n<thead>{row(head, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


class Table(list):
    """A list of rows that shows as a table; subclasses say ``head`` and how an entry is a row of it."""

    head: tuple[str, ...] = ()

    def row(self, entry) -> tuple[str, ...]:
        raise NotImplementedError

    def __str__(self) -> str:
        return text(self.head, [self.row(entry) for entry in self])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html(self.head, [self.row(entry) for entry in self])
