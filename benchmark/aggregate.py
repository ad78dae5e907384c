"""Aggregates over tasks as the field reports them (Agarwal et al., arXiv 2108.13264): mean,
interquartile mean and probability of improvement, with 95% stratified bootstrap intervals.

    python benchmark/aggregate.py benchmark/results/suites_ff.csv --reference magpo --out x.png

A score is a run's final return of the learner, scaled so that 0 is the lowest and 1 the highest
evaluation of all runs shown of its task. The functions take a list with an array for each task,
of as many scores as the task has seeds. The bootstrap is scipy's: it draws the seeds of every task
anew, never the tasks. With few seeds its intervals are rather too narrow. Values are those of
rliable, and intervals up to the random draws (a test); its 1.2.0 does not import beside pandas 3.
"""
import sys
from dataclasses import dataclass

import evaluations
import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure
from scipy.stats import bootstrap, trim_mean


@dataclass
class Options(evaluations.Options):
    reference: str = "magpo"  # label: with which probability does it improve on each of the others


# -------------------- Statistics ------------------------------------------------------------------
def mean(*scores: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean over the runs of all tasks."""
    return np.concatenate(scores, axis).mean(axis)


def iqm(*scores: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean: the mean over the runs of all tasks without the lowest and the highest
    quarter of them, each rounded down to whole runs."""
    return trim_mean(np.concatenate(scores, axis), 0.25, axis)


def probability_of_improvement(*scores: np.ndarray, axis: int = -1) -> np.ndarray:
    """Probability that a run of X has a higher score than a run of Y, a tie counting half, mean
    over tasks; the first half of the scores is X, task by task, the second half is Y."""
    half = len(scores) // 2
    of_tasks = []
    for x, y in zip(scores[:half], scores[half:]):
        x = np.expand_dims(np.moveaxis(x, axis, -1), -1)  # (..., X's seeds, 1)
        y = np.expand_dims(np.moveaxis(y, axis, -1), -2)  # (..., 1, Y's seeds)
        better = (x > y) + 0.5 * (x == y)
        of_tasks.append(better.mean((-2, -1)))
    return np.mean(of_tasks, axis=0)


def interval(statistic, scores: list, resamples: int = 10_000) -> tuple:
    """95% percentile interval (low, high); NaN if a task has only one seed."""
    if min(len(x) for x in scores) < 2:
        return np.nan, np.nan
    result = bootstrap(
        scores, statistic, n_resamples=resamples, vectorized=True, method="percentile",
        rng=np.random.default_rng(0),
    )
    return result.confidence_interval.low, result.confidence_interval.high


def with_interval(value: float, low: float, high: float) -> str:
    text = f"{value:.3g}"
    return text if np.isnan(low) else f"{text} [{low:.3g}, {high:.3g}]"


# -------------------- Tables ----------------------------------------------------------------------
def make_table(finals: pd.DataFrame) -> pd.DataFrame:
    """Final results, a row a group."""
    rows = []
    for (task, label), runs in finals.groupby(evaluations.GROUP, sort=False):
        row = {"task": task, "run": label, "seeds": len(runs)}
        row["steps"] = f"{runs['global_step'].max():,}"
        low, high = interval(mean, [runs["learner"].to_numpy()])
        row["learner [95% CI]"] = with_interval(runs["learner"].mean(), low, high)
        row["worst seed"] = f"{runs['learner'].min():.3g}"
        row["worst fall"] = f"{runs['worst_fall'].max():.0%}"
        for column in ("guider", "gap", "learner_kl", "win_rate"):
            value = runs[column].mean()
            row[column] = "" if pd.isna(value) else f"{value:.3g}"
        row["minutes"] = f"{runs['wall_seconds'].mean() / 60:.1f}"
        rows.append(row)
    return pd.DataFrame(rows)


# -------------------- Aggregates ------------------------------------------------------------------
def normalise(finals: pd.DataFrame, frame: pd.DataFrame) -> dict:
    """Final results, a row a run, and all evaluations -> scores of each label.

    Only tasks that all labels have count. Where all evaluations of a task are alike, scores are 0.
    """
    evaluated = frame.groupby("task")["learner"]
    low, high = evaluated.min(), evaluated.max()
    span = (high - low).replace(0, 1)
    num_labels = finals.groupby("task")["label"].transform("nunique")
    finals = finals[num_labels == finals["label"].nunique()].copy()
    if finals.empty:
        raise evaluations.InputError("there is no task that all runs have in common; see --only")
    finals["score"] = (finals["learner"] - finals["task"].map(low)) / finals["task"].map(span)
    scores = {}
    for label, runs in finals.groupby("label", sort=False):
        scores[label] = [task["score"].to_numpy() for _, task in runs.groupby("task")]
    return scores


def aggregate(scores: dict, reference: str) -> pd.DataFrame:
    """Scores of each label -> a row for each statistic and label, with columns value, low, high."""
    if reference not in scores:
        raise evaluations.InputError(f"--reference {reference}: must be one of {', '.join(scores)}")
    others = [label for label in scores if label != reference]
    better = f"P({reference} is better)"
    estimates = [("mean", mean, label, scores[label]) for label in scores]
    estimates += [("IQM", iqm, label, scores[label]) for label in scores]
    for label in others:
        both = scores[reference] + scores[label]
        estimates.append((better, probability_of_improvement, label, both))
    rows = []
    for name, statistic, label, inputs in estimates:
        low, high = interval(statistic, inputs)
        rows.append((name, label, float(statistic(*inputs)), low, high))
    return pd.DataFrame(rows, columns=["statistic", "label", "value", "low", "high"])


def draw(table: pd.DataFrame) -> Figure:
    """A panel a statistic, a point and an interval a label."""
    statistics = table["statistic"].unique()
    figure = Figure(figsize=(9, 1 + 0.4 * table["label"].nunique()), layout="constrained")
    for ax, name in zip(figure.subplots(1, len(statistics)), statistics):
        rows = table[table["statistic"] == name]
        margins = np.array([rows["value"] - rows["low"], rows["high"] - rows["value"]])
        margins = margins.clip(0)  # rounded, a bound may lie on the wrong side
        ax.errorbar(rows["value"], rows["label"], xerr=margins, fmt="o", capsize=4)
        ax.set_xlabel(name)
        ax.margins(y=0.2)
        ax.invert_yaxis()
        ax.grid(alpha=0.3)
    return figure


# -------------------- Main ------------------------------------------------------------------------
def show(options: Options) -> None:
    frame = evaluations.load(options)
    scores = normalise(evaluations.final(frame, options.last), frame)
    table = aggregate(scores, options.reference)
    parts = zip(table["value"], table["low"], table["high"])
    table["value [95% CI]"] = [with_interval(*row) for row in parts]
    table["tasks"] = len(scores[options.reference])
    columns = ["statistic", "label", "value [95% CI]", "tasks"]
    evaluations.write_table(table[columns], options.table)
    if options.out:
        draw(table).savefig(options.out, dpi=150)


def main(words: list | None = None) -> int:
    options = tyro.cli(Options, args=words, description=__doc__)
    return evaluations.run_program("aggregate.py", show, options)


if __name__ == "__main__":
    sys.exit(main())
