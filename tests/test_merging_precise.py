"""A base in float64: every kind of source merges into it, and as precisely as into the same base in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from merging_files import (
    TARGETS,
    linear_weights,
    load,
    save_adapter,
    save_base,
    save_hra,
    save_lora,
    save_oftv2,
    tensors_of,
)
from safetensors.torch import save_file
from test_merging_sources import ADAPTERS

from orthoft.merging import merge

QUIET: dict[str, Any] = {"progress": False, "diagnostics": False}
OWN = ["LORA", "LORA, DoRA", "ORTHOFT_OFTV2", "ORTHOFT_HRA", "TRAINABLE_TOKENS", "checkpoint", "delta"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One base in float32 and in float64."""
    root = tmp_path_factory.mktemp("precise")
    save_base(root / "float32", "bert")
    save_base(root / "float64", "bert")
    double = {name: tensor.double() for name, tensor in tensors_of(root / "float32").items()}
    save_file(double, root / "float64" / "model.safetensors", {"format": "pt"})
    return root


def save(kind: str, root: Path, folder: Path) -> Path:
    base = root / "float32"
    if kind == "ORTHOFT_OFTV2":
        save_oftv2(folder, linear_weights(base, "bert"))
    elif kind == "ORTHOFT_HRA":
        save_hra(folder, linear_weights(base, "bert"))
    elif kind == "TRAINABLE_TOKENS":
        config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 3]}
        rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
        save_adapter(folder, config, {"embeddings.word_embeddings.trainable_tokens_delta": rows})
    elif kind == "checkpoint":
        folder.mkdir()
        moved = {name: tensor.double() * 1.1 + 0.01 for name, tensor in tensors_of(base).items()}
        save_file(moved, folder / "model.safetensors")
    elif kind == "delta":
        save_lora(folder.parent / "before", load(base), target_modules=["query"])
        merge(base, [folder.parent / "before"], folder, method="task_arithmetic", output="delta", **QUIET)
    elif kind.startswith("LORA"):
        save_lora(folder, load(base), target_modules=TARGETS["bert"], dora="DoRA" in kind, bias="lora_only")
    else:
        torch.manual_seed(0)
        tuned = peft.get_peft_model(load(base), replace(ADAPTERS[kind], target_modules=set(TARGETS["bert"])))
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        tuned.save_pretrained(folder)
    return folder


def compare(bases: Path, sources: list[Path], out: Path, **words: Any) -> None:
    """Merge into both bases: results are the same, and one of them differs from the base."""
    both = []
    for dtype in ("float32", "float64"):
        merge(bases / dtype, sources, out / dtype, **{**QUIET, **words})
        both.append(tensors_of(out / dtype))
    base = tensors_of(bases / "float64")
    assert all(tensor.dtype == torch.float64 for tensor in both[1].values())
    assert any((both[1][name] - base[name]).norm() > 1e-2 for name in base)
    for name, tensor in both[1].items():
        torch.testing.assert_close(both[0][name].double(), tensor, atol=2e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", [*OWN, *ADAPTERS])
def test_every_kind_of_source_merges_into_float64(kind: str, bases: Path, tmp_path: Path) -> None:
    source = save(kind, bases, tmp_path / "source")
    compare(bases, [source, source], tmp_path / "out", method="task_arithmetic", weights=[0.5, 0.25])


@pytest.mark.parametrize("space", ["auto", "full"])
@pytest.mark.parametrize("method", ["opcm", "ties", "karcher", "wudi", "dare"])
def test_mixtures_merge_into_float64(method: str, space: str, bases: Path, tmp_path: Path) -> None:
    kinds = ["LORA", "ORTHOFT_HRA", "ORTHOFT_PSOFT", "delta", "checkpoint"]
    saved = [save(kind, bases, tmp_path / kind) for kind in kinds]
    compare(bases, saved[:2], tmp_path / "factored", method=method, space=space)
    compare(bases, saved, tmp_path / "mixed", method=method, space=space)


@pytest.mark.parametrize("space", ["full", "core", "knots"])
@pytest.mark.parametrize("method", ["ties", "tsv"])
def test_a_source_that_leaves_a_weight_alone_rounds_nothing(method: str, space: str, tmp_path: Path) -> None:
    """Whichever place it has among the others: its zeros are in float64 too."""
    random = torch.Generator().manual_seed(0)
    places = {"q": ["one", "two"], "v": ["one", "two", "alone"]}
    base = {f"{place}.weight": torch.randn(40, 30, generator=random, dtype=torch.float64) for place in places}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    for name in ("one", "two", "alone"):
        factors = {
            f"{place}.lora_{part}.weight": torch.randn(*shape, generator=random, dtype=torch.float64)
            for place, of in places.items()
            for part, shape in (("A", (3, 30)), ("B", (40, 3)))
            if name in of
        }
        config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": list(places), "bias": "none"}
        save_adapter(tmp_path / name, config, factors)
    found = []
    for order in (["one", "two", "alone"], ["alone", "one", "two"], ["two", "alone", "one"]):
        folders, out = [tmp_path / name for name in order], tmp_path / f"{order[0]} first"
        merge(tmp_path / "base", folders, out, method=method, space=space, **QUIET)
        found.append(tensors_of(out))
    first = found[0]
    for other in found[1:]:
        for name, tensor in base.items():
            assert (other[name] - first[name]).norm() < 1e-12 * (first[name] - tensor).norm()


def test_rotations_merge_into_float64(bases: Path, tmp_path: Path) -> None:
    saved = [save(kind, bases, tmp_path / kind) for kind in ("ORTHOFT_OFTV2", "OFT", "checkpoint")]
    compare(bases, saved[:2], tmp_path / "rotations", method="mean", space="rotation")
    compare(bases, saved, tmp_path / "mixed", method="mean", space="rotation")
