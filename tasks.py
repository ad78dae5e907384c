"""The papers' task names as Jumanji environments.

They are what the flags `--env-id` and `--scenario` of the scripts stand for:

    env = tasks.make("RobotWarehouse-v0", "tiny-4ag-hard")
    state, timestep = jax.jit(env.reset)(jax.random.PRNGKey(0))

    python tasks.py     # lists the paper's 43 tasks with their sizes

What environments look like here, and how others than the papers' are made to, is in adapters.py.
The scripts train on what `make_trainable` makes: these, any other Jumanji environment, your own
among them, and the cooperative games of JaxMARL, checked, and adapted where they need it.

A suite is one function from a scenario's name to an environment, and one entry of `SUITES`. The
function raises ValueError, with what is allowed, on a name that it cannot use; `make` puts the flag
before it. The names, and what they stand for, are those of Multi-Agent Guided Policy Optimization
(arXiv 2507.18059) and of the benchmarks it takes them from. D4 and D5 are details of
docs/details.md.
"""

import argparse
import functools
import importlib
import math
import os
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import jumanji
from jumanji import specs
from jumanji.env import Environment
from jumanji.environments.routing.connector.generator import LegacyRandomWalkGenerator
from jumanji.environments.routing.lbf.generator import RandomGenerator as LbfGenerator
from jumanji.environments.routing.robot_warehouse.generator import (
    RandomGenerator as RwareGenerator,
)
from jumanji.types import TimeStep
from jumanji.wrappers import Wrapper

try:
    from adapters import (
        VIEWS,
        Adapter,
        Smax,
        Spread,
        TaskError,
        VectorObservation,
        check,
        check_step,
        flat,
        import_jaxmarl,
        make_jaxmarl,
        vector_spec,
    )
except ModuleNotFoundError as error:
    if error.name != "adapters":
        raise
    print("error: tasks.py needs adapters.py beside it", file=sys.stderr)
    sys.exit(2)


def make(env_id: str, scenario: str = "") -> Environment:
    """Makes a task.

    Args:
        env_id: a key of `SUITES`, jaxmarl:NAME for a cooperative game of JaxMARL, or the id of any
            other registered Jumanji environment.
        scenario: the task's name in the papers, of JaxMARL's games see `adapters.make_jaxmarl`; ""
            stands for the environment's own defaults.

    Raises:
        TaskError: on an unknown `env_id`, a `scenario` that `env_id` does not have, one whose sizes
            make no game, or if the suite needs a module that is not there.
    """
    if env_id.startswith("jaxmarl:"):
        return make_jaxmarl(env_id, scenario)
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
            f"--env-id {env_id}: unknown, try {known}, jaxmarl:NAME or the id of another Jumanji "
            "environment"
        )
    if scenario:
        raise TaskError(f"--scenario {scenario}: {env_id} takes none")
    env = jumanji.make(env_id)
    return VIEWS[env_id](env) if env_id in VIEWS else env


def match_rule(rule: str, scenario: str, meaning: str) -> re.Match:
    """Matches a scenario's name with a regular expression; ValueError with its `meaning` if not.

    Numbers in a rule have at most 3 digits: much larger boards abort the process without an error.
    """
    match = re.fullmatch(rule, scenario)
    if match is None:
        raise ValueError(f"does not follow the rule {meaning} (numbers of at most 3 digits)")
    return match


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
        return vector_spec(self)  # without bounds, -1 and 1: D1 leaves the view as D4 has it

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
    return Spread(game, own_rewards=True)


# -------------------- What no agent sees ----------------------------------------------------------
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
    if match is None or match[1] == "jaxmarl":
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
