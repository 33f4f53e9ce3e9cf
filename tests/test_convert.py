"""Conversions: each one loaded in plain PEFT, without orthoft, or from plain PEFT into ours; and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from merging_files import randomised, save_base
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from orthoft import HRAConfig, OFTv2Config
from orthoft.adapters import GOFTConfig, PSOFTConfig, SVFTConfig
from orthoft.convert import Conversion, from_peft, to_lora, to_peft

# Loaded by either process: this one, and the one without orthoft.
LOAD = """
from collections import OrderedDict
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModel
PLAIN = {
    "words": lambda: nn.Sequential(OrderedDict(
        embed_tokens=nn.Embedding(20, 16), up=nn.Linear(16, 24), act=nn.Tanh(), down=nn.Linear(24, 12))),
    "image": lambda: nn.Sequential(OrderedDict(
        first=nn.Conv2d(4, 6, 3, stride=2, padding=1), act=nn.Tanh(), second=nn.Conv2d(6, 8, 1))),
    "wide": lambda: nn.Sequential(OrderedDict(embed_tokens=nn.Embedding(20, 64), up=nn.Linear(64, 10))),
}
CLASSES = {"llama": AutoModelForCausalLM, "bert": AutoModel, "head": AutoModelForSequenceClassification,
           "gpt2": AutoModelForCausalLM}

def load(kind, folder):
    torch.manual_seed(5)  # of a new head
    if kind not in PLAIN:
        return CLASSES[kind].from_pretrained(folder).eval()
    from safetensors.torch import load_file
    model = PLAIN[kind]()
    model.load_state_dict(load_file(f"{folder}/model.safetensors"))
    return model.eval()

def run(kind, model):
    torch.manual_seed(6)
    given = torch.randn(3, 4, 9, 9) if kind == "image" else torch.randint(0, 20, (3, 7))
    with torch.no_grad():
        got = model(given)
    return (got if isinstance(got, torch.Tensor) else got[0]).double()
"""
ELSEWHERE = (
    LOAD
    + """
import json, sys, warnings
from peft import PeftModel
for name, kind, folder, adapter in json.load(open(sys.argv[1])):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        model = PeftModel.from_pretrained(load(kind, folder), adapter).eval()
    torch.save(run(kind, model), sys.argv[2] + f"/{name}.pt")
assert not any(name.split(".")[0] == "orthoft" for name in sys.modules)
"""
)

here: dict[str, Any] = {}
exec(LOAD, here)
LINEAR = {
    "llama": ["q_proj", "k_proj", "down_proj"],
    "bert": ["query", "intermediate.dense"],
    "head": ["query", "intermediate.dense"],
    "gpt2": ["c_attn", "c_proj"],
    "words": ["embed_tokens", "up", "down"],
    "image": ["first", "second"],
    "wide": ["up"],
}


@dataclass
class Case:
    """An adapter on a tiny model, and how it is converted."""

    kind: str
    config: Callable[..., Any]
    options: dict[str, Any]
    convert: Callable[..., Conversion] = to_lora
    given: dict[str, Any] = field(default_factory=dict)
    live: bool = False  # from the model, not from its folder
    std: float = 0.1  # of the noise on all that is trained


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    folders = {kind: save_base(root / kind, kind) for kind in ("llama", "bert", "gpt2")}
    for kind in ("words", "image", "wide"):
        (root / kind).mkdir()
        model = randomised(here["PLAIN"][kind](), std=0.5)
        save_file(model.state_dict(), root / kind / "model.safetensors")
        folders[kind] = root / kind
    return folders | {"head": folders["bert"]}


def trained(case: Case, base: Path) -> PeftModel:
    """Return the model with a random adapter, biases and heads too."""
    torch.manual_seed(0)
    options = {"target_modules": LINEAR[case.kind], "init_weights": False} | case.options
    model = get_peft_model(here["load"](case.kind, base), case.config(**options)).eval()
    model.peft_config["default"].base_model_name_or_path = str(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 10.0 if "hra" in name else 1.0  # only directions matter there
                parameter.add_(scale * case.std * torch.randn_like(parameter))
    return model


def plain_peft(jobs: list[tuple[str, str, Path, Path]], folder: Path) -> dict[str, Tensor]:
    """Return the outputs of adapters in a process that never imports orthoft."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs, default=str))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, file, folder], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {job[0]: torch.load(folder / f"{job[0]}.pt") for job in jobs}


