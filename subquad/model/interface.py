"""Attention interface of transformers models, and the modules that call it.

Recent models call one function, `attention_interface(module, query, key, value, mask, ...)`, after their own
projections, norms and rotary embedding. `find_attention` runs a model once on two tokens (or an empty image) with a
function that only records its calls: the modules, their order and the shapes of their heads. A model that never calls
the interface is rejected with an error that names its class. `watched_attention` records the inputs of every call.

Legend: B batch, H query heads, G key/value heads, T tokens, D head width.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from subquad.errors import UserError
from subquad.model.cache import CACHE, own_elements
from subquad.plan import AttentionShape
from subquad.utils.files import first_line

PROBE = "subquad_probe"
WATCH = "subquad_watch"

_sites: WeakKeyDictionary[PreTrainedModel, list["AttentionSite"]] = WeakKeyDictionary()


@dataclass(frozen=True)
class AttentionSite:
    """Module that calls the attention interface: its path in the model and the shape of its heads."""

    path: str
    shape: AttentionShape

    @property
    def block(self) -> str:
        """Path of the block around it."""
        return block_path(self.path)


def block_path(attention_path: str) -> str:
    """Path of the decoder or encoder block around an attention module."""
    return attention_path.rpartition(".")[0]


@dataclass(frozen=True)
class AttentionCall:
    """Inputs of attention probabilities: softmax(cap(scale q k^T)) over the visible keys."""

    q_BHTD: Tensor
    k_BGTD: Tensor
    scale: float
    softcap: float | None
    causal: bool


def attention_function(module: nn.Module, base: str) -> Callable[..., Any]:
    """Function of the implementation `base`; 'eager' is in the model's own file, as transformers resolves it."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Sets the attention implementation of a model and all its parts (they may share one config object or not)."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = name


@contextmanager
def attention_set(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Context in which a model has this attention implementation."""
    previous_name = model.config._attn_implementation
    set_attention(model, name)
    try:
        yield
    finally:
        set_attention(model, previous_name)


@contextmanager
def watched_attention(model: PreTrainedModel) -> Iterator[dict[nn.Module, AttentionCall]]:
    """Context in which `model` attends as before; yields the last call of each attention module."""
    base = model.config._attn_implementation
    calls: dict[nn.Module, AttentionCall] = {}

    def watch(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        causal = bool(getattr(module, "is_causal", True))
        calls[module] = AttentionCall(query, key, scale, kwargs.get("softcap"), causal)
        function = attention_function(module, base)
        return function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    AttentionInterface.register(WATCH, watch)
    AttentionMaskInterface.register(WATCH, ALL_MASK_ATTENTION_FUNCTIONS[base])
    with attention_set(model, WATCH):
        yield calls


@contextmanager
def record_outputs(
    modules: Iterable[nn.Module], read: Callable[[Any], Any] = lambda output: output
) -> Iterator[list[Any]]:
    """Within, appends `read(output)` to the list whenever one of these modules returns; by default, its output."""
    outputs: list[Any] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(read(output))

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(record).remove)
        yield outputs


def find_attention(model: PreTrainedModel) -> list[AttentionSite]:
    """Modules of a causal language model or an image encoder that call the attention interface, in calling order.

    The model is run once; the result is cached for its lifetime.
    A hybrid's own recurrent layers are left as they are, and counted in the shapes (`own_state`).
    Raises UserError, naming the model's class, for a model that does not call the interface, calls it twice in a layer,
    attends to other tokens than its own, caches fewer keys and values than it reads (MLA), or has values wider than its
    keys; and for a wrapper around a model: of another library, with adapters, or one that also reads images.
    """
    _check_bare(model)
    if model not in _sites:
        _sites[model] = _probe_attention(model)
    return [*_sites[model]]


@torch.no_grad()
def _probe_attention(model: PreTrainedModel) -> list[AttentionSite]:
    # Reject models that no probe can pass through
    family = type(model).__name__
    if model.config.model_type.startswith("subquad"):
        raise UserError("this model is a student already: convert its teacher, with another plan")
    if model.config.is_encoder_decoder:
        raise UserError(f"{family} is an encoder-decoder model; Subquad converts decoders and image encoders")

    # Run it, a decoder twice: keys and values from the cache change nothing but attention
    calls, own = _probed_calls(model, cached=0.0)
    if not calls:
        raise UserError(
            f"{family} does not call transformers' attention interface, through which Subquad replaces attention: "
            "unsupported"
        )
    if not reads_images(model):
        other_calls, _ = _probed_calls(model, cached=torch.nan)
        if any(not _same(call.inputs, other.inputs) for call, other in zip(calls, other_calls, strict=True)):
            raise UserError(f"{family} reads its cached keys and values outside of attention: unsupported")
    return _sites_of(calls, own)


@dataclass(frozen=True)
class _ProbedCall:
    """Call of the attention interface: its keys, other inputs, and the elements of the teacher's own states so far."""

    path: str
    shape: AttentionShape
    key: Tensor
    inputs: list[Tensor]
    own: tuple[int, int]


class _ProbeCache(DynamicCache):
    """Cache that returns keys and values of one number in place of the new ones."""

    def __init__(self, config: PreTrainedConfig, number: float) -> None:
        super().__init__(config=config)
        self.number = number
        self.elements: int | None = None  # per token, of the last update

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states, *args, **kwargs)
        self.elements = sum(x.shape[1] * x.shape[-1] for x in (key_states, value_states))
        return torch.full_like(key_states, self.number), torch.full_like(value_states, self.number)


