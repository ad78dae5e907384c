"""Tests of tasks.py: scenario names, what they stand for, Connector's vector view, and how the
games of JaxMARL become Jumanji environments."""

import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import jumanji
import numpy as np
import pytest
from jumanji import specs
from PIL import Image

import tasks

pytestmark = pytest.mark.usefixtures("quick_compile")

RWARE, LBF, CONNECTOR = "RobotWarehouse-v0", "LevelBasedForaging-v0", "Connector-v3"
COORDSUM, SMAX, SPREAD = "CoordSum-v0", "SMAX", "MPE_simple_spread_v3"
ROOT = pathlib.Path(__file__).parent.parent
make = functools.cache(tasks.make)


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
    env = make(RWARE, name)
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
    env = make(LBF, name)
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
    env = make(CONNECTOR, name)
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
    env = make(COORDSUM, name)
    assert shapes(env) == ((num_agents, 1), (num_agents, num_actions))
    assert env.max_target == max_target
    assert env.time_limit == 100


SMAX_SCENARIOS = [  # name, allies, enemies, features, actions
    ("2s3z", 5, 5, 127, 10),
    ("3s5z", 8, 8, 205, 13),
    ("3s_vs_5z", 3, 5, 101, 10),
    ("5m_vs_6m", 5, 6, 140, 11),
    ("6h_vs_8z", 6, 8, 179, 13),
    ("10m_vs_11m", 10, 11, 270, 16),
    ("27m_vs_30m", 27, 30, 738, 35),
    ("3s5z_vs_3s6z", 8, 9, 218, 14),
    ("smacv2_5_units", 5, 5, 127, 10),
    ("smacv2_10_units", 10, 10, 257, 15),
]


@pytest.mark.parametrize("name, num_agents, num_enemies, num_features, num_actions", SMAX_SCENARIOS)
def test_smax_scenarios(name, num_agents, num_enemies, num_features, num_actions):
    """A map sets the units of both sides; the rest of the game is as in the paper."""
    env = make(SMAX, name)
    assert shapes(env) == ((num_agents, num_features), (num_agents, num_actions))
    game = env.game
    assert game.num_enemies == num_enemies
    assert game.smacv2_unit_type_generation == game.smacv2_position_generation
    assert game.smacv2_unit_type_generation == name.startswith("smacv2")
    assert (game.attack_mode, game.enemy_shoots) == ("closest", True)
    assert game.see_enemy_actions and game.walls_cause_death and not game.use_self_play_reward
    assert (game.won_battle_bonus, game.world_steps_per_env_step) == (1.0, 8)
    assert env.time_limit == 101


SPREAD_SCENARIOS = [("simple_spread_3ag", 3), ("simple_spread_5ag", 5), ("simple_spread_10ag", 10)]


@pytest.mark.parametrize("name, num_agents", SPREAD_SCENARIOS)
def test_spread_scenarios(name, num_agents):
    """simple_spread_Nag sets agents and landmarks; all five numbers of an action are legal."""
    env = make(SPREAD, name)
    assert shapes(env) == ((num_agents, 6 * num_agents), (num_agents, 5))
    assert env.game.num_landmarks == num_agents
    assert env.game.local_ratio == 0.5
    assert env.own_rewards
    assert env.time_limit == 26


@pytest.mark.parametrize("env_id, expected", [
    (SMAX, ((5, 127), (5, 10))),
    (SPREAD, ((3, 18), (3, 5))),
])
def test_no_scenario_of_jaxmarl(env_id, expected):
    """Without a scenario the games have JaxMARL's own sizes."""
    assert shapes(tasks.make(env_id)) == expected


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


# ----------------------------------------------------------------------------- the paper's 43 tasks
def test_paper_tasks():
    """The list holds the scenarios above, suite by suite, and no other."""
    assert tasks.PAPER_TASKS.keys() == tasks.SUITES.keys()
    assert tasks.PAPER_TASKS == {
        COORDSUM: [row[0] for row in COORDSUM_SCENARIOS],
        RWARE: [row[0] for row in RWARE_SCENARIOS[:-1]],
        LBF: [row[0] for row in LBF_SCENARIOS],
        CONNECTOR: [row[0] for row in CONNECTOR_SCENARIOS],
        SMAX: [row[0] for row in SMAX_SCENARIOS],
        SPREAD: [row[0] for row in SPREAD_SCENARIOS],
    }
    assert sum(map(len, tasks.PAPER_TASKS.values())) == 43


