r"""Where a short tether can hold MAGPO: the policies of a run on a symmetric saddle, over training.

    python docs/saddle.py --export benchmark/results/saddle.csv
    python docs/saddle.py --start-delta 4 --export benchmark/results/saddle_freed.csv
    python docs/saddle.py benchmark/results/saddle.csv benchmark/results/saddle_freed.csv

Trains magpo_ff.py on CoordSum `3x10=10` with the mat guider as in Figure 1, seed 9; after every few
iterations it writes down all there is to know of both policies. The target never changes and
nothing else is seen, so that the learner is a table of three agents and ten digits, and the guider
one of the thousand triples. Other flags are those of magpo_ff.py; those of saving, logging and
evaluation change nothing here. Named CSV files, which --export has written, are drawn in place of a
run.

The picture has a column a run: what the agents of the learner say, a panel each, and in the last
panel how often the sum is right: for the guider, for the guider if its agents did not hear each
other, and for the learner.
"""
import dataclasses
import functools
import os
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import tyro
from matplotlib.ticker import EngFormatter, PercentFormatter

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(ROOT)

import magpo_ff  # noqa: E402

AGENTS, DIGITS, TARGET = 3, 10, 10
TRIPLES = np.stack(np.unravel_index(np.arange(DIGITS**AGENTS), (DIGITS,) * AGENTS), axis=-1)
RIGHT = TRIPLES.sum(axis=-1) == TARGET  # (1000,)
FLAGS = magpo_ff.Args(
    env_id="CoordSum-v0", scenario="3x10=10", seed=9, guider="mat", delta=1.1,
    learner_rl_coef=4.0, gamma=0.9, num_envs=16, total_timesteps=150_000, num_devices=1)


@dataclasses.dataclass
class Options:
    sources: tyro.conf.Positional[tuple[str, ...]] = ()  # CSV files of --export, drawn as they are
    every: int = 4  # iterations between two looks at the policies
    start_delta: float = 0.0  # above 1: the tether's length in the first third of training
    export: str = ""  # CSV file to write
    out: str = "runs/saddle.png"  # PNG to write
    run: tyro.conf.OmitArgPrefixes[magpo_ff.Args] = dataclasses.field(default_factory=lambda: FLAGS)


# -------------------- The policies as tables ------------------------------------------------------
def tables(guider, learner, params, obs) -> tuple:
    """Probabilities of the guider's triples (1000,) and of the learner's digits (3, 10).

    obs: what the agents see in every step, (N, ...).
    """
    learner_table = learner.apply(params["learner"], obs).probs
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(TRIPLES), *x.shape)), obs)
    policy, _ = guider.apply(params["guider"], many, TRIPLES)
    return jnp.exp(jnp.sum(policy.log_prob(TRIPLES), axis=-1)), learner_table


def independent(digits: np.ndarray) -> np.ndarray:
    """Probabilities of the triples (1000,) if each agent draws from its own row of (3, 10)."""
    return np.einsum("i,j,k->ijk", *digits).reshape(-1)


def marginals(triples: np.ndarray) -> np.ndarray:
    """What each agent says, whatever the others do: (1000,) -> (3, 10)."""
    cube = triples.reshape((DIGITS,) * AGENTS)
    return np.stack([cube.sum(axis=(1, 2)), cube.sum(axis=(0, 2)), cube.sum(axis=(0, 1))])


def make_rows(name: str, global_step: int, triples: np.ndarray, digits: np.ndarray) -> list:
    """A row for each agent and digit; how often the sum is right stands in each of them."""
    guider_digits = marginals(triples)
    chances = {
        "guider": triples[RIGHT].sum(),
        "guider, deaf": independent(guider_digits)[RIGHT].sum(),
        "learner": independent(digits)[RIGHT].sum(),
    }
    about = {"run": name, "global_step": global_step}
    return [
        about | chances | {"agent": agent, "digit": digit, "probability": digits[agent, digit]}
        for agent in range(AGENTS) for digit in range(DIGITS)
    ]


