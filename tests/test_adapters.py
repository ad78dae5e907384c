"""Tests of adapters.py: JaxMARL's games against JaxMARL itself, Jumanji's for several agents."""

import functools
import importlib
import shutil
import types

import jax
import jax.numpy as jnp
import jumanji
import numpy as np
import pytest
from conftest import run_program
from jumanji import specs
from test_shape import ROOT

import adapters
import tasks

pytestmark = pytest.mark.usefixtures("quick_compile")


@functools.cache
def make(name, scenario=""):
    return tasks.make(f"jaxmarl:{name}", scenario)


def is_slow(*game):
    return pytest.param(*game, marks=pytest.mark.slow)


# ------------------------------------------------------------------------------------ JaxMARL's own
BRAX = pytest.mark.skipif(importlib.util.find_spec("brax") is None, reason="needs brax")


@pytest.mark.parametrize("name, scenario, options, num_steps", [
    ("switch_riddle", "", {}, 12), ("MPE_simple_speaker_listener_v4", "", {}, 30),
    is_slow("MPE_simple_reference_v3", "own", {}, 30),
    is_slow("MPE_simple_facmac_3a_v1", "", {}, 30), is_slow("hanabi", "3ag", {"num_agents": 3}, 60),
    is_slow("overcooked", "coord_ring-shaped", {}, 402),
    is_slow("overcooked_v2", "cramped_room-shaped-own", {"layout": "cramped_room"}, 402),
    is_slow("jaxnav", "", {"rew_lambda": 0.0}, 120), is_slow("jaxnav", "-own", {}, 30),
    is_slow("HeuristicEnemySMAX", "", {}, 102),
    pytest.param("humanoid_9|8", "", {"auto_reset": False}, 8, marks=[pytest.mark.slow, BRAX]),
])
def test_as_jaxmarl_has_it(name, scenario, options, num_steps):
    """Agents, bounds, observations, masks, rewards and ends are those of JaxMARL's own game and
    steps, with the same keys and actions."""
    import jaxmarl
    from jaxmarl.environments.overcooked import overcooked_layouts
    if name == "overcooked":
        options = {"layout": overcooked_layouts["coord_ring"]}
    env, game = make(name, scenario), jaxmarl.make(name, **options)
    agents = [agent for agent in game.agents if "facmac" not in name or "adversary" in agent]
    spaces = [game.action_space(agent) for agent in agents]
    state, timestep = jax.jit(env.reset)(jax.random.PRNGKey(1))
    obs, game_state = game.reset(jax.random.PRNGKey(1))
    step, game_step = jax.jit(env.step), jax.jit(game.step_env)
    rng, ends = np.random.default_rng(0), 0
    for _ in range(num_steps):
        view, mask = map(np.asarray, timestep.observation)
        assert len(view) == len(mask) == len(agents) == env.action_spec.shape[0]
        for j, agent in enumerate(agents):
            own = np.ravel(obs[agent])
            padded = np.pad(own, (0, view.shape[1] - len(own)))
            np.testing.assert_allclose(view[j], padded, rtol=1e-3, atol=1e-4)
        if name in ("hanabi", "HeuristicEnemySMAX"):
            tell = game.get_legal_moves if name == "hanabi" else game.get_avail_actions
            legal = tell(game_state)
            np.testing.assert_array_equal(mask, np.stack([legal[agent] for agent in agents]))
        if hasattr(game, "get_world_state"):
            world = jax.tree.leaves(game.get_world_state(game_state))
            np.testing.assert_allclose(
                env.global_state(state), np.concatenate(world, None), rtol=1e-4, atol=1e-5)
        if hasattr(spaces[0], "low"):
            action = np.zeros(env.action_spec.shape, np.float32)
            for j, space in enumerate(spaces):
                used = slice(space.shape[0])
                bounds = env.action_spec.minimum[j, used], env.action_spec.maximum[j, used]
                np.testing.assert_array_equal(bounds[0], np.broadcast_to(space.low, space.shape))
                np.testing.assert_array_equal(bounds[1], np.broadcast_to(space.high, space.shape))
                action[j, used] = rng.uniform(*bounds)
            own_actions = [row[: space.shape[0]] for row, space in zip(action, spaces)]
        else:
            assert list(env.action_spec.num_values) == [space.n for space in spaces]
            action = own_actions = np.array([rng.choice(np.flatnonzero(row)) for row in mask])
        idle = {agent: np.zeros(game.action_space(agent).shape) for agent in game.agents}
        actions = idle | dict(zip(agents, own_actions))
        obs, game_state, rewards, done, info = game_step(state.key, game_state, actions)
        state, timestep = step(state, action)
        paid = np.array([rewards[agent] for agent in agents])
        hints = [info["shaped_reward"][agent] for agent in agents] if "shaped" in scenario else [0]
        expected = paid + np.array(hints) if "own" in scenario else paid[0] + np.sum(hints)
        np.testing.assert_allclose(timestep.reward, expected, rtol=1e-5)
        assert bool(timestep.last()) == bool(done["__all__"])
        if done["__all__"]:
            ends += 1
            state, timestep = jax.jit(env.reset)(jax.random.PRNGKey(ends + 1))
            obs, game_state = game.reset(jax.random.PRNGKey(ends + 1))
    assert ends > 0 or name in ("hanabi", "jaxnav", "humanoid_9|8")