def play_twice(env, key):
    """A reset and two steps with random legal actions -> the timesteps (3, ...)."""

    def step(carry, key):
        state, mask = carry
        if isinstance(env.action_spec, specs.MultiDiscreteArray):
            action = jax.random.categorical(key, jnp.where(mask, 0.0, -jnp.inf))
        else:
            low, high = env.action_spec.minimum, env.action_spec.maximum
            action = jax.random.uniform(key, env.action_spec.shape, minval=low, maxval=high)
        state, timestep = env.step(state, action)
        return (state, timestep.observation.action_mask), timestep

    state, first = env.reset(key)
    carry = (state, first.observation.action_mask)
    _, later = jax.lax.scan(step, carry, jax.random.split(key))
    return jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, later)


# One of each suite is compiled and run, those beside which the recorded episodes are small.
LARGE = ["8x15-100", "large-8ag-hard", "15x15-4p-5f", "con-15x15x23a", "smacv2_10_units",
         "simple_spread_10ag"]


@pytest.mark.parametrize("env_id, scenario", [
    (env_id, scenario) for env_id, names in tasks.PAPER_TASKS.items() for scenario in names
])
def test_paper_tasks_play(env_id, scenario):
    """Every task can be reset and stepped under jit and vmap, and keeps its shapes and dtypes."""
    env = make(env_id, scenario)
    play = jax.jit(jax.vmap(functools.partial(play_twice, env)))
    keys = jax.random.split(jax.random.PRNGKey(0), 2)
    num_agents, num_actions = shapes(env)[1]
    timesteps = jax.eval_shape(play, keys) if scenario not in LARGE else play(keys)
    assert timesteps.observation.action_mask.shape == (2, 3, num_agents, num_actions)
    assert timesteps.reward.dtype == timesteps.discount.dtype == jnp.float32
    if scenario in LARGE:
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(timesteps))
        assert np.all(np.any(timesteps.observation.action_mask, axis=-1))
        view = np.asarray(timesteps.observation.agents_view)
        assert not np.array_equal(view[0], view[1])  # another key, another episode


def test_table(monkeypatch, capsys):
    """`python tasks.py` prints a line for each task."""
    short = {env_id: names[-1:] for env_id, names in tasks.PAPER_TASKS.items()}
    monkeypatch.setattr(tasks, "PAPER_TASKS", short)
    monkeypatch.setattr(tasks, "make", make)
    monkeypatch.setattr(sys, "argv", ["tasks.py"])
    tasks.main()
    _, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert rows[:6] == [
        "CoordSum-v0 8x15-100 8 15 discrete 1 9 100".split(),
        "RobotWarehouse-v0 xlarge-4ag-hard 4 5 discrete 66 70 500".split(),
        "LevelBasedForaging-v0 15x15-4p-5f 4 6 discrete 27 31 100".split(),
        "Connector-v3 con-15x15x23a 23 5 discrete 54 77 225".split(),
        "SMAX smacv2_10_units 10 15 discrete 257 267 101".split(),
        "MPE_simple_spread_v3 simple_spread_10ag 10 5 continuous 60 70 26".split(),
    ]


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
    (SMAX, "2s3z ", "3m, 2s3z, 25m, 3s5z,"),  # all maps
    (SMAX, "simple_spread_3ag", "smacv2_5_units"),
    (SPREAD, "3ag", "simple_spread_3ag"),
    (SPREAD, "simple_spread_3ag-hard", "simple_spread_3ag"),
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
    (SPREAD, "simple_spread_0ag"),
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


