"""Draws finished runs, averaged over their seeds, and prints a table of their last results in
Markdown.

    python benchmark/plot.py benchmark/runs/figure1 --out benchmark/figure1.png \\
        --table benchmark/figure1.md
    python benchmark/plot.py benchmark/runs/figure1 --out kl.png \\
        --panels losses/learner_kl losses/guider_kl
    python benchmark/plot.py benchmark/runs/ablation --out benchmark/ablation.png --bars \\
        --only "delta_[0-9inf.]*$"

Runs that differ only in their seed are a group: same environment, scenario and --exp-name. Lines
are means over seeds (--iqm: interquartile means), intervals are 95% percentile bootstrap intervals
over seeds. With five seeds or fewer, as is usual here, such an interval is rather too narrow; with
two it spans the two, with one there is none. All seeds of a group are compared at the same steps:
those at which every one of them was evaluated. What the table and --bars call final is a run's mean
over its last K evaluations (--last).
"""
import argparse
import os
import re
import sys
from typing import Callable

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from run import read_run  # benchmark/run.py

# Okabe and Ito, without yellow
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
TITLES = {
    "eval/learner_return": "learner (student): return per episode",
    "eval/guider_return": "guider (teacher): return per episode",
    "eval/imitation_gap": "imitation gap: guider - learner",
}
KEYS = list(TITLES)


# -------------------- Reading and statistics ------------------------------------------------------
def natural(text: str) -> list:
    """Sorts delta_2 before delta_10."""
    return [float(x) if i % 2 else x for i, x in enumerate(re.split(r"(\d+(?:\.\d+)?)", text))]


def read_groups(run_dirs: list, only: str = "", labels: dict = {}, partial: bool = False) -> dict:
    """Reads the finished runs (partial: all that began) -> {(env_id, scenario, label): [rows of
    each seed]}, sorted.

    The label is --exp-name as renamed by `labels`, else without the scenario's name at its end.
    """
    found, seen = {}, {}
    folders = [os.path.join(run_dir, name) for run_dir in run_dirs for name in os.listdir(run_dir)]
    for folder in sorted(
        (x for x in folders if os.path.isdir(x)), key=lambda x: natural(x.rpartition("__")[2])
    ):
        about, rows, complete = read_run(folder)
        if not (complete or partial and rows):
            print(f"left out, not finished: {folder}", file=sys.stderr)
            continue
        args = about["args"]
        if not re.search(only, f"{args['env_id']} {args['scenario']} {args['exp_name']}"):
            continue
        label = labels.get(args["exp_name"], args["exp_name"].removesuffix("_" + args["scenario"]))
        group = found.setdefault((args["env_id"], args["scenario"], label), {})
        if args["seed"] in group:
            print(f"the same group and seed twice, the newest counts: {folder}", file=sys.stderr)
        group[args["seed"]] = rows
        first = seen.setdefault((args["env_id"], args["scenario"], label), args)
        if differ := {name for name in args if args[name] != first.get(name)} - {
            "seed", "run_dir", "num_devices",
        }:
            print(
                f"the group's seeds differ in {', '.join(sorted(differ))}: {folder}",
                file=sys.stderr,
            )
    order = sorted(found, key=lambda group: [natural(x) for x in group])
    return {group: [rows for _, rows in sorted(found[group].items())] for group in order}


def curves(runs: list, key: str) -> tuple:
    """Rows of R runs -> the S steps at which all of them logged the key, (S,), and its values,
    (R, S)."""
    logged = [{row["global_step"]: row[key] for row in rows if key in row} for rows in runs]
    steps = sorted(set.intersection(*map(set, logged)))
    return np.array(steps), np.array([[run[step] for step in steps] for run in logged])


