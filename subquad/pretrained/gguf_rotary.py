"""Rotary embedding of a GGUF file: its frequencies, the parameters that give them, and the check of a model's.

Notable:
- GGUF scales frequencies in four ways: a factor for all (linear), a ramp between factor and none (YaRN, arXiv
  2309.00071), one factor a frequency (`rope_freqs`, Llama 3), and two sets of these for short and long texts (LongRoPE,
  arXiv 2402.13753). Each is one list of factors, so each becomes transformers' `longrope`, which takes lists.
- A model of a class with its own rotary code may not read these parameters, so its frequencies are compared at the end.

Legend: R rotated pairs of channels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from subquad.errors import UserError
from subquad.pretrained.gguf_file import GgufFile

SLIDING_BASE = 10_000.0  # of layers with a window that have a base of their own, where a file does not state it
_TOLERANCE = 1e-5  # relative
_KEPT = ("mrope_section", "mrope_interleaved")  # parameters of several position axes, which scaling leaves alone
_READ = {
    "dimension_count", "freq_base", "freq_base_swa", "scale_linear", "scaling.type", "scaling.factor",
    "scaling.attn_factor", "scaling.original_context_length", "scaling.finetuned", "scaling.yarn_ext_factor",
    "scaling.yarn_attn_factor", "scaling.yarn_beta_fast", "scaling.yarn_beta_slow",
}  # fmt: skip
_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding that a file asks for.

    `short_R`, `long_R`: angles per position, for texts up to `original` tokens and for longer ones. `attention` scales
    cosines and sines. `unscaled_R` are the angles before scaling, `sliding_R` those of layers with a base of their own.
    """

    theta: float
    share: float
    unscaled_R: Tensor
    short_R: Tensor
    long_R: Tensor
    sliding_theta: float
    sliding_R: Tensor
    attention: float
    original: int

    @classmethod
    def of(cls, file: GgufFile) -> "Rotary":
        """Reads a file's settings. Raises UserError, naming them, for those that have no such form."""
        read = {key.removeprefix("rope."): value for key, value in file.settings.items() if key.startswith("rope.")}
        unread = [f"rope.{key}" for key in sorted(read.keys() - _READ) if _has_effect(key, read[key])]
        unread += sorted(file.rope_factors.keys() - set(_TENSORS))
        kind, factor = read.get("scaling.type", "linear"), read.get("scaling.factor", read.get("scale_linear")) or 1.0
        if kind not in ("none", "linear", "yarn", "longrope"):
            unread.append("rope.scaling.type")
        if unread:
            raise UserError(
                f"the GGUF file {file.path} has rotary embedding that Subquad does not read ({', '.join(unread)}): "
                "give the model's folder of safetensors instead"
            )
        factor = 1.0 if kind == "none" else float(factor)
        dims, theta = int(read.get("dimension_count", file.head_dim)), float(read.get("freq_base", 10_000.0))
        context = int(file.settings.get("context_length", 0))
        original = int(read.get("scaling.original_context_length") or context)

        # One angle a pair, interpolated, and mixed with itself by YaRN's ramp
        exponents_R = torch.arange(0, dims, 2, dtype=torch.float64) / dims
        unscaled_R, attention = theta**-exponents_R, float(read.get("scaling.attn_factor", 1.0))
        attention *= float(read.get("scaling.yarn_attn_factor", 1.0))
        scaled = [unscaled_R / file.rope_factors.get(name, 1.0) for name in (_TENSORS[1], _TENSORS[2])]
        if _TENSORS[0] in file.rope_factors:
            scaled = [unscaled_R / file.rope_factors[_TENSORS[0]]] * 2
        mix = float(read.get("scaling.yarn_ext_factor", 1.0)) if kind == "yarn" and factor != 1 else 0.0
        ramp_R = mix * _ramp(dims, theta, original, read) if mix else torch.zeros_like(unscaled_R)
        short_R, long_R = (angle_R / factor * (1 - ramp_R) + angle_R * ramp_R for angle_R in scaled)
        if mix:
            attention *= 1 + 0.1 * math.log(factor)
        sliding_theta = float(read.get("freq_base_swa", SLIDING_BASE))
        return cls(
            theta,
            dims / file.head_dim,
            unscaled_R,
            short_R,
            long_R,
            sliding_theta,
            sliding_theta**-exponents_R,
            attention,
            original if not torch.equal(short_R, long_R) else max(context, 1),
        )

    @property
    def scaled(self) -> bool:
        """Whether it differs from rotary embedding of this base."""
        same = torch.equal(self.short_R, self.unscaled_R) and torch.equal(self.long_R, self.unscaled_R)
        return not same or self.attention != 1

    def settle(self, config: PreTrainedConfig) -> None:
        """Writes its parameters into a configuration, if that has any."""
        before = getattr(config, "rope_parameters", None)
        if before is None:
            return
        ours: dict[str, Any] = {"rope_type": "default", "rope_theta": self.theta}
        if self.share != 1 or "partial_rotary_factor" in before:
            ours["partial_rotary_factor"] = self.share
        if self.scaled:
            ours |= {
                "rope_type": "longrope",
                "short_factor": (self.unscaled_R / self.short_R).tolist(),
                "long_factor": (self.unscaled_R / self.long_R).tolist(),
                "attention_factor": self.attention,
                "original_max_position_embeddings": self.original,
            }
            if hasattr(config, "original_max_position_embeddings"):
                config.original_max_position_embeddings = self.original
        if not any(isinstance(part, Mapping) for part in before.values()):
            config.rope_parameters = {key: before[key] for key in _KEPT if key in before} | ours
            return
        own_base = {"rope_theta": self.sliding_theta}
        config.rope_parameters = {
            kind: {**part, **own_base} if "sliding" in kind else ours for kind, part in before.items() if part
        }

    def check(self, model: PreTrainedModel, file: GgufFile) -> None:
        """Compares the frequencies of a model. Raises UserError if they are not these."""
        tables = {name: table for name, table in model.named_buffers() if name.endswith("inv_freq")}
        tables = {name: table for name, table in tables.items() if not name.endswith("original_inv_freq")}
        equal = bool(tables) or not self.scaled
        for name, table_R in tables.items():
            path, _, leaf = name.rpartition(".")
            sliding = "sliding" in leaf
            expected_R, attention = (self.sliding_R, 1.0) if sliding else (self.short_R, self.attention)
            scaling = getattr(model.get_submodule(path), leaf.replace("inv_freq", "attention_scaling"), 1.0)
            equal &= table_R.shape == expected_R.shape and math.isclose(scaling, attention, rel_tol=_TOLERANCE)
            equal = equal and torch.allclose(table_R.double(), expected_R, rtol=_TOLERANCE, atol=1e-12)
        if not equal:
            raise UserError(
                f"the GGUF file {file.path} asks for rotary embedding that {type(model).__name__} does not compute: "
                "give the model's folder of safetensors instead"
            )


def _ramp(dims: int, theta: float, original: int, read: Mapping[str, Any]) -> Tensor:
    """YaRN's share of each unscaled angle: 1 for pairs that turn often within the original context, 0 for slow ones."""

    def pair(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair(float(read.get("scaling.yarn_beta_fast", 32.0)))), 0)
    last = min(math.ceil(pair(float(read.get("scaling.yarn_beta_slow", 1.0)))), dims - 1)
    pairs_R = torch.arange(dims // 2, dtype=torch.float64)
    return 1 - ((pairs_R - first) / max(last - first, 0.001)).clamp(0, 1)


def _has_effect(key: str, value: Any) -> bool:
    """Whether a setting that is not read changes anything; several position axes are the same for text."""
    return key != "dimension_sections" and value not in (0, 0.0, None)
