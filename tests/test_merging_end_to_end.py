"""`merge` from disk to disk: every method on every mixture, exports loaded elsewhere, and bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from merging_files import (
    MODELS,
    TARGETS,
    linear_weights,
    load,
    randomised,
    save_base,
    save_hra,
    save_lora,
    save_oftv2,
    tensors_of,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from orthoft.delta import LowRank
from orthoft.merging import METHODS, MergeReport, merge, plan
from orthoft.merging.plan import named_sources

Folders = dict[str, Path]
LOADED_ELSEWHERE = """
import json, sys, warnings
import torch
warnings.simplefilter("ignore")
from transformers import AutoModel, AutoModelForCausalLM
from peft import PeftModel
for job in json.load(open(sys.argv[1])):
    cls = AutoModel if job["kind"] == "bert" else AutoModelForCausalLM
    model = cls.from_pretrained(job["model"])
    if job["adapter"]:
        model = PeftModel.from_pretrained(model, job["adapter"])
    with torch.no_grad():
        outputs = model.eval()(torch.arange(20).reshape(2, 10))
    torch.save(outputs[0].double(), job["out"])
assert not any(name.split(".")[0] == "orthoft" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folders]:
    """A base per model family and a source of each kind on it."""
    return {kind: make_sources(tmp_path_factory.mktemp(kind), kind) for kind in MODELS}


def make_sources(root: Path, kind: str) -> Folders:
    base = save_base(root / "base", kind, max_shard_size="20KB" if kind == "llama" else "5GB")
    cls = load if kind == "bert" else AutoModelForCausalLM.from_pretrained
    save_lora(root / "lora", cls(base), target_modules=TARGETS[kind][:2], lora_alpha=12)
    save_lora(root / "rslora", cls(base), seed=8, r=3, target_modules=TARGETS[kind], use_rslora=True)
    save_oftv2(root / "oftv2", linear_weights(base, kind))
    save_hra(root / "hra", linear_weights(base, kind))
    tuned = randomised(cls(base), "0", seed=9)
    tuned.save_pretrained(root / "tuned")
    return {name: root / name for name in ("base", "lora", "rslora", "oftv2", "hra", "tuned")}


def dense_deltas(base: Path, folders: list[Path]) -> dict[str, list[Tensor]]:
    """Return each source's float64 delta of every tensor that one of them changes: (m, n), vectors (1, n)."""
    own = tensors_of(base)
    models = [tensors_of(single_merge(base, folder)) for folder in folders]
    changed = [name for name in own if any(not model[name].equal(own[name]) for model in models)]
    return {
        name: [(m[name].double() - own[name].double()).reshape(-1, own[name].shape[-1]) for m in models]
        for name in changed
    }


def single_merge(base: Path, folder: Path) -> Path:
    out = folder.parent / f"{folder.name}-alone"
    if not out.exists():
        merge(base, [folder], out, method="task_arithmetic", progress=False, diagnostics=False)
    return out


