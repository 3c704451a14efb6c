"""Scores from gates: every head of the all-linear student adds a gated share of the teacher's attention.

With gate g, a head computes y = mixer + g (attention - mixer): it is linear at g = 0 and attends at g = 1. One backward
pass gives the derivative of the KL to the teacher with respect to all gates at once, where restoring or removing units
one by one takes a pass for each.

- `gradient`: -dKL/dg, averaged between all-linear (g = 0) and the teacher (g = 1): integrated gradients (arXiv
  1703.01365), whose sum over all heads is the KL of the all-linear student. With one point it is the first-order
  estimate of the gain of restoring a unit.
- `fisher`: the second-order estimate of the cost of removing a unit, g = 1 -> 0, at the teacher, where the KL and its
  gradient are zero: half the diagonal of the Fisher information, E[(d log p(y) / dg)^2] / 2 with y drawn from the
  teacher.
- `gates`: trained gates. They are drawn from hard concrete distributions (arXiv 1712.01312), whose parameters minimise
  the KL under the constraint that the mean gate is the budget's share of attention (Lagrangian, as in arXiv
  2204.00408). A unit's worth is the log-odds of its gate.

If alignment also trained the projections, attention here uses the student's projections.

Legend: H heads of a layer, L layers, N rows of text, T tokens, C of a chunk, M model width, V vocabulary, U units.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from subquad.data.text import Corpus
from subquad.errors import UserError
from subquad.model.layer_call import ForwardContext, LayerCall
from subquad.model.output_head import OutputHead, final_hidden
from subquad.recipes.stage import Length, RowLength
from subquad.select.inputs import SelectorInputs
from subquad.select.kl import kl
from subquad.select.ranking import Ranking
from subquad.select.registry import Selector, selector
from subquad.select.supernet import Supernet
from subquad.select.units import Unit, by_layer
from subquad.select.work import SelectionCost, SelectionWork
from subquad.utils.token_cost import TokenCost

CHUNK = 256  # positions whose logits are in memory at a time
STRETCH, SHARPNESS = 0.1, 2 / 3  # of the hard concrete distribution
GATE_RATE, PRESSURE_RATE = 0.1, 1.0  # learning rates of the gates and of the Lagrange multipliers


@selector("gradient", aligned=True)
class Gradient(Selector):
    """The derivative of the KL with respect to a unit's share of attention, between all-linear and the teacher."""

    points: Length = 4
    """Points between all-linear and the teacher at which the derivative is taken."""

    def cost(self, inputs: SelectorInputs) -> SelectionCost:
        tokens = TokenCost(training_tokens=self.points * inputs.text_BT.numel())
        return SelectionCost(f"gradient at {self.points} points", tokens)

    def choose(self, inputs: SelectorInputs) -> Ranking:
        scores_NU = gradient_scores(inputs.supernet(), inputs.units, inputs.text_BT, inputs.work, self.points)
        return Ranking.by_rows(inputs.units, scores_NU, inputs.unit, {})


@selector("fisher", aligned=True)
class Fisher(Selector):
    """The second-order estimate of the KL that removing a unit's attention costs."""

    draws: Length = 4
    """Draws of a next token at every position."""

    def cost(self, inputs: SelectorInputs) -> SelectionCost:
        return SelectionCost(f"fisher, {self.draws} draws", fisher_cost(inputs.text_BT.numel(), self.draws))

    def choose(self, inputs: SelectorInputs) -> Ranking:
        scores_NU = fisher_scores(inputs.supernet(), inputs.units, inputs.text_BT, inputs.work, self.draws)
        return Ranking.by_rows(inputs.units, scores_NU, inputs.unit, {})


