"""Two processes train as one: DDP and FSDP2 on gloo, adapters and recipes in one pair of processes; launch configs."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import label_task, save_bert, without_dropout
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import orthoft.layer
from orthoft import ADAPTERS, penalty
from orthoft.adapter import Adapter
from orthoft.recipes import run
from orthoft.recipes.finetune import Bar

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "oftv2": ("oftv2", {"block_size": 6}),
    "oftv2 shared": ("oftv2", {"block_size": 4, "map": "cayley", "block_share": True}),
    "hra": ("hra", {"r": 4, "orthogonality_weight": 0.1}),
    "hra orthonormal": ("hra", {"r": 3, "orthonormal": True}),
    "goft": ("goft", {}),
    "goft quasi": ("goft", {"mode": "quasi", "scale": True, "orthogonality_weight": 0.1}),
    "psoft": ("psoft", {"r": 4}),
    "svft": ("svft", {"pattern": "banded", "gate": True}),
}
CASES = {name: case for name, case in CASES.items() if case[0] in ADAPTERS}
STEPS, ROWS, WORDS, WIDTH = 2, 8, 20, 12


def test_each_adapter_is_tested() -> None:
    assert {method for method, _ in CASES.values()} == set(ADAPTERS)


class Net(nn.Module):
    """An embedding, a convolution and two linear layers, all adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1)
        self.hidden, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).mT).mT
        return self.out(torch.tanh(self.hidden(x)))


def base_model() -> Net:
    torch.manual_seed(0)
    return Net()


