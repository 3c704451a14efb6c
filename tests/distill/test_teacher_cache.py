"""The offline teacher: what is stored, what is found again, what survives an interruption, and what is refused."""

import dataclasses
import errno
import io
import json
import os
import sys
from typing import get_args

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from subquad.cli.app import app
from subquad.data.packing import tokenizer_hash
from subquad.data.text import Corpus, load_corpus
from subquad.distill import cache_writer, teacher_cache
from subquad.distill.cache_writer import write_cache
from subquad.distill.logit_losses import FromHidden, chunked_loss
from subquad.distill.teacher_cache import FLOOR, FORMAT, TeacherCache
from subquad.errors import UserError
from subquad.model.output_head import OutputHead, final_hidden
from subquad.pretrained.load import load_pretrained
from subquad.recipes.schema import Recipe
from subquad.recipes.stage import Divergence
from subquad.utils import files
from tests.helpers import RECIPE, make_text, tiny

T, K, V, ROWS, SHARD_ROWS = 12, 8, 97, 7, 3  # three shards, the last one short
HALF = 2.0**-11  # relative error of float16
SETTINGS = {"tokens": ROWS * T, "sequence_length": T, "top_k": K, "batch": 2, "shard_rows": SHARD_ROWS}


def make_corpus(rows=ROWS, seed=0, vocabulary=V):
    """Random tokens, a few more than fill the rows."""
    train = np.random.default_rng(seed).integers(0, vocabulary, rows * T + 5).astype(np.uint32)
    return Corpus(train, train[:0], {"sources": [{"name": "random", "sha256": "0" * 64}]})


