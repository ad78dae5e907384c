"""Plays a trained team: figures over many episodes, and a GIF of one. From the repository:

    python examples/enjoy.py runs/CoordSum-v0__3x10=10__magpo_ff__1__1760000000
    python examples/enjoy.py RUN_DIR --guider --which last --episodes 1000 --gif guider.gif
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import matplotlib
import numpy as np
import tyro
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent))

from use_learner import load_script  # noqa: E402


@dataclasses.dataclass
class Options:
    run_dir: tyro.conf.Positional[Path]  # folder of a run, of any of the scripts
    episodes: int = 320  # episodes behind the figures
    which: Literal["best", "last"] = "best"  # the networks of which evaluation
    guider: bool = False  # play the guider, not the learner
    greedy: bool = False  # take the likeliest actions, not sampled ones
    seed: int = 0  # seed of environments and actions
    gif: str = ""  # file for a GIF of one episode; "": none
    max_frames: int = 100  # states to show, the first ones of a longer episode


def load_team(options):
    """The run's script, its environment, how the team acts, and what it remembers at first: of a
    script with memory a function of the number of games, else None.
    """
    script, args = load_script(options.run_dir)
    env = script.make_env(args.env_id, args.scenario)
    name = "guider" if options.guider else "learner"
    networks = {type(x).__name__.lower(): x for x in script.make_networks(args, env)}
    if name not in networks:
        raise ValueError(f"--guider: {script.SCRIPT} has none")
    prefix = "best_" if options.which == "best" else ""

    def load(network):
        file = options.run_dir / f"{prefix}{network}.safetensors"
        return unflatten_dict(load_file(file), sep=",")

    act = partial(getattr(script, f"{name}_act"), greedy=options.greedy)
    if not hasattr(script, "init_hidden"):
        return script, env, partial(act, networks[name], load(name)), None
    make_hidden = partial(script.init_hidden, args, env)
    if options.guider:  # with memory its learner watches (D20)
        params = {network: load(network) for network in networks}
        return script, env, partial(act, *networks.values(), params), make_hidden
    act = partial(act, networks[name], load(name))
    return script, env, act, lambda games: make_hidden(games)[name]


def play_episode(options, env, act, make_hidden):
    """Plays one episode step by step -> its first states, and its return up to then."""

    @jax.jit
    def step(state, hidden, key):
        batch = jax.tree.map(lambda x: x[None], state)  # of one
        past = (batch.episode["length"], hidden) if make_hidden else ()
        action, *_, hidden = act(batch.obs, *past, key)
        state, _, _, last = env.step(state, action[0])
        return state, last, hidden if make_hidden else None

    key = jax.random.PRNGKey(options.seed)
    state, hidden = jax.jit(env.reset)(key), make_hidden and make_hidden(1)
    states, last = [state.game], False
    while not last and len(states) < options.max_frames:
        key, act_key = jax.random.split(key)
        state, last, hidden = step(state, hidden, act_key)
        states.append(state.game)
    return states, state.episode["return"]


def main():
    options = tyro.cli(Options)
    try:
        script, env, act, make_hidden = load_team(options)
        if min(options.episodes, options.max_frames) < 1:
            raise ValueError("--episodes and --max-frames: must be 1 or more")
        if options.gif and getattr(env.env, "animate", None) is None:
            needs = "animate(states, interval, save_path), as examples/my_env.py has it"
            raise ValueError(f"--gif {options.gif}: the environment needs a method {needs}")
        gif = Path(options.gif)
        if options.gif and (gif.suffix != ".gif" or not gif.parent.is_dir()):
            raise ValueError(f"--gif {options.gif}: must be a .gif in a folder that exists")
    except Exception as error:  # a damaged file may raise about any
        reason = str(error).partition("\n")[0]
        print(f"enjoy.py: error: {options.run_dir}: {reason}", file=sys.stderr)
        sys.exit(2)

    hidden = [make_hidden(options.episodes)] if make_hidden else []
    play = jax.jit(partial(script.play, env, act, *hidden, options.episodes))
    episode = play(jax.random.PRNGKey(options.seed))
    figures = {"mean return": episode["return"], "mean length": episode["length"]}
    if env.has_win_rate:
        figures["win rate"] = episode["won"]
    for name, x in figures.items():  # not a number, if an episode goes on without an end
        figure = f"{name}: {np.mean(x):.3f}"
        if options.episodes > 1:
            interval = 1.96 * np.std(x, ddof=1) / np.sqrt(options.episodes)
            figure += f" +- {interval:.3f} (95%, normal approximation)"
        print(figure)
    if options.gif:
        states, total = play_episode(options, env, act, make_hidden)
        # Half the usual resolution makes a file of a third of the size.
        with matplotlib.rc_context({"savefig.dpi": 50, "animation.writer": "pillow"}):
            matplotlib.use("Agg")  # needs no display
            env.env.animate(states, interval=200, save_path=options.gif)
        print(f"{options.gif}: {len(states)} states, return {total:.3f}")


if __name__ == "__main__":
    main()
