"""Draws runs, from their folders or from benchmark/results, and prints a table of their last
results in Markdown.

    python benchmark/plot.py benchmark/runs/figure1 --export benchmark/results/figure1.csv
    python benchmark/plot.py benchmark/results/figure1.csv --out kl.png --panels gap learner_kl
    python benchmark/plot.py runs --out speed.png --panels learner --keys charts/SPS
    python benchmark/plot.py benchmark/runs/heatmap --out bars.png --bars

Runs that differ only in their seed are a group: same environment, scenario and --exp-name. Lines
and bars are means over seeds, with 95% bootstrap intervals over seeds: rather too narrow where
there are few, none with one. Seeds are compared at the steps at which all of the group were
evaluated.
"""
import sys
from dataclasses import dataclass
from typing import Literal

import evaluations
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import tyro
from aggregate import make_table
from matplotlib.ticker import EngFormatter

PANELS = {
    "learner": "learner: return per episode",
    "guider": "guider: return per episode",
    "gap": "gap: guider - learner",
    "learner_kl": "KL(guider || learner)",
    "win_rate": "learner: share of episodes won",
}
FREE = {"sharex": False, "sharey": False, "legend_out": False}
Panel = Literal[tuple(PANELS)]
plt.switch_backend("agg")  # without a display


@dataclass
class Options(evaluations.Options):
    panels: tuple[Panel, ...] = ("learner", "guider", "gap")  # a column each; one: a task a panel
    baseline: tuple[tuple[str, float, str], ...] = ()  # SCENARIO RETURN LABEL: dashed lines
    bars: bool = False  # final returns in place of curves
    title: str = ""  # of the picture


def draw_curves(frame: pd.DataFrame, panels: tuple, baselines: tuple) -> sns.FacetGrid:
    """A row a task and a column a panel; of one panel, a task a panel, three in a row."""
    colours = dict(zip(frame["label"].unique(), sns.color_palette("colorblind", 99)))
    dashes = dict.fromkeys(colours, "")
    for scenario, value, label in baselines:  # a level curve
        if scenario not in set(frame["scenario"]):
            raise evaluations.InputError(f"--baseline {scenario}: there is no such scenario")
        colours[label], dashes[label] = "0.35", (4, 3)
        ends = frame[frame["scenario"] == scenario].groupby("task", as_index=False)["global_step"]
        level = ends.agg(["min", "max"]).melt("task", value_name="global_step")
        frame = pd.concat([frame, level.assign(label=label, learner=value, guider=value)])
    titles = [PANELS.get(panel, panel) for panel in panels]
    curves = frame.rename(columns=PANELS).melt(["task", "label", "global_step"], titles, "panel")
    facets = {"col": "task", "col_wrap": min(3, frame["task"].nunique())}
    if len(panels) > 1:
        facets = {"row": "task", "col": "panel", "col_order": titles}
    grid = sns.relplot(
        curves.dropna(), kind="line", x="global_step", y="value", errorbar=("ci", 95), seed=0,
        hue="label", palette=colours, style="label", dashes=dashes, height=2.6, aspect=1.3,
        facet_kws=FREE | {"margin_titles": len(panels) > 1}, **facets,
    )
    if {"learner", "guider"} <= set(panels):  # on one scale
        for task in frame["task"].unique():
            learner_ax = grid.axes_dict[task, PANELS["learner"]]
            grid.axes_dict[task, PANELS["guider"]].sharey(learner_ax)
            learner_ax.autoscale(axis="y")
    grid.set_titles("{col_name}", row_template="{row_name}", col_template="{col_name}")
    grid.set_axis_labels("environment steps", titles[0] if len(panels) == 1 else "")
    for ax in grid.axes.flat:
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    return grid


def draw_bars(finals: pd.DataFrame) -> sns.FacetGrid:
    """A panel a task: final returns of learner and guider, and a dot for each seed."""
    returns = finals.melt(evaluations.GROUP, ["learner", "guider"], "policy", "return")
    grid = sns.catplot(
        returns, kind="bar", x="return", y="label", hue="policy", col="task", palette="pastel",
        errorbar=("ci", 95), seed=0, height=4, aspect=1.5,
        col_wrap=min(3, finals["task"].nunique()), **FREE,
    )
    dots = {"dodge": True, "jitter": False, "size": 4, "palette": "dark:black"}
    grid.map_dataframe(sns.stripplot, x="return", y="label", hue="policy", **dots)
    grid.set_titles("{col_name}")
    grid.set_axis_labels("final return per episode", "")
    return grid


def show(options: Options) -> None:
    frame = evaluations.load(options)
    finals = evaluations.final(frame, options.last)
    evaluations.write_table(make_table(finals), options.table)
    if options.out:
        for table in (frame, finals):
            table["task"] = table["task"].str.replace(" ", "\n")  # a narrower title
        sns.set_theme(style="ticks", rc={"axes.grid": True, "grid.alpha": 0.3})
        if options.bars:
            grid = draw_bars(finals)
        else:
            grid = draw_curves(frame, (*options.panels, *options.keys), options.baseline)
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}  # below the panels
        sns.move_legend(grid, **place, ncols=4, title=None, frameon=False)
        grid.figure.suptitle(options.title, y=1.03)
        grid.savefig(options.out, dpi=150)
        plt.close(grid.figure)


def main(words: list | None = None) -> int:
    options = tyro.cli(Options, args=words, description=__doc__)
    return evaluations.run_program("plot.py", show, options)


if __name__ == "__main__":
    sys.exit(main())
