"""Meet, a whole environment of one's own: copy this file and change it. From the repository:

    python magpo_ff.py --env-id examples.my_env:Meet-v0 --total-timesteps 100_000 --num-steps 32

Three agents start somewhere on a line of seven places. In each step every agent stays or moves to
a place beside its own, and the team earns the more the closer together they are, 1 if all stand in
one place. They see where the others stand, but not where they go. An episode takes ten steps, and
is won if they stand in one place at its end.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jumanji
from jumanji import specs
from jumanji.env import Environment
from jumanji.types import restart, transition, truncation
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure

AGENTS = 3
PLACES = 7
STEPS = 10


class State(NamedTuple):
    place: jax.Array  # (N,) int32
    step_count: jax.Array  # () int32


class Observation(NamedTuple):
    agents_view: jax.Array  # (N, O), whatever an agent sees; its id is added by the script
    action_mask: jax.Array  # (N, A) bool, True where the action is legal


class Meet(Environment):
    """The game described above; whatever `reset` and `step` do has to be traceable by JAX."""

    def reset(self, key):
        place = jax.random.randint(key, (AGENTS,), 0, PLACES)
        state = State(place, jnp.int32(0))
        return state, restart(self.observe(state), extras={"won": jnp.bool_(False)})

    def step(self, state, action):
        """action: (N,) int32, 0: stay, 1: to the left, 2: to the right."""
        place = state.place + jnp.array([0, -1, 1])[action]
        state = State(place, state.step_count + 1)
        last = state.step_count == STEPS
        distance = jnp.max(place) - jnp.min(place)
        reward = 1 - distance / (PLACES - 1)  # for the team; (N,) rewards are summed
        extras = {"won": last & (distance == 0)}  # for eval/win_rate; may be left out
        results = (reward, self.observe(state), jnp.float32(1), extras)
        return state, jax.lax.cond(last, truncation, transition, *results)

    def observe(self, state):
        others = state.place - state.place[:, None]  # (N, N), how far they are to the right
        view = jnp.concatenate([state.place[:, None], others], axis=1)
        legal = [state.place >= 0, state.place > 0, state.place < PLACES - 1]
        return Observation(view / PLACES, jnp.stack(legal, axis=1))

    @property
    def observation_spec(self):
        view = specs.Array((AGENTS, 1 + AGENTS), jnp.float32, "agents_view")
        mask = specs.BoundedArray((AGENTS, 3), bool, False, True, "action_mask")
        return specs.Spec(Observation, "ObservationSpec", agents_view=view, action_mask=mask)

    @property
    def action_spec(self):
        return specs.MultiDiscreteArray(jnp.full(AGENTS, 3))  # N agents with 3 actions each

    def animate(self, states, interval=200, save_path=None):
        """Draws a frame for each state; for `examples/enjoy.py --gif`, may be left out."""
        figure = Figure(figsize=(8, 3))
        ax = figure.subplots()

        def draw(state):
            ax.clear()
            ax.scatter(state.place, range(AGENTS), s=500, c=range(AGENTS))
            ax.set(xlim=(-1, PLACES), ylim=(-1, AGENTS), yticks=[], title=f"{state.step_count}")

        FuncAnimation(figure, draw, states, interval=interval).save(save_path)


jumanji.register(id="Meet-v0", entry_point=f"{__name__}:Meet")
