"""Every kind of task from the words of a recipe to a merged model that a stranger loads; a new kind is a new case."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from kind_cases import CASES, Case, Words, files
from safetensors.torch import load_file, save_file
from tiny import write_rows

from orthoft.recipes import RecipeError, load, run
from orthoft.recipes.head import Head
from orthoft.recipes.initialise import covariances
from orthoft.recipes.kinds import KINDS, kind_of
from orthoft.recipes.models import load_model
from orthoft.recipes.search import search
from orthoft.recipes.shipped import json_schema
from orthoft.recipes.table import results_table
from orthoft.recipes.task_schema import LOWER_IS_BETTER


@dataclass(frozen=True)
class Story:
    """A case that was run, with its recipe, folder and results."""

    case: Case
    folder: Path
    words: Words
    results: dict[str, Any]

    @property
    def out(self) -> Path:
        return Path(self.words["output"])


@pytest.fixture(scope="module", params=CASES, ids=[f"{case.kind}-{case.architecture}" for case in CASES])
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Story:
    case, folder = request.param, tmp_path_factory.mktemp("story")
    (folder / "base").mkdir()
    case.base(folder / "base")
    for which, name in enumerate("ab"):
        case.data(folder / name, which, seed=which)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(case.recipe(folder, folder / "out")), encoding="utf-8")
    return Story(case, folder, yaml.safe_load(file.read_text(encoding="utf-8")), run(file))


def test_every_kind_has_a_case() -> None:
    assert {case.kind for case in CASES} == KINDS.keys()


def test_experts_learn_and_the_merge_is_scored_by_the_words_of_the_task(story: Story) -> None:
    scores = story.results["scores"]
    metric = load(story.words).tasks[0].metric
    sign = -1 if metric in LOWER_IS_BETTER else 1
    for name in "ab":
        assert sign * scores[name][name][metric] > sign * scores["base"][name][metric] + 0.02
        assert metric in scores["merge"][name]
        assert all(math.isfinite(value) for value in scores["merge"][name].values())
    assert set(story.results["gain_kept"]["merge"]) == {"a", "b", "mean"}


def test_a_stranger_gets_the_scores_of_the_export(story: Story) -> None:
    recipe = load(story.words)
    for task in recipe.tasks:
        # running text is packed in the order of the shuffled rows
        rows = [json.loads(line) for line in Path(task.data.test).read_text(encoding="utf-8").splitlines()]
        random.Random(recipe.seed).shuffle(rows)
        heads = {"merge": story.out / "heads"}
        if story.case.has_heads:
            heads["merge-refit"] = story.out / "merged" / "heads"
        for row, folder in heads.items():
            head = folder / f"{task.name}.safetensors"
            with torch.no_grad():
                found = story.case.stranger(story.out / "merged", head, rows, task.model_dump())
            told = story.results["scores"][row][task.name]
            assert found == pytest.approx({key: told[key] for key in found}, abs=1e-4)


def test_heads_fitted_anew_are_probes_of_the_merged_model(story: Story) -> None:
    if not story.case.has_heads:
        with pytest.raises(RecipeError, match=r"merge.refit_heads is for tasks with a head, 'a' has none"):
            load(story.words, ["merge.refit_heads=true"])
        return
    recipe = load(story.words)
    kind, merged = kind_of(recipe.tasks[0], Path(recipe.base)), story.out / "merged"
    wanted = kind.fit(load_model(story.case.kind, merged, None), kind.data(recipe.seed), 16)
    found, before = (Head.load(folder / "heads" / "a.safetensors") for folder in (merged, story.out))
    torch.testing.assert_close(found.weight, wanted.weight, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(found.weight, before.weight, atol=1e-2)
    assert "`merge-refit` is this model under the heads in `heads`" in (merged / "README.md").read_text("utf-8")
    assert set(story.results["gain_kept"]) == {"merge", "merge-refit"}


def test_neither_the_order_of_rows_nor_the_size_of_batches_changes_scores(story: Story) -> None:
    recipe = load(story.words)
    kind = kind_of(recipe.tasks[0], Path(recipe.base))
    data, model = kind.data(recipe.seed), load_model(story.case.kind, recipe.base, None)
    file = story.out / "heads" / "a.safetensors"
    head = Head.load(file) if data.classes else None
    rows = data.test[:15]
    shuffled = random.Random(1).sample(rows, k=len(rows))
    found = [kind.score(model, head, *how, "") for how in ((rows, 32), (rows, 1), (shuffled, 7))]
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-5, rel=1e-5)


def test_inputs_of_layers_are_those_of_single_rows(story: Story) -> None:
    """Padding never counts, on either side of a model: batches of eight show what rows one by one show."""
    recipe = load(story.words)
    kind = kind_of(recipe.tasks[0], Path(recipe.base))
    model, rows = load_model(story.case.kind, recipe.base, None), kind.data(recipe.seed).train[:16]
    seen = [
        covariances(model, (kind.inputs(model, batch) for batch in kind.batches(rows, size, ""))) for size in (1, 8)
    ]
    assert seen[0].keys() == seen[1].keys()
    for name, C in seen[0].items():
        torch.testing.assert_close(seen[1][name], C, rtol=1e-3, atol=1e-4)


def test_subspaces_are_chosen_from_the_inputs(story: Story, tmp_path: Path) -> None:
    words = json.loads(json.dumps(story.words)) | {"output": str(tmp_path / "out")}
    words["defaults"]["adapter"] |= {"type": "lora", "r": 2}
    words["defaults"]["training"]["max_steps"] = 1
    words["train_to_merge"] = {"method": "contrastive", "rows": 8}
    run(words, until="finetune", tasks=["a"])
    chosen = load_file(tmp_path / "out" / "subspaces" / "a.safetensors")
    saved = load_file(tmp_path / "out" / "experts" / "a" / "adapter_model.safetensors")
    assert chosen
    for weight, rows in chosen.items():
        assert rows.equal(saved[f"base_model.model.{weight.removesuffix('.weight')}.lora_A.weight"])


def test_a_merge_is_searched(story: Story) -> None:
    pytest.importorskip("optuna")
    found = search(story.words, trials=1, methods=["task_arithmetic"], spaces=["full"], overwrite=True)
    test, told = found["test"], story.results["scores"]
    for name in "ab":
        assert test["base"][name] == pytest.approx(told["base"][name], abs=1e-5, rel=1e-5)
        assert test[name][name] == pytest.approx(told[name][name], abs=1e-4, rel=1e-4)
    assert math.isfinite(found["tuning"]["base"]["a"]["loss"])


def test_experts_are_plain_adapters_of_the_base(story: Story) -> None:
    recipe = load(story.words)
    kind = kind_of(recipe.tasks[0], Path(recipe.base))
    model = peft.PeftModel.from_pretrained(
        load_model(story.case.kind, recipe.base, None), str(story.out / "experts" / "a")
    )
    data = kind.data(recipe.seed)
    head = Head.load(story.out / "heads" / "a.safetensors") if data.classes else None
    found = kind.score(model.merge_and_unload(), head, data.test, 32, "")
    assert found["loss"] == pytest.approx(story.results["scores"]["a"]["a"]["loss"], rel=1e-3, abs=1e-4)


def test_a_step_of_several_batches_is_the_step_of_one(story: Story, tmp_path: Path) -> None:
    """The Trainer divides neither twice nor never: rows of unlike length in parts give the loss of all at once."""
    recipe = load(story.words)
    kind, told = kind_of(recipe.tasks[0], Path(recipe.base)), []
    rows = kind.data(recipe.seed).train[:8]
    file = story.out / "heads" / "a.safetensors"
    trained = kind.trained(
        load_model(story.case.kind, recipe.base, None).eval(), Head.load(file) if file.is_file() else None
    )
    shift = 1 if story.case.kind == "causal-lm" else 0  # labels that are nobody's to predict
    for parts in ([rows], [rows[:3], rows[3:]]):
        batches = [kind.collate(part) for part in parts]
        count = sum(int((b["labels"][:, shift:] if shift else b["labels"]).ne(-100).sum()) for b in batches)
        told.append(sum(trained(**b, num_items_in_batch=count)["loss"].item() for b in batches))
    assert told[0] == pytest.approx(told[1], rel=1e-5)


def test_samples_are_of_tasks_that_ask_for_one(story: Story) -> None:
    assert set(story.results["samples"]) == (set("ab") if "prompt" in story.case.words else set())


# Bad rows


MISTAKES = [(case, name) for case in CASES for name in case.bad]


@pytest.mark.parametrize(
    ("case", "name"), MISTAKES, ids=[f"{case.kind}-{case.architecture}-{name}" for case, name in MISTAKES]
)
def test_a_bad_row_is_one_line_and_nothing_is_written(
    case: Case, name: str, laid_out: Callable[[Case], Path], tmp_path: Path
) -> None:
    folder = laid_out(case)
    words, (over, line) = case.recipe(folder, tmp_path / "out"), case.bad[name]
    whole = Path(words["tasks"][0]["data"]["test"])
    rows = [json.loads(row) for row in whole.read_text(encoding="utf-8").splitlines()]
    rows[3] |= over
    bad = write_rows(folder / "a" / "bad.jsonl", rows)
    words["tasks"][0]["data"] = words["tasks"][0]["data"] | {"test": bad}
    with pytest.raises(ValueError, match=f"^{re.escape(line)}") as error:
        run(words)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_base_that_cannot_read_the_rows_is_one_line(laid_out: Callable[[Case], Path], tmp_path: Path) -> None:
    bert, vit = CASES[0], CASES[2]
    for case, other, reader in ((vit, bert, "AutoImageProcessor"), (bert, vit, "AutoTokenizer")):
        words = case.recipe(laid_out(case), tmp_path / "out") | {"base": str(laid_out(other) / "base")}
        with pytest.raises(ValueError, match=rf"a: .* has nothing for {reader} to read \(.*\)$"):
            run(words)
        assert not (tmp_path / "out").exists()


def test_a_base_whose_names_nobody_knows_is_one_line(laid_out: Callable[[Case], Path], tmp_path: Path) -> None:
    words = CASES[2].recipe(laid_out(CASES[2]), tmp_path / "out") | {"base": str(tmp_path / "base")}
    shutil.copytree(laid_out(CASES[2]) / "base", tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = {f"{place}": tensor for place, tensor in enumerate(load_file(file).values())}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(RecipeError, match=r"^base: transformers loads its weights under other names than "):
        run(words)
    assert not (tmp_path / "out").exists()


# The words of a recipe


@pytest.mark.parametrize("name", KINDS)
def test_the_json_schema_knows_the_kind(name: str) -> None:
    kinds = [
        words["properties"]["kind"].get("const")
        for words in json_schema()["$defs"].values()
        if "kind" in words.get("properties", {}) and "adapter" in words["properties"]
    ]
    assert kinds.count(name) == 1


@pytest.mark.parametrize("case", CASES, ids=[case.architecture + case.kind for case in CASES])
def test_the_class_that_loads_the_base_is_said_once(
    case: Case, laid_out: Callable[[Case], Path], tmp_path: Path
) -> None:
    task = load(case.recipe(laid_out(case), tmp_path / "out")).tasks[0]
    assert KINDS[case.kind].auto == task.auto


def test_kinds_that_load_their_base_alike_share_a_recipe(laid_out: Callable[[Case], Path], tmp_path: Path) -> None:
    texts, tags, running = CASES[0], CASES[1], CASES[-1]
    words = texts.recipe(laid_out(texts), tmp_path / "out")
    words["tasks"][1] = {"name": "b", "kind": "token-classification", "data": files(laid_out(texts) / "tagged")}
    tags.data(laid_out(texts) / "tagged", 0, 0)
    words["defaults"]["training"]["max_steps"] = 2
    scores = run(words)["scores"]["merge"]
    assert 0 <= scores["a"]["accuracy"] <= 1
    assert 0 <= scores["b"]["f1"] <= 1
    assert results_table(run(words, overwrite=True)).rows[0] == ["", "a, accuracy %", "b, f1 %", "mean"]
    words["tasks"][1] = running.recipe(laid_out(running), tmp_path)["tasks"][1] | {"kind": "causal-lm"}
    with pytest.raises(RecipeError) as error:
        load(words)
    assert str(error.value) == (
        "the tasks of one recipe share the class that loads their base, "
        "got causal-lm (AutoModelForCausalLM) and classification (AutoModel)"
    )


@pytest.mark.parametrize(
    ("case", "over", "line"),
    [
        (CASES[0], {"metric": "acuracy"}, "expected 'accuracy', 'f1' or 'loss', got 'acuracy'"),
        (CASES[3], {"metric": "accuracy"}, "expected 'loss', 'perplexity', 'exact_match' or 'f1', got 'accuracy'"),
        (CASES[3], {"metric": "f1", "generate": False}, "metric 'f1' needs answers of the model: set generate to true"),
        (CASES[0], {"head": "thawed"}, "expected 'frozen' or 'trained', got 'thawed'"),
    ],
)
def test_the_metric_is_one_that_the_kind_gives(
    case: Case, over: Words, line: str, laid_out: Callable[[Case], Path], tmp_path: Path
) -> None:
    words = case.recipe(laid_out(case), tmp_path / "out")
    words["tasks"][0] |= over
    with pytest.raises(RecipeError, match=r"^tasks\[0\]") as error:
        load(words)
    assert str(error.value).endswith(line)


@pytest.mark.parametrize("case", CASES[:3], ids=[case.kind for case in CASES[:3]])
def test_a_run_with_a_trained_head(case: Case, laid_out: Callable[[Case], Path], tmp_path: Path) -> None:
    folder = laid_out(case)
    words = case.recipe(folder, tmp_path / "out") | {"evaluate": {"cross": True}}
    words["defaults"]["head"] = "trained"
    words["defaults"]["training"]["max_steps"] = 5
    results, recipe = run(words), load(words)
    for task in recipe.tasks:
        kind, model = kind_of(task, Path(recipe.base)), load_model(case.kind, recipe.base, None)
        head, test = Head.load(tmp_path / "out" / "heads" / f"{task.name}.safetensors"), kind.data(recipe.seed).test
        assert not torch.equal(head.weight, head.start.weight)
        assert kind.score(model, head.start, test, 32, "") == results["scores"]["base"][task.name]
        merged = load_model(case.kind, tmp_path / "out" / "merged", None)
        assert kind.score(merged, head, test, 32, "") == pytest.approx(results["scores"]["merge"][task.name], abs=1e-6)
    pytest.importorskip("optuna")
    found = search(words, trials=1, methods=["mean"], objective="score")["test"]
    assert found["base"]["a"] == pytest.approx(results["scores"]["base"]["a"], abs=1e-5)
    assert found["a"]["a"] == pytest.approx(results["scores"]["a"]["a"], abs=1e-4)
    (tmp_path / "out" / "results.json").unlink()
    (tmp_path / "out" / "heads" / "a.safetensors").unlink()  # what its expert learnt is lost with it
    lines: list[str] = []
    again = run(words, say=lines.append)
    assert [line for line in lines if line.startswith("  reused")] == [f"  reused {tmp_path / 'out' / 'experts' / 'b'}"]
    assert again["scores"] == results["scores"]
