"""The training loop: one stage, from its first step or from a checkpoint, on one process or many.

Notable:
- A step depends on nothing but its number and the state it starts from: the batch is a function of (seed, step), the
  learning rate of the step. So a run that was killed and resumed ends with the same bits as one that was not.
- Ctrl-C ends at a checkpoint of the step that it interrupts: nothing that was trained is lost.
- The batch of a step is the whole run's. Each process takes its slice, gradients are averaged in one place
  (`average_gradients`) after the last backward pass, and the logged loss is the mean: two processes do what one does.
- The models stay where their maker put them, and in evaluation mode: nothing here is random.
- `accelerate` says which process this is, averages, autocasts, and feeds the trackers; checkpoints are our own, for
  they hold only what is trained, as safetensors.
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

from subquad.data.batch import Batch, TokenSource
from subquad.distill.checkpoint import Checkpoints
from subquad.distill.free_running import FreeRunning
from subquad.distill.log import RunLog
from subquad.distill.lora import adapters
from subquad.distill.parameters import (
    Parameters,
    checkpointed_blocks,
    choose_parameters,
    make_optimizer,
    trained_in_float32,
)
from subquad.distill.passes import LogitsStore, TrainingPass
from subquad.distill.schedule import learning_rate_factor, warmup_steps
from subquad.distill.state import Ledger, StageResult, identity, mean
from subquad.distill.teacher_forced import TeacherForced
from subquad.distill.throughput import bare_forward_speed
from subquad.errors import UserError
from subquad.model.base import BaseStudent
from subquad.recipes.stage import Stage
from subquad.utils.interrupt import interrupt_waits
from subquad.utils.memory import peak_memory_bytes, reset_peak_memory
from subquad.utils.progress import StageProgress

RECENT = 20  # the final loss is the mean over a tenth of the steps, but no more than these
BARE_TOKENS = 1024  # tokens of one timed pass of the bare teacher on a CPU: seconds, not minutes


@dataclass(frozen=True)
class StageInputs:
    """What a stage trains with besides its student.

    `index` is the stage's number in the run. `logits_from` is the opened `teacher` or `teacher_cache` of the stage, or
    None if its logits come from `teacher`.
    """

    teacher: PreTrainedModel
    data: TokenSource
    accelerator: Accelerator
    index: int = 0
    seed: int = 0
    logits_from: PreTrainedModel | LogitsStore | None = None


def run_stage(
    stage: Stage,
    inputs: StageInputs,
    *,
    student: BaseStudent,
    out: Path,
    progress: Console | None = None,
    resume: bool = False,
) -> StageResult:
    """Trains `student` in place, as one stage of the run in folder `out`.

    Writes `out`/log.jsonl and
    `out`/checkpoints/, and shows progress on the console `progress`, if there is one. With `resume`, a finished stage
    is loaded and not run again, and an interrupted one goes on from its last checkpoint; without, what an earlier run
    left of this and later stages is removed.
    Raises UserError for a batch that does not divide by the processes, a loss that is not finite (naming stage, layer
    and step), a full disk, or a checkpoint that was made with other settings; KeyboardInterrupt, with a checkpoint
    behind it, after Ctrl-C.
    """
    accelerator, index = inputs.accelerator, inputs.index
    micro_rows(stage, accelerator.num_processes)
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(f"training in {accelerator.mixed_precision} is not supported: use bf16 or no mixed precision.")
    known = identity(stage, index, inputs.seed, student.plan, inputs.teacher, inputs.data, accelerator.mixed_precision)
    checkpoints = Checkpoints(out / "checkpoints", index, known)
    with interrupt_waits() as interrupted, prepared(stage, inputs, student) as run:
        parameters, optimizer = run.parameters, run.optimizer
        if resume and (state := checkpoints.load_finished(parameters)):
            return StageResult(**state["result"])
        if resume and (state := checkpoints.load(parameters, optimizer)):
            run.ledger = Ledger(**state["ledger"])
        elif accelerator.is_main_process:
            checkpoints.start_over()
        accelerator.wait_for_everyone()

        ledger = run.ledger
        speeds = []
        reset_peak_memory(run.training_pass.device)
        log = RunLog(out / "log.jsonl", stage=index, step=ledger.step) if accelerator.is_main_process else None
        with StageProgress(progress if log else None, stage.name, steps=stage.steps, step=ledger.step) as bar:
            started_at = ledger.step
            while not run.done:
                batch = run.step(inputs.data)
                if ledger.step == started_at + 1 or run.done:  # warm; and twice, for other work on the machine varies
                    speeds.append(run.bare_speed(inputs.teacher, batch))
                speed = run.tokens(ledger.step) / ledger.seconds
                bar.update(ledger.step, f"loss {run.total(ledger.recent[-1]):.4f}  {speed:,.0f} tokens/s")
                if ledger.step % stage.log_every == 0 or run.done:
                    run.write_log(log)
                stop = any_process(interrupted(), accelerator)
                if (stop or ledger.step % stage.checkpoint_every == 0) and not run.done:
                    if accelerator.is_main_process:
                        checkpoints.save(parameters, optimizer, {"step": ledger.step, "ledger": asdict(ledger)})
                    accelerator.wait_for_everyone()
                    if stop:
                        raise KeyboardInterrupt
        result = run.result(sum(speeds) / len(speeds))
        if accelerator.is_main_process:
            checkpoints.finish(parameters, {"step": ledger.step, "result": result.as_dict()})
        accelerator.wait_for_everyone()
        return result


@dataclass
class StageRun:
    """A stage under way."""

    stage: Stage
    index: int
    seed: int
    training_pass: TrainingPass
    parameters: Parameters
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    lowered: torch.dtype | None
    ledger: Ledger
    grad_norm: float = 0.0

    @property
    def done(self) -> bool:
        return self.ledger.step >= self.stage.steps or self.ledger.settled

    def my_slice(self, corpus: TokenSource) -> Batch:
        """This process's part of the batch of the next step, on the device where the model reads it."""
        stage, here = self.stage, self.accelerator
        seed = self.seed + 1_000_003 * self.index  # each stage sees the text in an order of its own
        whole = corpus.batch(self.ledger.step, batch=stage.batch, sequence_length=stage.sequence_length, seed=seed)
        return whole.chunk(here.num_processes)[here.process_index].to(self.training_pass.device)

    def step(self, corpus: TokenSource) -> Batch:
        """One optimiser step; returns what this process trained on.

        Raises UserError, before it changes a weight, if a loss or a gradient is not finite.
        """
        start = time.perf_counter()
        batch = self.my_slice(corpus)
        factor = self.factor(self.ledger.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        parts: Tensor | float = 0.0
        for micro in batch.chunk(self.stage.accumulate):
            with self.autocast():
                losses = self.training_pass(micro, 1 / self.stage.accumulate)
            named = [losses[name].to(self.accelerator.device) for name in self.training_pass.weights]
            parts = parts + torch.stack(named) / self.stage.accumulate
        average_gradients(self.parameters.values(), self.accelerator)
        loss = self.accelerator.reduce(parts, reduction="mean").tolist()
        self.check_finite(dict(zip(self.training_pass.weights, loss, strict=True)), "loss")
        limit = math.inf if self.stage.clip is None else self.stage.clip
        self.grad_norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        if not math.isfinite(self.grad_norm):
            norms = {name: float(p.grad.norm()) for name, p in self.parameters.items() if p.grad is not None}
            self.check_finite(norms, "gradient")
        self.optimizer.step()
        self.ledger.add(loss, time.perf_counter() - start, keep=min(RECENT, max(1, self.stage.steps // 10)))
        if plateau := self.stage.plateau:
            window = max(1, round(plateau.tokens / self.tokens(1)))
            self.ledger.watch(self.total(loss), window, plateau.improvement)
        return batch

    def check_finite(self, values: dict[str, float], what: str) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            others = f" (and of {len(bad) - 1} others)" if len(bad) > 1 else ""
            stage = self.stage
            raise UserError(
                f"stage '{stage.name}' stopped at step {self.ledger.step + 1} of {stage.steps}: the {what} of "
                f"{bad[0]}{others} is {values[bad[0]]}; lower 'lr' (now {stage.lr:g}) or 'clip' and start again; "
                "the last good checkpoint is kept."
            )

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision as accelerate was told to; for a model in half precision always, without loss scaling."""
        if self.accelerator.mixed_precision == "no" and self.lowered is not None:
            return torch.autocast(self.training_pass.device.type, torch.bfloat16)
        return self.accelerator.autocast()

    def factor(self, step: int) -> float:
        stage = self.stage
        warmup = warmup_steps(stage.warmup, self.stage.steps)
        return learning_rate_factor(
            step, steps=self.stage.steps, warmup=warmup, schedule=stage.schedule, min_ratio=stage.min_lr_ratio
        )

    def total(self, parts: list[float]) -> float:
        """The loss that is minimised, from its parts."""
        return sum(w * part for w, part in zip(self.training_pass.weights.values(), parts, strict=True))

    def tokens(self, steps: int) -> int:
        return steps * self.stage.batch * self.stage.sequence_length

    def bare_speed(self, teacher: PreTrainedModel, batch: Batch) -> float:
        """Tokens per second of the bare teacher, summed over processes, on a micro-batch (on a CPU a small one)."""
        rows = len(batch) // self.stage.accumulate
        if batch.device.type == "cpu":
            rows = min(rows, max(1, BARE_TOKENS // self.stage.sequence_length))
        with self.autocast():
            speed = bare_forward_speed(teacher, batch[:rows], sequence_length=self.stage.sequence_length)
        return float(self.accelerator.reduce(torch.tensor(speed, device=self.accelerator.device), reduction="sum"))

    def write_log(self, log: RunLog | None) -> None:
        """A line of log.jsonl and a point in the trackers: means over the steps since the last."""
        ledger, stage = self.ledger, self.stage
        parts = mean(ledger.unlogged)
        numbers = {
            "loss": self.total(parts),
            "lr": stage.lr * self.factor(ledger.step - 1),
            "grad_norm": self.grad_norm,
            "tokens_per_second": self.tokens(len(ledger.unlogged)) / (ledger.seconds - ledger.logged_seconds),
        }
        if log is not None:
            where = {"stage": self.index, "name": stage.name, "step": ledger.step, "tokens": self.tokens(ledger.step)}
            named = dict(zip(self.training_pass.weights, parts, strict=True))
            log.write(where | numbers | {"seconds": ledger.seconds, "parts": named})
        self.accelerator.log({f"{stage.name}/{key}": value for key, value in numbers.items()}, step=ledger.step)
        ledger.unlogged, ledger.logged_seconds = [], ledger.seconds

    def result(self, bare_speed: float) -> StageResult:
        stage, ledger = self.stage, self.ledger
        tokens = self.tokens(ledger.step)
        parts = mean(ledger.recent)
        return StageResult(
            name=stage.name,
            objective=" + ".join(stage.weights),
            steps=ledger.step,
            tokens=tokens,
            seconds=ledger.seconds,
            tokens_per_second=tokens / ledger.seconds,
            bare_forward_tokens_per_second=bare_speed,
            share_of_bare_forward=tokens / ledger.seconds / bare_speed,
            peak_memory_bytes=peak_memory_bytes(self.training_pass.device),
            ended_on_plateau=ledger.settled,
            first_loss=self.total(ledger.first),
            final_loss=self.total(parts),
            final_parts=dict(zip(self.training_pass.weights, parts, strict=True)),
        )


@contextmanager
def prepared(stage: Stage, inputs: StageInputs, student: BaseStudent) -> Iterator[StageRun]:
    """Within, the student is ready for the stage's first step: adapters, what is trained and in which precision."""
    student.eval()
    inputs.teacher.eval()
    with ExitStack() as within:
        within.enter_context(adapters(student, stage, inputs.seed))
        training_pass = make_pass(stage, student, inputs.teacher, inputs.logits_from, inputs.seed)
        parameters = choose_parameters(student, stage, training_pass.reachable)
        if training_pass.bridge is not None:
            parameters |= {f"bridge.{name}": weight for name, weight in training_pass.bridge.named_parameters()}
        lowered = within.enter_context(trained_in_float32(parameters))
        within.enter_context(checkpointed_blocks(student, stage.gradient_checkpointing))
        optimizer = make_optimizer(parameters, stage, student)
        yield StageRun(
            stage,
            inputs.index,
            inputs.seed,
            training_pass,
            parameters,
            optimizer,
            inputs.accelerator,
            lowered,
            Ledger(),
        )


def micro_rows(stage: Stage, processes: int) -> int:
    """Sequences in a micro-batch of one process. Raises UserError where the batch does not divide."""
    if stage.batch % (processes * stage.accumulate):
        raise UserError(
            f"stage '{stage.name}' cannot cut its batch of {stage.batch} sequences into equal parts for "
            f"{processes} processes times accumulate = {stage.accumulate}: change 'batch'."
        )
    return stage.batch // (processes * stage.accumulate)


def make_pass(
    stage: Stage,
    student: BaseStudent,
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


def any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Whether the flag is up in any process: all of them then do the same."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum") > 0)


def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace every gradient by its mean over the processes: the only place where they exchange gradients."""
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
