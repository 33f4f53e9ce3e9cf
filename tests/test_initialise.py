"""Train to merge on a tiny encoder: what is collected, chosen, set, frozen, trained, saved and merged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import save_bert
from torch import Tensor, nn
from transformers import AutoModel

from orthoft.adapters import HRAConfig, PSOFTConfig
from orthoft.merging import merge
from orthoft.recipes import subspaces
from orthoft.recipes.initialise import Method, choose, covariances, initialise, weights_of

TARGETS = ["query", "key", "intermediate.dense"]
NAMES = [
    f"encoder.layer.{layer}.{part}.weight"
    for layer in (0, 1)
    for part in ("attention.self.query", "attention.self.key", "intermediate.dense")
]
R = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    save_bert(folder)
    return folder


@pytest.fixture
def base(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder)


def batches(task: int, count: int = 3) -> list[dict[str, Tensor]]:
    """Batches of a task that uses words of its own, with padding, labels and lengths that differ."""
    found = []
    for i in range(count):
        generator = torch.Generator().manual_seed(10 * task + i)
        ids = torch.randint(3 + 8 * task, 11 + 8 * task, (4, 7 + i), generator=generator)
        mask = (torch.arange(7 + i) < torch.tensor([[7 + i], [3], [5], [1]])).long()
        found.append({"input_ids": ids * mask, "attention_mask": mask, "labels": torch.zeros(4)})
    return found


def collected(model: nn.Module, tasks: int = 2) -> list[dict[str, Tensor]]:
    return [covariances(model, batches(task), NAMES) for task in range(tasks)]


def ranks(tasks: int = 2) -> list[dict[str, int]]:
    return [dict.fromkeys(NAMES, R)] * tasks


def lora(folder: Path, **fields: Any) -> Any:
    config = peft.LoraConfig(r=R, target_modules=TARGETS, **fields)
    return peft.get_peft_model(AutoModel.from_pretrained(folder), config)


def psoft(folder: Path, **fields: Any) -> Any:
    config = PSOFTConfig(r=R, target_modules=TARGETS, **fields)
    return peft.get_peft_model(AutoModel.from_pretrained(folder), config)


def train(model: Any, task: int, steps: int = 3) -> None:
    """Move whatever can be trained, by gradients of a task's inputs."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
    for batch in batches(task, steps):
        target = torch.randn(4, 32, generator=torch.Generator().manual_seed(task))
        hidden = model(**{key: value for key, value in batch.items() if key != "labels"}).last_hidden_state
        loss = (hidden[:, 0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# Covariances


def test_covariances_are_those_of_the_tokens_that_are_not_padding(base: Any) -> None:
    seen: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    mask = torch.zeros(0)
    hooks = [
        base.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0][mask.bool()].double())
        )
        for name in NAMES
    ]
    base.eval()
    with torch.no_grad():
        for batch in batches(0):
            mask = batch["attention_mask"]
            base(input_ids=batch["input_ids"], attention_mask=mask)
    for hook in hooks:
        hook.remove()
    expected = {name: torch.cat(rows).mT @ torch.cat(rows) / len(torch.cat(rows)) for name, rows in seen.items()}
    found = covariances(base, batches(0), NAMES)
    assert found.keys() == expected.keys()
    for name, C in found.items():
        assert C.dtype == torch.float64
        torch.testing.assert_close(C, expected[name], rtol=1e-5, atol=1e-6)


def test_covariances_leave_the_model_alone_and_share_what_is_the_same(base: Any) -> None:
    base.train()
    base.pooler.eval()
    before = [module.training for module in base.modules()]
    found = covariances(base, batches(0))
    assert [module.training for module in base.modules()] == before
    assert not any(module._forward_pre_hooks for module in base.modules())
    assert found[NAMES[0]] is found[NAMES[1]]
    assert found[NAMES[0]] is not found[NAMES[2]]
    assert found["encoder.layer.0.output.dense.weight"].shape == (64, 64)
    with pytest.raises(ValueError, match="the batches are empty"):
        covariances(base, [])


def test_an_adapted_model_has_the_covariances_of_its_base(base: Any, folder: Path) -> None:
    plain, adapted = covariances(base, batches(0), NAMES), covariances(lora(folder), batches(0), NAMES)
    for name in NAMES:
        assert torch.equal(plain[name], adapted[name])


# Choices


