"""Tests of tasks.py: scenario names, Connector's vector view, JaxMARL's games in Jumanji."""

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


def pairs(by_suite):
    """A dict of lists of scenarios -> (id, scenario) of each."""
    return [(env_id, scenario) for env_id, names in by_suite.items() for scenario in names]


# ----------------------------------------------------------------------------------- scenario names
# The paper's scenarios.
RWARE_SCENARIOS = """tiny-2ag tiny-2ag-hard tiny-4ag tiny-4ag-hard small-4ag small-4ag-hard
    medium-4ag medium-4ag-hard medium-6ag large-4ag large-4ag-hard large-8ag large-8ag-hard
    xlarge-4ag xlarge-4ag-hard""".split()
BOARDS = {  # rows and columns
    "tiny": (11, 10), "small": (20, 10), "medium": (20, 16), "large": (29, 16), "xlarge": (38, 16)}


@pytest.mark.parametrize("name", [*RWARE_SCENARIOS, "tiny-4ag-easy"])
def test_rware_scenarios(name):
    """size-Nag[-easy|-hard] sets board, agents and requests: N, 2 N if easy, N / 2 if hard."""
    size, num_agents, *level = name.removesuffix("ag").replace("ag-", "-").split("-")
    num_agents, env = int(num_agents), make(RWARE, name)
    assert shapes(env) == ((num_agents, 66), (num_agents, 5))
    state, _ = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
    assert state.grid.shape[-2:] == BOARDS[size]
    requests = {"easy": 2 * num_agents, "hard": num_agents // 2}
    assert state.request_queue.shape == (requests[level[0]] if level else num_agents,)
    assert (env.time_limit, env.sensor_range) == (500, 1)


LBF_SCENARIOS = [  # name, agents, food, size, sight, cooperation
    ("2s-8x8-2p-2f-coop", 2, 2, 8, 2, True), ("8x8-2p-2f-coop", 2, 2, 8, 8, True),
    ("2s-10x10-3p-3f", 3, 3, 10, 2, False), ("10x10-3p-3f", 3, 3, 10, 10, False),
    ("15x15-3p-5f", 3, 5, 15, 15, False), ("15x15-4p-3f", 4, 3, 15, 15, False),
    ("15x15-4p-5f", 4, 5, 15, 15, False)]


@pytest.mark.parametrize("name, num_agents, num_food, size, sight, coop", LBF_SCENARIOS)
def test_lbf_scenarios(name, num_agents, num_food, size, sight, coop):
    """[Ss-]GxG-Np-Ff[-coop] sets sight (all without it), board, players, food and cooperation."""
    env = make(LBF, name)
    assert shapes(env) == ((num_agents, 3 * (num_agents + num_food)), (num_agents, 6))
    game = env._generator
    assert (game.grid_size, game.fov, game.num_food) == (size, sight, num_food)
    assert (game.force_coop, game.max_agent_level, env.time_limit) == (coop, 2, 100)


CONNECTOR_SCENARIOS = [  # name, size, agents
    ("con-5x5x3a", 5, 3), ("con-7x7x5a", 7, 5), ("con-10x10x10a", 10, 10),
    ("con-15x15x23a", 15, 23)]


@pytest.mark.parametrize("name, size, num_agents", CONNECTOR_SCENARIOS)
def test_connector_scenarios(name, size, num_agents):
    """con-GxGxNa sets board, agents, a time limit of G * G, and the papers' generator of boards."""
    env = make(CONNECTOR, name)
    assert shapes(env) == ((num_agents, 54), (num_agents, 5))
    assert (env.grid_size, env.time_limit) == (size, size * size)
    assert type(env._generator).__name__ == "LegacyRandomWalkGenerator"


COORDSUM_SCENARIOS = [  # name, agents, actions, targets
    ("3x10-30", 3, 10, 30), ("3x30-50", 3, 30, 50), ("5x20-80", 5, 20, 80),
    ("8x15-100", 8, 15, 100)]


@pytest.mark.parametrize("name, num_agents, num_actions, max_target", COORDSUM_SCENARIOS)
def test_coordsum_scenarios(name, num_agents, num_actions, max_target):
    """NxA-M sets agents, actions and targets; each agent sees the target."""
    env = make(COORDSUM, name)
    assert shapes(env) == ((num_agents, 1), (num_agents, num_actions))
    assert (env.max_target, env.time_limit) == (max_target, 100)


SMAX_SCENARIOS = [  # name, allies, enemies, features, actions
    ("2s3z", 5, 5, 127, 10), ("3s5z", 8, 8, 205, 13), ("3s_vs_5z", 3, 5, 101, 10),
    ("5m_vs_6m", 5, 6, 140, 11), ("6h_vs_8z", 6, 8, 179, 13), ("10m_vs_11m", 10, 11, 270, 16),
    ("27m_vs_30m", 27, 30, 738, 35), ("3s5z_vs_3s6z", 8, 9, 218, 14),
    ("smacv2_5_units", 5, 5, 127, 10), ("smacv2_10_units", 10, 10, 257, 15)]


@pytest.mark.parametrize("name, num_agents, num_enemies, num_features, num_actions", SMAX_SCENARIOS)
def test_smax_scenarios(name, num_agents, num_enemies, num_features, num_actions):
    """A map sets the units of both sides; the rest of the game is as in the paper."""
    env = make(SMAX, name)
    assert shapes(env) == ((num_agents, num_features), (num_agents, num_actions))
    game = env.game
    assert game.num_enemies == num_enemies
    chance = (game.smacv2_unit_type_generation, game.smacv2_position_generation)
    assert chance == (name.startswith("smacv2"),) * 2
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
    assert (env.game.num_landmarks, env.game.local_ratio) == (num_agents, 0.5)
    assert env.own_rewards and env.time_limit == 26


@pytest.mark.parametrize("env_id, views, masks", [
    (RWARE, (4, 66), (4, 5)), (LBF, (2, 12), (2, 6)), (CONNECTOR, (10, 54), (10, 5)),
    (COORDSUM, (3, 1), (3, 10)), (SMAX, (5, 127), (5, 10)), (SPREAD, (3, 18), (3, 5))])
def test_no_scenario(env_id, views, masks):
    """Without a scenario an environment has its own defaults, or JaxMARL's."""
    env = tasks.make(env_id)
    assert shapes(env) == (views, masks)
    if env_id not in (SMAX, SPREAD):
        assert env.time_limit == jumanji.make(env_id).time_limit


# ----------------------------------------------------------------------------- the paper's 43 tasks
def test_paper_tasks():
    """The list holds the scenarios above, suite by suite, and no other."""
    tables = {
        LBF: LBF_SCENARIOS, CONNECTOR: CONNECTOR_SCENARIOS, SMAX: SMAX_SCENARIOS,
        SPREAD: SPREAD_SCENARIOS, COORDSUM: COORDSUM_SCENARIOS}
    names = {env_id: [row[0] for row in rows] for env_id, rows in tables.items()}
    assert tasks.PAPER_TASKS == names | {RWARE: RWARE_SCENARIOS}
    assert tasks.PAPER_TASKS.keys() == tasks.SUITES.keys()
    assert sum(map(len, tasks.PAPER_TASKS.values())) == 43


def play_twice(env, key):
    """A reset and two steps with random legal actions -> the timesteps (3, ...)."""

    def step(carry, key):
        state, mask = carry
        if isinstance(env.action_spec, specs.MultiDiscreteArray):
            action = jax.random.categorical(key, jnp.where(mask, 0.0, -jnp.inf))
        else:
            action = jax.random.uniform(key, mask.shape)
        state, timestep = env.step(state, action)
        return (state, timestep.observation.action_mask), timestep

    state, first = env.reset(key)
    carry = (state, first.observation.action_mask)
    _, later = jax.lax.scan(step, carry, jax.random.split(key))
    return jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, later)


