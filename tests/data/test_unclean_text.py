"""Rows that are no clean text are skipped or repaired, counted and said, and never end a run."""

import gzip
import io
import json
import math

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from rich.console import Console

from subquad.data import packing
from subquad.data.curriculum import train_tokenizer
from subquad.data.text import load_corpus
from subquad.data.text_rows import clean
from subquad.errors import UserError
from subquad.jobs.conversion import Conversion, checked_recipe
from subquad.jobs.evaluate import evaluate_model
from subquad.recipes.schema import Recipe
from subquad.results.metrics import Metrics, SourceRecord
from subquad.results.record import check_written
from subquad.utils.files import json_text
from subquad.utils.text import well_formed
from tests.data.test_text import byte_tokenizer, documents_in, stream
from tests.helpers import RECIPE

GOOD = [f"good row {number}" for number in range(8)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "cache"))


def texts(corpus):
    tokenizer = byte_tokenizer()
    return sorted(documents_in(corpus.train, tokenizer) + documents_in(corpus.heldout, tokenizer))


def described(corpus):
    """Source in the run's record, without its name and its hash."""
    [source] = corpus.sources
    return {key: value for key, value in source.items() if key not in ("name", "sha256")}


@pytest.mark.parametrize(
    "broken, repaired",
    [
        ("w1 \ud83d w2", "w1 \ufffd w2"),
        ("w1 \udca9 w2", "w1 \ufffd w2"),
        ("\udca9\ud83d both", "\ufffd\ufffd both"),
        ("pair \ud83d\ude00 joined", "pair \U0001f600 joined"),
        ("end \ud83d", "end \ufffd"),
        ("na\u00efve \U0001f600", "na\u00efve \U0001f600"),
    ],
    ids=ascii,
)
def test_surrogates_become_what_they_mean_or_a_replacement(broken, repaired):
    assert well_formed(broken) == clean(broken) == repaired
    repaired.encode()


