"""The papers' task names as Jumanji environments.

They are what the flags `--env-id` and `--scenario` of the scripts stand for:

    env = tasks.make("RobotWarehouse-v0", "tiny-4ag-hard")
    state, timestep = jax.jit(env.reset)(jax.random.PRNGKey(0))

    python tasks.py     # lists the paper's 43 tasks with their sizes

Every environment that `make` makes for a suite of the papers has

    timestep.observation.agents_view   (N, ...), what each of the N agents sees
    timestep.observation.action_mask   (N, A) bool, True where an action is legal; actions that are
                                       A continuous numbers are all legal

and, if its episodes can be won, in every timestep, that of a reset included,

    timestep.extras["won"]             () bool, True on the step that ends an episode which is won

and, if an agent's reward is its own and no part of a sum that the team earns,

    env.own_rewards                    True

What no agent sees is in the state of the game, for guiders that may know it in training:

    env.global_state(state)            (S,) float32; your own environment may have it, too

The scripts train on what `make_trainable` makes: these and any other Jumanji environment, your own
among them, checked, and adapted where they need it.

A suite is one function from a scenario's name to an environment, and one entry of `SUITES`. The
function raises ValueError, with what is allowed, on a name that it cannot use; `make` puts the flag
before it. The names, and what they stand for, are those of Multi-Agent Guided Policy Optimization
(arXiv 2507.18059) and of the benchmarks it takes them from. D1, D4, D5, D16 and D17 are
details of docs/details.md.
"""

import argparse
import contextlib
import functools
import importlib
import io
import math
import os
import re
import sys
from types import ModuleType
from typing import Any, Callable, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import jumanji
import numpy as np
from jumanji import specs
from jumanji.env import Environment
from jumanji.environments.routing.connector.generator import LegacyRandomWalkGenerator
from jumanji.environments.routing.lbf.generator import RandomGenerator as LbfGenerator
from jumanji.environments.routing.robot_warehouse.generator import (
    RandomGenerator as RwareGenerator,
)
from jumanji.types import StepType, TimeStep
from jumanji.wrappers import Wrapper
from matplotlib import pyplot
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from matplotlib.patches import Circle


class TaskError(ValueError):
    """A task that cannot be made, or trained on: one line with the flag and what is allowed."""


