"""What is installed, what it runs on, and what is missing for what; nothing optional is imported to know it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

OURS = "orthoft"
GIGABYTE = 1e9
SECONDS = 5.0  # to wait for the Hub


@dataclass(frozen=True)
class Feature:
    """Something that needs packages which orthoft does without."""

    name: str
    needs: tuple[str, ...]


FEATURES = (
    Feature("models by their names on the Hub", ("huggingface_hub",)),
    Feature("task data from Parquet, or by a dataset's name", ("datasets",)),
    Feature("bases in 4 and 8 bits", ("bitsandbytes",)),
    Feature("bases quantised by torchao", ("torchao",)),
    Feature("search for the best merge", ("optuna",)),
    Feature("tasks of pictures", ("pillow",)),
    Feature("training by TRL", ("trl",)),
    Feature("training by DeepSpeed", ("deepspeed",)),
    Feature("lm-evaluation-harness", ("lm_eval",)),
    Feature("models for llama.cpp", ("gguf",)),
)


def examine(online: bool = False) -> dict[str, Any]:
    """Return versions, devices, features and problems as plain values.

    Args:
        online: also try to reach the Hub; nothing else here uses the network.
    """
    requirements = _requirements()
    packages = [_package(one) for one, extra in requirements if extra is None]
    devices, broken = _devices()
    return {
        "orthoft": _version(OURS),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": packages,
        "devices": devices,
        "features": [_feature(feature, requirements) for feature in FEATURES],
        "hub": _hub() if online else None,
        "problems": [*_own_problems(), *(one["problem"] for one in packages if one["problem"]), *broken],
    }


def told(found: Mapping[str, Any]) -> str:
    """Return what `examine` found as text, without its problems."""
    packages = [(one["name"], one["version"] or "-", one["wanted"] or "any") for one in found["packages"]]
    features = [_feature_row(one) for one in found["features"]]
    lines = [
        f"orthoft {found['orthoft'] or 'not installed'}, Python {found['python']}, {found['system']}",
        "",
        *_columns([("package", "installed", "needs"), *packages]),
        "",
        *_columns([("device", "what it is"), *((one["name"], one["says"]) for one in found["devices"])]),
        "",
        *_columns([("feature", "needs", "there"), *features]),
    ]
    if found["hub"] is not None:
        lines += ["", f"the Hub: {found['hub']}"]
    return "\n".join(lines)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, wide, strict=True)).rstrip() for row in rows]


def _feature_row(feature: Mapping[str, Any]) -> tuple[str, str, str]:
    there = ", ".join(f"{name} {version}" for name, version in feature["there"].items())
    return feature["name"], ", ".join(feature["needs"]), feature["install"] or there


def _requirements() -> list[tuple[Requirement, str | None]]:
    """Return what orthoft's installed metadata ask for, each with the extra it belongs to."""
    try:
        own = metadata.metadata(OURS)
    except metadata.PackageNotFoundError:
        return []
    found: list[tuple[Requirement, str | None]] = []
    for text in own.get_all("Requires-Dist") or []:
        one = Requirement(text)
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            found.append((one, None))
        else:
            extras = own.get_all("Provides-Extra") or []
            found += [(one, extra) for extra in extras if one.marker.evaluate({"extra": extra})]
    return found


def _package(wanted: Requirement) -> dict[str, Any]:
    version, problem = _version(wanted.name), None
    asked = f"{wanted.name}{wanted.specifier}"
    if version is None:
        problem = f"{wanted.name} is not installed: pip install '{asked}'"
    elif not wanted.specifier.contains(version, prereleases=True):
        problem = f"{wanted.name} {version} is installed, {wanted.specifier} is needed: pip install '{asked}'"
    return {"name": wanted.name, "version": version, "wanted": str(wanted.specifier), "problem": problem}


def _feature(feature: Feature, requirements: Iterable[tuple[Requirement, str | None]]) -> dict[str, Any]:
    """Return what a feature needs, what of it is there, and how to install it if some is not."""
    extras = {one.name.replace("-", "_"): (one, extra) for one, extra in requirements if extra not in (None, "dev")}
    there: dict[str, str] = {}
    for name in feature.needs:
        version = _version(name)
        if version is not None and (name not in extras or extras[name][0].specifier.contains(version, True)):
            there[name] = version
    missing = [name for name in feature.needs if name not in there]
    parts = [f"'{OURS}[{extras[name][1]}]'" if name in extras else name for name in missing]
    install = f"pip install {' '.join(dict.fromkeys(parts))}" if parts else None
    return {"name": feature.name, "needs": list(feature.needs), "there": there, "install": install}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _own_problems() -> list[str]:
    """Return what is wrong with orthoft itself and with the Python it runs in."""
    try:
        asked = ",".join(metadata.metadata(OURS).get_all("Requires-Python") or [])
    except metadata.PackageNotFoundError:
        return [f"{OURS} is not installed, only imported from its folder: pip install -e ."]
    version = platform.python_version()
    if SpecifierSet(asked).contains(version, prereleases=True):
        return []
    return [f"Python {version} is running, {asked} is needed"]


def _devices() -> tuple[list[dict[str, Any]], list[str]]:
    """Return what there is to compute on, and what is wrong with a torch that cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:
        broken = [] if _version("torch") is None else [f"torch cannot be imported: {' '.join(str(error).split())}"]
        return [_cpu(None, [], True)], broken
    from orthoft.recipes.cpu import computes_in

    instructions, fast = torch.backends.cpu.get_cpu_capability(), computes_in(torch.bfloat16)
    devices = [_cpu(torch.get_num_threads(), [] if instructions == "DEFAULT" else [instructions], fast)]
    for i in range(torch.cuda.device_count()):
        told = torch.cuda.get_device_properties(i)
        with torch.cuda.device(i):
            bf16 = torch.cuda.is_bf16_supported()
        words = [told.name, f"{told.total_memory / GIGABYTE:.1f} GB", f"compute {told.major}.{told.minor}"]
        devices.append({"name": f"cuda:{i}", "says": _listed(words, bf16), "bytes": told.total_memory, "bf16": bf16})
    if torch.backends.mps.is_available():
        devices.append({"name": "mps", "says": "Apple GPU", "bytes": None, "bf16": None})
    return devices, []


def _cpu(threads: int | None, words: Sequence[str], fast: bool) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pages = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if pages else None
    said = [f"{cores} cores"] + ([] if threads is None else [f"threads of torch: {threads}"])
    said += ([] if memory is None else [f"{memory / GIGABYTE:.1f} GB"]) + list(words)
    return {
        "name": "cpu",
        "says": _listed(said, True) + ("" if fast else " (slow: imitated)"),
        "bytes": memory,
        "bf16": True,
        "cores": cores,
        "threads": threads,
    }


def _listed(words: Sequence[str], bf16: bool) -> str:
    return ", ".join([*words, "bfloat16" if bf16 else "no bfloat16"])


def _hub() -> str:
    """Return whether the Hub answers, in words."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    if _version("huggingface_hub") is None:
        return "huggingface_hub is not installed"
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "not asked, HF_HUB_OFFLINE is set"
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=SECONDS):
            return f"{constants.ENDPOINT} answers"
    except HTTPError as error:
        return f"{constants.ENDPOINT} answers with {error.code}"
    except OSError as error:
        return f"{constants.ENDPOINT} cannot be reached ({' '.join(str(error).split())})"
