"""Where mixers meet a Hugging Face model: its attention function.

A student's model is told to call our function instead of its own (interface.py), and nothing of its code changes:

- `attach` gives each of those modules a `LayerMixer` and a hook that leaves there, for the length of the call, what the
  function is not given (`LayerCall`: the hidden states, for gates). For a mixer without rotary embedding the hook gives
  the module cosines of 1 and sines of 0 (rotary.py).
- `mixed_attention` splits the heads by mixer and joins their outputs. What a forward pass needs beyond its inputs (the
  2D padding mask, the cache) comes in one `ForwardContext`, as a keyword argument of the model, which the models pass
  on as far as their attention modules. No module holds a mode.
- The tokens at the front of an image encoder (class, registers) stand in the middle for the mixers, where two scans
  see them from both sides (Vision Mamba, arXiv 2401.09417).

The heads that keep attention go through the function that the model used before (sdpa, eager, ...), so that a student
whose plan is all attention computes exactly what its teacher does.

Legend: B batch, H query heads, G key/value heads, T new tokens, L past and new tokens, D head width, M hidden width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from subquad.mixers import MIXERS, HeadGroup, Mixer, MixerInputs, mixer_options
from subquad.mixers.base import picked
from subquad.model.cache import StudentCache, append
from subquad.model.interface import attention_function, set_attention
from subquad.model.join import Branch, RecolouringAdapter, output_projection, projected
from subquad.model.rotary import Tables, rotation_of
from subquad.plan import ATTENTION, JoinStart, Plan

PREFIX = "subquad_"  # "subquad_sdpa": mixers, with sdpa for the heads that keep attention


Observer = Callable[["LayerMixer", str, MixerInputs, Tensor], None]
Inspector = Callable[["LayerMixer", str, MixerInputs], None]


@dataclass
class ForwardContext:
    """What one forward pass of a student carries besides its inputs.

    With an `observer` the pass is teacher-forced: every layer computes the teacher's attention, shows the observer each
    mixer's inputs with the attention output of its heads, and goes on with the teacher's output. An `inspector` is
    shown each mixer's inputs, and nothing is computed.
    """

    padding_BL: Tensor | None = None  # True at real tokens, past and new; None: no padding
    cache: StudentCache | None = None
    observer: Observer | None = None
    inspector: Inspector | None = None
    restored: frozenset[int] = frozenset()  # layers that compute the teacher's attention whatever the plan says
    gains: Mapping[int, Tensor] = field(default_factory=dict)  # (B, H) by layer: factors of what the heads put out
    gates: Mapping[int, Tensor] = field(default_factory=dict)  # (H,) by layer: shares of attention in its place, 0 to 1


@dataclass
class LayerCall:
    """What one call of an attention module is about, beyond what it gives its attention function.

    `rotary`: turns queries and keys that come without rotary embedding, for who wants it. With `look` nothing is
    computed: the query and the key are put there.
    """

    hidden_BTM: Tensor | None = None
    forward_context: ForwardContext = field(default_factory=ForwardContext)
    rotary: Callable[[Tensor], Tensor] | None = None
    look: list[tuple[Tensor, Tensor]] | None = None


class LayerMixer(nn.ModuleDict):
    """The mixers of one layer by name, each over its own heads, and the adapter of the parallel join (`join`).

    State dict: `<attention module>.mixer.<name>.*`. `middle`: so many tokens at the front are moved to the middle.
    """

    given: LayerCall  # of the call under way

    def __init__(self, plan: Plan, layer: int, join_start: JoinStart = "identity", middle: int = 0) -> None:
        parts: dict[str, nn.Module] = {
            name: MIXERS[name](group, mixer_options(name, plan.mixers[name]))
            for name, group in plan.groups(layer).items()
        }
        if plan.joined(layer):
            parts["join"] = RecolouringAdapter(plan.shapes[layer].hidden_size, join_start)
        super().__init__(parts)
        self.layer, self.middle, self.given = layer, middle, LayerCall()
        together = [name for name in self.by_name if self.adapter is None or name != ATTENTION]
        order = [head for name in together for head in self.by_name[name].group.heads]
        self.places = tuple(sorted(range(len(order)), key=order.__getitem__))  # of each head, in the mixers' outputs

    @property
    def by_name(self) -> dict[str, Mixer]:
        """The mixers; a ModuleDict's own methods know them as modules only."""
        return {name: part for name, part in self.items() if isinstance(part, Mixer)}

    @property
    def adapter(self) -> RecolouringAdapter | None:
        """The adapter by which attention joins as a branch, where it does."""
        return cast(RecolouringAdapter | None, self["join"] if "join" in self else None)