def make(env_id: str, scenario: str = "") -> Environment:
    """Makes a task.

    Args:
        env_id: a key of `SUITES`, or the id of any other registered Jumanji environment.
        scenario: the task's name in the papers; "" stands for the environment's own defaults.

    Raises:
        TaskError: on an unknown `env_id`, a `scenario` that `env_id` does not have, one whose sizes
            make no game, or if the suite needs a module that is not there.
    """
    if env_id not in SUITES:
        return make_other(env_id, scenario)
    flag = f"--scenario {scenario}" if scenario else f"--env-id {env_id}"
    try:
        env = SUITES[env_id](scenario)
        jax.eval_shape(env.reset, jax.random.PRNGKey(0))  # some sizes fail only here
        env.global_state = functools.partial(GLOBAL_STATES[env_id], env)
    except (AssertionError, ImportError, OverflowError, TypeError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise TaskError(f"{flag}: {first_line}") from error
    return env


def make_other(env_id: str, scenario: str) -> Environment:
    """A registered Jumanji environment of no suite, which has no scenarios."""
    if env_id not in jumanji.registered_environments():
        known = ", ".join(SUITES)
        raise TaskError(
            f"--env-id {env_id}: unknown, try {known} or the id of another Jumanji environment"
        )
    if scenario:
        raise TaskError(f"--scenario {scenario}: {env_id} takes none")
    return jumanji.make(env_id)


def match_rule(rule: str, scenario: str, meaning: str) -> re.Match:
    """Matches a scenario's name with a regular expression; ValueError with its `meaning` if not.

    Numbers in a rule have at most 3 digits: much larger boards abort the process without an error.
    """
    match = re.fullmatch(rule, scenario)
    if match is None:
        raise ValueError(f"does not follow the rule {meaning} (numbers of at most 3 digits)")
    return match


class VectorObservation(NamedTuple):
    """What the agents of Connector, SMAX and MPE see."""

    agents_view: jax.Array  # (N, O) float32
    action_mask: jax.Array  # (N, A) bool


# -------------------- CoordSum --------------------------------------------------------------------
def make_coordsum(scenario: str) -> Environment:
    """CoordSum, by the rule of `coordsum.parse_scenario`, e.g. 3x10-30."""
    import coordsum  # here, because all other suites work without the file

    return coordsum.CoordSum(**coordsum.parse_scenario(scenario))


# -------------------- Multi-robot warehouse (RWARE) -----------------------------------------------
SHELVES = {  # rows and columns of blocks of shelves, by the size in a scenario's name
    "tiny": (1, 3),
    "small": (2, 3),
    "medium": (2, 5),
    "large": (3, 5),
    "xlarge": (4, 5),
}


def make_rware(scenario: str) -> Environment:
    """The warehouse of a size with N robots, e.g. small-4ag-hard.

    N shelves are requested at any time, 2 N of them if easy, N / 2 if hard (rounded down).
    """
    if scenario == "":
        return jumanji.make("RobotWarehouse-v0")
    match = match_rule(
        r"(?P<size>tiny|small|medium|large|xlarge)-(?P<agents>[0-9]{1,3})ag(?P<level>-easy|-hard)?",
        scenario,
        "SIZE-Nag, SIZE-Nag-easy or SIZE-Nag-hard with a SIZE out of tiny, small, medium, large "
        "and xlarge and N robots, e.g. small-4ag-hard",
    )
    rows, columns = SHELVES[match["size"]]
    num_agents = int(match["agents"])
    if match["level"] == "-easy":
        num_requests = 2 * num_agents
    elif match["level"] == "-hard":
        num_requests = num_agents // 2
    else:
        num_requests = num_agents
    if num_requests == 0:
        raise ValueError("leaves no shelf to request, needs 1 robot or more, and 2 or more if hard")
    generator = RwareGenerator(
        shelf_rows=rows,
        shelf_columns=columns,
        column_height=8,
        num_agents=num_agents,
        sensor_range=1,
        request_queue_size=num_requests,
    )
    return jumanji.make("RobotWarehouse-v0", generator=generator)


# -------------------- Level-based foraging (LBF) --------------------------------------------------
def make_lbf(scenario: str) -> Environment:
    """Foraging of N players for F pieces of food on a board G x G, e.g. 2s-10x10-3p-3f.

    Players see S cells far, or the whole board without the prefix. With -coop no player can take a
    piece of food alone.
    """
    if scenario == "":
        return jumanji.make("LevelBasedForaging-v0")
    match = match_rule(
        r"((?P<sight>[0-9]{1,3})s-)?(?P<size>[0-9]{1,3})x(?P=size)"
        r"-(?P<agents>[0-9]{1,3})p-(?P<food>[0-9]{1,3})f(?P<coop>-coop)?",
        scenario,
        "GxG-Np-Ff for a board G x G, N players and F pieces of food, Ss- before it for a sight of "
        "S cells and -coop after it to force cooperation, e.g. 2s-10x10-3p-3f or 8x8-2p-2f-coop",
    )
    size = int(match["size"])
    generator = LbfGenerator(
        grid_size=size,
        num_agents=int(match["agents"]),
        num_food=int(match["food"]),
        fov=size if match["sight"] is None else int(match["sight"]),
        max_agent_level=2,
        force_coop=match["coop"] is not None,
    )
    return jumanji.make("LevelBasedForaging-v0", generator=generator)


# -------------------- Connector -------------------------------------------------------------------
def make_connector(scenario: str) -> Environment:
    """Connector with N agents on a board G x G for at most G * G steps, e.g. con-5x5x3a."""
    if scenario == "":
        return VectorConnector(jumanji.make("Connector-v3"))
    match = match_rule(
        r"con-(?P<size>[0-9]{1,3})x(?P=size)x(?P<agents>[0-9]{1,3})a",
        scenario,
        "con-GxGxNa for N agents on a board G x G, e.g. con-5x5x3a",
    )
    size = int(match["size"])
    num_agents = int(match["agents"])
    if num_agents == 0:
        raise ValueError("needs at least 1 agent")
    if 2 * num_agents > size * size:
        raise ValueError(
            f"needs {2 * num_agents} cells for heads and targets, the board has {size * size}"
        )
    # D5: the papers' boards; the environment's own default generator draws other ones.
    generator = LegacyRandomWalkGenerator(grid_size=size, num_agents=num_agents)
    env = jumanji.make("Connector-v3", generator=generator, time_limit=size * size)
    return VectorConnector(env)


class VectorConnector(Wrapper):
    """Jumanji's Connector with a vector for each agent in place of the board that all agents share.

    An episode is won if all agents are connected at its end. The board is still in the state, so
    `render` and `animate` are those of Connector.
    """

    def reset(self, key: jax.Array) -> tuple[Any, TimeStep]:
        """Draws a board -> Connector's state, and a timestep with `VectorObservation`."""
        state, timestep = self._env.reset(key)
        return state, self._convert(timestep)

    def step(self, state: Any, action: jax.Array) -> tuple[Any, TimeStep]:
        """Moves the agents; action: (N,) int32, 0 no move, 1 up, 2 right, 3 down, 4 left."""
        state, timestep = self._env.step(state, action)
        return state, self._convert(timestep)

    @functools.cached_property
    def observation_spec(self) -> specs.Spec:
        """Spec of `VectorObservation`."""
        # Without its bounds, -1 and 1, so that D1 leaves the view as D4 has it.
        view = specs.Array((self._env.num_agents, 54), jnp.float32, "agents_view")
        mask = specs.BoundedArray((self._env.num_agents, 5), bool, False, True, "action_mask")
        fields = {"agents_view": view, "action_mask": mask}
        return specs.Spec(VectorObservation, "ObservationSpec", **fields)

    def _convert(self, timestep: TimeStep) -> TimeStep:
        """Connector's timestep with the vectors in its observation and `won` in its extras."""
        agents_view = connector_view(timestep.observation.grid, self._env.num_agents)
        observation = VectorObservation(agents_view, timestep.observation.action_mask)
        won = timestep.last() & (timestep.extras["ratio_connections"] == 1.0)
        return timestep.replace(observation=observation, extras={**timestep.extras, "won": won})


def connector_view(grid: jax.Array, num_agents: int) -> jax.Array:
    """The board (G, G) -> what each agent sees of it, (N, 54) float32.

    The board holds 3 j + 1, 3 j + 2 and 3 j + 3 for the path, head and target of agent j, else 0.
    An agent sees the row and column of its head and of its target, then two windows of 5 x 5 cells
    around its head: blockers (1 a head, -1 a path) and targets (1 its own, -1 another agent's).

    D4: the papers' vector view with its quirks: coordinates divided by G * G, (0, 0) for the target
    of a connected agent, and a board edge that reads 1 in both windows.
    """
    num_cells = grid.size
    is_path = grid % 3 == 1
    is_head = grid % 3 == 2
    is_target = (grid % 3 == 0) & (grid > 0)
    blockers = is_head.astype(jnp.float32) - is_path

    def view(agent):
        own_head = grid == 3 * agent + 2
        own_target = grid == 3 * agent + 3
        head_row, head_column = jnp.unravel_index(jnp.argmax(own_head), grid.shape)
        target_row, target_column = jnp.unravel_index(jnp.argmax(own_target), grid.shape)
        coordinates = jnp.stack([head_row, head_column, target_row, target_column]) / num_cells
        targets = jnp.where(own_target, 1.0, jnp.where(is_target, -1.0, 0.0))
        boards = jnp.stack([blockers, targets])  # (2, G, G)
        padded = jnp.pad(boards, ((0, 0), (2, 2), (2, 2)), constant_values=1.0)
        windows = jax.lax.dynamic_slice(padded, (0, head_row, head_column), (2, 5, 5))
        return jnp.concatenate([coordinates, windows.reshape(50)])

    return jax.vmap(view)(jnp.arange(num_agents))


# -------------------- JaxMARL ---------------------------------------------------------------------
def import_jaxmarl() -> ModuleType:
    """Imports JaxMARL, without the two lines that it prints.

    Not at the top of this file: the import takes seconds and starts JAX's backend.

    Raises:
        ModuleNotFoundError: with what to install, if it is not there.
    """
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr", "__stdout__")}
    # Both, because the import itself sets sys.stdout to sys.__stdout__ before it prints.
    sys.stdout = sys.__stdout__ = io.StringIO()
    try:
        import jaxmarl
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"needs {error.name} (pip install jaxmarl)") from error
    finally:
        for name, stream in streams.items():
            setattr(sys, name, stream)
    return jaxmarl


