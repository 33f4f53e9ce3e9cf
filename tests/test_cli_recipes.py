"""``orthoft recipes``: list, copy, check, and the schema by which editors complete."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import orthoft.cli.recipes  # noqa: F401  (makes the commands known)
from orthoft.cli import main
from orthoft.recipes import RecipeError, run
from orthoft.recipes.load import load, read_yaml
from orthoft.recipes.shipped import json_schema, kind_of
from orthoft.recipes.task_schema import SFT_WORDS, training_model

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"
NAMES = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
LAUNCH = CONFIGS.parent / "accelerate"
LISTED = [*NAMES, *(file.stem for file in sorted(LAUNCH.glob("*.yaml")))]


def outcome(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["recipes", *map(str, arguments)])
    return int(stopped.value.code or 0)


def merge_words(**words: Any) -> dict[str, Any]:
    return {"base": "b", "sources": ["a", {"path": "c", "weight": 2}], "method": "ties", "output": "o", **words}


def written(folder: Path, words: object) -> Path:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(words), encoding="utf-8")
    return file


def recipe_words(folder: Path, **words: Any) -> dict[str, Any]:
    """A sound recipe whose files are there."""
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("", encoding="utf-8")
    data = {name: str(folder / f"{name}.jsonl") for name in ("train", "test")}
    task = {"name": "a", "kind": "causal-lm", "adapter": {"type": "hra"}, "data": data}
    return {"name": "mine", "base": "org/model", "output": str(folder / "out"), "tasks": [task], **words}


# ls and cp


def test_all_that_ship_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome("ls", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == LISTED
    for name, line in found.items():
        file = (CONFIGS if name in NAMES else LAUNCH) / f"{name}.yaml"
        assert f"# {line}" == file.read_text(encoding="utf-8").splitlines()[0]
    assert outcome("ls") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == LISTED


@pytest.mark.parametrize(("dest", "file"), [(None, "minilm.yaml"), ("x.yaml", "x.yaml"), (".", "minilm.yaml")])
def test_a_copy_is_the_same_and_replaces_nothing(
    dest: str | None,
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["cp", "minilm", *([dest] if dest else [])]
    assert outcome(*words) == 0
    assert capsys.readouterr().out == f"{file}\n"
    assert Path(file).read_bytes() == (CONFIGS / "minilm.yaml").read_bytes()
    Path(file).write_text("mine", encoding="utf-8")
    assert outcome(*words) == 2
    assert capsys.readouterr().err == f"error: file exists: {file}: choose another name, or remove it\n"
    assert Path(file).read_text(encoding="utf-8") == "mine"


def test_what_cannot_be_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome("cp", "minlm", tmp_path) == 2
    assert capsys.readouterr().err.startswith("error: unknown recipe 'minlm', did you mean 'minilm'? Choose from: ")
    assert outcome("cp", "../pyproject", tmp_path) == 2
    assert outcome("cp", "minilm", tmp_path / "no" / "x.yaml") == 2
    assert capsys.readouterr().err.endswith(f"error: no folder {tmp_path / 'no'} to write x.yaml to\n")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("end", ["/", "//"])
def test_a_name_that_ends_as_a_folder_is_no_file(end: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = f"{tmp_path / 'no'}{end}"
    assert outcome("cp", "minilm", place) == 2
    assert capsys.readouterr().err == f"error: no folder {tmp_path / 'no'} to write minilm.yaml to\n"
    assert outcome("schema", place, "--overwrite") == 2
    assert capsys.readouterr().err == f"error: {place} is the name of a folder: a schema is a file, say which in it\n"
    assert not any(tmp_path.iterdir())
    (tmp_path / "no").mkdir()
    assert outcome("cp", "minilm", place) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'no' / 'minilm.yaml'}\n"


# validate


def test_a_recipe_and_a_merge_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome("validate", written(tmp_path, recipe_words(tmp_path, merge={"method": "ties"}))) == 0
    assert outcome("validate", written(tmp_path, merge_words())) == 0
    assert outcome("validate", written(tmp_path, merge_words()), "--set", "params.density=0.3") == 0
    assert capsys.readouterr().out == "ok, a recipe\nok, a merge\nok, a merge\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ({}, "recipe"),
        ({"base": "b", "output": "o"}, "recipe"),
        ({"tasks": [], "method": "ties"}, "recipe"),
        ({"sources": []}, "merge"),
        ({"method": "ties", "as": "lora"}, "merge"),
    ],
)
def test_the_keys_say_what_is_meant(words: dict[str, Any], kind: str) -> None:
    assert kind_of(words) == kind


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ({"sources": ["a"], "metod": "ties"}, ["base: missing", "output: missing", "metod: unknown key, did you mean"]),
        (merge_words(method="tiess"), ["merge: unknown merge method 'tiess', did you mean 'ties'?"]),
        (merge_words(params={"densty": 1}), ["merge: unknown parameter of method 'ties' 'densty', did you mean"]),
        ({"name": "x", "tasks": []}, ["base: missing", "output: missing", "tasks: "]),
    ],
)
def test_a_line_for_each_mistake(
    words: dict[str, Any], lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome("validate", written(tmp_path, words)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    for line in lines:
        assert f"error: {line}" in said.err
    assert len(said.err.splitlines()) == len(lines)


def test_a_recipe_is_checked_to_its_files_and_its_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, recipe_words(tmp_path, merge={"method": "ties"}))
    assert outcome("validate", file, "--set", "merge.method=tiess") == 2
    assert capsys.readouterr().err.startswith("error: merge: unknown merge method 'tiess', did you mean 'ties'?")
    assert outcome("validate", file, "--set", f"tasks.0.data.train={tmp_path / 'no.jsonl'}") == 2
    assert capsys.readouterr().err == f"error: tasks[0].data.train: no such file: {tmp_path / 'no.jsonl'}\n"
    assert outcome("validate", tmp_path / "no.yaml") == 2


REFUSED = [  # before the base is opened: what the libraries say of a recipe's words
    (
        ["tasks.0.adapter.type=oftv3", "tasks.1.adapter.rr=4"],
        ["tasks[0].adapter: unknown adapter type 'oftv3'", "tasks[1].adapter: unknown field of adapter 'hra' 'rr'"],
    ),
    (
        ["defaults.training.load_best_model_at_end=true", "defaults.training.save_strategy='no'"],
        [f"tasks[{i}].training: load_best_model_at_end is not followed: write early_stopping" for i in range(2)],
    ),
    (["tasks.0.adapter.type=ln_tuning"], ["tasks[0].adapter: type 'ln_tuning' cannot be merged, only "]),
    (["tasks.0.training.optim=adamww"], ["tasks[0].training: adamww is not a valid OptimizerNames"]),
    (["merge.method=tiess"], ["merge: unknown merge method 'tiess', did you mean 'ties'?"]),
    (["device=tpu"], ["device: no device 'tpu' here, choose from: cpu"]),
]


@pytest.mark.parametrize(("changes", "lines"), REFUSED, ids=[changes[0] for changes, _ in REFUSED])
def test_what_a_run_refuses_is_refused(
    changes: list[str], lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = recipe_words(tmp_path, merge={"method": "ties"}, defaults={})
    file = written(tmp_path, words | {"tasks": [words["tasks"][0], {**words["tasks"][0], "name": "b"}]})
    assert outcome("validate", file, *(word for change in changes for word in ("--set", change))) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(lines)
    assert all(one.startswith(f"error: {line}") for one, line in zip(said, lines, strict=True))
    with pytest.raises(RecipeError) as refused:
        run(file, changes)
    assert [f"error: {line}" for line in str(refused.value).splitlines()] == said
    assert not (tmp_path / "out").exists()


# schema


def refusals(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> list[str]:
    """Check a value by the words of JSON Schema that say where something may stand: a small judge of our own."""
    if "$ref" in schema:
        return refusals(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root)
    found = [f"{key} is missing" for key in schema.get("required", ()) if key not in value]
    if "anyOf" in schema:
        tried = [refusals(one, value, root) for one in schema["anyOf"]]
        found += min(tried, key=len)
    if "const" in schema and value != schema["const"]:
        found.append(f"{value} is not {schema['const']}")
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    kinds["null"] = type(None)
    if "type" in schema and not isinstance(value, kinds[schema["type"]]):
        return [*found, f"{value!r} is no {schema['type']}"]
    for key, inner in value.items() if isinstance(value, dict) and "properties" in schema else ():
        if key in schema["properties"]:
            found += refusals(schema["properties"][key], inner, root)
        elif schema.get("additionalProperties") is False:
            found.append(f"{key} is unknown")
    for inner in value if isinstance(value, list) and "items" in schema else ():
        found += refusals(schema["items"], inner, root)
    return found


def judged(kind: str, words: dict[str, Any]) -> list[str]:
    schema = json_schema("merge" if kind == "merge" else "recipe")
    return refusals(schema, words, schema)


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_takes_what_ships_and_refuses_misspelt_keys(name: str) -> None:
    words = read_yaml(CONFIGS / f"{name}.yaml")
    assert judged("recipe", words) == []
    assert judged("recipe", words | {"bose": "x"}) == ["bose is unknown"]
    wrong = words | {"defaults": {**words["defaults"], "training": {"max_step": 3}}}
    assert judged("recipe", wrong) == ["max_step is unknown"]
    nameless = [{key: value for key, value in words["tasks"][0].items() if key != "name"}]
    assert judged("recipe", words | {"tasks": nameless}) == ["name is missing"]
    assert judged("recipe", words | {"tasks": "all"}) != []


@pytest.mark.parametrize("installed", [True, False])
def test_the_schema_knows_the_words_of_trl(installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words: dict[str, Any] = {"activation_offloading": True, "loss_type": "dft", "router_aux_loss_coef": 0.1}
    assert words.keys() == {*SFT_WORDS}
    recipe = recipe_words(tmp_path, defaults={"trainer": "trl", "training": words})
    if installed:
        pytest.importorskip("trl")
        assert load(recipe).tasks[0].training == words
    else:
        found = importlib.util.find_spec
        monkeypatch.setattr("orthoft.recipes.shipped.find_spec", lambda name: None if name == "trl" else found(name))
    assert judged("recipe", recipe) == []
    assert judged("recipe", recipe | {"defaults": None, "tasks": [recipe["tasks"][0] | recipe["defaults"]]}) == []
    wrong = recipe | {"defaults": {"training": {"loss_typ": "dft", "max_steps": 3}}}
    assert judged("recipe", wrong) == ["loss_typ is unknown"]
    assert judged("recipe", recipe | {"defaults": {"kind": "classification", "training": words}}) != []
    assert bool(judged("recipe", recipe | {"defaults": {"training": {"loss_type": 3}}})) is installed


def test_the_schema_of_merges() -> None:
    assert judged("merge", merge_words(**{"as": "lora", "rank": 4})) == []
    assert judged("merge", merge_words(as_="lora")) == ["as_ is unknown"]
    assert judged("merge", merge_words(rank="four")) != []


def test_the_schema_knows_the_training_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.schema.json"
    assert outcome("schema", file) == 0
    assert capsys.readouterr().out == f"{file}\n"
    schema = json.loads(file.read_text(encoding="utf-8"))
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["$defs"]["TrainingArguments"]["properties"].keys() == training_model().model_fields.keys()
    assert outcome("schema", file) == 2
    assert capsys.readouterr().err.startswith(f"error: file exists: {file}")
    assert outcome("schema", file, "--of", "merge", "--overwrite") == 0
    assert "sources" in json.loads(file.read_text(encoding="utf-8"))["properties"]
    capsys.readouterr()
    assert outcome("schema") == 0
    assert json.loads(capsys.readouterr().out) == schema