def layer_mixer(module: nn.Module) -> LayerMixer:
    """The mixers that `attach` gave to an attention module."""
    mixer = module.mixer
    assert isinstance(mixer, LayerMixer)
    return mixer


def mixed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    base: str,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Branch | None]:
    """The attention function of a student: query (B, H, T, D), key and value (B, G, T, D) -> (B, T, H, D).

    Under the parallel join attention is a branch of its own, returned where other functions return their weights; the
    module hands it on, and `_join` finds it there.
    The cache has counted the new tokens already (the module called `update`) and holds one state for each mixer.
    """
    layer = layer_mixer(module)
    given, mixers = layer.given, layer.by_name
    if given.look is not None:
        given.look.append((query, key))
        return torch.zeros_like(query).transpose(1, 2), None
    forward_context, rotary, hidden_BTM = given.forward_context, given.rotary, given.hidden_BTM
    assert hidden_BTM is not None
    if layer.middle:
        query, key, value = (to_middle(x, 2, layer.middle) for x in (query, key, value))
        hidden_BTM = to_middle(hidden_BTM, 1, layer.middle)

    def out(y_BHTD: Tensor) -> Tensor:
        return to_front(y_BHTD.transpose(1, 2), 1, layer.middle)

    attend = _base_attention(module, base, attention_mask, scaling, kwargs)
    whole = MixerInputs(
        query,
        key,
        value,
        hidden_BTM,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        padding_BL=forward_context.padding_BL,
        attend=attend,
    )
    cached = None if forward_context.cache is None else forward_context.cache.layers[layer.layer]
    if cached is not None:
        whole = replace(whole, past=cached.tokens - query.shape[2], append=append)

    def turned(inputs: MixerInputs) -> MixerInputs:
        if rotary is None:
            return inputs
        return replace(inputs, q_BHTD=rotary(inputs.q_BHTD), k_BGTD=rotary(inputs.k_BGTD))

    def inputs_of(mixer: Mixer) -> MixerInputs:
        mine = _of_group(whole, mixer.group)
        return turned(mine) if mixer.rotary else mine

    def attended() -> Tensor:
        """What the teacher's attention computes."""
        inputs = turned(whole)
        return attend(inputs.q_BHTD, inputs.k_BGTD, value)

    if forward_context.inspector is not None:
        for name, mixer in mixers.items():
            forward_context.inspector(layer, name, inputs_of(mixer))
        return torch.zeros_like(query).transpose(1, 2), None
    if forward_context.observer is not None:
        y_BHTD = attended()
        for name, mixer in mixers.items():
            forward_context.observer(layer, name, inputs_of(mixer), picked(y_BHTD, mixer.group.heads))
        return out(y_BHTD), None
    if layer.layer in forward_context.restored:
        return out(attended()), None

    outputs = {}
    for name, mixer in mixers.items():
        state = None if cached is None else cached.states.get(name)
        outputs[name], new_state = mixer(inputs_of(mixer), state)
        if cached is not None:
            cached.store(name, new_state)
    branch = None
    if layer.adapter is not None:
        branch = Branch(mixers[ATTENTION].group, out(outputs.pop(ATTENTION)))
    if len(outputs) == 1:
        (y_BHTD,) = outputs.values()
    else:
        y_BHTD = picked(torch.cat([*outputs.values()], 1), layer.places)
    if layer.layer in forward_context.gates:
        gate_H11 = forward_context.gates[layer.layer].to(y_BHTD.dtype)[:, None, None]
        y_BHTD = y_BHTD + gate_H11 * (attended() - y_BHTD)
    if layer.layer in forward_context.gains:
        gain_BH11 = forward_context.gains[layer.layer].to(y_BHTD.dtype)[:, :, None, None]
        y_BHTD = y_BHTD * gain_BH11
        if branch is not None:
            gain_BTHD = picked(gain_BH11, branch.group.heads).transpose(1, 2)
            branch = replace(branch, y_BTHD=branch.y_BTHD * gain_BTHD)
    return out(y_BHTD), branch


def to_middle(x: Tensor, time: int, count: int) -> Tensor:
    """Moves the first `count` tokens to the middle of the others; `time` is the dimension of tokens."""
    half = (x.shape[time] - count) // 2
    front, before, after = x.split([count, half, x.shape[time] - count - half], time)
    return torch.cat([before, front, after], time)


def to_front(x: Tensor, time: int, count: int) -> Tensor:
    """Undoes `to_middle`."""
    if count == 0:
        return x
    half = (x.shape[time] - count) // 2
    before, front, after = x.split([half, count, x.shape[time] - count - half], time)
    return torch.cat([front, before, after], time)


