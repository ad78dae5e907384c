"""Tests of tasks.py: scenario names, Connector's vector view, JaxMARL's games in Jumanji."""

import functools
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import jumanji
import numpy as np
import pytest
from jumanji import specs
from PIL import Image

import adapters
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
SCENARIOS = {  # the paper's; each begins with agents, features, actions
    RWARE: {  # rows, columns, requests: N, 2 N if easy, N / 2 if hard
        "tiny-2ag": (2, 66, 5, 11, 10, 2), "tiny-2ag-hard": (2, 66, 5, 11, 10, 1),
        "tiny-4ag": (4, 66, 5, 11, 10, 4), "tiny-4ag-hard": (4, 66, 5, 11, 10, 2),
        "small-4ag": (4, 66, 5, 20, 10, 4), "small-4ag-hard": (4, 66, 5, 20, 10, 2),
        "medium-4ag": (4, 66, 5, 20, 16, 4), "medium-4ag-hard": (4, 66, 5, 20, 16, 2),
        "medium-6ag": (6, 66, 5, 20, 16, 6), "large-4ag": (4, 66, 5, 29, 16, 4),
        "large-4ag-hard": (4, 66, 5, 29, 16, 2), "large-8ag": (8, 66, 5, 29, 16, 8),
        "large-8ag-hard": (8, 66, 5, 29, 16, 4), "xlarge-4ag": (4, 66, 5, 38, 16, 4),
        "xlarge-4ag-hard": (4, 66, 5, 38, 16, 2)},
    LBF: {  # food, size, sight (all without it), cooperation
        "2s-8x8-2p-2f-coop": (2, 12, 6, 2, 8, 2, True), "8x8-2p-2f-coop": (2, 12, 6, 2, 8, 8, True),
        "2s-10x10-3p-3f": (3, 18, 6, 3, 10, 2, False), "10x10-3p-3f": (3, 18, 6, 3, 10, 10, False),
        "15x15-3p-5f": (3, 24, 6, 5, 15, 15, False), "15x15-4p-3f": (4, 21, 6, 3, 15, 15, False),
        "15x15-4p-5f": (4, 27, 6, 5, 15, 15, False)},
    CONNECTOR: {  # size, time limit
        "con-5x5x3a": (3, 54, 5, 5, 25), "con-7x7x5a": (5, 54, 5, 7, 49),
        "con-10x10x10a": (10, 54, 5, 10, 100), "con-15x15x23a": (23, 54, 5, 15, 225)},
    COORDSUM: {  # targets
        "3x10-30": (3, 1, 10, 30), "3x30-50": (3, 1, 30, 50), "5x20-80": (5, 1, 20, 80),
        "8x15-100": (8, 1, 15, 100)},
    SMAX: {  # enemies, whether units and places are drawn anew
        "2s3z": (5, 127, 10, 5, False), "3s5z": (8, 205, 13, 8, False),
        "3s_vs_5z": (3, 101, 10, 5, False), "5m_vs_6m": (5, 140, 11, 6, False),
        "6h_vs_8z": (6, 179, 13, 8, False), "10m_vs_11m": (10, 270, 16, 11, False),
        "27m_vs_30m": (27, 738, 35, 30, False), "3s5z_vs_3s6z": (8, 218, 14, 9, False),
        "smacv2_5_units": (5, 127, 10, 5, True), "smacv2_10_units": (10, 257, 15, 10, True)},
    SPREAD: {  # landmarks
        "simple_spread_3ag": (3, 18, 5, 3), "simple_spread_5ag": (5, 30, 5, 5),
        "simple_spread_10ag": (10, 60, 5, 10)},
}


