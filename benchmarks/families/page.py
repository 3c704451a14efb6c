"""Table of the families in docs/families.md, written between two marks of the page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subquad.utils.files import write_aside

START, END = "<!-- families: start -->", "<!-- families: end -->"
HEADINGS = {
    "works": "work",
    "refused": "are refused",
    "teacher": "deviate, fail or cannot be made as teachers",
    "crashes": "crash",
    "deviates": "deviate",
}


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Number of families by outcome, in one line."""
    counts = {heading: sum(row["outcome"] == name for row in rows) for name, heading in HEADINGS.items()}
    return f"{len(rows)} families: " + ", ".join(f"{count} {heading}" for heading, count in counts.items() if count)


def tables(report: Mapping[str, Any]) -> str:
    """Markdown of all outcomes: the families that work, and the others by their reason."""
    rows = report["rows"]
    versions = report["versions"]
    parts = [
        f"{summary(rows)}. transformers {versions['transformers']}, torch {versions['torch']}, "
        f"{report['date'][:10]}; `{report['command']}`.",
        "| outcome | reason | families |\n|---|---|---|\n" + "\n".join(_lines(rows)),
    ]
    return "\n\n".join(parts)


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of the table: an outcome, a reason, and the families that share them."""
    lines = []
    for name in HEADINGS:
        families: dict[str, list[str]] = {}
        for row in rows:
            if row["outcome"] == name:
                families.setdefault(_reason(row), []).append(f"`{row['family']}`")
        by_count = sorted(families.items(), key=lambda item: (-len(item[1]), item[0]))
        lines += [f"| {name} | {reason} | {', '.join(names)} |" for reason, names in by_count]
    return lines


def _reason(row: Mapping[str, Any]) -> str:
    """Reason of an outcome, without the name of the class, so that families share it."""
    detail = " ".join(str(row["detail"]).replace(row["model"] or "\n", "it").split())
    step = f" (to {row['step']})" if row["outcome"] in ("crashes", "deviates") and row["step"] else ""
    return (detail + step).replace("|", "\\|")


def filled(page: str, report: Mapping[str, Any]) -> str:
    """Text of a page with these tables between its marks."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    assert start and end, "the page has lost its marks"
    return f"{before}{START}\n\n{tables(report)}\n\n{END}{after}"


def write_page(path: Path, report: Mapping[str, Any]) -> None:
    """Writes the tables into a page."""
    text = filled(path.read_text(encoding="utf-8"), report)
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
