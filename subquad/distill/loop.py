"""Training loop: runs one stage, from its first step or from a checkpoint, on one or many processes.

Notable:
- A step depends only on its number and the state before it: the batch is a function of (seed, step), and the learning
  rate of the step. So a run that was killed and resumed ends with the same bits as an uninterrupted one.
- Ctrl-C finishes the current step and writes its checkpoint, so no training is lost.
- A step's batch spans all processes. Each takes its slice, gradients are averaged once (`average_gradients`)
  after the last backward pass, and the logged loss is the mean. So two processes compute the same as one.
- The models stay on their devices and in evaluation mode. Nothing here is random.
- `accelerate` provides process ranks, reductions, autocast and trackers. Checkpoints are Subquad's own: they hold the
  trained tensors only, as safetensors.
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
from subquad.distill.state import Ledger, StageResult, identity, mean_parts
from subquad.distill.teacher_forced import TeacherForced
from subquad.distill.throughput import bare_forward_speed
from subquad.errors import UserError
from subquad.model.base import BaseStudent
from subquad.recipes.stage import Stage
from subquad.utils.interrupt import interrupt_waits
from subquad.utils.memory import peak_memory_bytes, reset_peak_memory
from subquad.utils.progress import StageProgress

RECENT = 20  # the final loss is the mean over the last tenth of the steps, at most this many
BARE_TOKENS = 1024  # tokens of one timed pass of the bare teacher on a CPU, to take seconds and not minutes


@dataclass(frozen=True)
class StageInputs:
    """Inputs of a stage besides its student.

    `index` is the stage's number in the run. `logits_from` is the loaded model or cache that the stage names as its
    `teacher` or `teacher_cache`; None if the logits come from `teacher`.
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

    Writes `out`/log.jsonl and `out`/checkpoints/, and shows progress on the console `progress`, if given. With
    `resume`, a finished stage is loaded instead of run, and an interrupted one continues from its last checkpoint.
    Without, checkpoints of this and later stages from an earlier run are removed.
    Raises UserError for a batch that the processes cannot share equally, a loss that is not finite (naming stage, layer
    and step), a full disk, or a checkpoint made with other settings; KeyboardInterrupt after Ctrl-C, once a checkpoint
    is written.
    """
    # Check the settings
    accelerator, index = inputs.accelerator, inputs.index
    precision = accelerator.mixed_precision
    micro_rows(stage, accelerator.num_processes)
    if precision not in ("no", "bf16"):
        raise UserError(f"training in {precision} is not supported: use bf16 or no mixed precision.")
    run_identity = identity(stage, index, inputs.seed, student.plan, inputs.teacher, inputs.data, precision)
    checkpoints = Checkpoints(out / "checkpoints", index, run_identity)
    with interrupt_waits() as interrupted, prepared_run(stage, inputs, student) as run:
        # Load what an earlier run has finished, or start over
        parameters, optimizer = run.parameters, run.optimizer
        if resume and (state := checkpoints.load_finished(parameters)):
            return StageResult(**state["result"])
        if resume and (state := checkpoints.load(parameters, optimizer)):
            run.ledger = Ledger(**state["ledger"])
        elif accelerator.is_main_process:
            checkpoints.start_over()
        accelerator.wait_for_everyone()

        # Train, and write the log and the checkpoints
        ledger = run.ledger
        bare_speeds = []
        reset_peak_memory(run.training_pass.device)
        log = RunLog(out / "log.jsonl", stage=index, step=ledger.step) if accelerator.is_main_process else None
        with StageProgress(progress if log else None, stage.name, steps=stage.steps, step=ledger.step) as bar:
            first_step = ledger.step + 1
            while not run.is_done:
                batch = run.step(inputs.data)
                # Time the warm teacher, and again at the end, because the load of the machine varies
                if ledger.step == first_step or run.is_done:
                    bare_speeds.append(run.bare_speed(inputs.teacher, batch))
                speed = run.tokens(ledger.step) / ledger.seconds
                bar.update(ledger.step, f"loss {run.total(ledger.recent[-1]):.4f}  {speed:,.0f} tokens/s")
                if ledger.step % stage.log_every == 0 or run.is_done:
                    run.write_log(log)
                must_stop = any_process(interrupted(), accelerator)
                if (must_stop or ledger.step % stage.checkpoint_every == 0) and not run.is_done:
                    if accelerator.is_main_process:
                        checkpoints.save(parameters, optimizer, {"step": ledger.step, "ledger": asdict(ledger)})
                    accelerator.wait_for_everyone()
                    if must_stop:
                        raise KeyboardInterrupt

        # Write the trained tensors and the result
        result = run.result(sum(bare_speeds) / len(bare_speeds))
        if accelerator.is_main_process:
            checkpoints.finish(parameters, {"step": ledger.step, "result": result.as_dict()})
        accelerator.wait_for_everyone()
        return result


@dataclass
class StageRun:
    """A stage during training: its pass, parameters, optimiser and progress."""

    stage: Stage
    index: int
    seed: int
    training_pass: TrainingPass
    parameters: Parameters
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    half_dtype: torch.dtype | None  # of the parameters that are trained in float32
    ledger: Ledger
    grad_norm: float = 0.0

    @property
    def is_done(self) -> bool:
        return self.ledger.step >= self.stage.steps or self.ledger.settled

    def process_batch(self, corpus: TokenSource) -> Batch:
        """Returns this process's slice of the next step's batch, on the model's input device."""
        stage, accelerator = self.stage, self.accelerator
        seed = self.seed + 1_000_003 * self.index  # each stage reads the text in another order
        batch = corpus.batch(self.ledger.step, batch=stage.batch, sequence_length=stage.sequence_length, seed=seed)
        return batch.chunk(accelerator.num_processes)[accelerator.process_index].to(self.training_pass.device)

    def step(self, corpus: TokenSource) -> Batch:
        """Makes one optimiser step; returns the batch of this process.

        Raises UserError, before it changes a weight, if a loss or a gradient is not finite.
        """
        # Set the learning rates
        start = time.perf_counter()
        batch = self.process_batch(corpus)
        factor = self.lr_factor(self.ledger.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

        # Accumulate gradients and the parts of the loss over the micro-batches
        self.optimizer.zero_grad(set_to_none=True)
        parts: Tensor | float = 0.0
        for micro_batch in batch.chunk(self.stage.accumulate):
            with self.autocast():
                losses = self.training_pass(micro_batch, 1 / self.stage.accumulate)
            ordered_losses = [losses[name].to(self.accelerator.device) for name in self.training_pass.weights]
            parts = parts + torch.stack(ordered_losses) / self.stage.accumulate

        # Average them over the processes, and check that they are finite
        average_gradients(self.parameters.values(), self.accelerator)
        loss = self.accelerator.reduce(parts, reduction="mean").tolist()
        self.check_finite(dict(zip(self.training_pass.weights, loss, strict=True)), "loss")
        max_norm = math.inf if self.stage.clip is None else self.stage.clip
        self.grad_norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), max_norm))
        if not math.isfinite(self.grad_norm):
            norms = {name: float(p.grad.norm()) for name, p in self.parameters.items() if p.grad is not None}
            self.check_finite(norms, "gradient")

        # Update the weights, and record the step
        self.optimizer.step()
        self.ledger.add(loss, time.perf_counter() - start, recent_steps=min(RECENT, max(1, self.stage.steps // 10)))
        if plateau := self.stage.plateau:
            window = max(1, round(plateau.tokens / self.tokens(1)))
            self.ledger.check_plateau(self.total(loss), window, plateau.improvement)
        return batch

    def check_finite(self, values: dict[str, float], quantity: str) -> None:
        """Raises UserError if a value is not finite. `quantity`: "loss" or "gradient"."""
        names = [name for name, value in values.items() if not math.isfinite(value)]
        if names:
            note = f" (and of {len(names) - 1} others)" if len(names) > 1 else ""
            stage = self.stage
            raise UserError(
                f"stage '{stage.name}' stopped at step {self.ledger.step + 1} of {stage.steps}: the {quantity} of "
                f"{names[0]}{note} is {values[names[0]]}; lower 'lr' (now {stage.lr:g}) or 'clip' and start again; "
                "the last good checkpoint is kept."
            )

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision as set in accelerate, but always bfloat16 for a half-precision model; no loss scaling."""
        if self.accelerator.mixed_precision == "no" and self.half_dtype is not None:
            return torch.autocast(self.training_pass.device.type, torch.bfloat16)
        return self.accelerator.autocast()

    def lr_factor(self, step: int) -> float:
        stage = self.stage
        warmup = warmup_steps(stage.warmup, self.stage.steps)
        return learning_rate_factor(
            step, steps=self.stage.steps, warmup=warmup, schedule=stage.schedule, min_ratio=stage.min_lr_ratio
        )

    def total(self, parts: list[float]) -> float:
        """Weighted sum of the parts: the loss that is minimised."""
        return sum(w * part for w, part in zip(self.training_pass.weights.values(), parts, strict=True))

    def tokens(self, steps: int) -> int:
        return steps * self.stage.batch * self.stage.sequence_length

    def bare_speed(self, teacher: PreTrainedModel, batch: Batch) -> float:
        """Tokens per second of the bare teacher on a micro-batch (a small one on a CPU), summed over processes."""
        rows = len(batch) // self.stage.accumulate
        if batch.device.type == "cpu":
            rows = min(rows, max(1, BARE_TOKENS // self.stage.sequence_length))
        with self.autocast():
            speed = bare_forward_speed(teacher, batch[:rows], sequence_length=self.stage.sequence_length)
        return float(self.accelerator.reduce(torch.tensor(speed, device=self.accelerator.device), reduction="sum"))

    def write_log(self, log: RunLog | None) -> None:
        """Writes a line of log.jsonl and a point of the trackers: means over the steps since the last line."""
        ledger, stage = self.ledger, self.stage
        parts = mean_parts(ledger.unlogged)
        numbers = {
            "loss": self.total(parts),
            "lr": stage.lr * self.lr_factor(ledger.step - 1),
            "grad_norm": self.grad_norm,
            "tokens_per_second": self.tokens(len(ledger.unlogged)) / (ledger.seconds - ledger.logged_seconds),
        }
        if log is not None:
            tokens = self.tokens(ledger.step)
            position = {"stage": self.index, "name": stage.name, "step": ledger.step, "tokens": tokens}
            named_parts = dict(zip(self.training_pass.weights, parts, strict=True))
            log.write(position | numbers | {"seconds": ledger.seconds, "parts": named_parts})
        self.accelerator.log({f"{stage.name}/{key}": value for key, value in numbers.items()}, step=ledger.step)
        ledger.unlogged, ledger.logged_seconds = [], ledger.seconds

    def result(self, bare_speed: float) -> StageResult:
        stage, ledger = self.stage, self.ledger
        tokens = self.tokens(ledger.step)
        parts = mean_parts(ledger.recent)
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
def prepared_run(stage: Stage, inputs: StageInputs, student: BaseStudent) -> Iterator[StageRun]:
    """Within, the student is ready for the first step: adapters are in, and trained parameters are float32."""
    student.eval()
    inputs.teacher.eval()
    with ExitStack() as stack:
        stack.enter_context(adapters(student, stage, inputs.seed))
        training_pass = make_pass(stage, student, inputs.teacher, inputs.logits_from, inputs.seed)
        parameters = choose_parameters(student, stage, training_pass.reachable)
        if training_pass.bridge is not None:
            parameters |= {f"bridge.{name}": weight for name, weight in training_pass.bridge.named_parameters()}
        half_dtype = stack.enter_context(trained_in_float32(parameters))
        stack.enter_context(checkpointed_blocks(student, stage.gradient_checkpointing))
        optimizer = make_optimizer(parameters, stage, student)
        yield StageRun(
            stage,
            inputs.index,
            inputs.seed,
            training_pass,
            parameters,
            optimizer,
            inputs.accelerator,
            half_dtype,
            Ledger(),
        )


def micro_rows(stage: Stage, processes: int) -> int:
    """Sequences in a micro-batch of one process. Raises UserError if the batch cannot be divided equally."""
    if stage.batch % (processes * stage.accumulate):
        raise UserError(
            f"stage '{stage.name}' cannot split its batch of {stage.batch} sequences equally over "
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
    """Makes the pass of a stage.

    `logits_from`: another teacher, or stored logits, for the objective `logits`. `seed`: for the maps of the objective
    `bridge`. Raises UserError if the objectives need student layers of the teacher's number and shape, and they differ.
    """
    if stage.forced:
        return TeacherForced(stage, student, teacher, seed)
    return FreeRunning(stage, student, teacher, teacher if logits_from is None else logits_from, seed)


def any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Returns whether `flag` is true in any process: the same answer in all of them."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum") > 0)


def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Replaces every gradient by its mean over the processes. They exchange gradients only here."""
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
