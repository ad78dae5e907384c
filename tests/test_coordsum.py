"""Tests of CoordSum: recorded episodes, the reward rule by hand, the jumanji interface."""

import pathlib

import jax
import jax.numpy as jnp
import jumanji
import numpy as np
import pytest
from jumanji.testing.env_not_smoke import check_env_does_not_smoke, check_env_specs_does_not_smoke
from PIL import Image

import coordsum
from coordsum import CoordSum, parse_scenario

pytestmark = pytest.mark.usefixtures("quick_compile")

GOLDEN = pathlib.Path(__file__).parent / "data" / "golden_envs.npz"


def play(env, targets, actions):
    """Plays `actions` (T, N) against the given `targets` (T,): the stacked states and timesteps."""

    def step(state, inputs):
        target, action = inputs
        state, timestep = env.step(state.replace(target=target), action)
        return state, (state, timestep)

    first, _ = env.reset(jax.random.key(0))
    inputs = jnp.asarray(targets, jnp.int32), jnp.asarray(actions, jnp.int32)
    return jax.lax.scan(step, first, inputs)[1]


@pytest.mark.parametrize("scenario", ["3x10-30", "5x20-80"])
def test_rewards_equal_the_recorded_ones(scenario):
    """With either history; the recorded rewards tell the two apart."""
    names = ("targets", "actions", "reward", "reward_released")
    with np.load(GOLDEN) as golden:
        targets, actions, *expected = (golden[f"coordsum/{scenario}/{name}"] for name in names)
    for suffix, rewards in zip(("", "-released"), expected):
        _, timestep = play(CoordSum(**parse_scenario(scenario + suffix)), targets, actions)
        np.testing.assert_array_equal(timestep.reward, rewards)
    assert np.sum(expected[0] != expected[1]) >= 3


def test_reward_table():
    rows = [  # target, actions, guess, reward
        (4, (1, 1, 1), 0, 0),  # miss; the 1 is remembered all the same
        (4, (1, 1, 2), 1, 1),  # match, guessed
        (4, (2, 1, 1), 1, 2),  # match, not guessed
        (5, (0, 2, 3), 0, 1),  # a target without history: the guess is 0
        (5, (3, 2, 0), 0, 2),  # counts of target 5: one 0
        (5, (3, 1, 1), 0, 2),  # tie of 0 and 3: the smaller
        (5, (3, 2, 0), 3, 1),  # 3 leads by now
        (4, (2, 0, 2), 1, 2),  # back to target 4: two 1, one 2
        (4, (1, 3, 0), 1, 1),  # tie of 1 and 2: the smaller
        (0, (0, 0, 0), 0, 1),  # target 0 never pays 2
        (0, (1, 0, 0), 0, 0),
    ]
    targets, actions, guesses, rewards = zip(*rows)
    states, timestep = play(CoordSum(3, 4, 6), targets, actions)
    np.testing.assert_array_equal(timestep.reward, rewards)
    np.testing.assert_array_equal(states.last_guess, guesses)
    np.testing.assert_array_equal(states.last_reward, rewards)
    np.testing.assert_array_equal(states.episode_return, np.cumsum(rewards))
    np.testing.assert_array_equal(states.last_target, targets)
    np.testing.assert_array_equal(states.last_actions, actions)
    counts = np.zeros((6, 4), int)
    counts[0, :2], counts[4, 1:3], counts[5, [0, 3]] = (1, 1), (3, 2), (1, 3)
    np.testing.assert_array_equal(states.counts[-1], counts)


def test_interface():
    """Jumanji's own checks pass, with legacy keys as well; sizes and types of spec and state."""
    env = CoordSum(**parse_scenario("3x10=10-released"), time_limit=5)
    check_env_does_not_smoke(env)
    check_env_specs_does_not_smoke(env)
    env = CoordSum()
    state, timestep = env.reset(jax.random.PRNGKey(0))
    assert timestep.first() and timestep.discount == 1 and timestep.observation.action_mask.all()
    np.testing.assert_array_equal(timestep.observation.agents_view, np.full((3, 1), state.target))
    assert env.action_spec.num_values.tolist() == [10, 10, 10]
    assert env.action_spec.dtype == jnp.int32
    assert (state.counts.shape, state.last_actions.shape) == ((30, 10), (3,))
    assert type(jumanji.make("CoordSum-v0", num_agents=2)) is CoordSum
    assert repr(env) == (
        "CoordSum(num_agents=3, num_actions=10, max_target=30, time_limit=100, history='target')")


@pytest.mark.parametrize("time_limit", [1, 100])
def test_terminates_at_the_time_limit_only(time_limit):
    env = CoordSum(time_limit=time_limit)
    states, timestep = play(env, [6] * time_limit, [(2, 2, 2)] * time_limit)  # all matches
    expected = np.arange(1, time_limit + 1) == time_limit
    np.testing.assert_array_equal(jax.vmap(lambda t: t.last())(timestep), expected)
    np.testing.assert_array_equal(timestep.discount, 1.0 - expected)
    np.testing.assert_array_equal(timestep.observation.step_count, np.arange(1, time_limit + 1))
    np.testing.assert_array_equal(timestep.observation.agents_view[:, 0, 0], states.target)


