"""Attention bridge: trains the student's queries and keys to match those of the teacher.

A mixer reads its state with queries C and writes it with keys B. Two small maps per layer take these to the queries and
keys of one of the teacher's layers. The maps are trained with the student and dropped after the stage.

Notable:
- No tensor of size T x T is made.
- The student needs none of the teacher's weights: it may have fewer layers, another width and other heads.
- Decays are not aligned. They should start near 1, the default of all mixers here.

Source: CAB (arXiv 2510.19266, eq. 8) and its language code, where the maps are not passed to the optimiser.

Legend: B batch, H heads, G key/value heads, T tokens, N key width of the mixer, D head width of the teacher, C channels
(heads times their width), M model width.
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
    """Maps from the queries and keys of the student's `layers` to the teacher's, and the loss that trains them.

    `teacher_shapes`: the attention of all the teacher's layers. Raises UserError if the stage maps the student's layers
    to layers that the teacher does not have, or does not map each of them.
    """

    def __init__(
        self,
        stage: Stage,
        student: BaseStudent,
        layers: Sequence[int],
        teacher_shapes: Sequence[AttentionShape],
        seed: int,
    ) -> None:
        super().__init__()
        settings = stage.bridge
        self.sides = SIDES if settings.sides == "both" else (settings.sides,)

        # Map the student's layers to the teacher's
        num_layers, num_teacher_layers = student.plan.num_layers, len(teacher_shapes)
        self.teacher_layers = settings.layers or layer_map(num_layers, num_teacher_layers)
        if len(self.teacher_layers) != num_layers or not all(
            0 <= layer < num_teacher_layers for layer in self.teacher_layers
        ):
            raise UserError(
                f"stage '{stage.name}' has bridge.layers {self.teacher_layers}: give one of the teacher's layers 0 to "
                f"{num_teacher_layers - 1} for each of the student's {num_layers}"
            )

        # Make a map for each layer and side
        self.mixers = {
            layer: [mixer for name, mixer in student.mixers(layer).items() if name != ATTENTION] for layer in layers
        }
        self.maps = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer, mixers in self.mixers.items():
                shape, mixer_channels = teacher_shapes[self.teacher_layers[layer]], [_channels(m) for m in mixers]
                sizes = {"queries": shape.heads * shape.head_dim, "keys": shape.kv_heads * shape.head_dim}
                device = next(student.attention_modules()[layer].parameters()).device
                for side in self.sides:
                    size = sizes[side]
                    side_map = _map(sum(channels[side] for channels in mixer_channels), settings.width or size, size)
                    self.maps[f"{layer}_{side}"] = side_map.to(device)

    def loss(self, layer: int, inputs: Sequence[MixerInputs], call: AttentionCall) -> Tensor:
        """Mean squared error of a layer, summed over the sides, from its mixers' inputs and the teacher's call."""
        pairs = [
            mixer.queries_and_keys(mixer_inputs) for mixer, mixer_inputs in zip(self.mixers[layer], inputs, strict=True)
        ]
        student_sides = dict(zip(SIDES, zip(*pairs, strict=True), strict=True))
        teacher_sides = {"queries": call.q_BHTD, "keys": call.k_BGTD}
        losses = []
        for side in self.sides:
            student_BTC = torch.cat([_flat(x_BHTN) for x_BHTN in student_sides[side]], -1)
            mapped_BTC = self.maps[f"{layer}_{side}"](student_BTC)
            teacher_BTC = _flat(teacher_sides[side]).to(mapped_BTC.device)
            losses.append(nn.functional.mse_loss(wide(mapped_BTC), teacher_BTC))
        return sum(losses[1:], losses[0])

    @contextmanager
    def recorded_inputs(self) -> Iterator[dict[int, list[MixerInputs]]]:
        """Within, appends the inputs of each mixer, as the student runs, to the list of its layer."""
        layer_inputs: dict[int, list[MixerInputs]] = {layer: [] for layer in self.mixers}

        def record(layer: int, module: nn.Module, args: tuple[Any, ...]) -> None:
            layer_inputs[layer].append(args[0])

        with ExitStack() as hooks:
            for layer, mixers in self.mixers.items():
                for mixer in mixers:
                    hooks.callback(mixer.register_forward_pre_hook(partial(record, layer)).remove)
            yield layer_inputs


def _map(channels: int, width: int, target: int) -> nn.Module:
    return nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, target))


@torch.no_grad()
def _channels(mixer: Mixer) -> dict[str, int]:
    """Channels of a mixer's queries and keys, from one token of zeros."""
    group, weight = mixer.group, next(mixer.parameters(), torch.zeros(()))
    q_1H1D, k_1G1D = (
        weight.new_zeros(1, heads, 1, group.head_dim) for heads in (len(group.heads), len(group.kv_heads))
    )
    hidden_11M = weight.new_zeros(1, 1, group.hidden_size)
    pair = mixer.queries_and_keys(MixerInputs(q_1H1D, k_1G1D, k_1G1D, hidden_11M, scale=1.0))
    return {side: _flat(x_BHTN).shape[-1] for side, x_BHTN in zip(SIDES, pair, strict=True)}


def _flat(x_BHTN: Tensor) -> Tensor:
    """Concatenates the heads: (B, T, C), in float32 or wider."""
    return wide(x_BHTN.transpose(1, 2).flatten(2))
