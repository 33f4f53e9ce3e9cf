"""Commands that kill themselves just before one of their changes of the file system, each change in turn.

Every state that a kill can leave between two changes by Python is tried (what libraries write by themselves is not
seen); kills at random points meet the rare ones seldom.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_runs import FINISHED, Runs, differences, found
from fault_world import CASES, World, ended, failure, start_forked

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")
Words = Callable[[Path], list[str]]  # of a command line, given its output
STANDS = "exists"  # said to who starts a command again that was killed when all was done


@dataclass(frozen=True)
class Command:
    """A command line that writes ``out``, and the one that is run before it, if any."""

    name: str
    out: Path
    words: Sequence[str]
    before: Sequence[str] = ()

    def prepare(self) -> None:
        """Put all back to what is there before the command."""
        place = self.out.parent
        kept = place.with_name(f"{place.name}.kept")
        shutil.rmtree(place, ignore_errors=True)
        if not kept.exists():
            kept.mkdir(parents=True)
            if self.before:
                place.mkdir()
                done(self.before)
                shutil.copytree(place, kept, dirs_exist_ok=True)
                shutil.rmtree(place)
        shutil.copytree(kept, place)

    def undisturbed(self) -> tuple[dict[str, Any], int]:
        """Run it to its end; return what it leaves, and how many changes it makes."""
        self.prepare()
        told = self.out.parents[1] / "changes"
        done(self.words, lambda: strike(0, self.out.parent, told))
        return found(self.out), len(told.read_text(encoding="utf-8").splitlines())

    def killed(self, strikes: Sequence[int], want: dict[str, Any]) -> tuple[int, list[str]]:
        """Let it kill itself before these changes, a run each, and run it again; return how often it did, what differs.

        What goes on from a kill makes fewer changes, so that a later strike may come too late.
        """
        self.prepare()
        place, struck = f"change {' and then '.join(map(str, strikes))}", 0
        for at in strikes:
            code, _ = ended(start_forked(self.words, lambda at=at: strike(at, self.out.parent)))
            struck += code == -signal.SIGKILL
        code, lines = ended(start_forked(self.words))
        if code and not any(word in line for line in lines[-1:] for word in (STANDS, FINISHED)):
            return struck, [f"{place}: {failure(code, lines)}"]
        left = found(self.out)
        if code:  # it was whole when it was killed, and who is refused takes no lock
            left = {name: told for name, told in left.items() if not name.endswith(".lock")}
        return struck, [f"{place}: {wrong}" for wrong in differences(left, want)]


def commands(root: Path, world: World, runs: Runs) -> list[Command]:
    """Return every command that writes a folder: onto nothing, and onto what an earlier one left."""
    made = []

    def add(name: str, words: Words, before: Words = lambda out: []) -> None:
        out = root / name.replace(",", "").replace(" ", "-") / "out"
        made.append(Command(name, out, words(out), before(out)))

    def recipe(command: str, file: Path, *words: str) -> Words:
        few = ["--set", "defaults.training.max_steps=4"]
        return lambda out: [command, str(file), *words, *few, "--set", f"output={out}"]

    for case in CASES:
        add(f"merge, {case}", lambda out, case=case: world.words(case, out))
    merge = lambda case: lambda out: world.words(case, out)  # noqa: E731
    add("merge, overwrite", lambda out: [*world.words("checkpoint", out), "--overwrite"], merge("delta"))
    files = [str(world.root / "a"), "--base", str(world.root / "base")]
    convert = lambda *words: lambda out: ["convert", *files, str(out), *words]  # noqa: E731
    add("convert", convert("--rank", "2"))
    add("convert, overwrite", convert("--rank", "2", "--overwrite"), convert("--rank", "3"))
    plain = recipe("run", runs.recipe)
    add("run", plain)
    add("run, overwrite", recipe("run", runs.recipe, "--overwrite"), plain)
    add("run, keep experts", recipe("run", runs.recipe, "--keep-experts", "--set", "merge.method=mean"), plain)
    add("finetune a task", recipe("finetune", runs.recipe, "--task", "a", "--overwrite"), plain)
    apart = recipe("run", runs.apart)
    add("run, kept apart", apart)
    add("search", recipe("search", runs.apart, "--trials", "3", "--objective", "score"), apart)
    add("statistics", recipe("statistics", runs.recipe, "--overwrite"), plain)
    return made


def done(words: Sequence[str], first: Callable[[], None] | None = None) -> None:
    """Run a command line to its end.

    Raises:
        RuntimeError: it failed.
    """
    if wrong := failure(*ended(start_forked(words, first))):
        raise RuntimeError(f"undisturbed, `{' '.join(words)}` failed: {wrong}")


def strike(at: int, place: Path, told: Path | None = None) -> None:
    """Let this process kill itself before its change number ``at`` in a folder, 0 for never; write all to ``told``."""
    count, root = 0, str(place)
    log = None if told is None else told.open("w", encoding="utf-8")

    def hook(event: str, given: tuple[Any, ...]) -> None:
        nonlocal count
        if event != "open" and event not in CHANGES:
            return
        if event == "open" and not (isinstance(given[2], int) and given[2] & WRITES):
            return
        path = os.fsdecode(given[0]) if isinstance(given[0], str | bytes | os.PathLike) else ""  # of an open file
        if os.path.isabs(path) and not path.startswith(root):  # a bare name is in a folder that rmtree has open
            return
        count += 1
        if log is not None:
            print(event, path, file=log, flush=True)
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
