"""Writer of the offline teacher: the store that teacher_cache.py reads, shard by shard.

Notable:
- A shard is written aside, synced and renamed, and only then is `meta.json` replaced, in the same way. Whatever is
  interrupted, `meta.json` names whole shards, and a resumed run continues after the last of them.
- Ctrl-C ends with a shard of the rows that are done.
- `kl_lost` is the KL of the teacher from what `lookup` will return, its rest spread evenly over the other tokens: the
  loss by truncation and rounding together, in nats per token, without regard to any student.

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
from subquad.distill.teacher_cache import FORMAT, KIND, Meta, normalised, read_meta, row_keys, shard_keys
from subquad.errors import UserError
from subquad.model.output_head import OutputHead, final_hidden
from subquad.ops.common import wide
from subquad.plan import dtype_name
from subquad.pretrained.load import Teacher
from subquad.utils.files import claim_folder, is_disk_full, write_aside
from subquad.utils.interrupt import interrupt_waits
from subquad.utils.progress import StageProgress

FLOOR = -1e4  # least log-probability; float16 and float32 hold it exactly
SHARD_BYTES, LEAST_SHARDS = 64 * 2**20, 16  # so many at least: an interruption loses little of a small cache
# Settings that must be the same to resume a cache: the key in meta.json, and its name for users.
SETTINGS = {
    "teacher_fingerprint": "teacher",
    "dtype": "dtype",
    "tokenizer_hash": "tokenizer",
    "sequence_length": "sequence length",
    "top_k": "top-k",
}


def claim_cache(folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Makes `folder` ready for a cache. Raises UserError as `files.claim_folder` does."""
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
    """Writes the answers of `teacher` on the first `tokens` of `corpus.train` into `folder`; returns meta.json.

    Args:
        tokens: rounded up to whole rows, and at most all windows of the text.
        batch: rows that go through the teacher at a time.
        shard_rows: rows of a shard, what an interruption loses; None for 64 MiB, or a sixteenth of a small cache.
        resume: continue the cache in `folder`. More tokens than it was planned for make it longer.
        console: where progress is shown.
        about: further entries of meta.json, such as versions and the command.

    Raises:
        UserError: `folder` is not free, or its cache was made with other settings; top_k beyond the vocabulary; text
            shorter than one row; logits that are not finite; a disk that cannot be written.
    """
    # Check the folder and the arguments
    claim_cache(folder, resume=resume)
    vocabulary = OutputHead.of(teacher.model).weight_VM.shape[0]
    if not 1 <= top_k <= vocabulary:
        raise UserError(
            f"top-k is {top_k}, but the teacher '{teacher.name}' has a vocabulary of {vocabulary}: give 1 to that many"
        )
    windows = len(corpus.train) // sequence_length
    if not windows:
        raise UserError(
            f"the training text has {len(corpus.train)} tokens, fewer than one sequence of {sequence_length}: "
            "give more text or a smaller sequence length"
        )

    # Shards that are there already, and how many rows are to follow
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
    shards = _whole_shards(folder, meta, corpus)
    done = sum(shard["rows"] for shard in shards)
    rows = max(done, min(windows, math.ceil(tokens / sequence_length)))
    row_bytes = sequence_length * (top_k * (_id_dtype(vocabulary).itemsize + 2) + 2)
    shard_rows = shard_rows or max(batch, min(SHARD_BYTES // row_bytes, math.ceil(rows / LEAST_SHARDS)))

    def write_meta() -> Meta:
        written = meta | {"rows": rows} | _totals(shards, sequence_length) | (about or {}) | {"shards": shards}
        _write(folder / "meta.json", json.dumps(written, indent=1).encode())
        return written

    written = write_meta()  # at once: a folder with half a shard in it is then known as ours

    # The other shards, one after another
    bar = StageProgress(console, "cache-teacher", steps=rows, step=done, unit="row")
    with bar, interrupt_waits() as interrupted:
        while done < rows and not interrupted():
            start, stop = done, min(rows, done + shard_rows)
            shard_started = time.perf_counter()
            parts = []
            for row in range(start, stop, batch):
                ids_BT = _rows(corpus, row, min(stop, row + batch), sequence_length)
                parts.append(_answers(teacher, ids_BT, top_k, first_row=row))
                done = row + len(ids_BT)
                speed = (done - start) * sequence_length / (time.perf_counter() - shard_started)
                bar.update(done, f"{speed:,.0f} tokens/s")
                if interrupted():
                    break
            file = folder / f"shard-{len(shards):05d}.safetensors"
            data = save({name: torch.cat([stored[name] for stored, _ in parts]) for name in parts[0][0]})
            _write(file, data)
            kl_lost, mass_kept = np.sum([sums for _, sums in parts], axis=0) / ((done - start) * sequence_length)
            shards.append(
                {
                    "file": file.name,
                    "rows": done - start,
                    "bytes": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "kl_lost": float(kl_lost),
                    "mass_kept": float(mass_kept),
                    "seconds": time.perf_counter() - shard_started,
                }
            )
            written = write_meta()
    return written


def _whole_shards(folder: Path, meta: Meta, corpus: Corpus) -> list[Meta]:
    """Shards of the cache in `folder`, if there is one; checks that it was made with `meta` and `corpus`."""
    earlier = read_meta(folder)
    if earlier is None:
        return []
    shards: list[Meta] = earlier["shards"]
    differing = [name for key, name in SETTINGS.items() if earlier[key] != meta[key]]
    if not differing:
        keys = np.concatenate([np.empty(0, "<i8"), *(shard_keys(folder, shard) for shard in shards)])
        length = meta["sequence_length"]
        # Hashes of the rows and not of the sources: a longer text may well begin as the shorter one did.
        rows = len(keys) if len(keys) <= len(corpus.train) // length else 0
        if not np.array_equal(keys, _corpus_keys(corpus, rows, length)):
            differing = ["text"]
    if differing:
        raise UserError(
            f"cannot resume: the cache in '{folder}' was made with another {' and another '.join(differing)}; resume "
            "with the same settings, or replace it by --overwrite"
        )
    return shards


def _corpus_keys(corpus: Corpus, rows: int, length: int) -> np.ndarray:
    blocks = [row_keys(_rows(corpus, at, min(rows, at + 1024), length)) for at in range(0, rows, 1024)]
    return np.concatenate([np.empty(0, "<i8"), *blocks])


def _rows(corpus: Corpus, start: int, stop: int, length: int) -> Tensor:
    """Rows `start` to `stop` of the training text, in its own order: ids_BT, int64."""
    return torch.from_numpy(corpus.train[start * length : stop * length].astype(np.int64)).reshape(-1, length)


def _answers(teacher: Teacher, ids_BT: Tensor, k: int, first_row: int) -> tuple[dict[str, Tensor], list[float]]:
    """Entries of a shard for some rows, and the sums over their tokens of the KL lost and the mass kept."""
    head = OutputHead.of(teacher.model)
    vocabulary = head.weight_VM.shape[0]
    hidden_NM = final_hidden(teacher.model, ids_BT.to(teacher.model.device)).flatten(0, 1)
    chunks = []
    for hidden_CM in hidden_NM.split(max(16, CHUNK_ELEMENTS // vocabulary)):
        chunks.append([value.cpu() for value in _truncated(wide(head(hidden_CM)), k)])
    ids_NK, log_probs_NK, log_rest_N, lost_N, kept_N = (torch.cat(column) for column in zip(*chunks, strict=True))
    if not lost_N.isfinite().all():
        row = first_row + int(lost_N.isfinite().logical_not().nonzero()[0]) // ids_BT.shape[1]
        raise UserError(
            f"the logits of the teacher '{teacher.name}' are not finite in row {row} of the training text: run it in "
            "another dtype (--set dtype=float32)"
        )
    stored = {
        "ids_WTK": ids_NK.to(_id_dtype(vocabulary)).unflatten(0, ids_BT.shape),
        "log_probs_WTK": log_probs_NK.unflatten(0, ids_BT.shape),
        "log_rest_WT": log_rest_N.unflatten(0, ids_BT.shape),
        "key_W": torch.tensor(row_keys(ids_BT)),
    }
    return stored, [float(lost_N.double().sum()), float(kept_N.double().sum())]


def _truncated(logits_CV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Ids (C, K), log-probabilities (C, K) and log rest (C,) to store; the KL that is lost and the mass kept, (C,)."""
    log_p_CV = logits_CV.log_softmax(-1)
    log_p_CK, ids_CK = log_p_CV.topk(k)
    others_CV = log_p_CV.scatter_(1, ids_CK, -math.inf)
    log_rest_C = others_CV.logsumexp(-1)
    stored_CK, stored_rest_C = (value.clamp_min(FLOOR).half() for value in (log_p_CK, log_rest_C))
    read_CK, read_rest_C = normalised(stored_CK, stored_rest_C)
    even_C = read_rest_C - math.log(max(1, logits_CV.shape[1] - k))
    p_CK, p_CV = log_p_CK.exp(), others_CV.exp()
    top_C = torch.einsum("ck,ck->c", p_CK, log_p_CK.clamp_min(FLOOR) - read_CK)
    others_C = torch.einsum("cv,cv->c", p_CV, others_CV.clamp_min_(FLOOR)) - log_rest_C.exp() * even_C
    return ids_CK, stored_CK, stored_rest_C, top_C + others_C, p_CK.sum(-1)


def _totals(shards: list[Meta], sequence_length: int) -> Meta:
    """The figures of meta.json, from those of the shards: so resuming does not change them."""
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
            f"could not write {path.name} to '{path.parent}' ({error.strerror}): {remedy} and go on with --resume; "
            "the shards before it are intact"
        ) from None
