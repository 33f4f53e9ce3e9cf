"""What other projects offer for the same merges: their own functions, taken from clones in a folder, or PEFT's.

Of a clone's file only the functions and classes that are named here run, without their decorators (which register them,
or switch off gradients that nobody asks for), and with what they use given to them: nothing else of the project, and
none of its requirements, is imported.
"""

from __future__ import annotations

import __future__
import ast
import collections
import contextlib
import copy
import enum
import io
import math
import subprocess
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from peft.utils import merge_utils
from torch import Tensor, nn
from tqdm import tqdm

from orthoft.delta import LowRank
from timing import Call

TOP = 20  # per cent of the entries that TIES keeps, everywhere here
RANK_FRACTION, SCALING = 0.04, 0.1  # of CART
WUDI_STEPS = (2, 300)  # timed, published


@dataclass
class Layer:
    """LoRAs of one square weight, and the same changes entry by entry."""

    deltas: list[LowRank]

    @cached_property
    def dense(self) -> list[Tensor]:
        return [delta.dense() for delta in self.deltas]

    @property
    def width(self) -> int:
        return self.deltas[0].shape[0]

    @property
    def rank(self) -> int:
        return self.deltas[0].B.shape[1]


@dataclass(frozen=True)
class Peer:
    """A function of another project on a layer: where it is, what it is called, how it is called.

    Args:
        repository: "owner/name" on GitHub, cloned to ``name`` in the folder of peers; "" for PEFT, which is installed.
        function: what runs, for the footnote.
        prepare: ``(clone, layer) -> call``; what it does is not timed, the call is.
        share: of the published work that one call does.
    """

    repository: str
    function: str
    prepare: Callable[[Path, Layer], Call]
    share: float = 1.0

    def call(self, folder: Path | None, layer: Layer) -> Call | None:
        """Return what to time, or None where the clone is not there."""
        clone = self.clone(folder)
        if self.repository and not (clone and clone.is_dir()):
            return None
        return quiet(self.prepare(clone or Path(), layer))

    def clone(self, folder: Path | None) -> Path | None:
        return folder / self.repository.split("/")[1] if folder and self.repository else None

    def footnote(self, folder: Path | None) -> str:
        """Return what was run, of which version, or how to get it."""
        clone = self.clone(folder)
        if not self.repository:
            return f"PEFT {peft.__version__}, `{self.function}`"
        if clone and clone.is_dir():
            return f"{self.repository} at {version(clone)}, `{self.function}`"
        name = self.repository.split("/")[1]
        return f"skipped: `git clone https://github.com/{self.repository} DIR/{name}` and `--peers DIR` bring it"


def version(clone: Path) -> str:
    """Return the commit of a clone, or the version of an unpacked wheel."""
    for info in clone.glob("*.dist-info"):
        return info.stem
    done = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "a commit that is not known"


def quiet(call: Call) -> Call:
    """Return the call without what it prints."""

    def silent() -> object:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return call()

    return silent


def extract(file: Path, names: Collection[str], **given: object) -> SimpleNamespace:
    """Run these functions, classes and constants of a file, without decorators, with what they use given to them.

    Raises:
        ValueError: the file has no such name.
    """
    tree = ast.parse(file.read_text())
    found = {name: node for node in tree.body if (name := name_of(node)) in names}
    if missing := set(names) - set(found):
        raise ValueError(f"{file} has no {', '.join(sorted(missing))}: is it another version?")
    for node in found.values():
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            node.decorator_list = []
    tree.body = list(found.values())
    scope: dict[str, Any] = {"__name__": file.stem, "torch": torch, "math": math, "nn": nn, **given}
    exec(compile(tree, str(file), "exec", __future__.annotations.compiler_flag, dont_inherit=True), scope)
    return SimpleNamespace(**scope)


def name_of(node: ast.stmt) -> str:
    target = node.targets[0] if isinstance(node, ast.Assign) else node
    return getattr(target, "name", getattr(target, "id", ""))


