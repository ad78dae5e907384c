"""A trained learner in a program of your own: one agent's observation in, one action out.

    python examples/use_learner.py runs/CoordSum-v0__3x10=10__magpo_ff__1__1760000000

As a program it plays one episode in which each agent decides by itself. To copy: `load_script` and
`load_learner`, and `decide`, or `decide_with_memory` for scripts with memory.
"""

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # to tasks.py


def load_script(folder):
    """The script that made a run, and its flags. It lies in a folder above the run, in the current
    directory, or in this repository.
    """
    about = json.loads((folder / "args.json").read_text())
    if "starts" not in about:
        raise ValueError("an earlier version made it, with features at other scales")
    places = [*folder.resolve().parents, Path.cwd(), ROOT, ROOT / "baselines", ROOT / "variants"]
    beside = [str(place) for place in places if (place / about["script"]).exists()]
    if not beside:
        looked = ", ".join(dict.fromkeys(map(str, places)))
        raise FileNotFoundError(f"there is no {about['script']} in {looked}")
    sys.path.insert(0, beside[0])
    script = importlib.import_module(about["script"].removesuffix(".py"))
    return script, script.Args(**about["args"])


def load_learner(script, args, env, path):
    """The network as the script makes it, and its parameters."""
    networks = script.make_networks(args, env)
    (learner,) = (network for network in networks if isinstance(network, script.Learner))
    return learner, unflatten_dict(load_file(path), sep=",")


def params_of_agent(params, agent):
    """One agent's, where each has its own (HAPPO: stacked to (N, ..)), else those of all."""
    if params["params"]["Dense_0"]["bias"].ndim == 1:
        return params
    return jax.tree.map(lambda x: x[agent], params)


def decide(learner, params, obs):
    """The likeliest action of one agent.

    obs: an Observation of the script, agents_view (O,) with the agent's one-hot id first, the rest
    as `make_env` tells it (D1: features with bounds are scaled), and action_mask (A,). Continuous
    actions are u (A,), and tanh(u), scaled to the bounds, is done.
    """
    return learner.apply(params, obs).mode()


def decide_with_memory(learner, params, obs, timestep, hidden):
    """The same with hidden (F,) -> action, hidden for the agent's next step.

    timestep: steps since the episode began; at 0 hidden is forgotten, and may be anything.
    """
    obs = jax.tree.map(lambda x: x[None, None, None], obs)  # one game, one step, one agent
    timestep = jnp.reshape(timestep, (1, 1))
    policy, hidden = learner.apply(params, obs, timestep, hidden[None, None])
    return policy.mode()[0, 0, 0], hidden[0, 0]


def play(env, learner, params, has_memory):
    """One episode of a TeamEnv, agent after agent -> return, length and won."""
    agents = range(env.num_agents)
    own_params = [params_of_agent(params, j) for j in agents]
    hidden = [jnp.zeros(learner.hidden_dim) for _ in agents]
    choose = jax.jit(decide_with_memory if has_memory else decide, static_argnums=0)
    step = jax.jit(env.step)
    state = jax.jit(env.reset)(jax.random.PRNGKey(0))
    last = False
    while not last:
        actions = []
        for j in agents:
            own_obs = jax.tree.map(lambda x: x[j], state.obs)
            if has_memory:
                past = (state.episode["length"], hidden[j])
                action, hidden[j] = choose(learner, own_params[j], own_obs, *past)
            else:
                action = choose(learner, own_params[j], own_obs)
            actions.append(action)
        state, _, _, last = step(state, jnp.stack(actions))
    return state.episode


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    try:
        script, args = load_script(folder)
        env = script.make_env(args.env_id, args.scenario)
        learner, params = load_learner(script, args, env, folder / "best_learner.safetensors")
    except Exception as error:  # a damaged file may raise about any
        reason = str(error).partition("\n")[0]
        print(f"use_learner.py: error: {folder}: {reason}", file=sys.stderr)
        sys.exit(2)
    episode = play(env, learner, params, hasattr(script, "init_hidden"))
    print(f"{episode['length']:.0f} steps, return {episode['return']:.3f}")


if __name__ == "__main__":
    main()