def oftv2(kind: str, convert: Any = to_lora, given: Any = None, **options: Any) -> Case:
    return Case(kind, OFTv2Config, {"block_size": 4} | options, convert, given or {})


def hra(kind: str, convert: Any = to_lora, **options: Any) -> Case:
    return Case(kind, HRAConfig, {"r": 4} | options, convert)


def psoft(kind: str, convert: Any = to_lora, **options: Any) -> Case:
    return Case(kind, PSOFTConfig, {"r": 4} | options, convert)


OUTWARD = {
    "hra lora": hra("llama"),
    "hra lora, orthonormal": hra("bert", orthonormal=True),
    "hra lora, ranks": hra("llama", rank_pattern={"k_proj": 2, "layers.1.mlp.down_proj": 6}),
    "hra lora, Conv1D": hra("gpt2"),
    "hra lora, embedding": hra("words"),
    "hra lora, convolutions": hra("image"),
    "hra lora, head": hra("head", task_type="SEQ_CLS"),
    "hra lora, all biases": hra("bert", bias="all"),
    "hra lora, own biases": hra("bert", bias="ortho_only"),
    "oftv2 lora, full rank": oftv2("llama", given={"rank": 48}),
    "oftv2 lora, embedding": oftv2("words", given={"rank": 24}),
    "oftv2 lora, convolutions": oftv2("image", block_size=3, given={"rank": 36}),
    "oft series 1": oftv2("llama", to_peft, degree=1),
    "oft series 3": oftv2("llama", to_peft, degree=3),
    "oft series 5": oftv2("llama", to_peft),
    "oft series 9": oftv2("llama", to_peft, degree=9),
    "oft cayley": oftv2("llama", to_peft, map="cayley"),
    "oft shared, radius": oftv2("llama", to_peft, block_share=True, radius=0.3),
    "oft block sizes": oftv2("llama", to_peft, block_size_pattern={"k_proj": 8, "layers.1.mlp.down_proj": 2}),
    "oft shared, block sizes": oftv2("llama", to_peft, block_share=True, block_size_pattern={"k_proj": 8}),
    "oft embedding": oftv2("words", to_peft),
    "oft embedding, cayley": oftv2("words", to_peft, map="cayley"),
    "oft 1x1 convolution": oftv2("image", to_peft, target_modules=["second"], block_size=3, map="cayley"),
    "oft head": oftv2("head", to_peft, task_type="SEQ_CLS"),
    "oft all biases": oftv2("bert", to_peft, bias="all"),
    "oft own biases": oftv2("bert", to_peft, bias="ortho_only"),
    "hra": hra("llama", to_peft),
    "hra orthonormal": hra("llama", to_peft, orthonormal=True),
    "hra ranks": hra("llama", to_peft, rank_pattern={"k_proj": 2, "layers.1.mlp.down_proj": 6}),
    "hra convolutions": hra("image", to_peft),
}

LIVE = [
    hra("words"),
    hra("image"),
    hra("gpt2", bias="all"),
    hra("head", task_type="SEQ_CLS"),
    psoft("llama", relax=False),
    oftv2("gpt2", given={"rank": 32}),
    Case("llama", GOFTConfig, {"mode": "quasi"}, given={"rank": 48}),
    Case("llama", SVFTConfig, {}, given={"rank": 48}),
    oftv2("image", target_modules=["second"], block_size=3, given={"rank": 6}),
]
OUTWARD |= {f"live {case.config.__name__} {case.kind}": replace(case, live=True) for case in LIVE}


def oft(terms: int) -> Case:
    return Case("llama", peft.OFTConfig, {"oft_block_size": 4, "num_cayley_neumann_terms": terms}, from_peft)