class JaxMarlState(NamedTuple):
    """The state of a `JaxMarl` environment."""

    key: jax.Array  # for the next step
    game_state: Any  # JaxMARL's own state


class JaxMarl(Environment):
    """A game of JaxMARL as a Jumanji environment, without JaxMARL's auto-reset.

    A subclass has `action_spec`, and says of a state of the game what is legal and how it stands
    (`action_mask`, `terminated`, `extras`), what the agents are paid (`reward`), and how states are
    drawn: `drawing` gives a figure, and a function that draws the state of an index into it.
    """

    def __init__(self, game: Any, num_actions: int):
        """game: JaxMARL's environment; num_actions: A."""
        self.game = game
        self.num_agents = game.num_agents
        self.num_actions = num_actions
        self.time_limit = game.max_steps + 1  # the game looks at its clock before the clock ticks
        super().__init__()

    def reset(self, key: jax.Array) -> tuple[JaxMarlState, TimeStep]:
        """Starts an episode."""
        obs, game_state = self.game.reset(key)
        rewards = dict.fromkeys(self.game.agents, jnp.float32(0))
        timestep = self.make_timestep(StepType.FIRST, obs, game_state, rewards)
        return JaxMarlState(following_key(key), game_state), timestep

    def step(self, state: JaxMarlState, action: jax.Array) -> tuple[JaxMarlState, TimeStep]:
        """action: (N,) int32 or (N, A) float32."""
        actions = {agent: action[j] for j, agent in enumerate(self.game.agents)}
        results = self.game.step_env(state.key, state.game_state, actions)
        obs, game_state, rewards, done, _ = results
        # Only this entry ends an episode: those of the agents say who is dead, and after a win the
        # survivors' are False.
        step_type = jnp.where(done["__all__"], StepType.LAST, StepType.MID)
        timestep = self.make_timestep(step_type, obs, game_state, rewards)
        return JaxMarlState(following_key(state.key), game_state), timestep

    def make_timestep(self, step_type, obs: dict, game_state: Any, rewards: dict) -> TimeStep:
        """The timestep of a state; at a time limit the discount is 1, which makes a truncation."""
        agents_view = jnp.stack([obs[agent] for agent in self.game.agents])
        observation = VectorObservation(agents_view, self.action_mask(game_state))
        return TimeStep(
            step_type=step_type,
            reward=self.reward(rewards),
            discount=1.0 - self.terminated(game_state),
            observation=observation,
            extras=self.extras(game_state),
        )

    def animate(
        self, states: Sequence[JaxMarlState], interval: int = 200, save_path: str = ""
    ) -> FuncAnimation:
        """Draws a frame per unbatched state, for `interval` ms each; save_path: file for a GIF."""
        game_states = [jax.tree.map(np.asarray, state.game_state) for state in states]
        figure, draw = self.drawing(game_states)
        figure.set_size_inches(8, 8)
        animation = FuncAnimation(figure, draw, frames=len(states), interval=interval)
        if save_path:
            animation.save(save_path, writer=PillowWriter(fps=1000 / interval))
        pyplot.close(figure)
        return animation

    @functools.cached_property
    def observation_spec(self) -> specs.Spec:
        """Spec of `VectorObservation`."""
        (num_features,) = self.game.observation_spaces[self.game.agents[0]].shape
        view = specs.Array((self.num_agents, num_features), jnp.float32, "agents_view")
        mask_shape = (self.num_agents, self.num_actions)
        mask = specs.BoundedArray(mask_shape, bool, False, True, "action_mask")
        fields = {"agents_view": view, "action_mask": mask}
        return specs.Spec(VectorObservation, "ObservationSpec", **fields)


