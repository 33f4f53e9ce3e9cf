"""Experts that were trained elsewhere: taken as they are, scored, searched and merged as those of the recipe's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_case import recipe, save_models, words_of
from safetensors.torch import load_file, save_file

from orthoft.adapters import ADAPTERS
from orthoft.merging import merge
from orthoft.recipes import RecipeError, load, run
from orthoft.recipes.merge_job import load_job
from orthoft.recipes.prepare import check
from orthoft.recipes.search import search

Words = dict[str, Any]
MODEL = "merged/model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, a recipe of the tasks a and b, and a finished run of it in ``out``."""
    root = tmp_path_factory.mktemp("work")
    save_models(root)
    run(recipe(root, root))
    return root


def elsewhere(made: Path, out: Path, *overrides: str) -> Words:
    """The recipe with the expert of the finished run in place of a's training."""
    told = words_of(made, out, *overrides)
    told["tasks"][0] |= {"expert": str(made / "out" / "experts" / "a")}
    return told


def test_it_is_worth_the_same_as_where_it_was_trained(made: Path, tmp_path: Path) -> None:
    """Its tensors, its head, its scores, its merge; it is not trained, and its card is not written over."""
    words, lines = elsewhere(made, tmp_path / "out"), list[str]()
    given = made / "out" / "experts" / "a"
    before = {file: file.read_bytes() for file in given.rglob("*") if file.is_file()}
    words["tasks"][0]["training"] = {"max_steps": 1_000_000}  # of the recipe's defaults, say: not looked at
    results = run(words, say=lines.append)
    first = json.loads((made / "out" / "results.json").read_text(encoding="utf-8"))
    taken = results["experts"]["a"]
    assert lines[1] == f"  orthoft_oftv2, {taken['parameters']:,} parameters, taken from {given}"
    assert taken["parameters"] == first["experts"]["a"]["parameters"]
    for row in ("base", "a", "b", "merge"):
        assert results["scores"][row] == first["scores"][row]
    own, merged = (load_file(made / "out" / name) for name in ("experts/a/adapter_model.safetensors", MODEL))
    again, new = (load_file(tmp_path / "out" / name) for name in ("experts/a/adapter_model.safetensors", MODEL))
    for one, other in ((own, again), (merged, new)):
        assert one.keys() == other.keys()
        assert all(one[name].equal(other[name]) for name in one)
    assert (tmp_path / "out" / "experts" / "a" / "README.md").read_bytes() == before[given / "README.md"]
    assert {file: file.read_bytes() for file in given.rglob("*") if file.is_file()} == before
    lines.clear()
    run(words, keep_experts=True, say=lines.append)
    assert lines[1] == f"  reused {tmp_path / 'out' / 'experts' / 'a'}"


@pytest.mark.parametrize("method", [*sorted(ADAPTERS), "peft.lora", "peft.boft"])
def test_every_adapter_is_trained_merged_and_taken(method: str, made: Path, tmp_path: Path) -> None:
    """Also those that start from the weights' values, or look at their own, which shapes alone do not have."""
    words = words_of(made, tmp_path / "first")
    target = {"target_modules": ["query"], **({"boft_block_size": 4} if method == "peft.boft" else {})}
    words["tasks"] = [{**words["tasks"][0], "adapter": {"type": method, **target}}]
    words["tasks"][0] |= {"training": {"max_steps": 2, "learning_rate": 1e-2}}
    first = run(words)
    words["tasks"][0]["expert"] = str(tmp_path / "first" / "experts" / "a")
    second = run(words | {"output": str(tmp_path / "second")})
    assert first["scores"] == second["scores"]
    one, other = (load_file(tmp_path / name / MODEL) for name in ("first", "second"))
    base = load_file(made / "bert" / "model.safetensors")
    assert all(one[name].equal(other[name]) for name in one)
    assert any(not one[name].equal(base[name]) for name in one)


