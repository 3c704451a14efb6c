"""Curriculum of the small teacher: its tokenizer, and rows of text, repetition and retrieval.

Notable:
- The tokenizer is trained on the default text and on the prompts of the probes, so each word of a prompt is one token.
- Copying is taught with repeated sequences, and each row has its own period. With one period for all rows, a model
  learns to look back a fixed distance instead of matching the content.
- In most of these sequences two tokens are so common that the previous token does not determine the next one. A model
  then learns to match several previous tokens, as dictionary values need. Plain repetition does not teach that.
- A dictionary row is filled with questions, because one answer among hundreds of tokens teaches slowly. Questions have
  several forms, from the dictionary line itself to the probe's sentence. The distance between key and answer grows from
  form to form. A model that copies can answer the first form, and each next form is a small step.

Shapes: B rows, T tokens, N problems of C tokens.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from subquad.data.corpora import default_sources
from subquad.data.packing import document_separator
from subquad.data.probes import DICTIONARY_LINE, DICTIONARY_QUESTION, DICTIONARY_TITLE, WORDS, make_probe
from subquad.data.text import Corpus
from subquad.data.text_rows import Document, Tally
from subquad.data.text_sources import open_source

SEPARATOR = "<|endoftext|>"
VOCABULARY = 1024
TOKENIZER_CHARACTERS = 1_000_000  # characters of each source that train the tokenizer
PROMPTS_REPEATED = 1000  # repetitions of the probes' words in that text, so that each becomes one token
# Words, digits, punctuation and space. No contractions, which would split a quoted 'dinner' differently.
PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s+"

SHORTEST = {"dictionary": 64, "passkey": 128}  # shortest rows of a task, in tokens
TRAINING_SEEDS = 10**9  # training probes use seeds from this one on, evaluation probes lower ones
PROBE_SHARE = 0.25  # share of the copying and dictionary rows that are the probes themselves

FORMS = (DICTIONARY_LINE, "{key} is {value}\n", "'{key}' is {value}\n", f"{DICTIONARY_QUESTION} {{value}}\n")
PASSKEY = "There is a pass key hidden in a lot of irrelevant text. Find it and memorize it. Remember it. What is it?"
FILLERS = ((0, 1, 2), (0, 1), (0, 1, 3), (0, 1, 2, 3))  # lengths: between and after; in questions, before and between
COMMON_SHARES = (0.0, 0.3, 0.5)  # shares of a repeated sequence that its two common tokens fill
LAST_FORM_SHARE = 0.4  # share of the questions in the last form, the probe's


def train_tokenizer(data: list[str] | None = None) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `VOCABULARY` tokens with single digits and one special token, `<|endoftext|>`."""
    tokenizer = Tokenizer(models.BPE())
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR],
        initial_alphabet=bytes_only.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(data), trainer)
    roles = dict.fromkeys(("bos_token", "eos_token", "pad_token"), SEPARATOR)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def _tokenizer_texts(data: list[str] | None) -> Iterator[str]:
    for source in default_sources() if data is None else map(open_source, data):
        room, tally = TOKENIZER_CHARACTERS, Tally(source.name)
        for row in source.documents():
            if room <= 0:
                break
            if (text := tally.text(row)) and isinstance(row, Document) and not row.test:
                yield text
                room -= len(text)
    yield from ["\n".join([*WORDS, DICTIONARY_TITLE, *FORMS, PASSKEY])] * PROMPTS_REPEATED


