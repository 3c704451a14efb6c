"""A plan: which mixer each head of each layer uses.

A layer-level hybrid is a plan whose layers each use one mixer. Plans are small YAML files, made to be read and edited:

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

`join` sets how the two parts of a mixed layer such as 2 are combined:

- `split`: each head has one mixer, and the output projection joins the heads.
- `parallel`: the other mixer has all heads, including those of attention (`hedgehog: [0, ..., 8]`). Attention is a
  second branch, joined by an adapter (model/join.py).

`plan.cache_bytes(context, batch, dtype)` computes the size of a plan's cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from subquad.errors import UserError
from subquad.mixers import HeadGroup, mixer_class, mixer_options
from subquad.utils.files import write_aside

Join: TypeAlias = Literal["split", "parallel"]
JoinStart: TypeAlias = Literal["identity", "random"]

FORMAT = 1
ATTENTION = "attention"
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def dtype_name(model: Any) -> str:
    """Name of a model's floating point type, as `cache_bytes` takes it."""
    return str(model.dtype).removeprefix("torch.")


def _block(key: str, value: Any) -> str:
    """Write one entry of a plan file. A mapping of mappings (and that of the layers) has one line per entry."""
    if isinstance(value, dict) and (key == "layers" or all(isinstance(inner, dict) for inner in value.values())):
        return f"{key}:\n" + "".join(f"  {_line({name: inner})}" for name, inner in value.items())
    return _line({key: value})


def _line(entry: dict[Any, Any]) -> str:
    ((name, value),) = entry.items()
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return f"{name}: " + text.split("\n...")[0].rstrip() + "\n"