def test_choices_are_those_of_the_pure_functions(base: Any) -> None:
    inputs, weights = collected(base, 3), weights_of(base, NAMES)
    general = covariances(base, batches(1, count=1), NAMES)
    uneven = [dict.fromkeys(NAMES, 2), dict.fromkeys(NAMES[:2], 4), dict.fromkeys(NAMES, 3)]
    for method in ("osrm", "contrastive"):
        chosen = choose(method, uneven, weights, inputs, general=general, ridge=0.1)
        assert [own.keys() for own in chosen] == [own.keys() for own in uneven]
        for task, own in enumerate(chosen):
            for name, A in own.items():
                C = [each[name] for each in inputs]
                others = subspaces.mean_of_others(C, task, general[name])
                r = uneven[task][name]
                wanted = subspaces.osrm(others, r)
                if method == "contrastive":
                    wanted = subspaces.contrastive(C[task], others, r, 0.1)
                torch.testing.assert_close(A, wanted.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["contrastive", "orthogonal", "principal"])
def test_rows_for_rotations_are_mutually_orthonormal(method: Method, base: Any) -> None:
    chosen = choose(method, ranks(), weights_of(base, NAMES), collected(base), rotations=True)
    for name in NAMES:
        V = torch.cat([own[name] for own in chosen])
        torch.testing.assert_close(V @ V.mT, torch.eye(2 * R), rtol=0, atol=1e-5)


def test_layers_and_seeds_have_bases_of_their_own(base: Any) -> None:
    weights = weights_of(base, NAMES)
    first, again, other = (choose("orthogonal", ranks(), weights, seed=seed)[0] for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in NAMES)
    assert not any(torch.allclose(first[name], other[name]) for name in NAMES)
    assert not torch.allclose(first[NAMES[0]], first[NAMES[1]])


def test_chosen_rows_read_the_own_task_and_little_of_the_others(base: Any) -> None:
    inputs, weights = collected(base), weights_of(base, NAMES)

    def share(chosen: list[dict[str, Tensor]]) -> float:
        """Of what the rows read in all, how much is of the other task's inputs."""
        own = other = 0.0
        for t, rows in enumerate(chosen):
            for name, A in rows.items():
                own += float(((A.double() @ inputs[t][name]) * A).sum())
                other += float(((A.double() @ inputs[1 - t][name]) * A).sum())
        return other / (own + other)

    blind = share(choose("orthogonal", ranks(), weights))
    assert share(choose("contrastive", ranks(), weights, inputs)) < 0.5 * blind


# Adapters


def test_lora_trains_b_alone_and_starts_at_the_base(base: Any, folder: Path) -> None:
    rows = choose("contrastive", ranks(), weights_of(base, NAMES), collected(base))[0]
    model = lora(folder).eval()
    initialise(model, rows)
    batch = {key: value for key, value in batches(0)[0].items() if key != "labels"}
    assert torch.equal(model(**batch).last_hidden_state, base.eval()(**batch).last_hidden_state)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(NAMES)
    assert all(".lora_B." in name for name in trained)
    train(model, 0)
    for name, A in rows.items():
        layer = model.get_submodule("base_model.model." + name.removesuffix(".weight"))
        assert torch.equal(layer.lora_A["default"].weight, A)
        assert layer.lora_B["default"].weight.abs().max() > 0


def test_rows_may_train_from_where_they_start(base: Any, folder: Path) -> None:
    rows = choose("contrastive", ranks(), weights_of(base, NAMES), collected(base))[0]
    model = lora(folder)
    initialise(model, rows, frozen=False)
    assert any("lora_A" in name and p.requires_grad for name, p in model.named_parameters())
    train(model, 0)
    layer = dict(model.named_modules())[f"base_model.model.{NAMES[0].removesuffix('.weight')}"]
    assert not layer.lora_A["default"].weight.allclose(rows[NAMES[0]], atol=1e-4)


def experts(folder: Path, out: Path, chosen: list[dict[str, Tensor]], make: Any, **fields: Any) -> list[Path]:
    for task, rows in enumerate(chosen):
        model = make(folder, **fields)
        initialise(model, rows)
        train(model, task)
        model.save_pretrained(str(out / f"task{task}"))
    return [out / f"task{task}" for task in range(len(chosen))]


