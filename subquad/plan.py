"""A plan: which mixer each head of each layer uses.

A layer-level hybrid is the plan in which a layer's heads agree. Plans are small YAML files to be read and edited:

    format: 1
    shape: {layers: 4, heads: 9, kv_heads: 3, head_dim: 64, hidden_size: 576}
    mixers:
      attention: {}
      hedgehog: {window: 64, sinks: 4}
    layers:
      0: attention
      1: hedgehog
      2: {attention: [0, 3], hedgehog: [1, 2, 4, 5, 6, 7, 8]}
      3: attention

`join` says how the two parts of a layer such as 2 become one output. `split`: each head has one mixer, and the output
projection joins them. `parallel`: the other mixer has all the heads, those of attention too (`hedgehog: [0, ..., 8]`),
and attention comes as a second branch through an adapter (join.py).

A plan knows what its cache costs: `plan.cache_bytes(context, batch, dtype)`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from subquad.errors import UserError
from subquad.mixers import HeadGroup, mixer_class, mixer_options

Join: TypeAlias = Literal["split", "parallel"]
JoinStart: TypeAlias = Literal["identity", "random"]

FORMAT = 1
ATTENTION = "attention"
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def dtype_name(model: Any) -> str:
    """The floating point type of a model as `cache_bytes` knows it."""
    return str(model.dtype).removeprefix("torch.")


def _block(key: str, value: Any) -> str:
    """One entry of a plan's file; a mapping of mappings (and that of the layers) gets a line for each entry."""
    if isinstance(value, dict) and (key == "layers" or all(isinstance(inner, dict) for inner in value.values())):
        return f"{key}:\n" + "".join(f"  {_line({name: inner})}" for name, inner in value.items())
    return _line({key: value})


def _line(entry: dict[Any, Any]) -> str:
    ((name, value),) = entry.items()
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return f"{name}: " + text.split("\n...")[0].rstrip() + "\n"


