"""Checkpoints of a training: what is trained, its optimizer and its random numbers, as safetensors and JSON.

transformers' own hold pickles, and all of a model that is not PEFT's. Here ``checkpoint-STEP/`` has
``trained.safetensors``, ``state.safetensors`` (optimizer, schedule, scaler, callbacks), ``random-RANK.safetensors``,
the Trainer's ``trainer_state.json``, and ``checkpoint.json`` with the hash of each; it appears when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from orthoft.merging.resume.partial import partial_of
from orthoft.recipes.tensor_tree import gathered, read_tree, write_tree

Say = Callable[[str], None]
TRAINED, STATE, FINISHED, MARK = "trained.safetensors", "state.safetensors", "checkpoint.json", "fingerprint"


class Checkpoints:
    """Mix into a Trainer, in front of it: it saves and takes up checkpoints without pickles.

    Callbacks that have ``state_dict`` and ``load_state_dict`` are part of them. After the last step there is nothing to
    go on with, and no checkpoint.
    """

    args: Any
    accelerator: Any
    callback_handler: Any
    control: Any
    lr_scheduler: Any
    model: Any
    optimizer: Any
    state: Any

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.control.should_training_stop:
            return
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        partial = partial_of(folder)
        trained = gathered({name: p for name, p in self.model.named_parameters() if p.requires_grad})
        state = gathered(self._state())
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_tree(partial / TRAINED, trained)
            write_tree(partial / STATE, state)
            self.state.save_to_json(str(partial / "trainer_state.json"))
        PartialState().wait_for_everyone()
        write_tree(partial / f"random-{self.args.process_index}.safetensors", random_state())
        PartialState().wait_for_everyone()
        if self.args.should_save:
            finish(partial, folder, self.args.world_size)
            for _, old in sorted(_steps(folder.parent))[: -(self.args.save_total_limit or 0)]:
                shutil.rmtree(old)

    def _state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "callbacks": [callback.state_dict() for callback in self._callbacks()],
        }

    def _callbacks(self) -> list[Any]:
        return [c for c in self.callback_handler.callbacks if hasattr(c, "load_state_dict")]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        trained: dict[str, Tensor] = read_tree(Path(resume_from_checkpoint, TRAINED))
        put(trained, self.model if model is None else model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = read_tree(Path(checkpoint, STATE))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for i, entries in state["optimizer"]["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor) and value.shape == parameters[i].shape:
                    entries[key] = sharded_like(value, parameters[i])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["schedule"])
        if state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for callback, told in zip(self._callbacks(), state["callbacks"], strict=True):
            callback.load_state_dict(told)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Do nothing: the scaler's state is with the optimizer's."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_random_state(read_tree(Path(checkpoint, f"random-{self.args.process_index}.safetensors")))


def random_state() -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's generators, as plain values and tensors."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators into a state from `random_state`."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor as a parameter is: in parts where FSDP2 keeps it so."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


@torch.no_grad()
def put(values: dict[str, Tensor], model: nn.Module) -> None:
    """Copy values into the parameters of these names."""
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        parameters[name].copy_(sharded_like(value, parameters[name]))


def finish(partial: Path, folder: Path, processes: int) -> None:
    """Write the hashes of a checkpoint's files, and give it its name."""
    files = {file.name: _digest(file) for file in sorted(partial.iterdir())}
    (partial / FINISHED).write_text(json.dumps({"processes": processes, "files": files}, indent=2), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def open_checkpoints(folder: Path, mark: str) -> None:
    """Make the folder of a training's checkpoints; those of another training are removed."""
    file = folder / MARK
    if not (file.is_file() and file.read_text(encoding="utf-8") == mark):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        file.write_text(mark, encoding="utf-8")


def last_checkpoint(folder: Path, processes: int, say: Say) -> Path | None:
    """Return the last checkpoint that is whole, and say in a line why one was passed over."""
    for _, found in sorted(_steps(folder), reverse=True):
        if (fault := _fault(found, processes)) is None:
            return found
        say(f"  skipped {found}: {fault}")
    return None


def _fault(folder: Path, processes: int) -> str | None:
    try:
        told = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
        broken = [name for name, digest in told["files"].items() if _digest(folder / name) != digest]
        before = told["processes"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({type(error).__name__})"
    if broken:
        return f"{broken[0]} is broken"
    return None if before == processes else f"it is of {before} processes, and these are {processes}"


def _steps(folder: Path) -> Iterable[tuple[int, Path]]:
    named = ((path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*"))
    return [(int(step), path) for step, path in named if step.isdecimal()]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
