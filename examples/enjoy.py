"""Plays a trained team: figures over many episodes, and a GIF of one. From the repository:

    python examples/enjoy.py runs/CoordSum-v0__3x10=10__magpo_ff__1__1760000000
    python examples/enjoy.py RUN_DIR --guider --which last --episodes 1000 --gif guider.gif
"""

import dataclasses
import importlib
import json
import os
import sys
from typing import Literal

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "baselines")]  # the scripts


@dataclasses.dataclass
class Options:
    run_dir: tyro.conf.Positional[str]  # folder of a run, of any of the scripts
    episodes: int = 320  # episodes behind the figures
    which: Literal["best", "last"] = "best"  # the networks of which evaluation
    guider: bool = False  # play the guider, not the learner
    greedy: bool = False  # take the likeliest actions, not sampled ones
    seed: int = 0  # seed of environments and actions
    gif: str = ""  # file for a GIF of one episode; "": none
    max_frames: int = 100  # states to show, the first ones of a longer episode


def load_run(options):
    """The run's script, flags, environment, networks and their parameters."""
    with open(os.path.join(options.run_dir, "args.json")) as file:
        about = json.load(file)
    script = importlib.import_module(about["script"].removesuffix(".py"))
    changes = {"eval_episodes": options.episodes, "eval_greedy": options.greedy, "num_devices": 1}
    args = script.Args(**about["args"] | changes)
    env = script.make_env(args.env_id, args.scenario)
    prefix = "best_" if options.which == "best" else ""
    if options.guider and "guider" not in script.Pair._fields:
        raise ValueError(f"--guider: {about['script']} has none")
    params = {}
    for network in script.Pair._fields:
        path = os.path.join(options.run_dir, f"{prefix}{network}.safetensors")
        params[network] = unflatten_dict(load_file(path), sep=",")
    networks = script.Pair(*script.make_networks(args, env))
    return script, args, env, networks, script.Pair(**params)


def play_episode(options, script, args, env, networks, params):
    """Plays one episode step by step -> its first states, and the sum of its rewards by then."""
    name = "guider" if options.guider else "learner"
    network = getattr(networks, name)
    has_memory = hasattr(script, "init_hidden")
    hidden = None
    if has_memory:
        guider = [networks.guider] if "guider" in networks._fields else []
        hidden = getattr(script.init_hidden(args, env, *guider, 1), name)

    @jax.jit
    def step(state, obs, step_count, hidden, key):
        obs = jax.tree.map(lambda x: x[None], obs)  # (1, N, ...), a batch of one
        past = (jnp.full(1, step_count, float), hidden) if has_memory else ()
        act = getattr(script, f"{name}_act")
        found = act(network, getattr(params, name), obs, *past, key, options.greedy)
        found = found if isinstance(found, tuple) else (found,)  # action, .., hidden
        state, outcome = env.step(state, found[0][0])
        return state, outcome, found[-1] if has_memory else None

    key = jax.random.PRNGKey(options.seed)
    state, obs = jax.jit(env.reset)(key)
    states = [state]
    total = 0.0
    last = False
    while not last and len(states) < options.max_frames:
        key, act_key = jax.random.split(key)
        state, outcome, hidden = step(state, obs, len(states) - 1, hidden, act_key)
        states.append(state)
        obs = outcome.obs
        total += float(jnp.mean(outcome.reward))
        last = bool(outcome.last)
    return states, total


def main() -> None:
    options = tyro.cli(Options)
    try:
        script, args, env, networks, params = load_run(options)
        if options.gif and not hasattr(env.env, "animate"):
            raise ValueError(f"--gif {options.gif}: {args.env_id} cannot be drawn")
    except Exception as error:  # a damaged file may raise about any
        reason = str(error).partition("\n")[0]
        print(f"enjoy.py: error: {options.run_dir}: {reason}", file=sys.stderr)
        sys.exit(2)

    who = 1 if options.guider else 0  # the compiler leaves the other one's episodes out
    play = jax.jit(lambda params, key: script.evaluate(args, env, *networks, params, key)[who])
    episodes = play(params, jax.random.PRNGKey(options.seed))
    figures = {"mean return": episodes.returns, "mean length": episodes.length}
    if env.has_win_rate:
        figures["win rate"] = episodes.won
    for name, x in figures.items():
        interval = 1.96 * np.std(x, ddof=1) / np.sqrt(options.episodes)
        print(f"{name}: {np.mean(x):.3f} +- {interval:.3f} (95%, normal approximation)")
    if options.gif:
        states, total = play_episode(options, script, args, env, networks, params)
        # Half the usual resolution makes a file of a third of the size.
        with matplotlib.rc_context({"savefig.dpi": 50, "animation.writer": "pillow"}):
            matplotlib.use("Agg")  # needs no display
            env.env.animate(states, interval=200, save_path=options.gif)
        print(f"{options.gif}: {len(states)} states, return {total:.3f}")


if __name__ == "__main__":
    main()