MIXTURES = {"factored": ["lora", "rslora", "hra"], "mixed": ["rslora", "oftv2", "hra"], "full": ["lora", "tuned"]}


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("name", ["task_arithmetic", "mean", "ties", "opcm"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_merged_checkpoint_equals_the_oracle(
    kind: str, name: str, mixture: str, made: dict[str, Folders], tmp_path: Path
) -> None:
    folders = made[kind]
    sources = [folders[source] for source in MIXTURES[mixture]]
    weights = [1.0, 0.5, 2.0][: len(sources)]
    report = merge(
        folders["base"], sources, tmp_path / "out", method=name, weights=weights, progress=False, diagnostics=False
    )
    deltas = dense_deltas(folders["base"], sources)
    model_oracle: Callable[..., dict[str, Tensor]] | None = getattr(reference, f"{name}_model", None)
    oracle = getattr(reference, name)
    merged = model_oracle(deltas, weights) if model_oracle else {n: oracle(d, weights) for n, d in deltas.items()}
    base, got = tensors_of(folders["base"]), tensors_of(tmp_path / "out")
    assert got.keys() == base.keys()
    largest = max(delta.abs().max().item() for delta in merged.values())
    for tensor_name, tensor in base.items():
        if tensor_name not in merged:
            assert got[tensor_name].equal(tensor), tensor_name
            continue
        want = tensor.double() + merged[tensor_name].reshape(tensor.shape)
        assert (got[tensor_name].double() - want).abs().max() < 3e-5 * largest, tensor_name
    assert report.norm == pytest.approx(sum(d.norm().item() ** 2 for d in merged.values()) ** 0.5, rel=1e-4)
    adapted = {f"{module}.weight" for module in linear_weights(folders["base"], kind)}
    spaces = {entry.space for entry in report.merged if entry.name in adapted and len(entry.task_norms) == len(sources)}
    assert spaces == {"core" if mixture == "factored" and METHODS[name].commutes(METHODS[name].bind({})) else "full"}


def test_exports_load_where_orthoft_is_not(made: dict[str, Folders], tmp_path: Path) -> None:
    """Checkpoints in plain transformers, LoRAs in plain PEFT, exact and truncated: all compute base + merged delta."""
    jobs, same = [], []
    for kind, folders in made.items():
        sources = [folders["lora"], folders["hra"]]
        for output, options in [("checkpoint", {}), ("lora", {}), ("lora", {"rank": 12})]:
            out = tmp_path / f"{kind}-{output}-{len(options)}"
            merge(folders["base"], sources, out, method="opcm", output=output, progress=False, **options)
            model, adapter = (folders["base"], str(out)) if output == "lora" else (out, None)
            jobs.append(
                {"kind": kind, "model": str(model), "adapter": adapter, "out": str(tmp_path / f"{out.name}.pt")}
            )
        same.append([job["out"] for job in jobs[-3:]])
    file = tmp_path / "jobs.json"
    file.write_text(json.dumps(jobs))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOADED_ELSEWHERE, file], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    for kind, files in zip(made, same, strict=True):
        here = (load if kind == "bert" else AutoModelForCausalLM.from_pretrained)(made[kind]["base"]).eval()
        with torch.no_grad():
            base = here(torch.arange(20).reshape(2, 10))[0].double()
        checkpoint, exact, truncated = (torch.load(file) for file in files)
        assert (checkpoint - base).norm() > 0.05 * base.norm()
        assert (exact - checkpoint).norm() < 1e-5 * checkpoint.norm()
        assert (truncated - checkpoint).norm() < 1e-5 * checkpoint.norm()  # 4 + 4 <= 12: nothing is cut


def test_a_truncated_lora_reports_what_it_lost(made: dict[str, Folders], tmp_path: Path) -> None:
    folders = made["bert"]
    sources = [folders["lora"], folders["rslora"]]
    full = merge(folders["base"], sources, tmp_path / "full", method="mean", output="lora", progress=False)
    cut = merge(folders["base"], sources, tmp_path / "cut", method="mean", output="lora", rank=2, progress=False)
    assert full.truncation_error == 0
    assert {entry.rank for entry in cut.merged} == {2}
    lost, total = 0.0, 0.0
    for name, deltas in dense_deltas(folders["base"], sources).items():
        s = torch.linalg.svdvals(reference.mean(deltas, [1.0, 1.0]))
        error = (s[2:].norm() / s.norm()).item()
        entry = next(entry for entry in cut.merged if entry.name == name)
        assert entry.truncation_error == pytest.approx(error, rel=1e-3)
        lost, total = lost + s[2:].norm().item() ** 2, total + s.norm().item() ** 2
    assert cut.truncation_error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    saved = json.loads((tmp_path / "cut" / "report.json").read_text())
    assert saved["truncation_error"] == cut.truncation_error
    config = json.loads((tmp_path / "full" / "adapter_config.json").read_text())
    factors = load_file(tmp_path / "full" / "adapter_model.safetensors")
    ranks = {
        key.split(".lora_A")[0].removeprefix("base_model.model."): t.shape[0]
        for key, t in factors.items()
        if "_A" in key
    }
    assert set(ranks.values()) == {3, 7}
    assert config["rank_pattern"] == config["alpha_pattern"] == ranks


def test_a_dense_merge_becomes_a_lora_of_a_chosen_rank(made: dict[str, Folders], tmp_path: Path) -> None:
    """From a fully fine-tuned model: linear layers are cut to the rank, what a LoRA cannot hold is listed."""
    folders = made["gpt2"]
    sources = [folders["tuned"], folders["oftv2"]]
    with pytest.raises(
        ValueError, match=r"^output='lora' needs a rank here: \d+ merged weights, e\.g\. 'transformer\.h\.0"
    ):
        merge(folders["base"], sources, tmp_path / "no", method="mean", output="lora", progress=False)
    report = merge(folders["base"], sources, tmp_path / "out", method="mean", output="lora", rank=32, progress=False)
    assert report.truncation_error < 1e-6
    left = [line.split(":")[0] for line in report.not_carried["output"]]
    assert {"transformer.wte.weight", "transformer.h.0.ln_1.weight", "transformer.h.0.attn.c_attn.bias"} <= set(left)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    base = tensors_of(folders["base"])
    for name, deltas in dense_deltas(folders["base"], sources).items():
        if name in left:
            continue
        module = f"base_model.model.{name.removesuffix('.weight')}"
        product = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        assert base[name].shape == product.T.shape
        torch.testing.assert_close(product.T.double(), reference.mean(deltas, [1.0, 1.0]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", None])
def test_every_entry_is_rounded_once(dtype: str | None, tmp_path: Path) -> None:
    """From bfloat16: the float64 sum rounded to the output's dtype, but for sums in the middle of two numbers."""
    base = save_base(tmp_path / "base", "bert")
    stored = {name: tensor.bfloat16() for name, tensor in tensors_of(base).items()}
    save_file(stored | {"ids": torch.arange(5)}, base / "model.safetensors", {"format": "pt"})
    save_lora(tmp_path / "lora", load(tmp_path / "base").float(), target_modules=["query"])
    merge(base, [tmp_path / "lora"], tmp_path / "out", method="mean", dtype=dtype, progress=False)
    target = getattr(torch, dtype or "bfloat16")
    got, factors = tensors_of(tmp_path / "out"), load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert got["ids"].equal(torch.arange(5))
    for name, tensor in stored.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        assert got[name].dtype == target
        if f"{module}.lora_A.weight" not in factors:
            assert got[name].equal(tensor.to(target))
            continue
        A, B = factors[f"{module}.lora_A.weight"].double(), factors[f"{module}.lora_B.weight"].double()
        want = (tensor.double() + B @ A * 8 / 4).to(target)
        assert (got[name] != want).float().mean() < (0.01 if target != torch.float32 else 1.0)
        torch.testing.assert_close(got[name], want)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == (dtype or "float32")  # what the base's config said, unless a dtype is chosen


def test_what_lies_beside_the_weights_is_carried_over(made: dict[str, Folders], tmp_path: Path) -> None:
    folders = made["llama"]
    report = merge(
        folders["base"], [folders["lora"]], tmp_path / "out", method="mean", max_shard_size="30KB", progress=False
    )
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    weights = {name for name in names if name.endswith(".safetensors")}
    assert len(weights) > 1
    assert names - weights == {
        *("config.json", "generation_config.json", "tokenizer.json", "1_Pooling/config.json"),
        *("model.safetensors.index.json", "report.json", "report.html", "README.md"),
    }
    assert (tmp_path / "out" / "README.md").read_text() != "the base"
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert saved["sources"] == {"lora": "LORA"}
    assert saved["seconds"] > 0


def test_the_same_merge_twice_writes_the_same_bytes(made: dict[str, Folders], tmp_path: Path) -> None:
    folders = made["bert"]
    for out in ("first", "second"):
        merge(folders["base"], [folders["lora"], folders["hra"]], tmp_path / out, method="opcm", progress=False)
    first, second = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("first", "second"))
    assert first == second


def test_a_plan_says_what_will_happen(made: dict[str, Folders]) -> None:
    folders = made["bert"]
    sources = [("a", folders["lora"]), ("b", folders["rslora"])]
    todo = plan(folders["base"], sources, method="opcm")
    assert {item.space.name for item in todo.merged.values()} == {"core"}
    assert {(item.sources, item.rank) for item in todo.merged.values()} == {(("a", "b"), 7), (("b",), 3)}
    assert {item.space.name for item in plan(folders["base"], sources, method="ties").merged.values()} == {"full"}
    with pytest.raises(ValueError, match=r"^space 'core' needs low-rank factors"):
        plan(folders["base"], [folders["oftv2"]], method="mean", space="core")
    with pytest.raises(ValueError, match=r"^weight 'enc.*: space 'core' needs .*\(dense here: oftv2\)$"):
        plan(folders["base"], [folders["oftv2"], folders["lora"]], method="mean", space="core")


def test_a_chosen_space_leaves_out_what_no_source_has_factors_of(made: dict[str, Folders], tmp_path: Path) -> None:
    base = made["bert"]["base"]
    for seed in (1, 2):
        save_lora(tmp_path / f"{seed}", load(base), seed=seed, target_modules=["query"], modules_to_save=["pooler"])
    report = merge(
        base, [tmp_path / "1", tmp_path / "2"], tmp_path / "out", method="ties", space="core", progress=False
    )
    assert {entry.name.split(".")[0]: entry.space for entry in report.merged} == {"encoder": "core", "pooler": "full"}
    assert any("weights in core" in note and "in full" in note for note in report.notes)


def test_an_incomplete_checkpoint_is_said(made: dict[str, Folders], tmp_path: Path) -> None:
    base = made["bert"]["base"]
    (tmp_path / "tuned").mkdir()
    tensors = tensors_of(base)
    dropped = tensors.pop("pooler.dense.bias")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "tuned" / "model.safetensors")
    report = merge(base, [tmp_path / "tuned"], tmp_path / "out", method="mean", progress=False)
    assert report.notes == ["tuned lacks 1 tensors of the base, e.g. 'pooler.dense.bias'"]
    assert tensors_of(tmp_path / "out")["pooler.dense.bias"].equal(dropped)


def test_sources_of_one_name_are_told_apart(made: dict[str, Folders]) -> None:
    folders = made["bert"]
    todo = plan(folders["base"], [folders["lora"], folders["lora"], ("x", folders["hra"])], method="mean")
    assert [source.name for source in todo.sources] == ["lora", "lora#2", "x"]


def test_disjoint_targets_merge_and_it_is_said(made: dict[str, Folders], tmp_path: Path) -> None:
    base = made["bert"]["base"]
    save_lora(tmp_path / "q", load(base), target_modules=["query"])
    save_lora(tmp_path / "v", load(base), target_modules=["value"])
    report = merge(base, [tmp_path / "q", tmp_path / "v"], tmp_path / "out", method="mean", progress=False)
    assert "q and v change disjoint sets of weights: each counts as zero there" in report.notes
    got, own = tensors_of(tmp_path / "out"), tensors_of(base)
    for name, deltas in dense_deltas(base, [tmp_path / "q", tmp_path / "v"]).items():
        torch.testing.assert_close(got[name].double(), own[name].double() + sum(deltas) / 2, atol=1e-6, rtol=1e-5)


def test_other_kinds_of_sources_are_said(made: dict[str, Folders], tmp_path: Path) -> None:
    folders = made["bert"]
    report = merge(
        folders["base"], [folders["lora"], folders["oftv2"]], tmp_path / "out", method="mean", progress=False
    )
    assert "sources of different kinds: lora (LORA), oftv2 (ORTHOFT_OFTV2)" in report.notes


def spoil(folder: Path, key: str, value: float) -> Path:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if key in name)
    tensors[name][0, 0] = value
    save_file(tensors, file)
    return folder