def test_the_saved_adapter_is_an_ordinary_lora_and_loads_again(base: Any, folder: Path, tmp_path: Path) -> None:
    chosen = choose("osrm", ranks(), weights_of(base, NAMES), collected(base))
    (first, _) = experts(folder, tmp_path, chosen, lora, lora_alpha=6)
    saved = load_file(first / "adapter_model.safetensors")
    for name, A in chosen[0].items():
        assert torch.equal(saved[f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"], A)
    again = peft.PeftModel.from_pretrained(base, str(first))
    layer = again.get_submodule("base_model.model." + NAMES[0].removesuffix(".weight"))
    assert torch.equal(layer.lora_A["default"].weight, chosen[0][NAMES[0]])


def changes(folder: Path, merged: Path) -> dict[str, Tensor]:
    before, after = (load_file(path / "model.safetensors") for path in (folder, merged))
    return {name: after[name].double() - before[name].double() for name in NAMES}


def test_merged_slices_do_not_talk_across(base: Any, folder: Path, tmp_path: Path) -> None:
    chosen = choose("orthogonal", ranks(), weights_of(base, NAMES))
    sources = experts(folder, tmp_path, chosen, lora)
    report = merge(folder, sources, tmp_path / "merged", method="task_arithmetic", diagnostics=True)
    told = {weight["name"]: weight for weight in report.to_dict()["merged"]}
    for name in NAMES:
        assert abs(told[name]["diagnostics"]["cross_talk"][0][1]) < 1e-6
        own = [load_file(source / "adapter_model.safetensors") for source in sources]
        change = changes(folder, tmp_path / "merged")[name]
        for tensors, rows in zip(own, chosen, strict=True):
            B = tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"].double()
            scale = 8 / R  # PEFT's lora_alpha over r
            torch.testing.assert_close(change @ rows[name].double().mT, scale * B, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("relax", [True, False])
def test_psoft_experts_merge_to_the_product_of_their_rotations(
    relax: bool, base: Any, folder: Path, tmp_path: Path
) -> None:
    weights = weights_of(base, NAMES)
    chosen = choose("contrastive", ranks(), weights, collected(base), rotations=True)
    sources = experts(folder, tmp_path, chosen, psoft, relax=relax)
    merge(folder, sources, tmp_path / "merged", method="task_arithmetic")
    turned = {name: weight.double() for name, weight in weights.items()}
    for source in sources:
        alone = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(folder), str(source))
        for name in NAMES:
            layer = alone.get_submodule("base_model.model." + name.removesuffix(".weight"))
            held = layer.adapters["default"]
            assert held.matrices().abs().max() > 1e-3
            turned[name] = held.rotate(turned[name].float(), transpose=True).double()  # rows of W Q^T
    for name, change in changes(folder, tmp_path / "merged").items():
        torch.testing.assert_close(weights[name].double() + change, turned[name], rtol=0, atol=2e-6)


# Refusals


def refusals(folder: Path, base: Any) -> Mapping[str, Any]:
    weights = weights_of(base, NAMES)
    rows = choose("orthogonal", ranks(), weights)[0]
    wide = choose("orthogonal", [dict.fromkeys(NAMES, 4)], weights)[0]
    hra = peft.get_peft_model(AutoModel.from_pretrained(folder), HRAConfig(r=4, target_modules=TARGETS))
    inputs = [{}, {}]
    return {
        "unknown way to choose subspaces 'osmr', did you mean 'osrm'": lambda: choose("osmr", ranks(), weights),  # type: ignore[arg-type]
        "'osrm' needs inputs of each of 2 tasks, got those of 0": lambda: choose("osrm", ranks(), weights),
        f"'osrm' needs inputs of '{NAMES[0]}'": lambda: choose("osrm", ranks(), weights, inputs),
        "overlap and cannot be told apart": lambda: choose("osrm", ranks(), weights, collected(base), rotations=True),
        "do not fit 32 inputs": lambda: choose("orthogonal", [dict.fromkeys(NAMES, 17)] * 2, weights),
        "unknown linear layer 'encoder.weight'": lambda: weights_of(base, ["encoder.weight"]),
        "has no LoRA or PSOFT adapter 'default'": lambda: initialise(hra, rows),
        "has no LoRA or PSOFT adapter 'other'": lambda: initialise(lora(folder), rows, "other"),
        r"reads through \(3, 32\), got rows \(4, 32\)": lambda: initialise(lora(folder), wide),
        "init_lora_weights='olora' changes the base": lambda: initialise(lora(folder, init_lora_weights="olora"), rows),
        "set save_basis to true": lambda: initialise(psoft(folder, save_basis=False), rows),
    }


def test_what_cannot_be_is_one_line(folder: Path, base: Any) -> None:
    for message, call in refusals(folder, base).items():
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert len(str(error.value).splitlines()) == 1