def near(kind: str, **options: Any) -> Case:
    """An OFT of a polynomial that is none of ours, so little trained that it is a rotation up to rounding."""
    return Case(kind, peft.OFTConfig, {"init_weights": True} | options, from_peft, std=0.004)


INWARD = {
    "oft exact": Case("llama", peft.OFTConfig, {"oft_block_size": 8, "use_cayley_neumann": False}, from_peft),
    "oft exact, embedding": Case(
        "words", peft.OFTConfig, {"oft_block_size": 4, "use_cayley_neumann": False}, from_peft
    ),
    "oft blocks, embedding": near("words", r=4, oft_block_size=0),
    **{f"oft {terms} terms": oft(terms) for terms in (1, 2, 3, 4, 6)},
    **{f"oft {terms} terms": near("llama", oft_block_size=4, num_cayley_neumann_terms=terms) for terms in (5, 7)},
    "oft blocks of 64": near("wide", oft_block_size=64, num_cayley_neumann_terms=6),
    "oft adjusted": Case("llama", peft.OFTConfig, {"oft_block_size": 12, "use_cayley_neumann": False}, from_peft),
    "oft coft": Case(
        "llama",
        peft.OFTConfig,
        {"oft_block_size": 4, "num_cayley_neumann_terms": 2, "coft": True, "eps": 0.2},
        from_peft,
    ),
    "oft coft, shared": Case(
        "llama",
        peft.OFTConfig,
        {"oft_block_size": 4, "use_cayley_neumann": False, "coft": True, "eps": 0.3, "block_share": True},
        from_peft,
    ),
    "oft 1x1 convolution": Case(
        "image",
        peft.OFTConfig,
        {"target_modules": ["second"], "oft_block_size": 3, "use_cayley_neumann": False},
        from_peft,
    ),
    "oft head": Case(
        "head", peft.OFTConfig, {"oft_block_size": 4, "use_cayley_neumann": False, "task_type": "SEQ_CLS"}, from_peft
    ),
    "hra": Case("llama", peft.HRAConfig, {"r": 4}, from_peft),
    "hra odd": Case("llama", peft.HRAConfig, {"r": 3}, from_peft),
    "hra Gram-Schmidt": Case("llama", peft.HRAConfig, {"r": 4, "apply_GS": True}, from_peft),
    "hra convolutions": Case("image", peft.HRAConfig, {"r": 4}, from_peft),
    "hra own biases": Case("bert", peft.HRAConfig, {"r": 4, "bias": "hra_only"}, from_peft),
}
OUTWARD |= {
    "psoft lora": psoft("llama"),
    "psoft lora, Conv1D": psoft("gpt2"),
    "psoft lora, convolutions": psoft("image"),
    "psoft lora, embedding": psoft("words"),
    "psoft": psoft("llama", to_peft),
    "psoft strict": psoft("llama", to_peft, relax=False),
    "psoft series 1": psoft("llama", to_peft, map="series", degree=1),
    "psoft series 5": psoft("llama", to_peft, map="series", relax=False),
    "psoft ranks": psoft("llama", to_peft, rank_pattern={"k_proj": 3, "layers.1.mlp.down_proj": 7}),
    "psoft fingerprint": psoft("llama", to_peft, save_basis=False),
}
INWARD |= {
    "psoft": Case("llama", peft.PsoftConfig, {"r": 4}, from_peft),
    "psoft strict": Case("llama", peft.PsoftConfig, {"r": 4, "psoft_mag_a": False, "psoft_mag_b": False}, from_peft),
    "psoft one scale": Case("llama", peft.PsoftConfig, {"r": 4, "psoft_mag_a": False, "psoft_alpha": 7}, from_peft),
    "psoft symmetric": Case("llama", peft.PsoftConfig, {"r": 4, "ab_svd_init": "pissa_init"}, from_peft),
    "psoft 4 terms, bounded": Case(
        "llama",
        peft.PsoftConfig,
        {"r": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": 4, "cayley_neumann_eps": 0.2},
        from_peft,
    ),
}


@pytest.fixture(scope="module")
def outward(
    bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Tensor, Tensor, Tensor, Conversion]]:
    """By case: outputs of the base, of our adapter, of the converted one in plain PEFT, and the conversion."""
    folder = tmp_path_factory.mktemp("outward")
    jobs, mine, done = [], {}, {}
    for index, (name, case) in enumerate(OUTWARD.items()):
        base = bases[case.kind]
        model = trained(case, base)
        mine[name] = here["run"](case.kind, model)
        model.save_pretrained(folder / f"{index}-ours")
        adapter = model if case.live else folder / f"{index}-ours"
        done[name] = case.convert(adapter, folder / f"{index}-new", **case.given)
        jobs.append((str(index), case.kind, base, folder / f"{index}-new"))
    got = plain_peft(jobs, folder)
    return {
        name: (here["run"](case.kind, here["load"](case.kind, bases[case.kind])), mine[name], got[str(i)], done[name])
        for i, (name, case) in enumerate(OUTWARD.items())
    }


