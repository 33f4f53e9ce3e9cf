"""The README's code runs as it stands, on tiny models laid out where the demo lays the real ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from pages import Block, blocks, run_command, run_python
from peft import get_peft_model
from transformers import AutoModel, BertConfig, BertModel

from orthoft import HRAConfig, OFTv2Config
from orthoft.recipes.load import overridden, read_yaml
from orthoft.recipes.prepare import wished
from orthoft.recipes.schema import Merge

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = [block for block in blocks(README) if block.language == "python"]
SHELL = [line for block in blocks(README) if block.language == "bash" for line in block.commands]
COMMANDS = [line for line in SHELL if line.startswith("orthoft ") and "recipes/" not in line]


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    base = ".cache/demo/minilm"
    config = BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
    )
    BertModel(config).save_pretrained(base)
    for name, adapter in {
        "sarcasm": OFTv2Config(block_size=32, target_modules=["query"], init_weights=False),
        "tweets": HRAConfig(r=4, target_modules=["value"], init_weights=False),
    }.items():
        get_peft_model(AutoModel.from_pretrained(base), adapter).save_pretrained(f"runs/minilm/experts/{name}")
    return tmp_path


@pytest.mark.parametrize("block", BLOCKS, ids=[f"line{block.line}" for block in BLOCKS])
def test_python_blocks_run(block: Block, demo: Path) -> None:
    run_python(block.text, "README.md", {"__name__": "readme"})


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_commands_run(command: str, demo: Path) -> None:
    run_command(command)


@pytest.mark.parametrize("command", [line for line in SHELL if line.startswith("orthoft run recipes/")])
def test_merges_of_recipes_are_possible(command: str) -> None:
    words = shlex.split(command)
    raw = read_yaml(README.parent / words[2])
    for place, word in enumerate(words):
        raw = overridden(raw, words[place + 1]) if word == "--set" else raw
    assert wished(Merge.model_validate(raw["merge"]), len(raw["tasks"])).method.name == raw["merge"]["method"]


def test_every_command_of_the_readme_exists() -> None:
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\S+)", TEXT, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (README.parent / link).exists(), link
