"""Search of merges: what is tried, that trying leaves no trace, that it is the merge on disk, and that it pays."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from merging_files import save_base
from peft import get_peft_model
from tiny import label_task, save_bert, save_llama, text_task
from torch import nn
from transformers import AutoModel

from orthoft.adapters import ADAPTERS
from orthoft.merging import METHODS, merge, plan
from orthoft.recipes import load, run
from orthoft.recipes.live_merge import LiveMerge, held_bytes
from orthoft.recipes.merge_job import load_job
from orthoft.recipes.search import search
from orthoft.recipes.search_report import Trial, beats, thin
from orthoft.recipes.search_setup import Aim, left_out, open_live, open_study, tried_here
from orthoft.recipes.search_space import RANGES, Range, choices, start
from orthoft.recipes.search_study import Search

pytest.importorskip("optuna")
Words = dict[str, Any]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Words:
    """A recipe whose two experts, both with low-rank factors, are trained."""
    folder = tmp_path_factory.mktemp("search")
    save_bert(folder / "bert")
    recipe = {
        "name": "tiny",
        "base": str(folder / "bert"),
        "output": str(folder / "out"),
        "defaults": {
            "kind": "classification",
            "max_length": 16,
            "adapter": {"type": "hra", "r": 4, "target_modules": "all-linear", "exclude_modules": ["pooler.dense"]},
            "training": {"max_steps": 120, "per_device_train_batch_size": 16, "learning_rate": 1e-2},
        },
        "tasks": [
            {"name": "a", "data": label_task(folder / "a", 0, seed=0)},
            {"name": "b", "data": label_task(folder / "b", 2, seed=1)},
        ],
        "merge": {"method": "mean", "params": {}},
    }
    run(recipe, until="finetune")
    return recipe


@pytest.fixture
def copied(words: Words, tmp_path: Path) -> Words:
    """The same recipe with an output folder of its own."""
    shutil.copytree(words["output"], tmp_path / "out", ignore=shutil.ignore_patterns("search"))
    return words | {"output": str(tmp_path / "out")}


def live(words: Words) -> LiveMerge:
    recipe = load(words)
    return open_live(recipe, Path(recipe.base), memory=1.0)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


MERGES: list[Words] = [
    {"method": "task_arithmetic", "weights": [0.7, 1.1], "scale": 0.9},
    {"method": "opcm", "alpha": 0.3},
    {"method": "ties", "space": "full", "density": 0.4},
    {"method": "dare", "space": "core", "drop": 0.3, "scale": 0.5},
    {"method": "mean", "rescale": "model"},
    {"method": "mean", "space": "rotation", "overrides": {"*query*": {"scale": 0.5}}},
    {"method": "tsv", "isotropise": True, "exclude": ["*.1.*"]},
]


@pytest.mark.parametrize("merging", MERGES, ids=[m["method"] + m.get("space", "") for m in MERGES])
def test_a_merge_in_memory_is_the_merge_on_disk_and_is_undone(words: Words, merging: Words, tmp_path: Path) -> None:
    tried = live(words)
    before = state(tried.model)
    experts = [(name, Path(words["output"]) / "experts" / name) for name in "ab"]
    merge(words["base"], experts, tmp_path / "merged", diagnostics=False, progress=False, **merging)
    disk = AutoModel.from_pretrained(tmp_path / "merged").state_dict()
    with tried.changed(tried.merged(merging)):
        inside = state(tried.model)
    assert any(not torch.equal(inside[name], before[name]) for name in before)
    for name, tensor in disk.items():
        assert torch.equal(inside[name], tensor), name
    for name, tensor in tried.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_an_error_in_the_block_is_undone_as_well(words: Words) -> None:
    tried = live(words)
    before = state(tried.model)
    with pytest.raises(KeyboardInterrupt), tried.changed(tried.held[0].deltas):
        raise KeyboardInterrupt
    for name, tensor in tried.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_factors_stay_factors_and_are_counted(words: Words) -> None:
    tried = live(words)
    assert {delta.rank() for source in tried.held for delta in source.deltas.values()} == {4}
    held = {name: delta.shape for name, delta in tried.held[0].deltas.items()}
    assert held_bytes(tried.planned({"method": "mean"})) == 4 * sum(
        2 * m * n + 2 * 4 * (m + n) for m, n in held.values()
    )
    with pytest.raises(
        ValueError, match=r"weights, deltas and a merge take up to 0\.0 GB, more than the 1e-09 GB of --memory"
    ):
        search(words, memory=1e-9)


FEW = {"methods": ["task_arithmetic", "ties", "opcm"], "trials": 7}


def broken_off(number: int) -> Any:
    """Return `Search._tried`, interrupted in the trial of this number."""
    whole = Search._tried

    def tried(self: Search, at: int | None, words: Words) -> Trial:
        if at == number:
            raise KeyboardInterrupt
        return whole(self, at, words)

    return tried


def told(result: Words) -> list[Words]:
    return [{key: trial[key] for key in ("number", "words", "scores", "value")} for trial in result["trials"]]


@pytest.fixture(scope="module")
def found(words: Words) -> Words:
    return search(words, rows=48, **FEW)


def test_the_best_is_no_worse_than_the_recipe_and_any_default(found: Words) -> None:
    values = [trial["value"] for trial in found["trials"]]
    best = found["own"] if found["best"] == "recipe" else found["trials"][found["best"]]
    assert best["value"] == max([found["own"]["value"], *values]) == found["gain_kept"]["tuning"]["mean"]
    assert len(values) == 7
    assert [trial["words"]["method"] for trial in found["trials"][:3]] == FEW["methods"]
    assert all(trial["words"]["scale"] == 1.0 for trial in found["trials"][:3])
    assert best["value"] > values[0]  # the sum as it comes


def test_the_scores_are_those_of_the_model_that_is_written(found: Words, words: Words, tmp_path: Path) -> None:
    """What ``merge.yaml`` writes, loaded by transformers alone, has the accuracies that the search tells of it."""
    from orthoft.recipes.expert import read_experts
    from orthoft.recipes.models import load_model

    job = Path(words["output"]) / "search" / "merge.yaml"
    merge(**load_job(job, [f"output={tmp_path / 'merged'}"]).arguments(), progress=False)
    model = load_model("classification", tmp_path / "merged", None)
    recipe = load(words)
    for ready in read_experts(recipe, Path(recipe.base)):
        scores = ready.kind.score(model, ready.head, ready.data.test, 32, "")
        assert scores == pytest.approx(found["test"]["merge"][ready.task.name], abs=1e-6)


def test_the_section_is_one_of_a_recipe(found: Words, words: Words) -> None:
    checked = load(words | {"merge": found["merge"]})
    assert checked.merge is not None
    assert checked.merge.method == found["merge"]["method"]


@pytest.mark.parametrize("method", ["mean", "task_arithmetic"])
def test_methods_that_commute_are_tried_in_rotation_too(method: str, words: Words) -> None:
    """It is not isometric, so that they are another merge there; the isometric spaces are one to them."""
    tried = live(words)
    aim = Aim([method, "ties"], None, None, "gain", False, False, 0)
    (commuting, other), _ = tried_here(tried, aim)
    assert commuting.spaces == ("auto", "rotation")
    assert other.spaces[0] == "full"
    assert start(commuting, ["a", "b"])[f"{method}.space"] == "auto"
    auto, turned = (tried.merged({"method": method, "space": space}) for space in commuting.spaces)
    assert any(not torch.allclose(auto[name].dense(), turned[name].dense(), rtol=0.02) for name in auto)


@pytest.mark.parametrize(("kind", "words"), [("oftv2", {"block_size": 8}), ("hra", {"r": 4})])
def test_rotations_of_a_conv1d_are_tried_as_such(kind: str, words: Words, tmp_path: Path) -> None:
    base, experts = save_base(tmp_path / "gpt2", "gpt2"), [tmp_path / name for name in "ab"]
    for seed, expert in enumerate(experts):
        torch.manual_seed(seed)
        config = ADAPTERS[kind](**words, target_modules=["c_attn", "c_fc"], init_weights=False)
        get_peft_model(AutoModel.from_pretrained(base), config).save_pretrained(expert)
    todo = plan(base, list(zip("ab", experts, strict=True)), method="mean", space="full")
    tried = LiveMerge(todo, AutoModel.from_pretrained(base))
    (mean,), _ = tried_here(tried, Aim(["mean"], None, None, "gain", False, False, 0))
    assert mean.spaces == ("auto", "rotation")
    words_of = {"method": "mean", "space": "rotation"}
    merge(base, list(zip("ab", experts, strict=True)), tmp_path / "merged", progress=False, **words_of)
    disk = AutoModel.from_pretrained(tmp_path / "merged").state_dict()
    with tried.changed(tried.merged(words_of)) as model:
        assert all(torch.equal(tensor, disk[name]) for name, tensor in model.state_dict().items())


def test_what_a_run_scores_otherwise_is_a_note(words: Words) -> None:
    assert left_out(load(words)) == []
    (note,) = left_out(load(words, ["quantization.load_in_4bit=true"]))
    assert note.startswith("quantization is left out: base, experts and merges are scored whole")


def test_a_seed_gives_the_same_trials_broken_off_or_not(
    found: Words, copied: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    for trial in (1, 4):  # the end comes amid a method's defaults, and amid a draw
        with monkeypatch.context() as patch:
            patch.setattr(Search, "_tried", broken_off(trial))
            with pytest.raises(KeyboardInterrupt):
                search(copied, rows=48, **FEW)
    lines: list[str] = []
    again = search(copied, rows=48, say=lines.append, **FEW)
    assert lines[0] == "4 trials done before"
    assert told(again) == told(found)
    assert again["best"] == found["best"]
    other = search(copied, rows=48, seed=1, overwrite=True, **FEW)
    assert told(other)[:3] == told(found)[:3]  # the defaults
    assert told(other)[3:] != told(found)[3:]


def test_a_search_whose_last_line_was_cut_off_goes_on(copied: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    few: Words = {"methods": ["mean", "ties"], "rows": 8}
    want = told(search(copied, trials=3, **few))
    journal = Path(copied["output"], "search", "search.journal")
    whole = journal.read_bytes()
    monkeypatch.setattr(os, "symlink", lambda *_: pytest.fail("Optuna's lock would outlive a process that is killed"))
    for cut in (len(whole) // 2, len(whole) - 3, 1):
        journal.write_bytes(whole[:cut])
        assert told(search(copied, trials=3, **few)) == want
        assert all(json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines())


def test_a_search_of_something_else_is_refused(copied: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    search(copied, trials=1, methods=["mean"])
    with monkeypatch.context() as patch:
        patch.setattr(Search, "_score", lambda *_: pytest.fail("a model was scored before"))
        with pytest.raises(FileExistsError, match="holds a search with other methods, tried: give --overwrite"):
            search(copied, trials=1, methods=["ties"])
        with pytest.raises(FileExistsError, match="holds a search with other objective: give --overwrite"):
            search(copied, trials=1, methods=["mean"], objective="loss")
    assert len(search(copied, trials=1, methods=["ties"], overwrite=True)["trials"]) == 1


def test_a_search_begun_while_another_scored_is_refused(tmp_path: Path) -> None:
    assert not open_study(tmp_path, {"objective": "loss"}, 1, overwrite=False).trials
    assert not open_study(tmp_path, {"objective": "loss"}, 1, overwrite=False).trials
    with pytest.raises(FileExistsError, match="holds a search with other objective: give --overwrite"):
        open_study(tmp_path, {"objective": "gain"}, 1, overwrite=False)


@pytest.mark.parametrize(("changed", "word"), [("tasks.1.metric=f1", "metrics"), ("export.dtype=bfloat16", "dtype")])
def test_a_search_by_other_numbers_is_refused(changed: str, word: str, copied: Words) -> None:
    search(copied, trials=1, methods=["mean"])
    with pytest.raises(FileExistsError, match=f"holds a search with other {word}: give --overwrite"):
        search(copied, [changed], trials=2, methods=["mean"])


def test_the_recipes_own_merge_is_tried_without_heads_fitted_anew(copied: Words) -> None:
    plain = search(copied, trials=1, methods=["mean"])
    fitted = search(copied | {"merge": copied["merge"] | {"refit_heads": True}}, trials=1, methods=["mean"])
    assert fitted["own"]["value"] is not None
    assert fitted["own"]["scores"] == plain["own"]["scores"]
    assert "merge.refit_heads is left out: every merge is scored with the experts' heads" in fitted["notes"]


def test_what_the_recipe_leaves_out_is_left_out(copied: Words) -> None:
    merging = copied["merge"] | {"exclude": ["*.1.*"]}
    result = search(copied | {"merge": merging}, trials=1, methods=["mean"], equal_weights=True)
    assert result["trials"][0]["words"]["exclude"] == ["*.1.*"]
    assert result["trials"][0]["scores"] == result["own"]["scores"]


@pytest.mark.filterwarnings("ignore:Fixed parameter")
def test_a_merge_that_is_refused_is_a_failed_trial(copied: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RANGES, "alpha", Range(2.0, 3.0))  # the default is tried first, and is all right
    result = search(copied, trials=3, methods=["opcm"])
    assert [trial["value"] is None for trial in result["trials"]] == [False, True, True]
    assert result["trials"][1]["error"].startswith("alpha is a share of the singular values, in [0, 1], got ")
    assert result["best"] in ("recipe", 0)


def test_the_front_between_the_tasks(copied: Words) -> None:
    result = search(copied, trials=6, methods=["task_arithmetic"], pareto=True)
    points = {trial["number"]: [trial["scores"][task]["accuracy"] for task in "ab"] for trial in result["trials"]}
    points[None] = [result["own"]["scores"][task]["accuracy"] for task in "ab"]
    assert set(result["front"]) == {n for n, p in points.items() if not any(beats(q, p) for q in points.values())}
    page = (Path(copied["output"]) / "search" / "search.html").read_text(encoding="utf-8")
    assert page.count("<circle") == 6 + 7
    assert page.count("<svg") == 2
    assert "http" not in page


@pytest.mark.parametrize("objective", ["score", "loss"])
def test_other_objectives(objective: Any, copied: Words) -> None:
    result = search(copied, trials=1, methods=["mean"], objective=objective, equal_weights=True)
    (trial,) = result["trials"]
    scores = [trial["scores"][task][{"score": "accuracy", "loss": "loss"}[objective]] for task in "ab"]
    assert trial["value"] == pytest.approx(sum(scores) / 2 * (1 if objective == "score" else -1))
    assert "weights" not in trial["words"]


def test_what_cannot_be_tried_is_a_note_or_an_error(copied: Words) -> None:
    result = search(copied, trials=1, spaces=["core"])
    assert any(
        note.startswith("fisher is left out: it needs fisher statistics of each task: `orthoft statistics")
        for note in result["notes"]
    )
    for words, message in (
        ({"methods": ["tiess"]}, "unknown merge method 'tiess', did you mean 'ties'?"),
        ({"spaces": ["cor"]}, "unknown space 'cor', did you mean 'core'?"),
        ({"methods": ["regmean"]}, "regmean cannot be tried here: it needs gram statistics of each task"),
        ({"trials": 0}, "trials is a number above 0, got 0"),
    ):
        with pytest.raises(ValueError, match=message.replace("?", r"\?")) as error:
            search(copied, **words)  # type: ignore[arg-type]
        assert len(str(error.value).splitlines()) == 1


def test_without_experts_it_says_what_makes_them(words: Words, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the expert .* is not there: train it by `orthoft finetune`"):
        search(words | {"output": str(tmp_path / "none")})
    with pytest.raises(ValueError, match="is of another recipe or other data: train it by `orthoft finetune`"):
        search(words, ["tasks.0.training.max_steps=3"])


def test_without_optuna_it_says_how_to_install_it(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"pip install 'orthoft\[search\]'"):
        search(words)


def test_every_default_is_in_its_range() -> None:
    numbers = 0
    for name, method in METHODS.items():
        if method.needs("statistics"):
            continue
        for key, kind in method.parameters.types.items():
            default, possible = (
                method.parameters.defaults[key],
                choices(name, key, kind, method.parameters.defaults[key]),
            )
            if isinstance(possible, Range):
                numbers += 1
                assert possible.low <= default <= possible.high, f"{name}.{key}"
            elif possible:
                assert default in possible, f"{name}.{key}"
    assert numbers > 10


def test_a_gain_that_is_noise_is_told() -> None:
    scores = {"base": {"x": {"accuracy": 0.7}, "y": {"accuracy": 0.7}}}
    scores |= {"x": {"x": {"accuracy": 0.74}}, "y": {"y": {"accuracy": 0.9}}}
    (note,) = thin(scores, {"x": 100, "y": 100}, {"x": "accuracy", "y": "accuracy"})
    assert note.startswith("x: its expert gains 0.040 on 100 tuning rows")
    assert thin(scores, {"x": 10_000, "y": 100}, {"x": "accuracy", "y": "accuracy"}) == []


def test_language_models_are_searched_by_their_loss(tmp_path: Path) -> None:
    save_llama(tmp_path / "llama")
    recipe = {
        "name": "tongues",
        "base": str(tmp_path / "llama"),
        "output": str(tmp_path / "out"),
        "defaults": {
            "kind": "causal-lm",
            "block_size": 16,
            "adapter": {"type": "hra", "r": 4, "target_modules": "all-linear"},
            "training": {"max_steps": 20, "per_device_train_batch_size": 8, "learning_rate": 3e-2},
        },
        "tasks": [
            {"name": "up", "data": text_task(tmp_path / "up", 1, seed=0)},
            {"name": "skip", "data": text_task(tmp_path / "skip", 5, seed=1)},
        ],
    }
    run(recipe, until="finetune")
    result = search(recipe, trials=4, methods=["mean"])
    best = result["trials"][result["best"]]
    assert result["own"] is None
    for task in ("up", "skip"):
        assert best["scores"][task]["loss"] < result["tuning"]["base"][task]["loss"]
        assert result["tuning"][task][task]["loss"] < result["tuning"]["base"][task]["loss"]
    assert best["value"] == max(trial["value"] for trial in result["trials"]) > 0


def test_from_the_command_line(copied: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import orthoft.cli.search
    from orthoft.cli import main

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(copied), encoding="utf-8")
    arguments = ["search", str(recipe), "--trials", "2", "--method", "mean", "--rows", "20", "--equal-weights"]
    with pytest.raises(SystemExit) as done:
        main(arguments)
    told = capsys.readouterr().out
    assert done.value.code == 0
    assert "gain kept" in told
    assert yaml.safe_load(told[told.index("\nmerge:") : told.index("\nresults:")])["merge"]["method"] == "mean"
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--method", "tiess"])
    assert done.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown merge method 'tiess', did you mean 'ties'?")
    assert orthoft.cli.search.__doc__


def test_a_number_that_nobody_knows_is_tried_around_its_default() -> None:
    assert choices("new", "warmth", float, 0.5) == Range(0.125, 1.0, log=True)
    assert choices("new", "warmth", float, 3.0) == Range(0.75, 12.0, log=True)
    assert choices("new", "warmth", float | None, None) == ()
    assert choices("new", "calm", bool, False) == (False, True)


def test_the_results_on_disk_are_what_is_returned(found: Words, words: Words) -> None:
    folder = Path(words["output"]) / "search"
    assert json.loads((folder / "search.json").read_text(encoding="utf-8")) == found
    job = yaml.safe_load((folder / "merge.yaml").read_text(encoding="utf-8"))
    assert job["method"] == found["merge"]["method"]
    assert [source["name"] for source in job["sources"]] == ["a", "b"]
