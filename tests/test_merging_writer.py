"""Writing of model folders: what the safetensors library says of our files, and that an output is all or nothing."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from orthoft.delta import Dense, LowRank
from orthoft.merging.files.safetensors_file import content_hash, write_tensors
from orthoft.merging.files.streaming import IN_FLIGHT, PIECE, Piece, pieces_of, stream
from orthoft.merging.files.tensors import DTYPES, TensorFolder
from orthoft.merging.files.writer import SafetensorsFile, parse_size, put_in_place, sharded, write_index
from orthoft.merging.outputs.checkpoint import add_rounded
from orthoft.merging.ranks import Ranks
from orthoft.merging.resume.partial import new_file, partial_folder


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
    shards = sharded({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, parse_size(limit))
    for shard in shards:
        with SafetensorsFile(tmp_path / shard.file, [name for name, *_ in shard.tensors]) as file:
            for name, dtype, shape in shard.tensors:
                assert (dtype, shape) == (tensors[name].dtype, tuple(tensors[name].shape))
                file.write(name, tensors[name])
    write_index(tmp_path, shards)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [shard.file for shard in shards]
    for file, shard in zip(files, shards, strict=True):
        content = load_file(file)
        assert sum(t.nbytes for t in content.values()) == shard.nbytes
        assert shard.nbytes <= parse_size(limit) or len(content) == 1
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


def test_a_size_is_a_number_or_has_a_unit() -> None:
    assert [parse_size(size) for size in (170000, "170000", "5GB", "2 mb")] == [170000, 170000, 5 * 10**9, 2 * 10**6]


@pytest.mark.parametrize("size", ["0", "GB", "5 PB", "-1GB", 0, "1.5GB"])
def test_a_wrong_size_is_told(size: int | str) -> None:
    with pytest.raises(ValueError, match=r"^a size is a number of bytes or e\.g\. '5GB'"):
        parse_size(size)


@contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    with partial_folder(out, overwrite, resume=False, ranks=Ranks()) as partial:
        yield partial.folder


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


def test_metadata_keeps_its_order(tmp_path: Path) -> None:
    """The same numbers are to be the same bytes; the safetensors library draws an order."""
    metadata = {name * 30: name for name in "hgfedcba"}
    with SafetensorsFile(tmp_path / "x.safetensors", ["x"], metadata) as file:
        file.write("x", torch.ones(2))
    content = (tmp_path / "x.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert list(header["__metadata__"].items()) == list(metadata.items())
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == metadata
        assert opened.get_tensor("x").equal(torch.ones(2))


def test_a_new_file_is_all_or_nothing(tmp_path: Path) -> None:
    out, partial = tmp_path / "deep" / "out.bin", tmp_path / "deep" / ".out.bin.partial"
    for text in ("1", "2"):  # the second replaces what is there, and what a killed process left
        with new_file(out) as file:
            file.write_text(text)
            assert not out.exists() or out.read_text() == "1"
            with pytest.raises(FileExistsError, match="is writing"), new_file(out):
                pass
        assert out.read_text() == text
        assert os.listdir(out.parent) == ["out.bin"]
        partial.write_text("half of")
    with pytest.raises(KeyboardInterrupt), new_file(out) as file:
        write_and_fail(file, KeyboardInterrupt)
    assert os.listdir(out.parent) == ["out.bin"]
    assert out.read_text() == "2"


def test_a_failed_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("")
    rename = Path.rename

    def fail_on_new(self: Path, target: Path) -> Path:
        if ".partial" in self.name:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_new)
    with pytest.raises(OSError, match="no"), new_folder(out, overwrite=True):
        pass
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == ["old"]


@pytest.mark.parametrize("name", ["out", "out[1]"])
def test_what_a_killed_replacement_left_goes_with_the_next(name: str, tmp_path: Path) -> None:
    for folder in (f".{name}.old-1234", f".{name}2.old-1234", "new", name):
        (tmp_path / folder).mkdir()
    put_in_place(tmp_path / "new", tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == sorted([f".{name}2.old-1234", name])  # of another output


def test_the_hash_of_a_file_is_of_all_its_bytes(tmp_path: Path) -> None:
    for name in ("x", "y"):
        with SafetensorsFile(tmp_path / name, ["a", "b"]) as file:
            file.write("a", torch.arange(6).reshape(2, 3))
            file.begin("b", torch.float32, (4,))
            file.append(torch.tensor([1.0, 2.0]))
            file.append(torch.tensor([3.0, 4.0]))
        assert file.digest == content_hash(tmp_path / name)
    assert content_hash(tmp_path / "x") == content_hash(tmp_path / "y")
    assert load_file(tmp_path / "x")["b"].equal(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    content = bytearray((tmp_path / "x").read_bytes())
    for place in (20, len(content) - 1):
        (tmp_path / "z").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert content_hash(tmp_path / "z") != file.digest


def test_a_stream_keeps_the_order_and_few_bytes_in_flight(tmp_path: Path) -> None:
    stored = {f"{i}": torch.randint(256, (i % 7, 1 << 12), dtype=torch.uint8) for i in range(40)}
    stored["large"] = torch.randint(256, (2 * PIECE + 3,), dtype=torch.uint8)
    with SafetensorsFile(tmp_path / "model.safetensors", stored) as file:
        for name, tensor in stored.items():
            file.write(name, tensor)
    pieces = [piece for name in stored for piece in pieces_of(TensorFolder(tmp_path), name, whole=name in "12")]
    assert [piece.nbytes for piece in pieces if piece.name == "large"] == [PIECE, PIECE, 3]
    read: list[Piece] = []
    written: list[Piece] = []
    got: dict[str, bytes] = {}

    def work(piece: Piece, data: torch.Tensor) -> torch.Tensor:
        read.append(piece)
        assert sum(p.nbytes for p in read) - sum(p.nbytes for p in written) <= IN_FLIGHT
        return data

    def write(piece: Piece, data: torch.Tensor) -> None:
        got[piece.name] = got.get(piece.name, b"") + data.numpy().tobytes()
        written.append(piece)

    stream(pieces, work, write)
    assert read == written == pieces
    assert got == {name: tensor.numpy().tobytes() for name, tensor in stored.items()}


@pytest.mark.parametrize("where", ["work", "write"])
def test_an_error_in_a_stream_comes_out(where: str, tmp_path: Path) -> None:
    with SafetensorsFile(tmp_path / "model.safetensors", "abcd") as file:
        for name in "abcd":
            file.write(name, torch.ones(3))
    pieces = [piece for name in "abcd" for piece in pieces_of(TensorFolder(tmp_path), name, whole=True)]
    written = []

    def work(piece: Piece, data: torch.Tensor) -> torch.Tensor:
        if where == "work" and piece.name == "b":
            raise KeyError("no")
        return data

    def write(piece: Piece, data: torch.Tensor) -> None:
        if where == "write" and piece.name == "b":
            raise KeyError("no")
        written.append(piece.name)

    with pytest.raises(KeyError, match="no"):
        stream(pieces, work, write)
    assert written[0] == "a"
    assert "b" not in written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_sums_are_rounded_once(stored: torch.dtype, dtype: torch.dtype) -> None:
    """Dense and factored, in place and not, over several slices of rows; ties of float32 sums may go either way."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(3000, 200, generator=random).to(stored)
    B, A = 0.1 * torch.randn(3000, 4, generator=random), torch.randn(4, 200, generator=random)
    want = (weight.double() + B.double() @ A.double()).to(dtype)
    for delta in (LowRank(B, A), Dense(B @ A)):
        out = weight.clone() if stored == dtype else torch.empty(3000, 200, dtype=dtype)
        got = add_rounded(out if stored == dtype else weight, delta, out, "w")
        assert got.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
        else:
            assert (got != want).float().mean() < 1e-3
            torch.testing.assert_close(got, want)
    for bad in (torch.inf, -torch.inf, torch.nan, 3e38 if dtype != torch.float32 else torch.inf):
        spoilt = Dense(torch.zeros(3000, 200))
        spoilt.d[2999, 199] = bad
        if dtype == torch.bfloat16 and bad == 3e38:
            assert torch.isfinite(add_rounded(weight, spoilt, torch.empty(3000, 200, dtype=dtype), "w")).all()
            continue
        with pytest.raises(ValueError, match=r"^merged weight 'w' contains NaN or Inf as "):
            add_rounded(weight, spoilt, torch.empty(3000, 200, dtype=dtype), "w")


def test_an_error_of_a_flush_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter([OSError("the disk is gone")])

    def fsync(handle: int) -> None:
        if (error := next(calls, None)) is not None:
            raise error

    monkeypatch.setattr("orthoft.merging.files.safetensors_file.FLUSH", 8)
    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OSError, match="the disk is gone"), SafetensorsFile(tmp_path / "file", ["a"]) as file:
        file.write("a", torch.ones(4))


def test_tensors_are_written_for_whoever_may_read_new_files(tmp_path: Path) -> None:
    tensors = some_tensors() | {"grown": torch.randn(4, requires_grad=True)}
    write_tensors(tmp_path / "x.safetensors", tensors)
    (tmp_path / "y").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "y").stat().st_mode
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert bytes(found[name].contiguous().reshape(-1).view(torch.uint8).numpy()) == bytes(
            tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        )
