"""What a checkpoint costs: seconds to write it with all networks, seconds to read it, and MiB.

    python benchmark/checkpoint.py

Prints a Markdown table; each time is the median over --rounds. An evaluation writes one checkpoint
and four networks, so a run of the default 20 evaluations spends 21 times the first figure on them.
"""
import argparse
import functools
import glob
import os
import statistics
import tempfile
import time

import jax
from speed import load

SETTINGS = [  # script, environment, scenario, environments
    ("magpo_ff.py", "CoordSum-v0", "3x10-30", 64),
    ("magpo_ff.py", "RobotWarehouse-v0", "tiny-4ag", 64),
    ("magpo_ff.py", "RobotWarehouse-v0", "tiny-4ag", 1024),
    ("magpo_rec.py", "CoordSum-v0", "3x10-30", 64),
    ("magpo_rec.py", "RobotWarehouse-v0", "tiny-4ag", 64),
    ("magpo_rec.py", "RobotWarehouse-v0", "tiny-4ag", 1024),
]


def measure(name: str, env_id: str, scenario: str, num_envs: int, rounds: int) -> list:
    """One row of the table."""
    script = load(name)
    args = script.Args(env_id=env_id, scenario=scenario, num_envs=num_envs, num_devices=1)
    env = script.make_env(env_id, scenario)
    parts = (args, env, *script.make_networks(args, env), script.make_optimizers(args))
    init = jax.pmap(functools.partial(script.init_state, *parts), in_axes=(None, 0))
    key = jax.random.PRNGKey(0)
    program = init.lower(key, key[None]).compile({"xla_backend_optimization_level": 0})
    state = jax.block_until_ready(program(key, key[None]))
    writing = []
    reading = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            start = time.perf_counter()
            for prefix in ("", "best_"):
                script.save_networks(folder, prefix, state.params)
            script.save_checkpoint(folder, state, script.Progress(iteration=i))
            written = time.perf_counter()
            script.load_checkpoint(folder, state)
            writing.append(written - start)
            reading.append(time.perf_counter() - written)
        size = sum(map(os.path.getsize, glob.glob(os.path.join(folder, "checkpoint_*"))))
    seconds = [f"{statistics.median(times):.3f}" for times in (writing, reading)]
    return [name, f"{env_id} {scenario}", num_envs, *seconds, f"{size / 2**20:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="times that each is written")
    options = parser.parse_args()
    header = ["script", "task", "environments", "write s", "read s", "MiB"]
    rows = [measure(*setting, options.rounds) for setting in SETTINGS]
    for cells in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
