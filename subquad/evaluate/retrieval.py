"""Score retrieval probes: does the model give the answer, and how likely did it find it?

Accuracy alone says little of a small model (0 % and 0 % look equal, whatever was lost), so the log-probability of the
answer stands beside it. Decoders run over whole rows; heads only see the positions that predict answer tokens.

Shapes: N rows, T tokens, A answer tokens of all rows together, M model width, V vocabulary.
"""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from subquad.data.retrieval import Probe
from subquad.distill.heads import final_hidden, head_logits
from subquad.evaluate.likelihood import evaluating

TOKENS_AT_ONCE = 4096  # short rows go through the decoder together
POSITIONS_AT_ONCE = 256  # of logits

Score = dict[str, float]


def retrieval(model: PreTrainedModel, probes: Mapping[str, Mapping[int, Probe]]) -> dict[str, dict[int, Score]]:
    """Score `model` on {task: {context: Probe}}; returns {task: {context: {"accuracy", "logprob"}}}.

    `accuracy`: the share of rows whose answer tokens are all the model's likeliest (of tokens if `probe.per_token`).
    `logprob`: mean natural log-probability per answer token, given the true tokens before it.
    """
    with evaluating(model):
        return {
            task: {c: _score(model, probe) for c, probe in by_context.items()} for task, by_context in probes.items()
        }


@torch.no_grad()
def _score(model: PreTrainedModel, probe: Probe) -> Score:
    rows, length = probe.input_ids.shape
    batch = max(1, TOKENS_AT_ONCE // length)
    hits, logprobs = [], []
    for start in range(0, rows, batch):
        ids_NT = probe.input_ids[start : start + batch].to(model.device)
        answers_NT = probe.answer_mask[start : start + batch].to(model.device)
        hidden_AM = final_hidden(model, ids_NT)[:, :-1][answers_NT[:, 1:]]
        targets_A = ids_NT[answers_NT]
        hit, logprob = [], []
        for hidden, targets in zip(hidden_AM.split(POSITIONS_AT_ONCE), targets_A.split(POSITIONS_AT_ONCE), strict=True):
            logp_AV = head_logits(model, hidden[None])[0].float().log_softmax(-1)
            hit.append(logp_AV.argmax(-1) == targets)
            logprob.append(logp_AV.gather(-1, targets[:, None])[:, 0])
        answers = answers_NT.sum(dim=1).tolist()
        hits += [row.double().cpu() for row in torch.cat(hit).split(answers)]
        logprobs.append(torch.cat(logprob).double().cpu())
    accuracy = torch.cat(hits).mean() if probe.per_token else torch.stack([row.min() for row in hits]).mean()
    return {"accuracy": accuracy.item(), "logprob": torch.cat(logprobs).mean().item()}
