"""Two processes train as one: DDP and FSDP2 on gloo, all adapters in one pair of processes, and ZeRO-3's gathering."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import orthoft.layer
from orthoft import ADAPTERS, penalty
from orthoft.adapter import Adapter

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
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes trained."""
    folder = tmp_path_factory.mktemp("distributed")
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