class AttentionShape(BaseModel):
    """The attention of one layer: counts of heads, and widths in elements; `window` is the teacher's own, in tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    window: int | None = Field(None, ge=1)

    def group(self, heads: Iterable[int]) -> HeadGroup:
        """These heads of the layer, as a mixer sees them."""
        return HeadGroup(
            tuple(sorted(heads)),
            queries_per_kv=self.heads // self.kv_heads,
            head_dim=self.head_dim,
            hidden_size=self.hidden_size,
            window=self.window,
            layer_heads=self.heads,
        )


def every_head(shapes: Sequence[AttentionShape]) -> list[tuple[int, int]]:
    """All heads of a model, as (layer, head)."""
    return [(layer, head) for layer, shape in enumerate(shapes) for head in range(shape.heads)]


class Plan(BaseModel):
    """Mixers by layer and head. `layers[l]` maps a mixer's name to its head indices; every head has just one mixer, but
    under the parallel join, where those that attend have another one as well."""

    model_config = ConfigDict(extra="forbid")

    shapes: list[AttentionShape]
    mixers: dict[str, dict[str, Any]]
    layers: list[dict[str, list[int]]]
    join: Join = "split"

    def model_post_init(self, context: Any) -> None:
        """Checks the whole plan. Raises UserError naming the layer or mixer that is wrong."""
        for name, options in self.mixers.items():
            mixer_options(name, options)
        if len(self.shapes) != len(self.layers):
            raise UserError(f"the plan lists {len(self.layers)} layers but describes {len(self.shapes)}")
        for index, (shape, layer) in enumerate(zip(self.shapes, self.layers, strict=True)):
            beside = sorted(layer.get(ATTENTION, [])) if self.joined(index) else []
            listed = sorted(head for heads in layer.values() for head in heads)
            if listed != sorted([*range(shape.heads), *beside]):
                others = " beside attention" if beside else ""
                raise UserError(
                    f"layer {index} of the plan must give each of its {shape.heads} heads exactly one mixer{others}, "
                    f"but lists heads {listed}"
                )
            for name in layer:
                if name not in self.mixers:
                    raise UserError(f"layer {index} of the plan uses mixer '{name}', which is not under 'mixers'")

    # ------------------------------------------------------------------ making plans

    @classmethod
    def by_layer(
        cls,
        shapes: list[AttentionShape],
        attention_layers: Iterable[int],
        mixer: str,
        options: dict[str, Any] | None = None,
    ) -> Plan:
        """The layer-level hybrid that keeps attention in `attention_layers` and uses `mixer` in all others."""
        keep = set(attention_layers)
        outside = keep - set(range(len(shapes)))
        if outside:
            raise UserError(f"layer {min(outside)} is not one of the teacher's {len(shapes)} layers")
        heads = [(layer, head) for layer in keep for head in range(shapes[layer].heads)]
        return cls.by_head(shapes, heads, mixer, options)

    @classmethod
    def by_head(
        cls,
        shapes: list[AttentionShape],
        attention_heads: Iterable[tuple[int, int]],
        mixer: str,
        options: dict[str, Any] | None = None,
        join: Join = "split",
    ) -> Plan:
        """The head-level hybrid that keeps attention in these heads (layer, head) and uses `mixer` for all others."""
        keep = set(attention_heads)
        outside = keep - {*every_head(shapes)}
        if outside:
            layer, head = min(outside)
            raise UserError(f"head {head} of layer {layer} is not one of the teacher's heads")
        layers = []
        for index, shape in enumerate(shapes):
            kept = [head for head in range(shape.heads) if (index, head) in keep]
            others = [head for head in range(shape.heads) if head not in kept]
            if join == "parallel" and kept and others:
                others = list(range(shape.heads))
            layers.append({name: heads for name, heads in ((ATTENTION, kept), (mixer, others)) if heads})
        filled = mixer_options(mixer, options or {}).model_dump(exclude_none=True)
        return cls(shapes=shapes, mixers={ATTENTION: {}, mixer: filled}, layers=layers, join=join)

    def keeping(self, heads: Iterable[tuple[int, int]], join: Join = "split") -> Plan:
        """The hybrid that keeps attention in these heads, and has the one mixer of this plan for all others."""
        mixer = next(name for name in self.mixers if name != ATTENTION)
        return Plan.by_head(self.shapes, heads, mixer, self.mixers[mixer], join)

    def with_layers(self, mixer: str, options: dict[str, Any], layers: Iterable[int]) -> Plan:
        """This plan, but with another mixer for all heads of these layers."""
        filled = mixer_options(mixer, options).model_dump(exclude_none=True)
        if self.mixers.get(mixer, filled) != filled:
            raise UserError(f"a plan has one set of options for each mixer, and '{mixer}' would have two")
        changed = {layer: {mixer: [*range(self.shapes[layer].heads)]} for layer in layers}
        table = [changed.get(layer, mixers) for layer, mixers in enumerate(self.layers)]
        return Plan(shapes=self.shapes, mixers={**self.mixers, mixer: filled}, layers=table, join=self.join)

    @classmethod
    def all_attention(cls, shapes: list[AttentionShape]) -> Plan:
        """The teacher itself, as a plan."""
        layers = [{ATTENTION: list(range(shape.heads))} for shape in shapes]
        return cls(shapes=shapes, mixers={ATTENTION: {}}, layers=layers)

    # ------------------------------------------------------------------ looking at plans

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attention_layers(self) -> list[int]:
        """Layers in which every head keeps attention."""
        return [index for index, layer in enumerate(self.layers) if list(layer) == [ATTENTION]]

    @property
    def attention_heads(self) -> list[tuple[int, int]]:
        """The heads that keep attention: (layer, head)."""
        return [(index, head) for index, layer in enumerate(self.layers) for head in layer.get(ATTENTION, [])]

    def joined(self, layer: int) -> bool:
        """Whether attention is a branch beside the other mixers in this layer."""
        return self.join == "parallel" and ATTENTION in self.layers[layer] and len(self.layers[layer]) > 1

    def groups(self, layer: int) -> dict[str, HeadGroup]:
        """The head groups of one layer by mixer."""
        return {name: self.shapes[layer].group(heads) for name, heads in self.layers[layer].items()}

    def head_table(self) -> list[list[str]]:
        """Mixer names, layers by heads; a head that attends beside another mixer counts as attention."""
        table = []
        for layer in self.layers:
            names = {head: name for name, heads in layer.items() for head in heads}
            names |= dict.fromkeys(layer.get(ATTENTION, []), ATTENTION)
            table.append([names[head] for head in range(len(names))])
        return table

    def pattern(self) -> str:
        """One letter a layer: the mixer's initial in capitals, or * where a layer's heads differ."""
        return "".join(next(iter(layer))[0].upper() if len(layer) == 1 else "*" for layer in self.layers)

    def cache_bytes(self, context: int, batch: int = 1, dtype: str = "float32", state_dtype: str | None = None) -> int:
        """Bytes of all keys, values and states after `context` tokens of `batch` sequences, for a model in `dtype`.

        Keys and values are counted for the heads that keep them, once for those that share them; recurrent states are
        float32 whatever the dtype, as Subquad keeps them. `state_dtype`: what they would take in another one, as some
        papers count. Raises UserError for a dtype that is not a floating point one.
        """
        for name in (dtype, state_dtype):
            if name not in (None, *ITEMSIZE):
                raise UserError(f"cache bytes are known for {', '.join(ITEMSIZE)}, not for dtype '{name}'")
        size = ITEMSIZE[dtype]
        state_size = max(size, 4) if state_dtype is None else ITEMSIZE[state_dtype]
        return batch * sum(
            mixer_class(name).state_bytes(group, mixer_options(name, self.mixers[name]), context, size, state_size)
            for layer in range(self.num_layers)
            for name, group in self.groups(layer).items()
        )

    # ------------------------------------------------------------------ reading and writing

    def to_yaml(self) -> str:
        """The plan as its file's text."""
        shapes = [shape.model_dump(exclude_none=True) for shape in self.shapes]
        same = all(shape == shapes[0] for shape in shapes)
        shape = {"shape": {"layers": len(shapes)} | shapes[0]} if same else {"shapes": dict(enumerate(shapes))}
        names = [next(iter(layer)) if len(layer) == 1 else layer for layer in self.layers]
        join = {} if self.join == "split" else {"join": self.join}
        parts = {"format": FORMAT} | shape | join | {"mixers": self.mixers, "layers": dict(enumerate(names))}
        return "".join(_block(key, value) for key, value in parts.items())

    @classmethod
    def from_yaml(cls, text: str) -> Plan:
        """Reads a plan's text. Raises UserError for anything that is not a plan."""
        try:
            raw = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"the plan is not valid YAML: {str(error).splitlines()[0]}") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT or "layers" not in raw or "mixers" not in raw:
            raise UserError(f"not a plan: expected a mapping with 'format: {FORMAT}', 'shape', 'mixers' and 'layers'")
        try:
            if "shape" in raw:
                shape = dict(raw["shape"])
                count = shape.pop("layers")
                shapes = [AttentionShape(**shape)] * count
            else:
                shapes = [AttentionShape(**shape) for shape in raw["shapes"].values()]
            layers = [cls._read_layer(raw["layers"], index, shape) for index, shape in enumerate(shapes)]
            mixers = {name: options or {} for name, options in raw["mixers"].items()}
            return cls(shapes=shapes, mixers=mixers, layers=layers, join=raw.get("join", "split"))
        except (ValidationError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the plan is malformed: {' '.join(str(error).split())}") from None

    @staticmethod
    def _read_layer(layers: dict[int, Any], index: int, shape: AttentionShape) -> dict[str, list[int]]:
        if index not in layers:
            raise UserError(f"layer {index} is missing from the plan")
        layer = layers[index]
        return {layer: list(range(shape.heads))} if isinstance(layer, str) else dict(layer)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan file. Raises UserError when it is missing or not a plan."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"there is no plan file at {path}")
        try:
            return cls.from_yaml(path.read_text(encoding="utf-8"))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Writes the plan file: aside first, then renamed."""
        aside = Path(f"{path}.tmp")
        aside.write_text(self.to_yaml(), encoding="utf-8")
        os.replace(aside, path)


def find_plan(path: str | Path) -> Plan:
    """Reads a plan file, or the one in the folder of a run or a model. Raises UserError where there is none."""
    path = Path(path)
    if path.is_dir() and not (path / "plan.yaml").is_file():
        raise UserError(f"the folder {path} has no plan.yaml: give a plan file, or a run that has chosen its plan")
    return Plan.load(path / "plan.yaml" if path.is_dir() else path)