@pytest.mark.parametrize("name", OUTWARD)
def test_plain_peft_computes_the_same(name: str, outward: dict[str, tuple[Tensor, Tensor, Tensor, Conversion]]) -> None:
    plain, mine, got, conversion = outward[name]
    assert error(mine, plain) > 1e-2
    assert error(got, mine) < 3e-6
    assert conversion.error < 2e-6


@pytest.mark.parametrize("name", INWARD)
def test_ours_computes_the_same(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    case = INWARD[name]
    base = bases[case.kind]
    model = trained(case, base)
    wanted = here["run"](case.kind, model)
    model.save_pretrained(tmp_path / "theirs")
    conversion = case.convert(tmp_path / "theirs", tmp_path / "ours", **case.given)
    plain = here["load"](case.kind, base)
    if name != "oft 1 terms":  # which PEFT takes for the identity
        assert error(wanted, here["run"](case.kind, plain)) > 1e-3
    again = PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    assert error(here["run"](case.kind, again), wanted) < 3e-6
    assert conversion.worst.error <= 1e-6


@pytest.mark.parametrize(
    "case",
    [hra("words", r=6), hra("words", r=3, orthonormal=True), psoft("words", r=6)],
    ids=["r", "orthonormal", "psoft"],
)
def test_a_lora_of_hra_and_psoft_is_exact(case: Case, bases: dict[str, Path]) -> None:
    """Every layer's own output, in float64, of the factors and of the adapter."""
    model = trained(case, bases["words"])
    lora = to_lora(model)
    for name in ("up", "down"):
        layer = model.get_submodule(f"base_model.model.{name}").double()
        x = torch.randn(9, layer.in_features, dtype=torch.float64)
        A, B = (lora.tensors[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
        assert error(layer.base_layer(x) + x @ A.mT @ B.mT, layer(x)) < 1e-6
        assert error(layer(x), layer.base_layer(x)) > 1e-2
    assert {report.rank for report in lora.layers} == {6}
    assert lora.error == 0


def test_a_lora_of_a_rank_is_the_best(bases: dict[str, Path], tmp_path: Path) -> None:
    model = trained(Case("words", OFTv2Config, {"block_size": 4}), bases["words"])
    model.save_pretrained(tmp_path / "ours")
    from_model, from_folder = to_lora(model, rank=3), to_lora(tmp_path / "ours", rank=3)
    same = {report.name: report.error for report in from_folder.layers}
    for report in from_model.layers:
        delta = model.get_submodule(f"base_model.model.{report.name}").get_delta_weight("default")
        s = torch.linalg.svdvals(delta.double())
        assert report.error == pytest.approx((s[3:].norm() / s.norm()).item(), rel=1e-5)
        assert (report.rank, report.norm) == (3, pytest.approx(s.norm().item(), rel=1e-5))
        assert same[report.name] == pytest.approx(report.error, rel=1e-4)
    assert from_model.error < from_model.worst.error < 1
    assert not (tmp_path / "lora").exists()


def test_the_lora_of_a_second_adapter(bases: dict[str, Path]) -> None:
    model = trained(Case("words", HRAConfig, {}), bases["words"])
    model.add_adapter("other", HRAConfig(r=2, target_modules=["up"], init_weights=False))
    assert [report.name for report in to_lora(model, adapter_name="other").layers] == ["up"]
    with pytest.raises(ValueError, match="unknown adapter 'othr', did you mean 'other'"):
        to_lora(model, adapter_name="othr")


def test_pefts_own_adapters_as_loras(bases: dict[str, Path], tmp_path: Path) -> None:
    """The readers know PEFT's files: what they add up to is what PEFT merges, even polynomials included."""
    five = {"oft_block_size": 4, "num_cayley_neumann_terms": 5}
    for case in [Case("words", peft.OFTConfig, five), INWARD["hra Gram-Schmidt"], INWARD["psoft symmetric"]]:
        model = trained(case, bases[case.kind])
        wanted = here["run"](case.kind, model)
        folder = tmp_path / case.config.__name__
        model.save_pretrained(folder / "theirs")
        to_lora(folder / "theirs", folder / "lora", rank=48)
        again = PeftModel.from_pretrained(here["load"](case.kind, bases[case.kind]), folder / "lora")
        assert error(here["run"](case.kind, again.eval()), wanted) < 3e-6


def test_there_and_back(bases: dict[str, Path], tmp_path: Path) -> None:
    for case in (oftv2("llama", map="cayley"), oftv2("words"), hra("llama"), psoft("llama", svd="full")):
        folder = tmp_path / f"{case.config.__name__}-{case.kind}"
        trained(case, bases[case.kind]).save_pretrained(folder / "a")
        to_peft(folder / "a", folder / "b")
        from_peft(folder / "b", folder / "c")
        first, last = (load_file(folder / name / "adapter_model.safetensors") for name in "ac")
        assert first.keys() == last.keys()
        for key, tensor in first.items():
            if "psoft" not in key:  # the signs of its basis are free
                torch.testing.assert_close(last[key], tensor, rtol=1e-6, atol=1e-7)


def test_embeddings_known_by_their_names_are_told(bases: dict[str, Path], tmp_path: Path) -> None:
    trained(oftv2("words"), bases["words"]).save_pretrained(tmp_path / "a")
    for done in (to_lora(tmp_path / "a", rank=2), to_peft(tmp_path / "a", tmp_path / "b")):
        assert done.notes == ["taken for embeddings, by their names: embed_tokens.weight"]
    assert from_peft(tmp_path / "b").notes == []  # PEFT's file says so itself


# What another format cannot hold


REFUSED: dict[str, tuple[Case, str]] = {
    "no rank": (oftv2("llama"), "holds ORTHOFT_OFTV2, which has no exact LoRA form: give the rank"),
    "bad rank": (hra("llama"), "rank is a positive number, got 0"),
    "blocks": (
        oftv2("llama", to_peft, block_size=16, block_size_pattern={"q_proj": 2, "down_proj": 3}),
        "^block_size_pattern: .* common multiple 48 .* does not divide the 32 inputs of 'model.layers.0",
    ),
    "Conv1D": (oftv2("gpt2", to_peft), "'transformer.h.0.attn.c_attn.weight' is a Conv1D, which PEFT's OFT does not"),
    "HRA of an embedding": (hra("words", to_peft), r"'embed_tokens.weight' \(embedding\) is no linear layer"),
    "wide convolution": (
        oftv2("image", to_peft, target_modules=["first"], block_size=4),
        "'first.weight' is a convolution of kernel 3x3, whose forward pass in PEFT's OFT is not",
    ),
    "parity": (hra("llama", to_peft, rank_pattern={"q_proj": 3}), "^rank_pattern: .* 3 of .* cannot stand for 4"),
    "PSOFT with biases": (psoft("bert", to_peft, bias="all"), "^bias='all' has no place in PSOFT"),
    "PSOFT of an embedding": (psoft("words", to_peft), r"'embed_tokens.weight' \(embedding\) is no linear layer"),
    "PSOFT of another basis": (psoft("llama", to_peft, svd="lowrank"), "other singular vectors than the basis"),
    "LoRA": (
        Case("llama", lambda **_: peft.LoraConfig(target_modules=["q_proj"]), {}, to_peft),
        "unknown adapter for PEFT's own formats 'LORA'. Choose from: ORTHOFT_OFTV2, ",
    ),
    "ours already": (hra("llama", from_peft), "unknown adapter of PEFT 'ORTHOFT_HRA'. Choose from: OFT, HRA, PSOFT"),
    "5 terms": (
        Case("llama", peft.OFTConfig, {"oft_block_size": 4}, from_peft),
        r"^num_cayley_neumann_terms=5 is a polynomial of degree 4.* differs by 0\.\d+ .*tolerance",
    ),
    "Gram-Schmidt of pairs": (
        Case("llama", peft.HRAConfig, {"r": 4, "apply_GS": True, "init_weights": True}, from_peft, std=0.0),
        "^apply_GS: of nearly dependent vectors",
    ),
    "free matrix": (Case("llama", peft.PsoftConfig, {"r": 4, "psoft_orth": False}, from_peft), "^psoft_orth=False: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    case, words = REFUSED[name]
    trained(case, bases[case.kind]).save_pretrained(tmp_path / "a")
    given = {"rank": 0} if name == "bad rank" else {}
    with pytest.raises(ValueError, match=words) as raised:
        case.convert(tmp_path / "a", tmp_path / "b", **given)
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_nearest_rotation_is_accepted_by_its_error(bases: dict[str, Path], tmp_path: Path) -> None:
    case = Case("llama", peft.OFTConfig, {"oft_block_size": 4}, from_peft, std=0.02)
    model = trained(replace(case, options=case.options | {"init_weights": True}), bases["llama"])
    model.save_pretrained(tmp_path / "a")
    done = from_peft(tmp_path / "a", tmp_path / "b", tolerance=1e-2)
    assert 1e-6 < done.worst.error < 1e-2
    again = PeftModel.from_pretrained(here["load"]("llama", bases["llama"]), tmp_path / "b").eval()
    off = error(here["run"]("llama", again), here["run"]("llama", model))
    assert 1e-7 < off < 1e-2


def test_an_old_folder_stays(bases: dict[str, Path], tmp_path: Path) -> None:
    trained(hra("llama"), bases["llama"]).save_pretrained(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for convert in (to_lora, to_peft):
        with pytest.raises(FileExistsError, match="output folder exists"):
            convert(tmp_path / "a", tmp_path / "b")
        convert(tmp_path / "a", tmp_path / "b", overwrite=True)
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["peft_type"] == "HRA"
    with pytest.raises(FileNotFoundError, match="no folder"):
        from_peft(tmp_path / "none", tmp_path / "c")


def test_what_files_do_not_tell_of_convolutions_is_noted(bases: dict[str, Path], tmp_path: Path) -> None:
    trained(hra("image"), bases["image"]).save_pretrained(str(tmp_path / "a"))
    (note,) = to_lora(tmp_path / "a", base=bases["image"]).notes
    assert note.startswith("right for convolutions without groups")
    assert note.endswith(": first.weight, second.weight")


def test_live_models_that_have_no_lora(bases: dict[str, Path]) -> None:
    with pytest.raises(TypeError, match="expected the folder of an adapter or a PeftModel, got a Linear"):
        to_lora(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'default' is no adapter of orthoft: it is a HRAConfig"):
        to_lora(trained(INWARD["hra"], bases["llama"]))
    model = trained(hra("words"), bases["words"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into 'embed_tokens': call unmerge_adapter"):
        to_lora(model)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    adapted = get_peft_model(grouped, HRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="'0' has groups, dilation or padding_mode that PEFT's LoRA leaves out"):
        to_lora(adapted)
