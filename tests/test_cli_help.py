"""Help: commands by job, examples that parse and run, calls of Python that exist, and nothing heavy imported for it."""

from __future__ import annotations

import ast
import importlib
import inspect
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from cli_case import outcome

from orthoft.cli import app
from orthoft.cli.help import paragraphs

JOBS = {
    "Train": ["run", "finetune"],
    "Merge": ["merge", "search", "statistics"],
    "Export": ["convert", "push"],
    "Look": ["inspect", "methods", "spaces", "outputs", "adapters"],
    "Begin, and find help": ["doctor", "recipes"],
}
LIGHT = ("methods", "spaces", "outputs", "adapters", "recipes ls", "recipes cp", "recipes schema")


def commands(group: Any, *before: str) -> Iterator[tuple[str, Any]]:
    """Give every command by its words, groups of commands too."""
    for name, command in group.commands.items():
        yield " ".join([*before, name]), command
        if hasattr(command, "commands"):
            yield from commands(command, *before, name)


ROOT: Any = typer.main.get_command(app)
ALL = {"": ROOT, **dict(commands(ROOT))}
EXAMPLES = [line for command in ALL.values() for line in paragraphs(command)[1].get("Example", [])]
CALLS = [line for command in ALL.values() for line in paragraphs(command)[1].get("In Python", [])]


def test_help_imports_nothing_heavy_and_lists_commands_by_job() -> None:
    code = (
        "import sys\nfrom orthoft.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print('heavy:', *{'torch', 'peft', 'transformers', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].strip() == "heavy:"
    assert "..." not in done.stdout.replace("COMMAND [ARGS]...", "")  # whole sentences
    for job, names in JOBS.items():
        section = done.stdout.partition(f"\n{job}:\n")[2].partition("\n\n")[0]
        assert [line.split()[0] for line in section.splitlines() if line[2] != " "] == names


@pytest.mark.parametrize("name", [name for name in ALL if name])
def test_every_command_teaches(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(*name.split(), "--help") == 0
    shown = capsys.readouterr().out
    examples = paragraphs(ALL[name])[1]["Example"]
    assert all(f"\n  {line}\n" in shown for line in examples)  # as they stand, not wrapped
    assert all(line.startswith(f"orthoft {name}") for line in examples)
    assert max(map(len, examples)) <= 118
    if not hasattr(ALL[name], "commands"):
        assert "\nOptions of all commands:\n  -q, --quiet" in shown


@pytest.mark.parametrize("line", EXAMPLES)
def test_every_example_parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for command in ALL.values():
        if not hasattr(command, "commands"):
            monkeypatch.setattr(command, "callback", lambda **given: called.append(given))
    orthoft, *arguments = shlex.split(line)
    assert orthoft == "orthoft"
    ROOT.main(arguments, prog_name="orthoft", standalone_mode=False)
    assert called or arguments[-1] == "--help"


@pytest.mark.parametrize("line", [line for line in EXAMPLES if line.removeprefix("orthoft ").startswith(LIGHT)])
def test_examples_that_need_no_model_run(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert outcome(*shlex.split(line)[1:]) == 0
    said = capsys.readouterr()
    assert said.out
    assert not said.err


@pytest.mark.parametrize("line", CALLS)
def test_calls_of_python_exist(line: str) -> None:
    call = ast.parse(line, mode="eval").body
    assert isinstance(call, ast.Call)
    module, _, name = ast.unparse(call.func).rpartition(".")
    function = getattr(importlib.import_module(module), name)
    given = [ast.literal_eval(value) for value in call.args]
    inspect.signature(function).bind(*given, **{k.arg or "": ast.literal_eval(k.value) for k in call.keywords})


def test_what_calls_of_python_are_told_of() -> None:
    told = {name for name, command in ALL.items() if "In Python" in paragraphs(command)[1]}
    assert told >= {name for names in JOBS.values() for name in names if name != "recipes"}


@pytest.mark.parametrize(
    ("typed", "near"), [(["mrege"], "merge"), (["recipes", "lss"], "ls"), (["methods", "--jso"], "--json")]
)
def test_a_typo_names_the_nearest(typed: list[str], near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(*typed) == 2
    said = capsys.readouterr().err
    assert near in said
    assert len(said.splitlines()) == 1
