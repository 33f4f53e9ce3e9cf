"""Model cards of a run: of every expert with its scores and its training, of every merge with the table of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from orthoft.citations import citation_section, cited_in
from orthoft.loading import LEARNT_FROM_US, PIPELINES, WITHOUT_US, words_to_adapt
from orthoft.merging import MergeReport
from orthoft.merging.files.tensors import read_json
from orthoft.merging.formats import READERS
from orthoft.merging.reports.card import CARD, adapter_papers, model_card
from orthoft.merging.reports.front_matter import Scored, front_matter
from orthoft.recipes import subspaces
from orthoft.recipes.expert import Ready
from orthoft.recipes.initialise import NEEDS_INPUTS
from orthoft.recipes.kinds import KINDS
from orthoft.recipes.layout import HEADS
from orthoft.recipes.table import MERGED, Rows, metrics_of, table
from orthoft.recipes.whole import write_whole_text

Results = Mapping[str, Any]
# The Hub's words for our kinds of task; a kind that it calls as we do is not here.
HUB_TASKS = {
    "classification": "text-classification",
    "causal-lm": "text-generation",
    "seq2seq": "text2text-generation",
}
OWN_HEADS = (
    "`merge` is scored on {} by the experts' own linear heads, which are not in this folder: each expert's holds its "
    "task's in `heads`."
)
DIRECTIONS = {
    "osrm": "along which the other tasks' inputs vary least",
    "contrastive": "along which its own task's inputs vary much and the others' little",
    "orthogonal": "of one random orthonormal basis, shared out among the tasks",
    "principal": "among the weights' leading singular vectors, shared out among the tasks",
}
PENALTY = "under a penalty on what it changes for the other tasks' inputs"


def write_cards(results: Results) -> list[Path]:
    """Write README.md into the folders of a finished run's experts and merges, by its ``results.json``.

    An expert that came with a card of its own keeps that.
    """
    experts = {task: told for task, told in results["experts"].items() if not told.get("own_card")}
    cards = {Path(told["folder"]): expert_card(results, task) for task, told in experts.items()}
    for row in MERGED:
        if row in results:
            folder = Path(results[row]["output"])
            cards[folder] = merge_card(results, row, MergeReport.load(folder))
    for folder, text in cards.items():
        write_whole_text(folder / CARD, text)
    return [folder / CARD for folder in cards]


def write_expert(results: Results, ready: Ready) -> None:
    """Write what others need of a trained expert beside its adapter: its task's head, and its card so far."""
    name = ready.task.name
    folder = Path(results["experts"][name]["folder"])
    if ready.head is not None:
        ready.head.save(folder / HEADS / f"{name}.safetensors")
    if not results["experts"][name].get("own_card"):
        write_whole_text(folder / CARD, expert_card(results, name))


def _searched(found: Mapping[str, Any] | None) -> list[str]:
    """Return the sentence on how the words of a merge were found, if they were searched."""
    if found is None:
        return []
    return [f"Its words are the best of {found['trials'] + 1} merges on the tuning splits: {found['best']}."]


def expert_card(results: Results, task: str) -> str:
    """Return the model card of one task's expert."""
    recipe, folder = results["recipe"], Path(results["experts"][task]["folder"])
    auto = KINDS[kind_of(results, task)].auto
    kind = str(read_json(folder / "adapter_config.json")["peft_type"])
    name, ours = kind.removeprefix("ORTHOFT_"), kind.startswith("ORTHOFT_")
    apart = [] if "taken_from" in results["experts"][task] else _papers_apart(recipe)
    front = front_matter(
        base=recipe["base"],
        relation="adapter",
        library="peft",
        tags=[name.lower(), "orthoft"],
        pipeline=PIPELINES.get(auto),
        name=task,
        results=scored(results, task),
    )
    lines = [
        front,
        "",
        f"# {name} adapter for {task}",
        "",
        *markdown([["", ""], *_facts(results, task, name)], numbers=False),
        "",
        *_scores(results, task),
        *(_head(task) if (folder / HEADS / f"{task}.safetensors").is_file() else []),
        "## Use",
        "",
        f"```python\n{words_to_adapt(auto, recipe['base'], 'this-folder', ours)}\n```",
        "",
        *_export(ours),
        *citation_section([*(adapter_papers(READERS[kind]) if kind in READERS else []), *apart]),
    ]
    return "\n".join(lines)


def merge_card(results: Results, row: str, report: MergeReport) -> str:
    """Return the model card of a merge; it cites what kept the experts apart after what merged them."""
    card = model_card(report, measured(results, row), scored(results, row))
    more = [paper for paper in _papers_apart(results["recipe"]) if paper not in card]
    return "\n".join([card, *citation_section(more, "Cite, for the training of the experts")]) if more else card


def kept_apart(recipe: Mapping[str, Any]) -> str:
    """Return what kept a recipe's tasks apart before they were merged, in its own words; nothing if nothing did."""
    wanted = recipe.get("train_to_merge") or {}
    method, penalty = wanted.get("method"), wanted.get("penalty")
    told = [method, "frozen" if wanted["frozen"] else "not frozen"] if method else []
    told += [f"ridge {wanted['ridge']:g}"] if method == "contrastive" else []
    told += [f"penalty {penalty:g}"] if penalty else []
    if method in NEEDS_INPUTS or penalty:
        told += [f"{wanted['rows']} rows of each task"] + ["general text"] * bool(wanted["general"])
    return ", ".join(told)


