"""Questions about a text: a sentence is begun, and what it goes on with stands nowhere else in the text.

As in the recall tasks of Based (arXiv 2402.18668) there is no question to understand, only a sentence to continue.
The answers are found by pattern, in English: dates, years, amounts, and names of up to three words.
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
# No stop in the lead: it is of one sentence with the answer. No capital in its last word: a name is asked whole. After
# the answer, nothing that makes it part of a longer word or number. The first answer of a sentence is taken.
_CLOZE = re.compile(
    rf"(?<!\S)((?:[^\s.!?]+ ){{{SHORTEST_LEAD - 1},{LONGEST_LEAD - 1}}}?[^\sA-Z.!?][^\s.!?]*) "
    rf"({'|'.join(_ANSWERS)})(?![\w'’-]|[.,]\d)"
)


@dataclass(frozen=True)
class Cloze:
    """Words of one sentence, and the date, amount or name that comes right after them, one space between."""

    lead: str
    answer: str

    def __str__(self) -> str:
        return f"{self.lead} {self.answer}"


def clozes(text: str) -> list[Cloze]:
    """What can be asked about `text`, in its order: each lead and each answer stands exactly once in it."""
    candidates = [Cloze(*match.groups()) for match in _CLOZE.finditer(text)]
    return [
        cloze
        for cloze in candidates
        if len(cloze.answer) <= LONGEST_ANSWER and text.count(cloze.lead) == text.count(cloze.answer) == 1
    ]