def test_won_on_the_road():
    """jaxnav is won when the episode ends with all robots at their goals, none of which has bumped
    into anything."""
    won = functools.partial(adapters.JaxNav.extras, None, rewards={})
    yes, no = jnp.array([True, True]), jnp.array([False, False])
    one = jnp.array([True, False])
    for arrived, crashed, ended, expected in [
        (yes, no, True, True), (yes, no, False, False), (one, no, True, False),
        (yes, one, True, False),
    ]:
        state = types.SimpleNamespace(goal_reached=arrived, move_term=crashed, ep_done=ended)
        assert won(game_state=state)["won"] == expected


def test_ends():
    """An episode that ends for time alone is cut off; one that somebody ends in its last step
    terminates, and is won if all have been in the room."""
    env = make("switch_riddle")
    step = jax.jit(env.step)
    state, _ = env.reset(jax.random.PRNGKey(0))
    wait, tell = np.zeros(3, int), np.full(3, env.game.game_actions["TELL"])
    late = state.game_state.replace(step=env.game.max_steps - 1)
    everybody = state.game_state.replace(has_been=jnp.ones(3, int))
    for game_state, action, discount, reward, last, won in [
        (state.game_state, wait, 1, 0, False, False), (late, wait, 1, 0, True, False),
        (late, tell, 0, -1, True, False), (everybody, tell, 0, 1, True, True),
    ]:
        _, timestep = step(state._replace(game_state=game_state), action)
        assert (timestep.discount, timestep.reward) == (discount, reward)
        assert (bool(timestep.last()), bool(timestep.extras["won"])) == (last, won)


def test_each_registered_game():
    """Each of JaxMARL's games is in one of the lists, or needs a package; what cannot be trained on
    is refused in one line that names it and says why."""
    import jaxmarl
    names = {name for name in jaxmarl.registered_envs if "Robotarium" not in name}
    assert names == adapters.GAMES.keys() | adapters.REFUSED.keys()
    reasons = dict(adapters.REFUSED)
    reasons |= dict.fromkeys(adapters.OWN_REWARDS, "--scenario=-own")
    reasons |= {"JaxRobotarium_rware": "jaxrobotarium package", "Nope": "unknown, try one of MPE"}
    if not importlib.util.find_spec("brax"):
        reasons |= dict.fromkeys(adapters.BRAX, "requires brax")
    for name, reason in reasons.items():
        with pytest.raises(tasks.TaskError, match="^[^\n]+$") as caught:
            tasks.make_trainable(f"jaxmarl:{name}")
        assert str(caught.value).startswith(f"--env-id jaxmarl:{name}: ")
        assert reason in str(caught.value)


@pytest.mark.parametrize("name, scenario, reason", [
    ("overcooked", "kitchen", "a scenario is one of cramped_room"), ("hanabi", "3", "Nag"),
    ("hanabi", "9ag", "at most 5"), ("hanabi", "1ag", "between 2 and 5"),
    ("jaxnav", "0ag", "Nag"), ("hanabi", "shaped", "no hints"),
    ("overcooked", "cramped_room-own-shaped", "a scenario is one of"),
    ("HeuristicEnemySMAX", "2s", "a scenario is one of 3m"), ("MPE_simple_v3", "3ag", "has no sc"),
])
def test_bad_scenario(name, scenario, reason):
    with pytest.raises(tasks.TaskError, match=reason) as caught:
        make(name, scenario)
    assert f"--env-id jaxmarl:{name} --scenario {scenario}: " in str(caught.value)


# --------------------------------------------------------------------------------- a game by itself
class Game:
    """Two agents that see numbers of their own and are paid for what they do."""

    agents, num_agents = ("a", "b"), 2

    def action_space(self, agent):
        return types.SimpleNamespace(n={"a": 2, "b": 3}[agent], shape=(), dtype=int)

    def reset(self, key):
        return {"a": jnp.ones(1), "b": jnp.full((2, 2), 2, jnp.uint8)}, {"step": 0}

    def get_avail_actions(self, state):
        return {"a": jnp.array([0, 1]), "b": jnp.array([1, 0, 1])}

    def step_env(self, key, state, actions):
        step = state["step"] + 1
        paid = {agent: 1.0 * actions[agent] for agent in self.agents}
        info = {"shaped_reward": {"a": 3.0, "b": 5.0}}
        return self.reset(key)[0], {"step": step}, paid, {"__all__": step >= 3}, info