def measured(results: Results, row: str) -> list[str]:
    """Return the lines on a merge's scores: base, experts and merge by task, and the share of the gain it keeps."""
    own = ("merge", "merge-refit") if row == "merge" else (row,)
    others = [name for name in MERGED if name not in own]
    scores = {name: by_task for name, by_task in results["scores"].items() if name not in others}
    if row != "merge":  # whose gain the table tells of
        scores["merge"] = scores.pop(row)
    rows, refit = table(scores, metrics_of(results)).rows, "merge-refit" in scores
    probed = [one["name"] for one in results["recipe"]["tasks"] if "head" in one]
    return [
        *markdown(rows),
        "",
        "On the test splits, one seed. Gain kept is (merge - base) / (expert - base), a share of what training gained.",
        *_searched(results.get("search")),
        *([OWN_HEADS.format(", ".join(probed))] if probed else []),
        *(["`merge-refit` is this model under the heads in `heads`, fitted anew on its features."] if refit else []),
        *_how_trained(results["recipe"]),
    ]


def scored(results: Results, row: str) -> list[Scored]:
    """Return the scores of a row, by task, for the front matter."""
    by_task = results["scores"].get(row, {})
    return [Scored(task, hub_task(kind_of(results, task)), scores) for task, scores in by_task.items()]


def kind_of(results: Results, task: str) -> str:
    """Return the kind of a task of the run."""
    return next(str(one["kind"]) for one in results["recipe"]["tasks"] if one["name"] == task)


def hub_task(kind: str) -> str:
    """Return the Hub's word for a kind of task."""
    return HUB_TASKS.get(kind, kind)


def markdown(rows: Rows, numbers: bool = True) -> list[str]:
    """Return rows as lines of a Markdown table, the first one as its head; numbers stand to the right."""
    head, *body = rows
    lines = [f"| {' | '.join(row)} |" for row in (head, *body)]
    return [lines[0], f"|---|{('---:|' if numbers else '---|') * (len(head) - 1)}", *lines[1:]]


def _facts(results: Results, task: str, name: str) -> Sequence[Sequence[str]]:
    told, versions = results["experts"][task], results["versions"]
    facts = [
        ["base", f"`{results['recipe']['base']}`"],
        ["task", f"{task} ({hub_task(kind_of(results, task))})"],
        ["trained parameters", f"{told['parameters']:,}"],
    ]
    if "taken_from" in told:
        return [*facts, ["adapter", name], ["taken from", f"`{told['taken_from']}`"]]
    settings = {key: value for key, value in told["adapter"].items() if key != "type"}
    given = yaml.safe_dump(settings, default_flow_style=True, width=10_000).strip() if settings else "defaults"
    loss = [["loss of the last steps", f"{told['losses'][-1][1]:.4g}"]] if told["losses"] else []
    return [
        *facts,
        ["adapter", f"{name}, `{given}`"],
        ["steps", f"{told['steps']:,}, in {told['seconds']:.0f} s"],
        *loss,
        *([["kept apart", told_apart]] if (told_apart := kept_apart(results["recipe"])) else []),
        ["seed", str(results["recipe"]["seed"])],
        ["trained with", ", ".join(f"{package} {number}" for package, number in versions.items())],
    ]


def _how_trained(recipe: Mapping[str, Any]) -> list[str]:
    """Return the sentence on a merge's card that says how its experts were trained to be merged, if they were."""
    if not (told := kept_apart(recipe)):
        return []
    wanted = recipe["train_to_merge"]
    reads = "reads" if wanted["frozen"] else "began to read"
    ways = [f"{reads} its inputs through directions {DIRECTIONS[wanted['method']]}"] if wanted["method"] else []
    ways += [f"was trained {PENALTY}"] if wanted["penalty"] else []
    elsewhere = any(task.get("expert") for task in recipe["tasks"]) or (recipe.get("merge") or {}).get("sources")
    who = "experts of this run's own training" if elsewhere else "experts"
    return [f"The {who} were trained to be merged: each {' and '.join(ways)} ({told})."]


def _papers_apart(recipe: Mapping[str, Any]) -> list[str]:
    """Return the papers of the way in which a recipe chose its tasks' subspaces."""
    method = (recipe.get("train_to_merge") or {}).get("method")
    return cited_in(getattr(subspaces, method)) if method else []


def _scores(results: Results, task: str) -> list[str]:
    """Return the scores of base and expert on the task, of every metric; nothing before they are known."""
    rows = {label: results["scores"].get(row, {}).get(task) for label, row in (("base", "base"), ("adapted", task))}
    if any(found is None for found in rows.values()):
        return []
    names = list(rows["adapted"])
    lines = [[row, *(f"{found[name]:.4g}" for name in names)] for row, found in rows.items()]
    return ["## Measured", "", *markdown([["on the test split", *names], *lines]), ""]


def _head(task: str) -> list[str]:
    return [
        "## Head",
        "",
        f"{task} is scored by a linear head on this model's features: `weight` and `bias` in "
        f"`{HEADS}/{task}.safetensors`; `{HEADS}/{task}.json` has the classes and says how the features are made.",
        "",
    ]


def _export(ours: bool) -> list[str]:
    return [LEARNT_FROM_US, "", WITHOUT_US, ""] if ours else []
