"""Faults for real: merges by the command line are killed, starved and misled, and whole runs of a recipe killed; what
comes out must be the same bytes.

Example: python scripts/faults.py --rounds 50 --seed 3
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_points import commands
from fault_runs import Runs, build_runs, differences, found
from fault_world import CASES, World, build, compared, contents, ended, failure, partial, place, start_fresh, wait_for
from safetensors.torch import load_file, save_file

LOCALES = {
    "tr_TR.UTF-8": {"LC_ALL": "tr_TR.UTF-8", "TZ": "Pacific/Kiritimati"},
    "C, ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
YEARS = {"1970": 0.0, "2100": 4.1e9}  # as seconds since then


@dataclass
class Row:
    """What became of one fault: how often it was tried, how often it struck, what was wrong afterwards."""

    fault: str
    rounds: int = 0
    struck: int = 0
    wrong: list[str] = field(default_factory=list)
    note: str = ""


@dataclass
class Faults:
    """All faults on one world, with what undisturbed runs of it gave and how long they worked."""

    world: World
    draw: random.Random
    want: dict[str, dict[str, Any]] = field(default_factory=dict)
    window: dict[str, float] = field(default_factory=dict)

    def undisturbed(self) -> None:
        for case in CASES:
            with place(self.world.root) as out:
                process = self.world.start(case, out)
                wait_for(partial(out), process)
                begun = time.monotonic()
                if wrong := failure(*ended(process)):
                    raise RuntimeError(f"the undisturbed merge {case} failed: {wrong}")
                self.window[case], self.want[case] = time.monotonic() - begun, contents(out)

    def killed(self, case: str, rounds: int) -> Row:
        """Kill merges at random points, up to three times in a row, and let them end."""
        row = Row(f"kill -9, {case}", rounds)
        for _ in range(rounds):
            with place(self.world.root) as out:
                for _ in range(self.draw.randint(1, 3)):
                    if not out.exists():
                        row.struck += self.world.killed(case, out, self.draw, self.window[case])
                if out.exists():  # it was whole when the signal came: only the file of the lock may be left
                    Path(out.parent, f".{out.name}.lock").unlink(missing_ok=True)
                elif wrong := self.world.merge(case, out):
                    row.wrong.append(wrong)
                row.wrong += compared(out, self.want[case])
        return row

    def source_changed(self) -> Row:
        """Change a source between a kill and the next run: the result is that of the new source alone."""
        row, root = Row("source changed midway", 1), self.world.root / "changed"
        mine = World(root, self.world.fresh)
        for name in ("base", "a", "b"):
            shutil.copytree(self.world.root / name, root / name)
        with place(root) as out, place(root) as whole:
            row.struck += mine.interrupted("checkpoint", out, self.draw, self.window["checkpoint"])
            file = root / "a" / "adapter_model.safetensors"
            save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
            wrong = [text for path in (out, whole) if (text := mine.merge("checkpoint", path))]
            row.wrong = wrong or compared(out, contents(whole))
        return row

    def read_only(self) -> Row:
        """Write where nothing can be written: one line, and nothing changes."""
        row = Row("read-only output", 1)
        with place(self.world.root) as out, disk(out.parent, "ro") as mounted:
            if not mounted:
                os.chmod(out.parent, 0o555)
            if os.access(out.parent, os.W_OK):
                return Row(row.fault, note="skipped: nothing is read-only to this user")
            code, lines = ended(self.world.start("checkpoint", out))
            row.struck += code != 0
            row.wrong = refused(code, lines) + [f"left behind: {path.name}" for path in out.parent.iterdir()]
            os.chmod(out.parent, 0o755) if not mounted else None
        return row

    def full(self) -> Row:
        """Merge to a disk that is too small, make room, and merge again."""
        row = Row("full disk", 1)
        with place(self.world.root) as out, disk(out.parent, "size=640k") as mounted:
            if not mounted:
                return Row(row.fault, note="skipped: no right to mount a small disk")
            code, lines = ended(self.world.start("checkpoint", out))
            row.struck += code != 0
            row.wrong = refused(code, lines)
            subprocess.run(["mount", "-o", "remount,size=64m", out.parent], check=True)
            row.wrong += [text] if (text := self.world.merge("checkpoint", out)) else []
            row.wrong += compared(out, self.want["checkpoint"])
        return row

    def limited(self) -> Row:
        """Merge where no file may grow beyond 100 kB, as under a quota, and again without the limit."""
        row = Row("limit on file sizes", 1)
        with place(self.world.root) as out:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            try:
                code, lines = ended(self.world.start("checkpoint", out))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            row.struck += code != 0
            row.wrong = refused(code, lines)
            row.wrong += [text] if (text := self.world.merge("checkpoint", out)) else []
            row.wrong += compared(out, self.want["checkpoint"])
        return row

    def locales(self) -> Iterator[Row]:
        """Merge in odd locales and time zones, to a folder whose name is not ASCII."""
        for name, environment in LOCALES.items():
            row = Row(f"locale {name}", 1, 1)
            with place(self.world.root) as out:
                out = out.with_name("ergäbnis ıİ")
                wrong = failure(*ended(start_fresh(self.world.words("checkpoint", out), environment)))
                row.wrong = [wrong] if wrong else compared(out, self.want["checkpoint"])
            yield row

    def clocks(self) -> Iterator[Row]:
        """Move the times of the inputs and of what is half done into the past and the future, between kill and run."""
        for year, seconds in YEARS.items():
            row = Row(f"files of the year {year}", 1)
            with place(self.world.root) as out:
                row.struck += self.world.interrupted("opcm", out, self.draw, self.window["opcm"])
                inputs = [path for name in ("base", "a", "b") for path in (self.world.root / name).iterdir()]
                for path in [*inputs, *partial(out).rglob("*")]:
                    os.utime(path, (seconds, seconds))
                wrong = self.world.merge("opcm", out)
                row.wrong = [wrong] if wrong else compared(out, self.want["opcm"])
            yield row

    def run_killed(self, rounds: int, runs: Runs) -> Row:
        """Kill runs of a recipe at random points, up to twice in a row, and let them end."""
        row, root = Row("kill -9, run", rounds), runs.recipe.parent
        with place(root) as out:
            begun = time.monotonic()
            if wrong := runs.run(out):
                raise RuntimeError(f"the undisturbed run failed: {wrong}")
            window, want = time.monotonic() - begun, found(out)
        for _ in range(rounds):
            with place(root) as out:
                row.struck += sum(runs.killed(out, self.draw, window) for _ in range(self.draw.randint(1, 2)))
                row.wrong += [wrong] if (wrong := runs.run(out)) else differences(found(out), want)
        return row

    def killed_everywhere(self, points: int | None, names: Sequence[str], runs: Runs) -> Iterator[Row]:
        """Let each command kill itself before changes of the file system, all or so many, and run it again.

        Every other time what goes on is killed, too, at some change.
        """
        known = {command.name: command for command in commands(self.world.root / "points", self.world, runs)}
        if unknown := set(names) - known.keys():
            raise SystemExit(f"no such command: {', '.join(sorted(unknown))}; there are {'; '.join(known)}")
        for command in [known[name] for name in names or known]:
            want, changes = command.undisturbed()
            at = range(1, changes + 1)
            chosen = at if points is None else sorted(self.draw.sample(at, min(points, changes)))
            row = Row(f"each change, {command.name}", len(chosen))
            for i, one in enumerate(chosen):
                again = [self.draw.randint(1, changes)] if i % 2 else []
                struck, wrong = command.killed([one, *again], want)
                row.struck += struck
                row.wrong += wrong
            yield row

    def rows(self, rounds: int, runs: int, points: int | None, names: Sequence[str]) -> Iterator[Row]:
        self.undisturbed()
        for i, case in enumerate(CASES):
            if share := len(range(i, rounds, len(CASES))):
                yield self.killed(case, share)
        one_by_one: list[Callable[[], Row]] = [self.source_changed, self.read_only, self.full, self.limited]
        yield from (fault() for fault in one_by_one)
        yield from self.locales()
        yield from self.clocks()
        tiny = build_runs(self.world.root / "runs", self.world.fresh)
        if runs:
            yield self.run_killed(runs, tiny)
        if points != 0:
            yield from self.killed_everywhere(points, names, tiny)


def refused(code: int, lines: list[str]) -> list[str]:
    """Return what is wrong with a refusal, which is to be one line and an exit code of 1 or 2."""
    errors = [line for line in lines if line.startswith("error: ")]
    if code in (1, 2) and len(lines) == len(errors) == 1:
        return []
    return [f"exit code {code} and {len(lines)} lines instead of one error: {' / '.join(lines[-3:])}"]


@contextmanager
def disk(folder: Path, options: str) -> Iterator[bool]:
    """Mount a small disk of memory on a folder while the block runs, and say whether that was allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


