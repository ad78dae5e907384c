"""Tests with games of one's own: nothing depends on their scales, and what cannot work is named."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ScriptedEnv, first_state, make_parts, on_one_device, scripts_with
from jax import random, tree
from jumanji import specs
from jumanji.env import Environment
from jumanji.types import restart, transition

import tasks

pytestmark = pytest.mark.usefixtures("quick_compile")
ROOT_3 = math.sqrt(3)
SCRIPT = scripts_with("train_iteration")[0].values[0]


# -------------------- Rewards of any size ---------------------------------------------------------
class Paid(ScriptedEnv):
    """ScriptedEnv with rewards that depend on the actions, times a factor, plus an offset; `shift`
    is added to what agents see in a step."""

    def __init__(self, script, factor, offset, shift):
        super().__init__(script)
        self.factor, self.offset, self.shift = factor, offset, shift

    def step(self, state, action):
        state, reward, discount, last = super().step(state, action)
        view = state.obs.agents_view + self.shift
        state = state._replace(obs=state.obs._replace(agents_view=view))
        return state, self.offset + self.factor * reward * (1 + action), discount, last


@pytest.fixture(scope="module")
def train():
    """train((factor, offset, shift, gamma), ..), for each iteration -> the last state, metrics."""

    def parts(*numbers, gamma):
        return make_parts(SCRIPT, Paid(SCRIPT, *numbers), guider="mat", gamma=gamma)

    @jax.jit  # one program for all numbers
    def iterate(numbers, state):
        return on_one_device(
            SCRIPT.train_iteration, *parts(*numbers[:3], gamma=numbers[3]))(state)

    start = first_state(SCRIPT, parts(1.0, 0.0, 0.0, gamma=0.99))

    def run(*iterations):
        state, rows = start, []
        for numbers in iterations:
            numbers += (0.0, 0.99)[len(numbers) - 2:]
            state, metrics = iterate(numbers, state)
            rows.append(tree.map(float, metrics))
        return state, rows

    return run


@pytest.mark.parametrize("factor", [2.0**-36, 2.0**50])
def test_rewards_of_any_size_train_alike(factor, train):
    """Of 1e-11 and of 1e15, the same parameters and losses follow from them, to the bit, for the
    factors are powers of two."""
    state, rows = train(*3 * [(factor, 0.0)])
    expected, expected_rows = train(*3 * [(1.0, 0.0)])
    tree.map(np.testing.assert_array_equal, state.params, expected.params)
    for row, same in zip(rows, expected_rows):
        names = [name for name in row if "/" in name]
        assert [row[name] for name in names] == [same[name] for name in names]
    assert rows[0]["reward"] == factor * expected_rows[0]["reward"]


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_rewards_that_are_always_the_same(reward, train):
    """All stays finite; without any reward PPO moves no policy, and values are exact."""
    state, rows = train(*3 * [(0.0, reward)])
    assert all(math.isfinite(x) for row in rows for x in row.values())
    assert all(np.all(np.isfinite(x)) for x in tree.leaves(state.params))
    if reward == 0:
        assert all(row["losses/guider_policy_loss"] == 0 for row in rows)
        assert all(row["losses/explained_variance"] == 1 for row in rows)


def test_games_of_one_step_in_which_none_earns(train):
    """Values that differ explain nothing, by much, of targets that do not: it is finite."""
    _, rows = train((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0))
    assert -1e20 < rows[1]["losses/explained_variance"] < -1e9


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("fault", ["observation", "reward"])
def test_the_first_fault_is_seen(fault, number, train):
    """Of observation, reward and target the first that is not finite is where the fault is."""
    numbers = (0.0, number) if fault == "observation" else (number, 0.0)
    _, (metrics,) = train((1.0, *numbers))
    assert not math.isfinite(metrics["losses/value_loss"])
    seen = [x for x in ("observation", "reward", "target") if not math.isfinite(metrics[x])]
    assert seen[0] == fault


# -------------------- Environments that are understood, or refused --------------------------------
class Observation(NamedTuple):
    agents_view: jax.Array
    action_mask: jax.Array


class Game(Environment):
    """Two agents with three actions; `extras` are a reset's, `change` makes something else of a
    step."""

    view_spec = specs.Array((2, 1), jnp.float32)
    action_spec = specs.MultiDiscreteArray(jnp.array([3, 3], jnp.int32))
    mask, extras = np.ones((2, 3), bool), {}

    def __init__(self, change=lambda state, timestep: (state, timestep), **parts):
        self.change, self.view = change, jnp.zeros((2, 1))
        vars(self).update(parts)

    def reset(self, key):
        observation = Observation(self.view, jnp.asarray(self.mask))
        return {"time": jnp.int32(0)}, restart(observation, extras=self.extras)

    def step(self, state, action):
        observation = Observation(self.view, jnp.asarray(self.mask))
        timestep = transition(jnp.float32(0), observation, extras={})
        return self.change({"time": state["time"] + 1}, timestep)

    @property
    def observation_spec(self):
        return specs.Spec(Observation, "ObservationSpec", agents_view=self.view_spec)


def trainable(**parts):
    """What `make_trainable` makes of a Game."""
    env = Game(**parts)
    tasks.check("Game-v0", env)
    env = tasks.Adapter(env)
    tasks.check_step("Game-v0", env)
    return env


FOUR = specs.MultiDiscreteArray(jnp.array([3, 4], jnp.int32))
UNKNOWN = {  # parts of a game that is not understood, and what is said of it
    "two actions each": (
        {"action_spec": specs.MultiDiscreteArray(jnp.full((2, 2), 3, jnp.int32))},
        "one discrete action per agent"),
    "no bounds": (
        {"action_spec": specs.BoundedArray((2, 3), jnp.float32, -3e38, 3e38)}, "-1e8 and 1e8"),
    "won": ({"extras": {"won": jnp.float32(0)}}, "won must be () of bool"),
    "true_reward": ({"extras": {"true_reward": jnp.zeros(2)}}, "true_reward must be (), not (2,)"),
    "more columns": ({"mask": np.ones((2, 4), bool)}, "(2, 3) of bool, as its action_spec has"),
    "mask of numbers": ({"mask": np.ones((2, 3))}, "not (2, 3) of float32"),
    "beyond its own": (
        {"action_spec": FOUR, "mask": np.ones((2, 4), bool)}, "False beyond an agent's own"),
    "another shape in the spec": (
        {"view_spec": specs.BoundedArray((2, 5), jnp.float32, 0, 1)}, "(2, 5) in its spec"),
    "state": ({"change": lambda state, x: ({"time": 1.0}, x)}, "state.time is int32[] in a reset"),
    "reward": (
        {"change": lambda state, x: (state, x.replace(reward=jnp.zeros(2)))},
        "reward is float32[] in a reset, float32[2] in a step"),
    "discount": (
        {"change": lambda state, x: (state, x.replace(discount=jnp.zeros(2)))}, "discount"),
    "extras": (
        {"change": lambda state, x: (state, x.replace(extras={"won": jnp.bool_(1)}))},
        "extras.won is nothing in a reset, bool[] in a step"),
    "extras of a reset": ({"extras": {"won": jnp.bool_(0)}}, "in a reset, nothing in a step"),
    "observation": (
        {"change": lambda state, x: (state, x.replace(
            observation=Observation(jnp.zeros((2, 2)), jnp.ones((2, 3), bool))))},
        "observation.agents_view is float32[2, 1] in a reset, float32[2, 2] in a step"),
}


@pytest.mark.parametrize("parts, text", UNKNOWN.values(), ids=UNKNOWN)
def test_refused_by_name(parts, text):
    """An environment that training would not understand is refused with what is wrong."""
    with pytest.raises(tasks.TaskError) as error:
        trainable(**parts)
    assert str(error.value).startswith("--env-id Game-v0: ") and text in str(error.value)


def test_agents_with_different_actions():
    """They are fine, as long as the mask is False beyond their own."""
    trainable(action_spec=FOUR, mask=np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool))


def bounded(lowest, highest, dtype=jnp.float32):
    bounds = (jnp.broadcast_to(jnp.asarray(x, dtype), (2, 1)) for x in (lowest, highest))
    return specs.BoundedArray((2, 1), dtype, *bounds)


@pytest.mark.parametrize("spec, view, told", [
    (bounded(0, 29), [[0.0], [29.0]], [[-ROOT_3], [ROOT_3]]),
    (bounded(-1, 8, jnp.int32), [[-1], [8]], [[-ROOT_3], [ROOT_3]]),
    (bounded(0, 255, jnp.uint8), np.array([[0], [255]], np.uint8), [[-ROOT_3], [ROOT_3]]),
    (specs.Array((2, 1), jnp.uint8), np.array([[0], [255]], np.uint8), [[0.0], [1.0]]),
    (specs.Array((2, 1), jnp.float32), [[0.0], [29.0]], [[0.0], [29.0]]),
    (bounded([[0], [-math.inf]], [[29], [math.inf]]), [[29.0], [29.0]], [[ROOT_3], [29.0]]),
    (bounded(-3e38, 3e38), [[0.0], [29.0]], [[0.0], [29.0]]),
    (bounded(-2**31, 2**31 - 1, jnp.int32), [[0], [29]], [[0.0], [29.0]]),
    (bounded(7, 7), [[7.0], [7.0]], [[0.0], [0.0]]),
])
def test_features_with_bounds_are_told_at_one_scale(spec, view, told):
    """D1: mean 0 and std 1, were all numbers between as frequent; without bounds, or with ones
    that say nothing, as they are, and images without as shares of 255."""
    env = trainable(view_spec=spec, view=jnp.asarray(view))
    _, timestep = env.reset(random.PRNGKey(0))
    np.testing.assert_allclose(timestep.observation.agents_view, told, atol=1e-6)
    _, timestep = env.step({"time": jnp.int32(0)}, jnp.zeros(2, jnp.int32))
    np.testing.assert_allclose(timestep.observation.agents_view, told, atol=1e-6)


def test_nothing_is_legal():
    """Then action 0 is: it has probability 1, entropy and KL are 0, and no gradient flows."""
    env = trainable(mask=np.array([[0, 0, 0], [0, 1, 1]], bool))
    _, timestep = env.reset(random.PRNGKey(0))
    mask = timestep.observation.action_mask
    np.testing.assert_array_equal(mask, [[1, 0, 0], [0, 1, 1]])
    policy = SCRIPT.Policy(3, False)
    x = random.normal(random.PRNGKey(1), (2, 4))
    params, other = (policy.init(random.PRNGKey(seed), x, mask) for seed in (2, 3))

    def told(params):
        first, second = (policy.apply(p, x, mask) for p in (params, other))
        action = first.sample(seed=random.PRNGKey(4))
        numbers = (first.log_prob(action), first.entropy(), first.kl_divergence(second))
        return sum(x[0] for x in numbers), (action, numbers)

    gradient, (action, numbers) = jax.grad(told, has_aux=True)(params)
    assert action[0] == 0 and all(x[0] == 0 for x in numbers)
    assert all(np.all(np.asarray(x) == 0) for x in tree.leaves(gradient))