@selector("gates", aligned=True)
class Gates(Selector):
    """The log-odds of gates trained jointly, with the budget's share of attention as their mean."""

    tokens: Length = 50_000
    """Tokens of training."""
    sequence_length: RowLength = 512
    batch: Length = 1

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / (self.batch * self.sequence_length)))

    @property
    def trained_tokens(self) -> int:
        """Tokens of whole steps."""
        return self.steps * self.batch * self.sequence_length

    def cost(self, inputs: SelectorInputs) -> SelectionCost:
        self._corpus(inputs)
        return SelectionCost("gates", TokenCost(training_tokens=self.trained_tokens))

    def choose(self, inputs: SelectorInputs) -> Ranking:
        corpus, units = self._corpus(inputs), inputs.units

        def rows(step: int) -> Tensor:
            return corpus.batch(step, batch=self.batch, sequence_length=self.sequence_length, seed=inputs.seed)

        odds_1U = trained_gates(
            inputs.supernet(),
            units,
            rows,
            inputs.work,
            steps=self.steps,
            share=inputs.count / len(units),
            seed=inputs.seed,
        )
        odds = odds_1U[0].tolist()
        report = {"scores": by_layer(odds, units), "gate_tokens": self.trained_tokens}
        return Ranking.in_order(units, odds, inputs.unit, report)

    def _corpus(self, inputs: SelectorInputs) -> Corpus:
        if inputs.corpus is None:
            raise UserError("the selector 'gates' trains its gates and was given no text to train on")
        return inputs.corpus


def gradient_scores(
    supernet: Supernet, units: Sequence[Unit], text_NT: Tensor, work: SelectionWork, points: int
) -> Tensor:
    """The gain of the units' attention, in nats per token, on every row of text: (N, U).

    `points`: midpoints of equal intervals between all-linear and the teacher; 1: all-linear alone.
    """
    shares = [0.0] if points == 1 else [(point + 0.5) / points for point in range(points)]

    def measure(row: int) -> list[float]:
        ids_1T = text_NT[row : row + 1].to(supernet.student.device)
        total_LH = [torch.zeros(shape.heads, dtype=torch.float64) for shape in supernet.linear_plan.shapes]
        for share in shares:
            gates = _gates(supernet, share)
            for total_H, slope_H in zip(total_LH, _slopes(_kl(supernet, ids_1T, gates), gates), strict=True):
                total_H -= slope_H / len(shares)
        return [sum(float(total_LH[layer][head]) for layer, head in unit) for unit in units]

    item_cost = TokenCost(training_tokens=points * text_NT.shape[1])
    return work.map(f"gradient at {points}", len(text_NT), measure, item_cost=item_cost)


def fisher_scores(
    supernet: Supernet, units: Sequence[Unit], text_NT: Tensor, work: SelectionWork, draws: int
) -> Tensor:
    """The cost of removing the units' attention, in nats per token, on every row of text: (N, U).

    `draws`: sampled next tokens at every position.
    """

    def measure(row: int) -> list[float]:
        ids_1T = text_NT[row : row + 1].to(supernet.student.device)
        gates = _gates(supernet, 1.0)
        hidden_1TM = supernet.student.final_hidden(ids_1T, forward_context=gated(gates))
        generator = torch.Generator(ids_1T.device).manual_seed(row)
        worth = [0.0] * len(units)
        for _ in range(draws):
            score_1TM = _score_function(OutputHead.of(supernet.student), hidden_1TM.detach(), generator)
            slopes_LH = _slopes((hidden_1TM * score_1TM).sum(), gates)
            for index, unit in enumerate(units):
                slope = sum(float(slopes_LH[layer][head]) for layer, head in unit)
                worth[index] += slope**2 / (2 * draws * ids_1T.shape[1])
        return worth

    item_cost = fisher_cost(text_NT.shape[1], draws)
    return work.map(f"fisher, {draws} draws", len(text_NT), measure, item_cost=item_cost)


def fisher_cost(tokens: int, draws: int) -> TokenCost:
    """One forward pass through attention and mixers, and a backward pass for every draw."""
    return TokenCost(forward_tokens=(2 + 2 * draws) * tokens)


def trained_gates(
    supernet: Supernet,
    units: Sequence[Unit],
    batch: Callable[[int], Tensor],
    work: SelectionWork,
    *,
    steps: int,
    share: float,
    seed: int,
) -> Tensor:
    """The log-odds of the units' gates after training them, (1, U). `batch(step)`: token ids to train on, (B, T)."""

    def measure(_: int) -> Tensor:
        device = supernet.student.device
        generator = torch.Generator().manual_seed(seed)
        odds_U = torch.zeros(len(units), requires_grad=True)
        pressure = torch.zeros(2, requires_grad=True)  # multipliers of the excess of the mean gate, and of its square
        sizes_U = torch.tensor([len(unit) for unit in units], dtype=torch.float32)
        optimizer = torch.optim.Adam([odds_U], lr=GATE_RATE)
        for step in range(steps):
            gates = _by_head(supernet, units, _sample(odds_U, generator).to(device))
            loss = _kl(supernet, work.local_rows(batch(step)).to(device), gates).cpu()
            excess = (_probability_open(odds_U) * sizes_U).sum() / sizes_U.sum() - share
            total = loss + pressure[0] * excess + pressure[1] * excess**2
            odds_U.grad, push = torch.autograd.grad(total, [odds_U, pressure])
            odds_U.grad = work.mean(odds_U.grad)
            optimizer.step()
            with torch.no_grad():  # ascent: the pressure grows until the constraint is met
                pressure += PRESSURE_RATE / math.sqrt(steps) * push
        return odds_U.detach()

    tokens = steps * batch(0).numel()
    item_cost = TokenCost(training_tokens=tokens)
    return work.map(f"gates, {tokens} tokens", 1, measure, item_cost=item_cost, all_processes=True)


