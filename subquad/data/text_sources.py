"""Documents of the user's text: files, folders, and data sets on the Hub.

Notable:
- A `TextSource` yields documents lazily, so files larger than memory and streamed data sets both work.
- A long .txt is split at blank lines into documents of at most a sixteenth of the source, so that complete documents
  can be held out even from a single book.
- Bytes that are not UTF-8 become surrogates, which `clean` replaces and counts as it does those that a row brings.
- Every error names the file, and the byte or line in it.
"""

import codecs
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subquad.data.text_rows import Document, Row, Skipped
from subquad.errors import UserError, nearest
from subquad.utils.files import first_line

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
LONGEST_TXT_DOCUMENT = 256 * 1024  # bytes; longer ones are split
_AROUND_JSON = " \t\n\0\ufeff"  # what editors and crashed writers leave around a row
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[^:]*){0,3}")


@dataclass(frozen=True)
class TextSource:
    """Texts of one kind.

    Attributes:
        name: name in the report.
        license: license of the texts, in words.
        signature: text that changes with the contents (paths, sizes and times, or a data set's id); part of the cache's
            key.
        documents: starts a new pass over the rows, in a fixed order.
        endless: True for a stream of unknown length.
    """

    name: str
    license: str
    signature: str
    documents: Callable[[], Iterator[Row]]
    endless: bool = False


