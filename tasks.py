"""The papers' task names as Jumanji environments.

They are what the flags `--env-id` and `--scenario` of the scripts stand for:

    env = tasks.make("RobotWarehouse-v0", "tiny-4ag-hard")
    state, timestep = jax.jit(env.reset)(jax.random.PRNGKey(0))

Every environment that `make` makes for a suite of the papers has

    timestep.observation.agents_view   (N, ...), what each of the N agents sees
    timestep.observation.action_mask   (N, A) bool, True where an action is legal

and, if its episodes can be won, in every timestep, that of a reset included,

    timestep.extras["won"]             () bool, True on the step that ends an episode which is won

A suite is one function from a scenario's name to an environment, and one entry of `SUITES`. The
function raises ValueError, with what is allowed, on a name that it cannot use; `make` puts the flag
before it. The names, and what they stand for, are those of Multi-Agent Guided Policy Optimization
(arXiv 2507.18059) and of the benchmarks it takes them from. D4 and D5 are details of the README.
"""

import functools
import re
from typing import Any, NamedTuple

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


def make(env_id: str, scenario: str = "") -> Environment:
    """Makes a task.

    Args:
        env_id: a key of `SUITES`, or the id of any other registered Jumanji environment.
        scenario: the task's name in the papers; "" stands for the environment's own defaults.

    Raises:
        ValueError: in one line that names the flag and its value, on an unknown `env_id`, a
            `scenario` that `env_id` does not have, or one whose sizes make no game.
        ModuleNotFoundError: if the suite needs a module that is not there.
    """
    if env_id not in SUITES:
        return make_other(env_id, scenario)
    make_suite = SUITES[env_id]
    if scenario == "":
        return make_suite("")
    try:
        env = make_suite(scenario)
        jax.eval_shape(env.reset, jax.random.PRNGKey(0))  # some sizes fail only here
    except (AssertionError, OverflowError, TypeError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"--scenario {scenario}: {first_line}") from error
    return env


def make_other(env_id: str, scenario: str) -> Environment:
    """A registered Jumanji environment of no suite, which has no scenarios."""
    if env_id not in jumanji.registered_environments():
        known = ", ".join(SUITES)
        raise ValueError(
            f"--env-id {env_id}: unknown, try {known} or the id of another Jumanji environment"
        )
    if scenario:
        raise ValueError(f"--scenario {scenario}: {env_id} takes none")
    return jumanji.make(env_id)


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


class VectorObservation(NamedTuple):
    """What the agents of `VectorConnector` see."""

    agents_view: jax.Array  # (N, 54) float32, see `connector_view`
    action_mask: jax.Array  # (N, 5) bool


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
        view = specs.BoundedArray((self._env.num_agents, 54), jnp.float32, -1.0, 1.0, "agents_view")
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


SUITES = {
    "CoordSum-v0": make_coordsum,
    "RobotWarehouse-v0": make_rware,
    "LevelBasedForaging-v0": make_lbf,
    "Connector-v3": make_connector,
}