def rows_of(corpus):
    return torch.from_numpy(corpus.train[: len(corpus.train) // T * T].astype(np.int64)).reshape(-1, T)


def open_cache(folder, teacher):
    return TeacherCache.open(
        folder, teacher_fingerprint=teacher.fingerprint, tokenizer_hash=tokenizer_hash(teacher.tokenizer)
    )


def log_softmax(teacher, ids_BT):
    """The full log-softmax, in float64."""
    return teacher.model(ids_BT, use_cache=False).logits.double().log_softmax(-1)


def bytes_of(folder):
    """What a cache is, without what it took."""
    meta = json.loads((folder / "meta.json").read_text())
    for timed in (meta, *meta["shards"]):
        timed.pop("seconds", None), timed.pop("tokens_per_second", None)
    return meta, {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "meta.json"}


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return load_pretrained(teacher_folder)


@pytest.fixture(scope="module")
def corpus():
    return make_corpus()


@pytest.fixture(scope="module")
def cache_folder(teacher, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_cache(folder, teacher, corpus, **SETTINGS)
    return folder


@pytest.fixture
def folder_to_damage(cache_folder, tmp_path):
    """A copy to damage."""
    for path in cache_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_what_is_found_is_the_plain_softmax_to_float16(teacher, corpus, cache_folder):
    ids_BT = rows_of(corpus)
    log_p_BTV = log_softmax(teacher, ids_BT)
    top = log_p_BTV.topk(K)
    log_rest_BT = log_p_BTV.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    top_k = open_cache(cache_folder, teacher).lookup(ids_BT)
    assert [tensor.dtype for tensor in top_k] == [torch.int64, torch.float32, torch.float32]
    assert torch.equal(top_k.ids_BTK, top.indices)
    assert (top_k.log_probs_BTK.diff() <= 0).all()
    expected_BTO, lookup_BTO = (torch.cat([a, b[..., None]], -1) for a, b in ((top.values, log_rest_BT), top_k[1:]))
    assert (lookup_BTO.double().exp().sum(-1) - 1).abs().max() < 1e-6
    # Each is rounded, and the sum of all, by which they are divided, is off by the mean of the errors: the entropy's.
    entropy_BT1 = -(expected_BTO.exp() * expected_BTO).sum(-1, keepdim=True)
    assert ((lookup_BTO - expected_BTO).abs() <= 1.05 * HALF * (expected_BTO.abs() + entropy_BT1) + 1e-6).all()
    assert not torch.equal(lookup_BTO, expected_BTO.float())


@pytest.mark.parametrize("kind", get_args(Divergence))
def test_a_teacher_that_forbids_tokens_by_minus_infinity(teacher_folder, corpus, tmp_path, kind):
    """All its allowed tokens and more are stored, so that a loss is the one from its logits, up to float16."""
    teacher = load_pretrained(teacher_folder)
    bias_V = torch.zeros(V).index_fill(0, torch.arange(10, V), -torch.inf)
    teacher.model.lm_head.bias = torch.nn.Parameter(bias_V, requires_grad=False)
    meta = write_cache(tmp_path, teacher, corpus, **SETTINGS | {"top_k": 12})
    assert meta["mass_kept"] == pytest.approx(1, abs=1e-6) and 0 <= meta["kl_lost"] < 1e-5
    ids_BT, student = rows_of(corpus)[:2], tiny("llama", tie_word_embeddings=False)
    student_BTM, losses = final_hidden(student, ids_BT).requires_grad_(), []
    head = OutputHead.of(teacher.model)
    for logits in (
        FromHidden(final_hidden(teacher.model, ids_BT), head),
        open_cache(tmp_path, teacher).lookup(ids_BT),
    ):
        loss = chunked_loss(student_BTM, OutputHead.of(student), weights={"logits": 1.0}, teacher=logits, kind=kind)
        losses.append((loss.total, *torch.autograd.grad(loss.total, student_BTM)))
    assert losses[0][0].isfinite() and losses[0][1].isfinite().all()
    torch.testing.assert_close(losses[1][0], losses[0][0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(losses[1][1], losses[0][1], rtol=1e-2, atol=1e-4)


def test_a_shard_holds_what_its_format_says(teacher, corpus, cache_folder):
    meta = json.loads((cache_folder / "meta.json").read_text())
    assert [shard["rows"] for shard in meta["shards"]] == [3, 3, 1] and meta["rows"] == ROWS
    ids_BT = rows_of(corpus)[3:6]
    log_p_BTV = log_softmax(teacher, ids_BT)
    top = log_p_BTV.topk(K)
    shard = load_file(cache_folder / "shard-00001.safetensors")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in shard.items()} == {
        "ids_WTK": (torch.uint16, (3, T, K)),
        "log_probs_WTK": (torch.float16, (3, T, K)),
        "log_rest_WT": (torch.float16, (3, T)),
        "key_W": (torch.int64, (3,)),
    }
    torch.testing.assert_close(shard["log_probs_WTK"].double(), top.values, rtol=HALF, atol=1e-6)
    log_rest_BT = (1 - top.values.exp().sum(-1)).log()
    torch.testing.assert_close(shard["log_rest_WT"].double(), log_rest_BT, rtol=HALF, atol=1e-6)
    sizes = [path.stat().st_size for path in cache_folder.glob("shard-*")]
    assert meta["bytes_per_token"] == sum(sizes) / (ROWS * T)
    assert (meta["vocabulary"], meta["top_k"], meta["sequence_length"], meta["dtype"]) == (V, K, T, "float32")
    assert meta["teacher_fingerprint"] == teacher.fingerprint and meta["sources"] == corpus.meta["sources"]


def test_what_truncation_loses_is_the_kl_from_what_is_read(teacher, corpus, cache_folder):
    """Against the definition, over the whole vocabulary in float64: rounding included."""
    ids_BT = rows_of(corpus)
    log_p_BTV = log_softmax(teacher, ids_BT)
    top_k = open_cache(cache_folder, teacher).lookup(ids_BT)
    even_log_p_BT1 = (top_k.log_rest_BT.double() - np.log(V - K))[..., None]
    completed_BTV = even_log_p_BT1.expand_as(log_p_BTV).scatter(-1, top_k.ids_BTK, top_k.log_probs_BTK.double())
    meta = json.loads((cache_folder / "meta.json").read_text())
    kl_BT = (log_p_BTV.exp() * (log_p_BTV - completed_BTV)).sum(-1)
    assert meta["kl_lost"] == pytest.approx(kl_BT.mean().item(), abs=2e-6)
    assert 0.01 < meta["kl_lost"] < 1
    assert meta["mass_kept"] == pytest.approx(log_p_BTV.topk(K).values.exp().sum(-1).mean().item(), abs=1e-6)


def test_the_whole_vocabulary_leaves_no_rest_and_loses_only_rounding(teacher, corpus, tmp_path):
    meta = write_cache(tmp_path, teacher, corpus, **SETTINGS | {"top_k": V})
    assert meta["mass_kept"] == pytest.approx(1, abs=1e-6)
    assert 0 < meta["kl_lost"] < 1e-5
    found = open_cache(tmp_path, teacher).lookup(rows_of(corpus)[:1])
    assert found.log_rest_BT.eq(-torch.inf).all()
    assert load_file(tmp_path / "shard-00000.safetensors")["log_rest_WT"].eq(FLOOR).all()
    for top_k in (0, V + 1):
        with pytest.raises(UserError, match=f"top-k is {top_k}, but the teacher '.*' has a vocabulary of {V}"):
            write_cache(tmp_path / "beyond", teacher, corpus, **SETTINGS | {"top_k": top_k})


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65536, torch.uint16), (65600, torch.int32)])
def test_ids_take_two_bytes_where_they_fit(vocabulary, dtype, teacher, tmp_path):
    large = dataclasses.replace(teacher, model=tiny("llama", vocab_size=vocabulary))
    corpus = make_corpus(rows=2, vocabulary=vocabulary)
    write_cache(tmp_path, large, corpus, **SETTINGS | {"top_k": 64})
    assert load_file(tmp_path / "shard-00000.safetensors")["ids_WTK"].dtype == dtype
    expected_BTK = log_softmax(large, rows_of(corpus)).topk(64).indices
    ids_BTK = open_cache(tmp_path, large).lookup(rows_of(corpus)).ids_BTK
    assert expected_BTK.max() > (32767 if dtype == torch.uint16 else 65535)
    assert (ids_BTK == expected_BTK).float().mean() > 0.99  # float32 may order near ties another way


def test_shards_are_bounded_in_bytes_and_a_small_cache_has_several(teacher, corpus, tmp_path, monkeypatch):
    row_bytes = T * (4 * K + 2)
    for shard_bytes, least, batch, rows in ((3, 1, 2, [3, 3, 1]), (9, 3, 2, [3, 3, 1]), (9, 16, 2, [2, 2, 2, 1])):
        monkeypatch.setattr(cache_writer, "SHARD_BYTES", shard_bytes * row_bytes + 1)
        monkeypatch.setattr(cache_writer, "MIN_SHARDS", least)
        meta = write_cache(tmp_path / f"{least}", teacher, corpus, **SETTINGS | {"shard_rows": None, "batch": batch})
        assert [shard["rows"] for shard in meta["shards"]] == rows


def test_rows_are_found_in_any_order(teacher, corpus, cache_folder, monkeypatch):
    monkeypatch.setattr(teacher_cache, "OPEN_SHARDS", 1)  # every change of shard opens a file
    cache = open_cache(cache_folder, teacher)
    assert (cache.rows, cache.sequence_length, cache.tokens, cache.top_k, cache.vocabulary) == (ROWS, T, ROWS * T, K, V)
    ids_BT = rows_of(corpus)
    in_order = cache.lookup(ids_BT)
    order = torch.tensor([6, 0, 5, 5, 2])
    shuffled = cache.lookup(ids_BT[order].to(torch.int32))
    for x, y in zip(shuffled, in_order, strict=True):
        assert torch.equal(x, y[order])


def test_training_on_the_cached_text_finds_every_row(teacher, corpus, cache_folder):
    cache = open_cache(cache_folder, teacher)
    prefix = corpus.first(cache.tokens)
    for step in range(ROWS):
        cache.lookup(prefix.batch(step, batch=2, sequence_length=T, seed=3))


def test_of_equal_rows_the_first_counts(teacher, tmp_path):
    corpus = make_corpus(rows=60)  # many: few keys are sorted stably by any means
    corpus.train[: 60 * T].reshape(60, T)[1::2] = corpus.train[T : 2 * T]  # every second row is row 1
    write_cache(tmp_path, teacher, corpus, **SETTINGS | {"tokens": 60 * T})
    cache = open_cache(tmp_path, teacher)
    for shard in range(1, 20):
        (tmp_path / f"shard-{shard:05d}.safetensors").unlink()
    for row in (1, 59):
        cache.lookup(rows_of(corpus)[row : row + 1])
    with pytest.raises(UserError, match="shard-00001"):
        cache.lookup(rows_of(corpus)[4:5])


def test_rows_that_are_not_there(teacher, corpus, cache_folder):
    cache = open_cache(cache_folder, teacher)
    message = "is not in the teacher's cache .* which has 7 of 12: the text, the sequence length or the order differ"
    changed_BT = rows_of(corpus)[:2].clone()
    changed_BT[1, -1] = (changed_BT[1, -1] + 1) % V
    for ids_BT in (changed_BT, changed_BT[:1, :-1], rows_of(corpus).flatten()[1 : T + 1][None]):
        with pytest.raises(UserError, match=message):
            cache.lookup(ids_BT)


class Stop(BaseException):
    """Ends a process as a kill does: nothing catches it."""


@pytest.mark.parametrize("batches", [1, 2, 3, 4])  # two of a shard each; 1 is before any shard is whole
def test_interrupted_and_resumed_is_uninterrupted(batches, teacher, corpus, cache_folder, tmp_path, monkeypatch):
    shard_entries, first_rows = cache_writer._shard_entries, []

    def stop_at_batch(*args, first_row, **kwargs):
        if len(first_rows) == batches:
            raise Stop
        first_rows.append(first_row)
        return shard_entries(*args, first_row=first_row, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(cache_writer, "_shard_entries", stop_at_batch)
        with pytest.raises(Stop):
            write_cache(tmp_path, teacher, corpus, **SETTINGS)
    rows_done = batches // 2 * SHARD_ROWS
    with pytest.raises(UserError, match=rf"is unfinished \({rows_done} of 7 rows\): resume it with --resume"):
        open_cache(tmp_path, teacher)
    with pytest.raises(UserError, match="continue it with --resume, or replace it with --overwrite"):
        write_cache(tmp_path, teacher, corpus, **SETTINGS)
    first_rows.clear()

    def recorded(*args, first_row):
        first_rows.append(first_row)
        return shard_entries(*args, first_row)

    monkeypatch.setattr(cache_writer, "_shard_entries", recorded)
    write_cache(tmp_path, teacher, corpus, **SETTINGS, resume=True)
    assert first_rows[0] == rows_done
    assert bytes_of(tmp_path) == bytes_of(cache_folder)


@pytest.mark.parametrize("batches", [1, 2, 3, 4])
def test_ctrl_c_loses_no_row(batches, teacher, corpus, cache_folder, tmp_path, monkeypatch, ctrl_c):
    """The rows that are done become a shard, however few; going on asks for the others alone."""
    shard_entries, first_rows = cache_writer._shard_entries, []

    def press_at_batch(*args, first_row):
        first_rows.append(first_row)
        if len(first_rows) == batches:
            ctrl_c()
        return shard_entries(*args, first_row=first_row)

    monkeypatch.setattr(cache_writer, "_shard_entries", press_at_batch)
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path, teacher, corpus, **SETTINGS)
    assert len(first_rows) == batches
    write_cache(tmp_path, teacher, corpus, **SETTINGS, resume=True)
    assert len(set(first_rows)) == len(first_rows), "no row twice"
    ids_BT = rows_of(corpus)
    resumed, uninterrupted = (open_cache(folder, teacher).lookup(ids_BT) for folder in (tmp_path, cache_folder))
    assert all(torch.equal(x, y) for x, y in zip(resumed, uninterrupted, strict=True))


@pytest.mark.parametrize("file", ["shard-00001.safetensors", "meta.json"])
@pytest.mark.parametrize("after", [False, True])
def test_stopped_while_a_file_is_replaced(file, after, teacher, corpus, cache_folder, tmp_path, monkeypatch):
    """Before or after the rename, of the second shard or of meta.json that should name it: the same bytes."""
    replace = os.replace

    def replace_or_stop(aside, path):
        is_meta = path.name == "meta.json"
        is_chosen = path.name == file and (tmp_path / "shard-00001.safetensors.tmp").exists() != is_meta
        is_chosen = is_chosen and (not is_meta or (tmp_path / "shard-00001.safetensors").exists())
        if not is_chosen or after:
            replace(aside, path)
        if is_chosen:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_or_stop)
        with pytest.raises(Stop):
            write_cache(tmp_path, teacher, corpus, **SETTINGS)
    shards = json.loads((tmp_path / "meta.json").read_text())["shards"]
    assert len(shards) == (2 if file == "meta.json" and after else 1)
    write_cache(tmp_path, teacher, corpus, **SETTINGS, resume=True)
    assert bytes_of(tmp_path) == bytes_of(cache_folder)