def following_key(key: jax.Array) -> jax.Array:
    """A key for the next step, other than the two into which JaxMARL splits `key` itself.

    Those are what folding in 0 and 1 gives.
    """
    return jax.random.fold_in(key, 2)


# -------------------- SMAX ------------------------------------------------------------------------
def make_smax(scenario: str) -> Environment:
    """SMAX against the heuristic enemy on a map, e.g. 2s3z; "": 5 marines on each side."""
    jaxmarl = import_jaxmarl()
    from jaxmarl.environments.smax.smax_env import MAP_NAME_TO_SCENARIO

    if scenario and scenario not in MAP_NAME_TO_SCENARIO:
        raise ValueError(f"unknown map, try one of {', '.join(MAP_NAME_TO_SCENARIO)}")
    game = jaxmarl.make(
        "HeuristicEnemySMAX",
        scenario=MAP_NAME_TO_SCENARIO.get(scenario),
        see_enemy_actions=True,
        walls_cause_death=True,
        attack_mode="closest",
    )
    return Smax(game)


class Smax(JaxMarl):
    """The allies of SMAX; the enemies belong to the environment.

    - action: (N,) int32, 0 up, 1 right, 2 down, 3 left, 4 stop, 5 + j shoot at enemy j
    - reward: () float32, the share of the enemies' health that the step took, and 1 for a win
    - the episode terminates when one side is dead, and is cut off after `time_limit` steps
    - a dead agent sees zeros, can only stop, and has the team's reward like all others
    """

    def __init__(self, game: Any):
        """game: JaxMARL's HeuristicEnemySMAX."""
        super().__init__(game, game.num_ally_actions)

    @functools.cached_property
    def action_spec(self) -> specs.MultiDiscreteArray:
        """Spec of the action: (N,) int32, each within 0..A-1."""
        return specs.MultiDiscreteArray(jnp.full(self.num_agents, self.num_actions, jnp.int32))

    def action_mask(self, game_state: Any) -> jax.Array:
        """(N, A) bool."""
        legal = self.game.get_avail_actions(game_state)
        return jnp.stack([legal[agent] for agent in self.game.agents]).astype(bool)

    def reward(self, rewards: dict) -> jax.Array:
        """() float32: the team's reward, which the game gives to every ally."""
        return rewards[self.game.agents[0]]

    def survivors(self, game_state: Any) -> tuple[jax.Array, jax.Array]:
        """() bool each: is an ally alive, is an enemy alive?"""
        alive = game_state.state.unit_alive  # the allies first
        return jnp.any(alive[: self.num_agents]), jnp.any(alive[self.num_agents :])

    def terminated(self, game_state: Any) -> jax.Array:
        """() bool: one side is dead."""
        ally, enemy = self.survivors(game_state)
        return ~ally | ~enemy

    def extras(self, game_state: Any) -> dict:
        """won: only the enemies are dead, the very case in which the last reward is at least 1."""
        ally, enemy = self.survivors(game_state)
        return {"won": ally & ~enemy}

    def drawing(self, game_states: list) -> tuple[Figure, Callable]:
        """One frame per step; JaxMARL's own drawing takes about 10 s for each."""
        figure = Figure()
        positions = np.concatenate([game_state.state.unit_positions for game_state in game_states])
        low, high = positions.min(axis=0), positions.max(axis=0)
        middle, reach = (low + high) / 2, np.max(high - low) / 2 + 1
        limits = np.stack([middle - reach, middle + reach], axis=1)  # of x and y, the same scale
        return figure, lambda frame: self.draw(figure, limits, game_states[frame].state)

    def draw(self, figure: Figure, limits: np.ndarray, state: Any) -> None:
        """Units as circles, allies in blue, paler with less health, and lines to their targets."""
        figure.clear()
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set(xlim=limits[0], ylim=limits[1], xticks=[], yticks=[])
        ax.set_title(f"step {state.step}", y=0.95)
        share = state.unit_health / np.asarray(self.game.unit_type_health)[state.unit_types]
        for unit in np.flatnonzero(state.unit_alive):
            is_ally = unit < self.num_agents
            color = "tab:blue" if is_ally else "tab:red"
            position = state.unit_positions[unit]
            kind = state.unit_types[unit]  # whose initial is drawn, e.g. s for a stalker
            radius = self.game.unit_type_radiuses[kind]
            ax.add_patch(Circle(position, radius, facecolor="white", edgecolor=color))
            ax.add_patch(Circle(position, radius, color=color, alpha=share[unit]))
            letter = self.game.unit_type_shorthands[kind]
            ax.text(*position, letter, fontsize=14, ha="center", va="center")
            # Below 0 if it does not shoot; an enemy counts the allies from the last one down.
            shot = state.prev_attack_actions[unit] - self.game.num_movement_actions
            if shot >= 0:
                target = self.num_agents + shot if is_ally else self.num_agents - 1 - shot
                ends = np.stack([position, state.unit_positions[target]], axis=1)
                ax.plot(*ends, color=color, linewidth=1, zorder=0)


