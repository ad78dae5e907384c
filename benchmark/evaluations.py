"""The evaluations of runs as one table, from the runs' folders or from the CSV files in
benchmark/results, a row for each evaluation:

    env_id, scenario, exp_name, seed    the run
    global_step                         environment steps of training before it
    learner, guider                     mean return of the episodes that each played
    win_rate                            share of the learner's episodes that were won
    learner_kl                          KL(guider || learner), mean since the evaluation before
    wall_seconds                        compilation, training and evaluations up to here

What a script or an environment does not have is empty.
"""
import glob
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from typing import Callable

import pandas as pd
import tyro
from run import read_run

RUN = ["env_id", "scenario", "exp_name", "seed"]
MEANS = ["learner", "guider", "win_rate", "learner_kl"]
COLUMNS = [*RUN, "global_step", *MEANS, "wall_seconds"]
GROUP = ["task", "label"]  # runs that differ in their seed alone
NOT_COMPARED = {"seed", "run_dir", "resume", "num_devices"}


class InputError(ValueError):
    """What was asked for cannot be shown; its text is the one line that the user sees."""


@dataclass
class Options:
    sources: tyro.conf.Positional[tuple[str, ...]]  # folders of runs, or CSV files of --export
    export: str = ""  # CSV file to write the evaluations of all sources to
    marl_eval: str = ""  # JSON file to write for the package marl-eval
    out: str = ""  # PNG to write
    table: str = ""  # Markdown file to write the table to
    only: str = ""  # regular expression: only runs with it in "ENV_ID SCENARIO EXP_NAME"
    # EXP_NAME LABEL: other names in pictures and tables
    labels: dict[str, str] = field(default_factory=dict)
    # EXP_NAME LABEL: its guider is shown as one more learner, under this label
    guider_of: dict[str, str] = field(default_factory=dict)
    # of metrics.jsonl, such as charts/SPS: columns of --export and panels, beside the usual ones
    keys: tuple[str, ...] = ()
    last: int = 3  # evaluations whose mean is a run's final result
    partial: bool = False  # take unfinished runs, too


# -------------------- Reading ---------------------------------------------------------------------
def warn(text: str) -> None:
    print(text, file=sys.stderr)


def make_row(args: dict, row: dict, keys: tuple) -> dict:
    """A run's arguments and a row of its metrics.jsonl -> a row of the table, with further keys."""
    evaluation = {name: args[name] for name in RUN}
    evaluation["global_step"] = row["global_step"]
    evaluation["learner"] = row["eval/learner_return"]
    evaluation["guider"] = row.get("eval/guider_return", math.nan)
    evaluation["win_rate"] = row.get("eval/win_rate", math.nan)
    evaluation["learner_kl"] = row.get("losses/learner_kl", math.nan)
    parts = (row[f"time/{part}_s"] for part in ("compile", "train", "eval"))
    evaluation["wall_seconds"] = round(sum(parts), 1)
    return evaluation | {key: row.get(key, math.nan) for key in keys}


def read_runs(run_dir: str, partial: bool = False, keys: tuple = ()) -> pd.DataFrame:
    """Reads the finished runs in a folder (partial: all that were evaluated).

    Of two runs of the same name the later one counts, with a warning; so do seeds of one name whose
    other flags differ.
    """
    rows_of, flags_of = {}, {}
    folders = [os.path.dirname(file) for file in glob.glob(f"{run_dir}/*/args.json")]
    for folder in sorted(folders, key=lambda x: x.rpartition("__")[2]):  # by the time of the start
        about, rows, complete = read_run(folder)
        if not rows or not (complete or partial):
            warn(f"left out, not finished: {folder}")
            continue
        args = about["args"]
        run = tuple(args[name] for name in RUN)
        if run in rows_of:
            warn(f"the same name and seed again, the later one counts: {folder}")
        rows_of[run] = [make_row(args, row, keys) for row in rows]
        flags = {name: args[name] for name in args.keys() - NOT_COMPARED}
        flags["script"] = about["script"]
        first = flags_of.setdefault(run[:-1], flags)
        differ = sorted(name for name in flags if flags[name] != first.get(name))
        if differ:
            warn(f"seeds of one name differ in {', '.join(differ)}: {folder}")
    return pd.DataFrame([row for run in sorted(rows_of) for row in rows_of[run]])