def test_a_cache_is_made_longer(teacher, corpus, cache_folder, tmp_path):
    meta = write_cache(tmp_path, teacher, corpus, **SETTINGS | {"tokens": 5 * T + 1})  # a begun row is a whole row
    assert meta["rows"] == 6
    assert write_cache(tmp_path, teacher, corpus, **SETTINGS | {"tokens": T}, resume=True)["rows"] == 6
    assert write_cache(tmp_path, teacher, corpus, **SETTINGS | {"tokens": 10**9}, resume=True)["rows"] == ROWS
    assert bytes_of(tmp_path) == bytes_of(cache_folder)

    write_cache(tmp_path / "uneven", teacher, corpus, **SETTINGS | {"tokens": 4 * T})
    meta = write_cache(tmp_path / "uneven", teacher, corpus, **SETTINGS, resume=True)
    assert [shard["rows"] for shard in meta["shards"]] == [3, 1, 3]
    folders = (cache_folder, tmp_path / "uneven")
    even, uneven = (open_cache(folder, teacher).lookup(rows_of(corpus)) for folder in folders)
    for x, y in zip(even, uneven, strict=True):
        torch.testing.assert_close(x, y)


def test_resuming_with_other_settings_names_them(teacher, corpus, folder_to_damage):
    def refused(setting, teacher=teacher, corpus=corpus, **settings):
        with pytest.raises(UserError, match=f"cannot resume: the cache in .* was made with another {setting}; resume"):
            write_cache(folder_to_damage, teacher, corpus, **SETTINGS | settings, resume=True)

    files_before = bytes_of(folder_to_damage)
    refused("teacher", teacher=dataclasses.replace(teacher, fingerprint="1234"))
    refused("dtype", teacher=dataclasses.replace(teacher, model=tiny("llama", torch.bfloat16)))
    refused("sequence length and another top-k", sequence_length=T + 1, top_k=K + 1)
    refused("text", corpus=make_corpus(seed=1))
    refused("text", corpus=make_corpus(rows=ROWS - 1))
    tokenizer = type(teacher.tokenizer)(tokenizer_object=teacher.tokenizer.backend_tokenizer, eos_token="w5")
    refused("tokenizer", teacher=dataclasses.replace(teacher, reader=tokenizer))
    assert bytes_of(folder_to_damage) == files_before


