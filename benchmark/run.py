"""Runs those commands of a file that have not finished yet, so that an interrupted sweep continues
where it stopped.

    python benchmark/run.py benchmark/figure1.txt --jobs 2
    python benchmark/run.py benchmark/figure1.txt --jobs 2 --only "magpo.*--seed [12] "
    python benchmark/run.py benchmark/figure1.txt --dry-run

Start it in the repository's root: it runs the commands as they stand, but with the Python that it
runs under itself. A command counts as finished if its run dir holds a run of the same script with
the same arguments, the script's defaults included, that was evaluated at its last step. A run that
was interrupted goes on from its checkpoint (`--resume`); one of the same name that left none is
removed first, so do not run a command by hand while a sweep runs it, too.

--jobs J runs J commands at a time. On Linux each gets its own share of the CPU's cores: two runs
side by side on half of the cores each are done sooner than one after the other on all of them. On
one GPU, stay with --jobs 1.
"""
import argparse
import ast
import functools
import glob
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time


@functools.cache
def read_defaults(script: str) -> dict:
    """A script's flags and their defaults, read from its class Args without running it."""
    with open(script) as file:
        body = next(
            x.body
            for x in ast.parse(file.read()).body
            if isinstance(x, ast.ClassDef) and x.name == "Args"
        )
    defaults = {
        x.target.id: getattr(x.value, "value", None) for x in body if isinstance(x, ast.AnnAssign)
    }
    # the one that is no constant
    return defaults | {"exp_name": os.path.basename(script)[: -len(".py")]}


def parse(line: str) -> tuple:
    """A command -> its script, and all arguments it stands for (dict): the script's defaults, then
    the flags."""
    script, *words = shlex.split(line)[1:]
    args = dict(read_defaults(script))
    while words:
        flag, _, text = words.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        switch = isinstance(args.get(name.removeprefix("no_")), bool)
        if not flag.startswith("--") or not (switch or name in args and (text or words)):
            raise ValueError(f"{script} has no flag {flag}, or it lacks its value: {line}")
        if switch:
            args[name.removeprefix("no_")] = not name.startswith("no_")
        else:
            kind = type(args[name]) if isinstance(args[name], (int, float)) else str
            args[name] = kind(text or words.pop(0))
    return script, args


def run_name(args: dict) -> str:
    """The name of a run's folder without the time at its end."""
    env_id = re.sub(r"[^\w.=-]", "_", args["env_id"])
    scenario = re.sub(r"[^\w.=-]", "_", args["scenario"])
    return f"{env_id}__{scenario}__{args['exp_name']}__{args['seed']}"


def read_run(folder: str) -> tuple:
    """A run's folder -> args.json (dict), rows of metrics.jsonl (list of dicts), True if evaluated
    at its last step."""
    try:
        with open(os.path.join(folder, "args.json")) as file:
            about = json.load(file)
        with open(os.path.join(folder, "metrics.jsonl")) as file:
            # the last line may be cut off
            rows = [json.loads(line) for line in file if line.endswith("\n")]
    except (OSError, ValueError):  # stopped before there was anything to read
        return {}, [], False
    steps = about["args"]["num_envs"] * about["args"]["num_steps"]
    last_step = about["args"]["total_timesteps"] // steps * steps
    return about, rows, bool(rows) and rows[-1]["global_step"] == last_step


def find_runs(args: dict) -> list:
    """Folders of the runs of this name, whatever their other arguments are."""
    names = os.listdir(args["run_dir"]) if os.path.isdir(args["run_dir"]) else []
    return [
        os.path.join(args["run_dir"], x)
        for x in sorted(names)
        if x.rpartition("__")[0] == run_name(args)
    ]


def is_of(script: str, args: dict, about: dict) -> bool:
    """True if a run's args.json is of this script with these arguments."""
    ignored = {"run_dir", "resume", "cache"}
    if args["num_devices"] == 0:
        ignored.add("num_devices")  # the number used is recorded
    if not about or os.path.basename(about["command"].split()[0]) != os.path.basename(script):
        return False
    recorded = read_defaults(script) | about["args"]  # a new flag counts with its default
    return all(recorded[name] == args[name] for name in args.keys() - ignored)


