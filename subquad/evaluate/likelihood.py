"""Fidelity of students to their teacher on held-out text: KL, perplexity and agreement, by context length.

Notable:
- One pass at the longest context serves them all: the models are causal, so the first c positions of a row are what the
  model says at context c.
- The teacher runs once for all the models. A row at a time goes through the decoders, and the heads see `chunk`
  positions at a time: a few (chunk, V) tensors are the most there is, never a (B, T, V) one.
- KL sums differences of float32 log-probabilities, so it is exactly zero for a model that equals its teacher. A token
  that the teacher forbids (a logit of -inf) adds nothing.
- Heads of different sizes, padded with rows that no token uses, are cut to the rows that all have, as in training.
- Logits that are no numbers give measures that are none (NaN); nothing else is lost.

Shapes: B rows, T tokens, C positions of a chunk, M model width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subquad.errors import UserError
from subquad.model.output_head import OutputHead, final_hidden, head_logits

Measures = dict[str, dict[int, Any]]
MEASURES = ("kl", "top1", "cross_entropy", "perplexity")


@torch.no_grad()  # not inference_mode: buffers a model makes on the way (rotary tables) must stay usable in training
def likelihood(
    models: Mapping[str, PreTrainedModel],
    teacher: PreTrainedModel,
    heldout_BT: Tensor,
    contexts: Sequence[int],
    *,
    chunk: int = 256,
    tick: Callable[[int], object] = lambda tokens: None,
) -> dict[str, Measures]:
    """Compare every model of `models` with its teacher on the rows of `heldout_BT` (int64 token ids, no padding).

    All distributions are over the tokens that the output heads of all the models have.

    Returns, for "teacher" and for each name: `kl` (forward KL of the teacher from the model, nats per token),
    `kl_samples` (the means it is the mean of: one of each row, or of each eighth of the only row), `kl_stderr` (its
    standard error over them), `top1` (share of positions where both have the same likeliest token), `cross_entropy`
    (nats per token) and `perplexity`, each {context: value}. At context c these are means over the first c positions of
    all rows; cross-entropy counts the c - 1 of them whose next token lies within the context. `buckets`: {context:
    {"start", "kl", "top1", "cross_entropy", "perplexity"}}, the means over the positions from `start`, the next shorter
    context, up to this one: what a mean over all positions hides of the last ones. `tick` is called with the tokens of
    each row, summed over the models, when it is done.
    Raises `UserError` as `check_rows` does.
    """
    if "teacher" in models:
        raise ValueError("'teacher' is the name of the teacher's own row: give the model another one")
    all_models = {"teacher": teacher, **models}
    check_rows(all_models, heldout_BT, contexts)
    rows, common_tokens = len(heldout_BT), min(map(head_size, all_models.values()))

    # Every measure of every token, a chunk of positions at a time
    longest = max(contexts, default=0)
    kl = {name: torch.zeros(rows, longest) for name in all_models}
    same = {name: torch.ones(rows, longest) for name in all_models}
    surprise = {name: torch.zeros(rows, longest) for name in all_models}  # at p: of token p, so the first stays empty

    with evaluating(*all_models.values()):
        for row in range(rows):
            ids_1T = heldout_BT[row : row + 1, :longest].to(teacher.device)
            hidden = {name: final_hidden(model, ids_1T.to(model.device)) for name, model in all_models.items()}
            for start in range(0, longest, chunk):
                positions = slice(start, min(start + chunk, longest))
                targets_C = ids_1T[0, start + 1 : positions.stop + 1]  # one less at the end of the row
                after = slice(start + 1, start + 1 + len(targets_C))
                teacher_CV = _log_probabilities(teacher, hidden["teacher"][:, positions], common_tokens)
                p_CV, best_C = teacher_CV.exp(), teacher_CV.argmax(-1)
                impossible_CV = p_CV == 0
                surprise["teacher"][row, after] = -_of_targets(teacher_CV, targets_C)
                for name, model in models.items():
                    logp_CV = _log_probabilities(model, hidden[name][:, positions], common_tokens).to(best_C.device)
                    surprise[name][row, after] = -_of_targets(logp_CV, targets_C)
                    same[name][row, positions] = _agreement(logp_CV, best_C).cpu()
                    difference_CV = torch.sub(teacher_CV, logp_CV, out=logp_CV)  # their last use: overwrite them
                    difference_CV.masked_fill_(impossible_CV, 0.0)  # 0 log 0 is 0
                    kl[name][row, positions] = torch.einsum("cv,cv->c", p_CV, difference_CV).cpu()
            tick(len(all_models) * longest)

    # Means by context, and between one context and the next
    bounds = [0, *sorted(set(contexts))]
    result: dict[str, Measures] = {}
    for name in all_models:
        tables = kl[name], same[name], surprise[name]
        whole = {c: _means(*tables, 0, c) for c in contexts}
        samples = {c: _sample_means(kl[name][:, :c]) for c in contexts}
        result[name] = {measure: {c: whole[c][measure] for c in contexts} for measure in MEASURES} | {
            "kl_samples": samples,
            "kl_stderr": {c: standard_error(samples[c]) for c in contexts},
            "buckets": {c: {"start": start} | _means(*tables, start, c) for start, c in pairwise(bounds)},
        }
    return result


def _means(kl_BT: Tensor, same_BT: Tensor, surprise_BT: Tensor, start: int, stop: int) -> dict[str, float]:
    """`MEASURES` over the positions from `start` up to `stop`."""
    cross_entropy = surprise_BT[:, max(start, 1) : stop].double().mean().item()
    return {
        "kl": kl_BT[:, start:stop].double().mean().item(),
        "top1": same_BT[:, start:stop].double().mean().item(),
        "cross_entropy": cross_entropy,
        "perplexity": math.inf if cross_entropy >= 700 else math.exp(cross_entropy),
    }


def check_rows(models: Mapping[str, PreTrainedModel], heldout_BT: Tensor, contexts: Sequence[int]) -> None:
    """Raises UserError if the rows are shorter than a context, or have a token that a model lacks."""
    length = heldout_BT.shape[1]
    for context in contexts:
        if not 2 <= context <= length:
            raise UserError(
                f"cannot measure likelihood at a context of {context} tokens, the held-out rows have {length}: "
                "choose contexts from 2 to that length, or hold out more text"
            )
    for name, model in models.items():
        if (largest := int(heldout_BT.max())) >= (tokens := head_size(model)):
            raise UserError(
                f"the text has the token {largest}, and the model '{name}' knows {tokens} tokens: the models have "
                "different tokenizers, so compare models that have the same"
            )


def head_size(model: PreTrainedModel) -> int:
    """Tokens of the output head of a model, those included that pad it."""
    return len(OutputHead.of(model).weight_VM)


def _log_probabilities(model: PreTrainedModel, hidden_1CM: Tensor, tokens: int) -> Tensor:
    return head_logits(model, hidden_1CM)[0, :, :tokens].float().log_softmax(-1)


def _agreement(logp_CV: Tensor, best_C: Tensor) -> Tensor:
    """1.0 where the likeliest token is this one, else 0.0; NaN where the logits are no numbers."""
    likeliest_C, token_C = logp_CV.max(-1)
    return (token_C == best_C).float().masked_fill(likeliest_C.isnan(), math.nan)


def _of_targets(logp_CV: Tensor, targets_C: Tensor) -> Tensor:
    return logp_CV[: len(targets_C)].gather(-1, targets_C[:, None])[:, 0].cpu()


@contextmanager
def evaluating(*models: PreTrainedModel) -> Iterator[None]:
    """Put models in evaluation mode (no dropout), and every module back in its own mode afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _sample_means(values_BT: Tensor) -> list[float]:
    """Means of the samples: rows, or blocks of a single row, since neighbouring tokens are correlated."""
    groups = values_BT if len(values_BT) > 1 else values_BT[0].tensor_split(min(8, values_BT.shape[1]))
    return [group.double().mean().item() for group in groups]


def standard_error(samples: Sequence[float]) -> float:
    """Standard error of the mean of at least two independent samples; NaN if one is not finite."""
    if not all(map(math.isfinite, samples)):
        return math.nan
    return stdev(samples) / math.sqrt(len(samples))


class Gain(NamedTuple):
    """Difference of two means over the same samples, and its standard error."""

    mean: float
    stderr: float

    @property
    def may_be_chance(self) -> bool:
        return abs(self.mean) < 2 * self.stderr


def paired_gain(samples: Sequence[float], baselines: Sequence[float]) -> Gain:
    """Gain of `samples` over `baselines`, with the standard error of the differences between paired samples."""
    gains = [baseline - sample for sample, baseline in zip(samples, baselines, strict=True)]
    return Gain(fmean(gains), standard_error(gains))