def line_of(row: Row, seconds: float) -> str:
    said = row.note or (f"WRONG: {'; '.join(row.wrong)}" if row.wrong else "same")
    return f"{row.fault:32}  {row.rounds:6}  {row.struck:6}  {seconds:7.1f}  {said}"


def main() -> int:
    """Try all faults and print a table; return 1 if anything came out differently."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=50, help="kills, shared out over four kinds of merge")
    parser.add_argument("--runs", type=int, help="kills of a recipe's run: as many as of merges unless given")
    parser.add_argument("--points", type=int, help="changes before which each command kills itself: all unless given")
    parser.add_argument("--commands", nargs="+", default=(), help="which do: all unless given")
    parser.add_argument("--seed", type=int, default=0, help="of the points at which merges are killed")
    parser.add_argument("--fresh", action="store_true", help="start an interpreter for each run: slower")
    given = parser.parse_args()
    wrong, runs = False, given.rounds if given.runs is None else given.runs
    with tempfile.TemporaryDirectory(prefix="orthoft-faults-") as folder:
        world = World(build(Path(folder)).root, given.fresh)
        print(f"{'fault':32}  rounds  struck  seconds  result (seed {given.seed})")
        begun = time.monotonic()
        faults = Faults(world, random.Random(given.seed))
        for row in faults.rows(given.rounds, runs, given.points, given.commands):
            print(line_of(row, time.monotonic() - begun), flush=True)
            wrong, begun = wrong or bool(row.wrong), time.monotonic()
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
