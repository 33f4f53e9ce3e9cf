"""``orthoft merge`` by a YAML file, by options, and by both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from merging_files import TARGETS, load, save_base, save_lora, tensors_of

from orthoft.cli import main
from orthoft.merging import MergeReport, merge


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    save_base(root / "base", "bert")
    for seed, name in enumerate("ab", 1):
        save_lora(root / name, load(root / "base"), seed=seed, target_modules=TARGETS["bert"])
    return root


def outcome(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def config(made: Path, folder: Path, **words: Any) -> Path:
    """Write a merge of both adapters to a YAML file."""
    content: dict[str, Any] = {
        "base": str(made / "base"),
        "sources": [str(made / "a"), {"name": "law", "path": str(made / "b"), "weight": 0.5}],
        "method": "ties",
        "space": "core",
        "params": {"density": 0.3},
        "overrides": {"*.layer.1.*": {"scale": 0.5}},
        "output": str(folder / "out"),
    }
    file = folder / "merge.yaml"
    file.write_text(yaml.safe_dump(content | words), encoding="utf-8")
    return file


def test_a_config_is_one_call(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome("merge", config(made, tmp_path)) == 0
    assert f"{tmp_path / 'out'}: 8 weights merged by ties" in capsys.readouterr().out
    merge(
        made / "base",
        [made / "a", ("law", made / "b")],
        tmp_path / "called",
        method="ties",
        space="core",
        weights=[1.0, 0.5],
        density=0.3,
        overrides={"*.layer.1.*": {"scale": 0.5}},
        progress=False,
    )
    got, want = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "called")
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_options_win_over_the_config(made: Path, tmp_path: Path) -> None:
    file = config(made, tmp_path)
    options = [
        "--output",
        tmp_path / "other",
        "--method",
        "mean",
        "--set",
        "params={}",
        "--space",
        "auto",
        "--as",
        "lora",
    ]
    assert outcome("merge", file, *options, "--source", f"{made / 'b'}:2") == 0
    assert not (tmp_path / "out").exists()
    report = MergeReport.load(tmp_path / "other" / "report.json")
    assert (report.method, report.output_kind, report.weights) == ("mean", "lora", [2.0])
    assert list(report.sources) == ["b"]


def test_a_dry_run_writes_nothing(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome("merge", config(made, tmp_path), "--dry-run") == 0
    said = capsys.readouterr().out
    assert "encoder.layer.0.attention.self.query.weight" in said
    assert "core" in said
    assert [path.name for path in tmp_path.iterdir()] == ["merge.yaml"]


@pytest.mark.parametrize(
    ("words", "options", "line"),
    [
        ({"metod": "ties"}, [], "error: metod: unknown key, did you mean 'method'?"),
        ({"rank": "4"}, [], "error: rank: expected a valid integer, got '4'"),
        ({"as": "lorra"}, [], "error: as: expected 'checkpoint', 'lora', 'rotation' or 'delta', got 'lorra'"),
        ({"sources": []}, [], "error: sources: "),
        ({"params": {"densty": 1}}, [], "error: unknown parameter of method 'ties' 'densty', did you mean 'density'?"),
        ({}, ["--statistics", "c=x"], "error: unknown source in --statistics 'c'. Choose from: a, law"),
        ({}, ["--statistics", "a"], "error: --statistics takes NAME=PATH, got 'a'"),
        ({}, ["--param", "density"], "error: --param takes KEY=VALUE as in density=0.3, got 'density'"),
        ({}, ["--source", "=x"], "error: --source takes [NAME=]PATH[:WEIGHT], got '=x'"),
    ],
)
def test_bad_words_are_one_line(
    words: dict[str, Any],
    options: list[str],
    line: str,
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert outcome("merge", config(made, tmp_path, **words), *options) == 2
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert len(said.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["merge.yaml"]


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome("merge", "--method", "mean", "--output", tmp_path / "out") == 2
    assert capsys.readouterr().err.splitlines() == ["error: base: missing", "error: sources: missing"]
    assert outcome("merge", tmp_path / "no.yaml") == 2
    assert capsys.readouterr().err.startswith(f"error: no such file: {tmp_path / 'no.yaml'}")


def test_a_dry_run_refuses_what_could_not_be_written(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome("merge", config(made, tmp_path), "--dry-run", "--as", "lora", "--space", "full") == 2
    assert capsys.readouterr().err.startswith("error: output='lora' needs a rank here: 8 merged weights")
    assert outcome("merge", config(made, tmp_path), "--dry-run", "--as", "rotation") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
