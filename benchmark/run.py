"""Runs the commands of a file, once a seed, and leaves out those that have finished, so that an
interrupted sweep continues where it stopped.

    python benchmark/run.py benchmark/figure1.txt --seeds 1 2 3 4 5 --jobs 2
    python benchmark/run.py benchmark/figure1.txt --only "magpo.*sable" --dry-run
    python benchmark/run.py benchmark/paper.txt --only "tiny-2ag " --total-timesteps 2000000

Start it in the repository's root: it runs the commands as they stand there, each with `--seed` and
`--run-dir` added, and with the Python that it runs under itself. The runs of benchmark/NAME.txt go
to benchmark/runs/NAME. A command counts as finished if there is a run of the same script with the
same arguments, the script's defaults included, that was evaluated at its last step. A run that was
interrupted goes on from its checkpoint (`--resume`); one of the same name that left none is removed
first, so do not run a command by hand while a sweep runs it, too.

In a file # begins a comment, and a line that ends in a backslash goes on in the next.

On Linux each of several jobs gets its own share of the CPU's cores: two runs side by side, on half
of the cores each, are done sooner than one after the other on all of them. On a GPU, stay with one.
"""
import ast
import functools
import glob
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple, Optional

import tyro


@dataclass
class Options:
    file: tyro.conf.Positional[str]  # text file with the commands
    seeds: tuple[int, ...] = (1,)  # every command runs once with each, seed by seed
    only: str = ""  # regular expression: only the commands of the file in which it is found
    total_timesteps: Optional[int] = None  # in place of what the commands say
    num_evals: Optional[int] = None  # in place of what the commands say
    jobs: int = 1  # commands that run at a time
    dry_run: bool = False  # only print what has finished and what would run


class Command(NamedTuple):
    line: str  # as a user would type it
    script: str
    args: dict  # all that it stands for: the script's defaults, then the flags


# -------------------- Commands --------------------------------------------------------------------
def read_lines(path: str) -> list:
    """The commands of a file, one string each, without comments and line breaks."""
    with open(path) as file:
        text = file.read().replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [shlex.join(words) for words in commands if words]


@functools.cache
def read_defaults(script: str) -> dict:
    """A script's flags and their defaults, read from its class Args.

    The script is not run for it, for it could take hold of the GPU.
    """
    with open(script) as file:
        statements = ast.parse(file.read()).body
    (args_class,) = [x for x in statements if getattr(x, "name", "") == "Args"]
    fields = [x for x in args_class.body if isinstance(x, ast.AnnAssign)]
    infinite = {x.target.id: math.inf for x in fields if ast.unparse(x.value) == "math.inf"}
    defaults = {x.target.id: getattr(x.value, "value", None) for x in fields} | infinite
    # the other one that is no constant
    return defaults | {"exp_name": os.path.basename(script).removesuffix(".py")}


def parse(line: str) -> Command:
    """Raises ValueError, naming the flag, if the script has no such flag or its value is missing,
    OSError if there is no such script."""
    _, script, *words = shlex.split(line)
    args = dict(read_defaults(script))
    while words:
        flag, _, text = words.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        switch = name.removeprefix("no_")
        if not flag.startswith("--"):
            raise ValueError(f"{flag} is not a flag: {line}")
        if isinstance(args.get(switch), bool):
            args[switch] = name == switch
            continue
        if name not in args:
            raise ValueError(f"{script} has no flag {flag}: {line}")
        if not text and not words:
            raise ValueError(f"{flag} lacks its value: {line}")
        text = text or words.pop(0)
        is_number = isinstance(args[name], (int, float))
        args[name] = type(args[name])(text) if is_number else text
    return Command(line, script, args)


def make_commands(options: Options) -> list:
    """All commands to run, seed by seed. Raises ValueError or OSError, in words."""
    folder, file = os.path.split(os.path.normpath(options.file))  # as --resume writes --run-dir
    run_dir = os.path.join(folder, "runs", file.removesuffix(".txt"))
    lines = [x for x in read_lines(options.file) if re.search(options.only, x)]
    if not lines:
        raise ValueError(f"--only {options.only}: found in no command of {options.file}")
    for line in lines:
        if "--seed" in line or "--run-dir" in line:
            raise ValueError(f"--seed and --run-dir are added, and must not be there: {line}")
    flags = f"--run-dir {shlex.quote(run_dir)}"
    if options.total_timesteps is not None:
        flags += f" --total-timesteps {options.total_timesteps}"
    if options.num_evals is not None:
        flags += f" --num-evals {options.num_evals}"
    commands = [parse(f"{x} {flags} --seed {seed}") for seed in options.seeds for x in lines]
    names = [run_name(command.args) for command in commands]
    for name in names:
        if names.count(name) > 1:
            way_out = "give each an --exp-name"
            raise ValueError(f"two commands would make runs of the same name, {name}: {way_out}")
    return commands


# -------------------- Runs ------------------------------------------------------------------------
def run_name(args: dict) -> str:
    """The name of a run's folder without the time at its end."""
    name = f"{args['env_id']}__{args['scenario']}__{args['exp_name']}__{args['seed']}"
    return name.replace(":", "_")


