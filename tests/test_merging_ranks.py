"""Two processes merge as one, as torchrun starts them: each writes its own shards, on gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from merging_files import TARGETS, save_base, save_lora
from transformers import AutoModelForCausalLM

from orthoft.delta import Dense, Rotated, SubspaceRotated
from orthoft.merging import merge
from orthoft.merging.deltas import OnDevice, moved
from orthoft.merging.files.tensors import TensorFolder
from orthoft.merging.ranks import Ranks, open_ranks, pick_device
from orthoft.merging.sources.rows import Replaced

WORKER = """
import json, os, sys, torch
torch.set_num_threads(1)
import orthoft.merging.engine as engine
from orthoft.merging import merge

def fail(*args):
    raise ValueError("this rank cannot")

job = json.load(open(sys.argv[1]))
compute, told = engine.merged_delta, {}
for name, words in job["cases"].items():
    broken = words.pop("broken", None)
    engine.merged_delta = fail if os.environ["RANK"] == str(broken) else compute
    names = []
    def noted(plan, name, *rest, compute=engine.merged_delta, names=names):
        names.append(name)
        return compute(plan, name, *rest)
    engine.merged_delta = noted
    try:
        report = merge(job["base"], job["sources"], f"{job['out']}/{name}", progress=False, **words)
        told[name] = [names, report.scale, [[w.name, w.norm] for w in report.merged]]
    except Exception as error:
        told[name] = [type(error).__name__, str(error)]
json.dump(told, open(f"{job['out']}/{os.environ['RANK']}.json", "w"))
"""
CASES: dict[str, dict[str, Any]] = {
    "ties": {"method": "ties", "max_shard_size": "20KB"},
    "opcm": {"method": "opcm", "max_shard_size": "20KB"},
    "lora": {"method": "mean", "output": "lora", "rank": 3},
    "one file": {"method": "mean"},
}
BROKEN = {"broken first": {"method": "ties", "broken": 0}, "broken last": {**CASES["ties"], "broken": 1}}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A folder of what one process made, and of what two made, and what these two say of it."""
    root = tmp_path_factory.mktemp("ranks")
    base = save_base(root / "base", "llama", max_shard_size="20KB")
    sources = [str(root / "first"), str(root / "second")]
    for seed, folder in enumerate(sources):
        save_lora(Path(folder), AutoModelForCausalLM.from_pretrained(base), seed=seed, target_modules=TARGETS["llama"])
    (root / "two").mkdir()
    job = {"base": str(base), "sources": sources, "out": str(root / "two"), "cases": CASES | BROKEN}
    (root / "job.json").write_text(json.dumps(job))
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, root / "job.json"],
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=240)
        assert worker.returncode == 0, errors
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers: other sums of products may be rounded otherwise
    try:
        for name, words in CASES.items():
            merge(base, sources, root / "one" / name, progress=False, **words)
    finally:
        torch.set_num_threads(threads)
    return root, [json.loads((root / "two" / f"{rank}.json").read_text()) for rank in "01"]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("report.json", "report.html"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_write_what_one_writes(done: tuple[Path, list[dict[str, Any]]], case: str) -> None:
    root, told = done
    assert contents(root / "two" / case) == contents(root / "one" / case)
    reports = [json.loads((root / way / case / "report.json").read_text()) for way in ("one", "two")]
    for report in reports:
        for name in ("seconds", "peak_bytes", "output"):
            report.pop(name)
        for weight in report["merged"]:
            weight.pop("seconds")
    assert reports[0] == reports[1]
    (first, *rest), (second, *same) = (of_rank[case] for of_rank in told)
    assert rest == same  # both know the scale and the norms of all weights
    assert not set(first) & set(second)
    assert sorted(first + second) == sorted(weight["name"] for weight in reports[0]["merged"])
    assert first
    assert bool(second) == (case != "one file")


@pytest.mark.parametrize(("case", "rank"), [("broken first", 0), ("broken last", 1)])
def test_an_error_in_one_ends_all(done: tuple[Path, list[dict[str, Any]]], case: str, rank: int) -> None:
    root, told = done
    assert told[rank][case] == ["ValueError", "this rank cannot"]
    assert told[1 - rank][case] == ["ValueError", f"rank {rank}: this rank cannot"]
    assert not (root / "two" / case).exists()


def test_nothing_else_is_left(done: tuple[Path, list[dict[str, Any]]]) -> None:
    root, _ = done
    hidden = {path.name for path in (root / "two").iterdir()} - set(CASES) - {"0.json", "1.json"}
    assert hidden <= {".broken last.partial"}  # the shards of the rank that did its part


def test_one_process_is_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = open_ranks()
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.each(lambda: 3) == [3]
    assert ranks.share([1, 2]) == [1, 2]
    assert [Ranks(rank, 3).share(range(7)) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("gpu", "mps", "cpu:x"):
        with pytest.raises(ValueError, match=f"^unknown device {name!r}: choose cpu, auto, cuda or cuda:N$"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"^device 'cuda' was chosen, and torch finds no CUDA device"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 1)
    assert pick_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"there are 2 CUDA devices: 0 to 1$"):
        pick_device("cuda:2")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "opcm"])
def test_a_merge_on_the_gpu_is_that_on_the_cpu(
    method: str, done: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    from merging_files import tensors_of

    root, _ = done
    sources = [root / "first", root / "second"]
    for device in ("cpu", "cuda"):
        merge(root / "base", sources, tmp_path / device, method=method, device=device, progress=False)
    want, got = tensors_of(tmp_path / "cpu"), tensors_of(tmp_path / "cuda")
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-5, rtol=1e-4)


def test_rotations_that_are_moved_stay_rotations() -> None:
    rotated = Rotated(torch.ones(3, 4), torch.zeros(2, 2, 2))
    inside = SubspaceRotated(torch.ones(3, 4), torch.eye(4)[:2], torch.zeros(2, 2))
    for delta in (rotated, inside, rotated.transposed(), inside.transposed()):
        there = moved(delta, torch.device("meta"))
        assert type(there) is type(delta)
        assert there.shape == delta.shape
        assert there.dense().device.type == "meta"


def test_a_checkpoint_that_merges_by_rows_is_moved_by_rows(done: tuple[Path, list[dict[str, Any]]]) -> None:
    base = TensorFolder(done[0] / "base")
    name = next(name for name in base if len(base.shape(name)) == 2)
    weight, meta = base[name], torch.device("meta")
    read = Replaced(base, name, weight, name)
    there = moved(read, meta, by_rows=True)
    assert isinstance(there, OnDevice)
    assert there.inner is read
    assert there.shape == weight.shape
    assert there.rows(1, 3).shape == (2, weight.shape[1])
    assert there.rows(1, 3).device == there.dense().device == meta
    assert isinstance(moved(read, meta), Dense)