def peft_adapters(kind: str, **options: object) -> Peer:
    """PEFT's merge of LoRAs in a model, with the same deltas as LoRAs of alpha = r on one layer."""

    def prepare(clone: Path, layer: Layer) -> Call:
        n, r = layer.width, layer.rank
        config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(nn.Linear(n, n, bias=False)), config, adapter_name="0")
        names = [str(t) for t in range(len(layer.deltas))]
        for name, delta in zip(names, layer.deltas, strict=True):
            if name != "0":
                model.add_adapter(name, config)
            model.base_model.model[0].lora_A[name].weight.data = delta.A
            model.base_model.model[0].lora_B[name].weight.data = delta.B
        rank = {} if kind == "cat" else {"svd_rank": r}

        def call() -> None:
            model.add_weighted_adapter(names, [1.0] * len(names), "merged", kind, **rank, **options)
            model.delete_adapter("merged")

        return call

    words = "".join(f", {name}={value}" for name, value in options.items())
    return Peer("", f"add_weighted_adapter(combination_type={kind!r}{words})", prepare)


def peft_function(name: str, *args: object) -> Peer:
    """PEFT's merge of tensors."""

    def prepare(clone: Path, layer: Layer) -> Call:
        weights = torch.ones(len(layer.dense))
        return lambda: getattr(merge_utils, name)(layer.dense, weights, *args)

    return Peer("", f"peft.utils.merge_utils.{name}", prepare)


def core_space(method: str, **config: object) -> Peer:
    """Core Space's own matrices and merge, without the product to a dense delta that follows."""

    def prepare(clone: Path, layer: Layer) -> Call:
        sums = extract(clone / "masking_ops.py", ["chunked_sum"])
        names = ["topk_values_mask", "resolve_zero_signs", "disjoint_merge", "resolve_sign", "ties_merging"]
        ties = extract(clone / "merging_functions.py", names, chunked_sum=sums.chunked_sum).ties_merging
        theirs = extract(
            clone / "task_merger.py", ["MatrixPerLayerMerger", "isotropize_matrix"], TaskMerger=object, ties_merging=ties
        )
        merger = object.__new__(theirs.MatrixPerLayerMerger)
        factors = [{"w": (delta.A, delta.B)} for delta in layer.deltas]

        def call() -> object:
            merger.cache = {}
            cores, U, Vh = merger.get_core_matrices(factors, "w", config)
            if method == "isotropize":
                return theirs.isotropize_matrix(merger._merge_tensors(cores, {"merge_method": "sum"})), U, Vh
            return merger._merge_tensors(cores, {"merge_method": method, **config}), U, Vh

        return call

    function = f"MatrixPerLayerMerger.get_core_matrices, _merge_tensors({method!r})"
    return Peer("apanariello4/core-space-merging", function, prepare)


def knots_ties(clone: Path, layer: Layer) -> Call:
    names = ["topk_values_mask", "resolve_zero_signs", "resolve_sign", "ties_masking"]
    source = (clone / "masking_ops.py").read_text()
    ops = extract(clone / "masking_ops.py", [name for name in map(name_of, ast.parse(source).body) if name])
    assert all(hasattr(ops, name) for name in names)
    theirs = extract(
        clone / "task_merger.py",
        ["VectorOps", "TaskMerger", "SVDMerger"],
        defaultdict=collections.defaultdict,
        OrderedDict=collections.OrderedDict,
        deepcopy=copy.deepcopy,
        tqdm=tqdm,
        get_mask_fn=lambda name: ops.ties_masking,
        masked_merge=ops.masked_merge,
    )
    models = [nn.Sequential(nn.Linear(layer.width, layer.width, bias=False)) for _ in range(len(layer.dense) + 1)]
    for model, change in zip(models, [torch.zeros_like(layer.dense[0]), *layer.dense], strict=True):
        model[0].weight = nn.Parameter(change, requires_grad=False)
    config = {"merge_method": "ties", "topK": TOP, "merging_type": "mean"}

    def call() -> object:
        merger = theirs.SVDMerger(models[1:], models[0], lambda m: SimpleNamespace(get_ft_parameters=m.state_dict), "cpu")
        merger.transform(config)
        return merger.merge(config)

    return call


