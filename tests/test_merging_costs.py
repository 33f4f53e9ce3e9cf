"""What a merge is said to write, before it and on a full disk, is what it writes: in every output, dtype and rank."""

from __future__ import annotations

import shutil
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from merging_files import linear_weights, load, save_lora, save_oftv2, save_pair, tensors_of
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

from orthoft.cli.merge import planned
from orthoft.merging import merge, plan
from orthoft.merging.methods import METHODS, get_method
from orthoft.merging.prepared import prepare
from orthoft.merging.reports import estimate
from orthoft.merging.reports.estimate import Job, Rates, estimates, plan_rows, total
from orthoft.merging.sources.adapter_file import AdapterFile

RATES = Rates(matmul=1e10, svd=1e9, copy=1e9, method={160: 1e-3, 512: 1e-2})
LORAS: dict[str, dict[str, Any]] = {
    "checkpoint": {},
    "checkpoint in half": {"dtype": "bfloat16"},
    "lora": {"output": "lora"},
    "lora of a rank": {"output": "lora", "rank": 3},
    "lora of a rank in half": {"output": "lora", "rank": 3, "dtype": "float16"},
    "lora of a larger rank": {"output": "lora", "rank": 30},
    "lora of dense merges": {"output": "lora", "rank": 5, "space": "full"},
    "delta": {"output": "delta", "include": ["*query*"]},
    "dense delta": {"output": "delta", "space": "full", "dtype": "bfloat16"},
    "delta of a scaled model": {"output": "delta", "method": "opcm"},
}
ROTATIONS: dict[str, dict[str, Any]] = {"rotation": {}, "rotation in half": {"dtype": "float16"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = save_pair(tmp_path_factory.mktemp("costs"))
    for seed, name in enumerate("ab", 1):
        save_oftv2(root / f"r{name}", linear_weights(root / "base", "bert"), "cayley", seed=seed)
    return root


@pytest.mark.parametrize("case", [*LORAS, *ROTATIONS])
def test_what_is_said_to_be_written_is_written(case: str, made: Path, tmp_path: Path) -> None:
    rotated = case in ROTATIONS
    words: dict[str, Any] = {"method": "mean", "device": "cpu"}
    words |= {"space": "rotation", "output": "rotation", **ROTATIONS[case]} if rotated else LORAS[case]
    sources = [made / ("r" * rotated + name) for name in "ab"]
    ready = prepare(made / "base", sources, tmp_path / "out", **words)
    costs = estimates(ready.todo, ready.writer, RATES)
    whole = total(ready.todo, costs, ready.writer)
    merge(made / "base", sources, tmp_path / "out", diagnostics=False, progress=False, **words)
    written = {name: tensor.nbytes for name, tensor in tensors_of(tmp_path / "out").items()}
    assert whole.bytes_written == ready.writer.nbytes() == sum(written.values())
    if ready.writer.shards:
        assert {name: cost.bytes_written for name, cost in costs.items()} == {name: written[name] for name in costs}
    else:
        assert sum(cost.bytes_written for cost in costs.values()) == whole.bytes_written
    if not ready.writer.shards and not rotated:
        of_base = sum(tensor.nbytes for tensor in tensors_of(made / "base").values())
        of_sources = sum(file.stat().st_size for source in sources for file in source.glob("*.safetensors"))
        assert whole.bytes_read < of_base + of_sources  # what no source changes is not read
    assert plan_rows(ready.todo, costs, whole)[-1][6] == f"{sum(written.values()) / 1e6:,.1f} MB"


def test_weights_that_an_output_leaves_out_cost_nothing(made: Path, tmp_path: Path) -> None:
    base = load(made / "base")
    save_lora(tmp_path / "a", base, target_modules=["query", "word_embeddings"])
    ready = prepare(made / "base", [tmp_path / "a"], tmp_path / "out", method="mean", output="lora")
    costs = estimates(ready.todo, ready.writer, RATES)
    left = costs["embeddings.word_embeddings.weight"]
    assert (left.bytes_read, left.bytes_written, left.seconds) == (0, 0, 0)
    assert sum(cost.bytes_read > 0 for cost in costs.values()) == 2


@pytest.mark.parametrize(("stored", "tuned"), [("bfloat16", "float32"), ("float32", "float16"), ("float32", "float32")])
def test_what_is_said_to_be_read_is_what_the_files_hold(stored: str, tuned: str, tmp_path: Path) -> None:
    sizes = {"x.weight": (24, 16), "y.weight": (16, 8), "y.bias": (16,)}
    for folder, dtype in (("base", stored), ("a", tuned), ("b", tuned)):
        (tmp_path / folder).mkdir()
        tensors = {name: torch.ones(size, dtype=getattr(torch, dtype)) for name, size in sizes.items()}
        save_file(tensors, tmp_path / folder / "model.safetensors")
    ready = prepare(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], tmp_path / "out", method="ties")
    costs = estimates(ready.todo, ready.writer, RATES)
    held = {name: [tensors_of(tmp_path / folder)[name].nbytes for folder in ("base", "a", "b")] for name in sizes}
    assert {name: cost.bytes_read for name, cost in costs.items()} == {name: sum(each) for name, each in held.items()}
    assert total(ready.todo, costs, ready.writer).bytes_read == sum(map(sum, held.values()))


def test_factors_are_read_as_they_are_stored(made: Path, tmp_path: Path) -> None:
    halved = tmp_path / "a"
    shutil.copytree(made / "a", halved)
    file = halved / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    whole, half = (
        sum(cost.bytes_read for cost in estimates(plan(made / "base", [source], method="mean"), None, RATES).values())
        for source in (made / "a", halved)
    )
    assert whole - half == sum(tensor.nbytes for tensor in load_file(file).values())


@pytest.mark.parametrize("tasks", [2, 3])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.held != (3, 2)])
def test_a_method_holds_what_it_says(name: str, tasks: int) -> None:
    method, size = get_method(name), 448
    x, weights = torch.randn(tasks, size, size, generator=torch.Generator().manual_seed(0)), torch.ones(tasks)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        method.merge(x, weights, **method.bind({}))
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = [0, *accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))]
    each, besides = method.held
    said = x.element_size() * size**2 * (each * tasks + besides)
    assert 0.7 * said < x.nbytes + max(alive) < 1.15 * said
    job = Job(
        "w", (size, size), (None,) * tasks, tasks, "full", None, 4, False, "checkpoint", 0, (4,) * tasks, method.held
    )
    assert estimate.estimate(job, RATES).memory >= x.nbytes + max(alive)


