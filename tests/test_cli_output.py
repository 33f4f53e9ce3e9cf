"""What a command prints: JSON or results alone, tables drawn on a terminal only, bars only where they are wanted."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_case import merging, outcome, recipe, refusal, save_models
from tqdm import tqdm

from orthoft.cli import main
from orthoft.cli.commands import joined
from orthoft.cli.output import Output, finite, put
from orthoft.merging import MergeReport
from orthoft.recipes.table import aligned


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that can draw, wherever the tests run."""
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# JSON


def told(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    """Return what a command prints, which has to be JSON and nothing else."""
    assert outcome(*arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_json_is_alone_on_standard_output(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = merging(models, tmp_path / "m", models / "query", models / "value", method="ties")
    planned = told(capsys, *command, "--dry-run", "--json")
    report = told(capsys, *command, "--json")
    saved = MergeReport.load(tmp_path / "m")
    assert report["norm"] == pytest.approx(saved.norm)
    assert [weight["name"] for weight in report["merged"]] == list(planned["weights"])
    query = planned["weights"]["encoder.layer.0.attention.self.query.weight"]
    assert (query["shape"], query["sources"], query["space"]) == ([32, 32], ["query"], "full")
    assert planned["total"]["flops"] == pytest.approx(sum(w["flops"] for w in planned["weights"].values()))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_option_of_all_commands_may_stand_anywhere(place: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["spaces", "knots"]
    words.insert(place, "--json")
    assert list(told(capsys, *words)) == ["knots"]


@pytest.mark.parametrize("command", ["doctor", "outputs", "recipes ls", "recipes schema", "recipes cp minilm x.yaml"])
def test_small_commands_know_json(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told(capsys, *command.split(), "--json")


def test_an_error_beside_json_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome("--json", "run", tmp_path / "no.yaml") == 2
    assert capsys.readouterr() == ("", f"error: no such file: {tmp_path / 'no.yaml'}\n")


def test_json_has_null_for_what_is_no_number() -> None:
    assert finite({"a": [1.0, float("nan")], "b": (float("inf"), None, "nan")}) == {
        "a": [1.0, None],
        "b": [None, None, "nan"],
    }


def test_what_is_said_on_the_way_goes_beside_json(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(json=True)
    with out.streams():
        print("a library")
        out.say("on the way")
        out.show({"x": 1}, "x is 1")
    said = capsys.readouterr()
    assert json.loads(said.out) == {"x": 1}
    assert said.err == "a library\non the way\n"


@pytest.mark.parametrize(("rank", "printed"), [("0", "done\n"), ("1", "")])
def test_one_of_several_processes_prints_the_result(
    rank: str, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    Output().show({}, "done")
    assert capsys.readouterr().out == printed


# Results alone


@pytest.mark.parametrize(("quiet", "said"), [(False, "note: "), (True, "")])
def test_quiet_prints_the_result_alone(
    quiet: bool, said: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = merging(models, tmp_path / "m", models / "query", models / "value")
    assert outcome(*command, *(["-q"] if quiet else [])) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(said)
    assert printed.out.splitlines()[-1].startswith(f"{tmp_path / 'm'}: 4 weights merged by mean")
    assert (len(printed.out.splitlines()) == 1) == quiet


def test_what_was_said_is_not_shown_twice(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        Output(quiet=quiet).show({}, "the table", said=True)
    assert capsys.readouterr().out == "the table\n"


def test_options_before_and_after_the_name_come_together() -> None:
    before = Output(quiet=True, threads=3)
    after = joined(before, False, True, None)
    assert (after.quiet, after.json, after.threads) == (True, True, 3)
    assert joined(before, False, False, 2).threads == 2


def test_options_are_overrides_of_a_recipe_and_those_given_win() -> None:
    assert Output(threads=2).overrides(["dtype=float16"], dtype="bfloat16", device=None) == [
        "dtype=bfloat16",
        "threads=2",
        "dtype=float16",
    ]
    assert Output().overrides(None, device="cpu") == ["device=cpu"]


@pytest.mark.usefixtures("threads")
def test_threads_are_those_of_torch(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome("inspect", models / "query", "--threads", "3") == 0
    assert torch.get_num_threads() == 3
    assert outcome("--threads", "0", "methods") == 2
    assert "--threads" in capsys.readouterr().err


# Tables and bars

ROWS = [("accuracy %", "law", "mean"), ("base", "61.7", "60.9"), ("merge [x]", "53.9", "56.2")]


@pytest.mark.usefixtures("colours")
def test_a_terminal_gets_a_drawn_table_of_the_same_cells() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    put(aligned(ROWS), terminal)
    put(aligned(ROWS), pipe)
    assert pipe.getvalue() == aligned(ROWS) + "\n"
    assert pipe.getvalue().isascii()
    drawn = terminal.getvalue()
    assert "─" in drawn
    assert "\x1b[1m" in drawn
    assert all(cell in drawn for row in ROWS[1:] for cell in row)


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("NO_COLOR", "1"), ("TERM", "dumb")])
@pytest.mark.usefixtures("colours")
def test_logs_get_plain_text(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    terminal = Terminal()
    put(aligned(ROWS), terminal)
    assert terminal.getvalue() == aligned(ROWS) + "\n"


@pytest.mark.parametrize("kind", ["methods", "spaces", "outputs", "adapters"])
@pytest.mark.usefixtures("colours")
def test_what_can_be_chosen_is_drawn_with_the_same_words(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from orthoft.recipes.catalogue import listed

    monkeypatch.setenv("COLUMNS", "2000")
    terminal, table = Terminal(), listed(kind)
    put(table, terminal)
    plain = " ".join(table.split())
    for row in table.rows[1:]:
        for cell in row:
            assert cell in terminal.getvalue()
            assert all(part in plain for part in cell.split("; "))
    assert table.notes in terminal.getvalue()


@pytest.mark.parametrize(
    ("quiet", "ci", "bars"), [(False, "", True), (True, "", False), (False, "true", False), (False, "false", True)]
)
@pytest.mark.usefixtures("colours")
def test_bars_are_drawn_where_they_are_wanted(
    quiet: bool, ci: str, bars: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Output(quiet=quiet).streams():
        assert sys.stderr.isatty() == bars
        for _ in tqdm(range(2), desc="work", disable=None):
            pass
        print("a warning", file=sys.stderr)
    assert "a warning" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ("work" in sys.stderr.getvalue()) == bars  # type: ignore[attr-defined]


def test_a_pipe_that_nobody_reads_is_no_message() -> None:
    read, write = os.pipe()
    os.close(read)
    code = "from orthoft.cli import main; main(['recipes', 'schema'])"
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_letters_that_a_log_does_not_have(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "grün").symlink_to(models / "query")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(tmp_path / "grün")])
    stream.flush()
    assert end.value.code == 0
    assert b"gr\\xfcn: adapter, LORA" in stream.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "m"],
        ["run", "recipe.yaml", "--set", "output=text/x"],
        ["merge", "--base", "m", "--source", "m", "--method", "mean", "--output", "text"],
        ["inspect", "text"],
        ["statistics", "recipe.yaml", "--kind", "fischer"],
        ["statistics", "text"],
        ["recipes", "schema", "m", "--overwrite"],
        ["recipes", "cp", "minilm", "text/x"],
        ["doctor", "now"],
    ],
)
def test_files_and_folders_in_each_others_place(
    arguments: list[str],
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe(models, tmp_path)
    Path("text").write_text("hello", encoding="utf-8")
    Path("m").mkdir()
    assert "Errno" not in refusal(capsys, *arguments)
