"""Conversion of documents to token files.

Notable:
- Every document begins with the teacher's separator (`<|endoftext|>` or similar, or BOS if the tokenizer adds it to a
  text). A row that starts at a document start thus looks like pretraining data.
- Of every `period` documents of a source, the first goes to the part `test` and the second to `selection`. So a short
  source has both parts, and reading more of a source does not change its held-out documents.
- Sources are read in turns, always the one with the fewest tokens so far, until the token budget is reached. Then the
  training documents of all sources are interleaved in proportion, so every stretch of `train` is a fair mix.
- Tokens are written to one temporary file per source and part. Only the lengths of the documents stay in memory.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from transformers import PreTrainedTokenizerBase

from subquad.data.text_rows import Document, Row, Tally
from subquad.data.text_sources import TextSource
from subquad.errors import UserError
from subquad.utils import format as fmt

FORMAT = 1  # part of the cache's key; increase it if the same text would be packed differently
PARTS = ("train", "test", "selection")
Progress = Callable[[int, int | None], None]
Encode = Callable[[list[str]], list[np.ndarray]]
_TURN_CHARACTERS = 500_000
_PATIENCE = 10_000  # rows of a stream without one usable text, after which the field is taken to be a mistake


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex SHA-256 of everything that determines how a tokenizer splits text."""
    if tokenizer.is_fast:
        rules = tokenizer.backend_tokenizer.to_str()
    else:
        rules = type(tokenizer).__name__ + json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{rules}{document_separator(tokenizer)}".encode()).hexdigest()


def document_separator(tokenizer: PreTrainedTokenizerBase) -> int:
    """Find the token id that began or separated documents in pretraining.

    It is BOS if the tokenizer adds it to a text (Llama, Gemma, Mistral), otherwise `<|endoftext|>` (GPT-2, Qwen,
    SmolLM2), otherwise EOS or BOS. EOS comes last because in instruction-tuned models it may end a turn instead.

    Raises:
        UserError: the tokenizer has none of these.
    """
    first_ids = tokenizer("a")["input_ids"][:1]
    if first_ids and first_ids[0] == tokenizer.bos_token_id:
        return first_ids[0]
    if (endoftext := tokenizer.get_vocab().get("<|endoftext|>")) is not None:
        return endoftext
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if isinstance(token, int):
            return token
    raise UserError("the tokenizer has no token that separates documents (EOS or BOS): use the teacher's own tokenizer")


@dataclass
class _Reader:
    """One source being tokenised. Tokens go to one file per part; the lengths of the documents stay in memory."""

    source: TextSource
    rows: Iterator[Row]
    files: dict[str, BinaryIO]
    tally: Tally
    lengths: dict[str, array] = field(default_factory=lambda: {part: array("q") for part in PARTS})
    digest: Any = field(default_factory=hashlib.sha256)
    document_count: int = 0
    exhausted: bool = False

    def tokens(self, part: str = "train") -> int:
        return sum(self.lengths[part])

    def take(self, characters: int, period: int, encode: Encode, room: int | None) -> int:
        """Tokenise the next documents. Returns the number of training tokens added, at most `room`."""
        texts, parts = [], []
        for row in self.rows:
            if not (text := self.tally.text(row)):
                if self.source.endless and self.tally.rows >= _PATIENCE and not self.tally.usable:
                    raise self.unusable()
                continue
            self.digest.update(text.encode() + b"\0")
            if isinstance(row, Document) and row.test:
                part = "test"
            else:
                part = {0: "test", 1: "selection"}.get(self.document_count % period, "train")
                self.document_count += 1
            texts.append(text)
            parts.append(part)
            characters -= len(text)
            if characters <= 0:
                break
        else:
            self.exhausted = True
        train_tokens = 0
        for ids, part in zip(encode(texts), parts, strict=True):
            if part == "train":
                ids = ids if room is None else ids[: room - train_tokens]
                train_tokens += len(ids)
            if len(ids):
                self.files[part].write(ids.tobytes())  # numpy's tofile hides the cause of a failed write
                self.lengths[part].append(len(ids))
        return train_tokens

    def unusable(self) -> UserError:
        """Error for a source without one usable row, which begins with what is wrong with the first."""
        if not self.tally.rows:
            return UserError(f"the text '{self.source.name}' is empty")
        rows = fmt.count(self.tally.rows, "row")
        return UserError(f"{self.tally.first_skipped} (none of the {rows} of '{self.source.name}' can be used)")


