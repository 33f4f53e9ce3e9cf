"""The folder or file that an output grows in, until it is whole and takes the output's place."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from orthoft.merging.files.writer import make_parent, put_in_place, refuse_existing, sync_file
from orthoft.merging.ranks import Ranks
from orthoft.merging.resume.journal import Journal
from orthoft.merging.resume.lock import locked

OWN = ".merge"  # in the folder: the journal, and deltas that wait


@dataclass(frozen=True)
class Partial:
    """An output under way: ``folder`` becomes the output, ``scratch`` is gone then."""

    folder: Path
    scratch: Path
    journal: Journal

    def clean(self, wanted: set[str]) -> None:
        """Remove all files but those that are wanted, given relative to the folder, and the journals.

        Folders that are empty then go as well: what is carried over from the base makes them again.
        """
        kept = {self.folder / file for file in wanted}
        for path in sorted(self.folder.rglob("*"), reverse=True):  # what is in a folder comes before it
            if path.is_dir():
                if path != self.scratch and not any(path.iterdir()):
                    path.rmdir()
            elif path not in kept and not (path.parent == self.scratch and path.suffix == ".jsonl"):
                path.unlink()


def partial_of(out: Path) -> Path:
    """Return where a file or folder is until it is whole."""
    return out.with_name(f".{out.name}.partial")


@contextmanager
def partial_folder(out: Path, overwrite: bool, resume: bool, ranks: Ranks) -> Iterator[Partial]:
    """Give the folder ``.<out>.partial`` beside ``out``, as an earlier run left it, which becomes ``out`` on success.

    On failure it stays if there is something in it to go on from, and is removed otherwise. Bad input is to leave
    nothing behind unless a file of the output is finished. An old ``out`` is replaced only after success.

    Raises:
        FileExistsError: ``out`` exists and may not be overwritten, or another process is writing it.
    """
    folder = partial_of(out)
    scratch = folder / OWN

    def prepare() -> None:
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        scratch.mkdir(parents=True, exist_ok=True)

    def finish() -> None:
        shutil.rmtree(scratch)
        refuse_existing(out, overwrite)  # it may have come into being in the meantime
        put_in_place(folder, out)

    refuse_existing(out, overwrite)
    make_parent(out)
    with _entered(ranks, out):
        try:
            ranks.only_first(prepare)
            yield Partial(folder, scratch, Journal(folder, scratch, ranks.rank))
            ranks.only_first(finish)
        except BaseException as error:
            if ranks.first and not _worth_keeping(folder, error):
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """Give the path ``.<out>.partial`` beside ``out``, which becomes ``out`` on success and is removed on failure.

    What a process that was killed left there is overwritten, so that nothing piles up.

    Raises:
        FileExistsError: another process is writing it.
    """
    partial = partial_of(out)
    make_parent(out)
    with locked(out):
        try:
            yield partial
            sync_file(partial)
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _entered(ranks: Ranks, out: Path) -> Iterator[None]:
    lock = locked(out) if ranks.first else nullcontext()
    ranks.only_first(lock.__enter__)
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _worth_keeping(folder: Path, error: BaseException) -> bool:
    finished = Journal(folder, folder / OWN, 0).files()
    if isinstance(error, ValueError | TypeError | KeyError):
        finished = [file for file in finished if Path(file).parent != Path(OWN)]
    return bool(finished)
