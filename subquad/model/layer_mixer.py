"""Module of a layer's mixers, inside its attention module."""

from typing import Any, cast

from torch import nn

from subquad.mixers import MIXERS, Mixer, mixer_options
from subquad.model.join import RecolouringAdapter
from subquad.plan import ATTENTION, JoinStart, Plan


class LayerMixer(nn.ModuleDict):
    """Mixers of one layer by name, each over its own heads, and the adapter of the parallel join (`join`).

    State dict: `<attention module>.mixer.<name>.*`. `prefix_tokens`: number of tokens at the front, which are moved to
    the middle for the mixers.
    """

    def __init__(self, plan: Plan, layer: int, join_start: JoinStart = "identity", prefix_tokens: int = 0) -> None:
        parts: dict[str, nn.Module] = {
            name: MIXERS[name](group, mixer_options(name, plan.mixers[name]))
            for name, group in plan.groups(layer).items()
        }
        if plan.joined(layer):
            parts["join"] = RecolouringAdapter(plan.shapes[layer].hidden_size, join_start)
        super().__init__(parts)
        self.layer, self.prefix_tokens = layer, prefix_tokens
        self.shape, self.kv_home = plan.shapes[layer], plan.kv_home(layer)
        self.all_heads = self.shape.group(range(self.shape.heads))
        self.withholds_rotary = False  # set by `attach`
        self.reads_variable = False  # whether the ForwardContext came in the context variable
        mixed_names = [name for name in self.by_name if self.adapter is None or name != ATTENTION]
        heads = [head for name in mixed_names for head in self.by_name[name].group.heads]
        self.head_indices = tuple(sorted(range(len(heads)), key=heads.__getitem__))  # in the concatenated outputs

    @property
    def by_name(self) -> dict[str, Mixer]:
        """Mixers by name, with their own type; a ModuleDict's methods return plain modules."""
        return {name: part for name, part in self.items() if isinstance(part, Mixer)}

    @property
    def adapter(self) -> RecolouringAdapter | None:
        """Adapter of the parallel join, if the layer has one."""
        return cast(RecolouringAdapter | None, self["join"] if "join" in self else None)


def layer_mixer(module: nn.Module) -> LayerMixer:
    """Mixers that `attach` added to an attention module."""
    mixer = module.mixer
    assert isinstance(mixer, LayerMixer)
    return mixer


def keep_initialised(module: nn.Module) -> Any:
    """Marks weights as initialised, so that transformers' `post_init` keeps them."""
    for part in module.modules():
        part._is_hf_initialized = True  # type: ignore[assignment]
    return module
