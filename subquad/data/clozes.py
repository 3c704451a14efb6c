"""Cloze questions about a text: the beginning of a sentence, whose continuation occurs nowhere else in the text.

As in the recall tasks of Based (arXiv 2402.18668), there is no question to understand, only a sentence to continue.
Answers are English dates, years, amounts and names of up to three words, matched by regular expressions.
"""

import re
from dataclasses import dataclass

SHORTEST_LEAD, LONGEST_LEAD = 5, 12  # words before the answer
LONGEST_ANSWER = 32  # characters

_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_ANSWERS = (
    rf"(?:{_MONTHS}) \d{{1,2}}(?:, \d{{4}})?",
    r"\$?\d+(?:,\d{3})*(?:\.\d+)?(?: (?:thousand|million|billion|trillion|percent))?",
    r"[A-Z][a-z]+(?: [A-Z][a-z]+){0,2}(?! [A-Z])",
)
# The lead has no full stop, so it is in the same sentence as the answer. Its last word has no capital, so that names
# are complete. The answer must not be followed by the rest of a longer word or number. Only the first answer of a
# sentence counts.
_CLOZE = re.compile(
    rf"(?<!\S)((?:[^\s.!?]+ ){{{SHORTEST_LEAD - 1},{LONGEST_LEAD - 1}}}?[^\sA-Z.!?][^\s.!?]*) "
    rf"({'|'.join(_ANSWERS)})(?![\w'’-]|[.,]\d)"
)


@dataclass(frozen=True)
class Cloze:
    """Words of one sentence, and the date, amount or name that follows them after one space."""

    lead: str
    answer: str

    def __str__(self) -> str:
        return f"{self.lead} {self.answer}"


def clozes(text: str) -> list[Cloze]:
    """Find the clozes of `text`, in order. Each lead and each answer occurs exactly once in it."""
    candidates = [Cloze(*match.groups()) for match in _CLOZE.finditer(text)]
    return [
        cloze
        for cloze in candidates
        if len(cloze.answer) <= LONGEST_ANSWER and text.count(cloze.lead) == text.count(cloze.answer) == 1
    ]
