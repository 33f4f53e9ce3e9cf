"""Which tensor of the base a name in a source means, and how the base stores it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile

from orthoft.merging.files.tensors import TensorFolder, read_json
from orthoft.merging.sources.renames import stored_names

EMBEDDING = re.compile(r"(.*[._])?(embeddings?|embed_\w+|wte|wpe|shared)")
HEAD = re.compile(r"lm_head|embed_out|output_projection|decoder|predictions")  # the last: BERT's bias


@dataclass(frozen=True)
class Prefix:
    """How the names of a source become names of the base: a prefix is taken away or put before."""

    removed: str = ""
    added: str = ""

    def to_base(self, name: str) -> str | None:
        """Return the base's name of a source's name, or None if the name lacks the removed prefix."""
        return self.added + name.removeprefix(self.removed) if name.startswith(self.removed) else None

    def to_source(self, name: str) -> str:
        """Return the source's name of a base's name."""
        return self.removed + name.removeprefix(self.added)


@dataclass(frozen=True)
class Naming:
    """How the names of a source become names in the files of the base: a prefix, then a renaming by transformers.

    ``stored`` maps names in the loaded model to names in the files, see `orthoft.merging.sources.renames`.
    """

    prefix: Prefix
    stored: Mapping[str, str] = field(default_factory=dict)

    def to_base(self, name: str) -> str | None:
        """Return the base's name of a source's name, or None if the name lacks the removed prefix."""
        loaded = self.prefix.to_base(name)
        return loaded if loaded is None else self.stored.get(loaded, loaded)

    def to_source(self, name: str) -> str:
        """Return the source's name of a base's name."""
        return self.prefix.to_source(self._loaded.get(name, name))

    @cached_property
    def _loaded(self) -> dict[str, str]:
        return {stored: loaded for loaded, stored in self.stored.items()}


def match_names(
    names: Collection[str],
    base: TensorFolder,
    fits: Callable[[str, str], bool],
    more: Mapping[str, str] | None = None,
) -> Naming:
    """Return how a source's names become names in the files of the base, see `match_prefix`.

    Where transformers loads the base under other names than are stored (ViT, LLaVA and Gemma 3 are among those), the
    source may use either. ``more`` are further names in the loaded model, and what they stand for in the base.

    Raises:
        ValueError: the meaning would be a guess.
    """
    plain = Naming(match_prefix(names, base, fits))
    found = sum(plain.to_base(name) in base for name in names)
    if found == len(names) or not (stored := stored_names(base) | dict(more or {})):
        return plain
    renamed = Naming(match_prefix(names, stored, lambda own, loaded: fits(own, stored[loaded])), stored)
    return renamed if sum(renamed.to_base(name) in base for name in names) > found else plain


def match_prefix(names: Collection[str], base: Collection[str], fits: Callable[[str, str], bool]) -> Prefix:
    """Return the prefix under which most of a source's names are names of the base and fit there.

    The identity wins among equals, e.g. an adapter of `AutoModel` (``encoder.layer.0...``) on a checkpoint with a head
    (``bert.encoder.layer.0...``) gets ``Prefix(added="bert.")``.

    Args:
        fits: says of a source's name and a base's name whether the shapes agree.

    Raises:
        ValueError: two prefixes do equally well, so that the meaning would be a guess.
    """
    pairs = _pairs(names, base)
    scores = {prefix: (sum(fits(*pair) for pair in found), len(found)) for prefix, found in pairs.items()}
    best = max(scores.values())
    winners = [prefix for prefix, score in scores.items() if score == best]
    if best[0] > 0 and len(winners) > 1 and winners[0] != Prefix():
        (own, first), second = pairs[winners[0]][0], pairs[winners[1]][0][1]
        raise ValueError(f"its names are ambiguous in this base: {own!r} may be {first!r} or {second!r}")
    return winners[0]


def _pairs(names: Collection[str], base: Collection[str]) -> dict[Prefix, list[tuple[str, str]]]:
    """Return the pairs of a source's and a base's names by the prefix that makes the one of the other.

    The identity comes first, and is always there.
    """
    own, known = frozenset(names), frozenset(base)
    pairs = {Prefix(): [(name, name) for name in names if name in known]}
    for name in names:
        for prefix in _prefixes(name):
            if (rest := name.removeprefix(prefix)) in known:
                pairs.setdefault(Prefix(removed=prefix), []).append((name, rest))
    for name in base:
        for prefix in _prefixes(name):
            if (rest := name.removeprefix(prefix)) in own:
                pairs.setdefault(Prefix(added=prefix), []).append((rest, name))
    return pairs


def added_rows(name: str, shape: tuple[int, ...], base: TensorFolder) -> str:
    """Return what to say of the rows that a tensor of this shape adds to the base's embedding or output head.

    Nothing if the tensor is neither, or differs in more than its number of rows.
    """
    rows, *rest = base.shape(name) or (0,)
    last = name.split(".")[-2] if "." in name else ""
    vocabulary = EMBEDDING.fullmatch(last) or HEAD.fullmatch(last)
    if not vocabulary or len(shape) != 1 + len(rest) or list(shape[1:]) != rest or shape[0] <= rows:
        return ""
    return f"rows {rows} to {shape[0] - 1} (the base has {rows} rows)"


def tied_embedding(
    head: str, embeddings: Mapping[str, tuple[int, ...]], fits: Callable[[tuple[int, ...]], bool]
) -> str | None:
    """Return the embedding, of a shape that fits, that an output head is tied to in a model that lacks the head."""
    if not head.endswith(".weight") or not HEAD.fullmatch(head.split(".")[-2]):
        return None
    named = (name for name in embeddings if name.endswith(".weight") and EMBEDDING.fullmatch(name.split(".")[-2]))
    return next((name for name in named if fits(embeddings[name])), None)


def ties_embedding(base: TensorFolder, name: str) -> bool:
    """Say whether a weight is an embedding, and the base's configuration ties its embedding to an output head."""
    config = base.folder / "config.json"
    if not name.endswith(".weight") or not EMBEDDING.fullmatch(name.split(".")[-2]) or not config.is_file():
        return False
    return bool(read_json(config).get("tie_word_embeddings"))


def _prefixes(name: str) -> list[str]:
    """Return every leading part of a name, up to three components and never past a layer number."""
    parts = list(takewhile(lambda part: not part.isdigit(), name.split(".")[:-1]))
    return [".".join(parts[:end]) + "." for end in range(1, min(len(parts), 3) + 1)]
