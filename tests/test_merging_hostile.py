"""Broken and hostile files: each is read correctly, or refused in one line that names it; no crash, no hang."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merging_files import save_adapter
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from orthoft.merging.files.header import MAX_HEADER, read_header
from orthoft.merging.files.tensors import TensorFolder, as_matrix
from orthoft.merging.sources.adapter import open_source

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b": torch.arange(4, dtype=torch.int64),
    "c": torch.ones(2, 2, dtype=torch.bfloat16),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 5),
}
SOUND = save(TENSORS)
(LENGTH,) = struct.unpack("<Q", SOUND[:8])
HEADER: dict[str, Any] = json.loads(SOUND[8 : 8 + LENGTH])
DATA = SOUND[8 + LENGTH :]


def packed(header: bytes, data: bytes = DATA, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def written(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def read_all(file: Path) -> dict[str, Tensor]:
    """Read every tensor, whole and by rows."""
    folder = TensorFolder(file.parent)
    for name in folder:
        tensor, rows = folder[name], as_matrix(folder[name])
        assert tensor.shape == folder.shape(name)
        assert tensor.dtype == folder.dtype(name)
        assert folder.rows(name, 0, len(rows)).shape == rows.shape
    return dict(folder)


def refused_or_right(file: Path) -> str:
    """Return the line by which a file is refused, or nothing if it is read as the safetensors library reads it."""
    try:
        got = read_all(file)
    except (ValueError, FileNotFoundError) as error:
        line = str(error)
        assert "\n" not in line
        assert file.name in line
        assert len(line) < 600 + len(str(file))
        return line
    want = load_file(file)
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.dtype == want[name].dtype
        assert tensor.shape == want[name].shape
        assert tensor.reshape(-1).view(torch.uint8).equal(want[name].reshape(-1).view(torch.uint8))
    return ""


VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        3,
        2**31,
        2**63 - 1,
        2**63,
        2**64,
        10**30,
        1.5,
        1e308,
        "",
        "F32",
        "f32",
        "F64",
        "I64",
    ),
    *("F8_E4M3", "F4", "C64", "\0", "x" * 1000, [], [0], [3, 4], [4, 3], [12], [-3, -4], [3.0, 4], ["3", 4], [[3], 4]),
    *(
        [2**62, 2**62],
        [0, 2**62],
        [1] * 15,
        [1] * 17,
        [1] * 1000,
        [0, 48],
        [48, 0],
        [0, 47],
        [0, 49],
        [1, 49],
        [0, 10**30],
    ),
    *([0, 48, 48], [-48, 0], {}, {"x": 1}, {"dtype": "F32"}),
]


def mutated() -> dict[str, bytes]:
    """Every field of every entry of a sound header in turn holds every value; or is missing, or doubled."""
    cases = {}
    for name in HEADER:
        for field in ("dtype", "shape", "data_offsets"):
            for number, value in enumerate(VALUES):
                header = deepcopy(HEADER)
                header[name][field] = value
                cases[f"{name} {field} {number}"] = json.dumps(header).encode()
            header = deepcopy(HEADER)
            del header[name][field]
            cases[f"{name} without {field}"] = json.dumps(header).encode()
            text = json.dumps(HEADER[name])[:-1] + f', "{field}": {json.dumps(HEADER[name][field])}}}'
            cases[f"{name} {field} twice"] = json.dumps(HEADER).replace(json.dumps(HEADER[name]), text).encode()
        for number, value in enumerate(VALUES):
            cases[f"{name} is {number}"] = json.dumps(HEADER | {name: value}).encode()
        cases[f"{name} missing"] = json.dumps({key: HEADER[key] for key in HEADER if key != name}).encode()
        cases[f"{name} doubled"] = json.dumps(HEADER | {f"{name}2": HEADER[name]}).encode()
        text = json.dumps(HEADER)[:-1] + f', "{name}": {json.dumps(HEADER[name])}}}'
        cases[f"{name} twice"] = text.encode()
    for number, value in enumerate(VALUES):
        cases[f"metadata is {number}"] = json.dumps(HEADER | {"__metadata__": value}).encode()
        cases[f"metadata holds {number}"] = json.dumps(HEADER | {"__metadata__": {"format": value}}).encode()
        cases[f"all is {number}"] = json.dumps(value).encode()
    return cases


MUTATED = mutated()


@pytest.mark.parametrize("case", MUTATED)
def test_a_header_with_a_changed_field(case: str, tmp_path: Path) -> None:
    refused_or_right(written(tmp_path / "model.safetensors", packed(MUTATED[case])))


def test_the_corpus_is_large_and_mostly_refused(tmp_path: Path) -> None:
    lines = [refused_or_right(written(tmp_path / "model.safetensors", packed(header))) for header in MUTATED.values()]
    assert len(lines) > 1000
    assert sum(map(bool, lines)) > 0.9 * len(lines)
    assert refused_or_right(written(tmp_path / "model.safetensors", SOUND)) == ""


STRANGE = {
    "nothing": b"",
    "a byte": b"\0",
    "seven bytes": b"\0" * 7,
    "eight zeros": b"\0" * 8,
    "a page of zeros": b"\0" * 4096,
    "a page of ones": b"\xff" * 4096,
    "no header": packed(b""),
    "header longer than the file": packed(b"{}", b"", 3),
    "header of 2^64": packed(b"{}", b"", 2**64 - 1),
    "header of the largest size": packed(b"{}", b"", MAX_HEADER),
    "no tensors": packed(b"{}", b""),
    "no tensors but data": packed(b"{}", b"\0"),
    "padding behind": packed(b"{}      ", b""),
    "padding before": packed(b"      {}", b""),
    "no text": packed(b"\xff\xfe{}", b""),
    "a byte order mark": packed(b"\xef\xbb\xbf{}", b""),
    "half a character": packed(b'{"\xc3": 1}', b""),
    "a lone surrogate": packed(b'{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}', b""),
    "a line feed in a name": packed(b'{"a\\nb": {"dtype": "U8", "shape": [1], "data_offsets": [0, 9]}}', b"\0"),
    "a null in a name": packed(b'{"a\\u0000b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"\0"),
    "an empty name": packed(b'{"": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"\0"),
    "NaN": packed(b'{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 1]}}', b"\0"),
    "Infinity": packed(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, Infinity]}}', b"\0"),
    "1e999": packed(b'{"a": {"dtype": "U8", "shape": [1e999], "data_offsets": [0, 1]}}', b"\0"),
    "a number of 5000 digits": packed(
        b'{"a": {"dtype": "U8", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 1]}}'
    ),
    "deep lists": packed(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b""),
    "deep objects": packed(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b""),
    "two objects": packed(b"{}{}", b""),
    "cut": SOUND[:-1],
    "longer": SOUND + b"\0",
    "cut in the header": SOUND[: 8 + LENGTH // 2],
    "a gap": packed(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}',
        b"abc",
    ),
    "an overlap": packed(
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
        b"abc",
    ),
    "a pickle": b"\x80\x02}q\x00." + b"\0" * 100,
    "a zip": b"PK\x03\x04" + b"\0" * 100,
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_strange_file(case: str, tmp_path: Path) -> None:
    line = refused_or_right(written(tmp_path / "model.safetensors", STRANGE[case]))
    sound = ("no tensors", "padding behind", "a null in a name", "an empty name")
    assert bool(line) == (case not in sound)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.one_of(st.none(), st.integers(0, len(SOUND))),
)
def test_random_bytes(flips: list[tuple[int, int]], cut: int | None, tmp_path: Path) -> None:
    content = bytearray(SOUND)
    for place, byte in flips:
        content[place] = byte
    refused_or_right(written(tmp_path / "model.safetensors", bytes(content[:cut])))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        (
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner)
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_as_a_header(header: Any, tmp_path: Path) -> None:
    refused_or_right(written(tmp_path / "model.safetensors", packed(json.dumps(header).encode(), b"\0" * 4)))


def test_what_is_no_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    (tmp_path / "model.safetensors.index.json").mkdir()
    with pytest.raises(FileNotFoundError, match=r"^no model\.safetensors and no model\.safetensors\.index\.json in "):
        TensorFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^source 'a': .* holds neither an adapter"):
        open_source("a", tmp_path, TensorFolder(sound_base(tmp_path / "base")))


LEADING_OUT = [
    *("../x.safetensors", "..", "a/../../x.safetensors", "/x.safetensors", "//host/x.safetensors", "..\\x.safetensors"),
    *("C:\\x.safetensors", "C:x.safetensors", "c:/x.safetensors", "\\\\host\\x", "a\\b.safetensors", "x\0.safetensors"),
    *("x\n.safetensors", "a/..", "./../x.safetensors", "\u202ex.safetensors", "a//../../x"),
]
MISSING = ["", ".", "gone.safetensors", "sub", "sub/gone.safetensors", "x" * 300 + ".safetensors", "~", "$HOME/x"]


@pytest.mark.parametrize("shard", [*LEADING_OUT, *MISSING])
def test_an_index_stays_in_its_folder(shard: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path / "x.safetensors", folder / "x\n.safetensors", folder / "a\\b.safetensors"):
        place.write_bytes(SOUND)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": shard}}))
    with pytest.raises(
        ValueError, match="which leads out of its folder" if shard in LEADING_OUT else "missing"
    ) as error:
        TensorFolder(folder)
    assert "\n" not in str(error.value)
    assert str(index) in str(error.value)


INDICES = [
    *(b"", b"{", b"[]", b"null", b"{}", b'{"weight_map": null}', b'{"weight_map": []}', b'{"weight_map": {"b": 1}}'),
    *(
        b'{"weight_map": {"b": ["x.safetensors"]}}',
        b'{"weight_map": {"gone": "x.safetensors"}}',
        b"\xff\xfe",
        b"[" * 100_000,
    ),
    *(b'{"weight_map": {"b": "x.safetensors", "b": "x.safetensors"}}', b'{"weight_map": {}, "weight_map": {}}', b"NaN"),
    *(b'{"a":' * 50_000, b'{"weight_map": {"\\ud800": "x.safetensors"}}', b'{"weight_map": {"b": NaN}}'),
]


@pytest.mark.parametrize("content", INDICES, ids=lambda content: repr(content[:30]))
def test_a_broken_index(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(SOUND)
    index = written(tmp_path / "model.safetensors.index.json", content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json") as error:
        TensorFolder(tmp_path)
    assert "\n" not in str(error.value)
    assert str(index) in str(error.value)


def test_what_an_index_does_not_name_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(SOUND)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"b": "x.safetensors"}}))
    assert set(TensorFolder(tmp_path)) == set(TENSORS)


def sound_base(folder: Path) -> Path:
    folder.mkdir()
    save_file({"m.query.weight": torch.randn(6, 8), "m.query.bias": torch.ones(6)}, folder / "model.safetensors")
    return folder


SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "LORA": {
        "lora_A.weight": (2, 8),
        "lora_B.weight": (6, 2),
        "lora_B.bias": (6,),
        "lora_magnitude_vector.weight": (6,),
    },
    "VERA": {"vera_lambda_d": (2,), "vera_lambda_b": (6,)},
    "BOFT": {"boft_R": (1, 4, 2, 2), "boft_s": (6, 1)},
    "OFT": {"oft_R.weight": (4, 1)},
    "HRA": {"hra_u": (8, 2)},
    "PSOFT": {"psoft_R.weight": (1,), "psoft_R.vector_a": (2,), "psoft_R.vector_b": (2,)},
    "TRAINABLE_TOKENS": {"trainable_tokens_delta": (2, 8)},
    "ORTHOFT_OFTV2": {"orthoft_oftv2_adapter.skew": (4, 1)},
    "ORTHOFT_HRA": {"orthoft_hra_adapter.u": (2, 8)},
    "ORTHOFT_PSOFT": {"orthoft_psoft_adapter.skew": (1,), "orthoft_psoft_adapter.basis": (2, 8)},
    "ORTHOFT_GOFT": {"orthoft_goft_adapter.angles": (7,)},
    "ORTHOFT_SVFT": {
        "orthoft_svft_adapter.values": (2,),
        "orthoft_svft_adapter.U": (6, 2),
        "orthoft_svft_adapter.V": (2, 8),
    },
}
SERIES = {"map": "series", "degree": 5}
CONFIGS: dict[str, dict[str, Any]] = {
    "LORA": {
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"other": 3},
        "alpha_pattern": {"other": 3},
        "use_rslora": False,
        "fan_in_fan_out": False,
        "use_dora": True,
        "lora_bias": True,
        "init_lora_weights": True,
        "target_parameters": [],
    },
    "VERA": {"r": 2, "projection_prng_key": 0, "save_projection": False, "fan_in_fan_out": False},
    "BOFT": {"boft_block_size": 2, "boft_block_num": 0, "boft_n_butterfly_factor": 1},
    "OFT": {"oft_block_size": 2, "use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "coft": True, "eps": 0.1},
    "HRA": {"r": 2, "apply_GS": False},
    "PSOFT": {
        "r": 2,
        "psoft_orth": True,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
        "cayley_neumann_eps": 0.1,
        "psoft_svd": "lowrank",
        "psoft_svd_lowrank_niter": 4,
        "random_seed": 1,
        "ab_svd_init": "psoft_init",
    },
    "TRAINABLE_TOKENS": {"token_indices": [0, 3]},
    "ORTHOFT_OFTV2": {"block_size": 2, "block_size_pattern": {}, "block_share": False, "radius": 0.5, **SERIES},
    "ORTHOFT_HRA": {"r": 2, "orthonormal": False},
    "ORTHOFT_PSOFT": {"r": 2, "svd": "full", "seed": 0, **SERIES},
    "ORTHOFT_GOFT": {"mode": "strict", "block_size": 4, "scale": False},
    "ORTHOFT_SVFT": {"pattern": "plain", "off_diagonals": 1, "rank": 2, "svd": "full", "seed": 0, "gate": False},
}
WRONG: list[Any] = [
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        3,
        7,
        1.5,
        -0.5,
        2**31 + 1,
        2**63,
        10**400,
        1e308,
        "",
        "2",
        "full",
        "x" * 100_000,
        "\0",
    ),
    *([], [2], [[[[2]]]], {}, {"(": 2}, {"(a+)+$": 2}, {"query": 0}, {"query": "2"}, {"query": [2]}, {"query": 10**9}),
    *({"query": None}, {"a{99999999999}": 1}, {"r": {"r": {"r": 1}}}),
]


def open_and_read(adapter: Path, base: Path) -> None:
    tensors = TensorFolder(base)
    source = open_source("a", adapter, tensors)
    for name in source.ranks:
        weight = as_matrix(tensors[name])
        delta = source.delta(name, weight)
        assert delta.dense().shape == weight.shape
        assert delta.rank() == source.ranks[name]


def said(run: Callable[[], None]) -> str:
    try:
        run()
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return ""


def one_line(run: Callable[[], None]) -> bool:
    """Return whether it is refused, in one line that names the source."""
    line = said(run)
    assert "\n" not in line
    assert len(line) < 900
    assert not line or line.startswith("source 'a': ")
    return bool(line)


def adapter(folder: Path, kind: str, change: dict[str, Any], shapes: dict[str, tuple[int, ...]] | None = None) -> Path:
    tensors = {f"m.query.{suffix}": torch.rand(shape) for suffix, shape in (shapes or SIZES[kind]).items()}
    config = {key: v for key, v in ({"peft_type": kind} | CONFIGS[kind] | change).items() if v is not ...}
    return save_adapter(folder, config, tensors)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_of_every_configuration(kind: str, tmp_path: Path) -> None:
    base = sound_base(tmp_path / "base")
    assert not one_line(lambda: open_and_read(adapter(tmp_path / "sound", kind, {}), base))
    refused = 0
    for field in CONFIGS[kind]:
        for number, value in enumerate([..., *WRONG]):
            folder = adapter(tmp_path / f"{field}-{number}", kind, {field: value})
            refused += one_line(lambda folder=folder: open_and_read(folder, base))  # type: ignore[misc]
    assert refused > 0 or kind in ("BOFT",)  # BOFT's file says all by its shapes


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:20])
def test_every_wrong_kind_of_adapter(value: Any, tmp_path: Path) -> None:
    base = sound_base(tmp_path / "base")
    assert one_line(lambda: open_and_read(adapter(tmp_path / "a", "LORA", {"peft_type": value}), base))
    one_line(lambda: open_and_read(adapter(tmp_path / "b", "LORA", {"trainable_token_indices": value}), base))


SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (6,), (8,), (0, 0), (1, 1), (2, 0), (3, 8), (6, 3), (8, 8), (2, 2, 2)]


@pytest.mark.parametrize("kind", SIZES)
def test_every_tensor_of_every_kind_in_other_shapes(kind: str, tmp_path: Path) -> None:
    base, refused = sound_base(tmp_path / "base"), 0
    for suffix in SIZES[kind]:
        for number, shape in enumerate([None, *SHAPES, (1, 4, 2, 3), (2, 4, 2, 2), (3, 1, 2, 2)]):
            shapes = {name: size for name, size in (SIZES[kind] | {suffix: shape}).items() if size is not None}
            if shapes:
                folder = adapter(tmp_path / f"{suffix}-{number}", kind, {}, shapes)
                refused += one_line(lambda folder=folder: open_and_read(folder, base))  # type: ignore[misc]
    assert refused > 5


CONFIG_FILES = [
    *(
        b"",
        b"{",
        b"[]",
        b"null",
        b"1",
        b'"LORA"',
        b"{}",
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ),
    *(
        b'{"peft_type": "LORA", "peft_type": "HRA"}',
        b'{"peft_type": "LORA", "r": NaN}',
        b'{"peft_type": "LORA", "r": -Infinity}',
    ),
    *(b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", b'{"peft_type": "\\ud800"}', b'{"peft_type": "a\\nb"}'),
]


@pytest.mark.parametrize("content", CONFIG_FILES, ids=lambda content: repr(content[:40]))
def test_a_broken_configuration(content: bytes, tmp_path: Path) -> None:
    base = sound_base(tmp_path / "base")
    folder = adapter(tmp_path / "a", "LORA", {})
    (folder / "adapter_config.json").write_bytes(content)
    assert one_line(lambda: open_and_read(folder, base))


def test_an_absurdly_large_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = sound_base(tmp_path / "base")
    folder = adapter(tmp_path / "a", "LORA", {})
    monkeypatch.setattr("orthoft.merging.files.tensors.MAX_JSON", 100)
    with pytest.raises(ValueError, match=r"adapter_config\.json has \d+ bytes, which is too much for a JSON file"):
        open_and_read(folder, base)


def test_headers_are_read_alone(tmp_path: Path) -> None:
    entries = read_header(written(tmp_path / "model.safetensors", SOUND))
    assert {name: entry.shape for name, entry in entries.items()} == {n: tuple(t.shape) for n, t in TENSORS.items()}
