"""Teacher-forced pass: aligns layers, each layer of the student getting the teacher's input of that layer.

Notable:
- The teacher runs once, without gradients and without its output head. In this one pass, hooks run every layer of the
  student, which is compared by its mixing matrices, its attention output, or the output of its block.
- The gradients of a layer's loss are computed at once, so memory holds the graph of one layer only (with a gap, of one
  group of blocks). The teacher stops after the last layer that is aligned.
- Block outputs are those of the blocks themselves. That of the last one is the state before the final norm.

Legend: B sequences, T tokens, M model width.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from subquad.data.batch import Batch, inputs_of
from subquad.distill.bridge import Bridge
from subquad.distill.layer_losses import matrix_distance, output_distance
from subquad.distill.passes import hidden_states, in_mixer_order, layers_in_order
from subquad.errors import UserError
from subquad.mixers import Mixer, MixerInputs
from subquad.model.base import BaseStudent
from subquad.model.interface import AttentionCall, find_attention, input_device, watched_attention
from subquad.model.layer_call import ForwardContext, LayerCall, attending, forward_arguments
from subquad.model.output_head import final_hidden
from subquad.plan import ATTENTION
from subquad.recipes.stage import Stage


class _LastLayerReached(Exception):
    """Ends the teacher's forward pass after the last layer that is needed."""