def read_csv(file: str, keys: tuple = ()) -> pd.DataFrame:
    try:
        frame = pd.read_csv(file, dtype={"scenario": str, "exp_name": str})
    except ValueError as error:  # of pandas
        raise InputError(f"{file}: {error}") from error
    missing = [name for name in (*COLUMNS, *keys) if name not in frame]
    if missing:
        raise InputError(f"{file}: there is no column {', '.join(missing)}")
    return frame


def read(sources: tuple, partial: bool = False, keys: tuple = ()) -> pd.DataFrame:
    """Reads folders of runs and CSV files. Raises InputError or OSError."""
    if not sources:
        raise InputError("name folders of runs, or CSV files")
    frames = []
    for source in sources:
        if source.endswith(".csv"):
            frame = read_csv(source, keys)
        else:
            frame = read_runs(source, partial, keys)
        if frame.empty:
            raise InputError(f"{source}: there are no finished runs")
        frames.append(frame)
    frame = pd.concat(frames, ignore_index=True)
    frame["scenario"] = frame["scenario"].fillna("")
    return frame


def load(options: Options) -> pd.DataFrame:
    """Reads the sources, exports them, and groups what is to be shown.

    Raises InputError or OSError.
    """
    if options.last < 1:
        raise InputError(f"--last {options.last}: must be above 0")
    frame = read(options.sources, options.partial, options.keys)
    for key in options.keys:
        if frame[key].isna().all():
            raise InputError(f"--keys {key}: no run has it")
    if options.export:
        os.makedirs(os.path.dirname(options.export) or ".", exist_ok=True)
        frame.to_csv(options.export, index=False, float_format="%.6g")
    frame = group(frame, options.only, options.labels, options.guider_of)
    if options.marl_eval:
        with open(options.marl_eval, "w") as file:
            json.dump(to_marl_eval(frame, options.last), file, indent=1)
    return frame


