"""Teacher cache: looks up the teacher's top-k next tokens, stored by cache_writer.py, while a student trains.

    meta.json                  the teacher and the settings, the planned rows, and the complete shards
    shard-00000.safetensors    ids_WTK          uint16 where the vocabulary fits, else int32
                               log_probs_WTK    float16, of the full softmax at temperature 1, descending
                               log_rest_WT      float16, log of the mass of all other tokens
                               key_W            int64, hash of the row's token ids

A row is one of the non-overlapping windows of `Corpus.train` from which `Corpus.batch` draws. The cache holds the first
ones.

Notable:
- All stored logarithms are finite. FLOOR is zero mass, which `lookup` returns as -inf: that of a token that the teacher
  forbids, and of the rest if nothing is left (top-k is the whole vocabulary).
- float16 rounds a log-probability by up to 5e-4 of its value, so the stored masses do not quite sum to one. `lookup`
  divides by their sum, so students learn from a distribution over the top-k tokens and the rest.

Legend of tensor suffixes: W rows of a shard, B rows, T tokens, K top-k.
"""

import hashlib
import json
import math
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

KIND, FORMAT = "subquad teacher cache", 1  # raise the format when older readers would misread new files
FLOOR = -1e4  # lowest log-probability; float16 and float32 represent it exactly
OPEN_SHARDS = 8
Meta = dict[str, Any]


class TeacherCache:
    """A finished cache, looked up by the token ids of whole rows.

    Attributes: `folder`, `meta` (meta.json), `rows`, `sequence_length` (tokens of a row), `tokens` (of all rows),
    `top_k` and `vocabulary`. Memory holds only the rows' hashes and indices, 16 bytes per row.
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
        self._first_rows = np.cumsum([0, *map(len, keys)])
        keys_in_text_order = np.concatenate(keys)
        self._row_indices = np.argsort(keys_in_text_order, kind="stable")  # stable: the first of equal rows comes first
        self._keys = keys_in_text_order[self._row_indices]
        self._intact_shards: set[int] = set()
        self._shard_file = lru_cache(OPEN_SHARDS)(self._open_shard)

    @classmethod
    def open(cls, folder: str | Path, *, teacher_fingerprint: str, tokenizer_hash: str) -> "TeacherCache":
        """Opens the finished cache of this teacher and tokenizer in `folder`.

        Raises UserError if there is no cache, or if it belongs to another teacher or tokenizer, is unfinished, or lacks
        a shard. The checksum of a shard is compared when the shard is first read.
        """
        folder = Path(folder)
        meta = read_meta(folder)
        if meta is None:
            raise UserError(
                f"there is no teacher's cache in '{folder}': write one with subquad cache-teacher --out {folder}"
            )
        for key, value, description in (
            ("teacher_fingerprint", teacher_fingerprint, f"teacher ('{meta['teacher']}')"),
            ("tokenizer_hash", tokenizer_hash, "tokenizer"),
        ):
            if meta[key] != value:
                raise UserError(
                    f"the cache in '{folder}' was made with another {description}: write one for this teacher with "
                    "subquad cache-teacher, or train with the one of the cache"
                )
        rows = sum(shard["rows"] for shard in meta["shards"])
        if rows < meta["rows"]:
            command = meta.get("command") or "subquad cache-teacher"
            raise UserError(
                f"the cache in '{folder}' is unfinished ({rows} of {meta['rows']} rows): resume it with --resume "
                f"(its command was: {command})"
            )
        return cls(folder, meta)

    def lookup(self, input_ids_BT: Tensor) -> FromTopK:
        """Returns the teacher's distribution on rows of the cache, in any order, on the device of `input_ids_BT`.

        Raises UserError for a row that is not in the cache, and for a damaged or missing shard.
        """
        rows = [self._read_row(int(row_index)) for row_index in self._find_rows(input_ids_BT)]
        ids_BTK, log_probs_BTK, log_rest_BT = (torch.stack(column) for column in zip(*rows, strict=True))
        stored = log_probs_BTK, log_rest_BT
        distribution = (
            ids_BTK.long(),
            *(
                value.masked_fill(floored <= FLOOR, -math.inf)
                for value, floored in zip(normalised(*stored), stored, strict=True)
            ),
        )
        return FromTopK(*(tensor.to(input_ids_BT.device) for tensor in distribution))

    def _find_rows(self, input_ids_BT: Tensor) -> np.ndarray:
        """Indices, in the order of the text, of the rows with these tokens: (B,)."""
        if input_ids_BT.shape[1] == self.sequence_length:
            keys = row_keys(input_ids_BT)
            positions = np.searchsorted(self._keys, keys).clip(max=self.rows - 1)
            if np.array_equal(self._keys[positions], keys):
                return self._row_indices[positions]
            for shard in range(len(self._shards)):  # a damaged hash must not be reported as another text
                self._check_shard(shard)
        raise UserError(
            f"a row of {input_ids_BT.shape[1]} tokens is not in the teacher's cache in '{self.folder}', which has "
            f"{self.rows} of {self.sequence_length}: the text, the sequence length or the order differ; train with the "
            "data and the sequence length of the cache, on its rows alone"
        )

    def _read_row(self, row_index: int) -> tuple[Tensor, Tensor, Tensor]:
        shard = int(np.searchsorted(self._first_rows, row_index, side="right")) - 1
        row = row_index - int(self._first_rows[shard])
        file = self._shard_file(shard)
        ids_TK, log_probs_TK, log_rest_T = (
            file.get_slice(name)[row] for name in ("ids_WTK", "log_probs_WTK", "log_rest_WT")
        )
        return ids_TK, log_probs_TK, log_rest_T

    def _open_shard(self, shard: int) -> Any:
        self._check_shard(shard)
        return safe_open(self.folder / self._shards[shard]["file"], "pt")

    def _check_shard(self, shard: int) -> None:
        """Compares the checksum of a shard, once."""
        if shard in self._intact_shards:
            return
        file = self.folder / self._shards[shard]["file"]
        try:
            intact = sha256_of_file(file) == self._shards[shard]["sha256"]
        except OSError as error:
            raise _unreadable(file, error.strerror) from None
        if not intact:
            raise _unreadable(file, "its checksum has changed since it was written")
        self._intact_shards.add(shard)


def row_keys(ids_BT: Tensor) -> np.ndarray:
    """Hash of each row's token ids: int64, (B,)."""
    rows = ids_BT.cpu().numpy().astype("<i8")
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, "<i8")


def normalised(log_probs: Tensor, log_rest: Tensor) -> tuple[Tensor, Tensor]:
    """Divides the stored masses by their sum, in float32: log-probabilities (..., K) and log rest (...)."""
    log_probs, log_rest = log_probs.float(), log_rest.float()
    total = torch.cat([log_probs, log_rest[..., None]], -1).logsumexp(-1)
    return log_probs - total[..., None], log_rest - total


def read_meta(folder: Path) -> Meta | None:
    """Reads meta.json of the cache in `folder`; None if there is none. Raises UserError for a later format."""
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
    """Hashes of the rows of a shard, (W,). Raises UserError if the shard cannot be read."""
    file = folder / shard["file"]
    try:
        with safe_open(file, "pt") as shard_file:
            return shard_file.get_tensor("key_W").numpy()
    except FileNotFoundError:
        raise _unreadable(file, "it is missing") from None
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, str(error)) from None


def _unreadable(file: Path, reason: str | None) -> UserError:
    return UserError(
        f"the shard {file.name} of the teacher's cache in '{file.parent}' cannot be used ({reason}): copy it again, or "
        "write the cache again with --overwrite"
    )