# ------------------------------------------------------------------------------------------ JaxMARL
def test_import_is_silent():
    """JaxMARL's import prints nothing here, and leaves the standard streams as they are."""
    code = """
import io, sys
names = ("stdout", "stderr", "__stdout__", "__stderr__")
sys.stdout = io.StringIO()
before = [getattr(sys, name) for name in names]
import tasks
tasks.make("MPE_simple_spread_v3")
assert "jaxmarl" in sys.modules
assert [getattr(sys, name) for name in names] == before
assert sys.stdout.getvalue() == ""
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_jaxmarl_is_not_there(monkeypatch, capsys):
    """Without JaxMARL the error and the list say what to install; the other suites work."""
    monkeypatch.setitem(sys.modules, "jaxmarl", None)
    stdout = sys.stdout
    for env_id, scenario in ((SMAX, "2s3z"), (SMAX, ""), (SPREAD, "simple_spread_3ag")):
        with pytest.raises(ModuleNotFoundError, match=r"^needs jaxmarl \(pip install jaxmarl\)$"):
            tasks.make(env_id, scenario)
    assert sys.stdout is stdout
    tasks.make(COORDSUM, "3x10-30")

    monkeypatch.setattr(tasks, "PAPER_TASKS", {COORDSUM: ["3x10-30"], SMAX: ["2s3z"]})
    monkeypatch.setattr(sys, "argv", ["tasks.py"])
    with pytest.raises(SystemExit) as exit:
        tasks.main()
    assert exit.value.code == 2
    message = "tasks.py: error: SMAX: needs jaxmarl (pip install jaxmarl)\n"
    assert capsys.readouterr() == ("", message)


def test_key_of_the_next_step():
    """The key that a step or reset leaves is none of those that JaxMARL draws with."""
    key = jax.random.PRNGKey(3)
    drawn = [key, *jax.random.split(key), *jax.random.split(key, 3)[:2]]
    assert not any(np.array_equal(tasks.following_key(key), other) for other in drawn)
    assert not np.array_equal(tasks.following_key(key), tasks.following_key(drawn[1]))


# --------------------------------------------------------------------------------------------- SMAX
UP, RIGHT, DOWN, LEFT, STOP, SHOOT_FIRST = range(6)


@pytest.fixture(scope="module")
def smax():
    """2s3z, a start state, and its compiled step."""
    env = make(SMAX, "2s3z")
    state, _ = jax.jit(env.reset)(jax.random.PRNGKey(0))
    return env, state, jax.jit(env.step)


def arranged(state, health, places, step=0):
    """The state with these units alone: health and places by unit, the allies' units 0 to 4."""
    game_state = state.game_state.state
    positions = np.array(game_state.unit_positions)
    for unit, place in places.items():
        positions[unit] = place
    left = np.zeros(10, np.float32)
    left[list(health)] = list(health.values())
    game_state = game_state.replace(
        unit_positions=jnp.asarray(positions),
        unit_health=jnp.asarray(left),
        unit_alive=jnp.asarray(left > 0),
        step=jnp.int32(step),
    )
    return state._replace(game_state=state.game_state.replace(state=game_state))


def result(timestep):
    return bool(timestep.last()), bool(timestep.extras["won"]), float(timestep.discount)


ALL_STOP = jnp.full(5, STOP, jnp.int32)
DUEL = {0: (10, 16), 5: (13, 16)}  # within reach of each other


@pytest.mark.parametrize("step", [0, 100])
def test_smax_win(smax, step):
    """The last enemy's death wins and terminates, with survivors, also in the very last step."""
    env, state, act = smax
    state = arranged(state, {0: 160, 1: 160, 5: 1}, DUEL, step)
    _, timestep = act(state, ALL_STOP.at[0].set(SHOOT_FIRST))
    assert result(timestep) == (True, True, 0)
    assert timestep.reward >= 1  # the papers' sign of a win


def test_smax_defeat(smax):
    """An ally that walks into the wall dies; with the last one the battle is lost, not won."""
    env, state, act = smax
    state = arranged(state, {0: 160, 5: 160}, {0: (0.1, 16), 5: (30, 16)})
    _, timestep = act(state, ALL_STOP.at[0].set(LEFT))
    assert result(timestep) == (True, False, 0)
    assert timestep.reward < 1


def test_smax_draw(smax):
    """Where nobody is left, nobody has won."""
    env, state, _ = smax
    nobody = arranged(state, {}, {}).game_state
    assert env.terminated(nobody) and not env.extras(nobody)["won"]


