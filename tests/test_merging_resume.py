"""A merge that is killed, interrupted, out of space or given bad input: what is left, and how it goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from merging_files import TARGETS, save_base, save_lora
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import orthoft.merging.engine as engine
import orthoft.merging.resume.identity as identity
from orthoft.merging import merge
from orthoft.merging.files.safetensors_file import SafetensorsFile
from orthoft.merging.resume.journal import Journal
from orthoft.merging.resume.lock import locked

Words = dict[str, Any]
CASES: dict[str, Words] = {
    "checkpoint": {"method": "ties"},
    "scaled": {"method": "opcm"},
    "lora": {"method": "mean", "output": "lora", "rank": 3},
    "delta": {"method": "task_arithmetic", "output": "delta"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded base, and two LoRAs: one of the first layer, one of both."""
    root = tmp_path_factory.mktemp("made")
    base = save_base(root / "base", "llama", max_shard_size="20KB")
    model = AutoModelForCausalLM.from_pretrained
    save_lora(root / "first", model(base), target_modules=TARGETS["llama"], layers_to_transform=[0])
    save_lora(root / "both", model(base), seed=2, target_modules=TARGETS["llama"])
    return root


def run(made: Path, out: Path, **words: Any) -> Any:
    sources = [made / "first", made / "both"]
    given = {"method": "ties", "max_shard_size": "20KB", "progress": False, **words}
    return merge(made / "base", sources, out, **given)


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the report, which holds seconds."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("report.json", "report.html"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def told(report: Any) -> dict[str, Any]:
    """A report without what differs from run to run."""
    content = json.loads(json.dumps(report.to_dict()))
    for name in ("seconds", "peak_bytes", "output"):
        content.pop(name)
    for weight in content["merged"]:
        weight.pop("seconds")
    return content


