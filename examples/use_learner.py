"""A trained learner in a program of your own: one agent's observation in, one action out.

    python examples/use_learner.py runs/CoordSum-v0__3x10=10__magpo_ff__1__1760000000

As a program it plays one episode in which each agent decides by itself. To copy: `load_learner`,
and `decide`, or `decide_with_memory` for magpo_rec.py.
"""

import importlib
import json
import os
import sys

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts


def load_learner(script, path):
    """The network and its parameters, whose shapes tell its sizes."""
    params = unflatten_dict(load_file(path), sep=",")
    num_actions = params["params"]["Dense_2"]["bias"].size
    hidden_dim = params["params"]["Dense_0"]["bias"].size
    return script.Learner(num_actions, hidden_dim), params


def decide(learner, params, view, action_mask):
    """view (O,), the agent's one-hot id first; action_mask (A,) -> the likeliest legal action."""
    logits = learner.apply(params, view)
    return jnp.argmax(jnp.where(action_mask, logits, -jnp.inf))


def decide_with_memory(learner, params, view, action_mask, timestep, hidden):
    """The same with hidden (F,) -> action, hidden for the agent's next step.

    timestep: steps since the episode began; at 0 hidden is forgotten, and may be anything.
    """
    view = view[None, None, None]  # (1, 1, 1, O): one game, one step, one agent
    logits, hidden = learner.apply(params, view, jnp.full((1, 1), timestep), hidden[None, None])
    return jnp.argmax(jnp.where(action_mask, logits[0, 0, 0], -jnp.inf)), hidden[0, 0]


def play(env, learner, params, has_memory):
    """One episode of a Jumanji environment, agent after agent -> steps, the sum of all rewards."""
    state, timestep = jax.jit(env.reset)(jax.random.PRNGKey(0))
    num_agents = timestep.observation.action_mask.shape[0]
    agent_id = jnp.eye(num_agents)
    hidden = [jnp.zeros(learner.hidden_dim)] * num_agents
    choose = jax.jit(decide_with_memory if has_memory else decide, static_argnums=0)
    step = jax.jit(env.step)
    step_count = 0
    total = 0.0
    while not timestep.last():
        actions = []
        for j in range(num_agents):
            seen = timestep.observation.agents_view[j].ravel().astype(jnp.float32)
            view = jnp.concatenate([agent_id[j], seen])
            mask = timestep.observation.action_mask[j]
            if has_memory:
                past = (float(step_count), hidden[j])
                action, hidden[j] = choose(learner, params, view, mask, *past)
            else:
                action = choose(learner, params, view, mask)
            actions.append(action)
        state, timestep = step(state, jnp.stack(actions).astype(jnp.int32))
        step_count += 1
        total += float(jnp.sum(timestep.reward))
    return step_count, total


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = sys.argv[1]
    try:
        with open(os.path.join(folder, "args.json")) as file:
            about = json.load(file)
        script = importlib.import_module(about["script"].removesuffix(".py"))
        env = script.make_env(about["args"]["env_id"], about["args"]["scenario"]).env
        learner, params = load_learner(script, os.path.join(folder, "learner.safetensors"))
    except Exception as error:  # a damaged file may raise about any
        reason = str(error).partition("\n")[0]
        print(f"use_learner.py: error: {folder}: {reason}", file=sys.stderr)
        sys.exit(2)
    step_count, total = play(env, learner, params, hasattr(script, "init_hidden"))
    print(f"{step_count} steps, return {total:.3f}")


if __name__ == "__main__":
    main()
