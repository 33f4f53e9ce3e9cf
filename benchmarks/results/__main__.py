"""Measure what is missing, write the tables: `python -m benchmarks.results minilm --rows lora hra --seeds 0 1 2`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.results import report
from benchmarks.results.suites import SUITES


def main(arguments: list[str] | None = None) -> None:
    """Measure the cells that are missing; what was measured and trained before stays."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)}: all unless given")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="of the suites, all unless given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(%(default)s)")
    parser.add_argument("--only", choices=("experts", "merges", "tables"), help="one stage")
    parser.add_argument("--which", choices=("sum", "some", "all"), help="merges to try, in place of each row's own")
    parser.add_argument("--refit", action="store_true", help="score sums under heads fitted anew, too (classification)")
    parser.add_argument("--cache", type=Path, default=Path(".cache/results"), help="experts (%(default)s)")
    parser.add_argument("--numbers", type=Path, default=report.NUMBERS, help="measured numbers")
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"), help="where the tables stand")
    parser.add_argument("--device", help="cpu or cuda: what is found unless given")
    options = parser.parse_args(arguments)
    for suite in options.suites or SUITES:
        if suite not in SUITES:
            parser.error(f"no suite {suite!r}, choose from {', '.join(SUITES)}")
        if options.only != "tables":
            measure(suite, options)
    report.write(options.page, options.numbers)


def measure(suite: str, options: argparse.Namespace) -> None:
    """Do seed after seed, so that a table of one seed is there first."""
    from benchmarks.results.experts import Workshop
    from benchmarks.results.merges import Merges

    shop = Workshop(SUITES[suite], options.cache, options.numbers, options.device)
    shop.score_base()
    for seed in options.seeds:
        for row in options.rows or SUITES[suite].rows:
            start = time.perf_counter()
            if options.only != "merges":
                shop.experts(row, seed, cross=SUITES[suite].kind == "causal-lm")
            if options.only != "experts":
                merges = Merges(shop, row, seed)
                merges.run(options.which)
                if options.refit:
                    merges.refit()
            print(f"{suite} {row} seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
