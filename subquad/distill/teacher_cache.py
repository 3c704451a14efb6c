"""The offline teacher: its likeliest next tokens, which cache_writer.py wrote down, looked up while students train.

    meta.json                  whose answers these are, what is planned, and the shards that are whole
    shard-00000.safetensors    ids_WTK          uint16 where the vocabulary fits, else int32
                               log_probs_WTK    float16, of the full softmax at temperature 1, descending
                               log_rest_WT      float16, log of the mass of all other tokens
                               key_W            int64, hash of the row's token ids

A row is one of the non-overlapping windows of `Corpus.train` that `Corpus.batch` draws; the cache holds the first ones.

Notable:
- All logarithms are finite: where no mass is left (top-k is the whole vocabulary), FLOOR stands, which is zero mass.
- float16 holds a log-probability to 5e-4 of itself, so what is stored does not quite sum to one. `lookup` divides by
  the sum: what a student learns from is a distribution over the top-k tokens and the rest.

Legend of tensor suffixes: W rows of a shard, B rows, T tokens, K top-k.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from subquad.distill.logit_losses import FromTopK
from subquad.errors import UserError
from subquad.utils.files import sha256_of_file

KIND, FORMAT = "subquad teacher cache", 1  # raise the format when an older reader would misread what is written
OPEN_SHARDS = 8
Meta = dict[str, Any]


class TeacherCache:
    """A finished cache, looked up by the token ids of whole rows.

    Attributes: `folder`, `meta` (meta.json), `rows`, `sequence_length` (tokens of a row), `tokens` (of all rows),
    `top_k` and `vocabulary`. In memory are only the rows' hashes and places, 16 bytes a row.
    """

    def __init__(self, folder: Path, meta: Meta) -> None:
        self.folder, self.meta = folder, meta
        self.rows: int = meta["rows"]
        self.sequence_length: int = meta["sequence_length"]
        self.top_k: int = meta["top_k"]
        self.vocabulary: int = meta["vocabulary"]
        self.tokens = self.rows * self.sequence_length
        self._shards: list[Meta] = meta["shards"]
        keys = [shard_keys(folder, shard) for shard in self._shards]
        self._starts = np.cumsum([0, *map(len, keys)])
        in_text_order = np.concatenate(keys)
        self._places = np.argsort(in_text_order, kind="stable")  # stable: of equal rows the first is found
        self._keys = in_text_order[self._places]
        self._checked: set[int] = set()
        self._opened = lru_cache(OPEN_SHARDS)(self._open_shard)

    @classmethod
    def open(cls, folder: str | Path, *, teacher_fingerprint: str, tokenizer_hash: str) -> "TeacherCache":
        """The finished cache in `folder`, if it is of this teacher and tokenizer.

        Raises UserError if there is none, if it is another one's, unfinished, or lacks a shard. The checksum of a shard
        is compared when it is first read.
        """
        folder = Path(folder)
        meta = read_meta(folder)
        if meta is None:
            raise UserError(
                f"there is no teacher's cache in '{folder}': write one with subquad cache-teacher --out {folder}"
            )
        for key, given, what in (
            ("teacher_fingerprint", teacher_fingerprint, f"teacher ('{meta['teacher']}')"),
            ("tokenizer_hash", tokenizer_hash, "tokenizer"),
        ):
            if meta[key] != given:
                raise UserError(
                    f"the cache in '{folder}' was made with another {what}: write one for this teacher with subquad "
                    "cache-teacher, or train with the one it was made with"
                )
        done = sum(shard["rows"] for shard in meta["shards"])
        if done < meta["rows"]:
            command = meta.get("command") or "subquad cache-teacher"
            raise UserError(
                f"the cache in '{folder}' is unfinished ({done} of {meta['rows']} rows): go on with it by --resume "
                f"(its command was: {command})"
            )
        return cls(folder, meta)

    def lookup(self, input_ids_BT: Tensor) -> FromTopK:
        """What the teacher says on rows of the cache, in any order, on the device of `input_ids_BT`.

        Raises UserError for a row that is not in the cache, and for a shard that is damaged or gone.
        """
        found = [self._row(int(place)) for place in self._find(input_ids_BT)]
        ids_BTK, log_probs_BTK, log_rest_BT = (torch.stack(column) for column in zip(*found, strict=True))
        top = ids_BTK.long(), *normalised(log_probs_BTK, log_rest_BT)
        return FromTopK(*(tensor.to(input_ids_BT.device) for tensor in top))

    def _find(self, input_ids_BT: Tensor) -> np.ndarray:
        """Where in the text's order rows with these tokens stand: (B,)."""
        if input_ids_BT.shape[1] == self.sequence_length:
            wanted = row_keys(input_ids_BT)
            at = np.searchsorted(self._keys, wanted).clip(max=self.rows - 1)
            if np.array_equal(self._keys[at], wanted):
                return self._places[at]
            for shard in range(len(self._shards)):  # a damaged hash is not to pass for another text
                self._check(shard)
        raise UserError(
            f"a row of {input_ids_BT.shape[1]} tokens is not in the teacher's cache in '{self.folder}', which has "
            f"{self.rows} of {self.sequence_length}: the text, the sequence length or the order differ; train with the "
            "data and the sequence length it was made with, on its rows alone"
        )

    def _row(self, place: int) -> tuple[Tensor, Tensor, Tensor]:
        shard = int(np.searchsorted(self._starts, place, side="right")) - 1
        row = place - int(self._starts[shard])
        file = self._opened(shard)
        ids_TK, log_probs_TK, log_rest_T = (
            file.get_slice(name)[row] for name in ("ids_WTK", "log_probs_WTK", "log_rest_WT")
        )
        return ids_TK, log_probs_TK, log_rest_T

    def _open_shard(self, shard: int) -> Any:
        self._check(shard)
        return safe_open(self.folder / self._shards[shard]["file"], "pt")

    def _check(self, shard: int) -> None:
        """Compares a shard's checksum, once."""
        if shard in self._checked:
            return
        file = self.folder / self._shards[shard]["file"]
        try:
            sound = sha256_of_file(file) == self._shards[shard]["sha256"]
        except OSError as error:
            raise _unreadable(file, error.strerror) from None
        if not sound:
            raise _unreadable(file, "its checksum is another than when it was written")
        self._checked.add(shard)


