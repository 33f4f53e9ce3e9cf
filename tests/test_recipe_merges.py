"""Merges of a recipe that need more than experts: numbers from data, measured by the run, and a search before it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_case import recipe, save_models, words_of
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from orthoft.merging import merge
from orthoft.merging.statistics import STATISTICS_OF
from orthoft.recipes import RecipeError, load, run
from orthoft.recipes.measure import measure
from orthoft.recipes.merge_job import load_job
from orthoft.recipes.search import search

Words = dict[str, Any]
FEW = "merge.statistics={examples: 8, only: ['*.query.weight', '*.dense.weight']}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, a recipe, and its trained experts in ``out``."""
    root = tmp_path_factory.mktemp("work")
    save_models(root)
    run(recipe(root, root), until="finetune")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "out", tmp_path / "out")
    return tmp_path


def words(made: Path, root: Path, *overrides: str) -> Words:
    return words_of(made, root / "out", *overrides)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", {kind: method for method, kind in sorted(STATISTICS_OF.items())}.values())
def test_a_run_measures_what_its_method_merges_with(method: str, made: Path, root: Path) -> None:
    """Its merge is that of the files, which say how they were measured, and not the mean that it would be without."""
    results = run(words(made, root, f"merge={{method: {method}}}", FEW))
    kind, experts = STATISTICS_OF[method], [(name, root / "out" / "experts" / name) for name in "ab"]
    files = {name: root / "out" / "statistics" / f"{name}-{kind}.safetensors" for name in "ab"}
    for file in files.values():
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata()["kind"] == kind
            assert {name.rpartition(".")[0].rpartition(".")[2] for name in opened.keys()} == {"query", "dense"}  # noqa: SIM118
    merge(made / "bert", experts, root / "again", method=method, statistics=files, progress=False)
    merge(made / "bert", experts, root / "mean", method="mean", progress=False)
    assert same(root / "out" / "merged", root / "again")
    assert not same(root / "out" / "merged", root / "mean")
    assert not any("without statistics is the mean" in note for note in results["merge"]["notes"])
    assert results["times"]["statistics"] > 0


def test_files_are_taken_up_unless_the_recipe_says_other_words(made: Path, root: Path) -> None:
    """What `orthoft statistics` measured longer stays; what the recipe asks for otherwise is measured again."""
    told, lines = words(made, root, "merge={method: regmean}"), list[str]()
    files = [Path(file) for file in measure(told, kind="gram", examples=5)["files"].values()]
    before = [file.read_bytes() for file in files]
    run(told, say=lines.append)
    assert [file.read_bytes() for file in files] == before
    assert [line for line in lines if "taken up" in line] == ["  gram of a: taken up", "  gram of b: taken up"]
    other, lines = words(made, root, "merge={method: regmean, statistics: {examples: 6}}"), []
    run(other, keep_experts=True, say=lines.append)
    assert [line for line in lines if "examples" in line] == [f"  gram of {name}: 6 examples at most" for name in "ab"]
    assert all(file.read_bytes() != kept for file, kept in zip(files, before, strict=True))


def test_a_run_searches_and_writes_what_does_best(made: Path, root: Path) -> None:
    pytest.importorskip("optuna")
    methods = ["task_arithmetic", "mean", "regmean"]
    told = words(
        made,
        root,
        "merge={method: regmean}",
        f"merge.search={{trials: 5, methods: {methods}, rows: 40, objective: score}}",
        FEW,
    )
    results = run(told)
    best = results["search"]
    assert best["trials"] == 5
    job = load_job(root / "out" / "search" / "merge.yaml", [f"output={root / 'again'}"])
    merge(**job.arguments(), progress=False)
    assert same(root / "out" / "merged", root / "again")
    assert results["merge"]["config"]["method"] == best["merge"]["method"]
    found = search(told, trials=6)  # goes on with the recipe's words
    assert found["aim"]["rows"] == 40
    assert {trial["words"]["method"] for trial in found["trials"][:3]} == set(methods)
    assert len(found["trials"]) == 6
    assert found["own"]["words"]["method"] == "regmean"
    assert found["own"]["scores"] != next(t for t in found["trials"] if t["words"]["method"] == "mean")["scores"]
    more = run(told | {"merge": told["merge"] | {"statistics": {"examples": 9}}}, keep_experts=True)
    assert len(list((root / "out").glob("search-*"))) == 1  # by other numbers: the one before is kept
    assert more["search"]["trials"] == 5
    card = (root / "out" / "merged" / "README.md").read_text(encoding="utf-8")
    assert f"the best of 6 merges on the tuning splits: {more['search']['best']}." in card
    again = run(
        {**told, "merge": {**told["merge"], "search": {"trials": 1, "methods": ["mean"], "objective": "score"}}},
        keep_experts=True,
    )
    assert again["search"]["trials"] == 1  # of another aim: begun anew


def test_what_a_search_names_is_measured_too(made: Path, root: Path) -> None:
    pytest.importorskip("optuna")
    search_words = "merge.search={trials: 1, methods: [regmean], objective: score}"
    results = run(words(made, root, "merge={method: mean}", search_words, FEW))
    assert (root / "out" / "statistics" / "a-gram.safetensors").is_file()
    assert results["search"]["trials"] == 1


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("merge.search={methods: [tiess]}", "merge.search: unknown merge method 'tiess', did you mean 'ties'?"),
        ("merge.search={spaces: [cor]}", "merge.search: unknown space 'cor', did you mean 'core'?"),
        ("merge.search={trials: 0}", "merge.search.trials: expected greater than 0, got 0"),
        ("merge.search={tirals: 3}", "merge.search.tirals: unknown key, did you mean 'trials'?"),
        ("merge.statistics={examples: 0}", "merge.statistics.examples: expected greater than 0, got 0"),
        ("merge.statistics={only: []}", "merge.statistics.only: "),
        ("merge={method: regmean, statistics: {only: ['*.LayerNorm.weight']}}", "merge.statistics.only: the model has"),
    ],
)
def test_a_mistake_in_them_is_one_line_before_any_work(override: str, line: str, made: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(RecipeError) as error:
        run(made / "recipe.yaml", [f"output={tmp_path / 'out'}", override])
    assert str(error.value).startswith(line)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_lora_of_a_merge_that_is_searched_needs_a_rank(made: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"export\.lora\.rank is needed: merge\.search may find"):
        load(made / "recipe.yaml", [f"output={tmp_path}", "merge.search={trials: 1}", "export.lora={}"])


def test_the_words_of_a_search_are_those_of_the_call() -> None:
    """Each word of ``merge.search`` is an argument of `search`, so that none of the two knows more."""
    import inspect

    from orthoft.recipes.schema import MergeSearch

    assert set(MergeSearch.model_fields) <= set(inspect.signature(search).parameters)
