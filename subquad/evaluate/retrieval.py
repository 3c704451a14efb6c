"""Score retrieval probes by the share of answers right and their log-probability.

Where one fact answers a question, its depth is known, and scores are also given by it (`by_depth`): with the context
length, the two axes of the needle-in-a-haystack test.

Accuracy alone says little of a small model (0% and 0% look equal, whatever was lost), so the log-probability of the
answer is reported as well. Decoders run over whole rows; heads only see the positions that predict answer tokens.

A probe that the teacher itself fails measures nothing in a student: `usable` says so before it is used.

Shapes: N rows, T tokens, A answer tokens of all rows together, M model width, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subquad.data.probes import Probe
from subquad.evaluate.likelihood import evaluating
from subquad.model.output_head import final_hidden, head_logits

TOKENS_AT_ONCE = 4096  # short rows go through the decoder together
POSITIONS_AT_ONCE = 256  # of logits

FLOORS = {"accuracy": 0.5, "logprob": 1.0}  # for a teacher: share of answers right, gain in nats/token from the facts

DEPTHS = 5  # bands that depth is cut into

Score = dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """Scores of a model on the answers of a probe, row by row; four float64 tensors (N,) on the CPU.

    `hits_N` of `counted_N` were right: answer tokens if `probe.per_token`, otherwise the row's one answer, right if all
    its tokens are. `logprob_N`: natural log-probability of the row's whole answer of `tokens_N` tokens, given the true
    tokens before each.
    """

    hits_N: Tensor
    counted_N: Tensor
    logprob_N: Tensor
    tokens_N: Tensor

    def score(self) -> Score:
        """The share of answers right and the mean log-probability of an answer token, over all rows."""
        return {
            "accuracy": (self.hits_N.sum() / self.counted_N.sum()).item(),
            "logprob": (self.logprob_N.sum() / self.tokens_N.sum()).item(),
        }

    def by_depth(self, depth_N: Tensor) -> list[Score]:
        """`DEPTHS` bands of depth, from the beginning to the question: their rows, and the score of these, if any."""
        band_N = (depth_N * DEPTHS).long().clamp(0, DEPTHS - 1)
        bands = []
        for band in range(DEPTHS):
            parts = [part[band_N == band] for part in (self.hits_N, self.counted_N, self.logprob_N, self.tokens_N)]
            rows = len(parts[0])
            bands.append({"rows": rows} | (Answers(*parts).score() if rows else {}))
        return bands


@dataclass(frozen=True)
class Verdict:
    """Whether a probe can be used with a teacher, and why (not), in words."""

    usable: bool
    reason: str


def retrieval(
    model: PreTrainedModel,
    probes: Mapping[str, Mapping[int, Probe]],
    tick: Callable[[int], object] = lambda tokens: None,
) -> dict[str, dict[int, Score]]:
    """Score `model` on {task: {context: Probe}}; returns {task: {context: {"accuracy", "logprob", "by_depth"}}}.

    `accuracy`: the share of rows whose answer tokens are all the model's likeliest (of tokens if `probe.per_token`).
    `logprob`: mean natural log-probability per answer token, given the true tokens before it. `by_depth`, where the
    probe knows the depth of its facts: both of them, and the rows, for each fifth of the text before the question.
    `tick` is called with the tokens of each probe when it is done.
    """
    scores: dict[str, dict[int, Score]] = {}
    for task, by_context in probes.items():
        scores[task] = {}
        for context, probe in by_context.items():
            model_answers = answers(model, probe)
            depths = {} if probe.depth is None else {"by_depth": model_answers.by_depth(probe.depth)}
            scores[task][context] = model_answers.score() | depths
            tick(probe.input_ids.numel())
    return scores


@torch.no_grad()
def answers(
    model: PreTrainedModel, probe: Probe, hidden: Callable[[PreTrainedModel, Tensor], Tensor] = final_hidden
) -> Answers:
    """Scores of `model` on every row of `probe`, in evaluation mode.

    `hidden`: how its last hidden states (N, T, M) are computed from token ids (N, T), `TOKENS_AT_ONCE` at a time.
    """
    rows, length = probe.input_ids.shape
    batch = max(1, TOKENS_AT_ONCE // length)
    hits, logprobs = [], []
    with evaluating(model):
        for start in range(0, rows, batch):
            ids_NT = probe.input_ids[start : start + batch].to(model.device)
            answers_NT = probe.answer_mask[start : start + batch].to(model.device)
            asked_AM = hidden(model, ids_NT)[:, :-1][answers_NT[:, 1:]]
            targets_A = ids_NT[answers_NT]
            for some_AM, targets in zip(
                asked_AM.split(POSITIONS_AT_ONCE), targets_A.split(POSITIONS_AT_ONCE), strict=True
            ):
                logp_AV = head_logits(model, some_AM[None])[0].float().log_softmax(-1)
                logprob_A = logp_AV.gather(-1, targets[:, None])[:, 0]
                hits.append((logp_AV.argmax(-1) == targets) & ~logprob_A.isnan())
                logprobs.append(logprob_A)
    tokens_N = probe.answer_mask.sum(dim=1)
    hits_by_row, logprobs_by_row = (torch.cat(x).cpu().double().split(tokens_N.tolist()) for x in (hits, logprobs))
    return Answers(
        hits_N=torch.stack([row.sum() if probe.per_token else row.min() for row in hits_by_row]),
        counted_N=(tokens_N if probe.per_token else torch.ones(rows)).double(),
        logprob_N=torch.stack([row.sum() for row in logprobs_by_row]),
        tokens_N=tokens_N.double(),
    )


def usable(
    teacher: PreTrainedModel,
    probe: Probe,
    by: Literal["accuracy", "logprob"] = "accuracy",
    floor: float | None = None,
    answered: Answers | None = None,
) -> Verdict:
    """Whether `teacher` answers `probe` well enough for a student's loss to show, by the measure that will be used.

    "accuracy": it gives at least `floor` (0.5) of the answers. "logprob": its log-probability of an answer token is at
    least `floor` (1.0) nats above that of the same answer after the facts of another row, so that a mere liking for
    numbers does not count; a guess among the numbers it has read still does. `answered`: its answers, where they are
    known already. Raises `UserError` for "logprob" and a probe of one row.
    """
    floor = FLOORS[by] if floor is None else floor
    value = (answered or answers(teacher, probe)).score()[by]
    if by == "accuracy":
        finding = f"the teacher gives {value:.1%} of the answers, and should give {floor:.1%}"
    else:
        value -= answers(teacher, probe.exchanged()).score()["logprob"]
        finding = f"its facts make an answer {value:.2f} nats/token likelier to the teacher, and should by {floor:.2f}"
    passed = value >= floor  # not where it is NaN
    return Verdict(passed, f"{'usable' if passed else 'unusable'}: {finding} or more")