def _of_group(inputs: MixerInputs, group: HeadGroup) -> MixerInputs:
    """The inputs of one head group; a whole layer's are passed on untouched."""
    if len(group.heads) == inputs.q_BHTD.shape[1]:
        return inputs
    return replace(
        inputs,
        q_BHTD=picked(inputs.q_BHTD, group.heads),
        k_BGTD=picked(inputs.k_BGTD, group.kv_heads),
        v_BGTD=picked(inputs.v_BGTD, group.kv_heads),
    )


def _base_attention(
    module: nn.Module, base: str, mask: Tensor | None, scaling: float | None, kwargs: dict[str, Any]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The model's own attention function, bound to this call: (q, k, v) -> y, all (B, heads, time, D)."""
    function = attention_function(module, base)

    def attend(q_BHTD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor) -> Tensor:
        # Attention functions read these four of the module, and the group size must be that of the heads at hand.
        view = SimpleNamespace(
            num_key_value_groups=q_BHTD.shape[1] // k_BGLD.shape[1],
            is_causal=getattr(module, "is_causal", True),
            training=module.training,
            layer_idx=getattr(module, "layer_idx", None),
        )
        y_BTHD, _ = function(view, q_BHTD, k_BGLD, v_BGLD, mask, scaling=scaling, **kwargs)
        return y_BTHD.transpose(1, 2)

    return attend


def register(base: str) -> str:
    """Makes our function known for students whose kept heads use `base`; returns the implementation's name."""
    name = PREFIX + base

    def function(*args: Any, **kwargs: Any) -> tuple[Tensor, Branch | None]:
        return mixed_attention(*args, base=base, **kwargs)

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def attach(
    model: PreTrainedModel, paths: Sequence[str], plan: Plan, join_start: JoinStart = "identity", middle: int = 0
) -> None:
    """Gives each attention module its mixers and its hooks, and makes the model call our attention function."""
    for layer, path in enumerate(paths):
        module = model.get_submodule(path)
        if plan.joined(layer):
            shape = plan.shapes[layer]
            projection = output_projection(module, shape.heads * shape.head_dim, shape.hidden_size)
            module.register_forward_hook(partial(_join, projection))
        module.mixer = keep_initialised(LayerMixer(plan, layer, join_start, middle))
        module.register_forward_pre_hook(_provide, with_kwargs=True)
        module.register_forward_hook(_forget, always_call=True)
    set_attention(model, register(model.config._attn_implementation))


def keep_initialised(module: nn.Module) -> Any:
    """Tells transformers' `post_init` to leave these weights as they are."""
    for part in module.modules():
        part._is_hf_initialized = True  # type: ignore[assignment]
    return module


def _provide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Leaves what the attention function is not given; where a mixer wants no rotary embedding, that is left to it."""
    kwargs = {**kwargs}
    forward_context = kwargs.pop("forward_context", None) or ForwardContext()
    layer, hidden_BTM = layer_mixer(module), args[0] if args else kwargs["hidden_states"]
    layer.given = given = LayerCall(hidden_BTM, forward_context)
    wishes = {mixer.rotary for mixer in layer.by_name.values()}
    if False not in wishes or kwargs.get("position_embeddings") is None:
        return args, kwargs
    cos, sin = kwargs["position_embeddings"]
    kwargs["position_embeddings"] = torch.ones_like(cos), torch.zeros_like(sin)
    restored = layer.layer in forward_context.restored or layer.layer in forward_context.gates
    attends = restored or forward_context.observer is not None
    if wishes == {False} and not attends:
        return args, kwargs

    def look(module: nn.Module, hidden_BTM: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        seen: list[tuple[Tensor, Tensor]] = []
        layer.given = LayerCall(look=seen)
        changed = {"hidden_states": hidden_BTM, "position_embeddings": tables, "attention_mask": None}
        no_cache = {name: None if isinstance(value, StudentCache) else value for name, value in kwargs.items()}
        module.forward(**no_cache | changed)
        layer.given = given
        return seen[0]

    rotation = rotation_of(module, hidden_BTM, cos, look)
    cos_BTR, sin_BTR = rotation.tables(cos, sin)
    given.rotary = partial(rotation.turned, cos_BTR=cos_BTR, sin_BTR=sin_BTR)
    return args, kwargs


def _forget(module: nn.Module, args: Any, output: Any) -> None:
    """Lets go of what the call was given, which would live as long as the model does."""
    layer_mixer(module).given = LayerCall()


def _join(projection: nn.Module, module: nn.Module, args: Any, output: tuple[Any, ...]) -> Any:
    """The module's output with the branch of the retained heads, where its attention function gave one."""
    u_BTM, branch, *rest = output
    if not isinstance(branch, Branch):
        return output
    adapter = layer_mixer(module).adapter
    assert adapter is not None
    return adapter(u_BTM, projected(projection, branch)), None, *rest
