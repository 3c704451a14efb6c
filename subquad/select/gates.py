"""Scores from gates: every head of the all-linear student mixes its mixer's output with the teacher's attention.

With a gate g of 0 a head is linear, with 1 it attends, and between them the student is a super-network of all plans:
y = mixer + g (attention - mixer). One backward pass gives the derivative of the KL to the teacher by all gates at once,
where restoring or removing one unit after the other takes a pass for each.

- `gradient`: -dKL/dg, averaged over the way from all-linear (g = 0) to the teacher (g = 1): integrated gradients (arXiv
  1703.01365), whose sum over all heads is the KL of the all-linear student. With one point it is the first-order
  estimate of what restoring gains.
- `fisher`: the second-order estimate of what removing costs, g = 1 -> 0 at the teacher, where the KL and its gradient
  are zero: half the diagonal of the Fisher information, E[(d log p(y) / dg)^2] / 2 with y drawn from the teacher.
- `gates`: trained. Gates are drawn (hard concrete, arXiv 1712.01312), the KL is minimised over their parameters under
  the constraint that their mean is the share of attention that is wanted (Lagrangian, as in arXiv 2204.00408), and a
  unit is worth the log-odds of its gate.

Where alignment trained the projections too, the attention in question is that of the student's projections.

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
from subquad.recipes.stage import Length
from subquad.select.inputs import SelectorInputs
from subquad.select.kl import kl
from subquad.select.ranking import Ranking
from subquad.select.registry import Selector, selector
from subquad.select.supernet import Supernet
from subquad.select.units import Unit, by_layer
from subquad.select.work import SelectionCost, Work
from subquad.utils.token_cost import TokenCost

CHUNK = 256  # positions whose logits are held at a time
STRETCH, SHARPNESS = 0.1, 2 / 3  # of the hard concrete distribution
GATE_RATE, PRESSURE_RATE = 0.1, 1.0


@selector("gradient", aligned=True)
class Gradient(Selector):
    """The KL's derivative by how much attention a unit has, from all-linear to the teacher."""

    points: Length = 4
    """Points between all-linear and the teacher at which the derivative is taken."""

    def cost(self, inputs: SelectorInputs) -> SelectionCost:
        tokens = TokenCost(training_tokens=self.points * inputs.text_BT.numel())
        return SelectionCost(f"gradient at {self.points} points", tokens)

    def choose(self, inputs: SelectorInputs) -> Ranking:
        scores_NU = gradient_scores(inputs.new_board(), inputs.units, inputs.text_BT, inputs.work, self.points)
        return Ranking.by_rows(inputs.units, scores_NU, inputs.unit, {})


@selector("fisher", aligned=True)
class Fisher(Selector):
    """The second-order estimate of the KL that removing a unit's attention costs."""

    draws: Length = 4
    """Draws of a next token at every position."""

    def cost(self, inputs: SelectorInputs) -> SelectionCost:
        return SelectionCost(f"fisher, {self.draws} draws", fisher_cost(inputs.text_BT.numel(), self.draws))

    def choose(self, inputs: SelectorInputs) -> Ranking:
        scores_NU = fisher_scores(inputs.new_board(), inputs.units, inputs.text_BT, inputs.work, self.draws)
        return Ranking.by_rows(inputs.units, scores_NU, inputs.unit, {})


@selector("gates", aligned=True)
class Gates(Selector):
    """The log-odds of gates trained jointly, with the budget's share of attention as their mean."""

    tokens: Length = 50_000
    """Tokens of training."""
    sequence_length: Length = 512
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
            inputs.new_board(),
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


def gradient_scores(board: Supernet, units: Sequence[Unit], text_NT: Tensor, work: Work, points: int) -> Tensor:
    """What the units' attention gains, in nats per token, on every row of text: (N, U).

    `points`: of the way from all-linear to the teacher, in the middles of as many stretches; 1: at all-linear alone.
    """
    shares = [0.0] if points == 1 else [(point + 0.5) / points for point in range(points)]

    def piece(row: int) -> list[float]:
        ids_1T = text_NT[row : row + 1].to(board.student.device)
        total_LH = [torch.zeros(shape.heads, dtype=torch.float64) for shape in board.linear.shapes]
        for share in shares:
            gates = _gates(board, share)
            for total_H, slope_H in zip(total_LH, _slopes(_kl(board, ids_1T, gates), gates), strict=True):
                total_H -= slope_H / len(shares)
        return [sum(float(total_LH[layer][head]) for layer, head in unit) for unit in units]

    each = TokenCost(training_tokens=points * text_NT.shape[1])
    return work.pieces(f"gradient at {points}", len(text_NT), piece, each=each)