def row_keys(ids_BT: Tensor) -> np.ndarray:
    """The hash of each row's token ids: int64, (B,)."""
    rows = ids_BT.cpu().numpy().astype("<i8")
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, "<i8")


def normalised(log_probs: Tensor, log_rest: Tensor) -> tuple[Tensor, Tensor]:
    """What was stored, in float32, divided by its sum: (..., K) and (...)."""
    log_probs, log_rest = log_probs.float(), log_rest.float()
    total = torch.cat([log_probs, log_rest[..., None]], -1).logsumexp(-1)
    return log_probs - total[..., None], log_rest - total


def read_meta(folder: Path) -> Meta | None:
    """meta.json of the cache in `folder`; None if there is none. Raises UserError for one of a later version."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(meta, dict) or meta.get("kind") != KIND:
        return None
    if meta["format"] > FORMAT:
        raise UserError(
            f"the cache in '{folder}' has format {meta['format']}, this version of Subquad reads up to {FORMAT}: "
            "update Subquad, or write the cache again in another folder"
        )
    return meta


def shard_keys(folder: Path, shard: Meta) -> np.ndarray:
    file = folder / shard["file"]
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor("key_W").numpy()
    except FileNotFoundError:
        raise _unreadable(file, "it is missing") from None
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, str(error)) from None


def _unreadable(file: Path, why: str | None) -> UserError:
    return UserError(
        f"the shard {file.name} of the teacher's cache in '{file.parent}' cannot be used ({why}): copy it again, or "
        "write the cache again with --overwrite"
    )
