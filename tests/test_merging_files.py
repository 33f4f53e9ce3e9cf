"""Reading and writing of model folders: what the safetensors library says of our files, and what we say of bad ones."""

from __future__ import annotations

import ast
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import orthoft.merging
from orthoft.merging.hub import find_folder
from orthoft.merging.tensors import DTYPES, TensorFolder, as_matrix, matrix_shape
from orthoft.merging.writer import SafetensorsFile, new_folder, parse_size, write_sharded


def some_tensors() -> dict[str, torch.Tensor]:
    tensors = {f"of.{name}": (100 * torch.rand(3, 5)).to(dtype) for name, dtype in DTYPES.items()}
    shapes = {"scalar": (), "vector": (7,), "empty": (0, 4), "conv": (2, 3, 4, 5)}
    return tensors | {name: torch.randn(shape) for name, shape in shapes.items()} | {'odd "näme"\\': torch.ones(2)}


def test_a_file_we_write_is_a_safetensors_file(tmp_path: Path) -> None:
    tensors = some_tensors() | {"transposed": torch.randn(4, 6).T}
    with SafetensorsFile(tmp_path / "x.safetensors", tensors) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert back[name].reshape(-1).view(torch.uint8).equal(tensor.contiguous().reshape(-1).view(torch.uint8))
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    (length,) = struct.unpack("<Q", (tmp_path / "x.safetensors").read_bytes()[:8])
    assert length % 8 == 0


def assert_aligned(file: Path) -> None:
    """Every tensor begins at a multiple of its dtype's size, so that readers may map it into memory."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    for name, entry in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % DTYPES[entry["dtype"]].itemsize == 0, name


@pytest.mark.parametrize("limit", [100, 400, "1GB"])
def test_shards_hold_everything_once_and_no_more_than_allowed(limit: int | str, tmp_path: Path) -> None:
    tensors = some_tensors()
    sizes = {name: (tensor.dtype, tensor.numel()) for name, tensor in tensors.items()}
    asked: list[str] = []
    write_sharded(tmp_path, sizes, lambda name: asked.append(name) or tensors[name], limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert sorted(asked) == sorted(tensors)
    for file in files:
        content = load_file(file)
        assert sum(t.nbytes for t in content.values()) <= parse_size(limit) or len(content) == 1
        assert_aligned(file)
    read = TensorFolder(tmp_path)
    assert set(read) == set(tensors)
    assert all(read[name].float().equal(tensor.float()) for name, tensor in tensors.items())
    assert all(
        read.shape(name) == tensor.shape and read.dtype(name) == tensor.dtype for name, tensor in tensors.items()
    )
    if limit == "1GB":
        assert [file.name for file in files] == ["model.safetensors"]
    else:
        assert [file.name for file in files] == [
            f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
        ]
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("size", ["5", "GB", "5 PB", "-1GB", 0, "1.5GB"])
def test_a_wrong_size_is_told(size: int | str) -> None:
    with pytest.raises(ValueError, match=r"^a size is a number of bytes or e\.g\. '5GB'"):
        parse_size(size)


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


def test_other_formats_are_pointed_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"only safetensors are read: convert pytorch_model\.bin"):
        TensorFolder(tmp_path)


def write_and_fail(file: Path, kind: type[BaseException]) -> None:
    file.write_text("2")
    raise kind


def test_a_new_folder_is_all_or_nothing(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    assert os.listdir(out.parent) == ["out"]
    with pytest.raises(FileExistsError, match="output folder exists"), new_folder(out):
        pass
    for kind in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(kind), new_folder(out, overwrite=True) as folder:
            write_and_fail(folder / "b", kind)
        assert os.listdir(out.parent) == ["out"]
        assert os.listdir(out) == ["a"]
    with new_folder(out, overwrite=True) as folder:
        (folder / "b").write_text("2")
    assert os.listdir(out) == ["b"]
    assert os.listdir(out.parent) == ["out"]


def test_a_failed_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("")
    rename = Path.rename

    def fail_on_new(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_new)
    with pytest.raises(OSError, match="no"), new_folder(out, overwrite=True):
        pass
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == ["old"]


def test_a_model_is_a_folder_or_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_folder(str(tmp_path), "base") == tmp_path
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda where, allow_patterns: str(tmp_path / where))
    assert find_folder("org/model", "base") == tmp_path / "org" / "model"

    def offline(where: str, allow_patterns: list[str]) -> str:
        raise OSError("cannot reach the Hub\nlong explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError) as caught:
        find_folder("org/model", "source 'a'")
    missing = f"source 'a': no folder {Path.cwd() / 'org/model'}, and "
    assert str(caught.value) == missing + "the Hub gave no repository 'org/model' (cannot reach the Hub)"
    for where in ("./gone", "/gone/away", tmp_path / "gone"):
        with pytest.raises(FileNotFoundError, match=r"^base: no folder "):
            find_folder(where, "base")


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
    """No peft, no transformers, none of our own code that needs them."""
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
        "orthoft.bases",
        "orthoft.delta",
        "orthoft.errors",
        "orthoft.givens",
        "orthoft.linalg",
        "orthoft.sparse",
    }
    others = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert others == {"orthoft", "torch", "safetensors", "huggingface_hub", "tqdm"}