def fisher_scores(board: Supernet, units: Sequence[Unit], text_NT: Tensor, work: Work, draws: int) -> Tensor:
    """What removing the units' attention costs, in nats per token, on every row of text: (N, U).

    `draws`: of a next token at every position.
    """

    def piece(row: int) -> list[float]:
        ids_1T = text_NT[row : row + 1].to(board.student.device)
        gates = _gates(board, 1.0)
        hidden_1TM = board.student.final_hidden(ids_1T, forward_context=gated(gates))
        generator = torch.Generator(ids_1T.device).manual_seed(row)
        worth = [0.0] * len(units)
        for _ in range(draws):
            drawn_1TM = _score_function(OutputHead.of(board.student), hidden_1TM.detach(), generator)
            slopes_LH = _slopes((hidden_1TM * drawn_1TM).sum(), gates)
            for index, unit in enumerate(units):
                slope = sum(float(slopes_LH[layer][head]) for layer, head in unit)
                worth[index] += slope**2 / (2 * draws * ids_1T.shape[1])
        return worth

    return work.pieces(f"fisher, {draws} draws", len(text_NT), piece, each=fisher_cost(text_NT.shape[1], draws))


def fisher_cost(tokens: int, draws: int) -> TokenCost:
    """Forwards once, through attention and mixers, and backwards for every draw."""
    return TokenCost(forward_tokens=(2 + 2 * draws) * tokens)


def trained_gates(
    board: Supernet,
    units: Sequence[Unit],
    batch: Callable[[int], Tensor],
    work: Work,
    *,
    steps: int,
    share: float,
    seed: int,
) -> Tensor:
    """The log-odds of the units' gates after training them, (1, U). `batch(step)`: token ids to train on, (B, T)."""

    def piece(_: int) -> Tensor:
        device = board.student.device
        generator = torch.Generator().manual_seed(seed)
        odds_U = torch.zeros(len(units), requires_grad=True)
        pressure = torch.zeros(2, requires_grad=True)  # on the mean gate: of its distance from `share`, and the square
        sizes_U = torch.tensor([len(unit) for unit in units], dtype=torch.float32)
        optimizer = torch.optim.Adam([odds_U], lr=GATE_RATE)
        for step in range(steps):
            gates = _by_head(board, units, _drawn(odds_U, generator).to(device))
            loss = _kl(board, work.my_rows(batch(step)).to(device), gates).cpu()
            excess = (_open(odds_U) * sizes_U).sum() / sizes_U.sum() - share
            total = loss + pressure[0] * excess + pressure[1] * excess**2
            odds_U.grad, push = torch.autograd.grad(total, [odds_U, pressure])
            odds_U.grad = work.mean(odds_U.grad)
            optimizer.step()
            with torch.no_grad():  # ascent: the pressure grows while the constraint is missed
                pressure += PRESSURE_RATE / math.sqrt(steps) * push
        return odds_U.detach()

    tokens = steps * batch(0).numel()
    return work.pieces(f"gates, {tokens} tokens", 1, piece, each=TokenCost(training_tokens=tokens), together=True)


def _gates(board: Supernet, share: float) -> dict[int, Tensor]:
    """A gate for every head, all at `share`."""
    shapes = board.linear.shapes
    return {
        layer: torch.full((shape.heads,), share, device=board.student.device, requires_grad=True)
        for layer, shape in enumerate(shapes)
    }


def _by_head(board: Supernet, units: Sequence[Unit], gate_U: Tensor) -> dict[int, Tensor]:
    """The units' gates, head by head."""
    shapes = board.linear.shapes
    place = {head: index for index, unit in enumerate(units) for head in unit}
    return {layer: gate_U[[place[layer, head] for head in range(shape.heads)]] for layer, shape in enumerate(shapes)}


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
    """The derivative of a number by the gates of every layer, in float64 on the CPU; it can be asked again."""
    return [slope_H.double().cpu() for slope_H in torch.autograd.grad(value, [*gates.values()], retain_graph=True)]


def _kl(board: Supernet, ids_BT: Tensor, gates: dict[int, Tensor]) -> Tensor:
    """Nats per token of the student with these gates; it can be differentiated by them."""
    with torch.no_grad():
        theirs_BTM = final_hidden(board.teacher, ids_BT)
    mine_BTM = board.student.final_hidden(ids_BT, forward_context=gated(gates))
    return kl(board.student, mine_BTM, board.teacher, theirs_BTM)


def _score_function(head: OutputHead, hidden_1TM: Tensor, generator: torch.Generator) -> Tensor:
    """The derivative of log p(y) by the last hidden states, y drawn at every position: (1, T, M)."""
    slopes = []
    for hidden_1CM in hidden_1TM.split(CHUNK, 1):
        with torch.enable_grad():
            hidden = hidden_1CM.detach().requires_grad_()
            logp_CV = head(hidden)[0].float().log_softmax(-1)
            drawn_C1 = torch.multinomial(logp_CV.detach().exp(), 1, generator=generator)
            (slope,) = torch.autograd.grad(logp_CV.gather(-1, drawn_C1).sum(), hidden)
        slopes.append(slope)
    return torch.cat(slopes, 1)


def _drawn(odds_U: Tensor, generator: torch.Generator) -> Tensor:
    """Gates drawn from the hard concrete distribution, of which some are 0 and some are 1."""
    noise_U = torch.rand(odds_U.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    soft_U = ((noise_U.logit() + odds_U) / SHARPNESS).sigmoid()
    return (soft_U * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)


def _open(odds_U: Tensor) -> Tensor:
    """The probability that a gate is not 0."""
    return (odds_U - SHARPNESS * math.log(STRETCH / (1 + STRETCH))).sigmoid()
