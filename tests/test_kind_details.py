"""What single kinds of task do with their rows: cuts, first tokens, pictures, ends of targets, heads that train."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kind_cases import CASES, Case
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    RobertaTokenizer,
    SwinConfig,
    SwinModel,
)

from orthoft.recipes import RecipeError, load, run
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


def byte_level(folder: Path, pre: pre_tokenizers.PreTokenizer | None = None) -> Path:
    """Save a byte-level tokenizer that knows some words with a space in front."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre or level
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=level.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["w1 w2 lives in Paris, in Paris"] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="!").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["plain", "in a sequence", "roberta"])
def test_words_are_read_as_in_a_sentence(name: str, laid_out: Callable[[Case], Path], tmp_path: Path) -> None:
    words = load(CASES[1].recipe(laid_out(CASES[1]), tmp_path / "out")).tasks[0]
    level, digits = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Digits()
    base = byte_level(tmp_path / "base", pre_tokenizers.Sequence([digits, level]) if "sequence" in name else None)
    if name == "roberta":
        model = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        RobertaTokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]]).save_pretrained(base)
    kind, row = kind_of(words, base), ["Ann", "lives", "in", "Paris", "w12"]
    (example,) = kind.examples([{"tokens": row, "tags": ["O"] * 5}], ["B-x", "O"], "test")
    assert example["input_ids"] == kind.processor(f" {' '.join(row)}")["input_ids"]
    starts = [i for i, label in enumerate(example["labels"]) if label == 1]
    begun = kind.processor.convert_ids_to_tokens([example["input_ids"][i] for i in starts])
    assert len(begun) == 5
    assert all(token.startswith("\u0120") for token in begun)
    assert kind.reading()["before each word"] == " "


def test_a_tokenizer_that_reads_words_otherwise_is_refused(laid_out: Callable[[Case], Path], tmp_path: Path) -> None:
    words = load(CASES[1].recipe(laid_out(CASES[1]), tmp_path / "out")).tasks[0]
    whole = tmp_path / "base"
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))  # takes a sentence for one word
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[UNK]").save_pretrained(whole)
    with pytest.raises(
        ValueError, match=r"a: the tokenizer of .* reads words one by one otherwise than in a sentence: ta"
    ):
        kind_of(words, whole)


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


CONVOLUTIONAL: list[Callable[[], Any]] = [
    lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")),
    lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)),
    lambda: SwinModel(SwinConfig(image_size=16, embed_dim=8, depths=[1], num_heads=[2], window_size=2)),
]


@pytest.mark.parametrize("make", CONVOLUTIONAL, ids=["resnet", "convnext", "swin"])
def test_pictures_come_in_the_type_of_the_model(
    make: Callable[[], Any], laid_out: Callable[[Case], Path], tmp_path: Path
) -> None:
    recipe = load(CASES[2].recipe(laid_out(CASES[2]), tmp_path / "out"))
    kind = kind_of(recipe.tasks[0], Path(recipe.base))
    batch = kind.collate(kind.data(0).test[:4])
    torch.manual_seed(0)
    model = make().eval()
    wide = kind.features(model, batch)
    half = kind.features(model.bfloat16(), kind.inputs(model, batch))
    assert half.dtype == torch.float32
    assert torch.allclose(kind.features(model, batch), half)
    assert (wide - half).norm() < 0.1 * wide.norm()


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


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", "text,label\nw1,x\n"), ("a.jsonl", '{"text": "w1", "label": "x"}\n')]
)
def test_a_file_may_begin_with_a_mark_of_its_encoding(name: str, text: str, tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / name).write_text(text, encoding=encoding)
        assert read_file(tmp_path / name) == [{"text": "w1", "label": "x"}]


@pytest.mark.parametrize("case", CASES, ids=[f"{case.kind}-{case.architecture}" for case in CASES])
def test_labels_are_smoothed_by_the_model_of_transformers_alone(
    case: Case, laid_out: Callable[[Case], Path], tmp_path: Path
) -> None:
    words = case.recipe(laid_out(case), tmp_path / "out")
    words["defaults"]["training"] |= {"label_smoothing_factor": 0.1, "max_steps": 1}
    if case.kind == "causal-lm":
        assert run(words, until="finetune")["experts"]["a"]["losses"]
        return
    with pytest.raises(RecipeError) as error:
        load(words)
    wanted = f"tasks[0]: training.label_smoothing_factor is for tasks of kind causal-lm, got {case.kind}"
    assert str(error.value).splitlines()[0] == wanted


def test_a_set_of_names_is_a_list_in_order(laid_out: Callable[[Case], Path], tmp_path: Path) -> None:
    words = CASES[0].recipe(laid_out(CASES[0]), tmp_path / "out")
    words["defaults"]["training"]["max_steps"] = 1
    marks = []
    for names in ({"value", "query"}, ["query", "value"]):
        words["defaults"]["adapter"] = {"type": "lora", "r": 2, "target_modules": names}
        recipe = load(words)
        assert recipe.tasks[0].adapter.fields["target_modules"] == ["query", "value"]
        marks.append(fingerprint(recipe, recipe.tasks[0], Path(recipe.base)))
    assert marks[0] == marks[1]
    words["defaults"]["adapter"]["target_modules"] = {"query", "value"}
    run(words, until="finetune")
    told = json.loads((tmp_path / "out" / "experts" / "a" / "expert.json").read_text(encoding="utf-8"))
    assert told["adapter"]["target_modules"] == ["query", "value"]


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
