"""Text as tokens: packed once, cached, and sampled without state.

Notable:
- Complete documents are held out in two disjoint parts: `test` for reported results, `selection` for choosing layers.
  Together they are `heldout`; training never sees them.
- A batch depends on (seed, step) only, so a resumed run just requests the next step.
- Tokens are memory-mapped, so a corpus may be larger than memory. packing.py describes their layout.

Shape suffixes: B rows, T positions.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from subquad.data.batch import epoch_order
from subquad.data.corpora import default_sources
from subquad.data.packing import FORMAT, Progress, pack, tokenizer_hash
from subquad.data.text_rows import COUNTS, remark
from subquad.data.text_sources import open_source
from subquad.errors import UserError
from subquad.utils.files import build_once, cache_dir

DEFAULT_MAX_TOKENS = 4_000_000  # of the default corpora; a user's own text is used completely
Part = Literal["test", "selection"]


@dataclass
class Corpus:
    """Packed tokens of several sources.

    Attributes:
        train, heldout: 1-D memory-mapped token ids.
        meta: `tokens` in train and heldout, the `separator` id, `sources` (name, license, SHA-256 of the texts used,
            documents and tokens by part; rows read, skipped by reason and repaired), and `heldout` (the segments with
            their source and part).
    """

    train: np.ndarray
    heldout: np.ndarray
    meta: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """Open the corpus that `load_corpus` wrote to `folder`."""
        train, heldout = (np.load(folder / name, mmap_mode="r") for name in ("train.npy", "heldout.npy"))
        return cls(train, heldout, json.loads((folder / "meta.json").read_text(encoding="utf-8")))

    def batch(self, step: int, *, batch: int, sequence_length: int, seed: int) -> torch.Tensor:
        """Read the training rows of one step: ids_BT, int64.

        Rows are non-overlapping windows of `train` in an order drawn from (seed, epoch). Each is read once an epoch.

        Raises:
            UserError: the training text is shorter than one sequence.
        """
        windows = len(self.train) // sequence_length
        if not windows:
            raise UserError(
                f"the training text has {len(self.train)} tokens, fewer than one sequence of {sequence_length}: "
                "give more text or a smaller sequence_length"
            )
        starts = []
        for row in range(step * batch, (step + 1) * batch):
            epoch, position = divmod(row, windows)
            starts.append(int(epoch_order(windows, seed, epoch)[position]) * sequence_length)
        return self._rows(self.train, starts, sequence_length)

    def sample(self, tokens: int) -> torch.Tensor:
        """Read one training row of `tokens` tokens, or of all if there are fewer: ids_BT, int64."""
        return self.batch(0, batch=1, sequence_length=min(tokens, len(self.train)), seed=0)

    @property
    def amount(self) -> str:
        """Amount of training data, as text for the console."""
        return f"{len(self.train):,} tokens of text to train on"

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Name and hash of each source, and the counts of its rows where some were skipped or repaired."""
        return [
            {key: source[key] for key in ("name", "sha256", *(COUNTS if remark(source) else ()))}
            for source in self.meta["sources"]
        ]

    @property
    def remarks(self) -> list[str]:
        """Sentences for the console on sources with rows that were skipped or repaired."""
        said = {source["name"]: remark(source) for source in self.meta["sources"]}
        return [f"{name}: {words}" for name, words in said.items() if words]

    def first(self, tokens: int) -> "Corpus":
        """Make a corpus with only the first `tokens` tokens of `train`."""
        return replace(self, train=self.train[:tokens])

    def heldout_batch(self, count: int, sequence_length: int, *, part: Part = "test") -> torch.Tensor:
        """Read held-out rows from the sources in turn, always the same: ids_BT, int64.

        The rows of a source are, in this order: the starts of documents that fill a row alone, concatenated short
        documents from a document start on, and further windows of long documents. Rows of a part do not overlap. There
        are fewer than `count` rows if the held-out text is short.

        Raises:
            UserError: the held-out text is shorter than one sequence.
        """
        segments = [segment for segment in self.meta["heldout"] if segment["part"] == part]
        by_source = [self._row_starts(segment["start"], segment["stop"], sequence_length) for segment in segments]
        interleaved_starts = [starts[turn] for turn in range(count) for starts in by_source if turn < len(starts)]
        if not interleaved_starts:
            longest = max((segment["stop"] - segment["start"] for segment in segments), default=0)
            raise UserError(
                f"the text held out for {part} has at most {longest} tokens per source, fewer than one sequence "
                f"of {sequence_length}: give more text, hold out a larger share (data.heldout_fraction) or ask for "
                "shorter contexts"
            )
        return self._rows(self.heldout, interleaved_starts[:count], sequence_length)

    def _row_starts(self, start: int, stop: int, length: int) -> list[int]:
        is_start = np.asarray(self.heldout[start:stop]) == self.meta["separator"]
        documents = [start + int(offset) for offset in np.flatnonzero(is_start)]
        first_windows: list[int] = []
        joined_windows: list[int] = []
        further_windows: list[int] = []
        free_position = start  # end of the last row of joined documents
        for begin, end in zip(documents, [*documents[1:], stop], strict=True):
            if end - begin >= length:
                if joined_windows and free_position > begin:  # the last row would overlap this document
                    joined_windows.pop()
                first_windows.append(begin)
                further_windows += range(begin + length, end - length + 1, length)
                free_position = end
            elif begin >= free_position and begin + length <= stop:
                joined_windows.append(begin)
                free_position = begin + length
        return first_windows + joined_windows + further_windows

    @staticmethod
    def _rows(tokens: np.ndarray, starts: list[int], length: int) -> torch.Tensor:
        return torch.from_numpy(np.stack([tokens[start : start + length] for start in starts]).astype(np.int64))


def load_corpus(
    sources: list[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None = None,
    heldout_fraction: float = 0.02,
    progress: Progress | None = None,
) -> Corpus:
    """Load the tokens of `sources`, packed once and cached under `cache_dir()/tokens`.

    Args:
        sources: files (.txt, .jsonl, .jsonl.gz, .parquet), folders of them, or data set ids
            `org/name[:config[:split[:column]]]`; None for the default corpora (corpora.py).
        max_tokens: largest number of training tokens; None takes all of the user's files, and 4 million tokens of the
            default corpora.
        heldout_fraction: share of each source's documents held out from training, half for `test` and half for
            `selection`; at least one document each.
        progress: called repeatedly with (training tokens so far, max_tokens).

    Raises:
        UserError: the text is missing, empty, damaged or too short, no row of a source can be used, or a stream has no
            `max_tokens`.
    """
    if not 0 < heldout_fraction <= 0.5:
        raise UserError(f"heldout_fraction is {heldout_fraction}: it must be above 0 and at most 0.5")
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}: it must be at least 1")
    text_sources = default_sources() if sources is None else [open_source(source) for source in sources]
    if not text_sources:
        raise UserError("no text was named: give files, folders or data set ids, or none at all for the default text")
    if sources is None and max_tokens is None:
        max_tokens = DEFAULT_MAX_TOKENS
    for source in text_sources:
        if source.endless and max_tokens is None:
            raise UserError(f"the data set '{source.name}' is streamed: say how many tokens to take (data.max_tokens)")
    period = round(2 / heldout_fraction)  # two of this many documents are held out, one for each part
    key = [FORMAT, tokenizer_hash(tokenizer), max_tokens, period, *([s.name, s.signature] for s in text_sources)]
    folder = cache_dir() / "tokens" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
    build_once(folder, partial(pack, text_sources, tokenizer, max_tokens, period, progress))
    return Corpus.open(folder)