def in_child(work: Callable[[], object]) -> int:
    """Do work in a process of its own, and return the number of the signal that ended it, 0 without one."""
    if (pid := os.fork()) == 0:
        try:
            torch.set_num_threads(1)  # the threads of the parent are not there
            work()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def at_call(count: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Act in the middle of the count-th piece that is written to a file."""
    append, calls = SafetensorsFile.append, iter(range(10**9))

    def counted(self: SafetensorsFile, piece: Tensor) -> None:
        if next(calls) == count:
            append(self, piece.reshape(-1)[: piece.numel() // 2])
            self._file.flush()
            act()
        append(self, piece)

    monkeypatch.setattr(SafetensorsFile, "append", counted)


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the weights that are merged while a test runs."""
    names: list[str] = []
    compute = engine.merged_delta

    def noted(plan: Any, name: str, *rest: Any) -> Any:
        names.append(name)
        return compute(plan, name, *rest)

    monkeypatch.setattr(engine, "merged_delta", noted)
    return names


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("case", CASES)
def test_killed_at_any_point_it_goes_on_to_the_same_bytes(
    case: str, made: Path, tmp_path: Path, merged: list[str]
) -> None:
    whole = run(made, tmp_path / "whole", **CASES[case])
    want, each = contents(tmp_path / "whole"), len(merged)
    with pytest.MonkeyPatch.context() as patched:
        calls: list[int] = []
        append = SafetensorsFile.append
        patched.setattr(SafetensorsFile, "append", lambda self, piece: calls.append(1) or append(self, piece))
        run(made, tmp_path / "counted", **CASES[case])
    assert contents(tmp_path / "counted") == want
    for point in {0, len(calls) // 3, len(calls) // 2, len(calls) - 1}:
        with pytest.MonkeyPatch.context() as patched:
            at_call(point, lambda: os.kill(os.getpid(), signal.SIGKILL), patched)
            assert in_child(lambda: run(made, tmp_path / "out", **CASES[case])) == signal.SIGKILL
        assert not (tmp_path / "out").exists()
        merged.clear()
        report = run(made, tmp_path / "out", **CASES[case])
        assert len(merged) == each if point == 0 else len(merged) < each
        assert contents(tmp_path / "out") == want
        assert told(report) == told(whole)
        assert sorted(os.listdir(tmp_path)) == ["counted", "out", "whole"]
        shutil.rmtree(tmp_path / "out")


def interrupt(made: Path, out: Path, point: int, kind: type[BaseException] = KeyboardInterrupt, **words: Any) -> None:
    """Merge until the point-th piece is written, where an error comes up."""

    def fail() -> None:
        raise kind

    with pytest.MonkeyPatch.context() as patched:
        at_call(point, fail, patched)
        with pytest.raises(kind):
            run(made, out, **words)


def change_source(made: Path, out: Path) -> Words:
    file = made / "first" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, file)
    return {}


def spoil_shard(made: Path, out: Path) -> Words:
    shard = min((out.parent / ".out.partial").glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    return {}


def cut_journal(made: Path, out: Path) -> Words:
    (journal,) = (out.parent / ".out.partial").rglob("*.jsonl")
    lines = journal.read_bytes()
    journal.write_bytes(lines[: len(lines) // 2])
    return {}


CHANGES: dict[str, Callable[[Path, Path], Words]] = {
    "nothing": lambda made, out: {},
    "source": change_source,
    "shard": spoil_shard,
    "journal": cut_journal,
    "parameter": lambda made, out: {"density": 0.5},
    "weights": lambda made, out: {"weights": [1.0, 2.0]},
    "override": lambda made, out: {"overrides": {"*layers.0*": {"scale": 0.5}}},
    "dtype": lambda made, out: {"dtype": "bfloat16"},
    "shard size": lambda made, out: {"max_shard_size": "30KB"},
    "afresh": lambda made, out: {"resume": False},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_made_afresh(change: str, made: Path, tmp_path: Path, merged: list[str]) -> None:
    mine = shutil.copytree(made, tmp_path / "made")
    run(mine, tmp_path / "before")
    each = set(merged)
    interrupt(mine, tmp_path / "out", 20)
    words = CHANGES[change](mine, tmp_path / "out")
    merged.clear()
    run(mine, tmp_path / "out", **words)
    again = set(merged)
    run(mine, tmp_path / "want", **words)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")
    assert sorted(os.listdir(tmp_path)) == ["before", "made", "out", "want"]
    if change == "nothing":
        assert 0 < len(again) < len(each)
    elif change in ("parameter", "weights", "dtype", "shard size", "afresh"):
        assert again == each
    elif change in ("source", "override"):
        assert {name for name in each if "layers.0." in name} <= again


def test_another_version_makes_all_afresh(
    made: Path, tmp_path: Path, merged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(made, tmp_path / "whole")
    each = set(merged)
    interrupt(made, tmp_path / "out", 20)
    monkeypatch.setattr(identity, "__version__", "0.0.0")
    merged.clear()
    run(made, tmp_path / "out")
    assert set(merged) == each


@pytest.mark.parametrize("case", CASES)
def test_an_interruption_leaves_what_is_done_and_bad_input_nothing(case: str, made: Path, tmp_path: Path) -> None:
    interrupt(made, tmp_path / "out", 8, **CASES[case])
    assert os.listdir(tmp_path) == [".out.partial"]
    shutil.rmtree(tmp_path / ".out.partial")
    interrupt(made, tmp_path / "out", 0, **CASES[case])
    assert os.listdir(tmp_path) == []
    interrupt(made, tmp_path / "out", 1, ValueError, **CASES[case])
    assert os.listdir(tmp_path) == []


def test_bad_input_keeps_the_shards_that_are_done(made: Path, tmp_path: Path, merged: list[str]) -> None:
    mine = shutil.copytree(made, tmp_path / "made")
    run(mine, tmp_path / "want")
    file = mine / "both" / "adapter_model.safetensors"
    good = file.read_bytes()
    tensors = load_file(file)
    last = next(name for name in tensors if "layers.1.self_attn.q_proj.lora_B" in name)
    tensors[last][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="contains NaN or Inf"):
        run(mine, tmp_path / "out")
    assert ".out.partial" in os.listdir(tmp_path)
    file.write_bytes(good)
    run(mine, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


FULL = (
    r"^the disk of .*out is full: the merge takes about \S+ GB there in all; make room and give the same command again"
)


@pytest.mark.parametrize("case", CASES)
def test_a_full_disk_is_one_line(case: str, made: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run(made, tmp_path / "want", **CASES[case])
    with pytest.MonkeyPatch.context() as patched:
        at_call(9, fail, patched)
        with pytest.raises(OSError, match=FULL) as caught:
            run(made, tmp_path / "out", **CASES[case])
    assert "\n" not in str(caught.value)
    run(made, tmp_path / "out", **CASES[case])
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def test_a_disk_that_is_really_full(made: Path, tmp_path: Path, merged: list[str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        with pytest.raises(OSError, match=FULL):
            run(made, disk / "out")
        merged.clear()
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        run(made, disk / "out")
        again = len(merged)
        merged.clear()
        run(made, tmp_path / "want")
        assert 0 < again < len(merged)
        assert contents(disk / "out") == contents(tmp_path / "want")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_on_one_output_exclude_each_other(made: Path, tmp_path: Path) -> None:
    ready, done = os.pipe(), os.pipe()

    def hold() -> None:
        with locked(tmp_path / "out"):
            os.write(ready[1], b"x")
            os.read(done[0], 1)

    pid = os.fork()
    if pid == 0:
        hold()
        os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(FileExistsError, match=rf"^process {pid} on \S+ is writing .*out: wait until it is done"):
        run(made, tmp_path / "out")
    run(made, tmp_path / "other")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert ".out.lock" in os.listdir(tmp_path)
    run(made, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]
    for end in (*ready, *done):
        os.close(end)


def test_an_old_output_stays_until_the_new_one_is_whole(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("")
    interrupt(made, out, 20, overwrite=True)
    assert os.listdir(out) == ["old"]
    run(made, out, overwrite=True)
    assert "old" not in os.listdir(out)
    assert os.listdir(tmp_path) == ["out"]


def test_a_journal_reads_what_is_whole(tmp_path: Path) -> None:
    (tmp_path / "0.jsonl").write_text(
        '{"key": "a"}\nnonsense\n{"key": "b", "file": "x", "digest": "y", "merged": []}\n{"ke'
    )
    journal = Journal(tmp_path, tmp_path, 0)
    assert journal.files() == ["x"]
    assert journal.find("b") is None
    assert journal.find("a") is None


PEAK = r"""
import json, re, sys
import tqdm.auto, orthoft.merging.reports.diagnostics
from orthoft.merging import merge
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
merge(*json.loads(sys.argv[1]), method="task_arithmetic", progress=False)
print(json.dumps([before, peak()]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the system to tell the peak")
def test_memory_is_of_the_largest_weight_not_of_the_model(tmp_path: Path) -> None:
    """A model of 200 MB in weights of 4 MB: what is needed beyond the imports is a fraction of it."""
    (tmp_path / "base").mkdir()
    names = [f"model.{i}.q.weight" for i in range(50)]
    save_file(
        {name: torch.ones(1024, 2048, dtype=torch.bfloat16) for name in names}, tmp_path / "base/model.safetensors"
    )
    (tmp_path / "lora").mkdir()
    factors = {"A": torch.ones(4, 2048), "B": torch.ones(1024, 4)}
    lora = {f"base_model.model.model.{i}.q.lora_{f}.weight": x for i in range(50) for f, x in factors.items()}
    save_file({name: x.clone() for name, x in lora.items()}, tmp_path / "lora/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q"]}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    words = json.dumps([str(tmp_path / "base"), [str(tmp_path / "lora")], str(tmp_path / "out")])
    done = subprocess.run([sys.executable, "-c", PEAK, words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, peak = json.loads(done.stdout)
    assert peak - before < 3 * 8.4e6 + 130e6
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensor.eq(5).all() for tensor in got.values())
    assert len(got) == 50


def interrupted(report: Any) -> str:
    raise KeyboardInterrupt  # not the signal, which a process in the background ignores


def test_interrupted_at_the_very_end_it_goes_on(made: Path, tmp_path: Path, merged: list[str]) -> None:
    run(made, tmp_path / "want")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "model_card", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(made, tmp_path / "out")
    assert (tmp_path / ".out.partial" / "1_Pooling").is_dir()  # carried over already
    merged.clear()
    run(made, tmp_path / "out")
    assert merged == []
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def test_what_the_base_carries_is_no_journal(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "base", tmp_path / "base")
    (tmp_path / "base" / "evaluation").mkdir()
    for name in ("evaluation/answers.jsonl", "answers.jsonl"):
        (tmp_path / "base" / name).write_text("{}\n", encoding="utf-8")
    sources = [made / "first", made / "both"]
    words: Words = {"method": "ties", "progress": False}
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(engine, "model_card", interrupted)
            with pytest.raises(KeyboardInterrupt):
                merge(tmp_path / "base", sources, tmp_path / "out", **words)
    partial = tmp_path / ".out.partial"
    (partial / "stray").mkdir()
    (partial / "stray" / "old.jsonl").write_text("{}", encoding="utf-8")
    merge(tmp_path / "base", sources, tmp_path / "out", **words)
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.jsonl")}
    assert found == {"evaluation/answers.jsonl", "answers.jsonl"}


def test_diagnostics_that_are_asked_for_later_are_made(made: Path, tmp_path: Path) -> None:
    interrupt(made, tmp_path / "out", 20, diagnostics=False)
    report = run(made, tmp_path / "out", diagnostics=True)
    assert report.diagnostics.keys() == {entry.name for entry in report.merged}
    assert told(report) == told(run(made, tmp_path / "want"))
