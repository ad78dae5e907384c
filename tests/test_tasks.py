"""Tests of tasks.py: scenario names, what they stand for, and Connector's vector view."""

import jax
import jax.numpy as jnp
import jumanji
import numpy as np
import pytest

import tasks

pytestmark = pytest.mark.usefixtures("quick_compile")

RWARE, LBF, CONNECTOR = "RobotWarehouse-v0", "LevelBasedForaging-v0", "Connector-v3"
COORDSUM = "CoordSum-v0"


def shapes(env):
    """The shapes of agents_view and action_mask, without compiling anything."""
    _, timestep = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
    observation = timestep.observation
    assert observation.action_mask.dtype == bool
    return observation.agents_view.shape, observation.action_mask.shape


# ----------------------------------------------------------------------------------- scenario names
# the paper's scenarios: name, agents, rows and columns of the board, requested shelves
RWARE_SCENARIOS = [
    ("tiny-2ag", 2, (11, 10), 2),
    ("tiny-2ag-hard", 2, (11, 10), 1),
    ("tiny-4ag", 4, (11, 10), 4),
    ("tiny-4ag-hard", 4, (11, 10), 2),
    ("small-4ag", 4, (20, 10), 4),
    ("small-4ag-hard", 4, (20, 10), 2),
    ("medium-4ag", 4, (20, 16), 4),
    ("medium-4ag-hard", 4, (20, 16), 2),
    ("medium-6ag", 6, (20, 16), 6),
    ("large-4ag", 4, (29, 16), 4),
    ("large-4ag-hard", 4, (29, 16), 2),
    ("large-8ag", 8, (29, 16), 8),
    ("large-8ag-hard", 8, (29, 16), 4),
    ("xlarge-4ag", 4, (38, 16), 4),
    ("xlarge-4ag-hard", 4, (38, 16), 2),
    ("tiny-4ag-easy", 4, (11, 10), 8),  # not in the paper, but of the same family
]


@pytest.mark.parametrize("name, num_agents, board, requests", RWARE_SCENARIOS)
def test_rware_scenarios(name, num_agents, board, requests):
    """size-Nag[-easy|-hard] sets board, agents and requests: N, 2 N if easy, N / 2 if hard."""
    env = tasks.make(RWARE, name)
    assert shapes(env) == ((num_agents, 66), (num_agents, 5))
    state, _ = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
    assert state.grid.shape[-2:] == board
    assert state.request_queue.shape == (requests,)
    assert env.time_limit == 500
    assert env.sensor_range == 1


LBF_SCENARIOS = [
    ("2s-8x8-2p-2f-coop", 2, 2, 8, 2, True),
    ("8x8-2p-2f-coop", 2, 2, 8, 8, True),
    ("2s-10x10-3p-3f", 3, 3, 10, 2, False),
    ("10x10-3p-3f", 3, 3, 10, 10, False),
    ("15x15-3p-5f", 3, 5, 15, 15, False),
    ("15x15-4p-3f", 4, 3, 15, 15, False),
    ("15x15-4p-5f", 4, 5, 15, 15, False),
]


@pytest.mark.parametrize("name, num_agents, num_food, size, sight, coop", LBF_SCENARIOS)
def test_lbf_scenarios(name, num_agents, num_food, size, sight, coop):
    """[Ss-]GxG-Np-Ff[-coop] sets sight (all without it), board, players, food and cooperation."""
    env = tasks.make(LBF, name)
    assert shapes(env) == ((num_agents, 3 * (num_agents + num_food)), (num_agents, 6))
    generator = env._generator
    assert generator.grid_size == size
    assert generator.fov == sight
    assert generator.num_food == num_food
    assert generator.force_coop == coop
    assert generator.max_agent_level == 2
    assert env.time_limit == 100


CONNECTOR_SCENARIOS = [
    ("con-5x5x3a", 5, 3),
    ("con-7x7x5a", 7, 5),
    ("con-10x10x10a", 10, 10),
    ("con-15x15x23a", 15, 23),
]


@pytest.mark.parametrize("name, size, num_agents", CONNECTOR_SCENARIOS)
def test_connector_scenarios(name, size, num_agents):
    """con-GxGxNa sets board, agents, a time limit of G * G, and the papers' generator of boards."""
    env = tasks.make(CONNECTOR, name)
    assert shapes(env) == ((num_agents, 54), (num_agents, 5))
    assert env.grid_size == size
    assert env.time_limit == size * size
    assert type(env._generator).__name__ == "LegacyRandomWalkGenerator"


