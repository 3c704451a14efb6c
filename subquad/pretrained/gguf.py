"""Conversion of a GGUF file to a folder that any `from_pretrained` loads.

Notable:
- Weights are dequantised to float32 once; the folder, named by the file's SHA-256, stays in the cache.
- Nothing in the folder refers to GGUF: a plain config, safetensors, and a tokenizer that splits text as the file's
  metadata asks for.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from subquad.errors import UserError
from subquad.utils.files import build_once, cache_dir, first_line
from subquad.utils.logging import quiet

FORMAT = 1  # of a converted folder; raise it when the conversion changes
# GGUF names of tokenizers that split off every digit before the GPT-2 rule; transformers leaves that out.
_DIGIT_SPLITTERS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


def converted(file: Path, sha256: str) -> Path:
    """Folder that `file`, of digest `sha256`, is converted to; from the cache if it was converted before.

    Raises:
        UserError: the file is damaged or cut short, of an architecture transformers does not read, or the disk is full.
    """
    folder = cache_dir() / "teachers" / f"{file.stem}-{sha256[:16]}-{FORMAT}"
    return build_once(folder, lambda aside: _convert(file, aside))


def _convert(file: Path, folder: Path) -> None:
    """Dequantises `file` to float32 safetensors with its config and tokenizer in `folder`."""
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            rule = _string(file, "tokenizer.ggml.pre")
    except OSError as error:
        if error.errno is not None:  # the disk or the file system, not the file's contents
            raise
        raise UserError(f"the GGUF file {file} cannot be converted ({first_line(error)})") from error
    except Exception as error:  # a damaged file can trip the parser in any way
        raise UserError(
            f"the GGUF file {file} cannot be converted ({first_line(error)}): it is damaged or cut short, or of an "
            "architecture that transformers does not read from GGUF"
        ) from error
    if rule in _DIGIT_SPLITTERS:
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(folder)
    # A plain model without GGUF settings, so that it saves, loads and trains like any other.
    described = model.config.to_dict()
    described.pop("quantization_config", None)
    described.pop("_name_or_path", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(type(model.config).from_dict(described))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    with quiet():
        plain.save_pretrained(folder)


def _string(file: Path, key: str) -> str | None:
    """String in the metadata of a GGUF file."""
    from gguf import GGUFReader

    entry = GGUFReader(file).get_field(key)
    return None if entry is None else str(entry.contents())
