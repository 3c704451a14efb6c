"""The work of a selector: priced before it starts, divided between processes, and resumed where it was interrupted.

`SelectionWork.map` computes one row of numbers per item (such as one number per candidate for one row of text). Items
are divided between the processes; an item's numbers do not depend on the process that computes it. Finished items are
appended to selection.jsonl, from which an interrupted selection resumes.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from subquad.utils.format import duration
from subquad.utils.token_cost import TokenCost

RESAMPLES = 1000


@dataclass(frozen=True)
class SelectionCost:
    """The tokens that a selection will run, and a description of it."""

    description: str
    tokens: TokenCost = field(default_factory=TokenCost)

    def sentence(self, speed: Callable[[], float] | None = None) -> str:
        """Description and tokens; with the expected time if `speed` measures the teacher's tokens/s."""
        parts = [f"{self.tokens.forward_tokens:,.0f} tokens forward"] if self.tokens.forward_tokens else []
        parts += [f"{self.tokens.training_tokens:,.0f} tokens of training"] if self.tokens.training_tokens else []
        if not parts:
            return f"{self.description}: nothing to measure"
        expected_time = "" if speed is None else f", about {duration(self.tokens.seconds(speed()))}"
        return f"{self.description}: {' and '.join(parts)}{expected_time}"


@dataclass
class SelectionWork:
    """Runs a selector's items, and records the expected and the actual cost.

    `file`: storage of finished items; None: none. `speed`: measures tokens/s of the teacher's forward pass.
    """

    say: Callable[[str], None] = print
    progress: Callable[[int, int], None] | None = None  # called with (finished items, all items)
    accelerator: Accelerator | None = None
    file: Path | None = None
    speed: Callable[[], float] | None = None
    expected_cost: TokenCost = field(default_factory=TokenCost)
    actual_cost: TokenCost = field(default_factory=TokenCost)
    start_time: float = field(default_factory=time.perf_counter)

    def print_cost(self, cost: SelectionCost) -> None:
        """Prints the cost of the work about to begin, and records it."""
        self.expected_cost = cost.tokens
        self.say(cost.sentence(self.speed))

    def map(
        self,
        key: str,
        count: int,
        measure: Callable[[int], Sequence[float] | Tensor],
        *,
        item_cost: TokenCost,
        all_processes: bool = False,
    ) -> Tensor:
        """`measure(index)` for each index below `count`, in float64: (count, numbers of an item).

        `key` distinguishes these items from the selector's other ones in the file. `item_cost`: cost of one item.
        `all_processes`: every process computes every item, as in training.
        """
        values_of = {index: values for index, values in self._read(key).items() if index < count}
        open_items = [index for index in range(count) if index not in values_of]
        processes = 1 if self.accelerator is None or all_processes else self.accelerator.num_processes
        rank = 0 if self.accelerator is None or all_processes else self.accelerator.process_index
        for start in range(0, len(open_items), processes):
            # One item per process; in an incomplete last round, the processes without one repeat the last item.
            items = open_items[start : start + processes]
            values = torch.as_tensor(measure(items[min(rank, len(items) - 1)]), dtype=torch.float64)
            gathered = values[None]
            if processes > 1:
                assert self.accelerator is not None
                gathered = self.accelerator.gather(values[None].to(self.accelerator.device)).cpu()
            for index, row in zip(items, gathered, strict=False):
                values_of[index] = row.tolist()
                self._write(key, index, values_of[index])
                self.actual_cost.forward_tokens += item_cost.forward_tokens
                self.actual_cost.training_tokens += item_cost.training_tokens
            if self.progress is not None:
                self.progress(len(values_of), count)
        return torch.tensor([values_of[index] for index in range(count)], dtype=torch.float64)

    def local_rows(self, rows_BT: Tensor) -> Tensor:
        """This process's part of a batch; the whole batch if it cannot be divided equally."""
        if self.accelerator is None or len(rows_BT) % self.accelerator.num_processes:
            return rows_BT
        return rows_BT.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes, on the CPU."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return value
        return self.accelerator.reduce(value.to(self.accelerator.device), reduction="mean").cpu()

    def report(self) -> dict[str, Any]:
        """Expected and actual cost for scores.json; of this process, without resumed items."""
        seconds = time.perf_counter() - self.start_time
        return {"bill": asdict(self.expected_cost), "spent": asdict(self.actual_cost), "seconds": seconds}

    @property
    def _writes(self) -> bool:
        return self.accelerator is None or bool(self.accelerator.is_main_process)

    def _read(self, key: str) -> dict[int, list[float]]:
        if self.file is None or not self.file.is_file():
            return {}
        complete, _, torn = self.file.read_bytes().rpartition(b"\n")
        if torn and self._writes:  # a kill tore the last line: remove it, or the next line would continue it
            os.truncate(self.file, len(complete) + 1)
        entries = [json.loads(line) for line in complete.splitlines()]
        return {entry["piece"]: entry["values"] for entry in entries if entry["key"] == key}

    def _write(self, key: str, index: int, values: list[float]) -> None:
        if self.file is not None and self._writes:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "piece": index, "values": values}) + "\n")


def bootstrap(samples_NU: Tensor, confidence: float = 0.95, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bounds of the bootstrap interval of each column's mean, (U,): rows are resampled with replacement.

    NaN for a single row, whose mean has no known spread.
    """
    count = len(samples_NU)
    if count < 2:
        unknown_U = torch.full_like(samples_NU[0], torch.nan)
        return unknown_U, unknown_U
    indices_RN = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    means_RU = samples_NU[indices_RN].mean(1)
    tail = (1 - confidence) / 2
    low_U, high_U = means_RU.quantile(torch.tensor([tail, 1 - tail], dtype=samples_NU.dtype), dim=0)
    return low_U, high_U
