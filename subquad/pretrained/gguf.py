"""Conversion of a GGUF file to a folder that any `from_pretrained` loads.

Notable:
- Weights are dequantised to float32 once; the folder, named by the file's SHA-256, stays in the cache.
- Nothing in the folder refers to GGUF: a plain config, safetensors, and a tokenizer that splits text as the file's
  metadata asks for.
- Nothing of the file is lost without a word: each tensor is in the model, each setting in its configuration
  (gguf_settings.py, gguf_rotary.py), or the file is refused, naming what has no place.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from subquad.errors import UserError
from subquad.pretrained.gguf_file import GgufFile
from subquad.pretrained.gguf_rotary import Rotary
from subquad.pretrained.gguf_settings import check_windows, settle
from subquad.utils.files import build_once, cache_dir, first_line
from subquad.utils.logging import quiet

FORMAT = 2  # of a converted folder; raise it when the conversion changes
# GGUF names of tokenizers that split off every digit before the GPT-2 rule; transformers leaves that out.
_DIGIT_SPLITTERS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


def converted(file: Path, sha256: str) -> Path:
    """Folder that `file`, of digest `sha256`, is converted to; from the cache if it was converted before.

    Raises:
        UserError: the file is damaged or cut short, of an architecture transformers does not read, lacks tensors, has
            tensors or settings that the model has no place for, or the disk is full.
    """
    folder = cache_dir() / "teachers" / f"{file.stem}-{sha256[:16]}-{FORMAT}"
    return build_once(folder, lambda aside: _convert(file, aside))


def _convert(file: Path, folder: Path) -> None:
    """Dequantises `file` to float32 safetensors with its config and tokenizer in `folder`."""
    try:
        with quiet():
            opened = GgufFile.open(file)
            model = _model(opened)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except UserError:
        raise
    except OSError as error:
        if error.errno is not None:  # the disk or the file system, not the file's contents
            raise
        raise UserError(f"the GGUF file {file} cannot be converted ({first_line(error)})") from error
    except Exception as error:  # a damaged file can trip the parser in any way
        raise UserError(
            f"the GGUF file {file} cannot be converted ({first_line(error)}): it is damaged or cut short, or of an "
            "architecture that transformers does not read from GGUF"
        ) from error
    if opened.digit_rule in _DIGIT_SPLITTERS:
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(folder)
    with quiet():
        model.save_pretrained(folder)


def _model(file: GgufFile) -> PreTrainedModel:
    """Model of a file, without GGUF settings, so that it saves, loads and trains like any other.

    Raises UserError, naming them, for tensors or settings of the file that would be lost, and tensors that it lacks.
    """
    if file.part_count > 1:
        raise UserError(f"{file.path} is one of {file.part_count} parts of a GGUF file: merge them into one file")
    place: dict[str, Any] = {"pretrained_model_name_or_path": file.path.parent, "gguf_file": file.path.name}
    config, rotary = AutoConfig.from_pretrained(**place), Rotary.of(file)
    settle(config, file)
    rotary.settle(config)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        **place,
        config=config,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, info = loaded
    _check_tensors(file, model, info)
    described = model.config.to_dict()
    described.pop("quantization_config", None)
    described.pop("_name_or_path", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(type(model.config).from_dict(described))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    rotary.check(model, file)
    check_windows(model, file)
    return plain


def _check_tensors(file: GgufFile, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Compares a file's tensors with a model's. Raises UserError for one that is missing, unused or of another shape.

    Every value of the file must be in the model: the numbers of values agree, however names and layouts differ.
    """
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"the GGUF file {file.path} lacks {len(missing)} tensors of the model, e.g. {_gguf_name(file, missing[0])}"
            f" ({missing[0]}): it is not whole"
        )
    if mismatched := sorted(str(name) for name, *_ in info["mismatched_keys"]):
        raise UserError(
            f"the GGUF file {file.path} has {len(mismatched)} tensors of another shape than its settings say, "
            f"e.g. {_gguf_name(file, mismatched[0])} ({mismatched[0]}): it is damaged, or transformers misreads it"
        )
    distinct = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    if sum(file.weight_sizes.values()) != sum(distinct.values()):
        known = {_gguf_name(file, name) for name in model.state_dict()}
        unused = sorted(file.weight_sizes.keys() - known)
        raise UserError(
            f"the GGUF file {file.path} has {len(unused)} tensors that {type(model).__name__} has no place for"
            f"{f', e.g. {unused[0]}' if unused else ''}: give the model's folder of safetensors instead"
        )


def _gguf_name(file: GgufFile, name: str) -> str:
    """GGUF's name of a model's tensor; the model's own where GGUF has none."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architectures = {written: architecture for architecture, written in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(architectures[file.architecture], file.layers)
    return names.get_name(name, try_suffixes=(".weight", ".bias")) or name
