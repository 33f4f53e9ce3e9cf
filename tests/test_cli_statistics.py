"""``run``, ``search`` and ``statistics`` of one tiny recipe, and the merges that use what was measured."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_case import outcome, recipe, save_models
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from orthoft.recipes import load
from orthoft.recipes.merge_job import load_job

NAME = "encoder.layer.0.attention.self.query.weight"
ROWS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe whose experts are trained."""
    root = tmp_path_factory.mktemp("work")
    save_models(root)
    assert outcome("finetune", recipe(root, root), "--quiet", "--threads", "1") == 0
    return root


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")


def measured(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    words = ["--threads", "1", "--examples", str(ROWS), "--set", "evaluate.batch_size=2", *more]
    assert outcome("statistics", folder / "recipe.yaml", "--json", *words) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def expert(folder: Path) -> tuple[Any, list[dict[str, Tensor]]]:
    """Return expert a, merged, and the first rows of its train split as the recipe reads them."""
    rows = [json.loads(line) for line in (folder / "a" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    labels = sorted({row["label"] for row in rows})
    found = []
    for row in rows[:ROWS]:
        ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
        found.append({"input_ids": ids, "label": torch.tensor([labels.index(row["label"])])})
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(folder / "bert"), folder / "out" / "experts" / "a")
    return model.merge_and_unload().eval(), found


def gradient(model: Any, head: dict[str, Tensor], rows: list[dict[str, Tensor]]) -> Tensor:
    """Return the gradient of the mean cross-entropy of rows, which have the same length, at one weight."""
    weight = model.get_parameter(NAME).requires_grad_(True)
    hidden = model(torch.cat([row["input_ids"] for row in rows])).last_hidden_state.mean(1)
    loss = F.cross_entropy(F.linear(hidden, head["weight"], head["bias"]), torch.cat([row["label"] for row in rows]))
    return torch.autograd.grad(loss, weight)[0]


def test_fisher_information_is_the_mean_square_of_gradients(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = measured(folder, capsys, "--kind", "fisher", "--only", "*query.weight")
    assert list(told["files"]) == ["a", "b"]
    stored = load_file(told["files"]["a"])
    assert list(stored) == [NAME.replace("0", layer) for layer in "01"]  # the base's own names
    model, rows = expert(folder)
    head = load_file(folder / "out" / "heads" / "a.safetensors")
    want = torch.stack([gradient(model, head, [row]).square() for row in rows]).mean(0)
    assert torch.allclose(stored[NAME], want, rtol=1e-3, atol=1e-5 * want.max().item())


def test_second_moments_are_those_of_adam(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = measured(folder, capsys, "--kind", "second_moment", "--task", "a")
    model, rows = expert(folder)
    head = load_file(folder / "out" / "heads" / "a.safetensors")
    moments = torch.zeros(32, 32)
    for step in range(0, ROWS, 2):
        moments = 0.999 * moments + 0.001 * gradient(model, head, rows[step : step + 2]).square()
    want = moments / (1 - 0.999**3)
    got = load_file(told["files"]["a"])[NAME]
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-5 * want.max().item())
    with safe_open(told["files"]["a"], "pt") as opened:
        assert opened.metadata() == {"kind": "second_moment", "steps": "3", "asked": "5", "only": '["*"]'}


@pytest.mark.parametrize(("kind", "method"), [("fisher", "fisher"), ("gram", "regmean"), ("second_moment", "ota")])
def test_the_command_that_is_printed_merges(
    kind: str, method: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = measured(folder, capsys, "--kind", kind, "--out", str(tmp_path))
    assert all(Path(file) == tmp_path / f"{task}-{kind}.safetensors" for task, file in told["files"].items())
    orthoft, *command = shlex.split(told["command"])
    assert orthoft == "orthoft"
    assert outcome(*command, "--quiet") == 0
    assert f"12 weights merged by {method}" in capsys.readouterr().out
    report = json.loads((folder / "out" / f"merged-{method}" / "report.json").read_text(encoding="utf-8"))
    assert [source["statistics"] for source in report["config"]["sources"]] == list(told["files"].values())


def test_the_merge_that_is_written_is_the_recipes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge = {"method": "fisher", "params": {"epsilon": 1e-5}, "weights": [1.0, 3.0], "scale": 0.5, "rescale": "weight"}
    merge |= {"exclude": ["*pooler*"], "overrides": {"*query*": {"scale": 0.1}}, "refit_heads": True}
    changes = [f"merge={json.dumps(merge)}", "export.dtype=bfloat16"]
    more = [word for change in changes for word in ("--set", change)]
    told = measured(folder, capsys, "--out", str(tmp_path), "--only", "*query*", *more)
    assert told["command"] == f"orthoft merge {tmp_path / 'merge-fisher.yaml'}"
    words = load_job(tmp_path / "merge-fisher.yaml").arguments()
    checked = load(folder / "recipe.yaml", changes)
    assert checked.merge is not None
    assert {key: words[key] for key in checked.merge.words()} == checked.merge.words()
    assert words["weights"] == [1.0, 3.0]
    assert words["statistics"] == told["files"]
    assert (words["base"], words["dtype"], words["seed"]) == (str(folder / "bert"), "bfloat16", 0)
    assert words["sources"] == [(name, str(folder / "out" / "experts" / name)) for name in "ab"]
    alone = tmp_path / "alone"
    measured(folder, capsys, "--out", str(alone), "--only", "*query*", "--task", "b", *more)
    assert load_job(alone / "merge-fisher.yaml").arguments()["weights"] == [3.0]
    measured(folder, capsys, "--out", str(alone), "--only", "*query*", "--kind", "gram", *more)
    other = load_job(alone / "merge-gram.yaml")  # the recipe's method does not take these
    assert (other.method, other.scale, other.exclude) == ("regmean", 1.0, ["*pooler*"])


def test_what_was_measured_is_not_replaced(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = measured(folder, capsys, "--kind", "gram", "--task", "b", "--out", str(tmp_path))
    before = Path(told["files"]["b"]).read_bytes()
    words = ["statistics", folder / "recipe.yaml", "--kind", "gram", "--task", "b", "--out", tmp_path]
    assert outcome(*words, "--examples", "3") == 2
    assert capsys.readouterr().err.startswith(f"error: statistics exist: {told['files']['b']}: give --overwrite")
    assert Path(told["files"]["b"]).read_bytes() == before
    assert outcome(*words, "--examples", "3", "--overwrite", "--quiet") == 0
    assert Path(told["files"]["b"]).read_bytes() != before


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--kind", "fischer"], "error: Invalid value for '--kind': 'fischer' is not one of 'fisher', 'gram', "),
        (["--task", "law"], "error: unknown task 'law', did you mean 'a'? Choose from: a, b"),
        (["--examples", "0"], "error: examples is a number above 0, got 0"),
        (["--set", "seed=7"], "error: the expert "),
        (["--only", "*no such*"], "error: the model has no weight of such a kind that is named like *no such*"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    words: list[str], line: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome("statistics", folder / "recipe.yaml", "--out", tmp_path / "s", *words) == 2
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "s").exists()


def test_run_and_search_in_json_and_quietly(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "recipe.yaml"
    assert outcome("run", file, "--json", "--threads", "1") == 0
    said = capsys.readouterr()
    results = json.loads(said.out)
    assert results == json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["recipe"]["threads"] == 1
    assert "reused" in said.err  # what happens is told beside the result
    (folder / "out" / "results.json").unlink()
    assert outcome("run", file, "--quiet") == 0
    said = capsys.readouterr()
    table, path = said.out.rstrip().rsplit("\n\n", 1)
    assert [line.split()[0] for line in table.splitlines() if line[0] != "-"][:5] == [
        "accuracy",
        "base",
        "a",
        "b",
        "merge",
    ]
    assert path == f"results: {folder / 'out' / 'results.json'}"
    assert outcome("search", file, "--json", "--trials", "2", "--method", "mean", "--objective", "score") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["merge"]["method"] == "mean"
    assert (folder / "out" / "search" / "search.json").is_file()