def test_without_a_head_or_a_card_it_gets_a_probe_and_one(made: Path, tmp_path: Path) -> None:
    """The probe is fitted as for the others, and the search has both tasks."""
    words = elsewhere(made, tmp_path / "out")
    given = shutil.copytree(made / "out" / "experts" / "a", tmp_path / "given")
    shutil.rmtree(given / "heads")
    (given / "README.md").unlink()
    words["tasks"][0]["expert"] = str(given)
    del words["tasks"][0]["adapter"]
    results = run(words)
    assert (tmp_path / "out" / "heads" / "a.safetensors").is_file()
    card = (tmp_path / "out" / "experts" / "a" / "README.md").read_text(encoding="utf-8")
    assert f"| taken from | `{given}` |" in card
    assert "| steps |" not in card
    assert f"{results['scores']['a']['a']['accuracy']:.4g}" in card
    pytest.importorskip("optuna")
    found = search(words, trials=1, methods=["mean"], objective="score")
    assert found["experts"].keys() == {"a", "b"}


def test_others_keep_out_of_its_way(made: Path, tmp_path: Path) -> None:
    """The tasks that train are kept apart from the inputs of one that does not; its card says nothing of that."""
    words = elsewhere(made, tmp_path / "out")
    words["tasks"][1]["adapter"] = {"type": "peft.lora", "r": 2, "target_modules": ["query"]}
    words["train_to_merge"] = {"method": "contrastive", "rows": 20}
    run(words)
    with_a = load_file(tmp_path / "out" / "subspaces" / "b.safetensors")
    words["tasks"][0]["data"] = words["tasks"][1]["data"]  # nothing to keep away from
    words["tasks"][0]["expert"] = str(headless(made, tmp_path))
    run(words, keep_experts=True)
    without = load_file(tmp_path / "out" / "subspaces" / "b.safetensors")
    assert with_a.keys() == without.keys()
    assert not any(with_a[name].equal(without[name]) for name in with_a)
    card = (tmp_path / "out" / "merged" / "README.md").read_text(encoding="utf-8")
    assert "The experts of this run's own training were trained to be merged" in card


def headless(made: Path, folder: Path) -> Path:
    given = shutil.copytree(made / "out" / "experts" / "a", folder / "headless")
    shutil.rmtree(given / "heads")
    return given


def test_a_head_that_came_with_it_comes_again(made: Path, tmp_path: Path) -> None:
    words, head = elsewhere(made, tmp_path / "out"), tmp_path / "out" / "heads" / "a.safetensors"
    run(words, until="finetune")
    before = head.read_bytes()
    head.unlink()
    lines: list[str] = []
    run(words, until="finetune", say=lines.append)
    assert "taken from" in lines[1]
    assert head.read_bytes() == before


def other_classes(given: Path, _: Words) -> str:
    file = given / "heads" / "a.json"
    words = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(words | {"classes": ["no", "yes"]}), encoding="utf-8")
    return f"expert of a: {given / 'heads'}: the head a has classes ['no', 'yes'], the task ["


def other_features(_: Path, words: Words) -> str:
    words["tasks"][0]["max_length"] = 7
    return "expert of a: "


def narrow_head(given: Path, _: Words) -> str:
    file = given / "heads" / "a.safetensors"
    save_file({name: tensor[..., :2].contiguous() for name, tensor in load_file(file).items()}, file)
    return f"expert of a: {given / 'heads'}: the head a has a weight 2x2, the task 2x"


def broken_head(given: Path, _: Words) -> str:
    (given / "heads" / "a.safetensors").write_bytes(b"12345678")
    return f"expert of a: {given / 'heads'} has no whole head a ("


def half_a_head(given: Path, _: Words) -> str:
    (given / "heads" / "a.json").unlink()
    return f"expert of a: {given / 'heads'} has no whole head a ("


