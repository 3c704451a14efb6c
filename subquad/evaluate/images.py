"""Fidelity of image students to their teacher: accuracy, agreement, divergence and distance of features.

Shapes: B images, T tokens, M model width, V classes.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subquad.data.batch import ImageBatch
from subquad.data.image_sources import UNLABELLED
from subquad.evaluate.likelihood import evaluating
from subquad.model.output_head import final_hidden, has_head, head_logits
from subquad.model.saliency import saliency_model

GROUPS = 32  # of images, whose means are the samples of a comparison


@torch.no_grad()
def image_fidelity(
    models: Mapping[str, PreTrainedModel],
    teacher: PreTrainedModel,
    batches: Iterable[ImageBatch],
    *,
    tick: Callable[[int], object] = lambda images: None,
) -> dict[str, dict[str, Any]]:
    """Compare every model of `models` with its teacher on the images of these batches.

    Returns, for "teacher" and for each name, means over the images with standard errors (`..._stderr`): `distance`, of
    the last hidden states (of a classifier: of what it reads) from the teacher's, as a share of the norm of those; and
    of classifiers `kl` (of the teacher from the model, nats), `agreement` (share of images that both give the same
    class) and, of images with a class, `accuracy`; of saliency models `saliency`, the mean over pixels of the
    difference of both maps' probabilities. `samples`: the divergences, or else the distances, of `GROUPS` groups of
    images, for comparisons in pairs. `tick` is called with the images of each batch, times the models.
    """
    all_models = {"teacher": teacher, **models}
    values: dict[str, dict[str, list[Tensor]]] = {name: {} for name in all_models}
    with evaluating(*all_models.values()):
        for batch in batches:
            answers = {
                name: _answer(model, batch.pixels_BCHW.to(model.device)).to(teacher.device)
                for name, model in all_models.items()
            }
            for name, answer in answers.items():
                labels_B = batch.labels_B.to(teacher.device)
                for measure, value_B in _compared(answer, answers["teacher"], labels_B).items():
                    values[name].setdefault(measure, []).append(value_B.float().cpu())
            tick(len(all_models) * len(batch))
    return {
        name: _summary({measure: torch.cat(parts) for measure, parts in measures.items()})
        for name, measures in values.items()
    }


@dataclass(frozen=True)
class _Answer:
    """Last hidden states, log-probabilities of a classifier, and map of a saliency model."""

    hidden_BTM: Tensor
    logp_BV: Tensor | None = None
    map_BHW: Tensor | None = None

    def to(self, device: torch.device) -> "_Answer":
        parts = (self.hidden_BTM, self.logp_BV, self.map_BHW)
        return _Answer(*(None if part is None else part.float().to(device) for part in parts))  # type: ignore[arg-type]


def _answer(model: PreTrainedModel, pixels_BCHW: Tensor) -> _Answer:
    hidden_BTM = final_hidden(model, pixels_BCHW)
    if has_head(model):
        return _Answer(hidden_BTM, head_logits(model, hidden_BTM)[:, 0].float().log_softmax(-1))
    try:
        decode = saliency_model(model).decode
    except TypeError:
        return _Answer(hidden_BTM)
    return _Answer(hidden_BTM, map_BHW=decode(hidden_BTM, pixels_BCHW.shape[-2:]).sigmoid())


def _compared(student: _Answer, teacher: _Answer, labels_B: Tensor) -> dict[str, Tensor]:
    """All measures, one value for each image."""
    measures: dict[str, Tensor] = {}
    if student.hidden_BTM.shape == teacher.hidden_BTM.shape:  # a student of its own making may have another width
        difference_BTM = student.hidden_BTM - teacher.hidden_BTM
        measures["distance"] = difference_BTM.flatten(1).norm(dim=1) / teacher.hidden_BTM.flatten(1).norm(dim=1)
    if student.map_BHW is not None and teacher.map_BHW is not None:
        measures["saliency"] = (student.map_BHW - teacher.map_BHW).abs().mean((1, 2))
    if student.logp_BV is not None and teacher.logp_BV is not None:
        best_B, p_BV = student.logp_BV.argmax(-1), teacher.logp_BV.exp()
        if student.logp_BV.shape == p_BV.shape:
            measures["kl"] = (p_BV * (teacher.logp_BV - student.logp_BV)).masked_fill(p_BV == 0, 0.0).sum(-1)
        measures["agreement"] = best_B == teacher.logp_BV.argmax(-1)
        known_B = labels_B != UNLABELLED
        if known_B.any():
            measures["accuracy"] = (best_B == labels_B)[known_B]
    return measures


def _summary(values: Mapping[str, Tensor]) -> dict[str, Any]:
    summary: dict[str, Any] = {"count": max((len(value_N) for value_N in values.values()), default=0)}
    for measure, value_N in values.items():
        error = float(value_N.std() / math.sqrt(len(value_N))) if len(value_N) > 1 else 0.0
        summary |= {measure: float(value_N.mean()), f"{measure}_stderr": error}
    compared = values.get("kl", values.get("distance"))
    if compared is not None:
        summary["samples"] = [float(group.mean()) for group in compared.tensor_split(min(GROUPS, len(compared)))]
    return summary