def test_smax_time_limit(smax):
    """The 101st step truncates: it is the last one, and the discount is 1."""
    env, state, act = smax
    far = {0: (2, 16), 5: (30, 16)}
    for step, expected in ((99, (False, False, 1)), (100, (True, False, 1))):
        _, timestep = act(arranged(state, {0: 160, 5: 160}, far, step), ALL_STOP)
        assert result(timestep) == expected
    assert step + 1 == env.time_limit


def test_smax_dead_agent(smax):
    """A dead agent sees nothing, can only stop, and what it does changes nothing."""
    env, state, act = smax
    state = arranged(state, {0: 160, 1: 160, 5: 160}, DUEL | {2: (11, 16)})
    seen = []
    for action in (STOP, UP, SHOOT_FIRST):
        _, timestep = act(state, ALL_STOP.at[2].set(action).at[0].set(SHOOT_FIRST))
        assert result(timestep) == (False, False, 1)
        assert timestep.reward.shape == () and timestep.reward > 0  # for the dead agent, too
        seen.append(timestep.observation)
        np.testing.assert_array_equal(seen[-1].agents_view[2:], 0)
        np.testing.assert_array_equal(seen[-1].action_mask[2:], [np.arange(10) == STOP] * 3)
        np.testing.assert_array_equal(seen[-1].action_mask[0], [True] * 6 + [False] * 4)
        np.testing.assert_array_equal(seen[-1].agents_view, seen[0].agents_view)


def test_smax_directions(smax):
    """The four ways to walk are as documented."""
    env, state, act = smax
    state = arranged(state, {0: 160, 5: 160}, {0: (10, 16), 5: (30, 16)})
    for action, way in ((UP, (0, 1)), (RIGHT, (1, 0)), (DOWN, (0, -1)), (LEFT, (-1, 0))):
        after, _ = act(state, ALL_STOP.at[0].set(action))
        moved = after.game_state.state.unit_positions[0] - np.array([10, 16])
        np.testing.assert_allclose(moved / np.linalg.norm(moved), way, atol=1e-5)


def test_smax_chance(smax):
    """Each step has a key of its own; the same key gives the same step."""
    env, state, act = smax
    action = ALL_STOP.at[0].set(SHOOT_FIRST)
    state = arranged(state, {0: 160, 5: 160}, DUEL)
    other = state._replace(key=jax.random.PRNGKey(9))
    views = [act(s, action)[1].observation.agents_view for s in (state, state, other)]
    np.testing.assert_array_equal(views[0], views[1])
    assert not np.array_equal(views[0], views[2])  # weapons cool down at random
    assert not np.array_equal(act(state, action)[0].key, state.key)


def check_gif(env, states, path):
    """Frames are drawn as often as asked for, and differ."""
    env.animate(states, interval=200, save_path=str(path))
    with Image.open(path) as picture:
        assert picture.format == "GIF" and picture.n_frames == len(states)
        assert picture.info["duration"] == 200


def test_smax_animates(smax, tmp_path, capsys):
    """One frame per state; units, shots and the dead are drawn."""
    env, state, act = smax
    fight = arranged(state, {0: 160, 5: 160}, DUEL)
    after, _ = act(fight, ALL_STOP.at[0].set(SHOOT_FIRST))
    check_gif(env, [state, fight, after], tmp_path / "smax.gif")
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------- MPE
@pytest.fixture(scope="module")
def spread():
    """simple_spread_3ag, a start state, and its compiled step."""
    env = make(SPREAD, "simple_spread_3ag")
    state, _ = jax.jit(env.reset)(jax.random.PRNGKey(0))
    return env, state, jax.jit(env.step)


