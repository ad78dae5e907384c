"""A trained learner in a program of your own: one agent's observation in, one action out.

    python examples/use_learner.py runs/CoordSum-v0__3x10=10__magpo_ff__1__1760000000

As a program it plays one episode in which each agent decides by itself. To copy: `load_learner`,
`likeliest`, and `decide`, or `decide_with_memory` for magpo_rec.py.
"""

import importlib
import json
import os
import sys

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "baselines")]  # the scripts


def load_learner(script, path):
    """The network and its parameters, whose shapes tell its sizes."""
    params = unflatten_dict(load_file(path), sep=",")
    num_actions = params["params"]["Dense_2"]["bias"].shape[-1]
    hidden_dim = params["params"]["Dense_0"]["bias"].shape[-1]
    continuous = "AppendLogStd_0" in params["params"]
    return script.Learner(num_actions, hidden_dim, continuous), params


def params_of_agent(params, agent):
    """One agent's, where each has its own (HAPPO: stacked to (N, ...)), else those of all."""
    if params["params"]["Dense_0"]["bias"].ndim == 1:
        return params
    return jax.tree.map(lambda x: x[agent], params)


def likeliest(logits, action_mask):
    """logits (A,) -> the likeliest legal action; if continuous, (2 A,) -> the mean, before tanh."""
    num_actions = action_mask.size
    if logits.size == 2 * num_actions:
        return logits[:num_actions]
    return jnp.argmax(jnp.where(action_mask, logits, -jnp.inf))


def decide(learner, params, view, action_mask):
    """view (O,), the agent's one-hot id first; action_mask (A,) -> action, see `likeliest`."""
    return likeliest(learner.apply(params, view), action_mask)


def decide_with_memory(learner, params, view, action_mask, timestep, hidden):
    """The same with hidden (F,) -> action, hidden for the agent's next step.

    timestep: steps since the episode began; at 0 hidden is forgotten, and may be anything.
    """
    view = view[None, None, None]  # (1, 1, 1, O): one game, one step, one agent
    logits, hidden = learner.apply(params, view, jnp.full((1, 1), timestep), hidden[None, None])
    return likeliest(logits[0, 0, 0], action_mask), hidden[0, 0]


def play(team_env, learner, params, has_memory):
    """One episode of a TeamEnv, agent after agent -> steps, the team's return."""
    num_agents = team_env.num_agents
    own_params = [params_of_agent(params, j) for j in range(num_agents)]
    hidden = [jnp.zeros(learner.hidden_dim)] * num_agents
    choose = jax.jit(decide_with_memory if has_memory else decide, static_argnums=0)
    step = jax.jit(team_env.step)
    state, obs = jax.jit(team_env.reset)(jax.random.PRNGKey(0))
    step_count = 0
    total = 0.0
    last = False
    while not last:
        actions = []
        for j in range(num_agents):
            view, mask = obs.agents_view[j], obs.action_mask[j]
            if has_memory:
                past = (float(step_count), hidden[j])
                action, hidden[j] = choose(learner, own_params[j], view, mask, *past)
            else:
                action = choose(learner, own_params[j], view, mask)
            actions.append(action)
        # Continuous actions are brought within their bounds here, by `TeamEnv.bounded`.
        state, outcome = step(state, jnp.stack(actions))
        obs, last = outcome.obs, bool(outcome.last)
        step_count += 1
        total += float(jnp.mean(outcome.reward))
    return step_count, total


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = sys.argv[1]
    try:
        with open(os.path.join(folder, "args.json")) as file:
            about = json.load(file)
        script = importlib.import_module(about["script"].removesuffix(".py"))
        env = script.make_env(about["args"]["env_id"], about["args"]["scenario"])
        learner, params = load_learner(script, os.path.join(folder, "learner.safetensors"))
    except Exception as error:  # a damaged file may raise about any
        reason = str(error).partition("\n")[0]
        print(f"use_learner.py: error: {folder}: {reason}", file=sys.stderr)
        sys.exit(2)
    step_count, total = play(env, learner, params, hasattr(script, "init_hidden"))
    print(f"{step_count} steps, return {total:.3f}")


if __name__ == "__main__":
    main()
