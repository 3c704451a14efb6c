"""Tables in the terminal: one look for all commands."""

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text


def _table(title: str, headings: Iterable[str], words: int = 1) -> Table:
    """A table whose first columns, so many of them, hold words, and the others numbers."""
    table = Table(title=Text(title), title_justify="left", box=None, header_style="bold", pad_edge=False)
    for index, heading in enumerate(headings):
        word = index < words
        table.add_column(Text(heading), justify="left" if word else "right", style=_style(heading), no_wrap=word)
    return table


def _style(name: str) -> str:
    return "bold" if name == "student" else ""
