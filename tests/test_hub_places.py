"""Models on the Hub by name, state and folder: what is found, asked for and told to others. The cache is the Hub's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from hub_cache import offline, put
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from hypothesis import given
from hypothesis import strategies as st
from peft import AutoPeftModel, LoraConfig, get_peft_model
from tiny import label_task, save_bert
from transformers import AutoModel

from orthoft import HRAConfig
from orthoft.cli import main
from orthoft.convert import push_to_hub, to_lora
from orthoft.hub_place import (
    NO_REVISION,
    PLACE,
    HubPlace,
    config_fields,
    hub_place,
    load_arguments,
    may_be_one,
    named_in,
    public_name,
    short_name,
)
from orthoft.merging import merge
from orthoft.merging.files.hub import asked_once, base_of, find_folder
from orthoft.recipes import run
from orthoft.recipes.data import read_splits
from orthoft.recipes.data_schema import Data
from orthoft.recipes.prepare import quiet

Words = dict[str, Any]


@pytest.mark.parametrize(
    ("where", "place"),
    [
        ("bert", HubPlace("bert")),
        ("org/model", HubPlace("org/model")),
        ("org/model@v1.0", HubPlace("org/model", "v1.0")),
        ("org/model@refs/pr/3", HubPlace("org/model", "refs/pr/3")),
        ("org/model@refs/pr/3/deep/law", HubPlace("org/model", "refs/pr/3", "deep/law")),
        ("org/model@my%2Fbranch", HubPlace("org/model", "my/branch")),
        ("org/model@main/deep/law", HubPlace("org/model", "main", "deep/law")),
        ("bert@main/law", HubPlace("bert", "main", "law")),
        ("org/model@v1%2Bcu", HubPlace("org/model", "v1+cu")),
        ("org/model@%C3%A9", HubPlace("org/model", "é")),
        (f"org/model@{'0a' * 20}", HubPlace("org/model", "0a" * 20)),
    ],
)
def test_a_place_is_read_and_written(where: str, place: HubPlace) -> None:
    assert hub_place(where) == place
    assert str(place) == where


@pytest.mark.parametrize(
    "where",
    [
        *("", ".", "..", "./gone", "/gone/away", "~/gone", "org/model/law", "org/model@", "org/model@main/", "a b"),
        *("org/model@main/../law", "org/model@main/.git", "@main", "org/@main", "org/model@main//law", "org/model@v 1"),
        *(
            "org/model@../main",
            "-org/model",
            "org/model@main@v1",
            "org/model@-x",
            "org/model@x.lock",
            "org/model@..",
            "org/model@a%2F..",
        ),
    ],
)
def test_what_is_no_place(where: str) -> None:
    assert hub_place(where) is None
    if not Path(where).is_dir():
        with pytest.raises(FileNotFoundError, match=r"^base: no folder "):
            find_folder(where, "base")


def test_a_revision_may_be_written_plainly() -> None:
    assert hub_place("org/model@v1+cu") == HubPlace("org/model", "v1+cu")
    assert hub_place("org/model@my%2fbranch") == HubPlace("org/model", "my/branch")


@given(st.from_regex(PLACE, fullmatch=True))
def test_a_place_never_leads_out_of_its_repository(where: str) -> None:
    if (place := hub_place(where)) is not None:
        assert hub_place(str(place)) == place
        for part in (place.repository, place.revision or "", place.folder or ""):
            assert ".." not in part.split("/")
            assert not part.startswith(("/", "."))


STATES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: not NO_REVISION.search(text))


@given(STATES, st.sampled_from([None, "law", "deep/law-1.0/x_y"]))
def test_every_state_is_read_as_it_was_written(state: str, folder: str | None) -> None:
    place = HubPlace("org/model", state, folder)
    assert hub_place(str(place)) == place
    assert named_in(config_fields(str(place))) == str(place)


def test_what_is_here_is_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_place("org/model@main") == HubPlace("org/model", "main")
    (tmp_path / "org" / "model@main").mkdir(parents=True)
    assert hub_place("org/model@main") is None
    assert find_folder("org/model@main", "base") == Path("org/model@main")
    assert hub_place(Path("org/model")) is None
    assert public_name("org/model", tmp_path) == "org/model"
    assert public_name("org/model@main", Path("org/model@main")) == "org/model@main"


def test_how_a_place_is_told() -> None:
    assert config_fields("org/model") == {"base_model_name_or_path": "org/model", "revision": None}
    assert config_fields("org/model@v1") == {"base_model_name_or_path": "org/model", "revision": "v1"}
    assert config_fields("/a/b") == {"base_model_name_or_path": "/a/b", "revision": None}
    for base in ("org/model", "org/model@v1", "org/model@my%2Fbranch", "org/model@main/law", "/a/b"):
        assert named_in(config_fields(base)) == base
    assert named_in({"base_model_name_or_path": "/a/b", "revision": "main"}) == "/a/b"
    assert named_in({"revision": "main"}) is None
    assert load_arguments("org/model@v1/law") == '"org/model", revision="v1", subfolder="law"'
    assert load_arguments("/a/b") == '"/a/b"'
    assert load_arguments('/a"); f("b') == r'"/a\"); f(\"b"'
    assert load_arguments('org/model@a");f("b') == r'"org/model", revision="a\");f(\"b"'
    assert may_be_one("org/model", "org/model@v1")
    assert may_be_one("org/model@v1", "org/model@v1")
    assert not may_be_one("org/model@v2", "org/model@v1")
    assert not may_be_one("org/model@v1/law", "org/model@v1")
    assert not may_be_one("org/model", "org/other")
    assert not may_be_one("/a/b", "/a/b")
    places = ("org/model@main/deep/law", "org/model@refs/pr/3", "bert", "/a/b", Path("a/b"), "./a/b/")
    assert [short_name(place) for place in places] == ["law", "model", "bert", "b", "b", "b"]


def test_each_state_and_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = offline(tmp_path / "cache", monkeypatch)
    for revision in ("main", "v1", "refs/pr/3", "my/branch"):
        (tmp_path / "model" / "deep" / "law").mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / "config.json").write_text(json.dumps({"state": revision}))
        (tmp_path / "model" / "deep" / "law" / "config.json").write_text(json.dumps({"state": f"law of {revision}"}))
        put(cache, "org/model", tmp_path / "model", revision)

    def state(where: str) -> str:
        found: str = json.loads((find_folder(where, "base") / "config.json").read_text())["state"]
        return found

    assert state("org/model") == "main"
    assert state("org/model@v1") == "v1"
    assert state("org/model@refs/pr/3") == "refs/pr/3"
    assert state("org/model@my%2Fbranch") == "my/branch"
    assert state("org/model@v1/deep/law") == "law of v1"
    with pytest.raises(FileNotFoundError, match=r"^source 'a': no folder .* the Hub gave nothing for 'org/mo@v2' "):
        find_folder("org/mo@v2", "source 'a'")
    with pytest.raises(FileNotFoundError, match=r"org/model has no folder deep/gone"):
        find_folder("org/model@v1/deep/gone", "base")


def test_the_hub_is_asked_once_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with asked_once():
        for _ in range(2):
            find_folder("org/model", "base")
            with asked_once():
                find_folder("org/model@v1", "base")
    assert asked == [("org/model", None), ("org/model", "v1")]
    find_folder("org/model", "base")
    find_folder("org/model", "base")
    assert len(asked) == 4  # who asks anew sees what is new


def test_an_answer_of_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        raise OSError("cannot reach the Hub\nlong explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", away)
    with pytest.raises(FileNotFoundError) as caught:
        find_folder("org/model", "source 'a'")
    missing = f"source 'a': no folder {Path.cwd() / 'org/model'}, and "
    assert str(caught.value) == missing + "the Hub gave nothing for 'org/model' (cannot reach the Hub)"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a base, whose newest state has other weights than ``v1``."""
    cache = offline(tmp_path / "cache", monkeypatch)
    save_bert(tmp_path / "bert")
    put(cache, "org/bert", tmp_path / "bert", "v1")
    model = AutoModel.from_pretrained(tmp_path / "bert")
    for parameter in model.parameters():
        parameter.data.add_(0.01)
    model.save_pretrained(tmp_path / "bert")
    put(cache, "org/bert", tmp_path / "bert")
    return cache


