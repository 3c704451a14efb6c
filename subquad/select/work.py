"""The work of a selector: billed before it starts, shared by the processes, and kept piece by piece as it is done.

A piece gives a row of numbers (one a candidate, of one row of text, say). Pieces are spread over the processes, and the
number that each gives is the same wherever it runs. Finished ones are lines of selection.jsonl, so that an interrupted
selection goes on from there.
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
    """The tokens that a selection will run, and the words that announce it."""

    description: str
    tokens: TokenCost = field(default_factory=TokenCost)

    def sentence(self, speed: Callable[[], float] | None = None) -> str:
        """The announcement; with the time it takes where `speed` measures the teacher's tokens/s."""
        parts = [f"{self.tokens.forward_tokens:,.0f} tokens forward"] if self.tokens.forward_tokens else []
        parts += [f"{self.tokens.training_tokens:,.0f} tokens of training"] if self.tokens.training_tokens else []
        if not parts:
            return f"{self.description}: nothing to measure"
        time_ = "" if speed is None else f", about {duration(self.tokens.seconds(speed()))}"
        return f"{self.description}: {' and '.join(parts)}{time_}"


@dataclass
class Work:
    """`file`: where finished pieces are kept; none: nowhere. `speed`: tokens/s of the teacher's forward pass."""

    say: Callable[[str], None] = print
    progress: Callable[[int, int], None] | None = None  # called with (pieces done, in all)
    accelerator: Accelerator | None = None
    file: Path | None = None
    speed: Callable[[], float] | None = None
    announced: TokenCost = field(default_factory=TokenCost)
    spent: TokenCost = field(default_factory=TokenCost)
    started: float = field(default_factory=time.perf_counter)

    def announce(self, cost: SelectionCost) -> None:
        """Prints the cost of the work about to begin."""
        self.announced = cost.tokens
        self.say(cost.sentence(self.speed))

    def pieces(
        self,
        key: str,
        count: int,
        piece: Callable[[int], Sequence[float] | Tensor],
        *,
        each: TokenCost,
        together: bool = False,
    ) -> Tensor:
        """What `piece(index)` gives for each index below `count`, in float64: (count, numbers of a piece).

        `key` tells these pieces from the selector's others. `each`: what a piece costs. `together`: all the processes
        work on every piece, as in training.
        """
        done = {index: values for index, values in self._read(key).items() if index < count}
        left = [index for index in range(count) if index not in done]
        processes = 1 if self.accelerator is None or together else self.accelerator.num_processes
        rank = 0 if self.accelerator is None or together else self.accelerator.process_index
        for first in range(0, len(left), processes):
            round_ = left[first : first + processes]
            mine = round_[min(rank, len(round_) - 1)]  # those without a piece do the last one's again
            values = torch.as_tensor(piece(mine), dtype=torch.float64)
            gathered = values[None]
            if processes > 1:
                assert self.accelerator is not None
                gathered = self.accelerator.gather(values[None].to(self.accelerator.device)).cpu()
            for index, row in zip(round_, gathered, strict=False):
                done[index] = row.tolist()
                self._write(key, index, done[index])
                self.spent.forward_tokens += each.forward_tokens
                self.spent.training_tokens += each.training_tokens
            if self.progress is not None:
                self.progress(len(done), count)
        return torch.tensor([done[index] for index in range(count)], dtype=torch.float64)

    def my_rows(self, rows_BT: Tensor) -> Tensor:
        """This process's part of a batch; all of it where it cannot be cut into equal parts."""
        if self.accelerator is None or len(rows_BT) % self.accelerator.num_processes:
            return rows_BT
        return rows_BT.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes of what each has, on the CPU."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return value
        return self.accelerator.reduce(value.to(self.accelerator.device), reduction="mean").cpu()

    def report(self) -> dict[str, Any]:
        """For scores.json: what was announced, and what it took (of this process, and without what was kept)."""
        seconds = time.perf_counter() - self.started
        return {"bill": asdict(self.announced), "spent": asdict(self.spent), "seconds": seconds}

    @property
    def _writes(self) -> bool:
        return self.accelerator is None or bool(self.accelerator.is_main_process)

    def _read(self, key: str) -> dict[int, list[float]]:
        if self.file is None or not self.file.is_file():
            return {}
        whole, _, torn = self.file.read_bytes().rpartition(b"\n")
        if torn and self._writes:  # a kill tore the last line, and the next must not go on from there
            os.truncate(self.file, len(whole) + 1)
        found = [json.loads(line) for line in whole.splitlines()]
        return {one["piece"]: one["values"] for one in found if one["key"] == key}

    def _write(self, key: str, index: int, values: list[float]) -> None:
        if self.file is not None and self._writes:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "piece": index, "values": values}) + "\n")


def bootstrap(samples_NU: Tensor, confidence: float = 0.95, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bounds of the interval of each column's mean, (U,): rows are drawn again, with replacement.

    Of a single row nothing is known: NaN.
    """
    count = len(samples_NU)
    if count < 2:
        unknown = torch.full_like(samples_NU[0], torch.nan)
        return unknown, unknown
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    means_RU = samples_NU[drawn].mean(1)
    rest = (1 - confidence) / 2
    low, high = means_RU.quantile(torch.tensor([rest, 1 - rest], dtype=samples_NU.dtype), dim=0)
    return low, high