def adapted(case: str, start: bool = False) -> PeftModel:
    method, changes = CASES[case]
    base = base_model()
    torch.manual_seed(1)
    layers = ["embed", "conv", "hidden", "out"]
    return get_peft_model(base, ADAPTERS[method](target_modules=layers, init_weights=start, **changes))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, WORDS, (ROWS, 7), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def train(model: nn.Module, peft_model: PeftModel, ids: Tensor, labels: Tensor) -> list[float]:
    """Take a few steps and return their losses; ``model`` is the wrapped one."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
        extra = penalty(peft_model)
        optimizer.zero_grad()
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def data_parallel(model: PeftModel) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: PeftModel) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.modules():
        if isinstance(layer, orthoft.layer.OrthoLayer):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


WRAPPERS = {"ddp": data_parallel, "fsdp2": sharded}


def worker(rank: int, folder: str) -> None:
    """Train every case in both ways on this rank's half of the batch; rank 0 saves losses and adapters."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    ids, labels = (part[half] for part in batch())
    for case in CASES:
        for way, wrap in WRAPPERS.items():
            model = adapted(case)
            losses = torch.tensor(train(wrap(model), model, ids, labels))
            dist.all_reduce(losses)
            # Collective: every rank takes part in gathering.
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if rank == 0:
                torch.save(losses / 2, f"{folder}/{case}-{way}.pt")
                model.save_pretrained(f"{folder}/{case}-{way}", state_dict=state)
    for way in RECIPES:
        run_recipe(rank, Path(folder), way)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes trained."""
    folder = tmp_path_factory.mktemp("distributed")
    save_bert(folder / "bert")
    without_dropout(folder / "bert")
    label_task(folder / "data", 0, seed=0)
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("way", WRAPPERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-"))
def test_two_processes_train_as_one(trained: Path, case: str, way: str) -> None:
    model = adapted(case)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = train(model, model, *batch())
    torch.testing.assert_close(torch.load(trained / f"{case}-{way}.pt"), torch.tensor(losses), atol=1e-5, rtol=0)
    again = PeftModel.from_pretrained(base_model(), trained / f"{case}-{way}")
    got = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter, atol=1e-5, rtol=0, check_device=False)
    moved = [(got[name] - start).abs().max().item() for name, start in before.items()]
    assert min(moved) > 0
    assert max(moved) > 1e-3
    torch.testing.assert_close(again.eval()(batch()[0]), model.eval()(batch()[0]), atol=1e-4, rtol=0)


# Recipes under accelerate launch

LAUNCH = Path(__file__).parents[1] / "recipes" / "accelerate"
RECIPES = {"ddp": "ddp-cpu", "fsdp2": "fsdp2-cpu"}


def recipe(folder: Path, way: str, batch_size: int) -> dict[str, Any]:
    """Return a recipe of two tasks: plain gradients, whose scale counts, and Adam with the best of its steps."""
    task = {"kind": "classification", "max_length": 16}
    data: dict[str, Any] = {split: str(folder / "data" / f"{split}.jsonl") for split in ("train", "tuning", "test")}
    data["limit"] = {"train": 96, "tuning": 32, "test": 32}
    adapters = {"hra": {"r": 4, "orthogonality_weight": 0.1}, "psoft": {"r": 4}}
    training = {"max_steps": 6, "per_device_train_batch_size": batch_size, "learning_rate": 0.03, "save_steps": 2}
    tasks: list[dict[str, Any]] = [
        {"name": kind, "adapter": {"type": kind, "target_modules": ["query", "value"], **words}}
        for kind, words in adapters.items()
    ]
    tasks[0]["training"] = {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 100.0}
    tasks[1] |= {"training": {"eval_steps": 2}, "early_stopping": {"patience": 5}}
    return {
        "name": "tiny",
        "base": str(folder / "bert"),
        "output": str(folder / "runs" / way),
        "device": "cpu",
        "defaults": task | {"data": data, "training": training},
        "tasks": tasks,
        "merge": {"method": "mean"},
    }


def environment(name: str) -> dict[str, str]:
    """Return what accelerate launch would put into the environment of each process."""
    found: dict[str, str] = prepare_multi_gpu_env(launch_words(name))
    return {key: value for key, value in found.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def launch_words(name: str) -> Namespace:
    words = launch_command_parser().parse_args(["--config_file", str(LAUNCH / f"{name}.yaml"), "-m", "orthoft.cli"])
    checked: Namespace = _validate_launch_command(words)[0]
    return checked


class BrokenOff(RuntimeError):
    """What stops a training midway."""


def run_recipe(rank: int, folder: Path, way: str) -> None:
    """Run a recipe as one of two processes, break off in its second task, and go on from there."""
    shared = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}
    os.environ.update({key: str(value) for key, value in shared.items()} | environment(RECIPES[way]))
    parts: list[tuple[bool, int, int]] = []

    def look(self: Bar, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
        held = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())
        parts.append((bool(groups), held, sum(p.numel() for p in model.parameters())))

    def stop(self: Bar, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5 and self.what == "psoft":
            raise BrokenOff

    words, lines = recipe(folder, way, 16), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bar, "on_train_begin", look)
        with patch.context() as inner:
            inner.setattr(Bar, "on_step_end", stop)
            with pytest.raises(BrokenOff):
                run(words)
        experts = run(words, say=lines.append)["experts"]
    told = {"experts": experts, "lines": lines, "parts": parts}
    (folder / f"{way}-{rank}.json").write_text(json.dumps(told), encoding="utf-8")


@pytest.fixture(scope="module")
def alone(trained: Path) -> Path:
    """The same recipe in one process, with batches of twice the size."""
    run(recipe(trained, "alone", 32))
    return trained / "runs" / "alone"


@pytest.mark.parametrize("way", RECIPES)
def test_recipes_in_two_processes_are_those_of_the_doubled_batch(trained: Path, alone: Path, way: str) -> None:
    out = trained / "runs" / way
    for name in ("experts/hra/adapter_model", "experts/psoft/adapter_model", "merged/model"):
        got, expected = (load_file(folder / f"{name}.safetensors") for folder in (out, alone))
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, atol=1e-5, rtol=0)
    scores, expected = (json.loads((folder / "results.json").read_text())["scores"] for folder in (out, alone))
    assert scores["merge"]["hra"] == pytest.approx(expected["merge"]["hra"], abs=1e-4)


@pytest.mark.parametrize("way", RECIPES)
def test_processes_share_the_weights_or_hold_all(trained: Path, way: str) -> None:
    first, second = (json.loads((trained / f"{way}-{rank}.json").read_text()) for rank in (0, 1))
    assert first["experts"].keys() == second["experts"].keys() == {"hra", "psoft"}
    assert [told["losses"] for told in first["experts"].values()] == [
        told["losses"] for told in second["experts"].values()
    ]
    assert "  goes on from step 4" in first["lines"]
    assert second["lines"] == []
    assert first["experts"]["psoft"]["kept"] == second["experts"]["psoft"]["kept"]
    for (sharded, held, all_of), (_, others, _) in zip(first["parts"], second["parts"], strict=True):
        assert sharded == (way == "fsdp2")
        assert held + others == (all_of if sharded else 2 * all_of)


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_launch_config_says_how_it_is_used(file: Path) -> None:
    first, usage, *_ = file.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# For accelerate launch: ")
    assert f"accelerate launch --config_file {file.name} -m orthoft.cli run recipe.yaml" in usage
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["use_cpu"] is file.stem.endswith("-cpu")
    words = launch_words(file.stem)
    assert words.num_processes == 2
    assert (words.use_fsdp, words.use_deepspeed) == (file.stem.startswith("fsdp2"), file.stem == "deepspeed")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-"))
def test_adapters_adopt_gathered_weights(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 leaves empty parameters on each process, which are whole only within its context."""
    whole: list[Tensor] = []
    adopted: list[bool] = []

    @contextmanager
    def gathering(parameters: Iterator[nn.Parameter]) -> Iterator[None]:
        whole.extend(parameters)
        yield
        whole.clear()

    def adopt(self: Adapter, weight: Any) -> None:
        adopted.append(any(given.shape == weight().shape for given in whole if given.ndim > 1))

    monkeypatch.setattr(orthoft.layer, "gather_params_ctx", gathering)
    config = ADAPTERS[CASES[case][0]](target_modules=["hidden", "out"], **CASES[case][1])
    kind = type(config.make_adapter("hidden", WIDTH, 2 * WIDTH))
    monkeypatch.setattr(kind, "adopt", adopt)
    monkeypatch.setattr(kind, "reset_parameters", lambda self, identity: adopted.append(not whole))
    get_peft_model(base_model(), config)
    assert adopted == [True, True] * 2
