"""CoordSum, the coordination game of Multi-Agent Guided Policy Optimization (MAGPO), as a jumanji
environment.

The paper (https://arxiv.org/abs/2507.18059) plays it in four sizes. All N agents see the same
target; each picks one of A integers 0..A-1, without seeing the others' choices. The team's reward
for a step is

    0  if the integers do not sum to the target,
    1  if they do, but an observer guessed agent 0's integer,
    2  if they do and the observer was wrong.

The observer guesses what agent 0 has played most often for this target in this episode (ties: the
smallest; nothing yet: 0), and takes note of agent 0's integer afterwards whether or not the sum
matched. So the agents must agree on how to split the target, and agent 0 must stay unpredictable in
a way that the others can follow.

`history` says what "for this target" means:
    "target"    each target has its own row of counts. This is the game as described, and the
                default.
    "released"  there are only A rows, and target t uses row min(t, A - 1): all targets from A - 1
                on share one row. The released code of the paper has a record of A rows, and JAX
                clamps an index that is out of bounds. Play this one to compare with published
                numbers: the observer is much weaker.

Sums reach only N * (A - 1), so some targets may be impossible (28 and 29 in 3x10-30), and target 0
never pays more than 1 (agent 0 must play 0, which is also the first guess): 3x10-30 pays at most
183.3 per episode on average.

    env = CoordSum(**parse_scenario("3x10-30"))
    # or, after `import coordsum`: jumanji.make("CoordSum-v0")
    state, timestep = jax.jit(env.reset)(jax.random.key(0))
    state, timestep = jax.jit(env.step)(state, jnp.array([4, 3, 5]))
"""

import re
from functools import cached_property
from typing import NamedTuple, Optional, Sequence, Tuple

import chex
import jax
import jax.numpy as jnp
import jumanji
import matplotlib.animation
import numpy as np
from chex import dataclass
from jumanji import specs
from jumanji.env import Environment
from jumanji.types import TimeStep, restart, termination, transition
from matplotlib.figure import Figure

SCENARIO = re.compile(r"([0-9]+)x([0-9]+)(?:-([0-9]+)|=([0-9]+))(-released)?")
RULE = (
    "write NxA-M (targets 0..M-1) or NxA=T (always T), each with or without -released, "
    "e.g. 3x10-30 or 3x10=10"
)
INK, GREY, GREEN, RED, ORANGE = "#22313f", "#8c99a6", "#2a9d6f", "#d1495b", "#e08e2b"


@dataclass
class State:
    """The state of one game: N agents, A actions; R rows of counts, see `CoordSum.num_rows`.

    The last five fields are for `render` and `animate`: what happened in the step that led here,
    zeros after a reset.
    """

    key: chex.PRNGKey  # draws the targets still to come
    step_count: chex.Array  # () int32
    target: chex.Array  # () int32, the target that the next action answers
    counts: chex.Array  # (R, A) int32, how often agent 0 played each action in this episode
    last_target: chex.Array  # () int32
    last_actions: chex.Array  # (N,) int32
    last_guess: chex.Array  # () int32, the observer's guess of last_actions[0]
    last_reward: chex.Array  # () float32
    episode_return: chex.Array  # () float32, sum of the rewards so far


class Observation(NamedTuple):
    """What the agents see; the same for each of the N agents."""

    agents_view: chex.Array  # (N, 1) int32, the target, not normalised
    action_mask: chex.Array  # (N, A) bool, all True
    step_count: chex.Array  # () int32


