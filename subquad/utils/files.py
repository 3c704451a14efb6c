"""Files that appear whole or not at all, the cache folder, and files of installed packages.

Notable:
- `write_aside` writes every file of a run: under another name first, then renamed, so that a reader or a resumed run
  never meets half a file.
- `build_once` builds folders of the cache in the same way. Two processes that build the same folder at once (as under
  `accelerate launch`) do the work twice; the first to finish wins.
"""

import errno
import hashlib
import importlib.util
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from subquad.errors import UserError
from subquad.utils.text import well_formed


@contextmanager
def write_aside(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Temporary path to write a file or a folder to; it is renamed to `path` when the block ends.

    `durable` syncs to disk before and after the rename, so that it also survives a power cut. After an error nothing
    of the new file is left, and the old one is untouched.
    """
    aside = path.with_name(path.name + ".tmp")
    _remove(aside)  # of a process that was killed
    try:
        yield aside
        if durable:
            for part in [*(aside.iterdir() if aside.is_dir() else []), aside]:
                sync(part)
        if aside.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # a folder replaces only an empty one
        os.replace(aside, path)
        if durable:
            sync(path.parent)
    except Exception:
        _remove(aside)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def cache_dir() -> Path:
    """Folder of converted teachers and token files: `$SUBQUAD_CACHE`, or `~/.cache/subquad`."""
    return Path(os.environ.get("SUBQUAD_CACHE") or "~/.cache/subquad").expanduser()


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, after `build(temporary folder)` has filled it if it did not exist yet.

    Raises:
        UserError: the disk is full or the place cannot be written. Nothing is left behind.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"the cache folder {folder.parent} cannot be written ({error.strerror}): set SUBQUAD_CACHE to another one"
        ) from error
    try:
        build(aside)
        aside.chmod(0o755)  # mkdtemp makes it private to the user; a cache may be shared
        try:
            os.replace(aside, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, and its folder is as good
                raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"the disk is full while writing {folder}: free some space, or set SUBQUAD_CACHE to another disk"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception means that the disk is full; safetensors' own error type has it only in its message."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error)


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def package_file(package: str, inside: str) -> Path | None:
    """A file or folder of an installed top-level package, or None if it is not there.

    The package is not imported, so its dependencies may be missing.
    """
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders if (path := Path(folder) / inside).exists()), None)


def first_line(error: BaseException) -> str:
    """The gist of a library's exception, short enough to stand inside a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def make_room(file: Path) -> None:
    """Makes the folder of a file that is to be written. Raises UserError where that, or the file, cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the file {file} cannot be written: {error.strerror}") from None
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"the file {file} cannot be written: give another one")


def json_text(value: Any) -> str:
    """JSON of results that every reader takes: numbers that are not finite are null, broken characters U+FFFD."""
    return well_formed(json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(file: Path, report: Mapping[str, Any]) -> None:
    """Writes a report, and makes the folder for it where there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(file) as aside:
        aside.write_text(json_text(report) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def claim_folder(folder: Path, *, earlier: bool, kind: str, resume: bool, overwrite: bool) -> None:
    """Makes `folder` ready to write a `kind` into: new, emptied, or as it is if the earlier one is to be resumed.

    `earlier`: whether it holds one. Raises UserError, and touches nothing, for a folder that holds something else, or
    an earlier one with neither `resume` nor `overwrite`.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give another folder with --out")
    if not earlier and folder.exists() and any(folder.iterdir()):
        owner = {"run": "a run of Subquad", "cache": "a teacher's cache"}[kind]
        raise UserError(f"{folder} holds something other than {owner}; give another folder with --out")
    if earlier and not (resume or overwrite):
        raise UserError(f"{folder} holds an earlier {kind}; continue it with --resume, or replace it with --overwrite")
    try:
        if overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {folder} cannot be made ready: {error.strerror}; give another one with --out"
        ) from None