def test_another_teacher_or_tokenizer(teacher, cache_folder, tmp_path):
    identity = {"teacher_fingerprint": teacher.fingerprint, "tokenizer_hash": tokenizer_hash(teacher.tokenizer)}
    with pytest.raises(UserError, match=rf"was made with another teacher \('{teacher.name}'\)"):
        TeacherCache.open(cache_folder, **identity | {"teacher_fingerprint": "1234"})
    with pytest.raises(UserError, match="was made with another tokenizer"):
        TeacherCache.open(cache_folder, **identity | {"tokenizer_hash": "1234"})
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=f"there is no teacher's cache in '{folder}': write one with"):
            TeacherCache.open(folder, **identity)
    (tmp_path / "meta.json").write_text('{"format": 1, "separator": 0}')  # of packed text
    with pytest.raises(UserError, match="there is no teacher's cache in"):
        TeacherCache.open(tmp_path, **identity)


def test_a_later_format(teacher, folder_to_damage):
    meta = json.loads((folder_to_damage / "meta.json").read_text())
    (folder_to_damage / "meta.json").write_text(json.dumps(meta | {"format": FORMAT + 1}))
    with pytest.raises(UserError, match="has format 2, this version of Subquad reads up to 1: update Subquad"):
        open_cache(folder_to_damage, teacher)