COORDSUM_SCENARIOS = [
    ("3x10-30", 3, 10, 30),
    ("3x30-50", 3, 30, 50),
    ("5x20-80", 5, 20, 80),
    ("8x15-100", 8, 15, 100),
]


@pytest.mark.parametrize("name, num_agents, num_actions, max_target", COORDSUM_SCENARIOS)
def test_coordsum_scenarios(name, num_agents, num_actions, max_target):
    """NxA-M sets agents, actions and targets; each agent sees the target."""
    env = tasks.make(COORDSUM, name)
    assert shapes(env) == ((num_agents, 1), (num_agents, num_actions))
    assert env.max_target == max_target
    assert env.time_limit == 100


@pytest.mark.parametrize("env_id, expected", [
    (RWARE, ((4, 66), (4, 5))),
    (LBF, ((2, 12), (2, 6))),
    (CONNECTOR, ((10, 54), (10, 5))),
    (COORDSUM, ((3, 1), (3, 10))),
])
def test_no_scenario(env_id, expected):
    """Without a scenario an environment has its own defaults."""
    assert shapes(tasks.make(env_id)) == expected
    assert tasks.make(env_id).time_limit == jumanji.make(env_id).time_limit


# ----------------------------------------------------------------------------------------- refusals
def refusal(env_id, scenario):
    """The one line with which tasks.make refuses."""
    with pytest.raises(ValueError) as error:
        tasks.make(env_id, scenario)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("env_id, scenario, example", [
    (RWARE, "tiny", "small-4ag-hard"),
    (RWARE, "huge-2ag", "small-4ag-hard"),
    (RWARE, "tiny-2ag-impossible", "small-4ag-hard"),
    (RWARE, "tiny-2ag ", "small-4ag-hard"),
    (RWARE, "con-5x5x3a", "small-4ag-hard"),
    (RWARE, "tiny-9999999999ag", "small-4ag-hard"),  # these and the like would abort the process
    (LBF, "8x8", "2s-10x10-3p-3f"),
    (LBF, "8x9-2p-2f", "2s-10x10-3p-3f"),
    (LBF, "8x8-2p-2f-hard", "2s-10x10-3p-3f"),
    (CONNECTOR, "5x5x3a", "con-5x5x3a"),
    (CONNECTOR, "con-5x6x3a", "con-5x5x3a"),
    (CONNECTOR, "con-99999999999x99999999999x3a", "con-5x5x3a"),
    (COORDSUM, "3x10", "3x10-30"),
    (COORDSUM, "tiny-2ag", "3x10-30"),
])
def test_names_that_break_the_rule(env_id, scenario, example):
    """A name that does not follow the rule is refused with the flag, the name and an example."""
    message = refusal(env_id, scenario)
    assert message.startswith(f"--scenario {scenario}: ")
    assert example in message


@pytest.mark.parametrize("env_id, scenario", [
    (RWARE, "tiny-0ag"),  # no agents
    (RWARE, "tiny-1ag-hard"),  # no requested shelves
    (RWARE, "tiny-500ag"),  # more agents than cells
    (RWARE, "tiny-30ag-easy"),  # more requests than shelves
    (LBF, "3x3-2p-2f"),  # too small a board
    (LBF, "8x8-0p-2f"),
    (LBF, "8x8-2p-0f"),
    (LBF, "8x8-2p-30f"),  # more food than fits
    (LBF, "0s-8x8-2p-2f"),
    (LBF, "9s-8x8-2p-2f"),  # sees farther than the board
    (CONNECTOR, "con-0x0x1a"),
    (CONNECTOR, "con-3x3x0a"),
    (CONNECTOR, "con-1x1x1a"),  # fewer than two cells for each agent
    (CONNECTOR, "con-2x2x9a"),
    (CONNECTOR, "con-5x5x13a"),
    (COORDSUM, "0x3-4"),
    (COORDSUM, "2x3=9"),  # a target out of reach
    (COORDSUM, "2x3-0"),
])
def test_scenarios_that_cannot_be_built(env_id, scenario):
    """A name that follows the rule but makes no game is refused with the flag and the name."""
    assert refusal(env_id, scenario).startswith(f"--scenario {scenario}: ")


