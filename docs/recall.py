r"""Recall, a game that needs memory: examples/my_env.py with another rule, in three methods.

    python magpo_rec.py --env-id docs.recall:Recall-v0 --num-envs 32 --num-steps 32 \
        --total-timesteps 100_000 --num-evals 5

Three agents see a number, 0, 1 or 2, in the first of ten steps alone. In each step the team earns 1
if all of them say it. Who forgets it can say one number all the time, and earns 4 on average: 1 in
the first step, and 1 in each of the others if that is the number. Who remembers it earns 10.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jumanji
from jumanji.types import restart, transition, truncation

from examples.my_env import AGENTS, STEPS, Meet, Observation


class State(NamedTuple):
    number: jax.Array  # () int32
    step_count: jax.Array  # () int32


class Recall(Meet):
    """Sizes and types are those of Meet; what happens and what is seen is not."""

    animate = None  # that of Meet draws other states

    def reset(self, key):
        number = jax.random.randint(key, (), 0, 3)
        state = State(number, jnp.int32(0))
        return state, restart(self.observe(state))

    def step(self, state, action):
        """action: (N,) int32, what the agents say."""
        reward = jnp.all(action == state.number).astype(jnp.float32)
        state = state._replace(step_count=state.step_count + 1)
        last = state.step_count == STEPS
        results = (reward, self.observe(state), jnp.float32(1))
        return state, jax.lax.cond(last, truncation, transition, *results)

    def observe(self, state):
        shown = jax.nn.one_hot(state.number, 1 + AGENTS) * (state.step_count == 0)
        view = jnp.broadcast_to(shown, (AGENTS, 1 + AGENTS))
        return Observation(view, jnp.ones((AGENTS, 3), bool))


jumanji.register(id="Recall-v0", entry_point=f"{__name__}:Recall")
