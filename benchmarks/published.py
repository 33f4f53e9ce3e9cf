"""The code of the papers and of mergekit, called on made-up deltas: ``prepare(clone, layer) -> call``.

Only the call is timed. The functions are taken out of the clones by `extraction`.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import enum
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from extraction import extract
from synthetic import Layer
from timing import Call
from torch import Tensor, nn
from tqdm import tqdm

Prepare = Callable[[Path, Layer], Call]

TOP = 20  # per cent of the entries that TIES keeps, everywhere here
RANK_FRACTION, SCALING = 0.04, 0.1  # of CART
ALPHA = 0.5  # of OPCM
WUDI_STEPS = (2, 300)  # timed, published


def core_space(method: str, **config: object) -> Prepare:
    """Core Space's own matrices and merge, without the product to a dense delta that follows there."""

    def prepare(clone: Path, layer: Layer) -> Call:
        ties = extract(clone / "merging_functions.py", None).ties_merging
        names = ["MatrixPerLayerMerger", "isotropize_matrix"]
        theirs = extract(clone / "task_merger.py", names, TaskMerger=object, ties_merging=ties)
        merger = object.__new__(theirs.MatrixPerLayerMerger)
        factors = [{"w": (delta.A, delta.B)} for delta in layer.deltas]
        isotropic = method == "isotropize"

        def call() -> object:
            merger.cache = {}
            cores, U, Vh = merger.get_core_matrices(factors, "w", config)
            merged = merger._merge_tensors(cores, {"merge_method": "sum" if isotropic else method, **config})
            return theirs.isotropize_matrix(merged) if isotropic else merged, U, Vh

        return call

    return prepare


def knots_ties(clone: Path, layer: Layer) -> Call:
    ops = extract(clone / "masking_ops.py", None)
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

    def parameters(model: nn.Module) -> SimpleNamespace:
        return SimpleNamespace(get_ft_parameters=model.state_dict)

    def call() -> object:
        merger = theirs.SVDMerger(models[1:], models[0], parameters, "cpu")
        merger.transform(config)
        return merger.merge(config)

    return call


def of_vectors(file: str, function: str) -> Prepare:
    """A function of task vectors and a configuration, as in the code of TSV and of Iso."""

    def prepare(clone: Path, layer: Layer) -> Call:
        theirs = getattr(extract(clone / file, [function]), function)
        vectors = [SimpleNamespace(vector={"w": change}) for change in layer.dense]
        settings = SimpleNamespace(common_space_fraction=0.8)
        config = SimpleNamespace(DATASETS=[str(t) for t in range(len(vectors))], device="cpu", method=settings)
        return lambda: theirs(vectors, config)["w"]

    return prepare


def opcm(clone: Path, layer: Layer) -> Call:
    """One weight as if it were the whole model: after each task it is brought to the mean norm of the tasks."""
    folder = clone / "fusion_bench" / "method" / "opcm"
    svd = extract(folder / "utils.py", ["_svd", "svd"]).svd
    bases = {name: type(name, (), {}) for name in ("LightningFabricMixin", "SimpleProfilerMixin", "BaseAlgorithm")}
    algorithm = extract(folder / "opcm.py", ["OPCMForCLIP"], svd=svd, **bases).OPCMForCLIP
    zero = torch.zeros_like(layer.dense[0])

    def call() -> Tensor:
        state = object.__new__(algorithm)
        state.previous_lambda_t, merged, norms = 1.0, layer.dense[0], [layer.dense[0].norm()]
        for change in layer.dense[1:]:
            state.lambda_t = 1.0
            merged = state.merge_linear_weights(merged, zero, change, "w", alpha=ALPHA)
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


def mergekit_general(sparsification: str, *, consensus: bool = False, rescale: bool = False, **each: float) -> Prepare:
    """mergekit's TIES, DARE, DELLA and breadcrumbs, which are one class; ``each`` holds the parameters of every task.

    With a consensus the result is divided by the weights of the tasks that agree, as is its default for these.
    """

    def prepare(clone: Path, layer: Layer) -> Call:
        sparse, general = _mergekit(clone)
        method = object.__new__(general.GeneralizedTaskArithmeticMerge)
        method.consensus_method = general.ConsensusMethod.sum if consensus else None
        method.sparsification_method = sparse.SparsificationMethod(sparsification)
        shared = {"lambda": 1.0, "normalize": consensus, "int8_mask": False, "rescale": rescale}
        own = {name: dict.fromkeys(range(len(layer.dense)), value) for name, value in (("weight", 1.0), *each.items())}
        group = _group(layer)
        return lambda: method.merge_group(group, **shared, **own)

    return prepare


def mergekit_of_group(file: str, *names: str) -> Prepare:
    """The first of these functions of mergekit's, which takes a group of tensors."""

    def prepare(clone: Path, layer: Layer) -> Call:
        group = _group(layer)
        theirs = _mergekit_functions(clone, file, *names)
        return lambda: getattr(theirs, names[0])(group)

    return prepare


def mergekit_karcher(clone: Path, layer: Layer) -> Call:
    theirs = _mergekit_functions(clone, "karcher", "karcher_merge_tensors")
    return lambda: theirs.karcher_merge_tensors(layer.dense, [1 / len(layer.dense)] * len(layer.dense))


def mergekit_slerp(clone: Path, layer: Layer) -> Call:
    theirs = _mergekit_functions(clone, "slerp", "slerp", "_CHUNK_ELEMENTS")
    return lambda: theirs.slerp(torch.tensor([0.5]), layer.dense[0][None], layer.dense[1][None])


def _mergekit_functions(clone: Path, file: str, *names: str) -> Any:
    path = clone / "mergekit" / "merge_methods" / f"{file}.py"
    return extract(path, names, sign_consensus_mask=_mergekit(clone)[1].get_mask)


def _mergekit(clone: Path) -> tuple[SimpleNamespace, SimpleNamespace]:
    """Return mergekit's sparsification and its generalized task arithmetic."""
    sparse = extract(clone / "mergekit" / "sparsify.py", None, Enum=enum.Enum)
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


def _group(layer: Layer) -> SimpleNamespace:
    """The tensors as mergekit passes them on, on a base of zeros, so that the deltas are the same to the last bit."""
    entries = [SimpleNamespace(tensor=change, id=t) for t, change in enumerate(layer.dense)]
    return SimpleNamespace(base=SimpleNamespace(tensor=torch.zeros_like(layer.dense[0])), non_base=entries)
