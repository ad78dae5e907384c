"""The matching game with networks: two agents, two actions, a point if the actions differ.

    python docs/matching.py
    python docs/matching.py --deltas 1.1 1.5 4 --learner-rl-coef 0

Trains ctds_ff.py's teacher and student and, for each delta, magpo_ff.py's guider and learner, ten
seeds side by side. It prints the probability that the actions differ: the median over the seeds,
and for the learner all ten, sorted. Game and training are those of tests/test_ctds.py.
"""
import dataclasses
import os
import sys
from typing import Tuple

import numpy as np
import tyro

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path += [ROOT, os.path.join(ROOT, "tests")]

import test_ctds  # noqa: E402

import ctds_ff  # noqa: E402
import magpo_ff  # noqa: E402

NUM_SEEDS = 10


@dataclasses.dataclass
class Options:
    deltas: Tuple[float, ...] = (1.1,)  # lengths of the tether; inf: none
    learner_rl_coef: float = 4.0  # lambda of MAGPO


def show(name: str, guider: np.ndarray, learner: np.ndarray) -> None:
    """A row: the probabilities of ten seeds, (10,) each."""
    seeds = " ".join(f"{x:.2f}" for x in np.sort(learner))
    print(f"{name:18}{np.median(guider):8.2f}{np.median(learner):9.2f}   {seeds}", flush=True)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    print(f"{'':18}{'guider':>8}{'learner':>9}   learner, {NUM_SEEDS} seeds")
    show("CTDS", *test_ctds.matching(ctds_ff, NUM_SEEDS))
    for delta in options.deltas:
        flags = {"delta": delta, "learner_rl_coef": options.learner_rl_coef}
        show(f"MAGPO, delta {delta:g}", *test_ctds.matching(magpo_ff, NUM_SEEDS, **flags))


if __name__ == "__main__":
    main()
