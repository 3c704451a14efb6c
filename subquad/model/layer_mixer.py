"""The mixers of one layer, as a module inside its attention module."""

from typing import Any, cast

from torch import nn

from subquad.mixers import MIXERS, Mixer, mixer_options
from subquad.model.join import RecolouringAdapter
from subquad.plan import ATTENTION, JoinStart, Plan


class LayerMixer(nn.ModuleDict):
    """The mixers of one layer by name, each over its own heads, and the adapter of the parallel join (`join`).

    State dict: `<attention module>.mixer.<name>.*`. `middle`: the number of tokens at the front that are moved to the
    middle.
    """

    def __init__(self, plan: Plan, layer: int, join_start: JoinStart = "identity", middle: int = 0) -> None:
        parts: dict[str, nn.Module] = {
            name: MIXERS[name](group, mixer_options(name, plan.mixers[name]))
            for name, group in plan.groups(layer).items()
        }
        if plan.joined(layer):
            parts["join"] = RecolouringAdapter(plan.shapes[layer].hidden_size, join_start)
        super().__init__(parts)
        self.layer, self.middle = layer, middle
        together = [name for name in self.by_name if self.adapter is None or name != ATTENTION]
        order = [head for name in together for head in self.by_name[name].group.heads]
        self.places = tuple(sorted(range(len(order)), key=order.__getitem__))  # of each head, in the mixers' outputs

    @property
    def by_name(self) -> dict[str, Mixer]:
        """The mixers; a ModuleDict's own methods know them as modules only."""
        return {name: part for name, part in self.items() if isinstance(part, Mixer)}

    @property
    def adapter(self) -> RecolouringAdapter | None:
        """The adapter by which attention joins as a branch, if the layer has one."""
        return cast(RecolouringAdapter | None, self["join"] if "join" in self else None)


def layer_mixer(module: nn.Module) -> LayerMixer:
    """The mixers that `attach` gave to an attention module."""
    mixer = module.mixer
    assert isinstance(mixer, LayerMixer)
    return mixer


def keep_initialised(module: nn.Module) -> Any:
    """Tells transformers' `post_init` to leave these weights as they are."""
    for part in module.modules():
        part._is_hf_initialized = True  # type: ignore[assignment]
    return module