def pack(
    sources: list[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None,
    period: int,
    progress: Progress | None,
    folder: Path,
) -> None:
    """Tokenise `sources` into `folder`: train.npy, heldout.npy (uint16, or uint32 for large ids) and
    meta.json.

    Raises:
        UserError: a source is empty, or has too few documents to hold some out.
    """
    separator = document_separator(tokenizer)
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.uint32)

    def encode(texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [np.array([separator, *document], dtype=dtype) for document in ids]

    # Read the sources in turns, until the budget is reached or all are exhausted.
    with ExitStack() as stack:
        readers = []
        for number, source in enumerate(sources):
            parts = {part: (folder / f"{number}.{part}") for part in PARTS}
            files: dict[str, BinaryIO] = {part: stack.enter_context(path.open("wb")) for part, path in parts.items()}
            readers.append(_Reader(source, source.documents(), files, Tally(source.name)))
        train_tokens = [0] * len(readers)
        while active_readers := [n for n, reader in enumerate(readers) if not reader.exhausted]:
            room = None if max_tokens is None else max_tokens - sum(train_tokens)
            if room == 0:
                break
            reader_number = min(active_readers, key=train_tokens.__getitem__)
            # Turns get smaller near the end of the budget, so that a small budget is shared as fairly as a large one.
            turn = _TURN_CHARACTERS if room is None else min(_TURN_CHARACTERS, room // len(active_readers) + 1)
            train_tokens[reader_number] += readers[reader_number].take(turn, period, encode, room)
            if progress is not None:
                progress(sum(train_tokens), max_tokens)
    # Check that every exhausted source has training documents.
    for reader in readers:
        documents = sum(map(len, reader.lengths.values()))
        if reader.exhausted and not documents:
            raise reader.unusable()
        if reader.exhausted and not reader.tokens():
            raise UserError(
                f"the text '{reader.source.name}' has {documents} documents: at least three are needed, "
                f"as whole documents are held out{reader.tally.in_brackets()}"
            )
    # Write the token files and their description.
    _write_train(folder, readers, dtype)
    segments = _write_heldout(folder, readers, dtype)
    meta = {
        "format": FORMAT,
        "separator": separator,
        "dtype": dtype.name,
        "max_tokens": max_tokens,
        "tokens": {"train": sum(train_tokens), "heldout": segments[-1]["stop"]},
        "sources": [
            {
                "name": reader.source.name,
                "license": reader.source.license,
                "sha256": reader.digest.hexdigest(),
                "documents": {part: len(lengths) for part, lengths in reader.lengths.items()},
                "tokens": {part: reader.tokens(part) for part in reader.lengths},
                **reader.tally.record(),
            }
            for reader in readers
        ],
        "heldout": segments,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _write_train(folder: Path, readers: list[_Reader], dtype: np.dtype) -> None:
    """Write train.npy, with each source's documents spread evenly over the length."""
    lengths = [np.array(reader.lengths["train"], dtype=np.int64) for reader in readers]
    ends = [np.cumsum(sizes) for sizes in lengths]
    middles = np.concatenate([(end - size / 2) / max(1, size.sum()) for end, size in zip(ends, lengths, strict=True)])
    owners = np.repeat(np.arange(len(readers)), [len(sizes) for sizes in lengths])[np.argsort(middles, kind="stable")]
    tokens = [_spilled(folder, number, "train", dtype) for number in range(len(readers))]

    def in_order() -> Iterator[np.ndarray]:
        positions = [0] * len(readers)
        document_index = [0] * len(readers)
        for owner in owners:  # a source keeps its order, so its file is read sequentially
            start, document_index[owner] = positions[owner], document_index[owner] + 1
            positions[owner] = ends[owner][document_index[owner] - 1]
            yield tokens[owner][start : positions[owner]]

    _write_npy(folder / "train.npy", dtype, sum(map(len, tokens)), in_order())
    _remove_spilled(folder, "train")


def _write_heldout(folder: Path, readers: list[_Reader], dtype: np.dtype) -> list[dict[str, Any]]:
    """Write heldout.npy, with one segment for each part of each source. Returns the segments."""
    segments, position, tokens = [], 0, []
    for part in ("test", "selection"):
        for number, reader in enumerate(readers):
            if size := reader.tokens(part):
                segments.append(
                    {"source": reader.source.name, "part": part, "start": position, "stop": position + size}
                )
                tokens.append(_spilled(folder, number, part, dtype))
                position += size
    _write_npy(folder / "heldout.npy", dtype, position, tokens)
    for part in ("test", "selection"):
        _remove_spilled(folder, part)
    return segments


def _write_npy(path: Path, dtype: np.dtype, length: int, stretches: Iterable[np.ndarray]) -> None:
    """Write a 1-D .npy file sequentially: on a full disk a write raises, where a memory map kills the process."""
    with path.open("wb", buffering=1 << 20) as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, header)
        for stretch in stretches:
            file.write(stretch.tobytes())


def _spilled(folder: Path, number: int, part: str, dtype: np.dtype) -> np.ndarray:
    path = folder / f"{number}.{part}"
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)  # an empty file cannot be mapped


def _remove_spilled(folder: Path, part: str) -> None:
    for path in folder.glob(f"*.{part}"):
        path.unlink()
