"""Retrieval probes: prompts that need a token from far back in the context.

Likelihood hides a loss of recall: a student may match its teacher on running text and still fail to look anything up.
The probes work with any tokenizer. Each row is exactly `context` tokens long, with the answer at its end:

- `copy`: a random token sequence, twice. Only looking back predicts the second copy.
- `dictionary`: key-value pairs, then one key, with the prompt of Retrieval-Aware Distillation (arXiv 2602.11374). Keys
  are English words, values distinct integers 0-99, and the row holds as many pairs as fit. With 100 pairs, text fills
  the space between dictionary and question, so that the distance grows with the context.
- `passkey`: five digits hidden in a haystack of text, then asked for. The depths of the rows cover the haystack.
- `associative`: multi-query associative recall (Zoology, arXiv 2312.04927). Pairs of random tokens, key and value, fill
  half of the row. The other half repeats the keys in random order, each followed by its value.
- `variables`: variable tracking (after RULER, arXiv 2404.06654, which asks for the variables of a value). Assignments
  such as `VAR X = 12345` and `VAR Y = X` are lines in a haystack, and several chains are interleaved. The question
  "What is the value of VAR Y? The value of VAR Y is" asks for the end of one chain. There are two chains of one hop to
  five chains of four hops, as many as take at most half of the row.
- `questions`: a passage of real text (the haystack), and the beginning of one of its sentences. The answer is a date,
  amount or name that occurs nowhere else in the passage (subquad/data/clozes.py).

Notable:
- Row i depends on (name, context, seed, i) only, so a probe with more rows has the same first rows.
- Document separators are removed from the haystack, because they tell a model to ignore the text before.
- This module does not use models; `subquad.evaluate.retrieval` scores the probes.

Shapes: N rows, T tokens (the context).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from string import ascii_uppercase
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from subquad.data.clozes import clozes
from subquad.errors import UserError, nearest
from subquad.utils.text import well_formed

MAX_PAIRS = 100  # values are distinct integers of 0-99
CHAINS_AND_HOPS = ((5, 4), (4, 4), (4, 3), (3, 3), (3, 2), (2, 2), (2, 1))  # each variable has a letter of its own
GOLDEN = 0.6180339887498949  # golden ratio; multiples of it, modulo 1, spread evenly for any number of rows

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "

# Prompts of the dictionary and the pass key.
DICTIONARY_TITLE = "Memorize the following dictionary:\n"
DICTIONARY_LINE = "{key}:{value}\n"
DICTIONARY_QUESTION = "The value of the key '{key}' is"
PASSKEY_TITLE = "There is a pass key hidden in a lot of irrelevant text. Find it and memorize it.\n"
PASSKEY_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
PASSKEY_QUESTION = "What is the pass key? The pass key is"

WORDS = """
    actor anchor angle animal apple apron arrow autumn badge bakery balloon bamboo banana barrel basket beach beacon
    bishop blanket blossom bottle boulder branch bread breeze brick bridge bronze bucket butter button cabin cactus
    camera camp canal candle canoe canvas carpet castle cattle cave cellar chain chair chapel cheese cherry chimney
    circle circus cliff clock cloud coach coast coffee comet copper coral corner cotton cradle crane crown crystal
    curtain dancer desert diamond dinner doctor donkey dragon drawer dream eagle elbow engine falcon farmer feather
    fence ferry festival fiddle field finger flame flower forest fountain fox garden garlic gate ghost giant ginger
    glacier glass globe goat grape gravel guitar hammer harbor harvest hat hawk helmet hill honey horse hotel island
    ivory jacket jewel jungle kettle kitchen kitten knife ladder lake lantern leaf lemon letter library lion lobster
    magnet maple marble market meadow melon mirror monkey morning mountain museum needle nest novel oak ocean olive
    onion orange orchard owl palace paper parrot pepper piano pillow pirate planet pocket potato prince puzzle rabbit
    radio rain ribbon river road robin rocket rope salmon sand school shadow shell shield ship silver snow soldier
    spider spoon spring square stable statue stone storm stream sugar summer table temple tent thunder tiger tower
    train tulip tunnel turtle valley velvet village violin wagon wheel window winter wolf yard zebra
