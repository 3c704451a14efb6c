"""Metadata and tensor names of a GGUF file, as its own settings of the model that it holds.

Notable:
- A key without the architecture's prefix (`general.`, `tokenizer.`, ...) says nothing of what the model computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class GgufFile:
    """Opened GGUF file.

    Attributes:
        path: of the file.
        architecture: name of the architecture, the prefix of its settings.
        settings: values of the keys with that prefix, without it.
        part_count: number of files that hold the model together.
        shapes: shapes of the tensors by name, in torch's order.
        rope_factors: 1-D tensors by which rotary frequencies are divided, by name.
        digit_rule: name of the rule by which the tokenizer splits text, or None.
    """

    path: Path
    architecture: str
    settings: Mapping[str, Any]
    part_count: int
    shapes: Mapping[str, tuple[int, ...]]
    rope_factors: Mapping[str, Tensor]
    digit_rule: str | None

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        """Read the header of a file, and its rotary factors."""
        from gguf import GGUFReader, dequantize

        reader = GGUFReader(path)
        architecture = str(reader.fields["general.architecture"].contents())
        prefix = f"{architecture}."
        pre, parts = reader.get_field("tokenizer.ggml.pre"), reader.get_field("split.count")
        return cls(
            path,
            architecture,
            {
                key.removeprefix(prefix): field.contents()
                for key, field in reader.fields.items()
                if key.startswith(prefix)
            },
            1 if parts is None else int(parts.contents()),
            {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors},
            {
                tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).double()
                for tensor in reader.tensors
                if tensor.name.startswith(("rope_freqs", "rope_factors"))
            },
            None if pre is None else str(pre.contents()),
        )

    @cached_property
    def layers(self) -> int:
        """Number of decoder layers; blocks behind them predict further tokens and are no part of the model."""
        return int(self.settings["block_count"]) - int(self.settings.get("nextn_predict_layers", 0))

    @cached_property
    def head_dim(self) -> int:
        """Width of a head: the stated one, or the model's width divided among its heads."""
        width, heads = self.settings["embedding_length"], self.settings["attention.head_count"]
        heads = max(heads) if isinstance(heads, list) else heads
        return int(self.settings.get("attention.key_length") or width // heads)

    @cached_property
    def weight_sizes(self) -> dict[str, int]:
        """Number of values of each tensor that is a weight of a decoder layer, an embedding or the head."""
        return {
            name: prod(shape)
            for name, shape in self.shapes.items()
            if name not in self.rope_factors and not self.layers <= _block(name) < int(self.settings["block_count"])
        }


def _block(name: str) -> int:
    """Index of the block that a tensor belongs to; -1 for none."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" and parts[1].isdigit() else -1