def open_source(spec: str) -> TextSource:
    """Open a source: a file, a folder of files, or `org/name[:config[:split[:column]]]` on the Hub.

    Raises:
        UserError: no such file, an unknown extension, an empty file, or a folder without text files.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and _suffix(file)]
        if not files:
            raise UserError(f"the folder {path} holds no text: expected files ending in {', '.join(SUFFIXES)}")
        # Ordered by a hash of the name, so that a prefix is a fair sample.
        files.sort(key=lambda file: hashlib.sha256(str(file.relative_to(path)).encode()).digest())
        return _files_source(path, files)
    if path.is_file():
        if not _suffix(path):
            raise UserError(f"the text file {path} has an unknown extension: {nearest(path.suffix, SUFFIXES)}")
        if path.stat().st_size == 0:
            raise UserError(f"the text file {path} is empty")
        return _files_source(path, [path])
    if _HUB_ID.fullmatch(spec) and not _suffix(path):
        return _hub_source(spec)
    raise UserError(f"no text at '{spec}': there is no such file or folder, and it is not a data set id like org/name")


def stat_signature(files: Iterable[Path]) -> str:
    """Join names, sizes and modification times of files in one string."""
    stats = ((file, file.stat()) for file in files)
    return "\n".join(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats)


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in reversed(SUFFIXES) if path.name.lower().endswith(suffix)), None)


def _files_source(path: Path, files: list[Path]) -> TextSource:
    txt_bytes = sum(file.stat().st_size for file in files if _suffix(file) == ".txt")
    longest = min(LONGEST_TXT_DOCUMENT, max(1, txt_bytes // 16))

    def documents() -> Iterator[Row]:
        for file in files:
            try:
                yield from _read(file, longest)
            except PermissionError as error:
                raise UserError(f"the text file {file} may not be read: change its permissions") from error

    return TextSource(str(path), "not stated (the user's own text)", stat_signature(files), documents)


def _read(file: Path, longest: int) -> Iterator[Row]:
    if (utf16 := _in_utf16(file)) is not None:
        yield utf16
        return
    match _suffix(file):
        case ".txt":
            with file.open("rb") as lines:
                yield from _txt_rows(file, _decoded(lines), longest)
        case ".jsonl":
            with file.open("rb") as lines:
                yield from _json_rows(file, _decoded(lines))
        case ".jsonl.gz":
            try:
                with gzip.open(file) as lines:
                    yield from _json_rows(file, _decoded(lines))
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise UserError(f"the text file {file} is damaged or cut short ({error}): copy it again") from error
        case ".parquet":
            yield from _parquet_rows(file)


def _in_utf16(file: Path) -> Skipped | None:
    with file.open("rb") as content:
        if content.read(2) not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return None
    sentence = f"the text file {file} is UTF-16: convert it first, e.g. iconv -f utf-16 -t utf-8"
    return Skipped("in UTF-16", lambda: sentence)


def _decoded(lines: Iterable[bytes]) -> Iterator[str]:
    """Decode lines one by one, which is safe because a UTF-8 sequence never contains a newline byte."""
    return (line.decode("utf-8", "surrogateescape") for line in lines)


def _txt_rows(file: Path, lines: Iterable[str], longest: int) -> Iterator[Row]:
    has_text = False
    for piece in _pieces(lines, longest):
        if piece.strip():
            has_text = True
            yield Document(piece)
    if not has_text:
        yield Skipped("without text", lambda: f"the text file {file} is empty")


def _pieces(lines: Iterable[str], longest: int) -> Iterator[str]:
    """Join lines into texts of half `longest` to `longest` characters, which end at a blank line if there is one."""
    parts: list[str] = []
    size = 0
    for line in lines:
        if parts and size + len(line) > longest:
            yield "".join(parts)
            parts, size = [], 0
        parts.append(line)
        size += len(line)
        if size > longest:  # a single line is too long: split it between words
            yield from _cut(line, longest)
            parts, size = [], 0
        elif size > longest // 2 and not line.strip():
            yield "".join(parts)
            parts, size = [], 0
    yield "".join(parts)


def _cut(text: str, longest: int) -> Iterator[str]:
    start = 0
    while len(text) - start > longest:
        space = text.rfind(" ", start + 1, start + longest)
        stop = space if space > start else start + longest
        yield text[start:stop]
        start = stop
    yield text[start:]


def _json_rows(file: Path, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        location = f"line {number} of {file}"
        for part in line.split("\r"):  # a line end of its own in old files, and never inside a JSON text
            if row := part.strip(_AROUND_JSON):
                yield _json_row(row, location)


def _json_row(row: str, location: str) -> Row:
    try:
        # Numbers have no use here, and Python refuses to read whole ones of more than 4,300 digits.
        record = json.loads(row, strict=False, parse_int=float)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
        return Skipped("not JSON", lambda: f"{location} is not JSON ({reason})")
    except RecursionError:
        return Skipped("nested too deeply", lambda: f"{location} is nested too deeply to be read")
    return _row_of(record, "text", location)


def _row_of(record: Any, column: str, location: str) -> Row:
    if not isinstance(record, dict):
        return Skipped("not a JSON object", lambda: f"{location} is not a JSON object with a field '{column}'")
    if column not in record:
        return Skipped(
            f"without the field '{column}'",
            lambda: f"{location} has no field '{column}': {nearest(column, map(str, record))}",
        )
    text = record[column]
    if text is None:
        return Skipped("without text", lambda: f"field '{column}' in {location} is null")
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    if not isinstance(text, str):
        kind = type(text).__name__
        return Skipped("not a text", lambda: f"field '{column}' in {location} is not a text (found {kind})")
    return Document(text)


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            names = [str(name) for name in table.schema_arrow.names]
            if "text" not in names:
                sentence = f"the table {file} has no column 'text': {nearest('text', names)}"
                yield Skipped("without the field 'text'", lambda: sentence, rows=table.metadata.num_rows)
                return
            for rows in table.iter_batches(batch_size=1024, columns=["text"]):
                for text in _values(rows.column(0)):
                    yield _row_of({"text": text}, "text", f"a row of {file}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"the table {file} is damaged or cut short ({error}): copy it again") from error


def _values(column: Any) -> Iterator[Any]:
    """Values of a column of a table, with bytes in place of a text that is not UTF-8."""
    try:
        yield from column.to_pylist()
    except UnicodeDecodeError:
        for value in column.dictionary_decode() if hasattr(column, "dictionary_decode") else column:
            buffer = value.as_buffer()
            yield None if buffer is None else buffer.to_pybytes()


def _hub_source(spec: str) -> TextSource:
    name, config, split, column = (spec.split(":") + ["", "", ""])[:4]
    column = column or "text"

    def documents() -> Iterator[Row]:
        import datasets

        try:
            for record in datasets.load_dataset(name, config or None, split=split or "train", streaming=True):
                yield _row_of(record, column, f"a row of the data set '{name}'")
        except (OSError, ValueError, RuntimeError, LookupError) as error:
            raise UserError(
                f"the data set '{spec}' cannot be streamed ({first_line(error)}): check its name "
                "(org/name:config:split:column), the network and your access"
            ) from error

    return TextSource(spec, "see the data set's card on the Hub", spec, documents, endless=True)