""".split()


class ContextTooShort(UserError):
    """A context in which a retrieval task has no room."""


@dataclass(frozen=True)
class Probe:
    """Rows of one retrieval task at one context length.

    Attributes:
        input_ids: token ids (N, T), int64.
        answer_mask: scored tokens (N, T), bool; the logits at p - 1 predict the token at p.
        question_start: position (N,) of the question with its answers, int64; the facts are before it.
        per_token: True if accuracy is counted per token (copying), else per answer.
        depth: position (N,) of the fact that answers the question, from 0 at the start of the surrounding text to 1 at
            its end; None if the task has no single fact.

    Raises ValueError for shapes or masks that violate this.
    """

    input_ids: Tensor
    answer_mask: Tensor
    question_start: Tensor
    per_token: bool = False
    depth: Tensor | None = None

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 2 or self.input_ids.shape != self.answer_mask.shape:
            raise ValueError("a Probe needs input_ids and answer_mask of the same shape (rows, context)")
        if self.question_start.shape != self.input_ids.shape[:1]:
            raise ValueError("a Probe needs one question_start for each row")
        if self.answer_mask[:, 0].any() or not self.answer_mask.any(dim=1).all():
            raise ValueError("every row of a Probe needs an answer, which cannot be its first token")
        if (self.answer_mask.int().argmax(dim=1) < self.question_start).any():
            raise ValueError("the answers of a Probe belong to its questions: none can come before question_start")

    def rows(self, selection: slice) -> "Probe":
        """Select rows."""
        return self._map_tensors(lambda part: part[selection])

    def repeated(self, times: int) -> "Probe":
        """Repeat all rows `times` times."""
        return self._map_tensors(lambda part: part.repeat(times, *[1] * (part.ndim - 1)))

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> "Probe":
        parts: dict[str, Any] = {name: change(part) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **parts)

    def exchanged(self) -> "Probe":
        """Combine each question and answer with the facts of the previous row (for the first row, of the last).

        Raises `UserError` for a probe of one row.
        """
        rows, length = self.input_ids.shape
        if rows < 2:
            raise UserError("a retrieval probe of one row cannot exchange facts with another row: raise the count")
        in_question = torch.arange(length) >= self.question_start[:, None]
        return replace(self, input_ids=self.input_ids.where(in_question, self.input_ids.roll(1, dims=0)), depth=None)


def make_probe(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    count: int,
    seed: int = 0,
    haystack_ids: Tensor | None = None,
) -> Probe:
    """Make `count` rows of the task `name` (one of `PROBE_TASKS`), each exactly `context` tokens long.

    `haystack_ids` are tokens of real text (any shape, read flat) that fill the space between a fact and its question. A
    row takes a passage from a random position and wraps around at the end. Without them, a short text is repeated, in
    which `questions` finds nothing to ask. If the tokenizer starts texts with a special token (`<bos>`), so does every
    row.
    Raises `UserError` for an unknown task, a haystack without text or without a sentence to ask about, or a tokenizer
    that has no tokens for the answers, and `ContextTooShort` for a context too short for the task.
    """
    if name not in _ROWS:
        raise UserError(f"unknown retrieval task '{name}': {nearest(name, _ROWS)}")
    if count < 1:
        raise UserError(f"a retrieval probe needs at least one row, not {count}: raise the count")
    text = _Text(tokenizer, haystack_ids)
    rows, answers, starts, depths = [], [], [], []
    for row in range(count):
        facts, question, answer, depth = _ROWS[name](
            text, context, random.Random(f"{name} {context} {seed} {row}"), row
        )
        rows.append(facts + question)
        answers.append([False] * len(facts) + answer)
        starts.append(len(facts))
        depths += [] if depth is None else [depth]
    return Probe(
        torch.tensor(rows),
        torch.tensor(answers),
        torch.tensor(starts),
        per_token=name in _PER_TOKEN,
        depth=torch.tensor(depths) if depths else None,
    )


class _Text:
    """A tokenizer with the parts of a probe: the start of a row, the haystack and the plain tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, haystack_ids: Tensor | None):
        self.tokenizer = tokenizer
        self.special_ids = set(tokenizer.all_special_ids)
        self.special_ids |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        bare_ids = self.encode("a")
        text_ids = tokenizer("a")["input_ids"]
        self.start: list[int] = text_ids[: text_ids.index(bare_ids[0])] if bare_ids and bare_ids[0] in text_ids else []
        self.newline = self.encode("\n")
        self.haystack_ids = haystack_ids

    @cached_property
    def haystack(self) -> list[int]:
        """Tokens that fill a row, without document separators."""
        ids = self.encode(FILLER * 8) if self.haystack_ids is None else self.haystack_ids.flatten().tolist()
        ids = [index for index in ids if index not in self.special_ids]
        if not ids:
            raise UserError(
                "the haystack of the retrieval probes has no text: give more text, or none to use the built-in filler"
            )
        return ids

    @cached_property
    def plain(self) -> list[int]:
        """Sorted ids of all tokens that are not special."""
        return sorted(set(self.tokenizer.get_vocab().values()) - self.special_ids)

    @cached_property
    def haystack_text(self) -> str:
        """The haystack as text."""
        return self.decode(self.haystack)

    def decode(self, ids: list[int]) -> str:
        return well_formed(str(self.tokenizer.decode(ids)))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode_exact(self, text: str) -> list[int]:
        """Encode a text whose letters all matter. Raises `UserError` if the tokenizer lacks a token for it."""
        return self._require_known(self.encode(text), text.strip())

    def _require_known(self, ids: list[int], text: str) -> list[int]:
        if not ids or self.tokenizer.unk_token_id in ids:
            raise UserError(f"this tokenizer has no tokens for '{text}': leave out the retrieval tasks about numbers")
        return ids

    def question(self, question: str, answer: str) -> tuple[list[int], list[bool]]:
        """Encode the question with its answer. Also returns a mask of the scored tokens.

        Scored are the tokens after the question, without a separate space before a number, which needs no recall.
        """
        question_ids, ids = self.encode(question), self.encode(f"{question} {answer}")
        first_scored = next(
            (i for i, (a, b) in enumerate(zip(question_ids, ids, strict=False)) if a != b), len(question_ids)
        )
        while first_scored < len(ids) - 1 and not self.decode([ids[first_scored]]).strip():
            first_scored += 1
        answer_ids = self._require_known(ids[first_scored:], answer)
        return ids, [False] * first_scored + [True] * len(answer_ids)

    def fill(self, length: int, rng: random.Random) -> list[int]:
        """Take `length` tokens of haystack from a random position, ending in a newline if there is room."""
        ids = self.stretch(rng.randrange(len(self.haystack)), length)
        return (ids + self.newline)[len(self.newline) :]

    def stretch(self, start: int, length: int) -> list[int]:
        """Take `length` tokens of haystack from `start` on, wrapping around at the end."""
        return [self.haystack[(start + i) % len(self.haystack)] for i in range(length)]


