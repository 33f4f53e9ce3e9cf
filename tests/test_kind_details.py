"""What single kinds of task do with their rows: cuts, first tokens, pictures, ends of targets, heads that train."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kind_cases import CASES, Case
from PIL import Image

from orthoft.recipes import load
from orthoft.recipes.data import read_file
from orthoft.recipes.expert import fingerprint
from orthoft.recipes.head import Head
from orthoft.recipes.kinds import kind_of
from orthoft.recipes.models import load_model


def test_sentences_are_cut_to_what_fits(laid_out: Callable[[Case], Path], tmp_path: Path) -> None:
    words = CASES[1].recipe(laid_out(CASES[1]), tmp_path / "out")
    words["defaults"]["max_length"] = 3
    recipe = load(words)
    kind = kind_of(recipe.tasks[0], Path(recipe.base))
    assert {len(example["labels"]) for example in kind.data(0).test} == {3}


def test_a_word_is_judged_at_its_first_token(laid_out: Callable[[Case], Path], tmp_path: Path) -> None:
    recipe = load(CASES[1].recipe(laid_out(CASES[1]), tmp_path / "out"))
    kind = kind_of(recipe.tasks[0], Path(recipe.base))
    rows = [{"tokens": ["w1", "w2-w3", "w4"], "tags": ["O", "B-x", "I-x"]}]  # the middle one is three tokens
    (example,) = kind.examples(rows, ["B-x", "I-x", "O"], "test")
    assert example["labels"] == [2, 0, -100, -100, 1]


@pytest.mark.parametrize("form", ["bytes", "cell", "picture"])
def test_a_picture_comes_in_every_form(form: str, laid_out: Callable[[Case], Path], tmp_path: Path) -> None:
    folder = laid_out(CASES[2])
    recipe = load(CASES[2].recipe(folder, tmp_path / "out"))
    kind, file = kind_of(recipe.tasks[0], Path(recipe.base)), folder / "a" / "test0.png"
    forms = {
        "bytes": file.read_bytes(),
        "cell": {"bytes": file.read_bytes(), "path": None},
        "picture": Image.open(file).convert("RGBA"),
    }
    rows = [{"image": value, "label": "disc"} for value in ("test0.png", forms[form])]
    pixels = kind.collate(kind.examples(rows, ["cross", "disc"], "test"))["pixel_values"]
    assert torch.equal(pixels[0], pixels[1])


def test_a_picture_is_turned_upright_and_a_cut_one_refused(laid_out: Callable[[Case], Path], tmp_path: Path) -> None:
    recipe = load(CASES[2].recipe(laid_out(CASES[2]), tmp_path / "out"))
    kind = kind_of(recipe.tasks[0], Path(recipe.base))
    wide, file = Image.new("RGB", (12, 6), "red"), io.BytesIO()
    wide.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    wide.save(file, "png", exif=exif)
    upright = wide.transpose(Image.Transpose.ROTATE_270)
    rows = [{"image": value, "label": "disc"} for value in (file.getvalue(), upright)]
    pixels = kind.collate(kind.examples(rows, ["cross", "disc"], "test"))["pixel_values"]
    assert torch.equal(pixels[0], pixels[1])
    with pytest.raises(ValueError, match=r"^a test: 60 bytes cannot be read as a picture: "):
        kind.examples([{"image": file.getvalue()[:60], "label": "disc"}], ["cross", "disc"], "test")


def test_an_expert_depends_on_what_its_pictures_show(
    laid_out: Callable[[Case], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(laid_out(CASES[2]), tmp_path / "data")
    recipe = load(CASES[2].recipe(tmp_path / "data", tmp_path / "out"))
    task, base, read, really = recipe.tasks[0], Path(recipe.base), list[Path](), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda file: (read.append(file), really(file))[1])
    before = fingerprint(recipe, task, base)
    assert fingerprint(recipe, task, base) == before
    assert len(read) == len(set(read)) > 16  # all pictures, once each
    Image.new("RGB", (16, 16), "red").save(tmp_path / "data" / "a" / "train0.png")
    after = fingerprint(recipe, task, base)
    (tmp_path / "data" / "a" / "train0.png").unlink()
    assert len({before, after, fingerprint(recipe, task, base)}) == 3


def test_targets_end_and_prefixes_stand_in_front(laid_out: Callable[[Case], Path], tmp_path: Path) -> None:
    case = next(case for case in CASES if case.architecture == "bart")
    words = case.recipe(laid_out(case), tmp_path / "out")
    words["defaults"] |= {"prefix": "w9 ", "max_target_length": 3, "max_source_length": 4}
    recipe = load(words)
    kind = kind_of(recipe.tasks[0], Path(recipe.base))
    ids = kind.processor.convert_tokens_to_ids
    rows = [{"source": "w1 w2 w3 w4", "target": target} for target in ("w5", "w5 w6 w7 w8")]
    first, second = kind.examples(rows, [], "test")
    assert first["input_ids"] == ids(["w9", "w1", "w2", "w3"])
    assert first["labels"] == [*ids(["w5"]), 2]
    assert second["labels"] == [*ids(["w5", "w6"]), 2]
    batch = kind.collate([first, second])
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_classes_of_datasets_have_their_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    tags = datasets.ClassLabel(names=["O", "B-x"])
    features = {"tokens": datasets.List(datasets.Value("string")), "tags": datasets.List(tags), "label": tags}
    table = datasets.Dataset.from_dict(
        {"tokens": [["w1", "w2"], ["w3"]], "tags": [[1, 0], [0]], "label": [1, -1]}, datasets.Features(features)
    )
    table.to_parquet(tmp_path / "rows.parquet")
    assert read_file(tmp_path / "rows.parquet") == [
        {"tokens": ["w1", "w2"], "tags": ["B-x", "O"], "label": "B-x"},
        {"tokens": ["w3"], "tags": ["O"], "label": None},
    ]


# A head that is trained


@pytest.mark.parametrize("case", CASES[:3], ids=[case.kind for case in CASES[:3]])
def test_a_trained_head_starts_at_the_probe_and_keeps_it(
    case: Case, laid_out: Callable[[Case], Path], tmp_path: Path
) -> None:
    words = case.recipe(laid_out(case), tmp_path / "out")
    words["defaults"]["head"] = "trained"
    recipe = load(words)
    kind = kind_of(recipe.tasks[0], Path(recipe.base))
    data, model = kind.data(0), load_model(case.kind, recipe.base, None)
    probe = kind.fit(model, data, 32)
    trained = kind.trained(model.requires_grad_(False), probe)
    batch = kind.collate(data.train[:32])
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
    before = trained(**batch)["loss"]
    before.backward()
    optimizer.step()
    assert trained(**batch)["loss"] < before
    learnt = kind.learnt(trained, probe)
    assert learnt is not None
    learnt.save(tmp_path / "heads" / "a.safetensors")
    loaded = Head.load(tmp_path / "heads" / "a.safetensors")
    for mine, theirs in ((loaded, trained), (loaded.start, probe)):
        assert torch.equal(mine.weight, theirs.weight)
        assert torch.equal(mine.bias, theirs.bias)
    assert not torch.equal(loaded.weight, probe.weight)
    frozen = kind_of(recipe.tasks[0].model_copy(update={"head": "frozen"}), Path(recipe.base))
    assert frozen.learnt(frozen.trained(model, probe), probe) is None
    assert replace(loaded, probe=None).start.weight.equal(loaded.weight)
