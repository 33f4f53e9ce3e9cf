"""Reading of model folders: what we say of bad ones."""

from __future__ import annotations

import ast
import json
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from merging_files import MODELS
from safetensors.torch import save_file

import orthoft.merging
from orthoft.merging import plan
from orthoft.merging.files.tensors import TensorFolder, as_matrix, matrix_shape


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4, 5), (0, 3)])
def test_a_tensor_as_a_matrix(shape: tuple[int, ...]) -> None:
    assert tuple(as_matrix(torch.zeros(shape)).shape) == matrix_shape(shape)


def damage(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "header cut":
        file.write_bytes(content[:20])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "absurd header":
        file.write_bytes(struct.pack("<Q", 2**60) + content[8:])
    elif how == "longer":
        file.write_bytes(content + b"more")


@pytest.mark.parametrize("how", ["truncated", "header cut", "empty", "absurd header", "longer"])
def test_a_damaged_file_is_named_in_one_line(how: str, tmp_path: Path) -> None:
    save_file({"x": torch.ones(10, 10)}, tmp_path / "model.safetensors")
    damage(tmp_path, how)
    with pytest.raises(ValueError, match="is truncated or not a safetensors file") as caught:
        TensorFolder(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../secret.safetensors", "which leads out of its folder"),
        ("/etc/passwd", "which leads out of its folder"),
        ("gone.safetensors", "which is missing"),
        ("other.safetensors", "says that 'x' is in other.safetensors, which lacks it"),
    ],
)
def test_an_index_may_name_only_what_is_there(shard: str, message: str, tmp_path: Path) -> None:
    save_file({"y": torch.ones(2)}, tmp_path / "other.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(ValueError, match=message):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": {}}', '{"weight_map": {"x": 1}}'])
def test_a_broken_index_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("first", ["whole", "in shards"])
def test_of_a_model_saved_twice_what_transformers_loads_is_read(first: str, tmp_path: Path) -> None:
    model, words = MODELS["llama"](), {"whole": {}, "in shards": {"max_shard_size": "20KB"}}
    model.save_pretrained(tmp_path / "a", **words.pop(first))
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path / "a", **words.popitem()[1])
    found, wanted = TensorFolder(tmp_path / "a"), type(model).from_pretrained(tmp_path / "a").state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    todo = plan(tmp_path / "a", [tmp_path / "a"], method="mean")
    both = f"{tmp_path / 'a'} holds model.safetensors and model.safetensors.index.json"
    assert set(todo.notes) == {f"{both}: the first is read, as by transformers"}
    (tmp_path / "a" / "model.safetensors.index.json").write_text("{")
    assert TensorFolder(tmp_path / "a").keys() == wanted.keys()


def test_other_formats_are_pointed_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"only safetensors are read: convert pytorch_model\.bin"):
        TensorFolder(tmp_path)


def test_a_link_to_a_shard_is_followed(tmp_path: Path) -> None:
    """The Hub's cache holds links to blobs outside of the folder."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    save_file({"x": torch.ones(2)}, tmp_path / "blobs" / "abc")
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "blobs" / "abc")
    assert TensorFolder(tmp_path / "model")["x"].equal(torch.ones(2))
    shutil.rmtree(tmp_path / "blobs")
    with pytest.raises(FileNotFoundError):
        TensorFolder(tmp_path / "model")


def test_merging_reads_files_by_itself() -> None:
    """No peft, transformers for names alone, none of our own code that needs them."""
    folder = Path(orthoft.merging.__file__).parent
    imported = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")
    ours = {name for name in imported if name.startswith("orthoft") and not name.startswith("orthoft.merging")}
    assert ours == {
        "orthoft",
        "orthoft.bases",
        "orthoft.citations",
        "orthoft.delta",
        "orthoft.errors",
        "orthoft.experts",
        "orthoft.givens",
        "orthoft.hub_place",
        "orthoft.linalg",
        "orthoft.loading",
        "orthoft.reflections",
        "orthoft.sparse",
    }
    others = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
    by_name = {"transformers"}  # asked for names, inside a function of sources/renames.py: see test_house
    assert others - by_name == {"orthoft", "torch", "safetensors", "huggingface_hub", "tqdm", "jinja2", "yaml"}


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (
            ["pytorch_model.bin", "optimizer.pt", "training_args.bin"],
            " (only safetensors are read: convert pytorch_model.bin)",
        ),
        (["model.pth", "rng_state.pth"], " (only safetensors are read: convert model.pth)"),
        (["model.ckpt"], " (only safetensors are read: convert model.ckpt)"),
        (["model.pt"], " (only safetensors are read: convert model.pt)"),
        (["model.gguf"], " (only safetensors are read: convert model.gguf)"),
        (["optimizer.pt", "config.json"], ""),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_weights_in_other_formats_are_named(names: list[str], told: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError) as caught:
        TensorFolder(tmp_path)
    assert str(caught.value) == f"no model.safetensors and no model.safetensors.index.json in {tmp_path}{told}"