def read_run(folder: str) -> tuple:
    """A run's folder -> args.json (dict), rows of metrics.jsonl (list of dicts), True if evaluated
    at its last step."""
    try:
        with open(os.path.join(folder, "args.json")) as file:
            about = json.load(file)
        with open(os.path.join(folder, "metrics.jsonl")) as file:
            rows = [json.loads(line) for line in file]
    except (OSError, ValueError):  # stopped before there was anything to read
        return {}, [], False
    steps = about["args"]["num_envs"] * about["args"]["num_steps"]
    last_step = about["args"]["total_timesteps"] // steps * steps
    return about, rows, bool(rows) and rows[-1]["global_step"] == last_step


def find_runs(args: dict) -> list:
    """Folders of the runs of this name, whatever their other arguments are, the oldest first."""
    if not os.path.isdir(args["run_dir"]):
        return []
    names = sorted(os.listdir(args["run_dir"]))
    names = [x for x in names if x.rpartition("__")[0] == run_name(args)]
    return [os.path.join(args["run_dir"], x) for x in names]


def is_of(command: Command, about: dict) -> bool:
    """True if a run's args.json is of this script with these arguments."""
    ignored = {"run_dir", "resume"}
    if command.args["num_devices"] == 0:
        ignored.add("num_devices")  # the number used is recorded
    if not about or about["script"] != os.path.basename(command.script):
        return False
    recorded = read_defaults(command.script) | about["args"]  # a new flag counts with its default
    return all(recorded[x] == command.args[x] for x in command.args.keys() - ignored)


def is_finished(command: Command) -> bool:
    """True if there is a complete run of this script with these arguments."""
    runs = [read_run(folder) for folder in find_runs(command.args)]
    return any(complete and is_of(command, about) for about, _, complete in runs)


def has_checkpoint(folder: str) -> bool:
    return bool(glob.glob(os.path.join(folder, "checkpoint_*.npz")))


# -------------------- Running ---------------------------------------------------------------------
class Job(NamedTuple):
    command: Command
    cores: list
    start: float  # seconds since the epoch
    process: subprocess.Popen


def start(command: Command, cores: list) -> Job:
    """Starts a command, or goes on with it, on some of the CPU's cores (empty: on all).

    Its output goes to a file beside the run's folder.
    """
    words = shlex.split(command.line)[1:]
    for folder in find_runs(command.args):
        about, _, complete = read_run(folder)
        if not has_checkpoint(folder) and not complete:
            shutil.rmtree(folder)  # nothing to go on from
        elif has_checkpoint(folder) and is_of(command, about):
            # Of several the last one counts. The other flags are its own.
            words = [command.script, "--resume", folder]
    run_dir = command.args["run_dir"]
    os.makedirs(run_dir, exist_ok=True)
    choose_cores = functools.partial(os.sched_setaffinity, 0, cores) if cores else None
    with open(os.path.join(run_dir, run_name(command.args) + ".log"), "a") as log:
        process = subprocess.Popen(
            [sys.executable, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, preexec_fn=choose_cores,
        )
    return Job(command, cores, time.time(), process)


def run_all(commands: list, jobs: int) -> list:
    """Runs commands, `jobs` at a time -> those that failed. Ctrl-C ends the children."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    bounds = [i * len(cores) // jobs for i in range(jobs + 1)]
    free = [cores[low:high] for low, high in zip(bounds, bounds[1:])]
    waiting, running, failed = list(commands), [], []
    try:
        while waiting or running:
            while waiting and free:
                job = start(waiting.pop(0), free.pop(0))
                running.append(job)
                number = len(commands) - len(waiting)
                print(f"[{number}/{len(commands)}] {run_name(job.command.args)}", flush=True)
            time.sleep(0.1)
            for job in [x for x in running if x.process.poll() is not None]:
                running.remove(job)
                free.append(job.cores)
                end = "done"
                if job.process.returncode != 0:
                    failed.append(job.command)
                    end = f"FAILED with status {job.process.returncode}, see its .log,"
                minutes = (time.time() - job.start) / 60
                print(f"{end} after {minutes:.1f} min: {run_name(job.command.args)}", flush=True)
    finally:
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()
    return failed


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    try:
        if options.jobs < 1:
            raise ValueError(f"--jobs {options.jobs}: must be above 0")
        commands = make_commands(options)
    except (OSError, ValueError, re.error) as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    todo = [command for command in commands if not is_finished(command)]
    done = len(commands) - len(todo)
    print(f"{options.file}: {done} of {len(commands)} commands have finished", flush=True)
    if options.dry_run:
        for command in todo:
            print(command.line)
        return 0
    # `kill` stops the children, too, and Ctrl-C also where a shell started this in the background
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        failed = run_all(todo, options.jobs)
    except KeyboardInterrupt:
        print("interrupted; the same command continues the sweep", file=sys.stderr)
        return 130
    for command in failed:
        print(f"failed: {command.line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
