"""Writes benchmark/tasks.md: the paper's 43 tasks, what others have published on them, and what
magpo_rec.py reached here with its tuned hyperparameters, from the runs in benchmark/results.

    python benchmark/tasks_table.py
"""

import os
import sys

import pandas as pd

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(FOLDER))

import tasks  # noqa: E402

SYSTEMS = ["Sable", "MAT", "MAPPO", "IPPO"]
RESULTS = ["rware_rec", "paper"]
LAST = 3  # evaluations whose mean is a run's final result
HEAD = """\
# The paper's 43 tasks

Written by `python benchmark/tasks_table.py` from `benchmark/sable_table.csv`, and from
`rware_rec.csv` and `paper.csv` in `benchmark/results`. The published columns are the absolute
metric after 20M steps of the Sable paper (arXiv 2410.01706); the MAGPO paper gives no numbers for
single tasks. *Here* is the learner of `magpo_rec.py` with its tuned hyperparameters: the mean of
the last three evaluations of 32 episodes of each seed, after so many steps. For Connector both are
the share of boards on which all are connected, for the others returns.

"""


def measured(table: pd.DataFrame, env_id: str, scenario: str) -> str:
    """The cell of what was reached here, with its steps and seeds; of several budgets the largest.
    """
    rows = table[(table["env_id"] == env_id) & (table["scenario"] == scenario)]
    if rows.empty:
        return "not run"
    metric = "win_rate" if env_id == "Connector-v3" else "learner"
    steps = rows.groupby("seed")["global_step"].max()
    rows = rows[rows["seed"].isin(steps.index[steps == steps.max()])]
    finals = rows.groupby("seed")[metric].apply(lambda x: x.tail(LAST).mean())
    seeds = "1 seed" if len(finals) == 1 else f"{len(finals)} seeds"
    text = f"{finals.mean():.2f}"
    if env_id == "SMAX":
        wins = rows.groupby("seed")["win_rate"].apply(lambda x: x.tail(LAST).mean()).mean()
        text += f", {wins:.0%} won"
    return f"{text} ({steps.max() / 1e6:.1f}M, {seeds})"


def write_table() -> str:
    """The text of tasks.md."""
    published = pd.read_csv(os.path.join(FOLDER, "sable_table.csv"), comment="#")
    published = published.pivot(index="task", columns="system", values="value")
    files = [os.path.join(FOLDER, "results", f"{name}.csv") for name in RESULTS]
    runs = pd.concat([pd.read_csv(file) for file in files if os.path.exists(file)])
    runs = runs[runs["exp_name"] == "magpo"]
    heads = ["environment", "task", *SYSTEMS, "MAGPO, here"]
    lines = [heads, ["---", "---"] + ["---:"] * (len(SYSTEMS) + 1)]
    for env_id, scenarios in tasks.PAPER_TASKS.items():
        for scenario in scenarios:
            cells = [env_id, f"`{scenario}`"]
            if scenario in published.index:
                cells += [f"{x:.2f}" for x in published.loc[scenario, SYSTEMS]]
            else:
                cells += ["-"] * len(SYSTEMS)
            cells.append(measured(runs, env_id, scenario))
            lines.append(cells)
    return HEAD + "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


if __name__ == "__main__":
    with open(os.path.join(FOLDER, "tasks.md"), "w") as file:
        file.write(write_table())
