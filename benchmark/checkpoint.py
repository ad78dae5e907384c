"""What an evaluation's files cost: seconds to write and to read a checkpoint, and MiB; seconds to
write the rest, which is both networks twice, the metrics and the learning curve.

    python benchmark/checkpoint.py

Prints a Markdown table; each time is the median over --rounds. A run of the default 20 evaluations
writes all of it 21 times.
"""
import argparse
import functools
import importlib
import os
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

SETTINGS = [  # script, environment, scenario, environments
    ("magpo_ff", "CoordSum-v0", "3x10-30", 64),
    ("magpo_ff", "RobotWarehouse-v0", "tiny-4ag", 64),
    ("magpo_ff", "RobotWarehouse-v0", "tiny-4ag", 1024),
    ("magpo_rec", "CoordSum-v0", "3x10-30", 64),
    ("magpo_rec", "RobotWarehouse-v0", "tiny-4ag", 64),
    ("magpo_rec", "RobotWarehouse-v0", "tiny-4ag", 1024),
]


def measure(name: str, env_id: str, scenario: str, num_envs: int, rounds: int) -> list:
    """One row of the table."""
    script = importlib.import_module(name)
    args = script.Args(env_id=env_id, scenario=scenario, num_envs=num_envs, num_devices=1)
    env = script.make_env(env_id, scenario)
    parts = (args, env, *script.make_networks(args, env))
    init = jax.pmap(functools.partial(script.init_state, *parts), in_axes=(None, 0))
    key = jax.random.PRNGKey(0)
    program = init.lower(key, key[None]).compile({"xla_backend_optimization_level": 0})
    state = jax.block_until_ready(program(key, key[None]))
    params = jax.tree.map(lambda x: np.asarray(x)[0], state.params)
    rows = [
        {"global_step": step, "eval/learner_return": step, "eval/guider_return": step}
        for step in range(21)
    ]
    times = {"write": [], "read": [], "rest": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        checkpoint = folder / "checkpoint_0.npz"
        progress = (1, rows, {})  # iteration, rows, sums
        for _ in range(rounds):
            start = time.perf_counter()
            script.save_checkpoint(checkpoint, state, progress)
            written = time.perf_counter()
            script.load_checkpoint(checkpoint, state)
            read = time.perf_counter()
            script.log(folder, None, rows, params)
            times["write"].append(written - start)
            times["read"].append(read - written)
            times["rest"].append(time.perf_counter() - read)
        size = checkpoint.stat().st_size / 2**20
    write, read, rest = (f"{statistics.median(x):.3f}" for x in times.values())
    return [f"{name}.py", f"{env_id} {scenario}", num_envs, write, read, f"{size:.1f}", rest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="times that each is written")
    options = parser.parse_args()
    header = ["script", "task", "environments", "write s", "read s", "MiB", "the rest s"]
    rows = [measure(*setting, options.rounds) for setting in SETTINGS]
    for cells in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
