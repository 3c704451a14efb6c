"""How close students of images stay to their teacher: accuracy, agreement, divergence and distance of features.

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
    everyone = {"teacher": teacher, **models}
    values: dict[str, dict[str, list[Tensor]]] = {name: {} for name in everyone}
    with evaluating(*everyone.values()):
        for some in batches:
            answers = {
                name: _answer(model, some.pixels_BCHW.to(model.device)).to(teacher.device)
                for name, model in everyone.items()
            }
            for name, answer in answers.items():
                for measure, value_B in _compared(answer, answers["teacher"], some.labels_B.to(teacher.device)).items():
                    values[name].setdefault(measure, []).append(value_B.float().cpu())
            tick(len(everyone) * len(some))
    return {name: _summary({key: torch.cat(parts) for key, parts in found.items()}) for name, found in values.items()}


@dataclass(frozen=True)
class _Answer:
    """The last hidden states, the logarithms of a classifier's probabilities, and a saliency model's map."""

    hidden_BTM: Tensor
    logp_BV: Tensor | None = None
    map_BHW: Tensor | None = None

    def to(self, device: torch.device) -> "_Answer":
        found = (self.hidden_BTM, self.logp_BV, self.map_BHW)
        return _Answer(*(None if one is None else one.float().to(device) for one in found))  # type: ignore[arg-type]


def _answer(model: PreTrainedModel, pixels_BCHW: Tensor) -> _Answer:
    hidden_BTM = final_hidden(model, pixels_BCHW)
    if has_head(model):
        return _Answer(hidden_BTM, head_logits(model, hidden_BTM)[:, 0].float().log_softmax(-1))
    try:
        decode = saliency_model(model).decode
    except TypeError:
        return _Answer(hidden_BTM)
    return _Answer(hidden_BTM, map_BHW=decode(hidden_BTM, pixels_BCHW.shape[-2:]).sigmoid())


def _compared(mine: _Answer, theirs: _Answer, labels_B: Tensor) -> dict[str, Tensor]:
    """Every measure, one value an image."""
    found: dict[str, Tensor] = {}
    if mine.hidden_BTM.shape == theirs.hidden_BTM.shape:  # a student of its own making may have another width
        difference_BTM = mine.hidden_BTM - theirs.hidden_BTM
        found["distance"] = difference_BTM.flatten(1).norm(dim=1) / theirs.hidden_BTM.flatten(1).norm(dim=1)
    if mine.map_BHW is not None and theirs.map_BHW is not None:
        found["saliency"] = (mine.map_BHW - theirs.map_BHW).abs().mean((1, 2))
    if mine.logp_BV is not None and theirs.logp_BV is not None:
        best_B = mine.logp_BV.argmax(-1)
        found["kl"] = (theirs.logp_BV.exp() * (theirs.logp_BV - mine.logp_BV)).sum(-1)
        found["agreement"] = best_B == theirs.logp_BV.argmax(-1)
        known_B = labels_B != UNLABELLED
        if known_B.any():
            found["accuracy"] = (best_B == labels_B)[known_B]
    return found


def _summary(values: Mapping[str, Tensor]) -> dict[str, Any]:
    summary: dict[str, Any] = {"count": max((len(value_N) for value_N in values.values()), default=0)}
    for measure, value_N in values.items():
        error = float(value_N.std() / math.sqrt(len(value_N))) if len(value_N) > 1 else 0.0
        summary |= {measure: float(value_N.mean()), f"{measure}_stderr": error}
    compared = values.get("kl", values.get("distance"))
    if compared is not None:
        summary["samples"] = [float(group.mean()) for group in compared.tensor_split(min(GROUPS, len(compared)))]
    return summary