def iqm(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Interquartile mean: the mean without the lowest and the highest quarter, each rounded down to
    whole values."""
    cut = values.shape[axis] // 4
    return np.sort(values, axis).take(range(cut, values.shape[axis] - cut), axis).mean(axis)


def bootstrap_interval(values: np.ndarray, statistic=np.mean, resamples: int = 10_000) -> tuple:
    """(R, ...) values of R seeds -> low, high, each (...): 95% percentile bootstrap interval over
    the seeds.

    Seeds are drawn with replacement, R at a time; the same draws are used for every step, and in
    every call.
    """
    draws = np.random.default_rng(0).integers(len(values), size=(len(values), resamples))
    return tuple(np.percentile(statistic(values[draws], axis=0), [2.5, 97.5], axis=0))


def final(runs: list, key: str, last: int) -> np.ndarray:
    """Mean over the last evaluations of each run (0: over all), (R,); NaN where the script does not
    log the key."""
    _, values = curves(runs, key)
    return values[:, -last:].mean(1) if values.size else np.full(len(runs), np.nan)


def number(x: float) -> str:
    return "-" if np.isnan(x) else f"{x:.2f}" if abs(x) >= 1 else f"{x:.3f}"


def table(groups: dict, last: int) -> str:
    """The groups' final results as a Markdown table."""
    heads = [
        "run", "seeds", "steps", "learner return [95% CI]", "learner IQM", "guider return",
        "imitation gap", "learner KL", "SPS", "train min",
    ]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for group, runs in groups.items():
        learner, guider, gap = (final(runs, key, last) for key in KEYS)
        low, high = bootstrap_interval(learner)
        interval = f" [{number(low)}, {number(high)}]" if len(runs) > 1 else ""
        steps, _ = curves(runs, "eval/learner_return")
        cells = [
            " ".join(group), str(len(runs)), f"{steps[-1]:,}",
            f"{number(learner.mean())}{interval}",
        ]
        cells += [number(iqm(learner)), number(guider.mean()), number(gap.mean())]
        cells += [f"{final(runs, 'losses/learner_kl', last).mean():.2g}"]
        cells += [
            f"{final(runs, 'charts/SPS', 0).mean():,.0f}",
            f"{final(runs, 'time/train_s', 1).mean() / 60:.1f}",
        ]
        lines.append(cells)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


# -------------------- Drawing ---------------------------------------------------------------------
def decorate(ax, baselines: list, draw_line: Callable, key: str) -> None:
    """Grid and frame; draw_line draws the baselines, (value, label) pairs, where the panel shows a
    return."""
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    for value, label in baselines if key.endswith("_return") else []:
        draw_line(value, color="0.35", linewidth=1, linestyle=(0, (4, 3)), label=label, zorder=1.5)


def add_legend(fig: Figure, handles: dict, title: str) -> None:
    """The title and one legend above all panels; handles: label -> artist."""
    fig.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=min(len(handles), 5),
        frameon=False, title=title, title_fontproperties={"weight": "bold", "size": 11},
    )


def draw_lines(
    fig: Figure, groups: dict, panels: list, baselines: list, statistic: Callable
) -> dict:
    """Panels side by side, a row for each task: lines over environment steps, intervals shaded ->
    label -> artist."""
    tasks = list(dict.fromkeys(group[:2] for group in groups))
    labels = sorted({group[2] for group in groups}, key=natural)
    viridis = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(labels)))
    colours = COLOURS if len(labels) <= len(COLOURS) else viridis
    axes, handles = fig.subplots(len(tasks), len(panels), squeeze=False, sharex="row"), {}
    for row, task in enumerate(tasks):
        returns = [ax for ax, key in zip(axes[row], panels) if key.endswith("_return")]
        for column, (ax, key) in enumerate(zip(axes[row], panels)):
            if key.endswith("_return") and ax is not returns[0]:
                ax.sharey(returns[0])
            for group, runs in (
                (group, runs) for group, runs in groups.items() if group[:2] == task
            ):
                steps, values = curves(runs, key)
                if not values.size:  # CTDS has none of MAGPO's own keys
                    continue
                colour = colours[labels.index(group[2])]
                line = ax.plot(
                    steps, statistic(values, axis=0), color=colour, linewidth=1.8, label=group[2]
                )
                handles[group[2]] = line[0]
                if len(runs) > 1:
                    low, high = bootstrap_interval(values, statistic)
                    ax.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            decorate(ax, baselines, ax.axhline, key)
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            ax.locator_params(axis="x", nbins=5)
            ax.set_title(TITLES.get(key, key) if row == 0 else "", fontsize=10)
            ax.set_xlabel("environment steps" if row == len(tasks) - 1 else "")
            handles |= {
                line.get_label(): line for line in ax.lines if line.get_label() not in labels
            }
        axes[row, 0].set_ylabel("\n".join(task) if len(tasks) > 1 else "")
    return {
        label: handles[label]
        for label in sorted(handles, key=lambda x: (x not in labels, natural(x)))
    }


