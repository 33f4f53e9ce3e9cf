"""The whole story of a recipe: fine-tune each task, evaluate, merge, export, load the export again, tell."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import release_memory

from orthoft.errors import unknown
from orthoft.hub_place import public_name
from orthoft.merging import MergeReport, merge
from orthoft.merging.files.hub import asked_once, find_folder
from orthoft.merging.statistics import STATISTICS_OF
from orthoft.recipes.cards import write_cards
from orthoft.recipes.devices import merge_device, roomy
from orthoft.recipes.evaluation import LOWER, Evaluation
from orthoft.recipes.expert import Ready
from orthoft.recipes.experts import Experts
from orthoft.recipes.export_check import export_check
from orthoft.recipes.harness import run_harness
from orthoft.recipes.layout import MERGED, MERGED_LORA, RESULTS, SEARCH
from orthoft.recipes.measuring import measured
from orthoft.recipes.models import how_to_load
from orthoft.recipes.output import output_opened, refuse_own_inputs
from orthoft.recipes.prepare import check, quiet
from orthoft.recipes.refit import refitted
from orthoft.recipes.rehearse import rehearse
from orthoft.recipes.schema import Again, Merge, MergeSearch, Recipe, as_arguments
from orthoft.recipes.search_report import RESULT
from orthoft.recipes.search_study import searched
from orthoft.recipes.sources import files_of, sources_of
from orthoft.recipes.table import MERGED as MERGED_ROWS
from orthoft.recipes.table import gains, table
from orthoft.recipes.whole import write_whole_json

Say = Callable[[str], None]


@asked_once()
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
        run.experts.read(chosen)
        opened = output_opened(recipe, run.out, again, tasks, say, run.experts.outdated())
        with opened if state.is_main_process else nullcontext():
            state.wait_for_everyone()
            run.experts.make()
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
        self.results: dict[str, Any] = {
            "recipe": recipe.model_dump(mode="json"),
            "versions": {name: version(name) for name in ("orthoft", "torch", "transformers", "peft")},
            "machine": {"python": platform.python_version(), "threads": torch.get_num_threads()},
            "times": {},
            "experts": {},
        }
        self.evaluation = Evaluation(recipe, base, out, self.results["versions"], self.say)
        self.results |= {"scores": self.evaluation.scores, "samples": self.evaluation.samples}
        self.experts = Experts(recipe, base, self.results, self.evaluation, self.timed, self.say)

    @property
    def ready(self) -> list[Ready]:
        """The tasks, with their examples and heads."""
        return self.experts.ready

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of the block to ``times``."""
        start = time.perf_counter()
        yield
        spent: dict[str, float] = self.results["times"]
        spent[stage] = round(spent.get(stage, 0.0) + time.perf_counter() - start, 2)

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
        for kind, method in {STATISTICS_OF[name]: name for name in wanted.methods if name in STATISTICS_OF}.items():
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
            public_name(self.recipe.base, self.base),
            sources_of(self.recipe),
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