@pytest.mark.parametrize("seed", "01")
def test_golden_spread(seed):
    """Recorded episodes to the bit: the same keys and actions give the same views, rewards, end."""
    prefix = f"mpe/simple_spread_3ag/{seed}/"
    with np.load(ROOT / "tests" / "data" / "golden_envs.npz") as file:
        golden = {name.removeprefix(prefix): file[name] for name in file if prefix in name}
    env = make(SPREAD, "simple_spread_3ag")

    def episode(key, step_keys, actions):
        state, first = env.reset(key)

        def step(state, inputs):
            step_key, action = inputs
            return env.step(state._replace(key=step_key), action)

        return first, jax.lax.scan(step, state, (step_keys, actions))[1]

    # With few optimisations the last digits differ.
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        keys = golden["reset_key"], golden["step_key"]
        first, timesteps = jax.jit(episode)(*keys, golden["action"])
    finally:
        jax.config.update("jax_disable_most_optimizations", True)

    num_agents = env.num_agents  # the recorded views have their ids first
    first_view, views = golden["reset_agents_view"], golden["agents_view"]
    np.testing.assert_array_equal(first.observation.agents_view, first_view[:, num_agents:])
    np.testing.assert_array_equal(timesteps.observation.agents_view, views[..., num_agents:])
    np.testing.assert_array_equal(timesteps.observation.action_mask, golden["action_mask"])
    np.testing.assert_array_equal(timesteps.reward, golden["reward"])
    np.testing.assert_array_equal(timesteps.last(), golden["last"])
    np.testing.assert_array_equal(timesteps.discount, 1)  # truncated, never terminated
    assert golden["truncated"].sum() == 1


def test_spread_time_limit(spread):
    """The 26th step truncates, and nothing can be won."""
    env, state, act = spread
    ends = []
    for _ in range(26):
        state, timestep = act(state, jnp.zeros((3, 5)))
        ends.append((bool(timestep.last()), float(timestep.discount)))
        assert "won" not in timestep.extras
    assert ends == [(False, 1)] * 25 + [(True, 1)]
    assert len(ends) == env.time_limit


def moved_to(state, places):
    """The state with its three agents at these places, at rest."""
    positions = state.game_state.p_pos.at[:3].set(jnp.asarray(places))
    return state._replace(game_state=state.game_state.replace(p_pos=positions))


def test_spread_rewards(spread):
    """The landmarks' reward is everybody's; who touches somebody has half a point less for each."""
    env, state, act = spread
    state = moved_to(state, [[0.0, 0.0], [0.2, 0.0], [-0.8, 0.8]])
    _, timestep = act(state, jnp.zeros((3, 5)))
    assert timestep.reward.shape == (3,)
    first, second, alone = timestep.reward
    assert first == second
    np.testing.assert_allclose(alone - first, 0.5, rtol=1e-6)


def test_spread_actions(spread):
    """D16: actions reach the game unscaled and unclipped, as a force of 5 (a2 - a1, a4 - a3)."""
    env, state, act = spread
    state = moved_to(state, [[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])  # they do not touch
    action = jnp.array([[0, -1, 1, -1, 1], [0, 0, 1, 0.5, 0], [1, 0, 0, 0, 0]], jnp.float32)
    _, timestep = act(state, action)
    force = np.array([[10, 10], [5, -2.5], [0, 0]])
    velocity = timestep.observation.agents_view[:, :2]
    np.testing.assert_allclose(velocity, 0.1 * force, atol=1e-6)  # a step is 0.1 s, the mass 1
    assert np.all(action >= env.action_spec.minimum) and np.all(action <= env.action_spec.maximum)


@pytest.mark.parametrize("game", ["smax", "spread"])
def test_specs_of_jaxmarl(game, request):
    """Timesteps are as their specs say, and actions of the spec can be taken."""
    env, state, act = request.getfixturevalue(game)
    _, first = jax.jit(env.reset)(jax.random.PRNGKey(1))
    _, second = act(state, env.action_spec.generate_value())
    for timestep in (first, second):
        env.observation_spec.validate(timestep.observation)
        env.reward_spec.validate(timestep.reward)
        env.discount_spec.validate(timestep.discount)
        assert timestep.extras.keys() == first.extras.keys()
    assert first.first() and second.mid()


def test_spread_animates(spread, tmp_path, capsys):
    """JaxMARL's drawing, one frame per state, without its words."""
    env, state, act = spread
    states = [state]
    for _ in range(2):
        states.append(act(states[-1], jnp.ones((3, 5)) * jnp.array([0, 0, 1, 0, 1]))[0])
    check_gif(env, states, tmp_path / "spread.gif")
    assert capsys.readouterr() == ("", "")