# -------------------- Multi-particle environments (MPE) -------------------------------------------
def make_spread(scenario: str) -> Environment:
    """Simple spread with N agents and N landmarks, e.g. simple_spread_3ag, which "" stands for."""
    match = match_rule(
        r"simple_spread_(?P<agents>[0-9]{1,3})ag",
        scenario or "simple_spread_3ag",
        "simple_spread_Nag for N agents and N landmarks, e.g. simple_spread_3ag",
    )
    num_agents = int(match["agents"])
    if num_agents == 0:
        raise ValueError("needs at least 1 agent")
    game = import_jaxmarl().make(
        "MPE_simple_spread_v3",
        num_agents=num_agents,
        num_landmarks=num_agents,
        local_ratio=0.5,
        action_type="Continuous",
    )
    return Spread(game)


class Spread(JaxMarl):
    """Agents that should cover the landmarks, and not bump into each other.

    - action: (N, 5) float32 within -1..1, of which 1 to 4 push to the left, right, down and up
    - reward: (N,) float32, for each agent half of the team's and half of its own, which is -1 for
      each agent it touches
    - the episode never terminates, and is cut off after `time_limit` steps

    D16: actions between -1 and 1 go to the game as they are. It announces 0..1, but does not clip:
    (0, -1, 1, -1, 1) is a force of (10, 10), twice the largest within 0..1.
    """

    own_rewards = True

    def __init__(self, game: Any):
        """game: JaxMARL's SimpleSpreadMPE with continuous actions."""
        super().__init__(game, num_actions=5)

    @functools.cached_property
    def action_spec(self) -> specs.BoundedArray:
        """Spec of the action: (N, 5) float32."""
        return specs.BoundedArray((self.num_agents, self.num_actions), jnp.float32, -1.0, 1.0)

    @functools.cached_property
    def reward_spec(self) -> specs.Array:
        """Spec of the reward: (N,) float32."""
        return specs.Array((self.num_agents,), jnp.float32, "reward")

    def action_mask(self, game_state: Any) -> jax.Array:
        """(N, 5) bool: continuous actions are all legal."""
        return jnp.ones((self.num_agents, self.num_actions), bool)

    def reward(self, rewards: dict) -> jax.Array:
        """(N,) float32: each agent's own."""
        return jnp.stack([rewards[agent] for agent in self.game.agents])

    def terminated(self, game_state: Any) -> jax.Array:
        """() bool: never."""
        return jnp.zeros((), bool)

    def extras(self, game_state: Any) -> dict:
        """Nothing: there is no way to win."""
        return {}

    def drawing(self, game_states: list) -> tuple[Figure, Callable]:
        """JaxMARL's own."""
        from jaxmarl.environments.mpe import MPEVisualizer

        with contextlib.redirect_stdout(io.StringIO()):  # it prints whether the agents talk
            visualizer = MPEVisualizer(self.game, game_states)
        return visualizer.fig, visualizer.update


# -------------------- What no agent sees ----------------------------------------------------------
def flat(*parts: jax.Array) -> jax.Array:
    """Arrays of any shape, numbers or bool -> (S,) float32."""
    return jnp.concatenate([jnp.ravel(part).astype(jnp.float32) for part in parts])


def coordsum_state(env: Environment, state: Any) -> jax.Array:
    """How often agent 0 has played each action for this target, as a share of the episode, and what
    the observer is going to guess, one-hot: 2 A numbers."""
    counts = state.counts[jnp.minimum(state.target, env.num_rows - 1)]
    return flat(counts / env.time_limit, jax.nn.one_hot(jnp.argmax(counts), env.num_actions))