class TeacherForced:
    """Distances of the student's layers from the teacher's, on the teacher's inputs: means over layers."""

    def __init__(self, stage: Stage, student: BaseStudent, teacher: PreTrainedModel, seed: int = 0) -> None:
        self.layers, attention_layers = layers_in_order(student, stage.replaced)
        self.forward_context = attending(attention_layers)
        self.student, self.teacher, self.distance_kind = student, teacher, stage.loss
        self.device = input_device(teacher)

        # Find the teacher's layers, and check that the student's have the same shapes
        sites = find_attention(teacher)
        self.attention = [teacher.get_submodule(site.path) for site in sites]
        self.blocks = [teacher.get_submodule(site.block) for site in sites]
        shapes = [site.shape for site in sites]
        if shapes != student.plan.shapes:
            raise UserError(
                f"stage '{stage.name}' gives every layer the teacher's input, and the student's layers are not of the "
                "teacher's number or shape: set teacher_forced: false, or choose logits, labels or bridge"
            )
        self.bridge = Bridge(stage, student, self.layers, shapes, seed) if "bridge" in stage.weights else None

        # Group the blocks whose outputs are compared, by layer: a group runs on the output of its own blocks
        groups = [range(start, min(start + stage.gap, len(sites))) for start in range(0, len(sites), stage.gap)]
        self.groups = {layer: group for group in groups if not set(group).isdisjoint(self.layers) for layer in group}

        # Split the weights over the layers
        self.objectives = stage.weights
        self.weights: dict[str, float] = {}
        for objective, weight in self.objectives.items():
            layers = [*self.groups] if objective == "block_output" else self.layers
            self.weights |= {self._part(objective, layer): weight / len(layers) for layer in layers}
        if "matrix" in self.objectives:
            _check_matrices(stage, student, self.layers)

        # Find the parameters that can get a gradient
        attention_modules = student.attention_modules()
        aligned_modules = [attention_modules[layer] for layer in self.layers]
        if "block_output" in self.objectives:
            aligned_modules = [student.blocks()[layer] for layer in self.groups]
        aligned_parameters = {parameter for module in aligned_modules for parameter in module.parameters()}
        self.reachable = {name for name, parameter in student.named_parameters() if parameter in aligned_parameters}

    def _part(self, objective: str, layer: int) -> str:
        return f"layer {layer}" if len(self.objectives) == 1 else f"{objective} of layer {layer}"

    def __call__(self, batch: Batch, share: float) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        group_losses: list[Tensor] = []  # of the group of blocks that is running
        group_outputs: list[Tensor] = []  # the output of that group's last block: at most one

        def weighted_loss(objective: str, layer: int, loss: Tensor) -> Tensor:
            part = self._part(objective, layer)
            losses[part] = loss.detach()
            return loss * (share * self.weights[part])

        # Run the student's attention module on the inputs of the teacher's
        def align_attention(
            layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            with torch.enable_grad():
                if "matrix" in self.objectives:
                    pairs = self._mixer_inputs(layer, args, kwargs)
                    call = in_mixer_order(calls[module], self.student)
                    _backward(weighted_loss("matrix", layer, _matrix_distances(pairs, call)))
                if self.bridge is not None:
                    inputs = [mixer_inputs for _, mixer_inputs in self._mixer_inputs(layer, args, kwargs)]
                    call = in_mixer_order(calls[self.attention[self.bridge.teacher_layers[layer]]], self.student)
                    _backward(weighted_loss("bridge", layer, self.bridge.loss(layer, inputs, call)))
                if "mixer_output" in self.objectives:
                    student_BTM = self.student.attention_modules()[layer](*args, **kwargs)[0]
                    distance = output_distance(student_BTM, hidden_states(output), self.distance_kind)
                    _backward(weighted_loss("mixer_output", layer, distance))
            if "block_output" not in self.objectives and layer == self.layers[-1]:
                raise _LastLayerReached

        # Run the student's block on the teacher's input or, within a group, on the output of the block before it
        def align_block(layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            group = self.groups[layer]
            with torch.enable_grad():
                if layer > group[0]:
                    args, kwargs = _with_hidden(args, kwargs, group_outputs.pop())
                block = self.student.blocks()[layer]
                with forward_arguments(block, self.forward_context) as context_arguments:
                    student_BTM = hidden_states(block(*args, **kwargs, **context_arguments))
                distance = output_distance(student_BTM, hidden_states(output), self.distance_kind)
                group_losses.append(weighted_loss("block_output", layer, distance))
                if layer < group[-1]:
                    group_outputs.append(student_BTM)
                else:
                    _backward(sum(group_losses[1:], group_losses[0]))
                    group_losses.clear()
            if layer == [*self.groups][-1]:
                raise _LastLayerReached

        # Run the teacher with these hooks
        with ExitStack() as hooks, torch.no_grad():
            needs_calls = not self.objectives.keys().isdisjoint(("matrix", "bridge"))
            calls = hooks.enter_context(watched_attention(self.teacher)) if needs_calls else {}
            if needs_calls or "mixer_output" in self.objectives:
                for layer in self.layers:
                    hook = self.attention[layer].register_forward_hook(
                        partial(align_attention, layer), with_kwargs=True
                    )
                    hooks.callback(hook.remove)
            if "block_output" in self.objectives:
                for layer in self.groups:
                    hook = self.blocks[layer].register_forward_hook(partial(align_block, layer), with_kwargs=True)
                    hooks.callback(hook.remove)
            try:
                final_hidden(self.teacher, inputs_of(batch))
            except _LastLayerReached:
                pass
        return losses

    def _mixer_inputs(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[Mixer, MixerInputs]]:
        """Mixers of this layer with their inputs, when the student's attention module gets these arguments."""
        pairs: list[tuple[Mixer, MixerInputs]] = []

        def inspect(call: LayerCall) -> Tensor:
            pairs.extend((mixer, call.inputs(name)) for name, mixer in call.mixers.items() if name != ATTENTION)
            return torch.zeros_like(call.all_inputs.q_BHTD)

        self.student.attention_modules()[layer](*args, **{**kwargs, "forward_context": ForwardContext(around=inspect)})
        return pairs


def _matrix_distances(pairs: Sequence[tuple[Mixer, MixerInputs]], call: AttentionCall) -> Tensor:
    """Distance of a layer's matrices: the mean over its heads that have mixers."""
    heads = [len(mixer.group.heads) for mixer, _ in pairs]
    distances = [matrix_distance(mixer, inputs, call) for mixer, inputs in pairs]
    return torch.stack([n * d for n, d in zip(heads, distances, strict=True)]).sum() / sum(heads)


def _check_matrices(stage: Stage, student: BaseStudent, layers: list[int]) -> None:
    for layer in layers:
        for name, mixer in student.mixers(layer).items():
            if type(mixer).mix is Mixer.mix:
                raise UserError(
                    f"stage '{stage.name}' compares mixing matrices, and mixer '{name}' has none (it writes no 'mix'): "
                    "choose another objective"
                )


def _backward(loss: Tensor) -> None:
    if loss.requires_grad:  # a mixer may have no weights
        loss.backward()


def _with_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], hidden_BTM: Tensor) -> tuple[Any, dict[str, Any]]:
    """Arguments of a block with its hidden states replaced by `hidden_BTM`."""
    return ((hidden_BTM, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden_BTM})
