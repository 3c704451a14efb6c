"""Writer of the teacher cache, shard by shard; teacher_cache.py reads it.

Notable:
- A shard is written under a temporary name, synced and renamed. `meta.json` is replaced afterwards, in the same way. So
  it names complete shards whenever a run is interrupted, and a resumed run continues after the last of them.
- Ctrl-C writes the finished rows as a shard.
- `kl_lost` is the KL divergence of the teacher from the distribution that `lookup` will return, with the rest spread
  evenly over the other tokens. It measures truncation and rounding, in nats per token, for no particular student.

Legend of tensor suffixes: W rows of a shard, B rows, T tokens, K top-k, C positions of one chunk, V vocabulary, M model
width.
"""

import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save
from torch import Tensor

from subquad.data.packing import tokenizer_hash
from subquad.data.text import Corpus
from subquad.distill.logit_losses import CHUNK_ELEMENTS
from subquad.distill.teacher_cache import FLOOR, FORMAT, KIND, Meta, normalised, read_meta, row_keys, shard_keys
from subquad.errors import UserError
from subquad.model.output_head import OutputHead, final_hidden
from subquad.ops.common import wide
from subquad.plan import dtype_name
from subquad.pretrained.load import Teacher
from subquad.utils.files import claim_folder, is_disk_full, write_aside
from subquad.utils.interrupt import interrupt_waits
from subquad.utils.progress import StageProgress

SHARD_BYTES = 64 * 2**20
MIN_SHARDS = 16  # so that an interruption loses little of a small cache
# Settings that must be the same to resume a cache: the key in meta.json, and the name in messages.
SETTINGS = {
    "teacher_fingerprint": "teacher",
    "dtype": "dtype",
    "tokenizer_hash": "tokenizer",
    "sequence_length": "sequence length",
    "top_k": "top-k",
}