def rware_state(env: Environment, state: Any) -> jax.Array:
    """Where shelves, robots and requested shelves are, three maps of the warehouse; of each robot
    its place, as a share of the warehouse, its direction, one-hot, and whether it carries."""
    size = state.grid.shape[1:]
    shelves, robots = state.shelves, state.agents
    requested = jnp.zeros(size).at[shelves.position.x, shelves.position.y].max(shelves.is_requested)
    places = robots.position.x / size[0], robots.position.y / size[1]
    directions = jax.nn.one_hot(robots.direction, 4)
    return flat(state.grid > 0, requested, *places, directions, robots.is_carrying)


def lbf_state(env: Environment, state: Any) -> jax.Array:
    """Places, as a share of the board, and levels of all players and of the food, 0 where it is
    gone; which players are loading, and which food is there."""
    players, food = state.agents, state.food_items
    there = ~food.eaten
    food = food.position * there[:, None] / env.grid_size, food.level * there
    return flat(players.position / env.grid_size, players.level, players.loading, *food, there)


def connector_state(env: Environment, state: Any) -> jax.Array:
    """Which cells are free, and heads and targets of all agents as shares of the board."""
    size = len(state.grid)
    return flat(state.grid == 0, state.agents.position / size, state.agents.target / size)


def smax_state(env: Environment, state: Any) -> jax.Array:
    """The world state of JaxMARL: health, place, cooldown and type of all units, enemies too."""
    return flat(env.game.get_world_state(state.game_state))


def spread_state(env: Environment, state: Any) -> jax.Array:
    """Places of agents and landmarks, and the agents' velocities."""
    return flat(state.game_state.p_pos, state.game_state.p_vel)


GLOBAL_STATES = {
    "CoordSum-v0": coordsum_state,
    "RobotWarehouse-v0": rware_state,
    "LevelBasedForaging-v0": lbf_state,
    "Connector-v3": connector_state,
    "SMAX": smax_state,
    "MPE_simple_spread_v3": spread_state,
}


# -------------------- Environments to train on ----------------------------------------------------
def make_trainable(env_id: str, scenario: str = "") -> Environment:
    """Makes an environment that the scripts can train on.

    Its observations have agents_view (N, ...) and action_mask (N, A), and its actions are (N,)
    int32, or any real numbers (N, A) float32, which are brought within their bounds here.

    Args:
        env_id: as in `make`, or `module:Id-v0`, whose module is imported, to register the id.
        scenario: as in `make`.

    Raises:
        TaskError: as `make`, or if the environment lacks what is needed. Errors of the environment
            itself are raised as they are.
    """
    env = make(import_module_of(env_id), scenario)
    check(env_id, env)
    env = Adapter(env)
    check_step(env_id, env)
    return env


def import_module_of(env_id: str) -> str:
    """Imports the module of `module:Id-v0`, which registers the id, like Gymnasium -> `Id-v0`."""
    match = re.fullmatch(r"(\w+(?:\.\w+)*):(.+)", env_id)
    if match is None:
        return env_id
    module, name = match.groups()
    sys.path.append(os.getcwd())
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, what it imports is not
        raise TaskError(f"--env-id {env_id}: there is no module {module}") from error
    if name not in jumanji.registered_environments():
        raise TaskError(f"--env-id {env_id}: {module} does not register {name} with Jumanji")
    return name


def is_continuous(env: Environment) -> bool:
    """True for actions of floats within finite bounds, a row for each agent: (N, A)."""
    spec = env.action_spec
    if not isinstance(spec, specs.BoundedArray) or len(spec.shape) != 2:
        return False
    bounds = np.broadcast_arrays(spec.minimum, spec.maximum)
    return jnp.issubdtype(spec.dtype, jnp.floating) and bool(np.all(np.isfinite(bounds)))


def check(env_id: str, env: Environment) -> None:
    """TaskError if an environment lacks what training needs."""
    _, timestep = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
    observation = timestep.observation
    discrete = isinstance(env.action_spec, specs.MultiDiscreteArray)
    needed = ("agents_view", "action_mask") if discrete else ("agents_view",)
    missing = [field for field in needed if not hasattr(observation, field)]
    if missing:
        raise TaskError(f"--env-id {env_id}: its observation has no {' and no '.join(missing)}")
    one_each = discrete and len(env.action_spec.shape) == 1
    if not (one_each or is_continuous(env)):
        needs = "one discrete action per agent, a MultiDiscreteArray (N,), or continuous ones,"
        needs += " a BoundedArray (N, A) of floats with finite bounds, not "
        needs += " ".join(str(env.action_spec).split())  # bounds may take several lines
        raise TaskError(f"--env-id {env_id}: needs {needs}")
    view_shape = observation.agents_view.shape
    mask_shape = observation.action_mask.shape if discrete else env.action_spec.shape
    if len(mask_shape) != 2 or view_shape[:1] != mask_shape[:1]:
        name = "action_mask" if discrete else "action_spec"
        needs = f"agents_view (N, ...) and {name} (N, A), not {view_shape} and {mask_shape}"
        raise TaskError(f"--env-id {env_id}: needs {needs}")
    bounds = getattr(env.observation_spec, "agents_view", None)
    if isinstance(bounds, specs.BoundedArray) and bounds.shape != view_shape:
        differs = f"{bounds.shape} in its spec and {view_shape} in a reset"
        raise TaskError(f"--env-id {env_id}: agents_view is {differs}")
    if discrete:
        check_mask(env_id, env, observation.action_mask)