def _probed_calls(model: PreTrainedModel, cached: float) -> tuple[list[_ProbedCall], tuple[int, int]]:
    """Calls of the interface in a pass over two tokens or an image, and the elements of the teacher's own states.

    `cached`: number that the cache returns in all keys and values.
    """
    family, paths = type(model).__name__, {module: path for path, module in model.named_modules()}
    hidden_states: dict[nn.Module, Tensor] = {}
    calls: list[_ProbedCall] = []
    cache: _ProbeCache | None = None

    def reach(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor):
            hidden_states[module] = hidden

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if module not in hidden_states:
            raise UserError(f"{family} calls attention more than once in a layer: unsupported")
        if key.shape[2] != query.shape[2]:
            raise UserError(f"{family} attends to other keys than those of its tokens: unsupported")
        if query.shape[-1] != key.shape[-1] or value.shape[-1] > key.shape[-1]:
            raise UserError(f"{family} has values that are wider than its keys: unsupported")
        elements = sum(x.shape[1] * x.shape[-1] for x in (key, value))
        if cache is not None and cache.elements is not None and cache.elements < elements:
            raise UserError(
                f"{family} caches fewer keys and values than its heads read, as in multi-head latent attention: a "
                f"student would hold them all, {elements / cache.elements:.0f} times as much, so it is not converted"
            )
        shape = AttentionShape(
            heads=query.shape[1],
            kv_heads=key.shape[1],
            head_dim=query.shape[-1],
            value_dim=value.shape[-1] if value.shape[-1] < key.shape[-1] else None,
            hidden_size=hidden_states.pop(module).shape[-1],
            window=kwargs.get("sliding_window"),
        )
        inputs = [x for x in (query, attention_mask, *kwargs.values()) if isinstance(x, Tensor)]
        calls.append(_ProbedCall(paths[module], shape, key, inputs, own_elements(cache)))
        return torch.zeros_like(query[..., : value.shape[-1]]).transpose(1, 2), None

    AttentionInterface.register(PROBE, record)
    AttentionMaskInterface.register(PROBE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    with ExitStack() as stack:
        stack.enter_context(attention_set(model, PROBE))
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
            module.training = False  # without dropout, two passes compute the same
            stack.callback(module.register_forward_pre_hook(reach, with_kwargs=True).remove)
        try:
            if not reads_images(model):
                cache = _ProbeCache(model.config, cached)
            model(**least_inputs(model) | ({} if cache is None else {CACHE: cache, "use_cache": True}))
        except UserError:
            raise
        except Exception as error:  # of whatever type a model raises that does without the interface's masks or caches
            raise UserError(
                f"{family} does not run with another attention function ({first_line(error)}): unsupported"
            ) from error
    return calls, own_elements(cache)


def _same(inputs: list[Tensor], other_inputs: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(inputs, other_inputs, strict=True))


def _sites_of(calls: list[_ProbedCall], own: tuple[int, int]) -> list[AttentionSite]:
    """Attention modules of the calls, in the order of their first; `own`: elements of all of the teacher's states."""
    sites: dict[str, AttentionSite] = {}
    keys: list[Tensor] = []  # of each site's first call
    counted = (0, 0)
    for index, call in enumerate(calls):
        # The own states since the previous call; after the last call, all that are left
        until = call.own if index + 1 < len(calls) else own
        own_state, own_wide_state = (new - old for new, old in zip(until, counted, strict=True))
        counted = until
        if call.path in sites:
            shape = sites[call.path].shape
            own_state, own_wide_state = own_state + (shape.own_state or 0), own_wide_state + (shape.own_wide_state or 0)
            changes: dict[str, int | None] = {"calls": (shape.calls or 1) + 1}
        else:
            shape, changes = call.shape, {"kv_from": next((i for i, key in enumerate(keys) if key is call.key), None)}
            keys.append(call.key)
        changes = {**changes, "own_state": own_state or None, "own_wide_state": own_wide_state or None}
        sites[call.path] = AttentionSite(call.path, shape.model_copy(update=changes))
    return [*sites.values()]


def _check_bare(model: Any) -> None:
    """Raises UserError for a wrapper around a model, which would not load again once it is saved inside a student."""
    family = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"{family} is no model of transformers: give the model that it wraps (of a PeftModel, what its "
            "merge_and_unload() returns)"
        )
    adapted = next((path for path, module in model.named_modules() if hasattr(module, "base_layer")), None)
    if adapted is not None:
        raise UserError(
            f"{family} has adapters (at {adapted}): merge them into its weights first (PeftModel.merge_and_unload)"
        )
    if wraps_text(model):
        raise UserError(f"{family} reads more than text: convert its text part, which subquad.text_part(model) returns")