def test_targets_are_uniform():
    """Those drawn by reset, by the first step, and all; none depends on the one before, and the
    key for those to come is not one that was used."""
    env = CoordSum()

    @jax.jit
    @jax.vmap
    def episode(key):
        first, _ = env.reset(key)
        actions = jnp.zeros((19, env.num_agents), jnp.int32)
        targets = jax.lax.scan(lambda s, a: (env.step(s, a)[0],) * 2, first, actions)[1].target
        return jnp.concatenate([first.target[None], targets])

    def chi2(values, cells):
        expected = values.size / cells
        return np.sum((np.bincount(values.ravel(), minlength=cells) - expected) ** 2) / expected

    targets = np.asarray(episode(jax.random.split(jax.random.key(1), 600)))  # (600, 20)
    for part in (targets[:, 0], targets[:, 1], targets):
        assert chi2(part, 30) < 60  # 29 degrees of freedom
    state, key = env.reset(jax.random.PRNGKey(0))[0].key, jax.random.PRNGKey(0)
    assert not any(np.array_equal(state, used) for used in (key, jax.random.split(key)[1]))
    thirds = targets // 10
    assert chi2(3 * thirds[:, :-1] + thirds[:, 1:], 9) < 30  # 8 degrees of freedom


@pytest.mark.parametrize("history", ["target", "released"])
def test_constant_target(history):
    env = CoordSum(target=10, history=history)
    actions = [(5, 5, 0), (5, 4, 1), (4, 5, 1), (9, 1, 0), (9, 1, 1)]
    states, timestep = play(env, [10] * 5, actions)
    assert timestep.reward.tolist() == [2, 1, 2, 2, 0]
    assert env.num_rows == 1 and np.all(states.target == 10)
    assert env.reset(jax.random.key(5))[0].target == 10
    assert CoordSum(target=27).max_target == 28 and CoordSum(target=0).max_target == 1


@pytest.mark.parametrize("name, expected", [
    ("", {}),
    ("3x10-30", dict(num_agents=3, num_actions=10, max_target=30)),
    ("5x20-80-released", dict(num_agents=5, num_actions=20, max_target=80, history="released")),
    ("3x10=10", dict(num_agents=3, num_actions=10, target=10)),
    ("3x10=27-released", dict(num_agents=3, num_actions=10, target=27, history="released")),
    ("1x1=0", dict(num_agents=1, num_actions=1, target=0)),
])
def test_parse_scenario(name, expected):
    assert parse_scenario(name) == expected
    env = CoordSum(**parse_scenario(name))
    assert {key: getattr(env, key) for key in expected} == expected


@pytest.mark.parametrize("name", [
    "3x10", "3x10-", "x10-30", "3x10-30=10", "3x10-30-", "3x10-30-Released", "3x10-30 ",
    "3x10-30\n", "-3x10-30", "3x10--1", "3X10-30", "3x10-3.5", "\u0663x10-30", "tiny-2ag",
    "0x10-30", "3x0-30", "3x10-0", "3x10=28", "3x10=28-released"])
def test_parse_scenario_errors(name):
    with pytest.raises(ValueError) as error:
        parse_scenario(name)
    message = str(error.value)
    assert "\n" not in message
    assert all(text in message for text in (repr(name), "NxA-M", "e.g. 3x10-30"))


@pytest.mark.parametrize("name, value, word", [
    ("num_agents", 0, "num_agents"), ("num_actions", -1, "num_actions"),
    ("num_actions", 2.5, "num_actions"), ("max_target", 0, "max_target"),
    ("time_limit", 0, "time_limit"), ("target", 28, "0..27"), ("target", -1, "0..27"),
    ("target", 1.5, "0..27"), ("history", "none", "history")])
def test_constructor_errors(name, value, word):
    with pytest.raises(ValueError, match=word) as error:
        CoordSum(**{name: value})
    assert "\n" not in str(error.value)


def test_render_and_animate(tmp_path):
    env = CoordSum(target=6)
    first, _ = env.reset(jax.random.key(0))
    states, _ = play(env, [6] * 3, [(1, 2, 3), (1, 2, 3), (2, 2, 3)])
    frames = [jax.tree.map(lambda x: x[i], states) for i in range(3)]
    assert env.render(first) == "step 0/100 | no actions yet | next target 6"
    assert [env.render(frame) for frame in frames] == [
        "step 1/100 | target 6 | 1 + 2 + 3 = 6, match | "
        "observer guessed 0 for agent 0 | reward 2, return 2 | next target 6",
        "step 2/100 | target 6 | 1 + 2 + 3 = 6, match | "
        "observer guessed 1 for agent 0 | reward 1, return 3 | next target 6",
        "step 3/100 | target 6 | 2 + 2 + 3 = 7, miss | "
        "observer guessed 1 for agent 0 | reward 0, return 3 | next target 6",
    ]
    path = tmp_path / "game.gif"
    env.animate([first, *frames], interval=100, save_path=str(path))
    with Image.open(path) as image:
        assert image.format == "GIF" and image.n_frames == 4 and image.info["duration"] == 100
        image.seek(3)
        assert np.asarray(image.convert("L")).std() > 20  # something is drawn
    with pytest.raises(ValueError, match="at least one"):
        env.animate([])

    figure = coordsum.Figure()  # it shows the answered target, and not the next one
    env._draw(figure, frames[1].replace(target=jnp.int32(29)))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "29" not in texts and texts.count("6") == 2  # the sum and the target
    assert {"step 2/100", "match, the observer guessed 1: right"} <= set(texts)
