"""Free-running pass: trains the student as it will be used, on its own hidden states.

Its losses are the divergence from the teacher, the cross-entropy, and distances between hidden states.
Legend: B sequences, T tokens, M model width, H and W height and width of a saliency map.
"""

from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from subquad.data.batch import Batch, inputs_of, labels_of
from subquad.distill.bridge import Bridge
from subquad.distill.layer_losses import output_distance
from subquad.distill.logit_losses import FromHidden, TeacherLogits, chunked_loss
from subquad.distill.passes import LogitsStore, hidden_states, in_mixer_order, layers_in_order
from subquad.errors import UserError
from subquad.mixers import MixerInputs
from subquad.model.base import BaseStudent
from subquad.model.interface import AttentionCall, find_attention, input_device, record_outputs, watched_attention
from subquad.model.layer_call import attending
from subquad.model.output_head import OutputHead, causal_lm, final_hidden, has_head
from subquad.model.saliency import saliency_distance, saliency_model
from subquad.recipes.stage import OF_OUTPUTS, OF_TOKENS, Stage


class FreeRunning:
    """Weighted sum of the divergence from the teacher, the cross-entropy, and distances between hidden states."""

    def __init__(
        self,
        stage: Stage,
        student: BaseStudent,
        teacher: PreTrainedModel,
        logits_from: PreTrainedModel | LogitsStore,
        seed: int = 0,
    ) -> None:
        self.stage, self.student, self.teacher, self.logits_from = stage, student, teacher, logits_from
        self.layers, attention_layers = layers_in_order(student, stage.replaced)
        self.forward_context = attending(attention_layers)

        # Split the weights of objectives on hidden states over the layers
        self.weights = {name: weight for name, weight in stage.weights.items() if name in OF_OUTPUTS}
        self.layer_weights = {name: weight for name, weight in stage.weights.items() if name not in OF_OUTPUTS}
        for name, weight in self.layer_weights.items():
            self.weights |= {f"{name} of layer {layer}": weight / len(self.layers) for layer in self.layers}
        self.reachable = {name for name, _ in student.named_parameters()}
        self.device = input_device(student.backbone)

        # Check that the models fit the objectives
        sites = find_attention(teacher)
        shapes = [site.shape for site in sites]
        if self.layer_weights.keys() - {"bridge"} and shapes != student.plan.shapes:
            raise UserError(
                f"stage '{stage.name}' compares hidden states, and the student's layers are not of the teacher's "
                "number or shape: choose logits, labels or bridge"
            )
        _check_outputs(stage, student, teacher)

        # Collect the modules whose outputs are compared: (teacher's, student's) of each layer, by objective
        self.bridge = Bridge(stage, student, self.layers, shapes, seed) if "bridge" in self.layer_weights else None
        self.attention = [teacher.get_submodule(site.path) for site in sites]
        blocks = [teacher.get_submodule(site.block) for site in sites]
        compared = {
            "mixer_output": (self.attention, student.attention_modules()),
            "block_output": (blocks, student.blocks()),
        }
        self.modules = {
            name: [[modules[layer] for layer in self.layers] for modules in compared[name]]
            for name in self.layer_weights.keys() & compared.keys()
        }

    def __call__(self, batch: Batch, share: float) -> dict[str, Tensor]:
        inputs = inputs_of(batch)

        # Run the teacher without gradients
        calls: dict[nn.Module, AttentionCall] = {}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            teacher_outputs = {
                name: stack.enter_context(record_outputs(modules[0], hidden_states))
                for name, modules in self.modules.items()
            }
            if self.bridge is not None:
                calls = stack.enter_context(watched_attention(self.teacher))
            teacher_BTM, teacher_logits = self._run_teacher(inputs)

        # Run the student on its own hidden states
        mixer_inputs: dict[int, list[MixerInputs]] = {}
        with ExitStack() as stack:
            student_outputs = {
                name: stack.enter_context(record_outputs(modules[1], hidden_states))
                for name, modules in self.modules.items()
            }
            if self.bridge is not None:
                mixer_inputs = stack.enter_context(self.bridge.recorded_inputs())
            student_BTM = self.student.final_hidden(inputs, forward_context=self.forward_context)

        # Compare the layers
        losses: dict[str, Tensor] = {}
        if self.bridge is not None:
            for layer, layer_inputs in mixer_inputs.items():
                call = in_mixer_order(calls[self.attention[self.bridge.teacher_layers[layer]]], self.student)
                losses[f"bridge of layer {layer}"] = self.bridge.loss(layer, layer_inputs, call)
        for name in self.modules:
            for layer, output, target in zip(self.layers, student_outputs[name], teacher_outputs[name], strict=True):
                losses[f"{name} of layer {layer}"] = output_distance(output, target, self.stage.loss)

        # Compare the last hidden states
        if "features" in self.weights:
            assert teacher_BTM is not None
            losses["features"] = output_distance(student_BTM, teacher_BTM.to(student_BTM.device), self.stage.loss)
        if "saliency" in self.weights:
            assert teacher_BTM is not None
            student_BHW, teacher_BHW = (
                saliency_model(model).decode(hidden_BTM, inputs.shape[-2:])
                for model, hidden_BTM in ((self.student, student_BTM), (self.teacher, teacher_BTM))
            )
            losses["saliency"] = saliency_distance(student_BHW, teacher_BHW.detach().to(student_BHW.device))
        total = sum((self.weights[name] * loss for name, loss in losses.items()), torch.zeros((), device=self.device))

        # Compare the distributions at the output head
        if not self.weights.keys().isdisjoint(OF_TOKENS):
            head = OutputHead.of(self.student)
            if isinstance(teacher_logits, FromHidden):  # heads are padded to different sizes
                head = head.first(len(teacher_logits.head.weight_VM))
            token_loss = chunked_loss(
                student_BTM,
                head,
                weights=self.weights,
                teacher=teacher_logits,
                labels_BT=labels_of(batch),
                kind=self.stage.divergence,
                temperature=self.stage.temperature,
            )
            total = total.to(token_loss.total.device) + token_loss.total
            losses |= token_loss.parts()

        (total * share).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _run_teacher(self, inputs: Tensor) -> tuple[Tensor | None, TeacherLogits | None]:
        """Returns the teacher's last hidden states, and its distribution over the student's classes."""
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
    """Raises UserError if an objective needs a head or a saliency model that is missing, or other hidden states."""
    headless = [name for name in OF_TOKENS if name in stage.weights and not has_head(student)]
    if headless:
        raise UserError(
            f"stage '{stage.name}' has the objective '{headless[0]}', and {type(student.backbone).__name__} ends with "
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
