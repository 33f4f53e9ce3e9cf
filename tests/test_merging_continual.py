"""Merges that are written as a delta or a rotation, and taken up again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference_spaces as oracle
import torch
from merging_files import MODELS, TARGETS, linear_weights, load, save_base, save_hra, save_lora, save_oftv2, tensors_of
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import orthoft  # noqa: F401  (PEFT knows its adapters from here on)
from orthoft.merging import merge

KINDS = list(MODELS)


def open_base(kind: str) -> Callable[[Path], Any]:
    return load if kind == "bert" else AutoModelForCausalLM.from_pretrained


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """A base per model family, with five LoRAs, two rotations and a reflection on it."""
    folders = {}
    for kind in KINDS:
        root = tmp_path_factory.mktemp(kind)
        base = save_base(root / "base", kind)
        for seed in range(5):
            targets = TARGETS[kind][: 1 + seed % 3]
            save_lora(root / f"lora{seed}", open_base(kind)(base), seed=seed, r=2 + seed % 2, target_modules=targets)
        save_oftv2(root / "turn0", linear_weights(base, kind), map="cayley")
        save_oftv2(root / "turn1", linear_weights(base, kind), map="cayley", block_share=True, seed=5)
        save_hra(root / "hra", linear_weights(base, kind))
        names = ["base", *(f"lora{seed}" for seed in range(5)), "turn0", "turn1", "hra"]
        folders[kind] = {name: root / name for name in names}
    return folders


def changes(base: Path, merged: Path) -> dict[str, Tensor]:
    own, other = tensors_of(base), tensors_of(merged)
    return {name: other[name].double() - own[name].double() for name in own}


def distance(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    lost = sum((got[name] - want[name]).norm() ** 2 for name in want) ** 0.5
    return float(lost / sum(tensor.norm() ** 2 for tensor in want.values()) ** 0.5)


def merged(base: Path, sources: list[Any], out: Path, **words: Any) -> dict[str, Tensor]:
    merge(base, sources, out, progress=False, **words)
    return changes(base, out)


@pytest.mark.parametrize("space", ["auto", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_opcm_goes_on_task_by_task(made: dict, tmp_path: Path, kind: str, space: str) -> None:
    folders = made[kind]
    base, tasks = folders["base"], [folders[f"lora{seed}"] for seed in range(5)] + [folders["turn0"]]
    words = {"method": "opcm", "alpha": 0.4, "space": space}
    state: Path = tasks[0]
    for step, task in enumerate(tasks[1:], 1):
        report = merge(base, [state, task], tmp_path / f"state{step}", output="delta", progress=False, **words)
        state = tmp_path / f"state{step}"
        at_once = merged(base, tasks[: step + 1], tmp_path / f"all{step}", **words)
        alone = merged(base, [state], tmp_path / f"alone{step}", method="task_arithmetic")
        assert distance(alone, at_once) < 3e-6
        if step > 1:
            assert any(f"goes on from {step} tasks in state{step - 1}" in note for note in report.notes)
    config = json.loads((state / "delta_config.json").read_text())
    assert len(config["task_norms"]) == 6
    assert report.scale == pytest.approx(config["scale"])
    onward = merged(base, [state, folders["hra"]], tmp_path / "onward", **words)
    assert distance(onward, merged(base, [*tasks, folders["hra"]], tmp_path / "all", **words)) < 3e-6


def test_weights_of_tasks_that_are_added(made: dict, tmp_path: Path) -> None:
    base, *tasks = (made["bert"][name] for name in ("base", "lora0", "lora1", "lora2"))
    merge(base, tasks[:2], tmp_path / "state", method="opcm", weights=[0.5, 2.0], output="delta", progress=False)
    got = merged(base, [tmp_path / "state", tasks[2]], tmp_path / "got", method="opcm", weights=[1.0, 3.0])
    assert distance(got, merged(base, tasks, tmp_path / "want", method="opcm", weights=[0.5, 2.0, 3.0])) < 3e-6


@pytest.mark.parametrize(("method", "space"), [("ties", "full"), ("mean", "core"), ("task_arithmetic", "knots")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_delta_is_a_task_like_any_other(made: dict, tmp_path: Path, kind: str, method: str, space: str) -> None:
    folders = made[kind]
    base, pair = folders["base"], [folders["lora0"], folders["lora4"]]
    merge(base, pair, tmp_path / "delta", method=method, space=space, output="delta", progress=False)
    want = merged(base, pair, tmp_path / "want", method=method, space=space)
    got = merged(base, [tmp_path / "delta"], tmp_path / "got", method="task_arithmetic")
    assert distance(got, want) < 1e-6
    both = merged(base, [tmp_path / "delta", folders["hra"]], tmp_path / "both", method="task_arithmetic")
    other = merged(base, [folders["hra"]], tmp_path / "other", method="task_arithmetic")
    assert distance(both, {name: got[name] + other[name] for name in got}) < 1e-6


def test_a_delta_becomes_a_lora(made: dict, tmp_path: Path) -> None:
    base, first, second = (made["bert"][name] for name in ("base", "lora0", "lora3"))
    merge(base, [first, second], tmp_path / "delta", method="opcm", output="delta", progress=False)
    merge(base, [tmp_path / "delta"], tmp_path / "lora", method="task_arithmetic", output="lora", progress=False)
    got = merged(base, [tmp_path / "lora"], tmp_path / "got", method="task_arithmetic")
    assert distance(got, merged(base, [first, second], tmp_path / "want", method="opcm")) < 1e-6


def test_a_delta_keeps_the_smaller_form(made: dict, tmp_path: Path) -> None:
    """Factors while they are smaller than the matrix, so that the state of OPCM never outgrows the model."""
    base, tasks = made["bert"]["base"], [made["bert"][f"lora{seed}"] for seed in range(3)]
    merge(base, tasks[:1], tmp_path / "one", method="opcm", output="delta", progress=False)
    parts = {key.rpartition(".")[2] for key in load_file(tmp_path / "one" / "delta.safetensors")}
    assert parts == {"A", "B"}
    merge(base, tasks * 4, tmp_path / "many", method="opcm", output="delta", progress=False)
    tensors = load_file(tmp_path / "many" / "delta.safetensors")
    assert any(key.endswith(".dense") for key in tensors)
    sizes = {key.removesuffix(".weight.dense"): tensor.numel() for key, tensor in tensors.items()}
    assert sum(sizes.values()) <= sum(weight.numel() for weight, _ in linear_weights(base, "bert").values())


@pytest.mark.parametrize("kind", KINDS)
def test_merged_rotations_load_in_peft(made: dict, tmp_path: Path, kind: str) -> None:
    """The adapter gives the merged weights, and orthogonal rotations; block sizes 4 and 8 are both in it."""
    folders = made[kind]
    base, pair = folders["base"], [folders["turn0"], folders["turn1"]]
    words = {"method": "task_arithmetic", "space": "rotation", "weights": [1.0, 0.5]}
    merge(base, pair, tmp_path / "adapter", output="rotation", progress=False, **words)
    want = merged(base, pair, tmp_path / "want", **words)
    got = merged(base, [tmp_path / "adapter"], tmp_path / "got", method="task_arithmetic")
    assert distance(got, want) < 2e-6
    model = PeftModel.from_pretrained(open_base(kind)(base), tmp_path / "adapter")
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        turned, plain = model.eval()(ids)[0], open_base(kind)(tmp_path / "want").eval()(ids)[0]
    assert (turned - plain).norm() < 1e-4 * plain.norm()
    name, (weight, flipped) = next(iter(linear_weights(base, kind).items()))
    matrix = weight + (want[f"{name}.weight"].T if flipped else want[f"{name}.weight"])
    if weight.shape[0] >= weight.shape[1]:
        turn = torch.linalg.lstsq(weight, matrix).solution
        assert (turn.T @ turn - torch.eye(len(turn))).norm() < 1e-4


def test_merged_rotations_are_those_of_orthomerge(made: dict, tmp_path: Path) -> None:
    folders = made["llama"]
    base, pair = folders["base"], [folders["turn0"], folders["turn1"]]
    want = merged(base, pair, tmp_path / "want", method="task_arithmetic", space="rotation")
    single = [merged(base, [one], tmp_path / one.name, method="task_arithmetic") for one in pair]
    for module, (weight, _) in linear_weights(base, "llama").items():
        if weight.shape[0] >= weight.shape[1]:
            turns = [torch.linalg.lstsq(weight, weight + one[f"{module}.weight"]).solution for one in single]
            got = weight + want[f"{module}.weight"]
            assert (got - weight @ oracle.averaged(turns, [1.0, 1.0])).norm() < 1e-5 * weight.norm()


@pytest.mark.parametrize(
    ("names", "words", "message"),
    [
        (
            ["turn0", "hra"],
            {"space": "rotation"},
            r"needs sources that are block rotations \(OFT\), not hra \(ORTHOFT_",
        ),
        (["turn0", "turn1"], {}, r"output='rotation' needs space='rotation': '.*' merges in space 'full'"),
        (["turn0", "turn1"], {"space": "rotation", "conflict": True}, r"neither a scale of the result nor conflict"),
        (["turn0", "turn1"], {"space": "rotation", "scale": 0.5}, r"neither a scale of the result nor conflict"),
        (
            ["turn0", "turn1"],
            {"space": "rotation", "method": "opcm"},
            r"that scales the whole model, got method 'opcm'",
        ),
        (["turn0", "turn1"], {"space": "rotation", "rank": 4}, r"a rotation has none: got rank=4"),
    ],
)
def test_what_is_no_rotation_is_refused(
    made: dict, tmp_path: Path, names: list[str], words: dict, message: str
) -> None:
    sources = [made["bert"][name] for name in names]
    with pytest.raises(ValueError, match=message) as caught:
        merge(made["bert"]["base"], sources, tmp_path / "out", output="rotation", **{"method": "mean", **words})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_state_goes_on_as_it_can(made: dict, tmp_path: Path) -> None:
    base, first, second = (made["bert"][name] for name in ("base", "lora0", "lora1"))
    state = tmp_path / "state"
    merge(base, [first, second], state, method="opcm", output="delta", progress=False)
    for sources in ([first, state], [state, state]):
        with pytest.raises(ValueError, match=r"which can only be gone on from as the first source: put it first"):
            merge(base, sources, tmp_path / "out", method="opcm")
    with pytest.raises(ValueError, match=r"goes on with weight 1, got 2\.0"):
        merge(base, [state, first], tmp_path / "out", method="opcm", weights=[2, 1])
    report = merge(base, [state, first], tmp_path / "out", method="opcm", alpha=0.9, progress=False)
    assert any("merged with {'alpha': 0.5}, and goes on with {'alpha': 0.9}" in note for note in report.notes)


@pytest.mark.parametrize("words", [{"method": "opcm", "scale": 0.5}, {"method": "mean", "rank": 3}])
def test_what_a_delta_cannot_keep_is_refused(made: dict, tmp_path: Path, words: dict) -> None:
    with pytest.raises(ValueError, match=r"output='delta' of method 'opcm' keeps the sum|rank is of output='lora'"):
        merge(made["bert"]["base"], [made["bert"]["lora0"]], tmp_path / "out", output="delta", **words)


def test_broken_deltas_are_told_in_one_line(made: dict, tmp_path: Path) -> None:
    base, folder = made["bert"]["base"], tmp_path / "delta"
    merge(base, [made["bert"]["lora0"]], folder, method="mean", output="delta", progress=False)
    config, tensors = json.loads((folder / "delta_config.json").read_text()), load_file(folder / "delta.safetensors")
    name = next(iter(tensors))
    broken: list[tuple[dict, dict, str]] = [
        ({**config, "version": 2}, tensors, r"has version 2, this orthoft reads version 1"),
        ({**config, "scale": None}, tensors, r"lacks 'scale' \(a number, not 0\) or 'task_norms'"),
        (config, {**tensors, "other.weight.B": torch.ones(2, 2)}, r"has 'other.weight', .* has not"),
        ({**config, "scale": True}, tensors, r"lacks 'scale' \(a number, not 0\) or 'task_norms'"),
        ({**config, "task_norms": ["1"]}, tensors, r"or 'task_norms' \(a list of numbers\)"),
        ({**config, "params": [1]}, tensors, r"has the 'params' \[1\], which are no object"),
        (config, {**tensors, name: torch.cat([tensors[name]] * 2)}, r"has parts of shapes .*, the base's has shape"),
        (config, {**tensors, name: tensors[name].flatten()}, r"has parts of shapes .*, the base's has shape"),
        (config, {**tensors, name: tensors[name][..., None]}, r"has parts of shapes .*, the base's has shape"),
        (config, {**tensors, name: tensors[name] / 0}, r"contains NaN or Inf"),
    ]
    for new_config, new_tensors, message in broken:
        (folder / "delta_config.json").write_text(json.dumps(new_config))
        save_file(new_tensors, folder / "delta.safetensors")
        with pytest.raises(ValueError, match=message) as caught:
            merge(base, [folder], tmp_path / "out", method="mean", progress=False)
        assert str(caught.value).startswith("source 'delta'")
        assert "\n" not in str(caught.value)