# Row of a .jsonl file, what is kept of it, and what is said of it.
ROWS = {
    "half a pair": (b'{"text": "w1 \\ud83d w2"}', "w1 \ufffd w2", None),
    "half a pair in CESU": (b'{"text": "a long row \xed\xa0\xbd w2"}', "a long row \ufffd\ufffd\ufffd w2", None),
    "bytes": (b'{"text": "w1 \xff w2"}', "w1 \ufffd w2", None),
    "nothing but bytes": (b'{"text": "\xff\xfe"}', "", "not UTF-8"),
    "null": (b'{"text": null}', "", "without text"),
    "empty": (b'{"text": ""}', "", "without text"),
    "blank": (b'{"text": " \\n\\t\\u0000\\ufeff"}', "", "without text"),
    "number": (b'{"text": 3}', "", "not a text"),
    "list": (b'{"text": ["a"]}', "", "not a text"),
    "object": (b'{"text": {"a": "b"}}', "", "not a text"),
    "no field": (b'{"content": "a"}', "", "without the field 'text'"),
    "no object": (b'["a"]', "", "not a JSON object"),
    "a bare text": (b'"a"', "", "not a JSON object"),
    "half a row": (b'{"text": "a', "", "not JSON"),
    "two rows in one": (b'{"text": "a"}{"text": "b"}', "", "not JSON"),
    "nested": (b'{"text": "a", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "", "nested too deeply"),
    "a whole number of 5,000 digits": (b'{"text": "kept", "id": ' + b"9" * 5000 + b"}", "kept", ""),
    "a number beyond floats": (b'{"text": "kept", "id": 1e999999}', "kept", ""),
    "NULs inside": (b'{"text": "a\0b"}', "ab", ""),
    "NULs around": (b'\0\0{"text": "kept"}\0', "kept", ""),
    "BOM": (b'\xef\xbb\xbf{"text": "kept"}', "kept", ""),
    "CRLF": (b'{"text": "kept"}\r', "kept", ""),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("row", ROWS)
def test_a_bad_row_of_json_is_no_end(tmp_path, row, suffix):
    content, kept, reason = ROWS[row]
    lines = [json.dumps({"text": text}).encode() for text in GOOD]
    data = b"\n".join([*lines[:3], content, *lines[3:]])
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    corpus = load_corpus([str(path)], byte_tokenizer())
    assert texts(corpus) == sorted([*GOOD, kept] if kept else GOOD)
    if reason == "":
        assert described(corpus) == {} and corpus.remarks == []
    elif kept:
        assert described(corpus) == {"rows": 9, "skipped": {}, "repaired": 1}
        assert corpus.remarks == [f"{path}: broken characters of 1 of 9 rows became U+FFFD"]
    else:
        assert described(corpus) == {"rows": 9, "skipped": {reason: 1}, "repaired": 0}
        assert corpus.remarks == [f"{path}: 1 of 9 rows was skipped: 1 {reason}"]


def test_what_was_wrong_is_said_in_one_sentence_and_again_from_the_cache(tmp_path, monkeypatch):
    rows = [
        *({"text": text} for text in GOOD * 500),
        *[{"text": None}] * 7,
        *[{}] * 3,
        {"text": 1},
        {"text": "a \ud83d"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*map(json.dumps, rows), '{"text": "half a last li']))
    for _ in range(2):
        corpus = load_corpus([str(path)], byte_tokenizer())
        assert corpus.remarks == [
            f"{path}: 12 of 4,013 rows were skipped: 7 without text, 3 without the field 'text', 1 not a text, "
            "1 not JSON; broken characters of 1 of 4,013 rows became U+FFFD"
        ]
        monkeypatch.setattr("subquad.data.text.pack", lambda *_: pytest.fail("tokenised again"))


def test_old_line_ends_part_rows_and_paragraphs(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\r".join(json.dumps({"text": text}).encode() for text in GOOD))
    assert texts(load_corpus([str(tmp_path / "a.jsonl")], byte_tokenizer())) == sorted(GOOD)
    (tmp_path / "folder").mkdir()
    pages = [f"page {number}" for number in range(40)]  # so many that none is cut
    for page in pages:
        (tmp_path / "folder" / f"{page}.txt").write_bytes(f"{page}\r\rend".encode())
    assert texts(load_corpus([str(tmp_path / "folder")], byte_tokenizer())) == sorted(
        f"{page}\n\nend" for page in pages
    )


def test_files_of_a_folder_that_are_no_text(tmp_path):
    pages = [f"page {number} of forty" for number in range(40)]
    for page in pages:
        (tmp_path / f"{page}.txt").write_text(page)
    (tmp_path / "bytes.txt").write_bytes(b"bytes \xff\xfe here \xc3")
    (tmp_path / "wide.txt").write_bytes("wide".encode("utf-16"))
    (tmp_path / "empty.txt").write_bytes(b"")
    parquet.write_table(pyarrow.table({"content": ["a", "b"]}), tmp_path / "other.parquet")
    corpus = load_corpus([str(tmp_path)], byte_tokenizer())
    assert texts(corpus) == sorted([*pages, "bytes \ufffd\ufffd here \ufffd"])
    skipped = {"in UTF-16": 1, "without text": 1, "without the field 'text'": 2}
    assert described(corpus) == {"rows": 45, "skipped": skipped, "repaired": 1}


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_a_table_with_bytes_that_are_no_text(tmp_path, kind):
    values = [*(text.encode() for text in GOOD), b"w1 \xff w2", b"w1 \xed\xa0\xbd of three", None, b""]
    column = pyarrow.array(values, pyarrow.large_binary() if kind == "large_string" else pyarrow.binary())
    if kind != "binary":  # pyarrow itself checks no text that others wrote
        text_type = pyarrow.large_string() if kind == "large_string" else pyarrow.string()
        column = pyarrow.Array.from_buffers(text_type, len(column), column.buffers(), column.null_count)
    if kind == "dictionary":
        column = column.dictionary_encode()
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    corpus = load_corpus([str(tmp_path / "a.parquet")], byte_tokenizer())
    assert texts(corpus) == sorted([*GOOD, "w1 \ufffd w2", "w1 \ufffd\ufffd\ufffd of three"])
    assert described(corpus) == {"rows": 12, "skipped": {"without text": 2}, "repaired": 2}


def test_rows_of_a_stream(monkeypatch):
    odd = [{"text": "w1 \ud83d w2"}, {"text": None}, {"text": 3}, {"text": ["a"]}, {}, {"text": ""}, {"text": b"bytes"}]
    stream(monkeypatch, [*odd, *({"text": text} for text in GOOD)])
    corpus = load_corpus(["org/name"], byte_tokenizer(), max_tokens=10**6)
    assert texts(corpus) == sorted(["w1 \ufffd w2", "bytes", *GOOD])
    skipped = {"without text": 2, "not a text": 2, "without the field 'text'": 1}
    assert described(corpus) == {"rows": 15, "skipped": skipped, "repaired": 1}


def test_a_stream_without_a_usable_row_ends_soon(monkeypatch):
    monkeypatch.setattr(packing, "_PATIENCE", 50)
    rows = stream(monkeypatch, ({"text": number} for number in range(10**9)))
    with pytest.raises(UserError, match=r"'org/name' is not a text \(found int\) \(none of the 50 rows of"):
        load_corpus(["org/name"], byte_tokenizer(), max_tokens=100)
    assert len(rows) == 51


def test_a_tokenizer_is_trained_on_the_rows_that_are_text(tmp_path):
    rows = [{"text": "w1 \ud83d w2"}, {"text": None}, {}, *({"text": text} for text in GOOD)]
    (tmp_path / "a.jsonl").write_text("\n".join([*map(json.dumps, rows), "nonsense"]))
    assert np.array(train_tokenizer([str(tmp_path / "a.jsonl")])("w1")["input_ids"]).size


def test_the_console_and_the_record_of_a_run_say_it_once(tmp_path, teacher_folder, capsys):
    rows = [{"text": " ".join(f"w{(7 * row + word) % 93}" for word in range(120))} for row in range(60)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, {"text": None}, {"text": "w1 \ud83d w2"}])))
    said = f"{path}: 1 of 62 rows was skipped: 1 without text; broken characters of 1 of 62 rows became U+FFFD"
    recipe = checked_recipe(Recipe(**RECIPE), teacher_folder, [str(path)])
    with Conversion.open(recipe, tmp_path / "run") as conversion:
        assert capsys.readouterr().out.count(said) == 1
        assert described(conversion.data) == {"rows": 62, "skipped": {"without text": 1}, "repaired": 1}
        record = SourceRecord(**conversion.data.sources[0])
    check_written(Metrics, {"text": [record.model_dump()]})
    console = Console(file=io.StringIO(), width=500)
    changes = ["evaluate.contexts=[16]", "evaluate.rows=1", "evaluate.retrieval.tasks=[]", "evaluate.max_new_tokens=1"]
    evaluate_model(teacher_folder, teacher=teacher_folder, data=[str(path)], changes=changes, console=console)
    assert console.file.getvalue().count(said) == 1


def test_json_of_results_is_valid_whatever_they_are():
    results = {
        "a": [math.nan, (math.inf, 1.5)],
        8: {"text": "w1 \ud83d"},
        "n": np.float64("-inf"),
        "z": [True, None, 3],
    }
    found = json.loads(json_text(results).encode(), parse_constant=pytest.fail)
    assert found == {"a": [None, [None, 1.5]], "8": {"text": "w1 \ufffd"}, "n": None, "z": [True, None, 3]}