@pytest.mark.parametrize("env_id, scenario", [
    ("Nope-v0", ""),
    ("Nope-v0", "tiny-2ag"),
    ("Connector-v2", "con-5x5x3a"),
    ("nonsense", ""),
    ("", ""),
])
def test_unknown_ids(env_id, scenario):
    """An unknown id is refused by name, with those to try, whatever the scenario."""
    message = refusal(env_id, scenario)
    assert message.startswith(f"--env-id {env_id}: unknown")
    assert all(suite in message for suite in tasks.SUITES)


def test_other_environments():
    """A registered environment of no suite is made as it is, and takes no scenario."""
    assert type(tasks.make("Snake-v1")) is type(jumanji.make("Snake-v1"))
    assert refusal("Snake-v1", "tiny-2ag") == "--scenario tiny-2ag: Snake-v1 takes none"


# ---------------------------------------------------------------------------------------- Connector
def all_but_connected(env):
    """A state of con-5x5x3a in which each head is to the left of its target."""
    like, _ = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    grid = np.zeros((5, 5), np.int32)
    grid[:3, 1] = (2, 5, 8)
    grid[:3, 2] = (3, 6, 9)
    rows = jnp.arange(3)
    heads = jnp.stack([rows, jnp.full(3, 1)], axis=1)
    targets = jnp.stack([rows, jnp.full(3, 2)], axis=1)
    agents = state.agents.replace(id=rows, start=heads, position=heads, target=targets)
    mask = jnp.ones((3, 5), bool)
    return state.replace(grid=jnp.asarray(grid), agents=agents, action_mask=mask)


@pytest.fixture(scope="module")
def connector():
    """con-5x5x3a, and its timesteps of a reset, a step of two agents and one that connects all."""
    env = tasks.make(CONNECTOR, "con-5x5x3a")
    state, first = jax.jit(env.reset)(jax.random.PRNGKey(0))
    step = jax.jit(env.step)
    _, partly = step(all_but_connected(env), jnp.array([2, 2, 0]))  # 2: to the right
    _, fully = step(all_but_connected(env), jnp.array([2, 2, 2]))
    return env, state, (first, partly, fully)


def test_connector_won(connector):
    """An episode is won if all agents are connected; each timestep has the same extras."""
    _, _, timesteps = connector
    assert [bool(timestep.extras["won"]) for timestep in timesteps] == [False, False, True]
    assert [bool(timestep.last()) for timestep in timesteps] == [False, False, True]
    for timestep in timesteps:
        assert timestep.extras["won"].shape == ()
        assert timestep.extras["won"].dtype == bool
        assert timestep.extras.keys() == timesteps[0].extras.keys()
        assert "ratio_connections" in timestep.extras


def test_connector_spec(connector):
    """Observations are as their spec says, and no other spec differs from Connector's."""
    env, _, timesteps = connector
    for timestep in timesteps:
        env.observation_spec.validate(timestep.observation)
    assert env.observation_spec.generate_value().agents_view.shape == (3, 54)
    assert env.action_spec is env.unwrapped.action_spec


def test_connector_view_of_the_edge(connector):
    """Beyond the board both windows read 1; a connected agent has its target at (0, 0)."""
    _, _, (_, partly, _) = connector
    view = np.asarray(partly.observation.agents_view)
    np.testing.assert_allclose(view[0, :4], np.array([0, 2, 0, 0]) / 25)
    np.testing.assert_allclose(view[2, :4], np.array([2, 1, 2, 2]) / 25)
    blockers, targets = view[0, 4:].reshape(2, 5, 5)
    np.testing.assert_array_equal(blockers[:2], 1)
    np.testing.assert_array_equal(blockers[2], [0, -1, 1, 0, 0])
    np.testing.assert_array_equal(targets[:2], 1)
    np.testing.assert_array_equal(targets[2], 0)


def test_connector_animates(connector, tmp_path):
    """Connector's own drawing works through the vector view."""
    env, state, _ = connector
    path = tmp_path / "connector.gif"
    env.animate([state, state], save_path=str(path))
    assert path.stat().st_size > 1000