class CoordSum(Environment[State, specs.MultiDiscreteArray, Observation]):
    """N agents pick integers that should sum to a target while an observer tries to predict agent
    0.

    - observation: `Observation`
    - action: (N,) int32 within 0..A-1. Not checked: `step` is traced.
    - reward: () float32, 0, 1 or 2 for the whole team (see the top of this file)
    - the episode terminates (discount 0) after `time_limit` steps and never earlier
    """

    def __init__(
        self,
        num_agents: int = 3,
        num_actions: int = 10,
        max_target: int = 30,
        target: Optional[int] = None,
        time_limit: int = 100,
        history: str = "target",
    ) -> None:
        """Creates the game; `parse_scenario` turns a name such as 3x10-30 into these arguments.

        Args:
            num_agents: N.
            num_actions: A, each agent picks from 0..A-1.
            max_target: M, exclusive: every step's target is uniform on 0..M-1. Not used if
                `target` is given.
            target: if given, the target of every step.
            time_limit: steps per episode.
            history: "target" or "released", what the observer's guess is based on (see the top of
                this file).

        Raises:
            ValueError: if a size is not a whole number >= 1, `target` is no sum of the agents'
                integers, or `history` is unknown.
        """
        _check_arguments(num_agents, num_actions, max_target, target, time_limit, history)
        self.num_agents = num_agents
        self.num_actions = num_actions
        self.max_target = max_target if target is None else target + 1
        self.target = target
        self.time_limit = time_limit
        self.history = history
        self.num_rows = num_actions if history == "released" else max_target
        # one target needs one row, in either history
        self.num_rows = self.num_rows if target is None else 1
        super().__init__()

    def __repr__(self) -> str:
        targets = (
            f"max_target={self.max_target}" if self.target is None else f"target={self.target}"
        )
        sizes = (
            f"num_agents={self.num_agents}, num_actions={self.num_actions}, {targets}, "
            f"time_limit={self.time_limit}"
        )
        return f"CoordSum({sizes}, history={self.history!r})"

    def reset(self, key: chex.PRNGKey) -> Tuple[State, TimeStep[Observation]]:
        """Starts an episode with an empty history; `key` decides all its targets."""
        key, target_key = jax.random.split(key)
        state = State(
            key=key,
            step_count=jnp.int32(0),
            target=self._draw_target(target_key),
            counts=jnp.zeros((self.num_rows, self.num_actions), jnp.int32),
            last_target=jnp.int32(0),
            last_actions=jnp.zeros(self.num_agents, jnp.int32),
            last_guess=jnp.int32(0),
            last_reward=jnp.float32(0),
            episode_return=jnp.float32(0),
        )
        return state, restart(self._observe(state))

    def step(self, state: State, action: chex.Array) -> Tuple[State, TimeStep[Observation]]:
        """Plays one step: `action` (N,) int32 answers `state.target`; the timestep shows the next
        target."""
        action = jnp.asarray(action, jnp.int32)
        row = self._row(state.target)
        # the first maximum: smallest action, 0 if empty
        guess = jnp.argmax(state.counts[row]).astype(jnp.int32)
        match = jnp.sum(action) == state.target
        reward = jnp.where(match, jnp.where(guess == action[0], 1, 2), 0).astype(jnp.float32)

        key, target_key = jax.random.split(state.key)
        next_state = State(
            key=key,
            step_count=state.step_count + 1,
            target=self._draw_target(target_key),
            counts=state.counts.at[row, action[0]].add(1),
            last_target=state.target,
            last_actions=action,
            last_guess=guess,
            last_reward=reward,
            episode_return=state.episode_return + reward,
        )
        done = next_state.step_count >= self.time_limit
        timestep = jax.lax.cond(done, termination, transition, reward, self._observe(next_state))
        return next_state, timestep

    @cached_property
    def observation_spec(self) -> specs.Spec[Observation]:
        """Spec of `Observation`; agents_view lies within 0..M-1, or 0..T if every target is T."""
        shape = (self.num_agents, self.num_actions)
        return specs.Spec(
            Observation,
            "ObservationSpec",
            agents_view=specs.BoundedArray(
                shape[:1] + (1,), jnp.int32, 0, self.max_target - 1, "agents_view"
            ),
            action_mask=specs.BoundedArray(shape, bool, False, True, "action_mask"),
            step_count=specs.BoundedArray((), jnp.int32, 0, self.time_limit, "step_count"),
        )

    @cached_property
    def action_spec(self) -> specs.MultiDiscreteArray:
        """Spec of the action: (N,) int32, each within 0..A-1."""
        return specs.MultiDiscreteArray(
            jnp.full(self.num_agents, self.num_actions, jnp.int32), name="action"
        )

    def render(self, state: State) -> str:
        """Describes an unbatched `state` in one line: the step that led to it and the next
        target."""
        step = f"step {int(state.step_count)}/{self.time_limit}"
        if int(state.step_count) == 0:
            return f"{step} | no actions yet | next target {int(state.target)}"
        actions = " + ".join(str(a) for a in np.asarray(state.last_actions))
        verdict = ("miss", "match", "match")[int(state.last_reward)]
        return (
            f"{step} | target {int(state.last_target)} | {actions} = "
            f"{int(np.sum(state.last_actions))}, {verdict} | "
            f"observer guessed {int(state.last_guess)} for agent 0 | "
            f"reward {int(state.last_reward)}, return {int(state.episode_return)} | "
            f"next target {int(state.target)}"
        )

    def animate(
        self, states: Sequence[State], interval: int = 200, save_path: Optional[str] = None
    ) -> matplotlib.animation.FuncAnimation:
        """Draws one frame per state.

        Args:
            states: list of unbatched states of an episode, in order.
            interval: milliseconds per frame.
            save_path: where to save the animation as a GIF (with Pillow), if given.

        Raises:
            ValueError: if `states` is empty.
        """
        if len(states) == 0:
            raise ValueError("animate needs at least one state")
        # not made by pyplot: needs no display, and is drawn once per frame, when it is saved
        figure = Figure(figsize=(7, 2.6), dpi=100)
        animation = matplotlib.animation.FuncAnimation(
            figure, lambda state: self._draw(figure, state), frames=list(states), interval=interval
        )
        if save_path:
            animation.save(save_path, writer=matplotlib.animation.PillowWriter(fps=1000 / interval))
        return animation

    def _row(self, target: chex.Array) -> chex.Array:
        """The row of counts for a target. The minimum only acts in the released history and for a
        constant target."""
        return jnp.minimum(target, self.num_rows - 1)

    def _draw_target(self, key: chex.PRNGKey) -> chex.Array:
        """The next target, () int32."""
        if self.target is not None:
            return jnp.int32(self.target)
        return jax.random.randint(key, (), 0, self.max_target, jnp.int32)

    def _observe(self, state: State) -> Observation:
        """The observation of a state."""
        return Observation(
            agents_view=jnp.full((self.num_agents, 1), state.target, jnp.int32),
            action_mask=jnp.ones((self.num_agents, self.num_actions), bool),
            step_count=state.step_count,
        )

    def _draw(self, figure: Figure, state: State) -> None:
        """Draws what happened in the step that led to a state. After a reset there is a target, but
        no actions yet."""
        figure.clear()
        ax = figure.add_axes((0.04, 0, 0.92, 1))
        ax.axis("off")
        played = int(state.step_count) > 0
        actions, guess, reward = (
            np.asarray(state.last_actions), int(state.last_guess), int(state.last_reward),
        )
        target = int(state.last_target if played else state.target)
        color = GREY if not played else GREEN if reward > 0 else RED

        width = 1 / (self.num_agents + 2)  # tiles: the agents, the sum, the target
        numbers = (
            [*actions, actions.sum(), target]
            if played
            else ["?"] * (self.num_agents + 1) + [target]
        )
        labels = [f"agent {i}" for i in range(self.num_agents)] + ["sum", "target"]
        colors = [ORANGE] + [INK] * (self.num_agents - 1) + [color, INK]
        signs = ["+"] * (self.num_agents - 1) + [
            "=",
            "=" if reward > 0 else "\u2260" if played else "",
            "",
        ]
        points = min(50, 350 * width)  # the side of a tile; the axes are 464 points wide
        ax.set(xlim=(0, 1), ylim=(0, 1))
        ax.scatter(
            (np.arange(len(labels)) + 0.5) * width, [0.57] * len(labels), s=points**2, marker="s",
            c=colors,
        )
        for i in range(len(labels)):
            x, text = (i + 0.5) * width, dict(ha="center", va="center")
            ax.text(x, 0.565, numbers[i], color="white", size=points * 0.5, weight="bold", **text)
            ax.text(x + width / 2, 0.57, signs[i], color=INK, size=points * 0.4, **text)
            ax.text(x, 0.33, labels[i], color=GREY, size=min(10, 85 * width), **text)

        targets = (
            f"targets 0-{self.max_target - 1}" if self.target is None else f"target {self.target}"
        )
        title = f"CoordSum: {self.num_agents} agents, actions 0-{self.num_actions - 1}, {targets}"
        seen = f"the observer guessed {guess}: {'right' if guess == actions[0] else 'wrong'}"
        verdict = f"{'match' if reward > 0 else 'miss'}, {seen}" if played else "no actions yet"
        ax.text(0, 0.88, title, color=INK, size=12, weight="bold")
        ax.text(
            1, 0.88, f"step {int(state.step_count)}/{self.time_limit}", color=GREY, size=11,
            ha="right",
        )
        ax.text(0, 0.1, verdict, color=color, size=12, weight="bold")
        score = f"reward {reward}    return {int(state.episode_return)}"
        ax.text(1, 0.1, score, color=INK, size=12, weight="bold", ha="right")


