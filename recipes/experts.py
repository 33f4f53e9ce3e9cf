"""The first stage of a run: an expert for each task, trained, taken up, or taken from elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import release_memory
from torch import Tensor

from orthoft.hub_place import may_be_one
from orthoft.merging.resume.lock import locked
from orthoft.recipes.cards import write_expert
from orthoft.recipes.data import SPLITS
from orthoft.recipes.devices import roomy, slow_type
from orthoft.recipes.evaluation import LOWER, Evaluation
from orthoft.recipes.expert import Ready, finished, forget, read_tasks, take
from orthoft.recipes.finetune import train
from orthoft.recipes.head import Head
from orthoft.recipes.keep_away import KeepAway
from orthoft.recipes.layout import FINISHED, SUBSPACES, expert_folder, head_file, trainer_folder
from orthoft.recipes.schema import Recipe
from orthoft.recipes.task_schema import Task
from orthoft.recipes.train_to_merge import chosen_before, read_subspace, save_subspaces

Say = Callable[[str], None]
Timed = Callable[[str], AbstractContextManager[None]]


class Experts:
    """The experts of a recipe in its output, on the way; what is known of them goes into ``results``."""

    def __init__(
        self, recipe: Recipe, base: Path, results: dict[str, Any], evaluation: Evaluation, timed: Timed, say: Say
    ) -> None:
        self.recipe, self.base, self.out = recipe, base, Path(recipe.output)
        self.results, self.evaluation, self.timed, self.say = results, evaluation, timed, say
        self.ready: list[Ready] = []

    def read(self, tasks: Sequence[Task]) -> None:
        """Turn every task's rows into examples, so that a mistake there costs nothing."""
        with self.timed("data"):
            self.ready = read_tasks(self.recipe, tasks, self.base)

    def outdated(self) -> list[str]:
        """Return the tasks whose finished experts are of another training."""
        there = [ready for ready in self.ready if (self.expert(ready.task.name) / FINISHED).is_file()]
        return [ready.task.name for ready in there if finished(self.expert(ready.task.name), ready.mark) is None]

    def make(self) -> None:
        """Train one expert after the other, or take up a finished one."""
        if (hint := slow_type(self.recipe, self.base)) is not None:
            self.say(hint)
        self.choose_subspaces()
        for i, ready in enumerate(self.ready):
            task, data, folder = ready.task, ready.data, self.expert(ready.task.name)
            sizes = ", ".join(f"{len(getattr(data, split))} {split}" for split in SPLITS)
            self.say(f"{task.name}: {sizes}, {ready.kind.about(data)}")
            learnt = task.expert is not None or getattr(task, "head", None) == "trained"
            lost = bool(data.classes) and learnt and not head_file(folder).is_file()
            known = None if lost else finished(folder, ready.mark)
            PartialState().wait_for_everyone()  # all have looked before one changes anything
            if known is not None:
                self.say(f"  reused {folder}")
                if PartialState().is_main_process:  # killed after it was finished, before these were gone
                    shutil.rmtree(trainer_folder(folder), ignore_errors=True)
            else:
                if PartialState().is_main_process:
                    forget(folder)
                known = self._trained(ready, folder) if task.expert is None else self._taken(ready, folder)
                self.evaluation.kept.forget()
            self.ready[i] = self._with_head(ready)  # it may have learnt
            self.results["experts"][task.name] = {"folder": str(folder)} | known
            if PartialState().is_main_process:
                write_expert(self.results, self.ready[i])

    def _trained(self, ready: Ready, folder: Path) -> dict[str, Any]:
        """Train a task's expert and return what is known of it."""
        task, ready = ready.task, self._with_head(ready, fit=True)
        with self.timed("finetune"):
            rows, callbacks = self.apart(task.name)
            known = train(self.recipe, ready, self.base, folder, rows, self.say, callbacks)
        release_memory()  # accelerate's forward in half precision refers to itself, and so keeps the model
        last = f", loss {known['losses'][-1][1]:.3f}" if known["losses"] else ""
        kept = f", kept those of step {known['kept']['step']}" if known["kept"] else ""
        self.say(f"  {task.trained.type}, {known['parameters']:,} parameters: {known['steps']} steps{last}{kept}")
        return known

    def _taken(self, ready: Ready, folder: Path) -> dict[str, Any]:
        """Take a task's expert from elsewhere and return what is known of it."""
        if PartialState().is_main_process:
            take(ready, self.recipe, self.base, folder)
        PartialState().wait_for_everyone()
        known = finished(folder, ready.mark)
        assert known is not None
        self.say(f"  {known['adapter']['type']}, {known['parameters']:,} parameters, taken from {ready.task.expert}")
        named = known["base"]
        if named not in (None, self.recipe.base, str(self.base)) and not may_be_one(named, self.recipe.base):
            self.say(f"  its config names another base, {named}; its tensors fit this one")
        return known

    def choose_subspaces(self) -> None:
        """Choose where each task may write, in the main process, if the recipe wants it and a task is to train."""
        if self.recipe.train_to_merge is None:
            return
        state, folder = PartialState(), self.out / SUBSPACES
        trained = [ready for ready in self.ready if ready.task.expert is None]
        to_train = [r for r in trained if finished(self.expert(r.task.name), r.mark) is None]
        if to_train and state.is_main_process and not chosen_before(self.recipe, self.base, folder):
            self.say(f"keeping the tasks apart: {self.recipe.train_to_merge.method or 'penalty'}")
            if state.num_processes > 1:
                limit = to_train[0].task.training.get("ddp_timeout", 1800)
                self.say(f"  the other processes wait, {limit} s at most: training.ddp_timeout allows more")
            with self.timed("subspaces"), roomy("subspaces", LOWER), locked(folder):
                save_subspaces(self.recipe, self.base, folder)
            release_memory()
        state.wait_for_everyone()

    def apart(self, name: str) -> tuple[dict[str, Tensor] | None, list[KeepAway]]:
        """Return the rows through which a task's adapter reads, if some were chosen, and the callbacks of a penalty."""
        if self.recipe.train_to_merge is None:
            return None, []
        return read_subspace(self.recipe.train_to_merge, self.out / SUBSPACES, name)

    def _with_head(self, ready: Ready, fit: bool = False) -> Ready:
        """Fit the probe, if there is none or ``fit``, in the main process, and let every process read it from disk."""
        if not ready.data.classes:
            return ready
        state, file, name = PartialState(), head_file(self.expert(ready.task.name)), ready.task.name
        if state.is_main_process and (fit or not file.is_file()):
            with self.timed("probe"), roomy(f"{name} probe", LOWER):
                ready.kind.fit(self.evaluation.load(self.base), ready.data, self.recipe.evaluate.batch_size).save(file)
        state.wait_for_everyone()
        return replace(ready, head=Head.load(file))

    def expert(self, name: str) -> Path:
        return expert_folder(self.out, name)
