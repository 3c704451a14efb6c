"""Checkpoints as safetensors and JSON, which a kill at any moment does not damage.

    checkpoints/
      latest.json                        {"folder": "stage-0-step-000120"}
      stage-0-step-000120/
        trainable.safetensors            the trained tensors of this stage
        optimizer.safetensors            AdamW's moments, "exp_avg/<parameter>", and torch's random state, "torch_rng"
        state.json                       stage, step, losses so far, and the run's identity: seed, teacher, plan, text
      stage-0.safetensors                the trained tensors of a finished stage; its header holds the state

Notable:
- A checkpoint is written under a temporary name, synced to disk and renamed. `latest.json` is replaced afterwards, in
  the same way, so that it names a complete checkpoint whenever a run is interrupted.
- A run can be resumed only with the settings it had: `Checkpoints.identity` is compared, and errors name the settings
  that differ.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from subquad.distill.parameters import Parameters
from subquad.errors import UserError
from subquad.utils.files import is_disk_full, write_aside

KEEP = 2  # number of step checkpoints on disk
RNG = "torch_rng"
State = dict[str, Any]


@dataclass
class Checkpoints:
    """Checkpoints of one stage of a run."""

    folder: Path
    stage: int
    identity: dict[str, str] = field(default_factory=dict)  # of the run: {"seed": "0", "teacher": "3f1c...", ...}

    @property
    def finished_path(self) -> Path:
        """File of the trained tensors of this stage, once it is finished."""
        return self.folder / f"stage-{self.stage}.safetensors"

    def start_over(self) -> None:
        """Removes the checkpoints of this stage and all later ones."""
        for path in {*self.folder.glob("stage-*"), *self.folder.glob("*.tmp")}:
            stage = path.name.removeprefix("stage-").partition("-")[0].partition(".")[0]
            if path.suffix == ".tmp" or int(stage) >= self.stage:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._latest_path.unlink(missing_ok=True)

    def save(self, parameters: Parameters, optimizer: torch.optim.Optimizer, state: State) -> None:
        """Writes the checkpoint of `state["step"]`. Raises UserError if the disk fails; older checkpoints stay."""
        folder = self.folder / f"stage-{self.stage}-step-{state['step']:06d}"
        moments = {
            f"{kind}/{name}": value
            for name, parameter in parameters.items()
            for kind, value in optimizer.state[parameter].items()
        }
        with self._write_errors(f"the checkpoint of step {state['step']}"):
            with write_aside(folder, durable=True) as aside:  # replaces one that latest.json does not name yet
                aside.mkdir(parents=True)
                save_file(_contiguous(parameters), aside / "trainable.safetensors")
                save_file(_contiguous(moments) | {RNG: torch.get_rng_state()}, aside / "optimizer.safetensors")
                (aside / "state.json").write_text(json.dumps(self._with_identity(state)), encoding="utf-8")
            with write_aside(self._latest_path, durable=True) as aside:
                aside.write_text(json.dumps({"folder": folder.name}), encoding="utf-8")
        for step_folder in self._step_folders()[:-KEEP]:
            shutil.rmtree(step_folder, ignore_errors=True)

    def load(self, parameters: Parameters, optimizer: torch.optim.Optimizer) -> State | None:
        """Loads the latest checkpoint of this stage and returns its state; None if there is none.

        Raises UserError if the checkpoint belongs to another run or is damaged.
        """
        if not self._latest_path.exists():
            return None
        with self._read_errors():
            folder = self.folder / json.loads(self._latest_path.read_text(encoding="utf-8"))["folder"]
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if state["stage"] != self.stage:
                return None
            self._check_identity(state)
            _restore(parameters, load_file(folder / "trainable.safetensors"))
            moments = load_file(folder / "optimizer.safetensors")
            torch.set_rng_state(moments.pop(RNG))
            for key, value in moments.items():
                kind, _, name = key.partition("/")
                optimizer.state[parameters[name]][kind] = value.to(parameters[name].device)
        return state

    def finish(self, parameters: Parameters, state: State) -> None:
        """Writes the trained tensors of the finished stage and removes its step checkpoints."""
        header = json.dumps(self._with_identity(state) | {RNG: torch.get_rng_state().numpy().tobytes().hex()})
        with self._write_errors(f"the weights of stage {self.stage}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            with write_aside(self.finished_path, durable=True) as aside:
                save_file(_contiguous(parameters), aside, metadata={"state": header})
        self._latest_path.unlink(missing_ok=True)
        for step_folder in self._step_folders():
            shutil.rmtree(step_folder, ignore_errors=True)

    def load_finished(self, parameters: Parameters) -> State | None:
        """Loads the tensors of the finished stage and returns its state; None if it is not finished."""
        if not self.finished_path.exists():
            return None
        with self._read_errors():
            with safe_open(self.finished_path, "pt") as file:
                state = json.loads(file.metadata()["state"])
            self._check_identity(state)
            _restore(parameters, load_file(self.finished_path))
            torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state[RNG]), dtype=torch.uint8))
        return state

    @property
    def _latest_path(self) -> Path:
        return self.folder / "latest.json"

    def _step_folders(self) -> list[Path]:
        return sorted(path for path in self.folder.glob(f"stage-{self.stage}-step-*") if path.suffix != ".tmp")

    def _with_identity(self, state: State) -> State:
        return state | {"stage": self.stage, "identity": self.identity}

    def _check_identity(self, state: State) -> None:
        differences = [setting for setting, value in self.identity.items() if state["identity"].get(setting) != value]
        if differences:
            raise UserError(
                f"cannot resume: the checkpoints in '{self.folder}' were made with another "
                f"{' and another '.join(differences)}; resume with the same settings, or start over in another folder."
            )

    @contextmanager
    def _write_errors(self, content: str) -> Iterator[None]:
        """Turns errors of writing `content` into UserErrors."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            remedy = "free some space" if is_disk_full(error) else "make the folder writable"
            raise UserError(
                f"could not write {content} to '{self.folder}' ({reason}): {remedy} and resume with --resume; "
                "the previous checkpoint is intact."
            ) from None

    @contextmanager
    def _read_errors(self) -> Iterator[None]:
        """Turns errors of reading a checkpoint into UserErrors."""
        try:
            yield
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(
                f"the checkpoint in '{self.folder}' is damaged ({error}): start over without --resume."
            ) from None


def _contiguous(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def _restore(parameters: Parameters, tensors: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