def two_heads(given: Path, _: Words) -> str:
    for ending in ("safetensors", "json"):
        (given / "heads" / f"a.{ending}").rename(given / "heads" / f"x.{ending}")
        shutil.copy(given / "heads" / f"x.{ending}", given / "heads" / f"y.{ending}")
    return f"expert of a: {given / 'heads'} has heads of several tasks (x, y): call the task as one of them"


def of_a_deeper_base(given: Path, _: Words) -> str:
    file = given / "adapter_model.safetensors"
    tensors = load_file(file)
    more = {name.replace("layer.0.", "layer.9."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor.clone() for name, tensor in (tensors | more).items()}, file)
    return "tasks[0].expert: "


def cannot_be_merged(given: Path, words: Words) -> str:
    import peft
    from transformers import AutoModel

    model = AutoModel.from_pretrained(words["base"])
    config = peft.IA3Config(target_modules=["query"], feedforward_modules=[])
    peft.get_peft_model(model, config).save_pretrained(given)
    return "tasks[0].expert: type 'IA3' cannot be merged, only "


def no_tensors(given: Path, _: Words) -> str:
    (given / "adapter_model.safetensors").rename(given / "adapter_model.bin")
    return "tasks[0].expert: no adapter_model.safetensors"


def fewer_tensors(given: Path, _: Words) -> str:
    file = given / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)
    return f"tasks[0].expert: {given} was trained on another base, or under another class of it: it lacks base_model."


def other_shapes(given: Path, _: Words) -> str:
    file = given / "adapter_model.safetensors"
    save_file({name: tensor[:, :1].contiguous() for name, tensor in load_file(file).items()}, file)
    return "tasks[0].expert: source 'a': "


def unknown_type(given: Path, _: Words) -> str:
    file = given / "adapter_config.json"
    file.write_text(file.read_text(encoding="utf-8").replace("ORTHOFT_OFTV2", "NOSUCH"), encoding="utf-8")
    return f"tasks[0].expert: {given / 'adapter_config.json'}: PEFT does not read it (peft_type 'NOSUCH')"


def checkpoint(given: Path, words: Words) -> str:
    words["tasks"][0]["expert"] = words["base"]
    return f"tasks[0].expert: {words['base']} has no adapter_config.json"


def nowhere(given: Path, words: Words) -> str:
    words["tasks"][0]["expert"] = "./nowhere"
    return "tasks[0].expert: no such folder: "


def itself(given: Path, words: Words) -> str:
    words["tasks"][0]["expert"] = str(shutil.copytree(given, Path(words["output"]) / "experts" / "a"))
    return "expert of a: "


def neither(given: Path, words: Words) -> str:
    del words["tasks"][0]["adapter"], words["tasks"][0]["expert"]
    return "tasks[0]: adapter is missing (or expert, one that was trained elsewhere)"