def parts_of(env_id, env):
    """What a scenario sets besides agents, features and actions, and whether the rest is as in the
    papers."""
    if env_id == RWARE:
        state, _ = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
        own = (*state.grid.shape[-2:], *state.request_queue.shape)
        return own, (env.time_limit, env.sensor_range) == (500, 1)
    if env_id == LBF:
        game = env._generator
        own = (game.num_food, game.grid_size, game.fov, game.force_coop)
        return own, (game.max_agent_level, env.time_limit) == (2, 100)
    if env_id == CONNECTOR:
        is_legacy = type(env._generator).__name__ == "LegacyRandomWalkGenerator"
        return (env.grid_size, env.time_limit), is_legacy
    if env_id == COORDSUM:
        return (env.max_target,), env.time_limit == 100
    game = env.game
    if env_id == SPREAD:
        return (game.num_landmarks,), game.local_ratio == 0.5 and env.own_rewards
    own = (game.num_enemies, game.smacv2_unit_type_generation)
    rest = (game.attack_mode, game.enemy_shoots, game.see_enemy_actions, game.walls_cause_death,
            game.use_self_play_reward, game.won_battle_bonus, game.world_steps_per_env_step)
    drawn = game.smacv2_unit_type_generation == game.smacv2_position_generation
    return own, drawn and rest == ("closest", True, True, True, False, 1.0, 8)


# One of each suite is compiled and run, those beside which the recorded episodes are small.
LARGE = ["8x15-100", "large-8ag-hard", "15x15-4p-5f", "con-15x15x23a", "smacv2_10_units",
         "simple_spread_10ag"]
OF_EACH_KIND = """tiny-2ag tiny-2ag-hard tiny-4ag-easy small-4ag medium-6ag xlarge-4ag-hard 2s3z
    2s-8x8-2p-2f-coop 10x10-3p-3f con-5x5x3a 3x10-30 simple_spread_3ag""".split() + LARGE


@pytest.mark.parametrize("env_id, scenario", [
    pytest.param(*task, marks=[] if task[1] in OF_EACH_KIND else pytest.mark.slow)
    for task in [*pairs(SCENARIOS), (RWARE, "tiny-4ag-easy")]])
def test_scenarios(env_id, scenario):
    """A scenario's name sets what the table says, and all else is as in the papers."""
    env = make(env_id, scenario)
    view, mask = shapes(env)
    own, as_in_the_papers = parts_of(env_id, env)
    assert as_in_the_papers and view[0] == mask[0]
    easy = {"tiny-4ag-easy": (4, 66, 5, 11, 10, 8)}
    assert (*view, mask[1], *own) == (SCENARIOS[env_id] | easy)[scenario]


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
    assert tasks.PAPER_TASKS == {env_id: list(names) for env_id, names in SCENARIOS.items()}
    assert tasks.PAPER_TASKS.keys() == tasks.SUITES.keys()
    assert sum(map(len, tasks.PAPER_TASKS.values())) == 43


def play_twice(env, key):
    """A reset and two steps with random legal actions -> the timesteps (3, ...), the state after
    them, and what magpo_ff_state.py tells of it."""

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
    (state, _), later = jax.lax.scan(step, carry, jax.random.split(key))
    timesteps = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, later)
    return timesteps, state, env.global_state(state)


@pytest.mark.parametrize("env_id, scenario", [
    pytest.param(*task, marks=[] if task[1] in LARGE else pytest.mark.slow)
    for task in pairs(tasks.PAPER_TASKS)])
def test_paper_tasks_play(env_id, scenario):
    """Every task can be reset and stepped under jit and vmap, and keeps its shapes and dtypes."""
    env = make(env_id, scenario)
    play = jax.jit(jax.vmap(functools.partial(play_twice, env)))
    keys = jax.random.split(jax.random.PRNGKey(0), 2)
    timesteps, states, told = jax.eval_shape(play, keys) if scenario not in LARGE else play(keys)
    assert timesteps.observation.action_mask.shape == (2, 3, *shapes(env)[1])
    assert timesteps.reward.dtype == timesteps.discount.dtype == told.dtype == jnp.float32
    assert told.ndim == 2
    if scenario in LARGE:
        assert all(np.all(np.isfinite(x)) for x in (told, *jax.tree.leaves(timesteps)))
        assert np.all(np.any(timesteps.observation.action_mask, axis=-1))
        view = np.asarray(timesteps.observation.agents_view)
        assert not np.array_equal(view[0], view[1])  # another key, another episode
        for i in range(2):
            check_global_state(env_id, jax.tree.map(lambda x: x[i], states), np.asarray(told[i]))