@pytest.mark.parametrize("tensor", ["ids_WTK", "log_probs_WTK", "log_rest_WT", "key_W"])
def test_a_flipped_bit(tensor, teacher, corpus, folder_to_damage):
    file = folder_to_damage / "shard-00001.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    position = 8 + length + json.loads(data[8 : 8 + length])[tensor]["data_offsets"][0]
    data[position] ^= 1
    file.write_bytes(data)
    cache = open_cache(folder_to_damage, teacher)  # which does not read all of it
    cache.lookup(rows_of(corpus)[:3])
    message = "the shard shard-00001.safetensors of the teacher's cache .*its checksum has changed since it was written"
    with pytest.raises(UserError, match=message):
        cache.lookup(rows_of(corpus)[3:6])


def test_a_shard_that_is_missing_or_cut_short(teacher, folder_to_damage):
    file = folder_to_damage / "shard-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="the shard shard-00002.safetensors .* cannot be used"):
        open_cache(folder_to_damage, teacher)
    file.unlink()
    with pytest.raises(UserError, match=r"the shard shard-00002.safetensors .* cannot be used \(it is missing\)"):
        open_cache(folder_to_damage, teacher)


def test_text_shorter_than_a_row_and_logits_that_are_not_finite(teacher, corpus, tmp_path):
    with pytest.raises(UserError, match="has 89 tokens, fewer than one sequence of 90"):
        write_cache(tmp_path, teacher, corpus, **SETTINGS | {"sequence_length": 90})
    broken_teacher = dataclasses.replace(teacher, model=tiny("llama", tie_word_embeddings=False))
    broken_teacher.model.get_input_embeddings().weight[int(corpus.train[4 * T + 1])] = torch.inf
    row = int((rows_of(corpus) == corpus.train[4 * T + 1]).any(1).nonzero()[0])
    with pytest.raises(UserError, match=f"are not finite in row {row} of the training text: run it in another dtype"):
        write_cache(tmp_path, broken_teacher, corpus, **SETTINGS)