def parse_scenario(name: str) -> dict:
    """Turns a scenario's name into keyword arguments of `CoordSum`.

    Args:
        name: `NxA-M` for N agents, A actions and targets 0..M-1 (the paper plays 3x10-30, 3x30-50,
            5x20-80 and 8x15-100), or `NxA=T` if every target is T (3x10=10 is the paper's toy
            game). Either may be followed by `-released` for the history of the released code. The
            empty string stands for the defaults.

    Raises:
        ValueError: in one line, if `name` does not follow the rule or its numbers make no game.
    """
    if name == "":
        return {}
    found = SCENARIO.fullmatch(name)
    if found is None:
        raise ValueError(f"unknown CoordSum scenario {name!r}: {RULE}")
    num_agents, num_actions, max_target, target, released = found.groups()
    kwargs = {"num_agents": int(num_agents), "num_actions": int(num_actions)}
    kwargs |= {"max_target": int(max_target)} if target is None else {"target": int(target)}
    kwargs |= {"history": "released"} if released else {}
    try:
        _check_arguments(**kwargs)
    except ValueError as error:
        raise ValueError(f"impossible CoordSum scenario {name!r}: {error}; {RULE}") from None
    return kwargs


def _check_arguments(
    num_agents, num_actions, max_target=30, target=None, time_limit=100, history="target"
) -> None:
    """Raises ValueError, in one line, if `CoordSum` cannot be made with these arguments."""
    sizes = dict(
        num_agents=num_agents, num_actions=num_actions, max_target=max_target, time_limit=time_limit
    )
    for name, size in sizes.items():
        if not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {size!r}")
    most = num_agents * (num_actions - 1)
    if target is not None and not (isinstance(target, (int, np.integer)) and 0 <= target <= most):
        raise ValueError(
            f"target must be a whole number within 0..{most}, the sums in reach, got {target!r}"
        )
    if history not in ("target", "released"):
        raise ValueError(f"history must be 'target' or 'released', got {history!r}")


if "CoordSum-v0" not in jumanji.registered_environments():
    jumanji.register(id="CoordSum-v0", entry_point="coordsum:CoordSum")
