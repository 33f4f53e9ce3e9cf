"""``orthoft merge`` by a YAML file, by options, and by both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from merging_files import save_pair, tensors_of

from orthoft.cli import main
from orthoft.cli.merge import parse_param, with_statistics
from orthoft.merging import InspectReport, MergeReport, merge
from orthoft.recipes.merge_job import load_job


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair(tmp_path_factory.mktemp("made"))


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
        ({"sources": None}, ["--statistics", "a=b"], "error: sources: expected a valid list, got None"),
        ({"sources": [{"weight": 2.0}]}, ["--statistics", "a=b"], "error: sources[0].path: missing"),
        ({"sources": [3]}, ["--statistics", "a=b"], "error: sources[0]: "),
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


def test_statistics_go_to_the_source_of_a_name(made: Path, tmp_path: Path) -> None:
    file = config(made, tmp_path, sources=[str(made / "a"), str(made / "a"), {"path": "b", "name": "law"}])
    arguments = load_job(file, ["sources.2.name=math"]).arguments()
    told = with_statistics(arguments, ["a#2=x.safetensors", "math=~/y.safetensors"])
    assert told["statistics"] == {"a#2": "x.safetensors", "math": str(Path.home() / "y.safetensors")}
    assert arguments["statistics"] == {}


def whole_of(made: Path) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(made / "base").values())


def test_a_dry_run_tells_the_size_of_what_is_asked_for(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*options: str) -> int:
        assert outcome("--json", "merge", config(made, tmp_path), "--dry-run", *options) == 0
        written: int = json.loads(capsys.readouterr().out)["total"]["bytes_written"]
        return written

    assert told() == whole_of(made) == 2 * told("--dtype", "bfloat16")
    lora = told("--as", "lora", "--rank", "2")
    assert (
        lora == 2 * told("--as", "lora", "--rank", "1") == 2 * told("--as", "lora", "--rank", "2", "--dtype", "float16")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "{made}/a"], "output folder exists: {made}/a (choose another"),
        (["--output", "{made}/a", "--overwrite"], "the output folder {made}/a holds what is merged"),
        (["--output", "{made}/base/new"], "the output folder {made}/base/new is inside the base"),
        (["--device", "cuda:99"], "device 'cuda:99' was chosen, and "),
        (["--device", "gpu"], "unknown device 'gpu'"),
    ],
)
def test_a_dry_run_refuses_what_a_merge_would_refuse(
    options: list[str], message: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [option.format(made=made) for option in options]
    assert outcome("merge", config(made, tmp_path), "--dry-run", *words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: " + message.format(made=made))
    assert outcome("merge", config(made, tmp_path), *words) == 2
    assert capsys.readouterr().err == said.err
    assert (said.out, len(said.err.splitlines())) == ("", 1)


def test_a_dry_run_may_overwrite(made: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert outcome("merge", config(made, tmp_path), "--dry-run") == 2
    assert outcome("merge", config(made, tmp_path), "--dry-run", "--overwrite") == 0


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("base: x\n? [a, b]\n: 1\n", ":2:3", "a key is a word, not a list"),
        ("base: x\nparams:\n  ? {a: b}\n  : 1\n", ":3:5", "a key is a word, not a mapping"),
        ("seed: 2026-02-30\n", "", "not a YAML text (day is out of range for month)"),
        ("seed: " + "[" * 1000, "", "not a YAML text ("),
    ],
)
def test_what_is_no_config_is_told_with_its_place(
    text: str, place: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text(text, encoding="utf-8")
    assert outcome("merge", file) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {file}{place}: {problem}")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("value", ["2026-02-30", "[a", "{? [a]: 1}"])
def test_a_parameter_is_a_yaml_value(value: str) -> None:
    with pytest.raises(ValueError, match="is not a YAML value"):
        parse_param(f"density={value}")


def test_a_page_has_a_folder_before_the_work(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inspected = ["inspect", made / "a", made / "b", "--base", made / "base", "--html"]
    page = tmp_path / "new" / "page.html"
    assert outcome(*inspected, page) == 0
    assert "<html" in page.read_text(encoding="utf-8")
    shown = capsys.readouterr().out

    def full(report: InspectReport, file: Path) -> None:
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(InspectReport, "to_html", full)
    assert outcome(*inspected, page) == 1
    assert capsys.readouterr().out == shown  # what was measured is not lost with the page

    monkeypatch.setattr("orthoft.merging.inspect_sources", None)  # which would be an error of another kind
    (tmp_path / "file").touch()
    assert outcome(*inspected, tmp_path / "file" / "page.html") == 2
    assert outcome(*inspected, tmp_path) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"error: nothing can be written into {tmp_path / 'file'}")
    assert lines[1:] == [f"error: {tmp_path} is a folder: give the name of a file in it"]