# One of each suite is compiled and run, those beside which the recorded episodes are small.
LARGE = ["8x15-100", "large-8ag-hard", "15x15-4p-5f", "con-15x15x23a", "smacv2_10_units",
         "simple_spread_10ag"]


@pytest.mark.parametrize("env_id, scenario", pairs(tasks.PAPER_TASKS))
def test_paper_tasks_play(env_id, scenario):
    """Every task can be reset and stepped under jit and vmap, and keeps its shapes and dtypes."""
    env = make(env_id, scenario)
    play = jax.jit(jax.vmap(functools.partial(play_twice, env)))
    keys = jax.random.split(jax.random.PRNGKey(0), 2)
    timesteps = jax.eval_shape(play, keys) if scenario not in LARGE else play(keys)
    assert timesteps.observation.action_mask.shape == (2, 3, *shapes(env)[1])
    assert timesteps.reward.dtype == timesteps.discount.dtype == jnp.float32
    if scenario in LARGE:
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(timesteps))
        assert np.all(np.any(timesteps.observation.action_mask, axis=-1))
        view = np.asarray(timesteps.observation.agents_view)
        assert not np.array_equal(view[0], view[1])  # another key, another episode


def test_table(monkeypatch, capsys):
    """`python tasks.py` prints a line for each task."""
    short = {env_id: tasks.PAPER_TASKS[env_id][-1:] for env_id in (RWARE, SMAX, SPREAD)}
    monkeypatch.setattr(tasks, "PAPER_TASKS", short)
    monkeypatch.setattr(sys, "argv", ["tasks.py"])
    tasks.main()
    _, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert rows[:3] == [
        "RobotWarehouse-v0 xlarge-4ag-hard 4 5 discrete 66 70 500".split(),
        "SMAX smacv2_10_units 10 15 discrete 257 267 101".split(),
        "MPE_simple_spread_v3 simple_spread_10ag 10 5 continuous 60 70 26".split()]


