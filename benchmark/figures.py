"""Redraws the pictures of the repository: runs the commands of benchmark/figures.txt.

    python benchmark/figures.py
    python benchmark/figures.py --only figure1

Start it in the repository's root. A picture whose evaluations are not in benchmark/results is left
out, with a word.
"""
import os
import re
import shlex
import sys
from dataclasses import dataclass

import aggregate
import plot
import tyro
from run import read_lines

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.path.join(os.path.dirname(FOLDER), "docs"))

import backtracking  # noqa: E402
import heatmap  # noqa: E402
import saddle  # noqa: E402
import tether  # noqa: E402

PROGRAMS = {
    "benchmark/plot.py": plot.main,
    "benchmark/aggregate.py": aggregate.main,
    "docs/backtracking.py": backtracking.main,
    "docs/heatmap.py": heatmap.main,
    "docs/saddle.py": saddle.main,
    "docs/tether.py": tether.main,
}


@dataclass
class Options:
    only: str = ""  # regular expression: only the commands in which it is found


def main(words: list | None = None) -> int:
    options = tyro.cli(Options, args=words, description=__doc__)
    status = 0
    for line in read_lines(os.path.join(FOLDER, "figures.txt")):
        if not re.search(options.only, line):
            continue
        _, program, *words = shlex.split(line)
        missing = [x for x in words if x.endswith(".csv") and not os.path.exists(x)]
        if missing:
            print(f"left out, there is no {missing[0]}: {line}", file=sys.stderr)
            continue
        print(line, flush=True)
        status = max(status, PROGRAMS[program](words))
    return status


if __name__ == "__main__":
    sys.exit(main())