def _gates(supernet: Supernet, share: float) -> dict[int, Tensor]:
    """One gate per head, all at `share`."""
    shapes = supernet.linear_plan.shapes
    return {
        layer: torch.full((shape.heads,), share, device=supernet.student.device, requires_grad=True)
        for layer, shape in enumerate(shapes)
    }


def _by_head(supernet: Supernet, units: Sequence[Unit], gate_U: Tensor) -> dict[int, Tensor]:
    """The units' gates as gates per head; layers that keep attention anyway have none."""
    shapes = supernet.linear_plan.shapes
    unit_of = {head: index for index, unit in enumerate(units) for head in unit}
    return {
        layer: gate_U[[unit_of[layer, head] for head in range(shapes[layer].heads)]]
        for layer in sorted({layer for layer, _ in unit_of})
    }


def gated(gates: Mapping[int, Tensor]) -> ForwardContext:
    """A pass whose heads are attention by a share of `gates`, (H,) by layer, and the plan's mixers by the rest."""

    def around(call: LayerCall) -> Tensor:
        y_BHTD = call.mixed()
        if call.layer not in gates:
            return y_BHTD
        gate_H11 = gates[call.layer].to(y_BHTD.dtype)[:, None, None]
        return y_BHTD + gate_H11 * (call.attention() - y_BHTD)

    return ForwardContext(around=around)


def _slopes(value: Tensor, gates: dict[int, Tensor]) -> list[Tensor]:
    """The derivative of a scalar with respect to each layer's gates, in float64 on the CPU; keeps the graph."""
    return [slope_H.double().cpu() for slope_H in torch.autograd.grad(value, [*gates.values()], retain_graph=True)]


def _kl(supernet: Supernet, ids_BT: Tensor, gates: dict[int, Tensor]) -> Tensor:
    """KL in nats per token, (), of the student with these gates; differentiable with respect to them."""
    with torch.no_grad():
        teacher_BTM = final_hidden(supernet.teacher, ids_BT)
    student_BTM = supernet.student.final_hidden(ids_BT, forward_context=gated(gates))
    return kl(supernet.student, student_BTM, supernet.teacher, teacher_BTM)


def _score_function(head: OutputHead, hidden_1TM: Tensor, generator: torch.Generator) -> Tensor:
    """The derivative of log p(y) with respect to the last hidden states, y sampled at every position: (1, T, M)."""
    slopes = []
    for chunk_1CM in hidden_1TM.split(CHUNK, 1):
        with torch.enable_grad():
            hidden_1CM = chunk_1CM.detach().requires_grad_()
            logp_CV = head(hidden_1CM)[0].float().log_softmax(-1)
            tokens_C1 = torch.multinomial(logp_CV.detach().exp(), 1, generator=generator)
            (slope_1CM,) = torch.autograd.grad(logp_CV.gather(-1, tokens_C1).sum(), hidden_1CM)
        slopes.append(slope_1CM)
    return torch.cat(slopes, 1)


def _sample(odds_U: Tensor, generator: torch.Generator) -> Tensor:
    """Gates sampled from hard concrete distributions; some are exactly 0, some exactly 1."""
    noise_U = torch.rand(odds_U.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    soft_U = ((noise_U.logit() + odds_U) / SHARPNESS).sigmoid()
    return (soft_U * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)


def _probability_open(odds_U: Tensor) -> Tensor:
    """The probability that a gate is not 0."""
    return (odds_U - SHARPNESS * math.log(STRETCH / (1 + STRETCH))).sigmoid()