def bad_input(what: str, made: Folders, root: Path) -> tuple[dict[str, Any], type[Exception], str]:
    """Return the arguments of `merge` that differ from good ones, the error, and the beginning of its message."""
    source = root / "bad"
    save_lora(source, load(made["base"]), target_modules=["query"])
    here = {"sources": [made["lora"], source]}
    file = source / "adapter_model.safetensors"
    query = "encoder.layer.0.attention.self.query"
    match what:
        case "missing adapter file":
            file.unlink()
            return (
                here,
                FileNotFoundError,
                "source 'bad': no adapter_model.safetensors and no adapter_model.safetensors.index",
            )
        case "missing folder":
            return {"sources": [root / "gone"]}, FileNotFoundError, f"source 'gone': no folder {root / 'gone'}"
        case "empty folder":
            (root / "void").mkdir()
            return (
                {"sources": [root / "void"]},
                FileNotFoundError,
                f"source 'void': {root / 'void'} holds neither an adapter",
            )
        case "another base":
            return (
                {"base": made["other"]},
                ValueError,
                "source 'lora': an adapter of another base: its module 'encoder.layer",
            )
        case "truncated":
            file.write_bytes(file.read_bytes()[:-40])
            return here, ValueError, f"source 'bad': {file} is truncated or not a safetensors file"
        case "nan":
            spoil(source, f"{query}.lora_B", float("nan"))
            key = f"base_model.model.{query}.lora_B.weight"
            return here, ValueError, f"source 'bad': tensor '{key}' contains NaN or Inf"
        case "inf in a hidden place":
            spoil(source, "layer.1.attention.self.query.lora_A", float("inf"))
            return (
                here,
                ValueError,
                "source 'bad': tensor 'base_model.model.encoder.layer.1.attention.self.query.lora_A",
            )
        case "overflow":
            spoil(source, f"{query}.lora_B", 1e30)
            return (
                here | {"dtype": "float16"},
                ValueError,
                f"merged weight '{query}.weight' contains NaN or Inf as float16",
            )
        case "broken config":
            (source / "adapter_config.json").write_text("{")
            return here, ValueError, f"source 'bad': {source / 'adapter_config.json'} is not valid JSON"
        case "method":
            return {"method": "opmc"}, ValueError, "unknown merge method 'opmc', did you mean 'opcm'? Choose from: "
        case "parameter":
            return (
                {"alhpa": 1},
                ValueError,
                "unknown parameter of method 'opcm' 'alhpa', did you mean 'alpha'? Choose from:",
            )
        case "value":
            return {"alpha": 3}, ValueError, "alpha is a share of the singular values, in [0, 1], got 3"
        case "output":
            return (
                {"output": "loar"},
                ValueError,
                "unknown output 'loar', did you mean 'lora'? Choose from: checkpoint, ",
            )
        case "dtype":
            return {"dtype": "bf16"}, ValueError, "unknown dtype 'bf16'"
        case "rank":
            return {"rank": 4}, ValueError, "rank is of output='lora', a checkpoint has none: got rank=4"
        case "lora rank":
            return {"rank": 0, "output": "lora"}, ValueError, "rank is a positive number, got 0"
        case "no sources":
            return {"sources": []}, ValueError, "sources is a sequence of at least one folder"
        case "weights":
            return {"weights": [1]}, ValueError, "1 weights were given for 2 sources: give one each"
    raise AssertionError(what)


