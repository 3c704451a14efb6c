"""Rows of a text source: documents, and rows that hold none, which are counted and do not end a run.

Notable:
- A bad row in millions is no reason to stop. It is skipped, or its broken characters are replaced, and the console says
  so once a source, with numbers. A source without one usable row is a mistake, and the first bad row tells which.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from subquad.utils import format as fmt
from subquad.utils.text import REPLACEMENT, is_well_formed, well_formed

COUNTS = ("rows", "skipped", "repaired")  # keys of a `Tally.record`


@dataclass(frozen=True)
class Document:
    """One text before `clean`. `test` marks a document that is always held out for the test part."""

    text: str
    test: bool = False


@dataclass(frozen=True)
class Skipped:
    """Rows that hold no text.

    Attributes:
        reason: words after a number (`3 without text`).
        sentence: makes a sentence about them that names the place; called for the first of a source only.
        rows: how many.
    """

    reason: str
    sentence: Callable[[], str]
    rows: int = 1


Row = Document | Skipped


def clean(text: str) -> str:
    """Normalise line ends and remove trailing blanks, byte-order marks, NULs and repeated blank lines.

    Indentation is kept, since it is significant in code. Broken characters become U+FFFD.
    """
    text = well_formed(text)
    text = text.replace("\ufeff", "").replace("\0", "").replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[^\S\n]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n").rstrip()


@dataclass
class Tally:
    """Count of the rows of one source: all, the skipped ones by reason, and those with characters replaced."""

    name: str
    rows: int = 0
    repaired: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: str = ""

    def text(self, row: Row) -> str:
        """Cleaned text of the next row, which is counted; empty if it is skipped."""
        if isinstance(row, Document):
            text = clean(row.text)
            broken = not is_well_formed(row.text)
            if text and not (broken and 2 * text.count(REPLACEMENT) > len(text)):
                self.rows += 1
                self.repaired += broken
                return text
            row = self._unusable(broken)
        self.rows += row.rows
        self.skipped[row.reason] += row.rows
        self.first_skipped = self.first_skipped or row.sentence()
        return ""

    def _unusable(self, broken: bool) -> Skipped:
        if not broken:
            return Skipped("without text", lambda: f"row {self.rows} of {self.name} is empty")
        return Skipped(
            "not UTF-8",
            lambda: f"row {self.rows} of {self.name} is not UTF-8: convert it first, e.g. iconv -f latin1 -t utf-8",
        )

    @property
    def usable(self) -> int:
        """Rows that have a text."""
        return self.rows - self.skipped.total()

    def record(self) -> dict[str, Any]:
        """Counts for the description of a corpus."""
        return {"rows": self.rows, "skipped": dict(self.skipped), "repaired": self.repaired}

    def in_brackets(self) -> str:
        """What `remark` says, for the end of another sentence."""
        said = remark(self.record())
        return f" ({said})" if said else ""


def remark(counts: dict[str, Any]) -> str:
    """Words on the rows of a source that were skipped or repaired, by its `record`; empty if there were none."""
    skipped, repaired = counts.get("skipped", {}), counts.get("repaired", 0)
    words = []
    if skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in Counter(skipped).most_common())
        words.append(f"{_of(sum(skipped.values()), counts['rows'], 'was', 'were')} skipped: {reasons}")
    if repaired:
        words.append(f"broken characters of {_of(repaired, counts['rows'])} became U+FFFD")
    return "; ".join(words)


def _of(count: int, rows: int, singular: str = "", plural: str = "") -> str:
    """`12 of 4,000 rows were`."""
    return f"{count:,} of {fmt.count(rows, 'row')} {singular if count == 1 else plural}".rstrip()