def wraps_text(model: PreTrainedModel) -> bool:
    """Whether a model reads images or sound beside text: its configuration holds that of its text part."""
    nested = model.config.get_text_config() is not model.config and not reads_images(model)
    return nested and not model.config.is_encoder_decoder and not model.config.model_type.startswith("subquad")


def shapes_of(model: PreTrainedModel) -> list[AttentionShape]:
    """Shapes of a model's attention, layer by layer. Raises UserError as `find_attention` does."""
    return [site.shape for site in find_attention(model)]


def reads_images(model: Any) -> bool:
    """Whether a model reads images; any other model reads token ids."""
    return bool(model.main_input_name == "pixel_values")


def least_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Keyword arguments of the model for the smallest pass that runs every module: two tokens, or an empty image."""
    if not reads_images(model):
        return {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=input_device(model)), "use_cache": False}
    config, weight = vision_config(model.config), next(model.parameters())
    channels = getattr(config, "num_channels", 3)
    return {"pixel_values": torch.zeros(1, channels, *image_size(model.config)).to(weight)}


def vision_config(config: Any) -> Any:
    """Configuration of a model's image encoder: its own, or a part of it (CLIP, SigLIP)."""
    return getattr(config, "vision_config", None) or config


def patch_grid(config: Any, size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of patches in an image of this height and width."""
    patch = vision_config(config).patch_size
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return size[0] // height, size[1] // width


def image_size(config: Any) -> tuple[int, int]:
    """Height and width of the images in a model's configuration; 224 where it has none."""
    size = getattr(vision_config(config), "image_size", None) or 224
    return (size, size) if isinstance(size, int) else tuple(size)


def decoder_of(model: Any) -> Any:
    """Model without its output head."""
    if model.base_model is not model:
        return model.base_model
    decoder = model.get_decoder()
    return decoder if decoder is not model else model.model  # Llama 4 names neither


def input_device(model: PreTrainedModel) -> torch.device:
    """Device of a model's inputs: token ids or images."""
    if reads_images(model):
        return next(model.parameters()).device
    embedding: Any = model.get_input_embeddings()
    device = next(embedding.parameters()).device
    # Weights on the meta device are loaded by accelerate, for a computation on the device of its hook
    return torch.device(embedding._hf_hook.execution_device) if device.type == "meta" else device


def layer_map(student_layers: int, teacher_layers: int) -> list[int]:
    """Teacher layer for each student layer: g(l) = floor(l L_t / L_s)."""
    return [layer * teacher_layers // student_layers for layer in range(student_layers)]
