"""Text that every tokenizer and every file takes: Unicode without lone surrogates.

Half of a surrogate pair is no character: no encoding writes it, and tokenizers refuse it. It comes from JSON that was
cut between two escapes (`"\\ud83d"`), from bytes that are not UTF-8 (Python's `surrogateescape`, also in the arguments
of a command), and from models that write half a character.
"""

import re

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SURROGATE = re.compile("[\ud800-\udfff]")


def is_well_formed(text: str) -> bool:
    """Whether a text has no surrogates."""
    return text.isascii() or _SURROGATE.search(text) is None


def well_formed(text: str) -> str:
    """Join the surrogates that are pairs, and replace the other ones by U+FFFD."""
    if is_well_formed(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
