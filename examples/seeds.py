"""Several seeds of one command in one process, side by side: vmap over the functions of a script.

    python examples/seeds.py --script magpo_ff.py --seeds 1 2 3 4 --env-id LevelBasedForaging-v0

Each seed gets a folder as if it had run alone, with args.json, metrics.jsonl, the curve and the
networks, and the same numbers up to rounding; its seconds are those of all. There are no
checkpoints. One program is compiled for all seeds; on a GPU that is hardly busy with one seed, more
of them cost little. Fresh starts are computed in every step here (D11 is of no help under vmap), so
on games where they cost much, as on Connector, processes of their own are faster.
"""

import collections
import dataclasses
import importlib
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Tuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Options:
    script: Path = Path("magpo_ff.py")  # whose functions train; all other flags are this script's
    seeds: Tuple[int, ...] = (1, 2, 3, 4)  # seeds that train side by side


def load_script(path):
    """A script by its path, from the current directory or from the repository."""
    for folder in (Path.cwd(), ROOT):
        if path.suffix == ".py" and (folder / path).is_file():
            sys.path[:0] = [str((folder / path).parent), str(ROOT)]
            script = importlib.import_module(path.stem)
            if hasattr(script, "train_iteration"):
                return script
    print(f"seeds.py: error: --script {path}: there is no such script", file=sys.stderr)
    sys.exit(2)


def main():
    options, flags = tyro.cli(Options, return_unknown_args=True)
    script = load_script(options.script)
    command, sys.argv[1:] = list(sys.argv), flags
    args, starts = script.parse_args()
    starts[-1]["command"] = command
    for flag in ("seed", "num_devices", "resume", "distributed", "track", "dry_run"):
        if getattr(args, flag) != getattr(script.Args, flag):
            script.refuse(f"--{flag.replace('_', '-')}: not with seeds side by side")
    if not options.seeds:
        script.refuse("--seeds: must be one or more")
    args.num_devices = 1
    script.start_jax(args)
    every_args = [dataclasses.replace(args, seed=seed) for seed in options.seeds]
    for own_args in every_args:
        script.check_args(own_args)
    env = script.make_env(args.env_id, args.scenario)
    parts = (args, env, *script.make_networks(args, env))
    folders, locks, _ = zip(*(script.open_run(own_args, starts) for own_args in every_args))

    # Everything has a leading axis of seeds, and one of the device: (S, 1, ..). The states are made
    # seed after seed: side by side the orthogonal matrices would be, too, whose QR then hangs.
    start = time.time()
    init = jax.jit(partial(script.init_state, *parts))
    states, eval_keys = [], []
    for seed in options.seeds:  # with the keys of `train`
        key, params_key, eval_key = jax.random.split(jax.random.PRNGKey(seed), 3)
        states.append(init(params_key, jax.random.split(key, 1)[0]))
        eval_keys.append(eval_key)
    state = jax.tree.map(lambda *x: jnp.stack(x)[:, None], *states)
    iterate = jax.vmap(partial(script.train_iteration, *parts), axis_name="device")
    iterate = jax.jit(jax.vmap(iterate), donate_argnums=0).lower(state).compile()
    evaluate = jax.jit(jax.vmap(partial(script.evaluate, *parts)))
    compile_seconds = time.time() - start

    rows = [[] for _ in options.seeds]
    sums = [collections.Counter() for _ in options.seeds]
    num_iterations = args.total_timesteps // (args.num_envs * args.num_steps)
    for iteration in range(num_iterations + 1):
        if iteration > 0:
            start = time.time()
            state, metrics = iterate(state)
            metrics = jax.tree.map(np.asarray, metrics)
            seconds = time.time() - start
            for i, own in enumerate(sums):
                own.update({name: float(x[i, 0]) for name, x in metrics.items()})
                own.update(iterations=1, seconds=seconds)
        if iteration * args.num_evals % num_iterations < args.num_evals:
            start = time.time()
            params = jax.tree.map(lambda x: np.asarray(x)[:, 0], state.params)
            keys = jnp.stack([jax.random.fold_in(key, iteration) for key in eval_keys])
            results = jax.tree.map(np.asarray, evaluate(params, keys))
            seconds = time.time() - start
            for i, seed in enumerate(options.seeds):
                sums[i]["eval_seconds"] = seconds
                row = script.interval_row(args, iteration, sums[i], rows[i])
                row |= {name: float(x[i]) for name, x in results.items()}
                for name, x in row.items():
                    if not math.isfinite(x):
                        script.refuse(f"{name} is {x} with seed {seed}", status=1)
                row["time/compile_s"] = compile_seconds
                rows[i].append(row)
                sums[i].clear()
                own_params = jax.tree.map(lambda x: x[i], params)
                line = script.log(folders[i], None, rows[i], own_params)
                print(f"seed {seed}: {line}", flush=True)
    for lock in locks:
        lock.release()


if __name__ == "__main__":
    main()
