"""Where conversions may be written: nowhere that would remove what they are made of."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_case import outcome
from merging_files import linear_weights, save_base, save_hra
from peft import get_peft_model
from transformers import AutoModel

from orthoft import HRAConfig
from orthoft.convert import from_peft, to_gguf, to_lora, to_peft
from orthoft.merging import merge

FOLDERS = {"lora": to_lora, "peft": to_peft, "orthoft": from_peft}
# Places that hold the expert that is converted, or the base, and places that are a part of them.
HELD = ["run/experts/{}", "run/experts", "run", "base", ".", "link", "run/../run/experts/{}"]
PARTS = ["run/experts/{}/heads", "base/1_Pooling", "linked/{}/heads"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base; a run with experts ``a``, ``b`` (HRA of ours) and ``c`` (HRA of PEFT); links to folders and a file."""
    root = tmp_path_factory.mktemp("made")
    experts = root / "run" / "experts"
    weights = linear_weights(save_base(root / "base", "bert"), "bert")
    for name in "ab":
        save_hra(experts / name, weights)
    to_peft(experts / "b", experts / "c", base=root / "base")
    (root / "linked").mkdir()
    for name in "abc":
        (experts / name / "heads").mkdir()
        (experts / name / "heads" / "head.json").write_text("{}")
        (root / "linked" / name).symlink_to(f"../run/experts/{name}")
    (root / "link").symlink_to("run/experts")
    (root / "link.gguf").symlink_to("base/model.safetensors")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "root", symlinks=True)
    return tmp_path / "root"


def everything(root: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.mark.parametrize("out", [*HELD, *PARTS])
@pytest.mark.parametrize("to", FOLDERS)
def test_a_folder_with_what_is_converted_stays(to: str, out: str, root: Path) -> None:
    name, words = "c" if to == "orthoft" else "b", "holds" if out in HELD else "is a part of"
    before = everything(root)
    with pytest.raises(ValueError, match=rf"^the output folder .* {words} what is converted \(.*\): choose another$"):
        FOLDERS[to](root / "run" / "experts" / name, root / out.format(name), base=root / "base", overwrite=True)
    assert everything(root) == before


@pytest.mark.parametrize("out", ["b", "../experts", "..", "b/heads"])
def test_relative_places_on_the_command_line(
    out: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root / "run" / "experts")
    before = everything(root)
    assert outcome("convert", "b", out, "--base", "../../base", "--overwrite") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the output folder ")
    assert len(said.splitlines()) == 1
    assert everything(root) == before


def test_the_place_of_a_link_and_of_its_target_is_kept(root: Path) -> None:
    """The adapter is a link in ``linked``; its weights are a link to ``store``."""
    (root / "store").mkdir()
    weights = root / "run" / "experts" / "b" / "adapter_model.safetensors"
    weights.rename(root / "store" / "weights")
    weights.symlink_to(root / "store" / "weights")
    before = everything(root)
    for out in ("linked", "store", "run/experts/b"):
        with pytest.raises(ValueError, match="holds what is converted"):
            to_lora(root / "linked" / "b", root / out, base=root / "base", overwrite=True)
    assert everything(root) == before


def test_other_folders_are_replaced_and_new_ones_made(root: Path) -> None:
    experts = root / "run" / "experts"
    to_lora(experts / "b", experts / "a", base=root / "base", overwrite=True)
    assert not (experts / "a" / "heads").exists()
    to_lora(experts / "b", experts / "b" / "lora", base=root / "base")
    assert (experts / "b" / "lora" / "adapter_model.safetensors").is_file()
    assert (experts / "b" / "heads" / "head.json").is_file()


def test_the_base_of_a_live_model_stays(root: Path) -> None:
    plain = AutoModel.from_pretrained(root / "base")
    model = get_peft_model(plain, HRAConfig(r=2, target_modules=["query"], init_weights=False))
    before = everything(root)
    for out in (root / "base", root):
        with pytest.raises(ValueError, match=r"holds what is converted \(.*base\)"):
            to_lora(model, out, overwrite=True)
    assert everything(root) == before
    plain.name_or_path = model.peft_config["default"].base_model_name_or_path = ""
    to_lora(model, root / "run", overwrite=True)
    assert (root / "run" / "adapter_config.json").is_file()


GGUF: dict[str, tuple[str, str, dict[str, Any]]] = {
    "weights": ("base", "base/model.safetensors", {}),
    "inner file": ("base", "base/1_Pooling/config.json", {}),
    "link to weights": ("base", "link.gguf", {}),
    "adapter's weights": ("run/experts/b", "run/experts/b/adapter_model.safetensors", {"base": "base"}),
    "its base's": ("run/experts/b", "base/config.json", {"base": "base"}),
}


@pytest.mark.parametrize("name", GGUF)
def test_a_gguf_replaces_no_file_of_the_model(name: str, root: Path) -> None:
    pytest.importorskip("gguf")
    model, out, given = GGUF[name]
    before = everything(root)
    with pytest.raises(ValueError, match=r"^the output .* is a part of what is converted \(.*\): choose another$"):
        to_gguf(root / model, root / out, overwrite=True, **{key: root / value for key, value in given.items()})
    assert everything(root) == before


def test_a_gguf_is_no_folder(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    assert outcome("convert", made / "base", f"{tmp_path}/new/", "--to", "gguf") == 2
    message = f"{tmp_path / 'new'} is a folder: a GGUF is one file, choose a name like {tmp_path / 'new/model.gguf'}"
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not any(tmp_path.iterdir())


def test_a_merge_takes_no_part_of_what_it_merges(root: Path) -> None:
    experts = root / "run" / "experts"
    before = everything(root)
    given: dict[str, Any] = {"method": "mean", "progress": False, "overwrite": True}
    for out, words in ((experts / "b" / "heads", "is a part of"), (root / "link", "holds")):
        with pytest.raises(ValueError, match=f"{words} what is merged"):
            merge(root / "base", [experts / "b"], out, **given)
    assert everything(root) == before
