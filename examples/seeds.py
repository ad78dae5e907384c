"""Several seeds of one command in one process, side by side: vmap over the functions of a script.

    python examples/seeds.py --script magpo_ff.py --seeds 1 2 3 4 --env-id LevelBasedForaging-v0

Each seed gets a folder as if it had run alone, with args.json, metrics.jsonl, the curve and both
networks, and the same numbers up to rounding. There are no checkpoints. One program is compiled for
all seeds; on a GPU that is hardly busy with one seed, more of them cost little.
"""

import dataclasses
import functools
import importlib
import os
import sys
import time
from typing import Tuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@dataclasses.dataclass
class Options:
    script: str = "magpo_ff.py"  # whose functions train; all other flags are this script's
    seeds: Tuple[int, ...] = (1, 2, 3, 4)  # seeds that train side by side


def on_one_device(function):
    """Maps a function over a leading axis, named "device" as the functions of a script expect."""
    return jax.vmap(function, axis_name="device")


def main() -> None:
    options, flags = tyro.cli(Options, return_unknown_args=True)
    script = importlib.import_module(options.script.removesuffix(".py"))
    args = tyro.cli(script.Args, args=flags)
    args.num_devices = 1
    script.check_args(args)
    env = script.make_env(args.env_id, args.scenario)
    guider, learner = script.make_networks(args, env)
    optimizers = script.make_optimizers(args)
    parts = (args, env, guider, learner, optimizers)

    def init(seed):
        """The keys of `train`, for one device -> state (1, ...), key of the evaluations."""
        key, params_key, eval_key = jax.random.split(jax.random.PRNGKey(seed), 3)
        state = on_one_device(functools.partial(script.init_state, *parts, params_key))
        return state(jax.random.split(key, 1)), eval_key

    def evaluate(state, eval_key, iteration):
        keys = jax.random.split(jax.random.fold_in(eval_key, iteration), 1)
        play = functools.partial(script.evaluate, args, env, guider, learner)
        return on_one_device(play)(state.params, keys)

    # A leading axis of seeds for everything: (S, 1, ...)
    state, eval_keys = jax.jit(jax.vmap(init))(jnp.array(options.seeds))
    iterate = on_one_device(functools.partial(script.train_iteration, *parts))
    iterate = jax.jit(jax.vmap(iterate), donate_argnums=0)
    evaluate = jax.jit(jax.vmap(evaluate, in_axes=(0, 0, None)))
    add = jax.jit(functools.partial(jax.tree.map, jnp.add))
    loggers = [script.Logger(dataclasses.replace(args, seed=seed)) for seed in options.seeds]

    steps_per_iteration = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // steps_per_iteration
    ends = {-(-num_iterations * i // args.num_evals) for i in range(1, args.num_evals + 1)}
    iteration = 0
    for end in [0] + sorted(ends):
        start = time.time()
        sums = None
        interval = end - iteration
        for _ in range(interval):
            state, metrics = iterate(state)
            sums = metrics if sums is None else add(sums, metrics)
        jax.block_until_ready(state)
        seconds = time.time() - start
        episodes = jax.tree.map(np.asarray, evaluate(state, eval_keys, end))
        for i, logger in enumerate(loggers):
            row = {"global_step": end * steps_per_iteration}
            if interval > 0:
                own = jax.tree.map(lambda x: np.asarray(x)[i, 0], sums)
                row |= script.train_row(args, own, iteration, interval)
                row["charts/SPS"] = len(loggers) * interval * steps_per_iteration / seconds
            row |= script.eval_row(*jax.tree.map(lambda x: x[i], episodes), env.has_win_rate)
            logger.log(row)
        iteration = end
    for i, logger in enumerate(loggers):
        params = jax.tree.map(lambda x: x[i], state.params)
        script.save_networks(logger.folder, "", params)
        logger.close()


if __name__ == "__main__":
    main()
