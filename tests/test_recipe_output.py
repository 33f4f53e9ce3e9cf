"""A recipe's output folder: what a run replaces comes back if nothing comes of it, and who may write it at a time."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_case import recipe, save_models

from orthoft.merging.resume.lock import locked
from orthoft.recipes import load, run
from orthoft.recipes.layout import EXPERTS, RECIPE, RESULTS
from orthoft.recipes.output import BEFORE, output_opened, refuse_own_inputs, tasks_locked

Words = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, a recipe, and its finished run in ``out``."""
    root = tmp_path_factory.mktemp("work")
    save_models(root)
    run(recipe(root, root), ["merge={method: mean}"])
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Iterator[Path]:
    """The finished run once more, as it may be spoilt."""
    shutil.copytree(made / "out", tmp_path / "out")
    yield tmp_path
    assert not list(tmp_path.glob(".*.lock"))


def words(made: Path, root: Path, *overrides: str) -> Any:
    return load(made / "recipe.yaml", [f"output={root / 'out'}", "merge={method: mean}", *overrides])


def snapshot(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def failed(made: Path, root: Path, again: Any, tasks: Any = None, write: tuple[str, ...] = ()) -> list[str]:
    """Open the output, write some files, fail, and return what was said."""
    said, out = list[str](), root / "out"

    def work() -> None:
        with output_opened(words(made, root), out, again, tasks, said.append):
            for name in write:
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (out / name).write_text("new")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        work()
    return said


@pytest.mark.parametrize("write", [(), ("heads/a.safetensors", "scores.json", "subspaces/a.safetensors")], ids=str)
@pytest.mark.parametrize(("again", "tasks"), [("overwrite", None), ("overwrite", ["a"]), ("keep experts", None)])
def test_what_a_run_replaces_comes_back_if_nothing_was_made(
    again: str, tasks: Any, write: tuple[str, ...], made: Path, root: Path
) -> None:
    """A head that was fitted anew is not worth the experts of before; what was not replaced stays as it is."""
    before = snapshot(root / "out")
    assert failed(made, root, again, tasks, write) == []
    now = snapshot(root / "out")
    kept = set(write) if again == "keep experts" else set()  # which leaves heads alone: none is fitted anew here
    assert {name: now[name] for name in before if name not in kept} == {
        name: before[name] for name in before if name not in kept
    }
    assert now.keys() - before.keys() <= set(write)


@pytest.mark.parametrize(
    "new", ["experts/a/expert.json", "experts/.a.trainer/checkpoint-2/x", "merged/x", "results.json"]
)
def test_what_was_made_stays_and_what_was_before_waits(new: str, made: Path, root: Path) -> None:
    before = snapshot(root / "out")
    (line,) = failed(made, root, "overwrite", write=(new,))
    assert line == f"what this run was to replace waits in {root / 'out' / BEFORE} until a run succeeds"
    assert snapshot(root / "out" / BEFORE) == before
    assert (root / "out" / new).read_text() == "new"
    with output_opened(words(made, root), root / "out", "overwrite", None, lambda line: None):  # a second attempt
        assert before.items() <= snapshot(root / "out" / BEFORE).items()
        assert [path.name for path in (root / "out").iterdir() if path.name != BEFORE] == [RECIPE]
    assert not (root / "out" / BEFORE).exists()


def test_what_waits_of_one_task_does_not_cost_the_others(made: Path, root: Path) -> None:
    """One task is broken off with a checkpoint, then all are to train again and nothing comes of it."""
    before = snapshot(root / "out")
    failed(made, root, "overwrite", ["a"], ("experts/.a.trainer/checkpoint-2/x",))
    assert failed(made, root, "overwrite") == []
    assert before.items() <= snapshot(root / "out").items()
    assert not (root / "out" / BEFORE).exists()


def test_two_broken_runs_give_back_what_was_before_the_first(made: Path, root: Path) -> None:
    before = snapshot(root / "out")
    failed(made, root, "overwrite", write=("experts/a/expert.json",))
    assert failed(made, root, "overwrite") == []
    assert snapshot(root / "out") == before


def test_a_run_of_one_task_leaves_what_waits_for_another(made: Path, root: Path) -> None:
    """Two processes, a task each: the second one is done when the first one fails."""
    before, out = snapshot(root / "out"), root / "out"

    def first() -> None:
        with output_opened(words(made, root), out, "overwrite", ["a"], lambda line: None):
            with output_opened(words(made, root), out, "no", ["b"], lambda line: None):
                assert not (out / EXPERTS / "a").exists()
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        first()
    assert snapshot(out) == before


def test_an_expert_that_was_to_train_otherwise_comes_back(
    made: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, told = snapshot(root / "out"), words(made, root, "tasks.0.training.learning_rate=0.02")

    def full(*args: Any, **words: Any) -> None:
        raise MemoryError("there is no room")

    monkeypatch.setattr("orthoft.recipes.experts.train", full)
    with pytest.raises(MemoryError, match="no room"):
        run(told.model_dump(mode="json"), keep_experts=True)
    assert snapshot(root / "out") == before


def test_an_output_may_be_the_current_folder_and_a_task_be_named_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with tasks_locked(Path(), ["a", "a"]):
        assert [path.name for path in tmp_path.glob(".*.lock")] == [".here.a.lock"]
    assert not list(tmp_path.glob(".*.lock"))


def test_a_merge_that_fails_leaves_the_one_before(made: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same through `run`: the disk is full while it merges."""
    before = snapshot(root / "out")

    def full(*args: Any, **words: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orthoft.recipes.pipeline.merge", full)
    told = words(made, root).model_dump(mode="json")
    with pytest.raises(OSError, match="No space left"):
        run(told, keep_experts=True)
    now = snapshot(root / "out")
    cards = {name for name in before if name.endswith("README.md") and name.startswith(EXPERTS)}  # without scores now
    assert {name: now[name] for name in before.keys() - cards} == {name: before[name] for name in before.keys() - cards}
    assert not (root / "out" / BEFORE).exists()


def test_a_run_that_was_killed_goes_on(made: Path, root: Path) -> None:
    """Nothing puts back what a killed process replaced: the next run makes it anew, and then it goes."""
    (root / "out" / BEFORE).mkdir()
    (root / "out" / RESULTS).rename(root / "out" / BEFORE / RESULTS)
    with output_opened(words(made, root), root / "out", "no", None, lambda line: None):
        assert (root / "out" / EXPERTS / "a").is_dir()
    assert not (root / "out" / BEFORE).exists()


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("base={out}/merged", "base: {out}/merged"),
        ("base={out}/experts/../merged", "base: "),
        ("tasks.1.data.train={out}/experts/a/rows.jsonl", "data of b: {out}/experts/a/rows.jsonl"),
        ("tasks.0.data.test={out}/heads/rows.jsonl", "data of a: {out}/heads/rows.jsonl"),
    ],
)
def test_a_run_does_not_write_what_it_reads(override: str, what: str, made: Path, root: Path) -> None:
    out = root / "out"
    (out / EXPERTS / "a" / "rows.jsonl").write_text("{}")
    (out / "heads" / "rows.jsonl").write_text("{}")
    told = words(made, root, override.format(out=out))
    before = snapshot(out)
    with pytest.raises(ValueError, match=r"is among what this run writes to .*: choose another output") as error:
        run(told.model_dump(mode="json"), overwrite=True)
    assert str(error.value).startswith(what.format(out=out))
    assert snapshot(out) == before
    refuse_own_inputs(words(made, root), root / "out" / "beside", out)  # what stands there and is not ours


HOLDS = """
import sys
from pathlib import Path
from orthoft.recipes.output import tasks_locked
with tasks_locked(Path(sys.argv[1]), sys.argv[2:]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_cannot_work_on_one_task(made: Path, root: Path) -> None:
    """Others of its tasks they can: one process for each device is a way to train a recipe."""
    command = [sys.executable, "-c", HOLDS, str(root / "out"), "a"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            before = snapshot(root / "out")
            with pytest.raises(
                FileExistsError, match=rf"process {holder.pid} on .* is writing .*experts/a: wait until"
            ):
                run(words(made, root).model_dump(mode="json"), overwrite=True)
            assert snapshot(root / "out") == before
            with tasks_locked(root / "out", ["b"]):
                pass
        finally:
            holder.communicate("")
    with tasks_locked(root / "out", ["a", "b"]):
        pass


def test_an_output_in_a_folder_that_cannot_be_written_is_locked_inside(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the output is a volume of its own; an empty one is still empty with a lock in it."""
    monkeypatch.setattr("orthoft.recipes.output.os.access", lambda path, mode: path != tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    with tasks_locked(out, ["a"]):
        assert (out / ".a.lock").is_file()
        with pytest.raises(FileExistsError, match="is writing"):
            run(words(made, tmp_path).model_dump(mode="json"), until="finetune", tasks=["a"])
        run(words(made, tmp_path).model_dump(mode="json"), until="finetune", tasks=["b"])
    assert not [path for folder in (tmp_path, out) for path in folder.glob(".*.lock")]


def test_a_run_that_was_killed_before_it_wrote_its_recipe_is_begun_anew(made: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".recipe.yaml.partial").write_text("half of")
    with output_opened(words(made, tmp_path), tmp_path / "out", "no", None, lambda line: None):
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["recipe.yaml"]


def test_what_killed_processes_left_locked_goes_with_the_next(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "statistics").mkdir(parents=True)
    (out / "recipe.yaml").write_text(yaml.safe_dump(words(made, tmp_path).model_dump(mode="json")))
    dead, alive = (
        [out / "statistics" / f".{one}-gram.safetensors.{end}" for end in ("lock", "partial")] for one in "ab"
    )
    dead.append(out / ".subspaces.lock")
    for file in (*dead, alive[1]):
        file.touch()
    with (
        locked(out / "statistics" / "b-gram.safetensors"),
        output_opened(words(made, tmp_path), out, "no", None, lambda line: None),
    ):
        assert [file for file in (*dead, *alive) if file.exists()] == alive


def test_a_folder_of_something_else_stays(made: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    for again in ("no", "overwrite", "keep experts"):
        with (
            pytest.raises(FileExistsError, match="is not a run of a recipe"),
            output_opened(words(made, tmp_path), tmp_path / "out", again, None, lambda line: None),  # type: ignore[arg-type]
        ):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "letter.txt"]
