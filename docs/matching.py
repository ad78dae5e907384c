"""The matching game with networks: two agents, two actions, a point if the actions differ.

    python docs/matching.py
    python docs/matching.py --deltas 1.1 1.5 4 --learner-rl-coef 0

Trains ctds_ff.py's teacher and student and, for each delta, magpo_ff.py's guider and learner, ten
seeds side by side. It prints the probability that the actions differ: the median over the seeds,
and for the learner all ten, sorted.
"""
import dataclasses
import functools
import os
import sys
from typing import Tuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import ctds_ff  # noqa: E402
import magpo_ff  # noqa: E402

NUM_SEEDS, NUM_ITERATIONS, ENT_COEF = 10, 200, 0.2


@dataclasses.dataclass
class Options:
    deltas: Tuple[float, ...] = (1.1,)  # lengths of the tether; inf: none
    learner_rl_coef: float = 4.0  # lambda of MAGPO


class MatchingGame:
    """Two agents, two actions, nothing to see; reward 1 if the actions differ; ten independent
    steps an episode.

    An equal mixture of (0, 1) and (1, 0) is optimal for a teacher, and has no product form.
    """

    num_agents, num_actions, has_win_rate, continuous = 2, 2, False, False

    def __init__(self):
        self.env = self
        self.example_action = jnp.zeros(2, jnp.int32)

    def observe(self):
        return magpo_ff.Observation(jnp.eye(2), jnp.ones((2, 2), bool))

    def reset(self, key):
        del key
        episode = dict.fromkeys(("return", "length", "won"), jnp.zeros(()))
        return magpo_ff.EnvState(jnp.zeros((), jnp.int32), self.observe(), episode)

    def step(self, state, action):
        reward = jnp.full((2,), action[0] != action[1], jnp.float32)
        last = state.game == 9
        return state._replace(game=state.game + 1), reward, 1.0 - last, last


def train(script, env, num_seeds, **flags):
    """Trains runs of seeds 0, 1, .. side by side -> parameters (seeds, ..), guider, learner."""
    args = script.Args(num_devices=1, embed_dim=16, learner_hidden_dim=16, **flags)
    parts = (args, env, *script.make_networks(args, env))
    init = jax.jit(functools.partial(script.init_state, *parts))
    keys = map(jax.random.PRNGKey, range(num_seeds))
    # Seed after seed: vmapped orthogonal starts hang on a CPU with few cores.
    starts = [init(key, jax.random.fold_in(key, 1)) for key in keys]
    start = jax.tree.map(lambda *x: jnp.stack(x)[:, None], *starts)  # (seeds, devices: 1, ..)
    iterate = functools.partial(script.train_iteration, *parts)
    iterate = jax.vmap(jax.vmap(iterate, axis_name="device"))

    @jax.jit
    def run(start):
        return jax.lax.fori_loop(0, NUM_ITERATIONS, lambda _, state: iterate(state)[0], start)

    return jax.tree.map(lambda x: x[:, 0], run(start).params), *parts[2:]


def success(policy_probs):
    """(seeds, 2 agents, 2 actions) -> probability that independent actions differ, (seeds,)."""
    first, second = policy_probs[:, 0, 0], policy_probs[:, 1, 0]
    return first * (1 - second) + second * (1 - first)


def matching(script, num_seeds, **flags):
    """-> success of the guider and of the learner in the game, each (seeds,)."""
    env = MatchingGame()
    flags |= {"num_envs": 16, "num_steps": 10, "learning_rate": 3e-3, "num_minibatches": 1}
    flags |= {"guider": "mat", "ent_coef": ENT_COEF}
    params, guider, learner = train(script, env, num_seeds, **flags)
    obs = env.observe()
    learner_probs = jax.vmap(lambda p: learner.apply(p, obs).probs)(params["learner"])

    def joint(params):
        """The guider's probability of each first action, and of the other one after it."""
        pairs = jnp.array([[0, 0], [1, 0]])
        policy, _ = guider.apply(params, jax.tree.map(lambda x: jnp.stack([x] * 2), obs), pairs)
        probs = policy.probs  # (2 first actions, 2 agents, 2 actions)
        return probs[0, 0, 0] * probs[0, 1, 1] + probs[1, 0, 1] * probs[1, 1, 0]

    return np.asarray(jax.vmap(joint)(params["guider"])), np.asarray(success(learner_probs))


def show(name: str, guider: np.ndarray, learner: np.ndarray) -> None:
    """A row: the probabilities of ten seeds, (10,) each."""
    seeds = " ".join(f"{x:.2f}" for x in np.sort(learner))
    print(f"{name:18}{np.median(guider):8.2f}{np.median(learner):9.2f}   {seeds}", flush=True)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    print(f"{'':18}{'guider':>8}{'learner':>9}   learner, {NUM_SEEDS} seeds")
    show("CTDS", *matching(ctds_ff, NUM_SEEDS))
    for delta in options.deltas:
        flags = {"delta": delta, "learner_rl_coef": options.learner_rl_coef}
        show(f"MAGPO, delta {delta:g}", *matching(magpo_ff, NUM_SEEDS, **flags))


if __name__ == "__main__":
    main()