@pytest.mark.parametrize("options, action, reward, true", [
    ({}, (1, 1), 1, 1), ({}, (1, 2), np.nan, np.nan), ({"own_rewards": True}, (1, 2), (1, 2), 1.5),
    ({"shaped": True}, (1, 1), 9, 1), ({"shaped": True, "own_rewards": True}, (1, 2), (4, 7), 1.5),
])
@pytest.mark.parametrize("script", ["magpo_ff", "magpo_ff_state"])
def test_rewards(script, options, action, reward, true):
    """What agents are said to share but do not is not a number; hints count as reward, and not as
    return."""
    env = adapters.JaxMarl(Game(), **options)
    if script == "magpo_ff_state":
        env.global_state = lambda state: jnp.zeros(1)
    _, timestep = env.step(env.reset(jax.random.PRNGKey(0))[0], np.array(action))
    np.testing.assert_array_equal(timestep.reward, reward)
    team = importlib.import_module(script).TeamEnv(adapters.Adapter(env))
    state, rewards, _, _ = team.step(team.reset(jax.random.PRNGKey(0)), jnp.array(action))
    np.testing.assert_array_equal(rewards, np.broadcast_to(reward, 2))
    np.testing.assert_array_equal(state.episode["return"], true)


def test_views_of_one_length():
    """Shorter views end with zeros, numbers become float32, and actions beyond an agent's own are
    never legal."""
    _, timestep = adapters.JaxMarl(Game()).reset(jax.random.PRNGKey(0))
    view, mask = timestep.observation
    np.testing.assert_array_equal(view, [[1, 0, 0, 0], [2, 2, 2, 2]])
    np.testing.assert_array_equal(mask, [[False, True, False], [True, False, True]])
    assert view.dtype == jnp.float32


# ------------------------------------------------------------------------------ Jumanji's and files
def test_jumanji_views():
    """What each agent sees of Jumanji's games: what all share, and its own place or rays."""
    env = tasks.make("Cleaner-v0")
    state, timestep = jax.jit(env.reset)(jax.random.PRNGKey(0))
    np.testing.assert_array_equal(timestep.observation.action_mask, state.action_mask)
    grid = jnp.ones((10, 10), int).at[1, 2].set(0).at[3, 4].set(2)
    places = jnp.array([[0, 1], [2, 3], [4, 5]])
    seen = types.SimpleNamespace(grid=grid, agents_locations=places, step_count=30)
    view = env.view(seen)
    np.testing.assert_array_equal(np.flatnonzero(view[0, :200]), [12, 134])
    np.testing.assert_allclose(view[:, 200:203], [[0.3, 0, 0.1], [0.3, 0.2, 0.3], [0.3, 0.4, 0.5]])
    np.testing.assert_allclose(view[:, 203:], [[0, 0.1, 0.2, 0.3, 0.4, 0.5]] * 3)
    env = tasks.make("SearchAndRescue-v0")
    rays = jnp.arange(12.0).reshape(2, 2, 3)
    seen = types.SimpleNamespace(searcher_views=rays, targets_remaining=0.5, step=100)
    expected = [[0, 1, 2, 3, 4, 5, 0.5, 0.25], [6, 7, 8, 9, 10, 11, 0.5, 0.25]]
    np.testing.assert_array_equal(env.view(seen), expected)


def test_view_of_the_vehicles():
    """MultiCVRP: all nodes, the vehicle itself, all vehicles."""
    env = tasks.make("MultiCVRP-v0")
    assert isinstance(env.action_spec, specs.MultiDiscreteArray)
    assert env.action_spec.num_values.tolist() == [21, 21]
    state, timestep = jax.jit(env.reset)(jax.random.PRNGKey(0))
    seen = jumanji.make("MultiCVRP-v0")._state_to_observation(state)
    vehicles = jnp.array([[1.0, 2, 30, 40], [5, 6, 70, 20]])
    cars = seen.vehicles.replace(
        coordinates=vehicles[:, :2], local_times=vehicles[:, 2], capacities=vehicles[:, 3])
    view = env.view(seen._replace(vehicles=cars))
    unit = np.array([10, 10, env._env._max_end_window, env._env._max_capacity])
    nodes = [
        seen.nodes.coordinates / 10, seen.nodes.demands / unit[3], seen.windows.start / unit[2],
        seen.windows.end / unit[2], seen.coeffs.early, seen.coeffs.late]
    for j in range(2):
        parts = [*map(np.ravel, nodes), vehicles[j] / unit, np.ravel(vehicles / unit)]
        np.testing.assert_allclose(view[j], np.concatenate(parts), rtol=1e-6)


def test_without_adapters(environ, tmp_path):
    """A script with tasks.py alone says which file is missing."""
    for name in ("magpo_ff.py", "tasks.py"):
        shutil.copy(ROOT / name, tmp_path)
    run = run_program(tmp_path / "magpo_ff.py", ["--dry-run"], environ, succeeds=False)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == "error: tasks.py needs adapters.py beside it"