# ----------------------------------------------------------------------------------------- refusals
def refusal(env_id, scenario):
    """The one line with which tasks.make refuses."""
    with pytest.raises(tasks.TaskError) as error:
        tasks.make(env_id, scenario)
    assert "\n" not in str(error.value)
    return str(error.value)


EXAMPLES = {
    RWARE: "small-4ag-hard", LBF: "2s-10x10-3p-3f", CONNECTOR: "con-5x5x3a", COORDSUM: "3x10-30",
    SMAX: "3m, 2s3z, 25m, 3s5z,", SPREAD: "simple_spread_3ag"}  # of SMAX all maps
BREAK_THE_RULE = {  # so many agents or cells would abort the process
    RWARE: ["tiny", "huge-2ag", "tiny-2ag-impossible", "tiny-2ag ", "con-5x5x3a",
            "tiny-9999999999ag"],
    LBF: ["8x8", "8x9-2p-2f", "8x8-2p-2f-hard"],
    CONNECTOR: ["5x5x3a", "con-5x6x3a", "con-99999999999x99999999999x3a"],
    COORDSUM: ["3x10", "tiny-2ag"],
    SMAX: ["2s3z ", "simple_spread_3ag"],
    SPREAD: ["3ag", "simple_spread_3ag-hard"]}
CANNOT_BE_BUILT = {
    # no agents; no requested shelves; more agents than cells; more requests than shelves
    RWARE: ["tiny-0ag", "tiny-1ag-hard", "tiny-500ag", "tiny-30ag-easy"],
    # too small a board, more food than fits, sees nothing or farther than the board
    LBF: ["3x3-2p-2f", "8x8-0p-2f", "8x8-2p-0f", "8x8-2p-30f", "0s-8x8-2p-2f", "9s-8x8-2p-2f"],
    # fewer than two cells for each agent
    CONNECTOR: ["con-0x0x1a", "con-3x3x0a", "con-1x1x1a", "con-2x2x9a", "con-5x5x13a"],
    COORDSUM: ["0x3-4", "2x3=9", "2x3-0"],  # 9 is out of reach
    SPREAD: ["simple_spread_0ag"]}


@pytest.mark.parametrize("env_id, scenario", pairs(BREAK_THE_RULE) + pairs(CANNOT_BE_BUILT))
def test_bad_scenarios(env_id, scenario):
    """They are refused with the flag and the name, and an example if they break the rule."""
    message = refusal(env_id, scenario)
    assert message.startswith(f"--scenario {scenario}: ")
    if scenario in BREAK_THE_RULE[env_id]:
        assert EXAMPLES[env_id] in message
        assert env_id != SMAX or "smacv2_5_units" in message