def check_mask(env_id: str, env: Environment, mask: jax.ShapeDtypeStruct) -> None:
    """TaskError if the action_mask is not of the actions that the spec has, by agent (N,)."""
    num_values = np.asarray(env.action_spec.num_values)
    shape = (len(num_values), int(num_values.max()))
    if mask.shape != shape or mask.dtype != bool:
        needs = f"{shape} of bool, as its action_spec has, not {mask.shape} of {mask.dtype}"
        raise TaskError(f"--env-id {env_id}: its action_mask must be {needs}")
    if np.any(num_values != num_values.max()):
        _, timestep = jax.jit(env.reset)(jax.random.PRNGKey(0))
        beyond = np.arange(num_values.max()) >= num_values[:, None]
        if np.any(beyond & np.asarray(timestep.observation.action_mask)):
            raise TaskError(
                f"--env-id {env_id}: its action_mask must be False beyond an agent's own actions, "
                f"of which its action_spec has {num_values.tolist()}"
            )


def check_step(env_id: str, env: Environment) -> None:
    """TaskError if a step does not give what a reset gives, for training puts one in place of the
    other. Errors of the environment itself show up here."""

    def describe(state, timestep):
        names = ("observation", "reward", "discount", "extras")
        parts = {"state": state, **{name: getattr(timestep, name) for name in names}}
        leaves = jax.tree_util.tree_leaves_with_path(parts)
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): f"{x.dtype}{list(x.shape)}"
            for path, x in leaves
        }

    state, timestep = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
    shape = env.action_spec.shape
    action = jax.ShapeDtypeStruct(shape, jnp.int32 if len(shape) == 1 else jnp.float32)
    of_reset = describe(state, timestep)
    of_step = describe(*jax.eval_shape(env.step, state, action))
    for name in of_reset | of_step:
        first, then = (x.get(name, "nothing") for x in (of_reset, of_step))
        if first != then:
            raise TaskError(f"--env-id {env_id}: {name} is {first} in a reset, {then} in a step")


def feature_scale(env: Environment) -> tuple[jax.Array, jax.Array]:
    """Mean and std of features with bounds, were all numbers between as frequent; 0 and 1 for all
    others. Images without bounds, views of uint8, are taken for 0 and 255.
    """
    spec = getattr(env.observation_spec, "agents_view", None)
    lowest = jnp.float32(getattr(spec, "minimum", -math.inf))
    reach = (jnp.float32(getattr(spec, "maximum", math.inf)) - lowest) / 2
    is_bounded = (reach >= 0) & (reach < 1e8)  # larger numbers are no bounds
    std = jnp.where(reach > 0, reach / math.sqrt(3), 1)
    _, timestep = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
    is_image = timestep.observation.agents_view.dtype == jnp.uint8
    if is_image and not isinstance(spec, specs.BoundedArray):
        return jnp.float32(0), jnp.float32(255)
    return jnp.where(is_bounded, lowest + reach, 0), jnp.where(is_bounded, std, 1)


def is_typed_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def kind_of(leaf: jax.Array) -> Any:
    """The type in which numpy can hold an array: uint32 for typed keys, float32 for bfloat16."""
    if is_typed_key(leaf):
        return jnp.uint32
    return leaf.dtype if leaf.dtype.kind != "V" else jnp.float32


