"""The pass that trains the student as it will be used, from its own hidden states.

Its losses are the divergence from the teacher, cross-entropy, and the distance of hidden states.
Legend: B sequences, T tokens, M model width.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from subquad.data.batch import Batch, inputs_of, labels_of
from subquad.distill.bridge import Bridge
from subquad.distill.layer_losses import output_distance
from subquad.distill.logit_losses import FromHidden, TeacherLogits, chunked_loss
from subquad.distill.passes import LogitsStore, _first, in_mixer_order, layers_in_order
from subquad.errors import UserError
from subquad.mixers import MixerInputs
from subquad.model.base import BaseStudent
from subquad.model.interface import AttentionCall, find_attention, input_device, watched_attention
from subquad.model.layer_call import attending
from subquad.model.output_head import OutputHead, causal_lm, final_hidden, has_head
from subquad.model.saliency import saliency_distance, saliency_model
from subquad.recipes.stage import OF_OUTPUTS, OF_TOKENS, Stage


class FreeRunning:
    """Divergence from the teacher, cross-entropy of token or class, and distances of hidden states, as weighted."""

    def __init__(
        self,
        stage: Stage,
        student: BaseStudent,
        teacher: PreTrainedModel,
        logits_from: PreTrainedModel | LogitsStore,
        seed: int = 0,
    ) -> None:
        self.stage, self.student, self.teacher, self.logits_from = stage, student, teacher, logits_from
        self.layers, waiting = layers_in_order(student, stage.replaced)
        self.forward_context = attending(waiting)
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
            student_BTM = self.student.final_hidden(inputs, forward_context=self.forward_context)
        parts: dict[str, Tensor] = {}
        if self.bridge is not None:
            for layer, given in heard.items():
                call = in_mixer_order(calls[self.attention[self.bridge.teacher_layers[layer]]], self.student)
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
            head = OutputHead.of(self.student)
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
        return hidden_BTM, FromHidden(
            hidden_BTM, OutputHead.of(self.logits_from).first(len(OutputHead.of(self.student).weight_VM))
        )


def _check_outputs(stage: Stage, student: BaseStudent, teacher: PreTrainedModel) -> None:
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