BAD = ["missing adapter file", "missing folder", "empty folder", "another base", "truncated", "nan"]
BAD += ["inf in a hidden place", "overflow", "broken config", "method", "parameter", "value", "output", "dtype", "rank"]
BAD += ["lora rank", "no sources", "weights"]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    what: str, exists: bool, made: dict[str, Folders], tmp_path: Path
) -> None:
    folders = made["bert"] | {"other": made["llama"]["base"]}
    changed, error, message = bad_input(what, folders, tmp_path)
    out = tmp_path / "results" / "out"
    if exists:
        out.mkdir(parents=True)
        (out / "precious").write_text("")
    good: dict[str, Any] = {"base": folders["base"], "sources": [folders["lora"], folders["rslora"]], "method": "opcm"}
    with pytest.raises(error) as caught:
        merge(**good | changed, out=out, overwrite=exists, progress=False)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    left = sorted(str(path.relative_to(tmp_path / "results")) for path in (tmp_path / "results").rglob("*"))
    assert left == (["out", "out/precious"] if exists else [])


def test_an_output_that_exists_is_refused_before_any_work(made: dict[str, Folders], tmp_path: Path) -> None:
    folders = made["bert"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    with pytest.raises(
        FileExistsError, match=r"^output folder exists: .*out \(choose another, or replace it by overwrite\)$"
    ):
        merge("gone", [folders["lora"]], tmp_path / "out", method="mean", progress=False)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["precious"]
    report = merge(folders["base"], [folders["lora"]], tmp_path / "out", method="mean", overwrite=True, progress=False)
    assert isinstance(report, MergeReport)
    assert "precious" not in os.listdir(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_an_output_may_not_replace_what_is_merged(made: dict[str, Folders]) -> None:
    folders = made["bert"]
    for out in (folders["base"], folders["lora"], folders["base"].parent):
        with pytest.raises(ValueError, match="holds what is merged"):
            merge(folders["base"], [folders["lora"]], out, method="mean", overwrite=True, progress=False)
    assert (folders["base"] / "model.safetensors").exists()


def test_an_output_has_a_place_of_its_own(made: dict[str, Folders], tmp_path: Path) -> None:
    base, source = shutil.copytree(made["bert"]["base"], tmp_path / "base"), made["bert"]["lora"]
    (tmp_path / "file").write_text("")
    before = sorted(path for path in tmp_path.rglob("*"))
    cases: list[tuple[Path, type[Exception], str]] = [
        (base / "merged", ValueError, r"is inside the base .*, whose folders are carried over: choose another$"),
        (Path("."), ValueError, r"^the output folder needs a name, got '\.'$"),
        (tmp_path / "..", ValueError, r"^the output folder needs a name, got '.*\.\.'$"),
        (tmp_path / "file" / "out", OSError, r"^nothing can be written into .*file \(.+\)$"),
    ]
    for out, kind, message in cases:
        with pytest.raises(kind, match=message):
            merge(base, [source], out, method="mean", overwrite=True, progress=False)
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("words", [{}, {"output": "lora", "rank": 2}, {"method": "ties", "output": "delta"}])
def test_weights_too_large_are_told(words: dict[str, Any], made: dict[str, Folders], tmp_path: Path) -> None:
    given = {"method": "task_arithmetic", "weights": [1e38, 1e38], "progress": False, **words}
    sources = [made["bert"]["lora"], made["bert"]["oftv2"]]
    with pytest.raises(ValueError, match=r"^merged weight '.*' is too large for float32: take smaller weights"):
        merge(made["bert"]["base"], sources, tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_change_is_a_lora_that_loads(made: dict[str, Folders], tmp_path: Path) -> None:
    untrained = shutil.copytree(made["llama"]["lora"], tmp_path / "untrained")
    tensors = load_file(untrained / "adapter_model.safetensors")
    save_file({name: 0 * tensor for name, tensor in tensors.items()}, untrained / "adapter_model.safetensors")
    words = {"method": "ties", "space": "knots", "output": "lora", "progress": False}
    report = merge(made["llama"]["base"], [untrained], tmp_path / "out", **words)
    assert {entry.rank for entry in report.merged} == {1}
    model = AutoModelForCausalLM.from_pretrained(made["llama"]["base"])
    want = model.state_dict()["model.layers.0.self_attn.q_proj.weight"].clone()
    tuned = PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload()
    assert torch.equal(tuned.state_dict()["model.layers.0.self_attn.q_proj.weight"], want)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] > 0


def test_every_name_is_given_once() -> None:
    given = [("a#2", "x"), "a", "b/a", ("a#2", "y"), "."]
    names = [name for name, _ in named_sources(given)]
    assert names == ["a#2", "a", "a#3", "a#2#2", Path.cwd().name]


def test_a_nan_in_the_base_is_named(made: dict[str, Folders], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "bert")
    tensors = tensors_of(base)
    tensors["encoder.layer.1.attention.self.query.weight"][0, 0] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"^base: tensor 'encoder\.layer\.1\.attention\.self\.query\.weight' of "):
        merge(base, [made["bert"]["hra"]], tmp_path / "out", method="mean", progress=False)
    assert os.listdir(tmp_path) == ["base"]


def test_truncation_is_the_best_of_its_rank() -> None:
    random = torch.Generator().manual_seed(0)
    delta = LowRank(torch.randn(20, 6, generator=random), torch.randn(6, 15, generator=random))
    s = torch.linalg.svdvals(delta.dense().double())
    for source in (delta, delta.transposed().transposed()):
        kept, lost = source.truncated(4)
        assert kept.rank() == 4
        torch.testing.assert_close(lost, s[4:].norm())
        torch.testing.assert_close((delta.dense() - kept.dense()).norm().double(), lost, rtol=1e-5, atol=0)
