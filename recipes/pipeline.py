"""The whole story of a recipe: fine-tune each task, evaluate, merge, export, load the export again, tell."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import PartialState
from accelerate.utils import release_memory
from torch import Tensor, nn

from orthoft.errors import unknown
from orthoft.merging import MergeReport, merge
from orthoft.merging.files.hub import find_folder
from orthoft.recipes.cards import write_cards, write_expert
from orthoft.recipes.data import SPLITS
from orthoft.recipes.devices import merge_device, roomy, slow_type
from orthoft.recipes.expert import Ready, fingerprint, finished, forget, head_file
from orthoft.recipes.export_check import export_check
from orthoft.recipes.finetune import train
from orthoft.recipes.harness import run_harness
from orthoft.recipes.head import Head
from orthoft.recipes.keep_away import KeepAway
from orthoft.recipes.kept_scores import SCORES, KeptScores
from orthoft.recipes.kinds import kind_of
from orthoft.recipes.models import how_to_load, load_model
from orthoft.recipes.prepare import RESULTS, check, open_output, quiet
from orthoft.recipes.refit import refitted
from orthoft.recipes.rehearse import rehearse
from orthoft.recipes.schema import Again, Recipe
from orthoft.recipes.table import MERGED, gains, table
from orthoft.recipes.task_schema import Task
from orthoft.recipes.train_to_merge import chosen_before, read_subspace, save_subspaces
from orthoft.recipes.whole import write_whole_json

Say = Callable[[str], None]
LOWER = "evaluate.batch_size"


def run_recipe(
    recipe: Recipe, *, until: str | None, tasks: Sequence[str] | None, again: Again, say: Say
) -> dict[str, Any]:
    """Do what a checked recipe says and return ``results.json``; see `orthoft.recipes.run`."""
    chosen = [unit for unit in recipe.tasks if tasks is None or unit.name in tasks]
    for name in tasks or ():
        if name not in (names := [unit.name for unit in recipe.tasks]):
            raise unknown("task", name, names)
    with quiet():
        check(recipe)
        base = find_folder(recipe.base, "base")
        rehearse(recipe, base)
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        state = PartialState()  # as the TrainingArguments that were just checked have set it up
        run = Run(recipe, base, Path(recipe.output), say if state.is_main_process else _silent)
        run.read(chosen)
        if state.is_main_process:
            open_output(recipe, run.out, again, tasks)
        state.wait_for_everyone()
        run.finetune()
        if until == "finetune" or not state.is_main_process:
            return run.results
        run.evaluate()
        if recipe.merge is not None:
            run.merge()
        return run.finish()


def _silent(line: str) -> None:
    """Say nothing: what every process but the first says."""


class Run:
    """One recipe under way: where it writes, what is ready, and the results so far."""

    def __init__(self, recipe: Recipe, base: Path, out: Path, say: Say) -> None:
        self.recipe, self.base, self.out, self.say = recipe, base, out, say
        self.kind = recipe.tasks[0].kind
        self.ready: list[Ready] = []
        self.results: dict[str, Any] = {
            "recipe": recipe.model_dump(mode="json"),
            "versions": {name: version(name) for name in ("orthoft", "torch", "transformers", "peft")},
            "machine": {"python": platform.python_version(), "threads": torch.get_num_threads()},
            "times": {},
            "experts": {},
            "scores": {},
            "samples": {},
        }
        shared = [recipe.evaluate.batch_size, recipe.device, self.results["versions"]]
        self.kept = KeptScores(out / SCORES, shared)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of the block to ``times``."""
        start = time.perf_counter()
        yield
        spent: dict[str, float] = self.results["times"]
        spent[stage] = round(spent.get(stage, 0.0) + time.perf_counter() - start, 2)

    def read(self, tasks: Sequence[Task]) -> None:
        """Turn every task's rows into examples, so that a mistake there costs nothing."""
        with self.timed("data"):
            for task in tasks:
                kind, mark = kind_of(task, self.base), fingerprint(self.recipe, task, self.base)
                self.ready.append(Ready(kind, kind.data(self.recipe.seed), None, mark))

    def finetune(self) -> None:
        """Train one expert after the other, or take up a finished one."""
        if (hint := slow_type(self.recipe, self.base)) is not None:
            self.say(hint)
        self.choose_subspaces()
        for i, ready in enumerate(self.ready):
            task, data, folder = ready.task, ready.data, self.expert(ready.task.name)
            sizes = ", ".join(f"{len(getattr(data, split))} {split}" for split in SPLITS)
            self.say(f"{task.name}: {sizes}, {ready.kind.about(data)}")
            lost = getattr(task, "head", None) == "trained" and not head_file(folder).is_file()
            known = None if lost else finished(folder, ready.mark)
            if known is None and PartialState().is_main_process:
                forget(folder)
            ready = self.ready[i] = self._with_head(ready, fit=known is None) if data.classes else ready
            if known is None:
                with self.timed("finetune"):
                    rows, callbacks = self.apart(task.name)
                    known = train(self.recipe, ready, self.base, folder, rows, self.say, callbacks)
                release_memory()  # accelerate's forward in half precision refers to itself, and so keeps the model
                self.kept.forget()
                self.ready[i] = self._with_head(ready, fit=False) if data.classes else ready  # it may have learnt
                last = f", loss {known['losses'][-1][1]:.3f}" if known["losses"] else ""
                kept = f", kept those of step {known['kept']['step']}" if known["kept"] else ""
                self.say(
                    f"  {task.adapter.type}, {known['parameters']:,} parameters: {known['steps']} steps{last}{kept}"
                )
            else:
                self.say(f"  reused {folder}")
            self.results["experts"][task.name] = {"folder": str(folder)} | known
            if PartialState().is_main_process:
                write_expert(self.results, self.ready[i])

    def choose_subspaces(self) -> None:
        """Choose where each task may write, in the main process, if the recipe wants it and a task is to train."""
        if self.recipe.train_to_merge is None:
            return
        state, folder = PartialState(), self.out / "subspaces"
        to_train = [r for r in self.ready if finished(self.expert(r.task.name), r.mark) is None]
        if to_train and state.is_main_process and not chosen_before(self.recipe, self.base, folder):
            self.say(f"keeping the tasks apart: {self.recipe.train_to_merge.method or 'penalty'}")
            if state.num_processes > 1:
                limit = to_train[0].task.training.get("ddp_timeout", 1800)
                self.say(f"  the other processes wait, {limit} s at most: training.ddp_timeout allows more")
            with self.timed("subspaces"), roomy("subspaces", LOWER):
                save_subspaces(self.recipe, self.base, folder)
            release_memory()
        state.wait_for_everyone()

    def apart(self, name: str) -> tuple[dict[str, Tensor] | None, list[KeepAway]]:
        """Return the rows through which a task's adapter reads, if some were chosen, and the callbacks of a penalty."""
        if self.recipe.train_to_merge is None:
            return None, []
        return read_subspace(self.recipe.train_to_merge, self.out / "subspaces", name)

    def _with_head(self, ready: Ready, fit: bool) -> Ready:
        """Fit the probe in the main process, and let every process read it from disk."""
        state, file, name = PartialState(), head_file(self.expert(ready.task.name)), ready.task.name
        if state.is_main_process and (fit or not file.is_file()):
            with self.timed("probe"), roomy(f"{name} probe", LOWER):
                ready.kind.fit(self.load(self.base), ready.data, self.recipe.evaluate.batch_size).save(file)
        state.wait_for_everyone()
        return replace(ready, head=Head.load(file))

    def evaluate(self) -> None:
        """Score the base on every task, and each expert, read from disk, on its own task or on all."""
        self.say("evaluating")
        with self.timed("evaluate"):
            self.score_once("base", None, [ready.at_start() for ready in self.ready])
            for ready in self.ready:
                self.score_once(ready.task.name, ready, self.ready if self.recipe.evaluate.cross else [ready])

    def score_once(self, row: str, expert: Ready | None, tasks: Sequence[Ready]) -> None:
        """Score the base, alone or under an expert, on the tasks on which a run that was broken off did not."""
        mark, left = "" if expert is None else expert.mark, list[Ready]()
        for ready in tasks:
            if (known := self.kept.find(row, mark, ready.mark)) is None:
                left.append(ready)
            else:
                self.enter(row, ready.task.name, **known)
        if left:
            self.score(row, self.load(self.base, None if expert is None else self.expert(row)), left, mark)
        else:
            self.say(f"  {row}: scores taken up")

    def merge(self) -> None:
        """Merge the experts, write the exports, and score each as a stranger would load it, quantised as the base."""
        export = self.recipe.export
        self.say("merging")
        merged = self._merged("merge", self.out / "merged", output="checkpoint", dtype=export.dtype)
        for note in merged.notes:
            self.say(f"  {note}")
        norms = {weight.name: weight.norm for weight in merged.merged}
        self.score_merged(norms)
        if export.lora is not None:
            self._merged("merge-lora", self.out / "merged-lora", output="lora", rank=export.lora.rank)
            with self.timed("evaluate"):
                self.score("merge-lora", self.load(self.base, self.out / "merged-lora"), self.ready)
        if (harness := self.recipe.evaluate.harness) is not None:
            release_memory()
            with self.timed("harness"):
                self.results["harness"] = run_harness(self.recipe, harness, self.out / "merged", self.say)

    def score_merged(self, norms: Mapping[str, float]) -> None:
        """Score the merged model, and once more under heads that are fitted anew on its features, if wanted."""
        assert self.recipe.merge is not None
        with self.timed("evaluate"):
            self.results["export_check"] = export_check(self.base, self.out / "merged", norms)
            model = self.load(self.out / "merged")
            self.score("merge", model, self.ready)
        if not self.recipe.merge.refit_heads:
            return
        self.say("fitting the heads anew")
        with self.timed("probe"), roomy("merge-refit", LOWER):
            again = refitted(model, self.ready, self.out / "merged", self.recipe.evaluate.batch_size)
        with self.timed("evaluate"):
            self.score("merge-refit", model, again)

    def _merged(self, row: str, folder: Path, **output: Any) -> MergeReport:
        wanted = self.recipe.merge
        assert wanted is not None
        report = merge(
            self.base,
            [(ready.task.name, self.expert(ready.task.name)) for ready in self.ready],
            folder,
            weights=wanted.task_weights(len(self.ready)),
            overwrite=True,
            seed=self.recipe.seed,
            progress=sys.stderr.isatty(),
            **merge_device(self.recipe.device),
            **output,
            **wanted.words(),
        )
        self.results[row] = report.to_dict()
        self.results["times"][row] = round(report.seconds, 2)
        return report

    def score(self, row: str, model: nn.Module, tasks: Sequence[Ready], mark: str | None = None) -> None:
        """Evaluate a model on the test splits of tasks; what depends on it by ``mark`` alone is kept at once."""
        for ready in tasks:
            name, size = ready.task.name, self.recipe.evaluate.batch_size
            with roomy(f"{row} on {name}", LOWER):
                told: dict[str, Any] = {
                    "scores": ready.kind.score(model, ready.head, ready.data.test, size, f"{row} on {name}"),
                    "sample": ready.kind.sample(model) if row in ("base", name, "merge") else None,
                }
            self.enter(row, name, **told)
            if mark is not None:
                self.kept.add(told, row, mark, ready.mark)

    def enter(self, row: str, name: str, scores: Mapping[str, float], sample: str | None) -> None:
        """Put what was found of a row on a task into the results."""
        self.results["scores"].setdefault(row, {})[name] = scores
        if sample is not None:
            self.results["samples"].setdefault(name, {})[row] = sample

    def load(self, folder: Path, adapter: Path | None = None) -> Any:
        """Return the model of a folder, quantised if the experts were trained so, under an adapter if one is given."""
        with roomy(f"loading {folder.name}", "what a weight takes: set dtype, or quantization"):
            model = load_model(self.kind, folder, self.recipe.dtype, self.recipe.quantization)
            return model if adapter is None else peft.PeftModel.from_pretrained(model, str(adapter))

    def expert(self, name: str) -> Path:
        return self.out / "experts" / name

    def finish(self) -> dict[str, Any]:
        """Write ``results.json``, show the table and say how to load what was merged."""
        scores, metrics = self.results["scores"], {ready.task.name: ready.task.metric for ready in self.ready}
        merged = [row for row in MERGED if row in scores]
        self.results["gain_kept"] = {row: gains(scores, metrics, row) for row in merged}
        write_whole_json(self.out / RESULTS, self.results)
        self.kept.forget()
        told: dict[str, Any] = json.loads((self.out / RESULTS).read_text(encoding="utf-8"))
        write_cards(told)
        self.say("")
        self.say(table(scores, metrics))
        for name, by_row in self.results["samples"].items():
            prompt = next(ready.kind.prompt for ready in self.ready if ready.task.name == name)
            self.say(f"\n{name}: {prompt!r} goes on")
            for row, continuation in by_row.items():
                self.say(f"  {row}: {' '.join(continuation.split())}")
        self.say(f"\nresults: {self.out / RESULTS}")
        if merged:
            self.say(how_to_load(self.kind, self.out / "merged"))
        return told
