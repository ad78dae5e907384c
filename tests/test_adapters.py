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
@pytest.mark.parametrize("name, scenario, num_steps", [
    ("switch_riddle", "", 12), ("MPE_simple_speaker_listener_v4", "", 30),
    is_slow("MPE_simple_reference_v3", "own", 30), is_slow("MPE_simple_facmac_3a_v1", "", 30),
    is_slow("hanabi", "3ag", 60), is_slow("overcooked", "coord_ring-shaped", 402),
    is_slow("overcooked_v2", "cramped_room-own-shaped", 402), is_slow("jaxnav", "", 120),
    is_slow("jaxnav", "own", 30), is_slow("HeuristicEnemySMAX", "3m", 102),
])
def test_as_jaxmarl_has_it(name, scenario, num_steps):
    """Observations, masks, rewards and ends are those of JaxMARL's own steps, with the same keys
    and actions."""
    env = make(name, scenario)
    game, agents = env.game, env.agents
    state, timestep = jax.jit(env.reset)(jax.random.PRNGKey(1))
    obs, game_state = game.reset(jax.random.PRNGKey(1))
    step, game_step = jax.jit(env.step), jax.jit(game.step_env)
    rng, ends = np.random.default_rng(0), 0
    for _ in range(num_steps):
        view, mask = map(np.asarray, timestep.observation)
        for j, agent in enumerate(agents):
            own = np.ravel(obs[agent])
            np.testing.assert_array_equal(view[j], np.pad(own, (0, view.shape[1] - len(own))))
        if hasattr(game, "get_legal_moves"):
            legal = game.get_legal_moves(game_state)
            np.testing.assert_array_equal(mask, np.stack([legal[agent] for agent in agents]))
        if env.continuous:
            action = rng.uniform(env.action_spec.minimum, env.action_spec.maximum)
            action = action.astype(np.float32)
        else:
            action = np.array([rng.choice(np.flatnonzero(row)) for row in mask])
        idle = {agent: np.zeros(env.action_spec.shape[1:]) for agent in game.agents}
        actions = idle | dict(zip(agents, action))
        obs, game_state, rewards, done, info = game_step(state.key, state.game_state, actions)
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
    assert ends > 0 or name in ("hanabi", "jaxnav")


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
    ("hanabi", "9ag", "between 2 and 5"), ("hanabi", "shaped", "no hints"),
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
        raise NotImplementedError

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
    np.testing.assert_array_equal(mask, [[True, True, False], [True, True, True]])
    assert view.dtype == jnp.float32


# ------------------------------------------------------------------------------ Jumanji's and files
def test_jumanji_views():
    """What each agent sees of Jumanji's games: what all share, and its own place or rays."""
    env = tasks.make("Cleaner-v0")
    grid = jnp.ones((10, 10), int).at[1, 2].set(0).at[3, 4].set(2)
    seen = types.SimpleNamespace(grid=grid, agents_locations=jnp.array([[0, 1], [2, 3], [4, 5]]))
    view = env.view(seen)
    np.testing.assert_array_equal(np.flatnonzero(view[0, :200]), [12, 134])
    np.testing.assert_allclose(view[:, 200:202], view[0, 202:].reshape(3, 2))
    np.testing.assert_allclose(view[2, 200:202], [0.4, 0.5])
    env = tasks.make("SearchAndRescue-v0")
    rays = jnp.arange(12.0).reshape(2, 2, 3)
    seen = types.SimpleNamespace(searcher_views=rays, targets_remaining=0.5)
    expected = [[0, 1, 2, 3, 4, 5, 0.5], [6, 7, 8, 9, 10, 11, 0.5]]
    np.testing.assert_array_equal(env.view(seen), expected)
    env = tasks.make("MultiCVRP-v0")
    _, timestep = jax.jit(env.reset)(jax.random.PRNGKey(0))
    view = timestep.observation.agents_view
    assert view.shape == (2, 21 * 7 + 4 + 2 * 4) and jnp.max(jnp.abs(view)) < 2
    np.testing.assert_array_equal(view[:, 147:151], view[0, 151:].reshape(2, 4))
    assert isinstance(env.action_spec, specs.MultiDiscreteArray)
    assert jumanji.make("MultiCVRP-v0")._num_customers + 1 == env.action_spec.num_values[0]


def test_without_adapters(environ, tmp_path):
    """A script with tasks.py alone says which file is missing."""
    for name in ("magpo_ff.py", "tasks.py"):
        shutil.copy(ROOT / name, tmp_path)
    run = run_program(tmp_path / "magpo_ff.py", ["--dry-run"], environ, succeeds=False)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == "error: tasks.py needs adapters.py beside it"
