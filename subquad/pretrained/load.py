"""Load a teacher: a language model with its tokenizer, or a model of images with its processor.

Notable:
- Every source goes through the same checks (source.py) and the same `from_pretrained`. Safetensors are mapped into
  memory, so a folder loads in about a second.
- After loading no weight may be missing, which transformers would fill with noise.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ViTImageProcessorPil,
)

from subquad.errors import UserError, nearest
from subquad.model.interface import image_size, shapes_of, wraps_text
from subquad.model.placement import is_quantised
from subquad.model.tasks import TASKS, TEXT, Task
from subquad.model.text_part import text_part
from subquad.plan import AttentionShape
from subquad.pretrained.source import DEFAULT_TEACHER, checked_config, checked_weights, fingerprint_of, folder_of
from subquad.pretrained.vocabulary import cut_to_rows
from subquad.utils.files import cache_dir, first_line
from subquad.utils.logging import quiet

__all__ = ["DEFAULT_TEACHER", "Teacher", "cache_dir", "load_pretrained", "load_tokenizer"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
PLAIN = (0.5, 0.5, 0.5)  # mean and deviation of images, where a folder has no processor


@dataclass
class Teacher:
    """A frozen model with its tokenizer or image processor.

    Attributes:
        model: in evaluation mode, no parameter requires a gradient.
        reader: the tokenizer, or the image processor.
        name: for people.
        source: argument that makes `load_pretrained` load it again, from any working directory.
        fingerprint: hex SHA-256 of the config, the names and sizes of the weights files, and samples of their bytes.
            Cheap, and differs between a fine-tuned checkpoint and its base.
        task: the task that it was loaded for.
    """

    model: PreTrainedModel
    reader: Any
    name: str
    source: str
    fingerprint: str
    task: str = TEXT

    @property
    def kind(self) -> Task:
        """The task it was loaded for: its auto class, its students, and whether it reads text or images."""
        return TASKS[self.task]

    @property
    def shapes(self) -> list[AttentionShape]:
        """The shapes of its attention, layer by layer. Raises UserError as `find_attention` does."""
        return shapes_of(self.model)

    def answers(self) -> dict[Any, Any]:
        """What it chooses among: tokens with their ids, or classes."""
        return dict(self.model.config.id2label or {}) if self.kind.of_images else self.tokenizer.get_vocab()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The reader of a language model."""
        tokenizer: PreTrainedTokenizerBase = self.reader
        return tokenizer


def load_pretrained(
    source: str = DEFAULT_TEACHER,
    *,
    task: str = TEXT,
    dtype: str | torch.dtype = "float32",
    device: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    layers: int | None = None,
) -> Teacher:
    """The teacher named by `source`: "default", a Hub id, a folder, or a GGUF file.

    Args:
        task: text-generation, image-classification, or image-feature-extraction.
        dtype: of the weights.
        device: where to load them; None is the CPU, the memory-mapped way.
        trust_remote_code: run modelling code that the checkpoint brings along.
        allow_pickle: accept pickled weights (`*.bin`) where there are no safetensors; loading them may run code.
        layers: keep only the first so many layers.

    Raises:
        UserError: an unknown teacher, files missing, damaged or cut short, pickled weights not allowed, a model that is
            not for the task, no tokenizer, a dtype or device that does not exist.
    """
    kind, torch_dtype, place = TASKS[task], _dtype(dtype), _device(device)
    if kind.of_images and source == DEFAULT_TEACHER:
        raise UserError(f"there is no default teacher for {task}: name one")
    name, folder = folder_of(source, trust_remote_code, allow_pickle)
    config = checked_config(folder, name, kind, trust_remote_code)
    if layers is not None:
        _keep_layers(config, layers, name)
    weights = checked_weights(folder, allow_pickle)
    with quiet():
        load_reader = load_processor if kind.of_images else load_tokenizer
        reader = load_reader(folder, trust_remote_code=trust_remote_code)
        safetensors = weights[0].suffix == ".safetensors"
        model = _load_model(folder, name, config, kind, torch_dtype, place, trust_remote_code, safetensors)
    if not kind.of_images and wraps_text(model):
        warnings.warn(f"the teacher '{name}' reads more than text: only its text part is converted", stacklevel=2)
        model = text_part(model)
    if not kind.of_images and isinstance(embedding := model.get_input_embeddings(), nn.Embedding):
        cut_to_rows(reader, embedding.num_embeddings, name)
    model.eval().requires_grad_(False)
    return Teacher(model, reader, name, _lasting(source), fingerprint_of(folder, weights, layers), task)


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


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The image processor saved in a model's folder; where there is none, one that scales to the model's size.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if (folder / "preprocessor_config.json").is_file():
            return AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of whatever type a library raises for such a file
        raise UserError(f"the image processor in {folder} cannot be read ({first_line(error)})") from error
    height, width = image_size(config)
    return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=PLAIN, image_std=PLAIN)


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


def _keep_layers(config: PreTrainedConfig, layers: int, name: str) -> None:
    text = config.get_text_config()
    if not 1 <= layers <= text.num_hidden_layers:
        raise UserError(f"layers={layers}, but the teacher '{name}' has {text.num_hidden_layers}: give 1 to that many")
    text.num_hidden_layers = layers
    described = text.to_dict()
    for key in ("layer_types", "mlp_layer_types"):
        if described.get(key) is not None:
            setattr(text, key, described[key][:layers])


def _load_model(
    folder: Path,
    name: str,
    config: PreTrainedConfig,
    task: Task,
    dtype: torch.dtype,
    device: torch.device | None,
    trust_remote_code: bool,
    safetensors: bool,
) -> PreTrainedModel:
    loaded: Any
    try:
        loaded = task.auto_class(config).from_pretrained(
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
    if lost := sorted(key for key in info["unexpected_keys"] if _in_a_block(model, key)):
        raise UserError(
            f"the weights in {folder} have {len(lost)} tensors that {type(model).__name__} has no place for, e.g. "
            f"{lost[0]}: it would compute something else, so give a folder whose config.json fits its weights"
        )
    if is_quantised(model):
        try:
            model.dequantize(dtype=dtype)
        except Exception as error:  # of whatever type the library of the quantised form raises
            raise UserError(
                f"the teacher '{name}' has quantised weights, which cannot be turned back ({first_line(error)}): give "
                "the model in full precision"
            ) from error
    return model


def _in_a_block(model: PreTrainedModel, key: str) -> bool:
    """Whether a tensor without a place belongs to a block that the model has.

    Outside of blocks, weights files have much that a model does without (heads of other tasks, layers that were cut
    off); rotary frequencies are computed, so older files that have them lose nothing.
    """
    parts = key.split(".")
    paths = (".".join(parts[: place + 1]) for place, part in enumerate(parts) if part.isdigit())
    modules = dict(model.named_modules())
    return parts[-1] != "inv_freq" and any(path in modules for path in paths)


def _lasting(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if source != DEFAULT_TEACHER and path.exists() else source
