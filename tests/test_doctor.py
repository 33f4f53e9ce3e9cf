"""``orthoft doctor``: what it finds, what it imports for it, and when it complains."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import metadata

import pytest

import orthoft.cli.doctor  # noqa: F401  (makes the command known)
from orthoft.cli import main
from orthoft.recipes import doctor
from orthoft.recipes.doctor import FEATURES, examine, told


def outcome(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *arguments])
    return int(stopped.value.code or 0)


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What takes the place of installed versions; None for a package that is not there."""
    instead: dict[str, str | None] = {}
    really = metadata.version

    def version(name: str) -> str:
        found = instead[name] if name in instead else really(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr("orthoft.recipes.doctor.metadata.version", version)
    return instead


def test_what_is_installed_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome("--json") == 0
    found = json.loads(capsys.readouterr().out)
    packages = {one["name"]: one for one in found["packages"]}
    assert packages["torch"] == {
        "name": "torch",
        "version": metadata.version("torch"),
        "wanted": ">=2.6",
        "problem": None,
    }
    assert {"transformers", "peft", "accelerate", "safetensors"} < set(packages)
    assert not {"pytest", "ruff", "datasets"} & set(packages)
    assert found["orthoft"] == metadata.version("orthoft")
    assert found["problems"] == []
    assert found["hub"] is None
    cpu = found["devices"][0]
    assert (cpu["name"], cpu["threads"] >= 1, cpu["cores"] >= 1, cpu["bytes"] > 10**8) == ("cpu", True, True, True)
    assert outcome() == 0
    said = capsys.readouterr().out
    assert said.startswith(f"orthoft {found['orthoft']}, Python {found['python']}")
    assert all(feature.name in said for feature in FEATURES)


def test_nothing_optional_is_imported() -> None:
    optional = {name for feature in FEATURES for name in feature.needs} - {"huggingface_hub"}
    code = (
        "import sys\nfrom orthoft.recipes.doctor import examine\nexamine()\n"
        f"print(*{optional | {'peft', 'transformers', 'accelerate'}!r} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("0.19.9", "peft 0.19.9 is installed, >=0.20 is needed: pip install 'peft>=0.20'"),
        (None, "peft is not installed: pip install 'peft>=0.20'"),
    ],
)
def test_a_required_package_that_will_not_do(
    version: str | None, problem: str, versions: dict[str, str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    versions["peft"] = version
    assert outcome() == 1
    assert capsys.readouterr().err == f"error: {problem}\n"


@pytest.mark.parametrize("version", ["0.21.dev1", "0.20+cu12", "1!0.1"])
def test_versions_that_will_do(version: str, versions: dict[str, str | None]) -> None:
    versions["peft"] = version
    assert examine()["problems"] == []


def test_what_is_missing_for_what(versions: dict[str, str | None], capsys: pytest.CaptureFixture[str]) -> None:
    versions.update(torchao=None, optuna=None, datasets="9.9", bitsandbytes="0.1")
    assert outcome("--json") == 0
    features = {tuple(one["needs"]): one for one in json.loads(capsys.readouterr().out)["features"]}
    assert features["torchao",]["install"] == "pip install 'orthoft[quantization]'"
    assert features["datasets",]["there"] == {"datasets": "9.9"}
    assert features["optuna",]["install"] in ("pip install optuna", "pip install 'orthoft[search]'")
    assert features["bitsandbytes",] == {
        "name": "bases in 4 and 8 bits",
        "needs": ["bitsandbytes"],
        "there": {"bitsandbytes": "0.1"},
        "install": None,
    }
    assert "bases quantised by torchao  " in told(examine())


def test_a_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert outcome() == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: torch cannot be imported: ")
    assert len(said.err.splitlines()) == 1
    assert "\ncpu " in said.out


def test_another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orthoft.recipes.doctor.platform.python_version", lambda: "3.9.1")
    assert examine()["problems"] == ["Python 3.9.1 is running, >=3.11 is needed"]


class Answer(http.server.BaseHTTPRequestHandler):
    """A Hub that answers, except where it is busy."""

    def do_HEAD(self) -> None:
        self.send_response(503 if "busy" in self.path else 200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_hub_is_asked_only_when_wanted(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for endpoint, line in {
        address: f"{address} answers",
        f"{address}/busy": f"{address}/busy answers with 503",
        "http://127.0.0.1:1": "http://127.0.0.1:1 cannot be reached (",
    }.items():
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        assert outcome("--online") == 0
        assert f"the Hub: {line}" in capsys.readouterr().out
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert examine(online=True)["hub"] == "not asked, HF_HUB_OFFLINE is set"
    monkeypatch.setattr(doctor, "_hub", lambda: pytest.fail("the Hub was asked"))
    assert examine()["hub"] is None


def test_the_command_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome("--help") == 0
    assert "\n  orthoft doctor" in capsys.readouterr().out
