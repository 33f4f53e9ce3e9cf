"""What other projects offer for the same merges: their own functions, taken from clones in a folder, or PEFT's."""

from __future__ import annotations

import contextlib
import io
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peft
import published
import torch
from peft.utils import merge_utils
from published import RANK_FRACTION, SCALING, TOP, WUDI_STEPS, Prepare
from synthetic import Layer
from timing import Call
from torch import nn


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
    prepare: Prepare
    share: float = 1.0

    def call(self, folder: Path | None, layer: Layer) -> Call | None:
        """Return what to time, or None where the clone is not there."""
        clone = self.clone(folder)
        return partial(quietly, self.prepare(clone, layer)) if clone.is_dir() else None

    def clone(self, folder: Path | None) -> Path:
        if not self.repository:
            return Path()
        return (folder or Path("DIR")) / self.repository.split("/")[1]

    def footnote(self, folder: Path | None) -> str:
        """Return what was run, of which version, or how to get it."""
        clone = self.clone(folder)
        if not self.repository:
            return f"`{self.function}`, PEFT {peft.__version__}"
        if not clone.is_dir():
            return (
                f"skipped: needs `git clone https://github.com/{self.repository} {clone}` and `--peers {clone.parent}`"
            )
        scaled = "" if self.share == 1 else f"; {self.share:.2%} of its steps, the time scaled up"
        return f"`{self.function}`, {self.repository} at {version(clone)}{scaled}"


def quietly(call: Call) -> object:
    """Return what the call returns, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return call()


def version(clone: Path) -> str:
    """Return the commit of a clone, or the version of an unpacked wheel."""
    if (clone / ".git").exists():
        return subprocess.check_output(["git", "-C", clone, "rev-parse", "--short=12", "HEAD"], text=True).strip()
    return next((info.stem for info in clone.glob("*.dist-info")), "a version that is not known")


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


def peft_function(name: str, density: float) -> Peer:
    """PEFT's merge of tensors."""

    def prepare(clone: Path, layer: Layer) -> Call:
        return partial(getattr(merge_utils, name), layer.dense, torch.ones(len(layer.dense)), density)

    return Peer("", f"peft.utils.merge_utils.{name}", prepare)


def core_space(method: str, **config: object) -> Peer:
    function = f"MatrixPerLayerMerger.get_core_matrices, {method}"
    return Peer("apanariello4/core-space-merging", function, published.core_space(method, **config))


MERGEKIT = "arcee-ai/mergekit"
GENERAL: Mapping[str, Prepare] = {
    "ties": published.mergekit_general("magnitude", consensus=True, density=TOP / 100),
    "dare_linear": published.mergekit_general("random", rescale=True, density=0.5),
    "della": published.mergekit_general("della_magprune", consensus=True, rescale=True, density=0.5, epsilon=0.15),
    "breadcrumbs": published.mergekit_general("magnitude_outliers", density=0.9, gamma=0.01),
}
PEERS: Mapping[str, Peer] = {
    "Core Space sum": core_space("sum"),
    "Core Space TIES": core_space("ties", topK=TOP),
    "Core Space TSV": core_space("tsv"),
    "Core Space CART": core_space("cart", cart_pruning_rank=RANK_FRACTION, cart_scaling_coeffs=SCALING),
    "Core Space Iso": core_space("isotropize"),
    "KnOTS TIES": Peer("gstoica27/KnOTS", "SVDMerger.transform, merge", published.knots_ties),
    "TSV-M": Peer(
        "AntoAndGar/task_singular_vectors",
        "compute_and_sum_svd_mem_reduction",
        published.of_vectors("src/utils/TSVM_utils.py", "compute_and_sum_svd_mem_reduction"),
    ),
    "Iso-C": Peer("danielm1405/iso-merging", "iso_c", published.of_vectors("src/utils/iso.py", "iso_c")),
    "Iso-CTS": Peer("danielm1405/iso-merging", "iso_cts", published.of_vectors("src/utils/iso.py", "iso_cts")),
    "OPCM": Peer("tanganke/fusion_bench", "OPCMForCLIP.merge_linear_weights", published.opcm),
    "WUDI": Peer("tanganke/fusion_bench", "wudi_merging", published.wudi, WUDI_STEPS[0] / WUDI_STEPS[1]),
    "PEFT cat": peft_adapters("cat"),
    "PEFT svd": peft_adapters("svd"),
    "PEFT svd, thin": peft_adapters("svd", svd_full_matrices=False),
    "PEFT ties_svd": peft_adapters("ties_svd", density=TOP / 100),
    "PEFT ties_svd, thin": peft_adapters("ties_svd", density=TOP / 100, svd_full_matrices=False),
    "PEFT ties": peft_function("ties", TOP / 100),
    "PEFT magnitude_prune": peft_function("magnitude_prune", TOP / 100),
    "PEFT dare_linear": peft_function("dare_linear", 0.5),
    **{
        f"mergekit {name}": Peer(MERGEKIT, f"GeneralizedTaskArithmeticMerge.merge_group, {name}", prepare)
        for name, prepare in GENERAL.items()
    },
    "mergekit sce": Peer(
        MERGEKIT, "sce_merge", published.mergekit_of_group("sce", "sce_merge", "sce_weight", "sce_mask")
    ),
    "mergekit model_stock": Peer(
        MERGEKIT,
        "model_stock_merge_method",
        published.mergekit_of_group("model_stock", "model_stock_merge_method"),
    ),
    "mergekit karcher": Peer(MERGEKIT, "karcher_merge_tensors", published.mergekit_karcher),
    "mergekit slerp": Peer(MERGEKIT, "slerp", published.mergekit_slerp),
}