def of_vectors(file: str, function: str) -> Callable[[Path, Layer], Call]:
    """A function of task vectors and a configuration, as in the code of TSV and of Iso."""

    def prepare(clone: Path, layer: Layer) -> Call:
        theirs = getattr(extract(clone / file, [function]), function)
        vectors = [SimpleNamespace(vector={"w": change}) for change in layer.dense]
        settings = SimpleNamespace(common_space_fraction=0.8)
        config = SimpleNamespace(DATASETS=[str(t) for t in range(len(vectors))], device="cpu", method=settings)
        return lambda: theirs(vectors, config)["w"]

    return prepare


def opcm(clone: Path, layer: Layer) -> Call:
    folder = clone / "fusion_bench" / "method" / "opcm"
    svd = extract(folder / "utils.py", ["_svd", "svd"]).svd
    nothing = dict.fromkeys(["LightningFabricMixin", "SimpleProfilerMixin"], type("Nothing", (), {}))
    bases = {name: type(name, (), {}) for name in (*nothing, "BaseAlgorithm")}
    algorithm = extract(folder / "opcm.py", ["OPCMForCLIP"], svd=svd, **bases).OPCMForCLIP
    zero = torch.zeros_like(layer.dense[0])

    def call() -> Tensor:
        state = object.__new__(algorithm)
        state.previous_lambda_t, merged, norms = 1.0, layer.dense[0], [layer.dense[0].norm()]
        for change in layer.dense[1:]:
            state.lambda_t = 1.0
            merged = state.merge_linear_weights(merged, zero, change, "w", alpha=0.5)
            norms.append(change.norm())
            state.previous_lambda_t = float(merged.norm() / torch.stack(norms).mean())
            merged = merged / state.previous_lambda_t
        return merged

    return call


def wudi(clone: Path, layer: Layer) -> Call:
    file = clone / "fusion_bench" / "method" / "wudi" / "wudi.py"
    theirs = extract(file, ["wudi_merging"], tqdm=tqdm, timeit_context=contextlib.nullcontext).wudi_merging
    vectors = [{"w": change} for change in layer.dense]
    return lambda: theirs(vectors, "cpu", WUDI_STEPS[0])


def mergekit_pieces(clone: Path) -> tuple[SimpleNamespace, SimpleNamespace]:
    """Return mergekit's sparsification and its generalized task arithmetic."""
    file = clone / "mergekit" / "sparsify.py"
    names = [name for node in ast.parse(file.read_text()).body if (name := name_of(node))]
    sparse = extract(file, names, Enum=enum.Enum)
    general = extract(
        clone / "mergekit" / "merge_methods" / "generalized_task_arithmetic.py",
        ["ConsensusMethod", "GeneralizedTaskArithmeticMerge", "get_mask"],
        Enum=enum.Enum,
        GroupMergeMethod=object,
        cached_property=cached_property,
        sparsify=sparse.sparsify,
        SparsificationMethod=sparse.SparsificationMethod,
        RescaleNorm=sparse.RescaleNorm,
    )
    return sparse, general


def group_of(layer: Layer) -> SimpleNamespace:
    """The tensors as mergekit passes them on: on a base of zeros, so that the deltas are the same to the last bit."""
    entries = [SimpleNamespace(tensor=change, id=t) for t, change in enumerate(layer.dense)]
    return SimpleNamespace(base=SimpleNamespace(tensor=torch.zeros_like(layer.dense[0])), non_base=entries)


def mergekit_general(sparsification: str, consensus: bool, *, normalize: bool, **options: float | bool) -> Peer:
    """mergekit's TIES, DARE, DELLA and breadcrumbs, which are one class."""

    def prepare(clone: Path, layer: Layer) -> Call:
        sparse, general = mergekit_pieces(clone)
        method = object.__new__(general.GeneralizedTaskArithmeticMerge)
        method.consensus_method = general.ConsensusMethod.sum if consensus else None
        method.sparsification_method = sparse.SparsificationMethod(sparsification)
        group, tasks = group_of(layer), range(len(layer.dense))
        shared = {"lambda": 1.0, "normalize": normalize, "int8_mask": False, "rescale": options.get("rescale", False)}
        own = {"weight": 1.0, **{name: value for name, value in options.items() if name != "rescale"}}
        each = {name: dict.fromkeys(tasks, value) for name, value in own.items()}
        return lambda: method.merge_group(group, **shared, **each)

    return Peer("arcee-ai/mergekit", f"GeneralizedTaskArithmeticMerge.merge_group, {sparsification}", prepare)


