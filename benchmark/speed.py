"""Speed of training, compile time and memory of whole runs; prints a Markdown table.

    python benchmark/speed.py
    python benchmark/speed.py --scripts magpo_rec.py --guiders sable --scenarios 2x10-30 8x10-30
    python benchmark/speed.py --scripts magpo_rec.py baselines/mappo_rec.py --guiders sable
    python benchmark/speed.py --scripts old/magpo_ff.py magpo_ff.py --env-id SMAX \\
        --scenarios 27m_vs_30m --delta inf

Each configuration is a process of its own, run in turn (A B A B ...), so that a busy moment of the
machine strikes all alike: two versions of a script are compared by naming both. A run trains for
twice --iterations and is evaluated in the middle; its speed is that of the second half, without
compilation and evaluation. It compiles from nothing. Memory is the peak of the whole process.
Figures are medians over the rounds, in brackets the lowest and the highest. Flags that are not
named below go to the scripts, --num-devices 2 for instance.
"""
import collections
import dataclasses
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import tyro
from run import read_defaults


@dataclasses.dataclass
class Options:
    scripts: tuple[str, ...] = ("magpo_ff.py",)  # scripts to time
    guiders: tuple[str, ...] = ("mat", "sable")  # guiders to time
    env_id: str = "CoordSum-v0"
    scenarios: tuple[str, ...] = ("3x10-30",)  # scenarios to time
    num_envs: tuple[int, ...] = (64,)  # numbers of environments to time
    num_steps: tuple[int, ...] = (128,)  # rollout lengths T to time
    iterations: int = 5  # of which the mean is timed, after as many that are not
    rounds: int = 3  # runs of each configuration


def settings(options: Options) -> list:
    """The configurations to time: (script, guider or "", scenario, environments, steps)."""
    product = itertools.product(
        options.scripts, options.guiders, options.scenarios, options.num_envs, options.num_steps)
    found = [
        (script, guider if "guider" in read_defaults(script) else "", *others)
        for script, guider, *others in product
    ]
    return list(dict.fromkeys(found))  # one without a guider once


def measure(options: Options, flags: list, setting: tuple) -> tuple:
    """Runs a configuration -> steps a second, seconds to compile, MiB."""
    script, guider, scenario, num_envs, num_steps = setting
    budget = 2 * options.iterations * num_envs * num_steps
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, script, "--env-id", options.env_id, "--scenario", scenario]
        words += ["--num-envs", num_envs, "--num-steps", num_steps, "--num-evals", 2]
        words += ["--total-timesteps", budget, "--eval-episodes", 8, "--run-dir", folder]
        words += ["--guider", guider] * bool(guider) + flags
        environ = {name: x for name, x in os.environ.items() if "COMPILATION_CACHE" not in name}
        process = subprocess.Popen(
            list(map(str, words)), stdout=subprocess.DEVNULL, env=environ)
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            sys.exit(f"speed.py: error: {script} has failed")
        (metrics,) = pathlib.Path(folder).glob("*/metrics.jsonl")
        row = json.loads(metrics.read_text().splitlines()[-1])
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return row["charts/SPS"], row["time/compile_s"], usage.ru_maxrss / unit


def cell(values: list) -> str:
    middle, low, high = (f"{f(values):,.0f}" for f in (statistics.median, min, max))
    return f"{middle} [{low}, {high}]"


def main() -> None:
    options, flags = tyro.cli(Options, return_unknown_args=True, description=__doc__)
    results = collections.defaultdict(list)
    for number in range(options.rounds):
        for setting in settings(options):
            results[setting].append(measure(options, flags, setting))
            print(f"round {number + 1}: {setting}", file=sys.stderr, flush=True)
    print(f"{options.env_id} {' '.join(flags)}\n".replace(" \n", "\n"))
    header = ["script", "guider", "scenario", "environments", "rollout length"]
    header += ["steps/s", "compile s", "memory MiB"]
    rows = [[*setting, *map(cell, zip(*runs))] for setting, runs in results.items()]
    for cells in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