def test_a_full_disk_leaves_what_was_whole(teacher, corpus, cache_folder, tmp_path, monkeypatch):
    sync = files.sync

    def fail_on_second_shard(path):
        if path.name == "shard-00001.safetensors.tmp":
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", fail_on_second_shard)
        message = "shard-00001.safetensors .*No space left.* free some space and resume with --resume"
        with pytest.raises(UserError, match=message):
            write_cache(tmp_path, teacher, corpus, **SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "shard-00000.safetensors"]
    write_cache(tmp_path, teacher, corpus, **SETTINGS, resume=True)
    assert bytes_of(tmp_path) == bytes_of(cache_folder)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(terminal, teacher, corpus, tmp_path):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=120)
    write_cache(tmp_path, teacher, corpus, **SETTINGS, console=console)
    assert ("cache-teacher" in output.getvalue()) and "tokens/s" in output.getvalue() and "7/7" in output.getvalue()
    assert output.getvalue().count("\n") == 1 or terminal


@pytest.fixture
def command(monkeypatch):
    """command("--out", "there") -> result, with sys.argv as a shell would set it."""

    def command(*arguments):
        arguments = ["cache-teacher", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", ["subquad", *arguments])
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments, prog_name="subquad")

    return command


def test_the_command_from_end_to_end(command, teacher, teacher_folder, tmp_path):
    (tmp_path / "text").mkdir()
    text = make_text(tmp_path / "text")
    (tmp_path / "tiny.yaml").write_text(Recipe(**RECIPE).to_yaml(), encoding="utf-8")
    out = tmp_path / "cache"
    arguments = [teacher_folder, "--recipe", tmp_path / "tiny.yaml", "--data", text[0], "--out", out, "--top-k", 8]

    result = command(*arguments)
    assert result.exit_code == 0, result.output
    last_line = result.output.splitlines()[-1]
    assert last_line.startswith(f"{out}: 256 tokens at ") and "nats/token" in last_line and "tokens/s" in last_line
    cache = open_cache(out, teacher)
    assert (cache.tokens, cache.sequence_length) == (256, 32)  # those of the stage on logits, which is the second
    assert cache.meta["command"].startswith("subquad cache-teacher ") and cache.meta["versions"]["torch"]
    assert cache.meta["machine"] and not list(out.glob("*.tmp"))

    corpus = load_corpus(text, teacher.tokenizer)  # as `convert` reads it
    corpus.train = corpus.train[: cache.tokens]
    ids_BT = corpus.batch(0, batch=4, sequence_length=32, seed=5)
    torch.testing.assert_close(
        cache.lookup(ids_BT).log_probs_BTK.double(), log_softmax(teacher, ids_BT).topk(8).values, rtol=1e-3, atol=3e-3
    )

    repeated = command(*arguments)
    assert repeated.exit_code == 2 and "holds an earlier cache; continue it with --resume" in repeated.stderr
    extended = command(*arguments, "--resume", "--tokens", "0.5k", "--batch", 3)
    assert extended.exit_code == 0 and open_cache(out, teacher).tokens == 512, extended.output
    shortened = command(*arguments, "--overwrite", "--sequence-length", 16, "--tokens", 20)
    assert shortened.exit_code == 0 and open_cache(out, teacher).tokens == 32, shortened.output
    all_text = command(*arguments, "--overwrite", "--tokens", "1M")
    assert "the text is shorter than the 1,000,000 tokens that were asked for" in all_text.output
    assert open_cache(out, teacher).rows == len(load_corpus(text, teacher.tokenizer).train) // 32


