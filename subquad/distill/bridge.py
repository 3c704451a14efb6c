"""The attention bridge: what a student reads and writes with is brought near the teacher's queries and keys.

A mixer reads its state with queries C and writes it with keys B. Two small maps for each layer, trained with the
student and dropped after the stage, take them to the queries and keys of one of the teacher's layers. Nothing of size
T x T is made, and no weight of the student has to fit the teacher's: it may have fewer layers, another width and other
heads. Decays are not aligned; they should begin near 1, as those of all mixers here do by default.

Source: CAB (arXiv 2510.19266, eq. 8) and its language code, in which the maps are not given to the optimiser.

Legend: B batch, H heads, G key/value heads, T tokens, N key width of the mixer, C channels (heads times their width).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.mixers import Mixer, MixerInputs
from subquad.model.base import BaseStudent
from subquad.model.interface import AttentionCall, layer_map
from subquad.ops.common import wide
from subquad.plan import ATTENTION, AttentionShape
from subquad.recipes.stage import Stage

SIDES = ("queries", "keys")


class Bridge(nn.Module):
    """The maps of a stage for these layers of the student, and the distances that they leave.

    `theirs`: the teacher's layers. Raises UserError for a map of layers that is not one into these.
    """

    def __init__(
        self, stage: Stage, student: BaseStudent, layers: Sequence[int], theirs: Sequence[AttentionShape], seed: int
    ) -> None:
        super().__init__()
        settings, count = stage.bridge, student.plan.num_layers
        self.sides = SIDES if settings.sides == "both" else (settings.sides,)
        self.teacher_layers = settings.layers or layer_map(count, len(theirs))
        if len(self.teacher_layers) != count or not all(0 <= layer < len(theirs) for layer in self.teacher_layers):
            raise UserError(
                f"stage '{stage.name}' has bridge.layers {self.teacher_layers}: give one of the teacher's layers 0 to "
                f"{len(theirs) - 1} for each of the student's {count}"
            )
        self.mixers = {layer: [m for name, m in student.mixers(layer).items() if name != ATTENTION] for layer in layers}
        self.maps = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer, mixers in self.mixers.items():
                shape, channels = theirs[self.teacher_layers[layer]], [_channels(mixer) for mixer in mixers]
                sizes = {"queries": shape.heads * shape.head_dim, "keys": shape.kv_heads * shape.head_dim}
                place = next(student.attention_modules()[layer].parameters()).device
                for side in self.sides:
                    size = sizes[side]
                    map_ = _map(sum(each[side] for each in channels), settings.width or size, size)
                    self.maps[f"{layer}_{side}"] = map_.to(place)

    def loss(self, layer: int, inputs: Sequence[MixerInputs], call: AttentionCall) -> Tensor:
        """The mean squared errors of a layer, summed over the sides; `inputs` are those of its mixers."""
        pairs = [mixer.queries_and_keys(given) for mixer, given in zip(self.mixers[layer], inputs, strict=True)]
        mine = dict(zip(SIDES, zip(*pairs, strict=True), strict=True))
        theirs = {"queries": call.q_BHTD, "keys": call.k_BGTD}
        losses = []
        for side in self.sides:
            mine_BTC = torch.cat([_flat(x_BHTN) for x_BHTN in mine[side]], -1)
            mapped_BTC = self.maps[f"{layer}_{side}"](mine_BTC)
            losses.append(nn.functional.mse_loss(wide(mapped_BTC), _flat(theirs[side]).to(mapped_BTC.device)))
        return sum(losses[1:], losses[0])

    @contextmanager
    def listening(self) -> Iterator[dict[int, list[MixerInputs]]]:
        """Within, keeps what the mixers are given as the student runs, by layer."""
        heard: dict[int, list[MixerInputs]] = {layer: [] for layer in self.mixers}

        def keep(layer: int, module: nn.Module, args: tuple[Any, ...]) -> None:
            heard[layer].append(args[0])

        with ExitStack() as hooks:
            for layer, mixers in self.mixers.items():
                for mixer in mixers:
                    hooks.callback(mixer.register_forward_pre_hook(partial(keep, layer)).remove)
            yield heard


def _map(channels: int, width: int, target: int) -> nn.Module:
    return nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, target))


@torch.no_grad()
def _channels(mixer: Mixer) -> dict[str, int]:
    """Channels of a mixer's queries and keys, from one token of zeros."""
    group, like = mixer.group, next(mixer.parameters(), torch.zeros(()))
    q_1H1D, k_1G1D = (like.new_zeros(1, heads, 1, group.head_dim) for heads in (len(group.heads), len(group.kv_heads)))
    hidden_11M = like.new_zeros(1, 1, group.hidden_size)
    pair = mixer.queries_and_keys(MixerInputs(q_1H1D, k_1G1D, k_1G1D, hidden_11M, scale=1.0))
    return {side: _flat(x_BHTN).shape[-1] for side, x_BHTN in zip(SIDES, pair, strict=True)}


def _flat(x_BHTN: Tensor) -> Tensor:
    """Heads side by side, (B, T, C), in float32 or wider."""
    return wide(x_BHTN.transpose(1, 2).flatten(2))
