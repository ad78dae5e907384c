"""How the guider is brought back in practice: four curves of a finished run as one picture.

    python docs/backtracking.py RUN_FOLDER
    python docs/backtracking.py RUN_FOLDER --export benchmark/results/backtracking.csv
    python docs/backtracking.py benchmark/results/backtracking.csv

The curves come from the run's metrics.jsonl, or from what --export wrote of it: the returns of
guider and learner, the gap between them, the share of samples outside of the tether, and the two KL
losses, means over all samples: the learner's, and the guider's, which is masked.
"""
import dataclasses
import json
import os
import sys

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import tyro
from matplotlib.ticker import EngFormatter, PercentFormatter

PANELS = {
    "return per episode": {"eval/guider_return": "guider", "eval/learner_return": "learner"},
    "gap: guider - learner": {"eval/imitation_gap": ""},
    "share of samples outside of the tether": {"losses/delta_clipfrac": ""},
    "KL(mu || pi)": {
        "losses/learner_kl": "all samples",
        "losses/guider_kl": "masked: 0 inside of the tether",
    },
}
FLAGS = ["env_id", "scenario", "guider", "delta", "learner_rl_coef", "seed"]
METRICS = [name for curves in PANELS.values() for name in curves]
COLUMNS = [*FLAGS, "global_step", *METRICS]


@dataclasses.dataclass
class Options:
    source: tyro.conf.Positional[str]  # folder of a run of MAGPO, or CSV file of --export
    export: str = ""  # CSV file to write
    out: str = "runs/backtracking.png"  # PNG to write


class InputError(ValueError):
    """What was asked for cannot be shown; its text is the one line that the user sees."""


def read_run(folder: str) -> pd.DataFrame:
    """The rows of a run's metrics.jsonl, with the run's flags beside them.

    Raises InputError if it is no run's folder.
    """
    try:
        with open(os.path.join(folder, "args.json")) as file:
            args = json.load(file)["args"]
        frame = pd.read_json(os.path.join(folder, "metrics.jsonl"), lines=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: is no run's folder: {error}") from error
    return frame.assign(**{name: args[name] for name in FLAGS if name in args})


def read(source: str) -> pd.DataFrame:
    """The columns of COLUMNS, a row for each evaluation.

    Raises InputError if it is no run of MAGPO, or has not been evaluated after some training, and
    OSError if there is no such file.
    """
    if not source.endswith(".csv"):
        frame = read_run(source)
    else:
        try:
            frame = pd.read_csv(source, dtype={"scenario": str})
        except ValueError as error:  # of pandas
            raise InputError(f"{source}: {error}") from error
    missing = [name for name in COLUMNS if name not in frame]
    if missing:
        raise InputError(f"{source}: there is no {', '.join(missing)}")
    return frame[COLUMNS].fillna({"scenario": ""})


def draw(frame: pd.DataFrame) -> plt.Figure:
    sns.set_theme(style="ticks", font_scale=1.1, rc={"axes.grid": True, "grid.alpha": 0.3})
    fig, axes = plt.subplots(2, 2, figsize=(12, 7), sharex=True, layout="constrained")
    for ax, (title, curves) in zip(axes.flat, PANELS.items()):
        for name, label in curves.items():
            ax.plot(frame["global_step"], frame[name], label=label, lw=2)
        ax.set_title(title)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        if len(curves) > 1:
            ax.legend(frameon=False)
    _, gap, outside, kl = axes.flat
    gap.axhline(0, color="0.3", lw=1)
    outside.yaxis.set_major_formatter(PercentFormatter(1))
    outside.set_ylim(bottom=0)
    kl.set_yscale("log")
    for ax in axes[1]:
        ax.set_xlabel("environment steps")
    run = frame.iloc[0]
    task = f"{run['env_id']} {run['scenario']}".strip()
    fig.suptitle(f"{task}, {run['guider']} guider, delta {run['delta']:g}, "
                 f"lambda {run['learner_rl_coef']:g}, seed {run['seed']}")
    return fig


def main(words: list | None = None) -> int:
    options = tyro.cli(Options, args=words, description=__doc__)
    plt.switch_backend("agg")  # without a display
    try:
        frame = read(options.source)
        if options.export:
            frame.to_csv(options.export, index=False, float_format="%.6g")
        os.makedirs(os.path.dirname(options.out) or ".", exist_ok=True)
        draw(frame).savefig(options.out, dpi=110)
    except (OSError, InputError) as error:
        print(f"backtracking.py: error: {error}", file=sys.stderr)
        return 2
    last = frame.iloc[-1]
    print(f"at the end: outside of the tether {last['losses/delta_clipfrac']:.1%}, "
          f"KL {last['losses/learner_kl']:.2g}, gap {last['eval/imitation_gap']:.2f}")
    print(f"largest: outside of the tether {frame['losses/delta_clipfrac'].max():.1%}, "
          f"KL {frame['losses/learner_kl'].max():.2g}, gap {frame['eval/imitation_gap'].max():.2f}")
    print(f"picture: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
