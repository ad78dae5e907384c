"""Kills a run again and again, resumes it, and compares it with one that was left alone.

    python benchmark/kill.py --kills 30

Each time the run is killed by SIGKILL after a random time of training, so that some kills fall into
the writing of a checkpoint: the run saves after every few iterations. What is counted: checkpoints
that could not be resumed, rows that were lost or doubled, and networks that differ (all 0, one
hopes). Prints a Markdown table.
"""
import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
FLAGS = """--env-id CoordSum-v0 --scenario 2x3-4 --num-envs 4 --num-steps 8 --eval-episodes 4
           --embed-dim 8 --learner-hidden-dim 8 --update-epochs 1 --guider mat""".split()


def start(script: str, flags: list, cache: str) -> subprocess.Popen:
    environ = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, ROOT / script, *flags], env=environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_training(process: subprocess.Popen, line: str) -> bool:
    """Reads what a run prints up to a line that begins so; False if it ended before."""
    for text in process.stdout:
        if text.startswith(line):
            return True
    return False


def read_rows(folder: pathlib.Path) -> list:
    """The rows of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("time/", "charts/SPS")
    return [{k: x for k, x in row.items() if not k.startswith(clocks)} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--script", default="magpo_ff.py", help="script to kill")
    parser.add_argument("--kills", type=int, default=30, help="number of kills")
    parser.add_argument("--seconds", type=float, default=1.0, help="longest time before a kill")
    parser.add_argument("--intervals", type=int, default=20_000, help="evaluations of the run")
    options = parser.parse_args()
    random.seed(0)
    steps = 2 * 32 * options.intervals  # two iterations an interval
    budget = ["--total-timesteps", str(steps), "--num-evals", str(options.intervals)]
    counts = {"kills": 0, "of them with a file half written": 0, "unusable checkpoints": 0}
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        process = start(options.script, [*FLAGS, *budget, "--run-dir", place / "killed"],
                        str(place / "cache"))
        assert wait_for_training(process, "global_step=64 "), process.stderr.read()
        (folder,) = (place / "killed").iterdir()
        while counts["kills"] < options.kills:
            time.sleep(random.uniform(0, options.seconds))
            process.kill()
            process.communicate()
            counts["kills"] += 1
            counts["of them with a file half written"] += any(folder.glob("new_*"))
            process = start(options.script, ["--resume", folder], str(place / "cache"))
            if not wait_for_training(process, "global_step="):
                counts["unusable checkpoints"] += 1
                print(process.stderr.read(), file=sys.stderr)
        process.terminate()  # in good order, after which as many steps are run alone
        process.communicate()
        done = read_rows(folder)[-1]["global_step"]
        end = ["--total-timesteps", str(done + 640), "--num-evals", str(done // 64 + 10)]
        assert start(options.script, ["--resume", folder, *end], str(place / "cache")).wait() == 0
        whole = [*FLAGS, *end, "--run-dir", place / "whole"]
        assert start(options.script, whole, str(place / "cache")).wait() == 0
        (other,) = (place / "whole").iterdir()
        rows, expected = read_rows(folder), read_rows(other)
        steps = [row["global_step"] for row in rows]
        counts["rows"] = len(rows)
        counts["lost rows"] = len({row["global_step"] for row in expected} - set(steps))
        counts["doubled rows"] = len(steps) - len(set(steps))
        counts["rows that differ"] = sum(x != y for x, y in zip(rows, expected))
        counts["networks that differ"] = sum(
            (folder / name).read_bytes() != (other / name).read_bytes()
            for name in ("learner.safetensors", "guider.safetensors"))
    print("| " + " | ".join(counts) + " |\n" + "|---" * len(counts) + "|")
    print("| " + " | ".join(map(str, counts.values())) + " |")


if __name__ == "__main__":
    main()
