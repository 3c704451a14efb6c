"""What the small teacher learns from: its tokenizer, and rows of text, repetition and retrieval.

Notable:
- The tokenizer is trained on the default text and on the prompts of the probes: every word of these is a token.
- Copying is taught by sequences repeated over and over, with a period of its own in each row: with one period for all,
  a model learns to look so many tokens back, and not to look for what it has read.
- In most of these sequences two tokens are so common that the one before does not tell what comes next: a model learns
  to look several tokens back, as the values of a dictionary need. From plain repetition it does not.
- A dictionary is asked as many questions as the row holds, since one answer among hundreds of tokens teaches slowly,
  and in several forms, from the line of the dictionary itself to the probe's sentence. In these the key lies ever
  further from the answer: a model that copies can do the first, and each is one step from the one before.

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
from subquad.data.text_sources import clean, open_source

SEPARATOR = "<|endoftext|>"
VOCABULARY = 1024
TOKENIZER_CHARACTERS = 1_000_000  # of each source that the tokenizer learns from
PROMPTS_REPEATED = 1000  # times that the probes' words stand in that text: each becomes one token
# Words, digits, punctuation, space: no contractions, which would make 'dinner' in quotes another word than dinner.
PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s+"

SHORTEST = {"dictionary": 64, "passkey": 128}  # tokens of a problem
TRAINING_SEEDS = 10**9  # probes are trained on seeds from here on, and measured on seeds below
PROBE_SHARE = 0.25  # of the copying and dictionary rows are the probes themselves

FORMS = (DICTIONARY_LINE, "{key} is {value}\n", "'{key}' is {value}\n", f"{DICTIONARY_QUESTION} {{value}}\n")
PASSKEY = "There is a pass key hidden in a lot of irrelevant text. Find it and memorize it. Remember it. What is it?"
FILLERS = ((0, 1, 2), (0, 1), (0, 1, 3), (0, 1, 2, 3))  # lengths: between and after, in questions before and between
COMMON_SHARES = (0.0, 0.3, 0.5)  # shares of the places of a repeated sequence that its two common tokens take
LAST_FORM_SHARE = 0.4  # of the questions are in the last form, the probe's


def train_tokenizer(data: list[str] | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens with single digits; `<|endoftext|>` is its only special token."""
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
        room = TOKENIZER_CHARACTERS
        for document in source.documents():
            if room <= 0:
                break
            if not document.test:
                yield (text := clean(document.text))
                room -= len(text)
    yield from ["\n".join([*WORDS, DICTIONARY_TITLE, *FORMS, PASSKEY])] * PROMPTS_REPEATED


@dataclass(frozen=True)
class Lessons:
    """Rows of text, of repetition and of retrieval: a `TokenSource`, a function of (seed, step) alone."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast

    def batch(self, step: int, *, batch: int, sequence_length: int, seed: int) -> Tensor:
        """The rows of one step: ids_BT, int64. Raises UserError if the text is shorter than one row."""
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
        """Rows (rows, T) of a sequence, over and over; some are the probe, with the sequence twice."""
        length = text_BT.shape[1]
        probes = sum(rng.random() < PROBE_SHARE for _ in range(rows)) if length >= SHORTEST["dictionary"] else 0
        sequences = [self.repeat_sequence(length, rng) for _ in range(rows - probes)]
        return torch.cat([self.probes("copy", probes, text_BT, rng), _rows(sequences, length)])

    def repeat_sequence(self, length: int, rng: random.Random) -> list[int]:
        """`length` tokens of a random sequence, over and over; in most rows, two tokens stand in many of its places."""
        period = rng.randint(4, length // 2)
        sequence, common_ids = rng.sample(self._plain_ids, period), rng.sample(self._plain_ids, 2)
        share = rng.choice(COMMON_SHARES)
        sequence = [rng.choice(common_ids) if rng.random() < share else index for index in sequence]
        return (sequence * (length // period + 1))[:length]

    def associations(self, rows: int, text_BT: Tensor, rng: random.Random) -> Tensor:
        """Rows (rows, T) of pairs of random tokens, then of these pairs again, in any order, to the end."""
        length = text_BT.shape[1]
        return _rows([self.pairs(length, rng) for _ in range(rows)], length)

    def pairs(self, length: int, rng: random.Random) -> list[int]:
        """Pairs `key, between, value, after`, with the same few tokens between and after in all; then questions, where
        other tokens may stand before and between."""
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
        """Rows (rows, T) of dictionaries, each with questions about it to the end; some are the probe."""
        length = text_BT.shape[1]
        probes = sum(rng.random() < PROBE_SHARE for _ in range(rows)) if length > SHORTEST["dictionary"] else 0
        question_rows = [self.questions(length, rng) for _ in range(rows - probes)]
        return torch.cat([self.probes("dictionary", probes, text_BT, rng), _rows(question_rows, length)])

    def questions(self, length: int, rng: random.Random) -> list[int]:
        """A dictionary and questions about it, in all forms, `length` tokens."""
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
        """Rows (rows, T) of pass keys in text."""
        return self.probes("passkey", rows, text_BT, rng)

    def probes(self, task: str, rows: int, text_BT: Tensor, rng: random.Random) -> Tensor:
        """Rows (rows, T) of the probe `task`, one to a row, in text or in the probe's own filler."""
        length = text_BT.shape[1]
        if not rows:
            return _rows([], length)
        ids_NC = make_probe(
            task,
            self.tokenizer,
            length - 1,
            max(8, rows),  # a pass key lies at a depth of its own in every row of a probe
            seed=rng.randrange(TRAINING_SEEDS, 2 * TRAINING_SEEDS),
            haystack_ids=rng.choice([None, text_BT]),
        ).input_ids
        return F.pad(ids_NC[rng.sample(range(len(ids_NC)), rows)], (0, 1), value=document_separator(self.tokenizer))

    @cached_property
    def _plain_ids(self) -> list[int]:
        """Every token that is not special."""
        return sorted(set(range(len(self.tokenizer))) - {*self.tokenizer.all_special_ids})

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _rows(rows: list[list[int]], length: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.long).view(-1, length)  # none at all have a length, too


def shares(length: int) -> dict[str, float]:
    """Chances of a row; else it is text. Copying comes first, then the dictionary, which takes longest to learn."""
    if length < SHORTEST["dictionary"]:
        return {"copy": 1.0}
    if length < SHORTEST["passkey"]:
        return {"copy": 0.25, "associations": 0.5, "dictionary": 0.25}
    return {"copy": 0.2, "associations": 0.2, "dictionary": 0.25, "passkey": 0.2}