# The facts of a row, its question with the answers, the mask of scored tokens in the question, and the depth of the
# fact that answers it (None if there is no single one).
Row: TypeAlias = tuple[list[int], list[int], list[bool], float | None]


def _copy_row(text: _Text, context: int, rng: random.Random, row: int) -> Row:
    length = (context - len(text.start)) // 2
    if length < 2:
        raise ContextTooShort(_too_short("copy", context, len(text.start) + 4))
    # Each token occurs once if the vocabulary allows, so that a token determines its successor.
    sequence = rng.sample(text.plain, length) if length <= len(text.plain) else rng.choices(text.plain, k=length)
    padding = rng.choices(text.plain, k=context - len(text.start) - 2 * length)
    # The first token of the second copy cannot be predicted.
    return text.start + padding + sequence, sequence, [False] + [True] * (length - 1), None


def _dictionary_row(text: _Text, context: int, rng: random.Random, row: int) -> Row:
    pairs = list(zip(rng.sample(WORDS, MAX_PAIRS), rng.sample(range(100), MAX_PAIRS), strict=True))
    target = rng.random()

    def build(count: int) -> tuple[list[int], list[int], list[bool]]:
        key, value = pairs[int(target * count)]
        lines = (DICTIONARY_LINE.format(key=key, value=value) for key, value in pairs[:count])
        dictionary = text.encode(DICTIONARY_TITLE + "".join(lines))
        return text.start + dictionary, *text.question(DICTIONARY_QUESTION.format(key=key), str(value))

    def length(count: int) -> int:
        dictionary, question, _ = build(count)
        return len(dictionary) + len(question)

    if length(2) > context:
        raise ContextTooShort(_too_short("dictionary", context, length(2)))
    low, high = 2, MAX_PAIRS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if length(middle) <= context else (low, middle - 1)
    dictionary, question, answer = build(low)
    depth = int(target * low) / low * len(dictionary) / (context - len(question))  # lines have about equal lengths
    return dictionary + text.fill(context - len(dictionary) - len(question), rng), question, answer, depth


def _passkey_row(text: _Text, context: int, rng: random.Random, row: int) -> Row:
    key = str(rng.randrange(10_000, 100_000))
    intro = text.start + text.encode(PASSKEY_TITLE)
    needle = text.encode(PASSKEY_NEEDLE.format(key=key))
    question, answer = text.question(PASSKEY_QUESTION, key)
    room = context - len(intro) - len(needle) - len(question)
    if room < 0:
        raise ContextTooShort(_too_short("passkey", context, context - room))
    needle_position = int(_spread(rng, row) * (room + 1))
    facts = intro + text.fill(needle_position, rng) + needle + text.fill(room - needle_position, rng)
    return facts, question, answer, needle_position / max(room, 1)