# -------------------- Groups ----------------------------------------------------------------------
def natural(text: str) -> list:
    """Sorts delta_2 before delta_10."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [float(part) if i % 2 else part for i, part in enumerate(parts)]


def group(frame: pd.DataFrame, only: str, labels: dict, guider_of: dict) -> pd.DataFrame:
    """Adds the columns task, label and gap, and sorts by them.

    Args:
        only: regular expression, keeps the runs in whose "env_id scenario exp_name" it is found.
        labels: other labels for some exp_names.
        guider_of: labels under which the guiders of some exp_names count as learners of their own.

    Of each group only those steps stay at which all of its seeds were evaluated, with a word where
    their last ones are not the same.
    """
    names = frame["env_id"] + " " + frame["scenario"] + " " + frame["exp_name"]
    try:
        chosen = [bool(re.search(only, name)) for name in names]
    except re.error as error:
        raise InputError(f"--only {only}: {error}") from error
    if not any(chosen):
        raise InputError(f"--only {only}: found in no run")
    frame = frame[chosen].copy()
    frame["task"] = (frame["env_id"] + " " + frame["scenario"]).str.strip()
    frame["label"] = frame["exp_name"].replace(labels)
    for flag, names in (("--labels", labels), ("--guider-of", guider_of)):
        for name in names:
            if name not in set(frame["exp_name"]):
                raise InputError(f"{flag} {name}: there is no run of this name")
    for exp_name, label in guider_of.items():
        guider = frame[frame["exp_name"] == exp_name].copy()
        guider["learner"] = guider["guider"]
        guider["label"] = label
        guider[["win_rate", "learner_kl"]] = math.nan
        frame = pd.concat([frame, guider])
    frame["gap"] = frame["guider"] - frame["learner"]
    frame = frame.sort_values([*GROUP, "seed", "global_step"], key=sort_key, ignore_index=True)
    again = frame[frame.duplicated([*GROUP, "seed", "global_step"])]
    if not again.empty:
        task, label, seed = again[[*GROUP, "seed"]].iloc[0]
        raise InputError(f"{task} {label}: there are two runs with seed {seed}")
    num_seeds = frame.groupby(GROUP)["seed"].transform("nunique")
    num_there = frame.groupby([*GROUP, "global_step"])["seed"].transform("nunique")
    common = frame[num_there == num_seeds]
    lost = frame.groupby(GROUP)["global_step"].max() - common.groupby(GROUP)["global_step"].max()
    for task, label in lost.index[lost != 0]:
        print(f"{task} {label}: its seeds do not end at the same step", file=sys.stderr)
    return common


def sort_key(column: pd.Series) -> pd.Series:
    if column.name not in GROUP:
        return column
    order = sorted(column.unique(), key=natural)
    return column.map(order.index)


def worst_fall(returns: pd.Series) -> float:
    """A run's evaluations -> its largest drop, of means of three, below the best before it, as a
    share of what its best has gained since the first evaluation; 0 where nothing was gained."""
    means = returns.rolling(3, min_periods=1).mean()
    best = means.cummax()
    gained = best.iloc[-1] - returns.iloc[0]
    return (best - means).max() / gained if gained > 0 else 0.0


def final(frame: pd.DataFrame, last: int) -> pd.DataFrame:
    """The mean over the last evaluations of each run, a row a run; of steps and seconds the end,
    and the worst fall on the way."""
    runs = frame.groupby([*GROUP, "seed"], sort=False)
    means = frame.loc[runs.tail(last).index].groupby([*GROUP, "seed"], sort=False)
    result = means[[*MEANS, "gap"]].mean()
    result[["global_step", "wall_seconds"]] = runs[["global_step", "wall_seconds"]].last()
    result["worst_fall"] = runs["learner"].apply(worst_fall)
    return result.reset_index()


# -------------------- Output ----------------------------------------------------------------------
def to_marl_eval(frame: pd.DataFrame, last: int) -> dict:
    """Grouped evaluations in the form that marl-eval reads (github.com/instadeepai/marl-eval):
    environment, task, algorithm, run, step; a metric is a list, here of one mean.

    The absolute metrics are the means over the last evaluations, for the best networks are not
    played anew. Metrics are those that all runs of an environment have. Commas, which marl-eval
    does not take, leave the names of algorithms.
    """
    data: dict = {}
    for run_name, run in frame.groupby(["env_id", "scenario", "label", "seed"]):
        env_id, scenario, label, seed = run_name
        everywhere = frame.loc[frame["env_id"] == env_id, ["learner", "win_rate"]].dropna(axis=1)
        metrics = everywhere.loc[run.index].rename(columns={"learner": "return"})
        steps = {
            f"step_{i}": {"step_count": int(step)} | {name: [x] for name, x in values.items()}
            for i, (step, values) in enumerate(zip(run["global_step"], metrics.to_dict("records")))}
        means = metrics.tail(last).mean().to_dict()
        steps["absolute_metrics"] = {name: [x] for name, x in means.items()}
        runs = data.setdefault(env_id, {}).setdefault(scenario or "default", {})
        runs.setdefault(label.replace(",", ""), {})[f"seed_{seed}"] = steps
    return data


def to_markdown(table: pd.DataFrame) -> str:
    rows = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)


def write_table(table: pd.DataFrame, path: str) -> None:
    """Prints a table, and writes it to a file unless the path is empty."""
    text = to_markdown(table)
    print(text, end="")
    if path:
        with open(path, "w") as file:
            file.write(text)


def run_program(program: str, show: Callable, options: Options) -> int:
    """Calls `show` on the options -> exit status; what cannot be obeyed is one line."""
    try:
        show(options)
    except (OSError, InputError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    return 0