@pytest.mark.parametrize(
    ("words", "waiting"), [({"method": "mean"}, 0), ({"method": "opcm"}, 8), ({"output": "lora"}, 8)]
)
def test_the_disk_holds_the_deltas_that_wait_as_well(words: dict[str, Any], waiting: int, made: Path) -> None:
    sources = [made / "a", made / "b"]
    writer = prepare(made / "base", sources, made / "out", **{"method": "mean", **words}).writer
    assert len(writer.waiting) == waiting
    sizes = [sum(writer.plan.merged[name].matrix) * (writer.plan.merged[name].rank or 0) for name in writer.waiting]
    assert writer.disk_bytes() == writer.nbytes() + torch.float32.itemsize * sum(sizes)


@pytest.mark.parametrize("case", ["lora", "rotation"])
def test_a_dry_run_reads_headers_alone_and_counts_once(
    case: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    counted: list[str] = []
    one = estimate.estimate
    monkeypatch.setattr(AdapterFile, "read", lambda file, key: read.append(key))
    monkeypatch.setattr(estimate, "calibrate", lambda *_: RATES)
    monkeypatch.setattr(estimate, "estimate", lambda job, rates: (counted.append(job.name), one(job, rates))[1])
    names = ["ra", "rb"] if case == "rotation" else ["a", "b"]
    words = {"method": "mean", "space": "rotation" if case == "rotation" else "auto", "output": case, "device": "cpu"}
    told, _ = planned(
        {"base": made / "base", "sources": [made / name for name in names], "out": tmp_path / "out", **words}
    )
    assert read == []
    assert sorted(counted) == sorted(told["weights"])


@pytest.mark.parametrize(
    ("words", "scaled"), [({"method": "mean"}, False), ({"method": "opcm"}, True), ({"rescale": "model"}, True)]
)
def test_the_output_says_whether_the_whole_model_is_scaled(words: dict[str, Any], scaled: bool, made: Path) -> None:
    writer = prepare(made / "base", [made / "a", made / "b"], made / "out", **{"method": "mean", **words}).writer
    assert (writer.plan.finish is not None) == scaled
    assert writer.waiting == (list(writer.plan.merged) if scaled else [])
