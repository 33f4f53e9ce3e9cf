"""Adapters and exports in transformers' pipelines: ours by their folder, exports in a process without orthoft."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny import save_bert, save_llama
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from orthoft.adapters import ADAPTERS
from orthoft.convert import to_lora
from orthoft.merging import merge

OPTIONS: dict[str, dict[str, Any]] = {"oftv2": {"block_size": 4}, "hra": {"r": 4}, "psoft": {"r": 4}}
TEXT = "w1 w2 w3"
ELSEWHERE = """
import json, sys
from transformers import pipeline
texts = {}
for folder in sys.argv[1:]:
    run = pipeline("text-generation", model=folder, tokenizer=sys.argv[1])
    texts[folder] = run("w1 w2 w3", max_new_tokens=6, min_new_tokens=6, do_sample=False)[0]["generated_text"]
assert not any(name.split(".")[0] == "orthoft" for name in sys.modules)
print("RESULT", json.dumps(texts))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, and an adapter of each of our types on each of them."""
    root = tmp_path_factory.mktemp("pipelines")
    save_bert(root / "bert")
    save_llama(root / "llama")
    for base, auto, targets in (
        ("bert", AutoModel, ["query", "value"]),
        ("llama", AutoModelForCausalLM, ["q_proj", "down_proj"]),
    ):
        for name, config in ADAPTERS.items():
            torch.manual_seed(1)
            given = config(target_modules=targets, init_weights=False, **OPTIONS.get(name, {}))
            get_peft_model(auto.from_pretrained(root / base), given).save_pretrained(root / f"{base}-{name}")
    return root


@pytest.mark.parametrize("name", ADAPTERS)
def test_features_of_an_adapter_by_its_folder(name: str, models: Path) -> None:
    found = torch.tensor(pipeline("feature-extraction", model=str(models / f"bert-{name}"))(TEXT))
    plain = torch.tensor(pipeline("feature-extraction", model=str(models / "bert"))(TEXT))
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(models / "bert"), models / f"bert-{name}").eval()
    inputs = AutoTokenizer.from_pretrained(models / "bert")(TEXT, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        wanted = adapted(**inputs).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (found - plain).norm() > 1e-2 * plain.norm()


@pytest.mark.parametrize("name", ADAPTERS)
def test_text_of_an_adapter_by_its_folder(name: str, models: Path) -> None:
    run = pipeline("text-generation", model=str(models / f"llama-{name}"))
    text = run(TEXT, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0]["generated_text"]
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(models / "llama")
    base = AutoModelForCausalLM.from_pretrained(models / "llama")
    adapted = PeftModel.from_pretrained(base, models / f"llama-{name}").eval()
    inputs = tokenizer(TEXT, return_tensors="pt", return_token_type_ids=False)
    wanted = adapted.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert text.replace(" ", "") == tokenizer.decode(wanted[0], skip_special_tokens=True).replace(" ", "")


def test_exports_in_plain_pipelines(models: Path, tmp_path: Path) -> None:
    base, source = models / "llama", models / "llama-hra"
    merge(base, [source], tmp_path / "merged", method="task_arithmetic")
    merge(base, [source], tmp_path / "merged-lora", method="task_arithmetic", output="lora")
    to_lora(source, tmp_path / "lora")
    run = pipeline("text-generation", model=str(source))
    wanted = run(TEXT, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0]["generated_text"]
    folders = [str(base), *(str(tmp_path / name) for name in ("merged", "merged-lora", "lora"))]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *folders],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    texts = json.loads(done.stdout.partition("RESULT ")[2])
    assert [texts[folder] for folder in folders[1:]] == [wanted] * 3
    assert texts[folders[0]] != wanted
