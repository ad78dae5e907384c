"""Delta and lambda together: the final return of the learner, and the gap to its guider, as heat
maps.

    python benchmark/run.py benchmark/heatmap.txt --jobs 2
    python docs/heatmap.py benchmark/runs/heatmap
    python docs/heatmap.py benchmark/runs/heatmap --export benchmark/results/heatmap.csv

Reads folders of runs, or CSV files that --export wrote. A run's --exp-name says what its cell is:
delta_1.1_lambda_4. Cells are means over seeds.
"""
import os
import re
import sys
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import tyro

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.join(ROOT, "benchmark"))

import evaluations  # noqa: E402

CELL = re.compile(r"delta_([\d.]+|inf)_lambda_([\d.]+)")
PANELS = {"learner": "learner: final return per episode", "gap": "gap: guider - learner"}


@dataclass
class Options(evaluations.Options):
    out: str = "runs/heatmap.png"  # PNG to write


def cells(frame: pd.DataFrame, last: int) -> pd.DataFrame:
    """The final results with columns delta and lambda, a row a run.

    Raises InputError if the runs are of several tasks, or one's name is not that of a cell.
    """
    finals = evaluations.final(frame, last)
    if finals["task"].nunique() > 1:
        tasks = ", ".join(finals["task"].unique())
        raise evaluations.InputError(f"there are several tasks, choose one by --only: {tasks}")
    for name in finals["label"]:
        if not CELL.fullmatch(name):
            raise evaluations.InputError(f"{name}: is no name such as delta_1.1_lambda_4")
    values = finals["label"].str.extract(CELL).astype(float)
    return finals.assign(delta=values[0], **{"lambda": values[1]})


def draw(finals: pd.DataFrame) -> plt.Figure:
    """A panel each for the learner's return and the gap; a row a delta, a column a lambda."""
    sns.set_theme(font_scale=1.1)
    fig, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for ax, (value, title) in zip(axes, PANELS.items()):
        table = finals.pivot_table(index="delta", columns="lambda", values=value, sort=True)
        table.index = [f"{x:g}" for x in table.index]
        table.columns = [f"{x:g}" for x in table.columns]
        colours = {"cmap": "viridis"} if value == "learner" else {"cmap": "vlag", "center": 0}
        sns.heatmap(table, annot=True, fmt=".1f", ax=ax, **colours)
        ax.set(title=title, xlabel="lambda", ylabel="delta")
    steps = finals["global_step"].max()
    fig.suptitle(f"{finals['task'].iloc[0]}, {steps:,} steps")
    return fig


def show(options: Options) -> None:
    finals = cells(evaluations.load(options), options.last)
    table = finals.groupby(["delta", "lambda"])[["learner", "guider", "gap"]].mean().round(1)
    evaluations.write_table(table.reset_index(), options.table)
    os.makedirs(os.path.dirname(options.out) or ".", exist_ok=True)
    draw(finals).savefig(options.out, dpi=110)


def main(words: list | None = None) -> int:
    options = tyro.cli(Options, args=words, description=__doc__)
    plt.switch_backend("agg")  # without a display
    return evaluations.run_program("heatmap.py", show, options)


if __name__ == "__main__":
    sys.exit(main())