def claim_cache(folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Prepares `folder` for a cache. Raises UserError as `files.claim_folder` does."""
    claim_folder(folder, earlier=read_meta(folder) is not None, kind="cache", resume=resume, overwrite=overwrite)


@torch.no_grad()
def write_cache(
    folder: Path,
    teacher: Teacher,
    corpus: Corpus,
    *,
    tokens: int,
    sequence_length: int,
    top_k: int = 64,
    batch: int = 1,
    shard_rows: int | None = None,
    resume: bool = False,
    console: Console | None = None,
    about: Meta | None = None,
) -> Meta:
    """Writes the teacher's top-k tokens for the first `tokens` of `corpus.train` into `folder`; returns meta.json.

    Args:
        tokens: rounded up to whole rows, and limited to the windows of the text.
        batch: rows in one forward pass of the teacher.
        shard_rows: rows of a shard, the most that a kill can lose; None for 64 MiB, or a sixteenth of a small cache.
        resume: continue the cache in `folder`, and extend it if `tokens` has grown.
        console: shows the progress.
        about: further entries of meta.json, such as versions and the command.

    Raises:
        UserError: `folder` holds other files, or a cache with other settings; `top_k` is beyond the vocabulary; the
            text is shorter than one row; logits are not finite; the disk cannot be written.
    """
    # Check the folder and the arguments
    claim_cache(folder, resume=resume)
    vocabulary = OutputHead.of(teacher.model).weight_VM.shape[0]
    if not 1 <= top_k <= vocabulary:
        raise UserError(
            f"top-k is {top_k}, but the teacher '{teacher.name}' has a vocabulary of {vocabulary}: give 1 to "
            f"{vocabulary}"
        )
    windows = len(corpus.train) // sequence_length
    if not windows:
        raise UserError(
            f"the training text has {len(corpus.train)} tokens, fewer than one sequence of {sequence_length}: "
            "give more text or a smaller sequence length"
        )

    # Find the shards of an earlier run, and the number of rows
    meta = {
        "kind": KIND,
        "format": FORMAT,
        "teacher": teacher.name,
        "teacher_fingerprint": teacher.fingerprint,
        "dtype": dtype_name(teacher.model),
        "tokenizer_hash": tokenizer_hash(teacher.tokenizer),
        "sources": [{key: source[key] for key in ("name", "sha256")} for source in corpus.meta["sources"]],
        "vocabulary": vocabulary,
        "sequence_length": sequence_length,
        "top_k": top_k,
    }
    shards = _earlier_shards(folder, meta, corpus)
    next_row = sum(shard["rows"] for shard in shards)
    rows = max(next_row, min(windows, math.ceil(tokens / sequence_length)))
    row_bytes = sequence_length * (top_k * (_id_dtype(vocabulary).itemsize + 2) + 2)
    shard_rows = shard_rows or max(batch, min(SHARD_BYTES // row_bytes, math.ceil(rows / MIN_SHARDS)))

    def write_meta() -> Meta:
        full_meta = meta | {"rows": rows} | _totals(shards, sequence_length) | (about or {}) | {"shards": shards}
        _write(folder / "meta.json", json.dumps(full_meta, indent=1).encode())
        return full_meta

    full_meta = write_meta()  # at once, so that a folder with half a shard is recognised as a cache

    # Write the other shards
    bar = StageProgress(console, "cache-teacher", steps=rows, step=next_row, unit="row")
    with bar, interrupt_waits() as interrupted:
        while next_row < rows and not interrupted():
            start, stop = next_row, min(rows, next_row + shard_rows)
            shard_started = time.perf_counter()
            batches = []
            for row in range(start, stop, batch):
                ids_BT = _read_rows(corpus, row, min(stop, row + batch), sequence_length)
                batches.append(_shard_entries(teacher, ids_BT, top_k, first_row=row))
                next_row = row + len(ids_BT)
                speed = (next_row - start) * sequence_length / (time.perf_counter() - shard_started)
                bar.update(next_row, f"{speed:,.0f} tokens/s")
                if interrupted():
                    break
            file = folder / f"shard-{len(shards):05d}.safetensors"
            data = save({name: torch.cat([entries[name] for entries, _ in batches]) for name in batches[0][0]})
            _write(file, data)
            kl_lost, mass_kept = np.sum([sums for _, sums in batches], axis=0) / ((next_row - start) * sequence_length)
            shards.append(
                {
                    "file": file.name,
                    "rows": next_row - start,
                    "bytes": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "kl_lost": float(kl_lost),
                    "mass_kept": float(mass_kept),
                    "seconds": time.perf_counter() - shard_started,
                }
            )
            full_meta = write_meta()
    return full_meta


def _earlier_shards(folder: Path, meta: Meta, corpus: Corpus) -> list[Meta]:
    """Shards of the cache in `folder`, if any. Raises UserError if it was made with other settings or another text."""
    earlier = read_meta(folder)
    if earlier is None:
        return []
    shards: list[Meta] = earlier["shards"]
    differences = [name for key, name in SETTINGS.items() if earlier[key] != meta[key]]
    if not differences:
        keys = np.concatenate([np.empty(0, "<i8"), *(shard_keys(folder, shard) for shard in shards)])
        length = meta["sequence_length"]
        # Compare rows and not sources: a longer text may begin with the shorter one.
        rows = len(keys) if len(keys) <= len(corpus.train) // length else 0
        if not np.array_equal(keys, _corpus_keys(corpus, rows, length)):
            differences = ["text"]
    if differences:
        raise UserError(
            f"cannot resume: the cache in '{folder}' was made with another {' and another '.join(differences)}; resume "
            "with the same settings, or replace it with --overwrite"
        )
    return shards


def _corpus_keys(corpus: Corpus, rows: int, length: int) -> np.ndarray:
    blocks = [row_keys(_read_rows(corpus, start, min(rows, start + 1024), length)) for start in range(0, rows, 1024)]
    return np.concatenate([np.empty(0, "<i8"), *blocks])


def _read_rows(corpus: Corpus, start: int, stop: int, length: int) -> Tensor:
    """Rows `start` to `stop` of the training text, in its order: ids_BT, int64."""
    return torch.from_numpy(corpus.train[start * length : stop * length].astype(np.int64)).reshape(-1, length)


def _shard_entries(teacher: Teacher, ids_BT: Tensor, k: int, first_row: int) -> tuple[dict[str, Tensor], list[float]]:
    """Entries of a shard for some rows, and sums over their tokens of the lost KL and the kept mass."""
    head = OutputHead.of(teacher.model)
    vocabulary = head.weight_VM.shape[0]
    hidden_NM = final_hidden(teacher.model, ids_BT.to(teacher.model.device)).flatten(0, 1)
    chunks = []
    for hidden_CM in hidden_NM.split(max(16, CHUNK_ELEMENTS // vocabulary)):
        chunks.append([value.cpu() for value in _truncate(wide(head(hidden_CM)), k)])
    columns = (torch.cat(column) for column in zip(*chunks, strict=True))
    ids_NK, log_probs_NK, log_rest_N, kl_lost_N, mass_kept_N = columns
    if not kl_lost_N.isfinite().all():
        row = first_row + int(kl_lost_N.isfinite().logical_not().nonzero()[0]) // ids_BT.shape[1]
        raise UserError(
            f"the logits of the teacher '{teacher.name}' are not finite in row {row} of the training text: run it in "
            "another dtype (--set dtype=float32)"
        )
    entries = {
        "ids_WTK": ids_NK.to(_id_dtype(vocabulary)).unflatten(0, ids_BT.shape),
        "log_probs_WTK": log_probs_NK.unflatten(0, ids_BT.shape),
        "log_rest_WT": log_rest_N.unflatten(0, ids_BT.shape),
        "key_W": torch.tensor(row_keys(ids_BT)),
    }
    return entries, [float(kl_lost_N.double().sum()), float(mass_kept_N.double().sum())]


def _truncate(logits_CV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Ids (C, K), log-probabilities (C, K) and log rest (C,) to store; lost KL (C,) and kept mass (C,)."""
    # Take the top-k tokens and the mass of all others
    log_p_CV = logits_CV.log_softmax(-1)
    log_p_CK, ids_CK = log_p_CV.topk(k)
    rest_log_p_CV = log_p_CV.scatter_(1, ids_CK, -math.inf)
    log_rest_C = rest_log_p_CV.logsumexp(-1)
    stored_log_p_CK, stored_log_rest_C = (value.clamp_min(FLOOR).half() for value in (log_p_CK, log_rest_C))

    # Compare the teacher with the distribution that `lookup` will return
    lookup_log_p_CK, lookup_log_rest_C = normalised(stored_log_p_CK, stored_log_rest_C)
    even_log_p_C = lookup_log_rest_C - math.log(max(1, logits_CV.shape[1] - k))
    p_CK, rest_p_CV = log_p_CK.exp(), rest_log_p_CV.exp()
    top_kl_C = torch.einsum("ck,ck->c", p_CK, log_p_CK.clamp_min(FLOOR) - lookup_log_p_CK)
    rest_kl_C = torch.einsum("cv,cv->c", rest_p_CV, rest_log_p_CV.clamp_min_(FLOOR)) - log_rest_C.exp() * even_log_p_C
    return ids_CK, stored_log_p_CK, stored_log_rest_C, top_kl_C + rest_kl_C, p_CK.sum(-1)


def _totals(shards: list[Meta], sequence_length: int) -> Meta:
    """Totals of meta.json, computed from the shards, so that resuming does not change them."""
    rows = sum(shard["rows"] for shard in shards)
    if not rows:
        return {}
    seconds = sum(shard["seconds"] for shard in shards)
    return {
        "bytes_per_token": sum(shard["bytes"] for shard in shards) / (rows * sequence_length),
        "kl_lost": sum(shard["kl_lost"] * shard["rows"] for shard in shards) / rows,
        "mass_kept": sum(shard["mass_kept"] * shard["rows"] for shard in shards) / rows,
        "seconds": seconds,
        "tokens_per_second": rows * sequence_length / seconds,
    }


def _id_dtype(vocabulary: int) -> torch.dtype:
    return torch.uint16 if vocabulary <= 1 << 16 else torch.int32


def _write(path: Path, data: bytes) -> None:
    try:
        with write_aside(path, durable=True) as aside:
            aside.write_bytes(data)
    except OSError as error:
        remedy = "free some space" if is_disk_full(error) else "make the folder writable"
        raise UserError(
            f"could not write {path.name} to '{path.parent}' ({error.strerror}): {remedy} and resume with --resume; "
            "the shards before it are intact"
        ) from None
