"""Tables in the terminal: one look for all commands."""

from collections.abc import Container, Iterable

from rich.table import Table
from rich.text import Text


def make_table(
    title: str | None, headings: Iterable[str], *, words: Container[int] = (0,), fold: bool = False
) -> Table:
    """Empty table; `words` are the columns that hold words, the others hold numbers and stand on the right.

    Where the terminal is too narrow, numbers wrap; with `fold`, words do. The student's column is bold.
    """
    table = Table(
        title=None if title is None else Text(title),
        title_justify="left",
        box=None,
        header_style="bold",
        pad_edge=False,
    )
    for index, heading in enumerate(headings):
        is_word = index in words
        table.add_column(
            Text(heading),
            justify="left" if is_word else "right",
            style=style_of(heading),
            no_wrap=is_word != fold,
            overflow="fold" if is_word and fold else "ellipsis",
        )
    return table


def style_of(name: str) -> str:
    """Style of a model's row or column: bold for the student."""
    return "bold" if name == "student" else ""
