"""One search of a merge: Optuna proposes, each proposal is merged in memory and scored on the tuning splits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState

from orthoft.delta import Delta
from orthoft.merging.files.hub import asked_once, find_folder
from orthoft.merging.statistics import STATISTICS_OF
from orthoft.recipes.data_schema import Split
from orthoft.recipes.devices import roomy
from orthoft.recipes.expert import Ready, read_experts
from orthoft.recipes.layout import SEARCH, expert_folder
from orthoft.recipes.output import tasks_locked
from orthoft.recipes.prepare import check, quiet
from orthoft.recipes.schema import MergeSearch, Recipe, as_arguments
from orthoft.recipes.search_report import (
    BASE,
    JOB,
    MERGE,
    PAGE,
    RESULT,
    Found,
    Trial,
    by_task,
    call,
    thin,
    value,
)
from orthoft.recipes.search_setup import (
    Aim,
    aim_of,
    changed,
    left_out,
    open_live,
    open_study,
    optuna_module,
    refuse_another,
    tried_here,
)
from orthoft.recipes.search_space import start, suggest, tidy
from orthoft.recipes.sources import files_of, marks_of_others, others_of

TRIAL = "trial"  # what Optuna keeps of one beside its draws
TRIALS = 50  # without another budget
RANDOM = 10  # trials, at least, before the model of what is good proposes
PRIME = 100_003  # between the seeds of two searches: no trial of one draws what a trial of the other does
Say = Callable[[str], None]


class Search:
    """One search under way: data, live model, and Optuna's study on disk."""

    def __init__(
        self, recipe: Recipe, base: Path, ready: Sequence[Ready], aim: Aim, memory: float, again: bool | None, say: Say
    ) -> None:
        """Open it; ``again`` says whether to begin anew, None that another search in the way steps aside."""
        self.recipe, self.ready, self.aim, self.say, self.out = recipe, ready, aim, say, Path(recipe.output) / SEARCH
        self.metrics = {task.name: task.metric for task in recipe.tasks}
        self.others = {other.called: other.path for other in others_of(recipe)}
        self.live = open_live(recipe, base, memory)
        self.merged = [source.name for source in self.live.held]
        self.candidates, self.notes = tried_here(self.live, aim)
        wanted = recipe.merge
        self._always = (
            {} if wanted is None else wanted.model_dump(include={"include", "exclude"}, exclude_defaults=True)
        )
        identity = self._identity()
        if again is None:
            self._step_aside(changed(self.out, identity))
        elif not again:
            refuse_another(self.out, identity)  # before anything is scored
        self.notes += left_out(recipe)
        self.scores = self._ends(aim.rows, "tuning")
        self.valued = self._valued()
        self.study = open_study(self.out, identity, len(self.valued) if aim.pareto else 1, bool(again))
        self.own = None if wanted is None else self._tried(None, wanted.given(len(recipe.tasks)))

    def _step_aside(self, what: Sequence[str]) -> None:
        """Give another search in the output a name of its own, if there is one: it may have taken hours."""
        if what:
            kept = next(file for i in count(1) if not (file := self.out.with_name(f"{SEARCH}-{i}")).exists())
            self.out.rename(kept)
            self.say(f"  a search with other {', '.join(what)} was there: it is {kept} now")

    def _identity(self) -> dict[str, Any]:
        tried = {candidate.method.name: list(candidate.spaces) for candidate in self.candidates}
        marks = {ready.task.name: ready.mark for ready in self.ready}
        taken = {STATISTICS_OF[name] for name in tried if name in STATISTICS_OF}
        numbers = {
            kind: {task: dict(one.metadata) for task, one in found.items()}
            for kind, found in self.live.numbers.items()
            if kind in taken
        }
        told = {"tried": tried, "experts": marks, "patterns": self._always}
        more = {"statistics": numbers, "sources": marks_of_others(self.recipe)}
        told |= {key: one for key, one in more.items() if one}
        return {**asdict(self.aim), **told, "metrics": self.metrics, "dtype": self.recipe.export.dtype}

    def _valued(self) -> list[str]:
        """Return the tasks that the objective has a number for."""
        untouched = {**self.scores, MERGE: self.scores[BASE]}
        value(untouched, self.metrics, self.aim.objective)  # refuses experts that gain nothing
        kept = by_task(untouched, self.metrics, self.aim.objective)
        known = [task for task, number in kept.items() if number is not None]
        self.notes += [
            f"{task} does not count: its expert gains nothing on the tuning split" for task in kept if task not in known
        ]
        self.notes += thin(
            self.scores, {r.task.name: len(r.data.tuning[: self.aim.rows]) for r in self.ready}, self.metrics
        )
        return known

    def _ends(self, rows: int | None, split: Split) -> dict[str, dict[str, dict[str, float]]]:
        """Score what the merges are measured by: the base on all tasks, and each expert on its own."""
        found = {BASE: self._score({}, [ready.at_start() for ready in self.ready], rows, split)}
        for source, ready in zip(self.live.held, self.ready, strict=False):  # experts stand first
            found[ready.task.name] = self._score(source.deltas, [ready], rows, split)
        return found

    def _score(
        self, deltas: Mapping[str, Delta], tasks: Sequence[Ready], rows: int | None, split: Split
    ) -> dict[str, dict[str, float]]:
        size = self.recipe.evaluate.batch_size
        found = {}
        with self.live.changed(deltas) as model:
            for ready in tasks:
                examples, name = getattr(ready.data, split)[:rows], ready.task.name
                found[name] = ready.kind.score(model, ready.head, examples, size, name)
        return found

    def _merged(self, words: Mapping[str, Any]) -> dict[str, Delta]:
        return self.live.merged(as_arguments(words))

    def _tried(self, number: int | None, words: dict[str, Any]) -> Trial:
        """Merge, score, undo; a merge that is refused or breaks down is a trial with an error."""
        begin = time.perf_counter()

        def seconds() -> float:
            return round(time.perf_counter() - begin, 3)

        try:
            scores = self._score(self._merged(words), self.ready, self.aim.rows, "tuning")
            found = value({**self.scores, MERGE: scores}, self.metrics, self.aim.objective)
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            return Trial(number, words, {}, None, seconds(), str(error))
        return Trial(number, words, scores, found, seconds())

    def spend(self, trials: int | None, minutes: float | None) -> None:
        """Try until the number of trials is there or the time is over."""
        begin, done = time.monotonic(), self.done()
        self.say(
            f"{len(done)} trials done before" if done else f"{len(self.candidates)} methods, first by their defaults"
        )
        for note in self.notes:
            self.say(f"  note: {note}")
        best = max((t.value for t in (self.own, *done) if t and t.value is not None), default=-math.inf)
        while (trials is None or len(done) < trials) and (minutes is None or time.monotonic() - begin < 60 * minutes):
            done.append(trial := self.step(len(done)))
            if trial.value is not None and trial.value > best:
                best = trial.value
                self.say(f"  {trial.name}: {self.aim.objective} {best:.4f} by {call(trial.words)}")

    def step(self, number: int) -> Trial:
        """Ask, try, tell. What is asked depends on the seed, the number and the trials before, on nothing else."""
        optuna = optuna_module()
        self.study.sampler = optuna.samplers.TPESampler(
            seed=(self.aim.seed * PRIME + number) % 2**32,
            n_startup_trials=max(RANDOM, len(self.candidates)),
            constant_liar=False,  # which looks at trials that were broken off
        )
        waiting = self.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.WAITING])
        if number < len(self.candidates) and not waiting:
            self.study.enqueue_trial(start(self.candidates[number], self.merged))
        asked = self.study.ask()
        words = tidy(suggest(asked, self.candidates, self.merged, self.aim.equal_weights)) | self._always
        trial = self._tried(number, words)
        asked.set_user_attr(TRIAL, asdict(trial))
        if trial.value is None:
            self.study.tell(asked, state=optuna.trial.TrialState.FAIL)
        elif self.aim.pareto:
            kept = by_task({**self.scores, MERGE: trial.scores}, self.metrics, self.aim.objective)
            self.study.tell(asked, [v for task in self.valued if (v := kept[task]) is not None])
        else:
            self.study.tell(asked, trial.value)
        return trial

    def done(self) -> list[Trial]:
        """Return the trials that were tried to their end."""
        return [Trial(**trial.user_attrs[TRIAL]) for trial in self.study.trials if trial.state.is_finished()]

    def finish(self) -> Found:
        """Score the best on the test splits, and write and tell all that is known."""
        done = self.done()
        known = [trial for trial in (self.own, *done) if trial is not None and trial.value is not None]
        if not known:
            raise ValueError(f"no merge worked: {done[0].error if done else 'there was no time for any'}")
        best = max(known, key=lambda trial: trial.value or 0.0)
        self.say("the best, on the test splits")
        merged = self._score(self._merged(best.words), self.ready, None, "test")
        found = Found(
            recipe=self.recipe.name,
            base=self.recipe.base,
            seed=self.recipe.seed,
            dtype=self.recipe.export.dtype,
            experts={task: str(expert_folder(Path(self.recipe.output), task)) for task in self.metrics},
            others=self.others,
            metrics=self.metrics,
            aim=asdict(self.aim),
            tuning=self.scores,
            own=self.own,
            trials=done,
            best=best,
            test={**self._ends(None, "test"), MERGE: merged},
            statistics={
                kind: {task: str(f) for task, f in files_of(self.recipe, kind).items()} for kind in self.live.numbers
            },
            notes=self.notes,
            versions={name: version(name) for name in ("orthoft", "torch", "transformers", "optuna")},
        )
        found.save(self.out)
        self._tell(found)
        return found

    def _tell(self, found: Found) -> None:
        others = [other.model_dump(exclude={"weight"}, exclude_none=True) for other in others_of(self.recipe)]
        words = found.best.words | ({"sources": others} if others else {})  # their weights stand among the others
        section = yaml.safe_dump({"merge": words}, sort_keys=False).strip()
        self.say("")
        self.say(found.table())
        self.say(f"\n{found.best.name} is the best; as a section of a recipe:\n\n{section}\n")
        self.say(f"results: {self.out / RESULT}, pictures: {self.out / PAGE}")
        self.say(f"to write the model: orthoft merge {self.out / JOB}")


def searched(
    recipe: Recipe, base: Path, ready: Sequence[Ready], words: MergeSearch, again: bool | None, say: Say
) -> Found:
    """Search as ``words`` say and return what was found; ``again`` is that of `Search`."""
    with roomy("search", "evaluate.batch_size"):
        under_way = Search(recipe, base, ready, aim_of(words, recipe), words.memory, again, say)
        under_way.spend(TRIALS if words.trials is None and words.minutes is None else words.trials, words.minutes)
        return under_way.finish()


@asked_once()
def search_experts(recipe: Recipe, words: MergeSearch, overwrite: bool, say: Say) -> Found:
    """Search for the experts of a recipe that are there, as `orthoft.recipes.search.search` says."""
    optuna_module()
    with quiet():
        check(recipe)
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        if PartialState().num_processes > 1:
            raise ValueError("a search works in one process: start it without accelerate or torchrun")
        base = find_folder(recipe.base, "base")
        ready = read_experts(recipe, base)
        with tasks_locked(Path(recipe.output), [task.name for task in recipe.tasks]):
            return searched(recipe, base, ready, words, overwrite, say)