def test_what_the_command_refuses_before_it_loads_anything(command, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for leave in ([], ["--resume"], ["--overwrite"]):
        result = command("nowhere", "--out", tmp_path, *leave)
        assert result.exit_code == 2 and "holds something other than a teacher's cache" in result.stderr
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert "is a file" in command("nowhere", "--out", tmp_path / "thesis.txt").stderr
    for tokens in ("many", "0", "1..5k"):
        result = command("nowhere", "--out", tmp_path / "new", "--tokens", tokens)
        assert result.exit_code == 2 and f"--tokens is '{tokens}': give a number of tokens above 0" in result.stderr
    aligned = {**RECIPE, "stages": RECIPE["stages"][:1]}
    (tmp_path / "aligned.yaml").write_text(Recipe(**aligned).to_yaml(), encoding="utf-8")
    result = command("nowhere", "--recipe", tmp_path / "aligned.yaml", "--out", tmp_path / "new")
    assert "the recipe 'tiny' has no stage on logits: give --tokens and --sequence-length" in result.stderr
    assert not (tmp_path / "new").exists()


def test_the_command_explains_itself(command, monkeypatch):
    assert "subquad cache-teacher " in command("--help").output.partition("Examples:")[2]

    def stop(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("subquad.jobs.cache_teacher.cache_teacher", stop)
    result = command("--out", "there")
    assert result.exit_code == 130 and "\n  subquad cache-teacher --out there --resume\n" in result.stderr
