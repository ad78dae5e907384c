"""What ids, rewards and fresh starts cost beside the environment itself; prints a Markdown table.

    python benchmark/env_speed.py
    python benchmark/env_speed.py --tasks Connector-v3:con-10x10x10a SMAX:smacv2_10_units --rounds 5

A random policy plays T steps in B environments in two ways: raw, which steps the environment as
`tasks.py` makes it, on and on without any reset; and as training does, by magpo_ff.py's own
`collect` with `TeamEnv` and its pool of start states, in which the guider decides at random. All
are compiled first and then timed in turn (A B A B ...). Figures are medians over the rounds.
"""

import dataclasses
import functools
import os
import sys
import time
from typing import Any, Callable, Tuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import magpo_ff  # noqa: E402

ONE_PER_SUITE = (
    "CoordSum-v0:3x10-30",
    "RobotWarehouse-v0:tiny-4ag",
    "LevelBasedForaging-v0:15x15-4p-5f",
    "Connector-v3:con-10x10x10a",
    "SMAX:2s3z",
    "MPE_simple_spread_v3:simple_spread_3ag",
)


@dataclasses.dataclass
class Options:
    tasks: Tuple[str, ...] = ONE_PER_SUITE  # --env-id and --scenario, with a colon between them
    num_envs: int = 64  # B
    num_steps: int = 128  # T
    rounds: int = 9  # timed rounds


def act_at_random(guider: Any, params: Any, obs: magpo_ff.Observation, key: jax.Array):
    """In place of `guider_act`: guider is the TeamEnv -> action, and 0 for log_prob and value."""
    zeros = jnp.zeros(obs.action_mask.shape[:2])
    if guider.continuous:
        return jax.random.normal(key, obs.action_mask.shape), zeros, zeros
    return jax.random.categorical(key, jnp.where(obs.action_mask, 0.0, -1e9)), zeros, zeros


def play_raw(env: magpo_ff.TeamEnv, num_steps: int, state: Any, mask: jax.Array, key: jax.Array):
    """Steps the environment inside `env` alone -> the sum of its rewards."""

    def step(carry, key):
        state, mask = carry
        action, _, _ = act_at_random(env, None, magpo_ff.Observation(None, mask), key)
        state, timestep = jax.vmap(env.env.step)(state, action)
        return (state, timestep.observation.action_mask), jnp.sum(timestep.reward)

    _, reward = jax.lax.scan(step, (state, mask), jax.random.split(key, num_steps))
    return jnp.sum(reward)


def make_players(task: str, options: Options) -> Tuple[Callable, Callable]:
    """The two ways to play a task, compiled, each () -> an array."""
    env = magpo_ff.make_env(*task.split(":"))
    args = magpo_ff.Args(num_envs=options.num_envs, num_steps=options.num_steps, num_devices=1)
    key = jax.random.PRNGKey(0)
    env_state = jax.jit(jax.vmap(env.reset))(jax.random.split(key, options.num_envs))
    state = magpo_ff.TrainState({"guider": None}, None, env_state, key, None, jnp.int32(0))

    def play_collect(state):
        _, rollout = magpo_ff.collect(args, env, env, state)
        return jnp.sum(rollout.reward)

    raw = jax.jit(functools.partial(play_raw, env, options.num_steps))
    raw_inputs = (env_state.game, env_state.obs.action_mask, key)
    raw = raw.lower(*raw_inputs).compile()
    collect = jax.jit(play_collect).lower(state).compile()
    return functools.partial(raw, *raw_inputs), functools.partial(collect, state)


def seconds(function: Callable) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def main() -> None:
    options = tyro.cli(Options)
    magpo_ff.guider_act = act_at_random
    players = {task: make_players(task, options) for task in options.tasks}
    times = {task: [] for task in options.tasks}
    for _ in range(options.rounds + 1):  # the first is a warm-up
        for task in options.tasks:
            times[task].append([seconds(player) for player in players[task]])
    print(f"{options.num_envs} environments, {options.num_steps} steps, {jax.devices()[0]}\n")
    print("| task | raw, steps/s | TeamEnv and pool, steps/s | share |")
    print("|---|---|---|---|")
    for task in options.tasks:
        raw, collect = np.median(times[task][1:], axis=0)
        steps = options.num_envs * options.num_steps
        print(f"| {task} | {steps / raw:,.0f} | {steps / collect:,.0f} | {raw / collect:.0%} |")


if __name__ == "__main__":
    main()
