"""Uploads to the Hub: what goes, what stays, and what people are told; the Hub is a stand-in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from orthoft.cli import main
from orthoft.convert import push_to_hub

GO = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "1_Pooling/config.json"]
STAY = [
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin", "expert.json"),
    *("checkpoint-5/adapter_model.safetensors", "runs/events.json", ".journal.json", ".cache/x.json", "notes.py"),
]


class FakeApi:
    """What is asked of the Hub, in order."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self) -> None:
        FakeApi.calls = []

    def create_repo(self, repo_id: str, **words: Any) -> Any:
        self.calls.append(("create_repo", {"repo_id": repo_id, **words}))
        return SimpleNamespace(repo_id=f"me/{repo_id}", __str__=lambda: "")

    def create_branch(self, repo_id: str, **words: Any) -> None:
        self.calls.append(("create_branch", {"repo_id": repo_id, **words}))

    def upload_folder(self, **words: Any) -> None:
        self.calls.append(("upload_folder", words))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    FakeApi.calls = []
    return FakeApi


@pytest.fixture
def expert(tmp_path: Path) -> Path:
    for name in GO + STAY:
        file = tmp_path / "expert" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"base_model_name_or_path": "bert-base-uncased"}' if name.endswith("config.json") else "x")
    return tmp_path / "expert"


def test_only_what_belongs_goes(expert: Path, hub: type[FakeApi]) -> None:
    done = push_to_hub(expert, "mine", private=True, revision="v2", message="first")
    assert sorted(done.files) == sorted(GO)
    made, branch, sent = hub.calls
    assert made == ("create_repo", {"repo_id": "mine", "private": True, "exist_ok": True})
    assert branch == ("create_branch", {"repo_id": "me/mine", "branch": "v2", "exist_ok": True})
    assert sent[1]["allow_patterns"] == list(done.files)
    assert sent[1] | {"allow_patterns": 0} == {
        "repo_id": "me/mine",
        "folder_path": str(expert),
        "revision": "v2",
        "commit_message": "first",
        "allow_patterns": 0,
    }
    assert done.notes == []


def test_a_dry_run_asks_nothing_of_the_hub(
    expert: Path, hub: type[FakeApi], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["push", str(expert), "me/mine", "--dry-run"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "adapter_model.safetensors" in shown
    assert "5 files" in shown
    assert "would go to me/mine" in shown
    assert not hub.calls


def test_a_base_that_others_do_not_have_is_told(expert: Path, tmp_path: Path) -> None:
    (expert / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{tmp_path}"}}')
    assert "others need its name on the Hub" in push_to_hub(expert, "mine", dry_run=True).notes[0]


def test_what_cannot_be_pushed(expert: Path, tmp_path: Path, hub: type[FakeApi]) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        push_to_hub(tmp_path / "nowhere", "mine")
    with pytest.raises(FileNotFoundError, match=r"itself holds no weights .* push experts/NAME"):
        push_to_hub(tmp_path, "mine")
    with pytest.raises(ValueError, match="name or owner/name, got 'a/b/c'"):
        push_to_hub(expert, "a/b/c")
    assert not hub.calls


def test_without_the_hub(expert: Path, hub: type[FakeApi], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"switched off here \(HF_HUB_OFFLINE\): mine was not pushed"):
        push_to_hub(expert, "mine")


ANSWER = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            HfHubHTTPError("401 Client Error\n\nInvalid user token", response=ANSWER),  # type: ignore[arg-type]
            "(401 Client Error Invalid user token): is HF_TOKEN set to a token that may write there?",
        ),
        (
            ValueError('Invalid metadata in README.md.\n- "license" must be one of [mit]\n'),
            '(Invalid metadata in README.md. - "license" must be one of [mit])',
        ),
        (OSError("no route to host"), "(no route to host)"),
        (ValueError(), "(ValueError)"),
    ],
    ids=["refused", "bad card", "no network", "wordless"],
)
def test_all_that_the_hub_says_is_told(
    error: Exception, message: str, expert: Path, hub: type[FakeApi], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **words: Any) -> None:
        raise error

    monkeypatch.setattr(hub, "upload_folder", refused)
    with pytest.raises(ConnectionError) as told:
        push_to_hub(expert, "mine")
    assert str(told.value) == f"the Hub did not take 'mine' {message}"