@dataclass(frozen=True)
class Lessons:
    """Rows of text, repetition and retrieval as a `TokenSource`. A batch depends on (seed, step) only."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast

    def batch(self, step: int, *, batch: int, sequence_length: int, seed: int) -> Tensor:
        """Make the rows of one step: ids_BT, int64. Raises UserError if the text is shorter than one row."""
        rng = random.Random(f"lessons {seed} {step}")
        weights = shares(sequence_length)
        row_tasks = rng.choices([*weights, "text"], [*weights.values(), 1 - sum(weights.values())], k=batch)
        rows = {task: row_tasks.count(task) for task in weights}
        text_rows = row_tasks.count("text")
        text_BT = self.corpus.batch(step, batch=max(1, text_rows), sequence_length=sequence_length, seed=seed)
        makers = {
            "copy": self.copying,
            "associations": self.associations,
            "dictionary": self.dictionaries,
            "passkey": self.pass_keys,
        }
        tasks = [makers[task](count, text_BT, rng) for task, count in rows.items() if count]
        return torch.cat([text_BT[:text_rows], *tasks])

    def copying(self, rows: int, text_BT: Tensor, rng: random.Random) -> Tensor:
        """Make rows (rows, T) of a repeated sequence. Some are the probe, which has the sequence twice."""
        length = text_BT.shape[1]
        probes = sum(rng.random() < PROBE_SHARE for _ in range(rows)) if length >= SHORTEST["dictionary"] else 0
        sequences = [self.repeat_sequence(length, rng) for _ in range(rows - probes)]
        return torch.cat([self.probes("copy", probes, text_BT, rng), _rows(sequences, length)])

    def repeat_sequence(self, length: int, rng: random.Random) -> list[int]:
        """Make `length` tokens of a repeated random sequence. In most rows, two common tokens fill part of it."""
        period = rng.randint(4, length // 2)
        sequence, common_ids = rng.sample(self._plain_ids, period), rng.sample(self._plain_ids, 2)
        share = rng.choice(COMMON_SHARES)
        sequence = [rng.choice(common_ids) if rng.random() < share else index for index in sequence]
        return (sequence * (length // period + 1))[:length]

    def associations(self, rows: int, text_BT: Tensor, rng: random.Random) -> Tensor:
        """Make rows (rows, T) of pairs of random tokens, followed by the same pairs in random orders."""
        length = text_BT.shape[1]
        return _rows([self.pairs(length, rng) for _ in range(rows)], length)

    def pairs(self, length: int, rng: random.Random) -> list[int]:
        """Make pairs `key, between, value, after`, then questions, in `length` tokens.

        All pairs have the same few tokens between and after. Questions may have different tokens before and between.
        """
        fillers = [rng.sample(self._plain_ids, rng.choice(lengths)) for lengths in FILLERS]
        between_ids, after_ids, question_before_ids, question_between_ids = fillers
        same_format = rng.random() < 0.5
        count = rng.randint(2, max(2, int(0.4 * length) // (2 + len(between_ids) + len(after_ids))))
        keys, values = rng.sample(self._plain_ids, count), rng.sample(self._plain_ids, count)
        pairs = list(zip(keys, values, strict=True))
        ids = [index for key, value in pairs for index in (key, *between_ids, value, *after_ids)]
        if not same_format:
            between_ids, after_ids = question_between_ids, after_ids + question_before_ids
        while len(ids) < length:
            questions = rng.sample(pairs, count)
            ids += [index for key, value in questions for index in (key, *between_ids, value, *after_ids)]
        return ids[:length]

    def dictionaries(self, rows: int, text_BT: Tensor, rng: random.Random) -> Tensor:
        """Make rows (rows, T) of a dictionary and questions about it. Some are the probe."""
        length = text_BT.shape[1]
        probes = sum(rng.random() < PROBE_SHARE for _ in range(rows)) if length > SHORTEST["dictionary"] else 0
        question_rows = [self.questions(length, rng) for _ in range(rows - probes)]
        return torch.cat([self.probes("dictionary", probes, text_BT, rng), _rows(question_rows, length)])

    def questions(self, length: int, rng: random.Random) -> list[int]:
        """Make a dictionary and questions about it, in all forms, in `length` tokens."""
        line = len(self._encode(DICTIONARY_LINE.format(key=WORDS[0], value=10)))
        max_pairs = max(2, int(0.7 * length) // line - 2)
        count = rng.randint(2, min(max_pairs, 100))
        pairs = list(zip(rng.sample(WORDS, count), rng.sample(range(100), count), strict=True))
        text = DICTIONARY_TITLE + "".join(DICTIONARY_LINE.format(key=key, value=value) for key, value in pairs)
        ids = self._encode(text)
        while len(ids) < length:
            for key, value in rng.sample(pairs, count):
                form = FORMS[-1] if rng.random() < LAST_FORM_SHARE else rng.choice(FORMS[:-1])
                ids += self._encode(form.format(key=key, value=value))
                if len(ids) >= length:
                    break
        return ids[:length]

    def pass_keys(self, rows: int, text_BT: Tensor, rng: random.Random) -> Tensor:
        """Make rows (rows, T) of pass keys in text."""
        return self.probes("passkey", rows, text_BT, rng)

    def probes(self, task: str, rows: int, text_BT: Tensor, rng: random.Random) -> Tensor:
        """Make rows (rows, T) of the probe `task`, one per row, in text or in the probe's own filler."""
        length = text_BT.shape[1]
        if not rows:
            return _rows([], length)
        ids_NC = make_probe(
            task,
            self.tokenizer,
            length - 1,
            max(8, rows),  # the rows of a probe spread the depth of the pass key
            seed=rng.randrange(TRAINING_SEEDS, 2 * TRAINING_SEEDS),
            haystack_ids=rng.choice([None, text_BT]),
        ).input_ids
        return F.pad(ids_NC[rng.sample(range(len(ids_NC)), rows)], (0, 1), value=document_separator(self.tokenizer))

    @cached_property
    def _plain_ids(self) -> list[int]:
        """Ids of all tokens that are not special."""
        return sorted(set(range(len(self.tokenizer))) - {*self.tokenizer.all_special_ids})

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _rows(rows: list[list[int]], length: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.long).view(-1, length)  # keeps the length of zero rows


def shares(length: int) -> dict[str, float]:
    """Probability of each task for a row of `length` tokens; the remaining rows are text.

    Short rows only copy. The dictionary takes longest to learn.
    """
    if length < SHORTEST["dictionary"]:
        return {"copy": 1.0}
    if length < SHORTEST["passkey"]:
        return {"copy": 0.25, "associations": 0.5, "dictionary": 0.25}
    return {"copy": 0.2, "associations": 0.2, "dictionary": 0.25, "passkey": 0.2}