@pytest.mark.parametrize("env_id, scenario", [
    ("Nope-v0", ""), ("Nope-v0", "tiny-2ag"), ("Connector-v2", "con-5x5x3a"), ("", "")])
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
    rows = jnp.arange(3)
    heads = jnp.stack([rows, jnp.full(3, 1)], axis=1)
    targets = jnp.stack([rows, jnp.full(3, 2)], axis=1)
    grid = state.grid.at[:3, 1].set(3 * rows + 2).at[:3, 2].set(3 * rows + 3)
    agents = state.agents.replace(id=rows, start=heads, position=heads, target=targets)
    return state.replace(grid=grid, agents=agents, action_mask=jnp.ones((3, 5), bool))


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
    env, _, timesteps = connector
    assert [bool(timestep.extras["won"]) for timestep in timesteps] == [False, False, True]
    assert [bool(timestep.last()) for timestep in timesteps] == [False, False, True]
    for timestep in timesteps:
        won = timestep.extras["won"]
        assert (won.shape, won.dtype) == ((), bool)
        assert timestep.extras.keys() == timesteps[0].extras.keys() >= {"ratio_connections"}
        env.observation_spec.validate(timestep.observation)
    assert env.observation_spec.generate_value().agents_view.shape == (3, 54)
    assert env.action_spec is env.unwrapped.action_spec


def test_connector_animates(connector, tmp_path):
    """Connector's own drawing works through the vector view."""
    env, state, _ = connector
    path = tmp_path / "connector.gif"
    env.animate([state, state], save_path=str(path))
    assert path.stat().st_size > 1000


# ------------------------------------------------------------------------------------------ JaxMARL
@pytest.mark.slow
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
        assert refusal(env_id, scenario).endswith("needs jaxmarl (pip install jaxmarl)")
    assert sys.stdout is stdout
    tasks.make(COORDSUM, "3x10-30")

    monkeypatch.setattr(tasks, "PAPER_TASKS", {COORDSUM: ["3x10-30"], SMAX: ["2s3z"]})
    monkeypatch.setattr(sys, "argv", ["tasks.py"])
    with pytest.raises(SystemExit) as exit:
        tasks.main()
    assert exit.value.code == 2
    message = "tasks.py: error: --scenario 2s3z: needs jaxmarl (pip install jaxmarl)\n"
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
    units = state.game_state.state
    positions, left = np.array(units.unit_positions), np.zeros(10, np.float32)
    positions[list(places)] = np.reshape(list(places.values()), (-1, 2))
    left[list(health)] = list(health.values())
    units = units.replace(
        unit_positions=jnp.asarray(positions), unit_health=jnp.asarray(left),
        unit_alive=jnp.asarray(left > 0), step=jnp.int32(step))
    return state._replace(game_state=state.game_state.replace(state=units))


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
    """An ally that walks into the wall dies; with the last one the battle is lost, not won. Nor has
    anybody won where nobody is left."""
    env, state, act = smax
    state = arranged(state, {0: 160, 5: 160}, {0: (0.1, 16), 5: (30, 16)})
    _, timestep = act(state, ALL_STOP.at[0].set(LEFT))
    assert result(timestep) == (True, False, 0)
    assert timestep.reward < 1
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
    """The four ways to walk are as documented; each step has a key of its own."""
    env, state, act = smax
    state = arranged(state, {0: 160, 5: 160}, {0: (10, 16), 5: (30, 16)})
    for action, way in ((UP, (0, 1)), (RIGHT, (1, 0)), (DOWN, (0, -1)), (LEFT, (-1, 0))):
        after, _ = act(state, ALL_STOP.at[0].set(action))
        moved = after.game_state.state.unit_positions[0] - np.array([10, 16])
        np.testing.assert_allclose(moved / np.linalg.norm(moved), way, atol=1e-5)
    assert not np.array_equal(after.key, state.key)


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


def test_spread_actions(spread):
    """D16: actions reach the game unscaled and unclipped, as a force of 5 (a2 - a1, a4 - a3)."""
    env, state, act = spread
    places = jnp.array([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])  # they do not touch
    game_state = state.game_state.replace(p_pos=state.game_state.p_pos.at[:3].set(places))
    action = jnp.array([[0, -1, 1, -1, 1], [0, 0, 1, 0.5, 0], [1, 0, 0, 0, 0]], jnp.float32)
    _, timestep = act(state._replace(game_state=game_state), action)
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
    after, _ = act(state, jnp.tile(jnp.array([0.0, 0, 1, 0, 1]), (3, 1)))
    check_gif(env, [state, after], tmp_path / "spread.gif")
    assert capsys.readouterr() == ("", "")
