"""The two training passes over a micro-batch.

`TeacherForced` aligns layers: the teacher runs once, without gradients and without its output head, and every layer
of the student answers the *teacher's* input of that layer, all in this one pass: with its mixing matrices, with its
attention output, or with the output of its block. Each layer's loss goes backward at once, so only one layer's graph is
ever in memory (with a gap, those of a group of blocks), and the teacher stops after the last layer that is aligned.
`FreeRunning` trains the student as it will be used, from its own hidden states: on the divergence from the teacher, on
cross-entropy, and on the distance of hidden states.

Both are called with a micro-batch (token ids (B, T), or images) and the share of the whole batch that it is; they leave
gradients in the student's parameters and return the parts of the loss; `weights` says how these make up the loss.
Block outputs are taken from the blocks themselves: the last one's is the state before the final norm.
Legend: B sequences, T tokens, N = B x T, C tokens of a chunk, M model width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from subquad.data.batch import Batch, inputs_of, labels_of
from subquad.distill.bridge import Bridge
from subquad.distill.hidden import matrix_distance, output_distance
from subquad.distill.tokens import FromHidden, TeacherLogits, chunked_loss
from subquad.errors import UserError
from subquad.mixers import Mixer, MixerInputs
from subquad.model.base import Converted
from subquad.model.interface import AttentionCall, find_attention, input_device, watched_attention
from subquad.model.mixed_attention import LayerMixer, Pass, to_middle
from subquad.model.output_head import Head, causal_lm, final_hidden, has_head
from subquad.model.saliency import saliency_distance, saliency_model
from subquad.plan import ATTENTION
from subquad.recipes.stage import OF_OUTPUTS, OF_TOKENS, Stage


class LogitsStore(Protocol):
    """The teacher's logits, written down earlier."""

    def lookup(self, input_ids_BT: Tensor) -> TeacherLogits: ...


class TrainingPass(Protocol):
    """A way to get gradients from a micro-batch."""

    weights: dict[str, float]  # of the parts in the loss
    bridge: Bridge | None  # what it trains beside the student, and drops
    reachable: set[str]  # names of the student's parameters that may get a gradient
    device: torch.device  # where token ids go

    def __call__(self, batch: Batch, share: float) -> dict[str, Tensor]: ...


def layers_in_order(student: Converted, share: float) -> tuple[list[int], frozenset[int]]:
    """This share of the layers with mixers, evenly spread, and those that wait and attend meanwhile.

    A larger share contains a smaller one: layers join in the order of their bit-reversed index, so that halves are
    every second layer.
    """
    layers = student.replaced_layers()
    bits = max(1, (len(layers) - 1).bit_length())
    order = sorted(range(len(layers)), key=lambda index: int(f"{index:0{bits}b}"[::-1], 2))
    active = sorted(layers[index] for index in order[: max(1, round(share * len(layers)))])
    return active, frozenset(layers) - frozenset(active)


class _Done(Exception):
    """The teacher has passed the last layer that is needed."""