@pytest.mark.parametrize(
    "broken",
    [
        other_classes,
        other_features,
        narrow_head,
        broken_head,
        half_a_head,
        two_heads,
        of_a_deeper_base,
        cannot_be_merged,
        no_tensors,
        fewer_tensors,
        other_shapes,
        unknown_type,
        checkpoint,
        nowhere,
        itself,
        neither,
    ],
)
def test_what_does_not_fit_is_one_line_before_any_work(broken: Any, made: Path, tmp_path: Path) -> None:
    words = elsewhere(made, tmp_path / "out")
    given = shutil.copytree(made / "out" / "experts" / "a", tmp_path / "given")
    words["tasks"][0]["expert"] = str(given)
    line = broken(given, words)
    with pytest.raises((RecipeError, ValueError, FileNotFoundError)) as error:
        run(words)
    assert str(error.value).startswith(line)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_without_any_training_the_device_is_still_the_recipe_s(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arguments of a training set accelerate's state up; where there are none, the check does."""
    told: list[str | None] = []
    monkeypatch.setattr("orthoft.recipes.prepare.set_up", told.append)
    words = elsewhere(made, tmp_path / "out", "device=cpu")
    check(load(words))
    assert told == []
    words["tasks"][1]["expert"] = str(made / "out" / "experts" / "b")
    check(load(words))
    assert told == ["cpu"]


# Models that no task is for


def test_models_beside_the_experts_are_merged_with_them(made: Path, tmp_path: Path) -> None:
    """A LoRA and a checkpoint, with weights; the same as `orthoft.merging.merge` of all four."""
    sources = [{"path": str(made / "query"), "weight": 0.5}, {"path": str(made / "out" / "merged"), "name": "whole"}]
    words = words_of(made, tmp_path / "out")
    words["merge"] = {"method": "task_arithmetic", "sources": sources}
    results = run(words)
    experts = [(name, tmp_path / "out" / "experts" / name) for name in "ab"]
    all_four = [*experts, ("query", made / "query"), ("whole", made / "out" / "merged")]
    weights = [1.0, 1.0, 0.5, 1.0]
    merge(made / "bert", all_four, tmp_path / "again", method="task_arithmetic", weights=weights, progress=False)
    one, other = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out" / "merged", tmp_path / "again")
    )
    assert all(one[name].equal(other[name]) for name in other)
    assert list(results["merge"]["sources"]) == ["a", "b", "query", "whole"]
    assert results["scores"].keys() == {"base", "a", "b", "merge"}
    pytest.importorskip("optuna")
    said: list[str] = []
    found = search(words, trials=2, methods=["task_arithmetic"], spaces=["full"], objective="score", say=said.append)
    section = yaml.safe_load("merge:" + "\n".join(said).partition("\nmerge:")[2].partition("\n\n")[0])
    assert [other["path"] for other in section["merge"]["sources"]] == [
        str(made / "query"),
        str(made / "out" / "merged"),
    ]
    load(words | section)  # it can be put back
    assert found["others"] == {"query": str(made / "query"), "whole": str(made / "out" / "merged")}
    assert [len(trial["words"]["weights"]) for trial in found["trials"]] == [4, 4]
    job = load_job(tmp_path / "out" / "search" / "merge.yaml").arguments()
    assert [name for name, _ in job["sources"]] == ["a", "b", "query", "whole"]
    words["merge"]["sources"][0]["path"] = str(made / "value")
    words["merge"]["sources"][0]["name"] = "query"
    with pytest.raises(FileExistsError, match="a search with other sources"):
        search(words, trials=2, methods=["task_arithmetic"], spaces=["full"], objective="score")


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        ({"sources": ["./nowhere"]}, "merge.sources[0]: no such folder: "),
        ({"sources": ["{made}/query", "{made}/query"]}, "merge.sources: two of what is merged have the name 'query'"),
        (
            {"sources": [{"path": "{made}/query", "name": "a"}]},
            "merge.sources: two of what is merged have the name 'a'",
        ),
        ({"sources": [{"path": "{made}/a", "name": "c"}]}, "merge.sources: source 'c': "),
        ({"sources": ["{made}/query"], "method": "regmean"}, "merge: 'regmean' takes gram statistics of all it merges"),
        ({"sources": ["{made}/bert"], "space": "core"}, "merge: "),
        ({"sources": ["{made}/query"], "weights": [1, 1, 1, 1]}, "merge.weights has 4 numbers for 2 tasks (and 1 "),
    ],
)
def test_models_that_cannot_be_merged_with_them(wanted: Words, line: str, made: Path, tmp_path: Path) -> None:
    def placed(value: Any) -> Any:
        if isinstance(value, str):
            return value.format(made=made)
        if isinstance(value, dict):
            return {key: placed(one) for key, one in value.items()}
        return [placed(one) for one in value] if isinstance(value, list) else value

    words = words_of(made, tmp_path / "out")
    words["merge"] = {"method": "mean", **placed(wanted)}
    with pytest.raises((RecipeError, FileNotFoundError, ValueError)) as error:
        run(words)
    assert str(error.value).startswith(line)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()