def is_finished(script: str, args: dict) -> bool:
    """True if there is a complete run of this script with these arguments."""
    runs = map(read_run, find_runs(args))
    return any(complete and is_of(script, args, about) for about, _, complete in runs)


def find_interrupted(script: str, args: dict) -> list:
    """Folders of runs with these arguments that can be resumed."""
    folders = [x for x in find_runs(args) if glob.glob(os.path.join(x, "checkpoint_*"))]
    return [x for x in folders if is_of(script, args, read_run(x)[0])]


def start(line: str, args: dict, cores: list) -> subprocess.Popen:
    """Starts a command, or goes on with it, on some of the CPU's cores (empty: on all).

    Its output goes to a file beside the run's folder.
    """
    words = [sys.executable] + shlex.split(line)[1:]
    interrupted = find_interrupted(words[1], args)
    if interrupted:
        words += ["--resume", interrupted[-1]]
    for folder in find_runs(args):
        if not glob.glob(os.path.join(folder, "checkpoint_*")) and not read_run(folder)[2]:
            shutil.rmtree(folder)  # nothing to go on from
    os.makedirs(args["run_dir"], exist_ok=True)
    all_cores = os.sched_getaffinity(0) if cores else None
    if cores:
        os.sched_setaffinity(0, cores)  # the child inherits it
    with open(os.path.join(args["run_dir"], run_name(args) + ".log"), "a") as log:
        child = subprocess.Popen(
            words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    if cores:
        os.sched_setaffinity(0, all_cores)
    return child


def run_all(todo: list, jobs: int) -> list:
    """Runs (line, args) pairs, `jobs` at a time -> the lines that failed. Ctrl-C ends the
    children."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    free = [cores[i * len(cores) // jobs : (i + 1) * len(cores) // jobs] for i in range(jobs)]
    waiting, running, failed = list(enumerate(todo, 1)), [], []
    try:
        while waiting or running:
            while waiting and free:
                number, (line, args) = waiting.pop(0)
                print(f"[{number}/{len(todo)}] start {run_name(args)}", flush=True)
                running.append(
                    (number, line, args, free[0], time.time(), start(line, args, free.pop(0)))
                )
            time.sleep(0.1)
            for job in [job for job in running if job[-1].poll() is not None]:
                number, line, args, slot, begin, child = job
                running.remove(job)
                free.append(slot)
                failed += [line] if child.returncode else []
                text = (
                    f"FAILED with status {child.returncode}, see its .log,"
                    if child.returncode
                    else "done"
                )
                print(
                    f"[{number}/{len(todo)}] {text} after {(time.time() - begin) / 60:.1f} min: "
                    f"{run_name(args)}",
                    flush=True,
                )
    finally:
        for *_, child in running:
            child.terminate()
        for *_, child in running:
            child.wait()
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="text file with one command a line; # begins a comment")
    parser.add_argument("--jobs", type=int, default=1, help="commands that run at a time")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="only commands in which this is found"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only print what has finished and what would run"
    )
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: must be above 0")
    with open(options.file) as file:
        lines = [line.partition("#")[0].strip() for line in file]
    lines = [line for line in lines if line and re.search(options.only, line + " ")]
    try:
        commands = [(line, *parse(line)) for line in lines]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    places = [(args["run_dir"], run_name(args)) for _, _, args in commands]
    if len(set(places)) < len(places):
        parser.error(
            f"two commands would make runs of the same name: {max(places, key=places.count)[1]}"
        )

    todo = [(line, args) for line, script, args in commands if not is_finished(script, args)]
    print(
        f"{options.file}: {len(commands) - len(todo)} of {len(commands)} commands have finished",
        flush=True,
    )
    if options.dry_run:
        print("".join(line + "\n" for line, _ in todo), end="")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` stops the children, too
    # also where a shell started this in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        failed = run_all(todo, options.jobs)
    except KeyboardInterrupt:
        print("interrupted; the same command continues the sweep", file=sys.stderr)
        return 130
    print("".join(f"failed: {line}\n" for line in failed), end="", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