def _associative_row(text: _Text, context: int, rng: random.Random, row: int) -> Row:
    slots, padding = divmod(context - len(text.start), 2)
    if slots < 4:
        raise ContextTooShort(_too_short("associative", context, len(text.start) + 8))
    # If a small vocabulary has too few tokens to fill half of the row with pairs, each pair is asked several times.
    count = min(slots - slots // 2, (len(text.plain) - 1) // 2)
    padding_id, *tokens = rng.sample(text.plain, 2 * count + 1)
    pairs = list(zip(tokens[:count], tokens[count:], strict=True))
    rounds = [pair for _ in range(0, slots, count) for pair in rng.sample(pairs, count)]
    facts = [token for pair in pairs for token in pair]
    question = [token for pair in rounds[: slots - count] for token in pair]
    return text.start + [padding_id] * padding + facts, question, [False, True] * (slots - count), None


def _variables_row(text: _Text, context: int, rng: random.Random, row: int) -> Row:
    letters, values = rng.sample(ascii_uppercase, 25), rng.sample(range(10_000, 100_000), 5)
    target = rng.random()
    intro = text.start + text.encode("Keep track of the variables that are assigned in the following text.\n")

    def build(chains: int, hops: int) -> tuple[list[list[list[int]]], list[int], list[bool]]:
        lines, ends = [], []
        for chain, value in enumerate(values[:chains]):
            names = letters[chain * (hops + 1) :][: hops + 1]
            sources = [str(value), *names]  # one more than names, as the last name is not assigned on
            assignments = zip(names, sources, strict=False)
            lines.append([text.encode_exact(f"VAR {name} = {source}\n") for name, source in assignments])
            ends.append((names[-1], str(value)))
        name, answer = ends[int(target * chains)]
        return lines, *text.question(f"What is the value of VAR {name}? The value of VAR {name} is", answer)

    for shape in CHAINS_AND_HOPS:
        lines, question, answer = build(*shape)
        room = context - len(intro) - len(question) - sum(len(line) for chain in lines for line in chain)
        if 2 * room >= context:
            break
    if room < 0:
        raise ContextTooShort(_too_short("variables", context, context - room))
    order = [chain for chain in lines for _ in chain]
    rng.shuffle(order)
    facts, filled_length = intro, 0
    for position, chain in zip(sorted(rng.randint(0, room) for _ in order), order, strict=True):
        facts = facts + text.fill(position - filled_length, rng) + chain.pop(0)
        filled_length = position
    return facts + text.fill(room - filled_length, rng), question, answer, None


def _questions_row(text: _Text, context: int, rng: random.Random, row: int) -> Row:
    room, haystack_length = context - len(text.start), len(text.haystack)
    first_start = int(_spread(rng, row) * haystack_length)
    for start in range(first_start, first_start + haystack_length, max(1, room // 2)):
        passage = text.stretch(start, room)
        # Answers that occur once in all of the text are the hardest to guess.
        candidates = [cloze for cloze in clozes(text.decode(passage)) if text.haystack_text.count(cloze.answer) == 1]
        for cloze in rng.sample(candidates, len(candidates)):
            question, answer = text.question(f"\nComplete this sentence of the text: {cloze.lead}", cloze.answer)
            facts = passage[: max(0, room - len(question))]
            text_before, match, _ = text.decode(facts).partition(str(cloze))
            if match:
                return text.start + facts, question, answer, len(text_before) / len(text.decode(facts))
    raise UserError(
        f"the retrieval task 'questions' finds nothing to ask in {haystack_length} tokens, {context} at a time: "
        "give it more real text or a longer context, or leave it out"
    )


def _spread(rng: random.Random, row: int) -> float:
    """Draw a depth in 0 to 1, such that the depths of consecutive rows are spread evenly."""
    return (rng.random() / 8 + row * GOLDEN) % 1


def _too_short(name: str, context: int, needed: int) -> str:
    return f"a context of {context} tokens is too short for the retrieval task '{name}': give it {needed} or more"


_ROWS: dict[str, Callable[[_Text, int, random.Random, int], Row]] = {
    "copy": _copy_row,
    "dictionary": _dictionary_row,
    "passkey": _passkey_row,
    "associative": _associative_row,
    "variables": _variables_row,
    "questions": _questions_row,
}
_PER_TOKEN = ("copy", "associative")
PROBE_TASKS: Sequence[str] = tuple(_ROWS)