class Adapter(Wrapper):
    """An environment as the scripts expect it.

    D1: features with bounds, in the spec of agents_view, are told with mean 0 and std 1, as if all
    numbers between were as frequent; others as they are. A network may begin with a norm, in which
    a large feature drowns the rest.
    An agent without any legal action has action 0 as its only one.
    D17: continuous actions u are any real numbers, of which the environment does tanh(u), scaled to
    the bounds. The derivative of tanh is the same for two policies, so it cancels in their ratios
    and KLs, and nothing overflows where tanh saturates. All of them are legal in the action_mask.
    State that numpy cannot hold, such as keys of jax.random.key and bfloat16, is kept as what it
    can hold, so that it can be saved.
    """

    def __init__(self, env: Environment):
        super().__init__(env)
        self.continuous = is_continuous(env)
        self.own_spec = env.action_spec  # some make it anew each time, which fails inside jit
        self.mean, self.std = feature_scale(env)

        def note(key):
            state = jax.tree.map(jnp.asarray, env.reset(key)[0])  # Python's numbers, too
            # Of typed keys the name of their implementation, which only keys tell, not shapes.
            self.kinds = [
                jax.random.key_impl(leaf) if is_typed_key(leaf) else leaf.dtype
                for leaf in jax.tree.leaves(state)
            ]
            return state

        jax.eval_shape(note, jax.random.PRNGKey(0))

    def pack(self, state: Any) -> Any:
        """The environment's own state -> state that numpy can hold."""
        state = jax.tree.map(jnp.asarray, state)
        state = jax.tree.map(
            lambda leaf: jax.random.key_data(leaf) if is_typed_key(leaf) else leaf, state
        )
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, kind_of(leaf)), state)

    def unpack(self, state: Any) -> Any:
        """What `pack` gave -> the environment's own state."""
        leaves, structure = jax.tree.flatten(state)
        own = [
            jax.random.wrap_key_data(leaf, impl=kind)
            if isinstance(kind, str)
            else leaf.astype(kind)
            for leaf, kind in zip(leaves, self.kinds)
        ]
        return jax.tree.unflatten(structure, own)

    def reset(self, key: jax.Array) -> tuple[Any, TimeStep]:
        """Starts an episode."""
        state, timestep = self._env.reset(key)
        return self.pack(state), self.adapt(timestep)

    def step(self, state: Any, action: jax.Array) -> tuple[Any, TimeStep]:
        """action: (N,) int32, or u (N, A) float32."""
        if self.continuous:
            lowest, highest = self.own_spec.minimum, self.own_spec.maximum
            action = (highest + lowest) / 2 + (highest - lowest) / 2 * jnp.tanh(action)
        state, timestep = self._env.step(self.unpack(state), action)
        return self.pack(state), self.adapt(timestep)

    def adapt(self, timestep: TimeStep) -> TimeStep:
        """The timestep with `VectorObservation`."""
        view = (timestep.observation.agents_view - self.mean) / self.std
        if self.continuous:
            mask = jnp.ones(self.own_spec.shape, bool)
        else:
            mask = timestep.observation.action_mask
            mask = mask.at[:, 0].max(~jnp.any(mask, axis=-1))
        return timestep.replace(observation=VectorObservation(view, mask))

    @property
    def global_state(self) -> Callable:
        """The environment's own `global_state`, for states of this one."""
        global_state = self._env.global_state
        return lambda state: global_state(self.unpack(state))

    @property
    def animate(self) -> Callable | None:
        """The environment's own `animate`, for states of this one."""
        animate = self._env.animate
        if animate is None:  # it cannot be drawn
            return None
        return lambda states, *args, **kwargs: animate(
            [self.unpack(state) for state in states], *args, **kwargs
        )


# -------------------- All of them -----------------------------------------------------------------
SUITES = {
    "CoordSum-v0": make_coordsum,
    "RobotWarehouse-v0": make_rware,
    "LevelBasedForaging-v0": make_lbf,
    "Connector-v3": make_connector,
    "SMAX": make_smax,
    "MPE_simple_spread_v3": make_spread,
}

PAPER_TASKS = {  # the paper's 43 tasks, which `main` lists; `make` goes by the rules above
    "CoordSum-v0": ["3x10-30", "3x30-50", "5x20-80", "8x15-100"],
    "RobotWarehouse-v0": [
        "tiny-2ag", "tiny-2ag-hard", "tiny-4ag", "tiny-4ag-hard", "small-4ag", "small-4ag-hard",
        "medium-4ag", "medium-4ag-hard", "medium-6ag", "large-4ag", "large-4ag-hard", "large-8ag",
        "large-8ag-hard", "xlarge-4ag", "xlarge-4ag-hard",
    ],
    "LevelBasedForaging-v0": [
        "2s-8x8-2p-2f-coop", "8x8-2p-2f-coop", "2s-10x10-3p-3f", "10x10-3p-3f", "15x15-3p-5f",
        "15x15-4p-3f", "15x15-4p-5f",
    ],
    "Connector-v3": ["con-5x5x3a", "con-7x7x5a", "con-10x10x10a", "con-15x15x23a"],
    "SMAX": [
        "2s3z", "3s5z", "3s_vs_5z", "5m_vs_6m", "6h_vs_8z", "10m_vs_11m", "27m_vs_30m",
        "3s5z_vs_3s6z", "smacv2_5_units", "smacv2_10_units",
    ],
    "MPE_simple_spread_v3": ["simple_spread_3ag", "simple_spread_5ag", "simple_spread_10ag"],
}  # fmt: skip


def describe(env_id: str, scenario: str) -> tuple[str, ...]:
    """A task's row in the table of `main`. Computes nothing but shapes."""
    env = make(env_id, scenario)
    _, timestep = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
    observation = timestep.observation
    num_agents, num_actions = observation.action_mask.shape
    num_features = math.prod(observation.agents_view.shape[1:])
    is_discrete = isinstance(env.action_spec, specs.MultiDiscreteArray)
    kind = "discrete" if is_discrete else "continuous"
    sizes = (num_features, num_agents + num_features, env.time_limit)
    return env_id, scenario, str(num_agents), f"{num_actions} {kind}", *map(str, sizes)


def main() -> None:
    """Prints the paper's tasks."""
    argparse.ArgumentParser(description="Lists the paper's 43 tasks.").parse_args()
    rows = [("--env-id", "--scenario", "agents", "actions", "features", "with ids", "steps")]
    try:
        for env_id, scenarios in PAPER_TASKS.items():
            rows += [describe(env_id, scenario) for scenario in scenarios]
    except TaskError as error:
        print(f"tasks.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print("features: the numbers that an agent sees, without and with the id that the scripts add;")
    print("steps: of the longest episode")


if __name__ == "__main__":
    main()
