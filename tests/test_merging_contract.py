"""From disk to disk is what it is in memory: every method in every space it works in, on mixtures of sources."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from merging_cases import CASES
from merging_files import (
    TARGETS,
    linear_weights,
    load,
    randomised,
    save_base,
    save_hra,
    save_lora,
    save_oftv2,
    tensors_of,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from orthoft.cli import main
from orthoft.delta import Delta, LowRank
from orthoft.merging import METHODS, OUTPUTS, SPACES, merge, merge_deltas, plan
from orthoft.merging.files.tensors import as_matrix
from orthoft.merging.weightwise import weight_generator

MIXTURES = {"factored": ["lora", "hra", "other"], "dense": ["lora", "oftv2", "tuned"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a source of each kind on it."""
    root = tmp_path_factory.mktemp("contract")
    base = save_base(root / "base", "bert")
    model = load(base)
    model.encoder.layer, model.config.num_hidden_layers = model.encoder.layer[:1], 1  # it is merged two hundred times
    model.save_pretrained(base)
    save_lora(root / "lora", load(base), target_modules=TARGETS["bert"])
    save_lora(root / "other", load(base), seed=5, r=2, target_modules=["query"], use_rslora=True)
    save_hra(root / "hra", linear_weights(base, "bert"))
    save_oftv2(root / "oftv2", linear_weights(base, "bert"), "cayley")
    randomised(load(base), "0.attention", seed=9).save_pretrained(root / "tuned")
    return root


def sources(made: Path, name: str, mixture: str) -> list[Path]:
    return [made / source for source in MIXTURES[mixture]][: CASES[name].tasks]


def in_memory(made: Path, folders: list[Path], **words: Any) -> dict[str, Tensor]:
    """Return the merge of each weight by `merge_deltas`, which knows nothing of files."""
    todo, merged = plan(made / "base", folders, **words), {}
    for name, item in todo.merged.items():
        weight = as_matrix(todo.base[name])
        deltas: list[Delta] = [
            source.delta(name, weight)
            if name in source.ranks
            else LowRank(torch.zeros(len(weight), 0), torch.zeros(0, weight.shape[1]))
            for source in todo.sources
        ]
        own = {**words, "space": item.space.name}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "orthoft.merging.in_memory.weight_generator", lambda s, n, name=name: weight_generator(s, name)
            )
            merged[name] = merge_deltas(deltas, base=weight, **own).dense()
    return merged


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("space", ["auto", *SPACES])
@pytest.mark.parametrize("name", METHODS)
def test_the_engine_computes_what_memory_computes(
    name: str, space: str, mixture: str, made: Path, tmp_path: Path
) -> None:
    folders = sources(made, name, mixture)
    method = METHODS[name]
    if space not in ("auto", "full") and method.entries(method.bind({})):
        with pytest.raises(ValueError, match=f"method '{name}' needs the entries of the weights themselves"):
            plan(made / "base", folders, method=name, space=space)
        return
    if space == "core" and mixture == "dense":
        with pytest.raises(ValueError, match=r"weight '.*': space 'core' needs low-rank factors, .*\(dense here: "):
            plan(made / "base", folders, method=name, space=space)
        return
    report = merge(
        made / "base", folders, tmp_path / "out", method=name, space=space, progress=False, diagnostics=False
    )
    base, got = tensors_of(made / "base"), tensors_of(tmp_path / "out")
    want = in_memory(made, folders, method=name, space=space)
    assert {entry.name for entry in report.merged} == set(want)
    largest = max(float(delta.abs().max()) for delta in want.values())
    for tensor_name, tensor in base.items():
        if tensor_name not in want:
            assert torch.equal(got[tensor_name], tensor)
            continue
        change = (got[tensor_name] - tensor).reshape(want[tensor_name].shape)
        wanted = want[tensor_name]
        if method.finish:  # its scale is of the whole model
            change, wanted = change / change.norm().clamp(min=1e-12), wanted / wanted.norm().clamp(min=1e-12)
        assert (change - wanted).abs().max() < 1e-4 * (1 if method.finish else largest), tensor_name


@pytest.mark.parametrize("output", OUTPUTS)
def test_every_output_has_a_card_and_a_page(output: str, made: Path, tmp_path: Path) -> None:
    words: dict[str, Any] = (
        {"method": "task_arithmetic", "space": "rotation"} if output == "rotation" else {"method": "tsv"}
    )
    folders = [made / "oftv2"] if output == "rotation" else [made / "lora", made / "hra"]
    merge(
        made / "base", folders, tmp_path / "out", output=output, weights=[0.5] * len(folders), progress=False, **words
    )
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in front  # the Hub takes repositories only, not a folder
    assert str(made / "base") in card
    assert {"merge", "orthoft", words["method"]} <= set(front["tags"])
    assert f"| {folders[0].name} |" in card
    assert "archivePrefix = {arXiv}" in card
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")


def test_the_recipe_on_the_card_does_the_same_again(made: Path, tmp_path: Path) -> None:
    words: dict[str, Any] = {
        "weights": [1.0, 0.5],
        "density": 0.4,
        "overrides": {"*query*": {"scale": 0.0}},
        "exclude": ["*.attention.output.*"],
        "seed": 3,
        "scale": 0.7,
    }
    folders = [made / "lora", ("law", made / "hra")]
    merge(made / "base", folders, tmp_path / "first", method="della", epsilon=0.1, progress=False, **words)
    found = re.search(r"```yaml\n(.*?)```", (tmp_path / "first" / "README.md").read_text(), re.DOTALL)
    assert found is not None
    (tmp_path / "again.yaml").write_text(found[1])
    with pytest.raises(SystemExit) as stopped:
        main(["merge", str(tmp_path / "again.yaml"), "--output", str(tmp_path / "second")])
    assert stopped.value.code == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


@pytest.mark.parametrize("name", ["wudi", "iso_cts", "della"])
def test_weights_stored_inputs_first_are_merged_the_other_way_round(name: str, tmp_path: Path) -> None:
    """Methods that tell inputs from outputs see GPT-2's Conv1D as they see a linear layer."""
    base = save_base(tmp_path / "base", "gpt2")
    model = AutoModelForCausalLM.from_pretrained
    for seed in (1, 2):
        save_lora(tmp_path / f"t{seed}", model(base), seed=seed, target_modules=["c_fc"])
    folders = [tmp_path / "t1", tmp_path / "t2"]
    merge(base, folders, tmp_path / "out", method=name, progress=False)
    weight = "transformer.h.0.mlp.c_fc.weight"
    todo = plan(base, folders, method=name)
    assert todo.merged[weight].inputs_first
    deltas = [source.delta(weight, todo.base[weight]).transposed() for source in todo.sources]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orthoft.merging.in_memory.weight_generator", lambda s, n: weight_generator(s, weight))
        want = merge_deltas(deltas, method=name).dense().mT
    got = tensors_of(tmp_path / "out")[weight] - tensors_of(base)[weight]
    assert (got - want).norm() < 1e-4 * want.norm()