def check_global_state(env_id, state, told):
    """What a state of one of the games above tells, compared with the state itself."""
    if env_id == "CoordSum-v0":
        counts = state.counts[state.target]
        assert (told[:15] * 100).sum() == pytest.approx(counts.sum())
        assert told[15:].tolist() == np.eye(15)[np.argmax(counts)].tolist()
    elif env_id == "RobotWarehouse-v0":
        shelves, robots, requested = told[: 3 * state.grid[0].size].reshape(3, -1).sum(axis=1)
        assert (robots, requested) == (8, 4) and shelves == len(state.shelves.is_requested)
        robots, size = state.agents, state.grid.shape[1:]
        rest = [robots.position.x / size[0], robots.position.y / size[1],
                np.eye(4)[robots.direction].ravel(), robots.is_carrying]
        np.testing.assert_allclose(told[3 * math.prod(size) :], np.concatenate(rest), rtol=1e-6)
    elif env_id == "LevelBasedForaging-v0":
        np.testing.assert_allclose(told[:8].reshape(4, 2) * 15, state.agents.position)
        assert told[-5:].tolist() == (~state.food_items.eaten).tolist()
        players, eaten = state.agents, np.array([True, False, False, False, False])
        state = state.replace(food_items=state.food_items.replace(eaten=jnp.asarray(eaten)))
        told = np.asarray(tasks.lbf_state(make(env_id, "15x15-4p-5f"), state))
        assert told[8:16].tolist() == [*players.level.tolist(), *players.loading.tolist()]
        food = state.food_items
        np.testing.assert_allclose(told[16:26].reshape(5, 2) * 15, food.position * ~eaten[:, None])
        assert told[26:].tolist() == [*(food.level * ~eaten).tolist(), *(~eaten).tolist()]
    elif env_id == "Connector-v3":
        assert told[:225].sum() == np.sum(state.grid == 0)
        ends = np.stack([state.agents.position, state.agents.target])
        np.testing.assert_allclose(told[225:].reshape(2, 23, 2) * 15, ends, rtol=1e-6)
    elif env_id == "SMAX":
        assert np.all(told[:200].reshape(20, 10)[:, 0] > 0)  # twenty units, all in good health
    else:
        assert told[:40].tolist() == state.game_state.p_pos.ravel().tolist()
        assert told[40:].tolist() == state.game_state.p_vel.ravel().tolist()


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


# ------------------------------------------------------------------------------------------ JaxMARL
def test_key_of_the_next_step():
    """The key that a step or reset leaves is none of those that JaxMARL draws with."""
    key = jax.random.PRNGKey(3)
    drawn = [key, *jax.random.split(key), *jax.random.split(key, 3)]
    assert not any(np.array_equal(adapters.following_key(key), other) for other in drawn)
    assert not np.array_equal(adapters.following_key(key), adapters.following_key(drawn[1]))
    state, _ = make(SPREAD, "simple_spread_3ag").reset(key)
    assert np.array_equal(state.key, adapters.following_key(key))


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
    assert env.ends_anyway(state, {}, nobody) and not env.extras(nobody, {})["won"]


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


def test_smax_shots_have_the_key_of_the_step(smax):
    """It decides how long a weapon cools down."""
    _, state, act = smax
    state = arranged(state, {0: 160, 5: 160}, DUEL)
    shots = [act(state._replace(key=jax.random.PRNGKey(seed)), ALL_STOP.at[0].set(SHOOT_FIRST))[0]
             for seed in (1, 2)]
    first, second = (shot.game_state.state.unit_weapon_cooldowns[0] for shot in shots)
    assert first != second


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


@pytest.mark.parametrize("game", ["smax", "spread", "connector"])
def test_animate(game, request, tmp_path, capsys):
    """One frame per state, drawn as often as asked for; units, shots and the dead; no words.
    Connector's own drawing works through the vector view."""
    env, state, act = request.getfixturevalue(game)
    if game == "connector":
        after = all_but_connected(env)
    elif game == "spread":
        after, _ = act(state, jnp.ones((3, 5)).at[:, 1].set(0.0))
    else:
        state = arranged(state, {0: 160, 5: 160}, DUEL)
        after, _ = act(state, ALL_STOP.at[0].set(SHOOT_FIRST))
    path = tmp_path / "game.gif"
    env.animate([state, after], interval=200, save_path=str(path))
    with Image.open(path) as picture:
        assert (picture.format, picture.n_frames, picture.info["duration"]) == ("GIF", 2, 200)
    assert capsys.readouterr() == ("", "")