def record(options: Options) -> pd.DataFrame:
    """Trains a run and keeps its policies.

    Raises ValueError on flags that cannot work; on those of magpo_ff.py it exits.
    """
    args = options.run
    if options.every < 1:
        raise ValueError(f"--every {options.every}: must be above 0")
    if options.start_delta != 0 and not options.start_delta > 1:
        raise ValueError(f"--start-delta {options.start_delta}: must be above 1, or 0 for none")
    magpo_ff.start_jax(args)
    magpo_ff.check_args(args)
    env = magpo_ff.make_env(args.env_id, args.scenario)
    if (env.num_agents, env.num_actions) != (AGENTS, DIGITS) or "=" not in args.scenario:
        raise ValueError(f"--scenario {args.scenario}: must be 3x10={TARGET}")
    guider, learner = magpo_ff.make_networks(args, env)

    def train_iteration(delta, state):
        now = dataclasses.replace(args, delta=delta)
        return magpo_ff.train_iteration(now, env, guider, learner, state)

    devices = jax.devices()[: args.num_devices]
    pmap = functools.partial(jax.pmap, axis_name="device", devices=devices)
    init = functools.partial(magpo_ff.init_state, args, env, guider, learner)
    init, iterate = pmap(init, in_axes=(None, 0)), pmap(train_iteration, in_axes=(None, 0))
    look = jax.jit(lambda params, obs: tables(guider, learner, params, obs))

    key, params_key, _ = jax.random.split(jax.random.PRNGKey(args.seed), 3)  # as in `train`
    state = init(params_key, jax.random.split(key, args.num_devices))
    steps_per_iteration = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // steps_per_iteration
    name = f"seed {args.seed}, delta {args.delta:g}"
    if options.start_delta:
        name = f"seed {args.seed}, delta {options.start_delta:g}, then {args.delta:g}"
    rows = []
    for iteration in range(num_iterations + 1):
        if iteration % options.every == 0 or iteration == num_iterations:
            params = jax.tree.map(lambda x: np.asarray(x)[0], state.params)
            obs = jax.tree.map(lambda x: np.asarray(x)[0, 0], state.env_state.obs)
            triples, digits = jax.device_get(look(params, obs))
            rows += make_rows(name, iteration * steps_per_iteration, triples, digits)
            print(f"global_step={rows[-1]['global_step']}  learner {rows[-1]['learner']:.3f}")
        if iteration < num_iterations:
            early = options.start_delta and iteration < num_iterations / 3
            state, _ = iterate(options.start_delta if early else args.delta, state)
    return pd.DataFrame(rows)


def read(source: str) -> pd.DataFrame:
    """A file of --export. Raises ValueError if it is another one."""
    frame = pd.read_csv(source)
    for column in ("run", "global_step", "agent", "digit", "probability", "guider, deaf"):
        if column not in frame:
            raise ValueError(f"{source}: has no column {column}")
    return frame


# -------------------- The picture -----------------------------------------------------------------
def draw(frame: pd.DataFrame) -> plt.Figure:
    """A column a run, a row an agent, and a row for the sums."""
    sns.set_theme(style="ticks", font_scale=0.9)
    runs = frame["run"].unique()
    size = {"figsize": (1 + 5 * len(runs), 7.5), "layout": "constrained"}
    fig, axes = plt.subplots(AGENTS + 1, len(runs), sharex="col", squeeze=False, **size)
    for run, column in zip(runs, axes.T):
        of_run = frame[frame["run"] == run]
        for agent, ax in enumerate(column[:AGENTS]):
            table = of_run[of_run["agent"] == agent].pivot(
                index="global_step", columns="digit", values="probability")
            colours = sns.color_palette("tab10", DIGITS)
            ax.stackplot(table.index, table.T, colors=colours, labels=table.columns)
            ax.set(ylim=(0, 1), ylabel=f"agent {agent} says")
            ax.margins(x=0)
        chances = of_run.groupby("global_step")[["guider", "guider, deaf", "learner"]].first()
        sns.lineplot(chances, ax=column[-1], palette="colorblind")
        column[-1].set(ylim=(0, 1.02), xlabel="environment steps", ylabel="sum is right")
        column[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
        column[-1].legend(frameon=False)
        for ax in column:
            ax.yaxis.set_major_formatter(PercentFormatter(1))
        column[0].set_title(run)
    areas, digits = axes[0, 0].get_legend_handles_labels()
    fig.legend(areas, digits, title="digit", loc="outside right upper", frameon=False)
    return fig


def main(words: list | None = None) -> int:
    options = tyro.cli(Options, args=words, description=__doc__)
    plt.switch_backend("agg")  # without a display
    try:
        if options.sources:
            frame = pd.concat([read(source) for source in options.sources])
        else:
            frame = record(options)
        if options.export:
            frame.to_csv(options.export, index=False, float_format="%.4g")
        os.makedirs(os.path.dirname(options.out) or ".", exist_ok=True)
        draw(frame).savefig(options.out, dpi=110)
    except (OSError, ValueError) as error:
        print(f"saddle.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
