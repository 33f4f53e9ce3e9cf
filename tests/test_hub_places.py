"""Models on the Hub by name, state and folder: what is found, asked for and told to others. The cache is the Hub's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_cache import offline, put
from hypothesis import given
from hypothesis import strategies as st
from peft import AutoPeftModel, LoraConfig, get_peft_model
from tiny import label_task, save_bert
from transformers import AutoModel

from orthoft import HRAConfig
from orthoft.convert import to_lora
from orthoft.hub_place import HubPlace, config_fields, hub_place, load_arguments, named_in, public_name, same_repository
from orthoft.merging import merge
from orthoft.merging.files.hub import asked_once, base_of, find_folder
from orthoft.recipes import run

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
        *("org/model@../main", "-org/model", "org/model@main@v1", "org/model@..", "org/model@a%2F.."),
    ],
)
def test_what_is_no_place(where: str) -> None:
    assert hub_place(where) is None
    if not Path(where).is_dir():
        with pytest.raises(FileNotFoundError, match=r"^base: no folder "):
            find_folder(where, "base")


@given(st.text(max_size=30))
def test_a_place_never_leads_out_of_its_repository(where: str) -> None:
    if (place := hub_place(where)) is not None:
        assert hub_place(str(place)) == place
        assert ".." not in (place.folder or "").split("/")
        assert not (place.folder or "").startswith("/")


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
    assert same_repository("org/model", "org/model@v1")
    assert not same_repository("org/model", "org/other")
    assert not same_repository("/a/b", "/a/b")


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
    with pytest.raises(FileNotFoundError, match=r"^source 'a': no folder .*, and the Hub gave no .* 'org/mo@v2' "):
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
    assert str(caught.value) == missing + "the Hub gave no repository 'org/model' (cannot reach the Hub)"


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
