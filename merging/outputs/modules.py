"""The names that a merged adapter gives to the modules of the base."""

from __future__ import annotations

from collections.abc import Collection

from orthoft.merging.plan import MergePlan
from orthoft.merging.sources.adapter import AdapterSource
from orthoft.merging.sources.names import Naming, Prefix
from orthoft.merging.sources.renames import stored_names


def module_names(plan: MergePlan, names: Collection[str], as_loaded: Collection[str] = ()) -> dict[str, str]:
    """Return {weight: its module}, named as the first adapter among the sources names modules.

    What no adapter names (checkpoints have the names of files) is named as transformers names it in the loaded model,
    and left out if loading fuses or splits it. So are those of ``as_loaded``, whoever names them.
    """
    first = next((source.naming for source in plan.sources if isinstance(source, AdapterSource)), Naming(Prefix()))
    as_stored = adapted(plan) - set(as_loaded)
    stored = {} if as_stored.issuperset(names) else stored_names(plan.base)
    loaded, known = Naming(first.prefix, stored), set(stored.values()) or set(names)
    return {
        name: (first if name in as_stored else loaded).to_source(name).removesuffix(".weight")
        for name in names
        if name in as_stored or name in known
    }


def adapted(plan: MergePlan) -> set[str]:
    """Return the weights that an adapter changes under the names of the files."""
    adapters = [source for source in plan.sources if isinstance(source, AdapterSource)]
    return {name for source in adapters if not source.naming.stored for name in source.adapter_ranks}