class TeacherForced:
    """Distances of the student's layers from the teacher's, each given the teacher's input; means over layers."""

    def __init__(self, stage: Stage, student: Converted, teacher: PreTrainedModel, seed: int = 0) -> None:
        self.layers, waiting = layers_in_order(student, stage.replaced)
        self.student_pass = Pass(restored=waiting)
        self.student, self.teacher, self.kind = student, teacher, stage.loss
        self.device = input_device(teacher)
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
        groups = [range(start, min(start + stage.gap, len(sites))) for start in range(0, len(sites), stage.gap)]
        self.groups = {  # by layer, of the block outputs that are compared
            layer: group for group in groups if not set(group).isdisjoint(self.layers) for layer in group
        }
        self.objectives = stage.weights
        self.weights: dict[str, float] = {}
        for objective, weight in self.objectives.items():
            layers = [*self.groups] if objective == "block_output" else self.layers
            self.weights |= {self._part(objective, layer): weight / len(layers) for layer in layers}
        if "matrix" in self.objectives:
            _check_matrices(stage, student, self.layers)
        inside = student.attention_modules()
        aligned = [inside[layer] for layer in self.layers]
        if "block_output" in self.objectives:
            aligned = [student.blocks()[layer] for layer in self.groups]
        reached = {parameter for module in aligned for parameter in module.parameters()}
        self.reachable = {name for name, parameter in student.named_parameters() if parameter in reached}

    def _part(self, objective: str, layer: int) -> str:
        return f"layer {layer}" if len(self.objectives) == 1 else f"{objective} of layer {layer}"

    def __call__(self, batch: Batch, share: float) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        free: list[Tensor] = []  # the last output within a group of blocks, and the group's losses
        of_group: list[Tensor] = []

        def weighted(objective: str, layer: int, loss: Tensor) -> Tensor:
            part = self._part(objective, layer)
            losses[part] = loss.detach()
            return loss * (share * self.weights[part])

        def align(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            with torch.enable_grad():
                if "matrix" in self.objectives:
                    pairs = self._inputs(layer, args, kwargs)
                    call = moved(calls[module], self.student)
                    _backward(weighted("matrix", layer, _matrix_distances(pairs, call)))
                if self.bridge is not None:
                    inputs = [given for _, given in self._inputs(layer, args, kwargs)]
                    call = moved(calls[self.attention[self.bridge.teacher_layers[layer]]], self.student)
                    _backward(weighted("bridge", layer, self.bridge.loss(layer, inputs, call)))
                if "mixer_output" in self.objectives:
                    student_BTM = self.student.attention_modules()[layer](*args, **kwargs)[0]
                    _backward(weighted("mixer_output", layer, output_distance(student_BTM, _first(output), self.kind)))
            if "block_output" not in self.objectives and layer == self.layers[-1]:
                raise _Done

        def align_block(layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            group = self.groups[layer]
            with torch.enable_grad():
                if layer > group[0]:
                    args, kwargs = _with_hidden(args, kwargs, free.pop())
                kwargs = {**kwargs, "student_pass": self.student_pass}
                student_BTM = _first(self.student.blocks()[layer](*args, **kwargs))
                distance = output_distance(student_BTM, _first(output), self.kind)
                of_group.append(weighted("block_output", layer, distance))
                if layer < group[-1]:
                    free.append(student_BTM)
                else:
                    _backward(sum(of_group[1:], of_group[0]))
                    of_group.clear()
            if layer == [*self.groups][-1]:
                raise _Done

        with ExitStack() as hooks, torch.no_grad():
            watching = not self.objectives.keys().isdisjoint(("matrix", "bridge"))
            calls = hooks.enter_context(watched_attention(self.teacher)) if watching else {}
            if watching or "mixer_output" in self.objectives:
                for layer in self.layers:
                    hook = self.attention[layer].register_forward_hook(partial(align, layer), with_kwargs=True)
                    hooks.callback(hook.remove)
            if "block_output" in self.objectives:
                for layer in self.groups:
                    hook = self.blocks[layer].register_forward_hook(partial(align_block, layer), with_kwargs=True)
                    hooks.callback(hook.remove)
            try:
                final_hidden(self.teacher, inputs_of(batch))
            except _Done:
                pass
        return losses

    def _inputs(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Mixer, MixerInputs]]:
        """The mixers of this layer, and what they are given where the layer gets the teacher's input."""
        seen: list[tuple[Mixer, MixerInputs]] = []

        def inspect(mixers: LayerMixer, name: str, inputs: MixerInputs) -> None:
            if name != ATTENTION:
                seen.append((mixers.by_name[name], inputs))

        self.student.attention_modules()[layer](*args, **{**kwargs, "student_pass": Pass(inspector=inspect)})
        return seen


def _matrix_distances(pairs: Sequence[tuple[Mixer, MixerInputs]], call: AttentionCall) -> Tensor:
    """The distance of a layer's matrices: the mean over its heads that have mixers."""
    heads = [len(mixer.group.heads) for mixer, _ in pairs]
    distances = [matrix_distance(mixer, inputs, call) for mixer, inputs in pairs]
    return torch.stack([n * d for n, d in zip(heads, distances, strict=True)]).sum() / sum(heads)


def _check_matrices(stage: Stage, student: Converted, layers: list[int]) -> None:
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


class FreeRunning:
    """Divergence from the teacher, cross-entropy of token or class, and distances of hidden states, as weighted."""

    def __init__(
        self,
        stage: Stage,
        student: Converted,
        teacher: PreTrainedModel,
        logits_from: PreTrainedModel | LogitsStore,
        seed: int = 0,
    ) -> None:
        self.stage, self.student, self.teacher, self.logits_from = stage, student, teacher, logits_from
        self.layers, waiting = layers_in_order(student, stage.replaced)
        self.student_pass = Pass(restored=waiting)
        self.weights = {name: weight for name, weight in stage.weights.items() if name in OF_OUTPUTS}
        self.hidden = {name: weight for name, weight in stage.weights.items() if name not in OF_OUTPUTS}
        for name, weight in self.hidden.items():
            self.weights |= {f"{name} of layer {layer}": weight / len(self.layers) for layer in self.layers}
        self.reachable = {name for name, _ in student.named_parameters()}
        self.device = input_device(student.backbone)
        sites = find_attention(teacher)
        shapes = [site.shape for site in sites]
        if self.hidden.keys() - {"bridge"} and shapes != student.plan.shapes:
            raise UserError(
                f"stage '{stage.name}' compares hidden states, and the student's layers are not of the teacher's "
                "number or shape: choose logits, labels or bridge"
            )
        _check_outputs(stage, student, teacher)
        self.bridge = Bridge(stage, student, self.layers, shapes, seed) if "bridge" in self.hidden else None
        self.attention = [teacher.get_submodule(site.path) for site in sites]
        theirs, mine = self.attention, student.attention_modules()
        blocks = [teacher.get_submodule(site.block) for site in sites]
        both = {"mixer_output": (theirs, mine), "block_output": (blocks, student.blocks())}
        self.modules = {
            name: [[modules[layer] for layer in self.layers] for modules in both[name]]
            for name in self.hidden.keys() & both.keys()
        }

    def __call__(self, batch: Batch, share: float) -> dict[str, Tensor]:
        inputs = inputs_of(batch)
        watched = {name: modules[0] for name, modules in self.modules.items()}
        calls: dict[nn.Module, AttentionCall] = {}
        heard: dict[int, list[MixerInputs]] = {}
        with ExitStack() as within:
            within.enter_context(torch.no_grad())
            theirs = within.enter_context(_outputs(watched))
            if self.bridge is not None:
                calls = within.enter_context(watched_attention(self.teacher))
            theirs_BTM, teacher = self._teacher(inputs)
        with ExitStack() as within:
            mine = within.enter_context(_outputs({name: modules[1] for name, modules in self.modules.items()}))
            if self.bridge is not None:
                heard = within.enter_context(self.bridge.listening())
            student_BTM = self.student.final_hidden(inputs, student_pass=self.student_pass)
        parts: dict[str, Tensor] = {}
        if self.bridge is not None:
            for layer, given in heard.items():
                call = moved(calls[self.attention[self.bridge.teacher_layers[layer]]], self.student)
                parts[f"bridge of layer {layer}"] = self.bridge.loss(layer, given, call)
        for name in self.modules:
            for layer, student, target in zip(self.layers, mine[name], theirs[name], strict=True):
                parts[f"{name} of layer {layer}"] = output_distance(student, target, self.stage.loss)
        if "features" in self.weights:
            assert theirs_BTM is not None
            parts["features"] = output_distance(student_BTM, theirs_BTM.to(student_BTM.device), self.stage.loss)
        if "saliency" in self.weights:
            assert theirs_BTM is not None
            mine_BHW, theirs_BHW = (
                saliency_model(model).decode(hidden_BTM, inputs.shape[-2:])
                for model, hidden_BTM in ((self.student, student_BTM), (self.teacher, theirs_BTM))
            )
            parts["saliency"] = saliency_distance(mine_BHW, theirs_BHW.detach().to(mine_BHW.device))
        total = sum((self.weights[part] * loss for part, loss in parts.items()), torch.zeros((), device=self.device))
        if not self.weights.keys().isdisjoint(OF_TOKENS):
            head = Head.of(self.student)
            if isinstance(teacher, FromHidden):  # heads are padded to various sizes
                head = head.first(len(teacher.head.weight_VM))
            loss = chunked_loss(
                student_BTM,
                head,
                weights=self.weights,
                teacher=teacher,
                labels_BT=labels_of(batch),
                kind=self.stage.divergence,
                temperature=self.stage.temperature,
            )
            total = total.to(loss.total.device) + loss.total
            parts |= loss.parts()
        (total * share).backward()
        return {name: part.detach() for name, part in parts.items()}

    def _teacher(self, inputs: Tensor) -> tuple[Tensor | None, TeacherLogits | None]:
        """The teacher's last states, and its distribution over the classes that the student has too."""
        if self.weights.keys() == {"labels"}:
            return None, None
        if not isinstance(self.logits_from, PreTrainedModel):
            return None, self.logits_from.lookup(inputs)
        hidden_BTM = final_hidden(self.logits_from, inputs.to(self.logits_from.device))
        if not has_head(self.student):
            return hidden_BTM, None
        return hidden_BTM, FromHidden(hidden_BTM, Head.of(self.logits_from).first(len(Head.of(self.student).weight_VM)))


def _check_outputs(stage: Stage, student: Converted, teacher: PreTrainedModel) -> None:
    """Raises UserError where an objective needs a head, or states of one width, that are not there."""
    missing = [name for name in OF_TOKENS if name in stage.weights and not has_head(student)]
    if missing:
        raise UserError(
            f"stage '{stage.name}' has the objective '{missing[0]}', and {type(student.backbone).__name__} ends with "
            "its hidden states: choose features"
        )
    if "saliency" in stage.weights:
        for model in (student, teacher):
            try:
                saliency_model(model)
            except TypeError as error:
                raise UserError(
                    f"stage '{stage.name}' has the objective 'saliency', and {error}: choose features"
                ) from None
    widths = [model.config.get_text_config().hidden_size for model in (causal_lm(student), teacher)]
    if "features" in stage.weights and widths[0] != widths[1]:
        raise UserError(
            f"stage '{stage.name}' compares last hidden states ('features'), and the student's are {widths[0]} wide, "
            f"the teacher's {widths[1]}: choose logits, labels or bridge"
        )


@contextmanager
def _outputs(modules: Mapping[str, list[nn.Module]]) -> Iterator[dict[str, list[Tensor]]]:
    """Within, keeps what these modules return, by name and in order."""
    kept: dict[str, list[Tensor]] = {name: [] for name in modules}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        kept[name].append(_first(output))

    with ExitStack() as hooks:
        for name, group in modules.items():
            for module in group:
                hooks.callback(module.register_forward_hook(partial(keep, name)).remove)
        yield kept


def _first(output: Any) -> Tensor:
    """The hidden states of what a module returned."""
    return output[0] if isinstance(output, tuple) else output


def _with_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], hidden_BTM: Tensor) -> tuple[Any, dict[str, Any]]:
    """A block's arguments with other hidden states."""
    return ((hidden_BTM, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden_BTM})


def moved(call: AttentionCall, student: Converted) -> AttentionCall:
    """The teacher's call with its tokens in the order in which the student's mixers see them."""
    count = getattr(student.config, "prefix_tokens", 0)
    if count == 0:
        return call
    return replace(call, q_BHTD=to_middle(call.q_BHTD, 2, count), k_BGTD=to_middle(call.k_BGTD, 2, count))


def make_pass(
    stage: Stage,
    student: Converted,
    teacher: PreTrainedModel,
    logits_from: PreTrainedModel | LogitsStore | None = None,
    seed: int = 0,
) -> TrainingPass:
    """The pass of a stage. `logits_from`: another teacher, or its stored logits, for the objective `logits`.

    `seed`: of the maps of the objective `bridge`. Raises UserError where the student's layers must be the teacher's, in
    number and shape, and are not.
    """
    if stage.forced:
        return TeacherForced(stage, student, teacher, seed)
    return FreeRunning(stage, student, teacher, teacher if logits_from is None else logits_from, seed)
