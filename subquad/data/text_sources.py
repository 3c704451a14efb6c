"""Documents of the user's text: files, folders, and data sets on the Hub.

Notable:
- A `TextSource` yields documents lazily, so files larger than memory and streamed data sets both work.
- A long .txt is split at blank lines into documents of at most a sixteenth of the source, so that complete documents
  can be held out even from a single book.
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

from subquad.errors import UserError, nearest
from subquad.utils.files import first_line

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
LONGEST_TXT_DOCUMENT = 256 * 1024  # bytes; longer ones are split
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[^:]*){0,3}")


@dataclass(frozen=True)
class Document:
    """One text before `clean`. `test` marks a document that is always held out for the test part."""

    text: str
    test: bool = False


@dataclass(frozen=True)
class TextSource:
    """Texts of one kind.

    Attributes:
        name: name in the report.
        license: license of the texts, in words.
        signature: text that changes with the contents (paths, sizes and times, or a data set's id); part of the cache's
            key.
        documents: starts a new pass over the documents, in a fixed order.
        endless: True for a stream of unknown length.
    """

    name: str
    license: str
    signature: str
    documents: Callable[[], Iterator[Document]]
    endless: bool = False


def clean(text: str) -> str:
    """Normalise line ends and remove trailing blanks, byte-order marks, NULs and repeated blank lines.

    Indentation is kept, since it is significant in code.
    """
    text = text.replace("\ufeff", "").replace("\0", "").replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[^\S\n]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n").rstrip()


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

    def documents() -> Iterator[Document]:
        for file in files:
            try:
                for text in _read(file, longest):
                    yield Document(text)
            except PermissionError as error:
                raise UserError(f"the text file {file} may not be read: change its permissions") from error

    return TextSource(str(path), "not stated (the user's own text)", stat_signature(files), documents)


def _read(file: Path, longest: int) -> Iterator[str]:
    match _suffix(file):
        case ".txt":
            with file.open("rb") as lines:
                yield from _pieces(_decoded(file, lines), longest)
        case ".jsonl":
            with file.open("rb") as lines:
                yield from _json_texts(file, _decoded(file, lines))
        case ".jsonl.gz":
            try:
                with gzip.open(file) as lines:
                    yield from _json_texts(file, _decoded(file, lines))
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise UserError(f"the text file {file} is damaged or cut short ({error}): copy it again") from error
        case ".parquet":
            yield from _parquet_texts(file)


def _decoded(file: Path, lines: Iterable[bytes]) -> Iterator[str]:
    """Decode lines one by one, which is safe because a UTF-8 sequence never contains a newline byte."""
    offset = 0
    for line in lines:
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            is_utf16 = offset == 0 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            raise UserError(
                f"the text file {file} is not UTF-8: byte 0x{line[error.start]:02x} at offset {offset + error.start} "
                f"cannot be read: convert it first, e.g. iconv -f {'utf-16' if is_utf16 else 'latin1'} -t utf-8"
            ) from error
        offset += len(line)


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


def _json_texts(file: Path, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.lstrip("\ufeff"))
        except json.JSONDecodeError as error:
            raise UserError(f"line {number} of {file} is not JSON ({error.msg} at column {error.colno})") from error
        yield _text_of(record, "text", f"line {number} of {file}")


def _text_of(record: Any, column: str, location: str) -> str:
    if not isinstance(record, dict):
        raise UserError(f"{location} is not a JSON object with a field '{column}'")
    if column not in record:
        raise UserError(f"{location} has no field '{column}': {nearest(column, map(str, record))}")
    if not isinstance(record[column], str):
        raise UserError(f"field '{column}' in {location} is not a text")
    return record[column]


def _parquet_texts(file: Path) -> Iterator[str]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            if "text" not in table.schema_arrow.names:
                raise UserError(f"the table {file} has no column 'text': {nearest('text', table.schema_arrow.names)}")
            for rows in table.iter_batches(batch_size=1024, columns=["text"]):
                for text in rows.column(0).to_pylist():
                    if text is not None:
                        yield _text_of({"text": text}, "text", str(file))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"the table {file} is damaged or cut short ({error}): copy it again") from error


def _hub_source(spec: str) -> TextSource:
    name, config, split, column = (spec.split(":") + ["", "", ""])[:4]
    column = column or "text"

    def documents() -> Iterator[Document]:
        import datasets

        try:
            for record in datasets.load_dataset(name, config or None, split=split or "train", streaming=True):
                yield Document(_text_of(record, column, f"the data set '{name}'"))
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError, LookupError) as error:
            raise UserError(
                f"the data set '{spec}' cannot be streamed ({first_line(error)}): check its name "
                "(org/name:config:split:column), the network and your access"
            ) from error

    return TextSource(spec, "see the data set's card on the Hub", spec, documents, endless=True)
