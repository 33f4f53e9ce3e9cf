"""The whole story of a recipe: fine-tune each task, evaluate, merge, export, load the export again, tell."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import release_memory
from torch import Tensor

from orthoft.errors import unknown
from orthoft.merging import MergeReport, merge
from orthoft.merging.files.hub import find_folder
from orthoft.merging.resume.lock import locked
from orthoft.merging.statistics import STATISTICS_OF
from orthoft.recipes.cards import write_cards, write_expert
from orthoft.recipes.data import SPLITS
from orthoft.recipes.devices import merge_device, roomy, slow_type
from orthoft.recipes.evaluation import LOWER, Evaluation
from orthoft.recipes.expert import Ready, finished, forget, read_tasks
from orthoft.recipes.export_check import export_check
from orthoft.recipes.finetune import train
from orthoft.recipes.harness import run_harness
from orthoft.recipes.head import Head
from orthoft.recipes.keep_away import KeepAway
from orthoft.recipes.layout import FINISHED, MERGED, MERGED_LORA, RESULTS, SEARCH, SUBSPACES, expert_folder, head_file
from orthoft.recipes.measuring import measured
from orthoft.recipes.models import how_to_load
from orthoft.recipes.output import output_opened, refuse_own_inputs
from orthoft.recipes.prepare import check, quiet
from orthoft.recipes.refit import refitted
from orthoft.recipes.rehearse import rehearse
from orthoft.recipes.schema import Again, Merge, MergeSearch, Recipe, as_arguments
from orthoft.recipes.search_report import RESULT
from orthoft.recipes.search_setup import files_of
from orthoft.recipes.search_study import searched
from orthoft.recipes.table import MERGED as MERGED_ROWS
from orthoft.recipes.table import gains, table
from orthoft.recipes.task_schema import Task
from orthoft.recipes.train_to_merge import chosen_before, read_subspace, save_subspaces
from orthoft.recipes.whole import write_whole_json

Say = Callable[[str], None]


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
        refuse_own_inputs(recipe, base, run.out)
        run.read(chosen)
        opened = output_opened(recipe, run.out, again, tasks, say, run.outdated())
        with opened if state.is_main_process else nullcontext():
            state.wait_for_everyone()
            run.finetune()
            if until == "finetune" or not state.is_main_process:
                return run.results
            run.evaluate()
            if recipe.merge is not None:
                run.merge(recipe.merge)
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
        }
        self.evaluation = Evaluation(recipe, base, out, self.results["versions"], self.say)
        self.results |= {"scores": self.evaluation.scores, "samples": self.evaluation.samples}

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
            self.ready = read_tasks(self.recipe, tasks, self.base)

    def outdated(self) -> list[str]:
        """Return the tasks whose finished experts are of another training."""
        there = [ready for ready in self.ready if (self.expert(ready.task.name) / FINISHED).is_file()]
        return [ready.task.name for ready in there if finished(self.expert(ready.task.name), ready.mark) is None]

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
                self.evaluation.kept.forget()
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
        state, folder = PartialState(), self.out / SUBSPACES
        to_train = [r for r in self.ready if finished(self.expert(r.task.name), r.mark) is None]
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

    def _with_head(self, ready: Ready, fit: bool) -> Ready:
        """Fit the probe in the main process, and let every process read it from disk."""
        state, file, name = PartialState(), head_file(self.expert(ready.task.name)), ready.task.name
        if state.is_main_process and (fit or not file.is_file()):
            with self.timed("probe"), roomy(f"{name} probe", LOWER):
                ready.kind.fit(self.evaluation.load(self.base), ready.data, self.recipe.evaluate.batch_size).save(file)
        state.wait_for_everyone()
        return replace(ready, head=Head.load(file))

    def evaluate(self) -> None:
        """Score the base and the experts."""
        self.say("evaluating")
        with self.timed("evaluate"):
            self.evaluation.base_and_experts(self.ready)

    def merge(self, wanted: Merge) -> None:
        """Merge the experts, write the exports, and score each as a stranger would load it, quantised as the base."""
        export, words = self.recipe.export, wanted.given(len(self.ready))
        self.measure(wanted)
        if wanted.search is not None:
            words = self.search(wanted.search)
        self.say("merging")
        merged = self._merged("merge", self.out / MERGED, words, output="checkpoint", dtype=export.dtype)
        for note in merged.notes:
            self.say(f"  {note}")
        norms = {weight.name: weight.norm for weight in merged.merged}
        self.score_merged(norms, wanted.refit_heads)
        if export.lora is not None:
            self._merged("merge-lora", self.out / MERGED_LORA, words, output="lora", rank=export.lora.rank)
            with self.timed("evaluate"):
                self.evaluation.score("merge-lora", self.evaluation.load(self.base, self.out / MERGED_LORA), self.ready)
        if (harness := self.recipe.evaluate.harness) is not None:
            release_memory()
            with self.timed("harness"):
                self.results["harness"] = run_harness(self.recipe, harness, self.out / MERGED, self.say)

    def measure(self, wanted: Merge) -> None:
        """Measure what the methods that the recipe names merge with, if they take numbers from data."""
        named = (wanted.method, *((wanted.search.methods or ()) if wanted.search else ()))
        for kind, method in {STATISTICS_OF[name]: name for name in named if name in STATISTICS_OF}.items():
            self.say(f"measuring the experts for {method}")
            with self.timed("statistics"), roomy(f"{kind} statistics", LOWER):
                measured(self.recipe, self.base, self.ready, kind, wanted.statistics, self.say)
            release_memory()

    def search(self, wanted: MergeSearch) -> dict[str, Any]:
        """Return the words of the merge that does best on the tuning splits; another search there steps aside."""
        self.say("searching a merge")
        with self.timed("search"):
            found = searched(self.recipe, self.base, self.ready, wanted, None, self.say)
        release_memory()
        told = {"best": found.best.name, "value": found.best.value, "merge": found.best.words}
        self.results["search"] = told | {"trials": len(found.trials), "file": str(self.out / SEARCH / RESULT)}
        return found.best.words

    def score_merged(self, norms: Mapping[str, float], refit: bool) -> None:
        """Score the merged model, and once more under heads that are fitted anew on its features, if wanted."""
        with self.timed("evaluate"):
            self.results["export_check"] = export_check(self.base, self.out / MERGED, norms)
            model = self.evaluation.load(self.out / MERGED)
            self.evaluation.score("merge", model, self.ready)
        if not refit:
            return
        self.say("fitting the heads anew")
        with self.timed("probe"), roomy("merge-refit", LOWER):
            again = refitted(model, self.ready, self.out / MERGED, self.recipe.evaluate.batch_size)
        with self.timed("evaluate"):
            self.evaluation.score("merge-refit", model, again)

    def _merged(self, row: str, folder: Path, words: Mapping[str, Any], **output: Any) -> MergeReport:
        report = merge(
            self.base,
            [(ready.task.name, self.expert(ready.task.name)) for ready in self.ready],
            folder,
            statistics=files_of(self.recipe, STATISTICS_OF.get(words["method"])),
            overwrite=True,
            seed=self.recipe.seed,
            progress=sys.stderr.isatty(),
            **merge_device(self.recipe.device),
            **output,
            **as_arguments(words),
        )
        self.results[row] = report.to_dict()
        self.results["times"][row] = round(report.seconds, 2)
        return report

    def expert(self, name: str) -> Path:
        return expert_folder(self.out, name)

    def finish(self) -> dict[str, Any]:
        """Write ``results.json``, show the table and say how to load what was merged."""
        scores, metrics = self.results["scores"], {ready.task.name: ready.task.metric for ready in self.ready}
        merged = [row for row in MERGED_ROWS if row in scores]
        self.results["gain_kept"] = {row: gains(scores, metrics, row) for row in merged}
        told: dict[str, Any] = json.loads(json.dumps(self.results))
        write_cards(told)
        self.evaluation.kept.forget()
        write_whole_json(self.out / RESULTS, told)  # last: it says that all is there
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