def draw_bars(fig: Figure, groups: dict, baselines: list, statistic: Callable, last: int) -> dict:
    """A panel for each task: final returns of learner and guider, intervals and single seeds ->
    label -> artist."""
    tasks = list(dict.fromkeys(group[:2] for group in groups))
    handles = {}
    for ax, task in zip(fig.subplots(1, len(tasks), squeeze=False)[0], tasks):
        names = [group for group in groups if group[:2] == task]
        parts = [("learner (student)", -0.14, "o"), ("guider (teacher)", 0.14, "D")]
        for key, colour, (name, shift, marker) in zip(KEYS, COLOURS, parts):
            for place, group in enumerate(names):
                values = final(groups[group], key, last)
                low, high = bootstrap_interval(values, statistic)
                ax.plot(
                    values, np.full(len(values), place + shift), "|", color=colour, alpha=0.6,
                    markersize=6,
                )
                ax.plot(
                    [low, high], [place + shift] * 2, color=colour, linewidth=2.2,
                    solid_capstyle="butt", alpha=0.5,
                )
                point = ax.plot(
                    statistic(values, axis=0), place + shift, marker, color=colour, markersize=5.5
                )
                handles[name] = point[0]
        decorate(ax, baselines, ax.axvline, KEYS[0])
        handles |= {
            line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")
        }
        ax.set_yticks(range(len(names)), [group[2] for group in names])
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_title("\n".join(task) if len(tasks) > 1 else "", fontsize=10)
    fig.supxlabel(f"final return per episode: mean over the last {last} evaluations", fontsize=10)
    return handles


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", nargs="+", help="folders that hold the runs' own folders")
    parser.add_argument("--out", help="PNG to write; without it there is only the table")
    parser.add_argument("--table", metavar="FILE", help="write the table to this file as well")
    parser.add_argument(
        "--panels", nargs="+", default=KEYS, metavar="KEY",
        help="keys of metrics.jsonl, one a panel",
    )
    parser.add_argument(
        "--bars", action="store_true", help="final returns of each group in place of lines"
    )
    parser.add_argument(
        "--baseline", nargs="+", default=[], metavar="VALUE:LABEL", help="dashed lines of returns"
    )
    parser.add_argument("--title", help="title of the figure; the task, if there is only one")
    parser.add_argument(
        "--labels", nargs="+", default=[], metavar="EXP_NAME=LABEL", help="other names for groups"
    )
    parser.add_argument(
        "--only", default="", metavar="REGEX",
        help="only runs with this in: env_id scenario exp_name",
    )
    parser.add_argument(
        "--last", type=int, default=3, metavar="K", help="evaluations that make the final result"
    )
    parser.add_argument(
        "--iqm", action="store_true", help="draw interquartile means in place of means"
    )
    parser.add_argument("--partial", action="store_true", help="take unfinished runs, too")
    options = parser.parse_args()
    baselines = [(float(x.partition(":")[0]), x.partition(":")[2] or x) for x in options.baseline]
    labels = dict(x.split("=", 1) for x in options.labels)
    groups = read_groups(options.run_dirs, options.only, labels, options.partial)
    if not groups:
        parser.error("there are no finished runs of this kind")
    text = table(groups, options.last)
    print(text, end="")
    if options.table:
        with open(options.table, "w") as file:
            file.write(text)
    if options.out:
        tasks, statistic = {group[:2] for group in groups}, iqm if options.iqm else np.mean
        per_task = max(sum(group[:2] == task for group in groups) for task in tasks)
        height = 1.4 + 0.32 * per_task if options.bars else 0.9 + 2.4 * len(tasks)
        fig = Figure(figsize=(9, height), layout="constrained")
        if options.bars:
            handles = draw_bars(fig, groups, baselines, statistic, options.last)
        else:
            handles = draw_lines(fig, groups, options.panels, baselines, statistic)
        add_legend(fig, handles, options.title or ("" if len(tasks) > 1 else " ".join(*tasks)))
        fig.savefig(options.out, dpi=200)
    return 0


if __name__ == "__main__":
    sys.exit(main())