class AttentionShape(BaseModel):
    """Attention of one layer: numbers of heads, widths in elements, and the teacher's own sliding window in tokens.

    `value_dim`: width of values, where it is less than `head_dim` (multi-head latent attention).
    `kv_from`: the earlier layer whose keys and values this one reads, in teachers that share them. `calls`: calls of
    the module in a forward pass, if more than one (Zamba). `own_state`, `own_wide_state`: elements of the state of the
    teacher's own recurrent layers between the previous attention layer and this one (after it, for the last one), in
    the model's dtype and in float32.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    window: int | None = Field(None, ge=1)
    value_dim: int | None = Field(None, ge=1)
    kv_from: int | None = Field(None, ge=0)
    calls: int | None = Field(None, ge=2)
    own_state: int | None = Field(None, ge=1)
    own_wide_state: int | None = Field(None, ge=1)

    def group(self, heads: Iterable[int]) -> HeadGroup:
        """Make the head group of these heads of the layer."""
        return HeadGroup(
            tuple(sorted(heads)),
            queries_per_kv=self.heads // self.kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            hidden_size=self.hidden_size,
            window=self.window,
            layer_heads=self.heads,
        )


def every_head(shapes: Sequence[AttentionShape]) -> list[tuple[int, int]]:
    """List all heads of a model as (layer, head)."""
    return [(layer, head) for layer, shape in enumerate(shapes) for head in range(shape.heads)]


class Plan(BaseModel):
    """Mixers by layer and head.

    `layers[l]` maps the name of a mixer to its head indices. Every head has exactly one mixer. With the parallel join,
    attention heads have the other mixer as well.
    """

    model_config = ConfigDict(extra="forbid")

    shapes: list[AttentionShape]
    mixers: dict[str, dict[str, Any]]
    layers: list[dict[str, list[int]]]
    join: Join = "split"

    def model_post_init(self, context: Any) -> None:
        """Check the plan. Raises UserError naming the invalid layer or mixer."""
        for name, options in self.mixers.items():
            mixer_options(name, options)
        if len(self.shapes) != len(self.layers):
            raise UserError(f"the plan lists {len(self.layers)} layers but describes {len(self.shapes)}")
        for index, (shape, layer) in enumerate(zip(self.shapes, self.layers, strict=True)):
            extra_heads = sorted(layer.get(ATTENTION, [])) if self.joined(index) else []
            plan_heads = sorted(head for heads in layer.values() for head in heads)
            if plan_heads != sorted([*range(shape.heads), *extra_heads]):
                addition = " beside attention" if extra_heads else ""
                raise UserError(
                    f"layer {index} of the plan must give each of its {shape.heads} heads exactly one mixer{addition}, "
                    f"but lists heads {plan_heads}"
                )
            for name in layer:
                if name not in self.mixers:
                    raise UserError(f"layer {index} of the plan uses mixer '{name}', which is not under 'mixers'")

    @classmethod
    def by_layer(
        cls,
        shapes: list[AttentionShape],
        attention_layers: Iterable[int],
        mixer: str,
        options: dict[str, Any] | None = None,
    ) -> Plan:
        """Make the layer-level hybrid with attention in `attention_layers` and `mixer` in all other layers."""
        attention = set(attention_layers)
        unknown_layers = attention - set(range(len(shapes)))
        if unknown_layers:
            raise UserError(f"layer {min(unknown_layers)} is not one of the teacher's {len(shapes)} layers")
        heads = [(layer, head) for layer in attention for head in range(shapes[layer].heads)]
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
        """Make the head-level hybrid with attention in these heads (layer, head) and `mixer` for all other heads."""
        attention = set(attention_heads)
        unknown_heads = attention - {*every_head(shapes)}
        if unknown_heads:
            layer, head = min(unknown_heads)
            raise UserError(f"head {head} of layer {layer} is not one of the teacher's heads")
        layers = []
        for index, shape in enumerate(shapes):
            softmax_heads = [head for head in range(shape.heads) if (index, head) in attention]
            mixer_heads = [head for head in range(shape.heads) if head not in softmax_heads]
            if join == "parallel" and softmax_heads and mixer_heads:
                mixer_heads = list(range(shape.heads))
            layers.append({name: heads for name, heads in ((ATTENTION, softmax_heads), (mixer, mixer_heads)) if heads})
        complete_options = mixer_options(mixer, options or {}).model_dump(exclude_none=True)
        return cls(shapes=shapes, mixers={ATTENTION: {}, mixer: complete_options}, layers=layers, join=join)

    def keeping(self, heads: Iterable[tuple[int, int]], join: Join = "split") -> Plan:
        """Make the hybrid with attention in these heads (layer, head) as well, and this plan's mixer for all others."""
        mixer = next(name for name in self.mixers if name != ATTENTION)
        return Plan.by_head(self.shapes, [*self.attention_heads, *heads], mixer, self.mixers[mixer], join)

    def with_layers(self, mixer: str, options: dict[str, Any], layers: Iterable[int]) -> Plan:
        """Make a plan that differs in these layers, where `mixer` has all heads.

        Raises UserError if this plan has the mixer with different options.
        """
        complete_options = mixer_options(mixer, options).model_dump(exclude_none=True)
        if self.mixers.get(mixer, complete_options) != complete_options:
            raise UserError(f"a plan has one set of options for each mixer, and '{mixer}' would have two")
        new_layers = {layer: {mixer: [*range(self.shapes[layer].heads)]} for layer in layers}
        table = [new_layers.get(layer, mixers) for layer, mixers in enumerate(self.layers)]
        return Plan(shapes=self.shapes, mixers={**self.mixers, mixer: complete_options}, layers=table, join=self.join)

    @classmethod
    def all_attention(cls, shapes: list[AttentionShape]) -> Plan:
        """Make the plan of the teacher itself."""
        layers = [{ATTENTION: list(range(shape.heads))} for shape in shapes]
        return cls(shapes=shapes, mixers={ATTENTION: {}}, layers=layers)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attention_layers(self) -> list[int]:
        """Layers in which every head keeps attention."""
        return [index for index, layer in enumerate(self.layers) if list(layer) == [ATTENTION]]

    @property
    def attention_heads(self) -> list[tuple[int, int]]:
        """Heads that keep attention, as (layer, head)."""
        return [(index, head) for index, layer in enumerate(self.layers) for head in layer.get(ATTENTION, [])]

    def joined(self, layer: int) -> bool:
        """True if attention is a parallel branch in this layer."""
        return self.join == "parallel" and ATTENTION in self.layers[layer] and len(self.layers[layer]) > 1

    def kv_source(self, layer: int) -> int:
        """Layer that computes the keys and values of this layer: itself, unless the teacher shares them."""
        kv_from = self.shapes[layer].kv_from
        return layer if kv_from is None else kv_from

    def kv_home(self, layer: int) -> int:
        """Layer whose cache holds the keys and values of this layer's attention heads.

        It is the first that attends to the same keys. Layers with a window of the teacher's keep their own.
        """
        if ATTENTION not in self.layers[layer] or self.shapes[layer].window is not None:
            return layer
        return next(
            home
            for home in range(layer + 1)
            if self.kv_source(home) == self.kv_source(layer)
            and ATTENTION in self.layers[home]
            and self.groups(home)[ATTENTION].kv_heads == self.groups(layer)[ATTENTION].kv_heads
        )

    def groups(self, layer: int) -> dict[str, HeadGroup]:
        """Head groups of one layer by mixer."""
        return {name: self.shapes[layer].group(heads) for name, heads in self.layers[layer].items()}

    def head_table(self) -> list[list[str]]:
        """Mixer names, layers by heads. A head with attention and another mixer counts as attention."""
        table = []
        for layer in self.layers:
            names = {head: name for name, heads in layer.items() for head in heads}
            names |= dict.fromkeys(layer.get(ATTENTION, []), ATTENTION)
            table.append([names[head] for head in range(len(names))])
        return table

    def pattern(self) -> str:
        """One letter per layer: the mixer's initial in upper case, or * if the heads differ."""
        return "".join(next(iter(layer))[0].upper() if len(layer) == 1 else "*" for layer in self.layers)

    def cache_bytes(self, context: int, batch: int = 1, dtype: str = "float32", state_dtype: str | None = None) -> int:
        """Bytes of all keys, values and states after `context` tokens of `batch` sequences, for a model in `dtype`.

        Keys and values are counted for attention heads, and once for heads or layers that share them. The state of a
        hybrid teacher's own layers is counted. Subquad stores recurrent
        states in float32 for any narrower dtype; `state_dtype` counts them in another type, as some papers do. Raises
        UserError for a dtype that is not a floating point type.
        """
        for name in (dtype, state_dtype):
            if name not in (None, *ITEMSIZE):
                raise UserError(f"cache bytes are known for {', '.join(ITEMSIZE)}, not for dtype '{name}'")
        size = ITEMSIZE[dtype]
        state_size = max(size, 4) if state_dtype is None else ITEMSIZE[state_dtype]
        total = 0
        for layer, shape in enumerate(self.shapes):
            for name, group in self.groups(layer).items():
                if name != ATTENTION or self.kv_home(layer) == layer:
                    mixer, options = mixer_class(name), mixer_options(name, self.mixers[name])
                    total += (shape.calls or 1) * mixer.state_bytes(group, options, context, size, state_size)
            total += size * (shape.own_state or 0) + state_size * (shape.own_wide_state or 0)
        return batch * total

    def to_yaml(self) -> str:
        """Text of the plan file."""
        shapes = [shape.model_dump(exclude_none=True) for shape in self.shapes]
        all_same = all(shape == shapes[0] for shape in shapes)
        shape = {"shape": {"layers": len(shapes)} | shapes[0]} if all_same else {"shapes": dict(enumerate(shapes))}
        names = [next(iter(layer)) if len(layer) == 1 else layer for layer in self.layers]
        join = {} if self.join == "split" else {"join": self.join}
        parts = {"format": FORMAT} | shape | join | {"mixers": self.mixers, "layers": dict(enumerate(names))}
        return "".join(_block(key, value) for key, value in parts.items())

    @classmethod
    def from_yaml(cls, text: str) -> Plan:
        """Read the text of a plan file. Raises UserError if it is not a plan."""
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
        """Read a plan file. Raises UserError if it is missing or not a plan."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"there is no plan file at {path}")
        try:
            return cls.from_yaml(path.read_text(encoding="utf-8"))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Writes the plan file."""
        with write_aside(Path(path)) as aside:
            aside.write_text(self.to_yaml(), encoding="utf-8")


def find_plan(path: str | Path) -> Plan:
    """Read a plan file, or the plan in the folder of a run or a model. Raises UserError if there is none."""
    path = Path(path)
    if path.is_dir() and not (path / "plan.yaml").is_file():
        raise UserError(f"the folder {path} has no plan.yaml: give a plan file, or a run whose plan is chosen")
    return Plan.load(path / "plan.yaml" if path.is_dir() else path)
