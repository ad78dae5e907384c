"""Why distillation fails, and what Theorem 4.1 promises: MAGPO and CTDS on tables, without samples
or networks.

    python docs/tables.py
    python docs/tables.py --num-agents 2 --num-actions 2 --target 1

The first table plays one state and one step: N agents say integers 0..A-1, and earn 1 if they add
up to the target. The second counts, in random games of several states, the iterations that lower
the learner's value in some state. The loop is that of docs/theory.py.
"""
import dataclasses
import itertools

import numpy as np
import theory
import tyro
from scipy.special import log_softmax

PROJECTIONS = {
    "KL(mu || pi)": theory.project_forward_kl,
    "KL(pi || mu)": theory.project_reverse_kl,
}


@dataclasses.dataclass
class Options:
    num_agents: int = 3  # N
    num_actions: int = 10  # A
    target: int = 10  # what the integers should add up to
    eta: float = 3.0  # step size of mirror descent in the first table
    iterations: int = 30  # of the four steps, in both tables
    seed: int = 0  # of the start in the first table, close to uniform
    games: int = 50  # random games of the second table


def show_sum_game(options: Options) -> None:
    """Prints the values of guider and learner with and without step 4, for either KL."""
    game = theory.sum_game(options.num_agents, options.num_actions, options.target)
    solutions = int(game.reward.sum())
    print(f"{options.num_agents} agents, {options.num_actions} actions, target {options.target}: "
          f"{solutions} of {game.reward.size} joint actions earn 1")
    rng = np.random.default_rng(options.seed)
    logits = 0.1 * rng.normal(size=(options.num_agents, 1, options.num_actions))
    start = list(log_softmax(logits, axis=-1))
    print(f"{'':22}{'guider':>8}{'learner':>9}")
    for backtrack, direction in itertools.product((False, True), PROJECTIONS):
        steps = theory.four_steps(
            game, start, options.eta, options.iterations, PROJECTIONS[direction], backtrack)
        *_, (_, log_guider, log_learner) = steps
        guider, _ = theory.evaluate(game, log_guider)
        learner, _ = theory.evaluate(game, theory.joint(log_learner))
        name = "MAGPO" if backtrack else "CTDS"
        print(f"{name + ', ' + direction:22}{guider[0]:8.3f}{learner[0]:9.3f}")


def count_falls(options: Options, project, eta: float) -> int:
    """The number of iterations, in all games, that lower the value of some state by over 1e-3."""
    falls = 0
    for seed in range(options.games):
        game, log_start = theory.random_game(seed)
        steps = theory.four_steps(game, log_start, eta, options.iterations, project)
        learners = [log_start, *(log_learner for _, _, log_learner in steps)]
        values = [theory.evaluate(game, theory.joint(learner))[0] for learner in learners]
        change = np.diff(values, axis=0)  # (iterations, S)
        falls += np.sum(np.any(change < -1e-3, axis=1))
    return falls


def show_theorem(options: Options) -> None:
    number = options.games * options.iterations
    print(f"\nMAGPO in random games: of {number} iterations, those in which a value falls")
    print(f"{'':22}{'eta 1':>8}{'eta 100':>9}")
    for direction, project in PROJECTIONS.items():
        falls = [count_falls(options, project, eta) for eta in (1.0, 100.0)]
        print(f"{direction:22}{falls[0]:8}{falls[1]:9}")


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    show_sum_game(options)
    show_theorem(options)


if __name__ == "__main__":
    main()