def config_of(folder: Path) -> Words:
    found: Words = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return found


def named(folder: Path) -> list[str | None]:
    return [config_of(folder).get(field) for field in ("base_model_name_or_path", "revision")]


def front(folder: Path) -> Words:
    found: Words = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    return found


@pytest.mark.parametrize(("base", "revision"), [("org/bert", None), ("org/bert@v1", "v1")])
def test_a_run_names_its_base_as_others_find_it(
    base: str, revision: str | None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train, take, merge, export: nothing says to which folder the base was downloaded."""
    source = get_peft_model(
        AutoModel.from_pretrained(find_folder(base, "base")), LoraConfig(r=2, target_modules=["query"])
    )
    source.peft_config["default"].base_model_name_or_path = "org/bert"
    source.save_pretrained(tmp_path / "given" / "law")
    (tmp_path / "given" / "law" / "README.md").unlink()  # a card of its own would be kept as it is
    put(cache, "org/adapters", tmp_path / "given")
    out = tmp_path / "out"
    lines: list[str] = []
    tasks = [{"name": name, "data": label_task(tmp_path / name, i, seed=i)} for i, name in enumerate("ab")]
    tasks[1]["expert"] = "org/adapters@main/law"
    words = {
        "name": "places",
        "base": base,
        "output": str(out),
        "defaults": {
            "kind": "classification",
            "max_length": 16,
            "adapter": {"type": "lora", "r": 2, "target_modules": ["query"]},
            "training": {"max_steps": 2, "learning_rate": 1e-2},
        },
        "tasks": tasks,
        "merge": {"method": "task_arithmetic"},
        "export": {"lora": {"rank": 4}},
    }
    results = run(words, say=lines.append)
    assert results["merge"]["base"] == base
    adapters = [out / "experts" / "a", out / "experts" / "b", out / "merged-lora"]
    for folder in adapters:
        assert named(folder) == ["org/bert", revision]
        assert base_of(folder) == base
        assert front(folder)["base_model"] == "org/bert"
        assert f"from_pretrained({load_arguments(base)})" in (folder / "README.md").read_text(encoding="utf-8")
        modes = {file.stat().st_mode for file in folder.iterdir() if file.is_file()}
        assert len(modes) == 1  # who may read the card may read the weights
    assert front(out / "merged")["base_model"] == "org/bert"
    assert not any("names another base" in line for line in lines)
    for file in out.rglob("*"):
        told = file.suffix in (".json", ".md", ".html", ".yaml")
        if told and file.is_file():
            text = file.read_text(encoding="utf-8")
            assert str(cache) not in text.replace(str(out), ""), file
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    loaded = AutoPeftModel.from_pretrained(str(out / "experts" / "a"), cache_dir=str(cache)).get_base_model()
    wanted = AutoModel.from_pretrained(find_folder(base, "base"))
    place = "embeddings.word_embeddings.weight"
    assert loaded.get_parameter(place).equal(wanted.get_parameter(place))


def test_merges_and_conversions_read_and_name_a_state(cache: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(find_folder("org/bert@v1", "base"))
    model = get_peft_model(model, HRAConfig(r=2, target_modules=["query"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter)) if "orthoft" in name else None
    model.save_pretrained(tmp_path / "hra")
    file = tmp_path / "hra" / "adapter_config.json"
    for revision, other in (("v1", "main"), (None, "v1")):
        told = {**config_of(tmp_path / "hra"), "base_model_name_or_path": "org/bert", "revision": revision}
        file.write_text(json.dumps(told), encoding="utf-8")
        to_lora(tmp_path / "hra", tmp_path / f"lora-{revision}")
        assert named(tmp_path / f"lora-{revision}") == ["org/bert", revision]
        to_lora(tmp_path / "hra", tmp_path / f"lora-{revision}-{other}", base=f"org/bert@{other}")
        assert named(tmp_path / f"lora-{revision}-{other}") == ["org/bert", other]
        base = "org/bert" + (f"@{revision}" if revision else "")
        merge(base, [tmp_path / "hra"], tmp_path / f"rotation-{revision}", method="mean", output="lora")
        assert named(tmp_path / f"rotation-{revision}") == ["org/bert", revision]
    exact = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("lora-v1", "lora-None-v1")]
    assert exact[0] == exact[1]  # of the same state of the base
    assert exact[0] != (tmp_path / "lora-None" / "adapter_model.safetensors").read_bytes()


def test_the_command_line_takes_places(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(
        AutoModel.from_pretrained(find_folder("org/bert@v1", "base")), HRAConfig(r=2, target_modules=["query"])
    )
    model.save_pretrained(tmp_path / "given" / "law")
    file = tmp_path / "given" / "law" / "adapter_config.json"
    told = {**config_of(file.parent), "base_model_name_or_path": "org/bert", "revision": "v1"}
    file.write_text(json.dumps(told), encoding="utf-8")
    put(cache, "org/adapters", tmp_path / "given")
    law, out = "org/adapters@main/law", tmp_path / "out"

    def said(*words: str) -> Any:
        with pytest.raises(SystemExit) as end:
            main([*words, "--json"])
        told = capsys.readouterr()
        assert end.value.code == 0, told.err
        return json.loads(told.out)

    found = said("inspect", law)
    assert (found[0]["base"], found[0]["path"].startswith(str(cache))) == ("org/bert@v1", True)
    assert list(said("inspect", law, "--base", "org/bert@v1")["sources"]) == ["law"]
    said("convert", law, str(out / "lora"))
    assert named(out / "lora") == ["org/bert", "v1"]
    said("merge", "--base", "org/bert@v1", "--source", f"{law}:0.5", "--output", str(out / "m"), "--method", "mean")
    assert list(json.loads((out / "m" / "report.json").read_text(encoding="utf-8"))["sources"]) == ["law"]
    assert push_to_hub(out / "lora", "me/x", dry_run=True).notes == []
    put(cache, "org/zoo", cache / "models--org--bert" / "snapshots")
    inner = min(path.name for path in (cache / "models--org--bert" / "snapshots").iterdir())
    said("convert", law, str(out / "zoo"), "--base", f"org/zoo@main/{inner}")
    assert "which PEFT cannot name" in push_to_hub(out / "zoo", "me/x", dry_run=True).notes[0]
    assert f'revision="main", subfolder="{inner}"' in (out / "zoo" / "README.md").read_text(encoding="utf-8")


def test_an_output_that_would_stand_for_its_base_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = {
        "name": "x",
        "base": "org/bert",
        "output": "org/bert",
        "defaults": {"kind": "classification", "adapter": {"type": "lora", "target_modules": ["query"]}},
        "tasks": [{"name": "a", "data": label_task(tmp_path / "a", 0, seed=0)}],
    }
    with pytest.raises(ValueError, match="base: org/bert on the Hub would be taken for the folder org/bert"):
        run(words)
    assert not (tmp_path / "org").exists()


def test_a_dataset_is_read_in_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Datasets:
        @staticmethod
        def load_dataset(name: str, subset: str | None, split: str, revision: str | None) -> Any:
            asked.append((name, subset, split, revision))
            raise FileNotFoundError

    def read(name: str) -> None:
        read_splits(Data(dataset=name, train="train[:9]", test="test"), 0, lambda row, split, place: None)

    monkeypatch.setattr("orthoft.recipes.data._datasets", lambda: Datasets)
    for name in ("csv", "org/data", "org/data@v2"):
        with pytest.raises(FileNotFoundError):
            read(name)
    assert asked == [
        ("csv", None, "train[:9]", None),
        ("org/data", None, "train[:9]", None),
        ("org/data", None, "train[:9]", "v2"),
    ]
    with pytest.raises(ValueError, match="one folder of it cannot be read, got 'org/data@v2/law'"):
        read("org/data@v2/law")


def test_downloads_show_their_progress_and_loading_does_not() -> None:
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    for switch, hidden in ((disable_progress_bars, True), (enable_progress_bars, False)):
        switch()
        with quiet():
            assert are_progress_bars_disabled() == hidden
            assert not bars.is_progress_bar_enabled()
        assert are_progress_bars_disabled() == hidden
        assert bars.is_progress_bar_enabled() == shown