def mergekit_function(file: str, names: list[str], call: Callable[[Any, Layer], object]) -> Peer:
    """A function of mergekit's; ``call(module, layer)`` calls it."""

    def prepare(clone: Path, layer: Layer) -> Call:
        mask = mergekit_pieces(clone)[1].get_mask
        theirs = extract(clone / "mergekit" / "merge_methods" / f"{file}.py", names, sign_consensus_mask=mask)
        return lambda: call(theirs, layer)

    return Peer("arcee-ai/mergekit", f"{file}.{names[0]}", prepare)


def _karcher(theirs: Any, layer: Layer) -> object:
    return theirs.karcher_merge_tensors(layer.dense, [1 / len(layer.dense)] * len(layer.dense))


def _slerp(theirs: Any, layer: Layer) -> object:
    return theirs.slerp(torch.tensor([0.5]), layer.dense[0][None], layer.dense[1][None])


PEERS = {
    "Core Space sum": core_space("sum"),
    "Core Space TIES": core_space("ties", topK=TOP),
    "Core Space TSV": core_space("tsv"),
    "Core Space CART": core_space("cart", cart_pruning_rank=RANK_FRACTION, cart_scaling_coeffs=SCALING),
    "Core Space isotropize": core_space("isotropize"),
    "KnOTS TIES": Peer("gstoica27/KnOTS", "SVDMerger.transform, merge", knots_ties),
    "TSV-M": Peer(
        "AntoAndGar/task_singular_vectors",
        "compute_and_sum_svd_mem_reduction",
        of_vectors("src/utils/TSVM_utils.py", "compute_and_sum_svd_mem_reduction"),
    ),
    "Iso-C": Peer("danielm1405/iso-merging", "iso_c", of_vectors("src/utils/iso.py", "iso_c")),
    "Iso-CTS": Peer("danielm1405/iso-merging", "iso_cts", of_vectors("src/utils/iso.py", "iso_cts")),
    "OPCM": Peer("tanganke/fusion_bench", "OPCMForCLIP.merge_linear_weights", opcm),
    "WUDI": Peer("tanganke/fusion_bench", "wudi_merging", wudi, share=WUDI_STEPS[0] / WUDI_STEPS[1]),
    "PEFT cat": peft_adapters("cat"),
    "PEFT svd": peft_adapters("svd"),
    "PEFT svd, thin": peft_adapters("svd", svd_full_matrices=False),
    "PEFT ties_svd": peft_adapters("ties_svd", density=TOP / 100),
    "PEFT ties_svd, thin": peft_adapters("ties_svd", density=TOP / 100, svd_full_matrices=False),
    "PEFT ties": peft_function("ties", TOP / 100),
    "PEFT magnitude_prune": peft_function("magnitude_prune", TOP / 100),
    "PEFT dare_linear": peft_function("dare_linear", 0.5),
    "mergekit ties": mergekit_general("magnitude", True, normalize=True, density=TOP / 100),
    "mergekit dare_linear": mergekit_general("random", False, normalize=False, density=0.5, rescale=True),
    "mergekit della": mergekit_general(
        "della_magprune", True, normalize=True, density=0.5, epsilon=0.15, rescale=True
    ),
    "mergekit breadcrumbs": mergekit_general("magnitude_outliers", False, normalize=False, density=0.9, gamma=0.01),
    "mergekit sce": mergekit_function(
        "sce", ["sce_merge", "sce_weight", "sce_mask"], lambda theirs, layer: theirs.sce_merge(group_of(layer))
    ),
    "mergekit model_stock": mergekit_function(
        "model_stock",
        ["model_stock_merge_method"],
        lambda theirs, layer: theirs.model_stock_merge_method(group_of(layer)),
    ),
    "mergekit karcher": mergekit_function("karcher", ["karcher_merge_tensors"], _karcher),
    "mergekit slerp": mergekit_function("slerp", ["slerp", "_CHUNK_ELEMENTS"], _slerp),
}
