"""Tests of continuous actions and of what else tasks.py adapts: bounds, images, odd state."""

import functools
import io
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jumanji
import numpy as np
import pytest
from conftest import (
    has_memory,
    make_guider,
    random_like,
    random_obs,
    random_params,
    scripts_with,
)
from jumanji import specs
from jumanji.env import Environment
from jumanji.types import StepType, restart, transition

import tasks

pytestmark = pytest.mark.usefixtures("quick_compile")

script = scripts_with("Policy", "TeamEnv")[0].values[0]  # for what all share to the letter
NUM_AGENTS, NUM_ACTIONS = 3, 2


# -------------------- The distribution ------------------------------------------------------------
# Its log-probabilities, entropy and KL are computed by hand in test_reference.py.
def test_log_std_has_bounds():
    """At them it is reflected, so no policy becomes a point, none spreads without end, and
    gradients move it on; it is the same whatever is seen."""
    for log_std, found in ((-5.2, -4.8), (-17.2, -4.8), (0.5, 0.5), (1.2, 0.8), (13.2, 0.8)):
        layer = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
        params = {"params": {"out": layer, "log_std": jnp.full(2, log_std)}}
        means = jnp.array([[0.0, 7.0], [-3.0, 1.0]])
        policy = script.Policy(2, True).apply(params, means, None)
        np.testing.assert_array_equal(policy.mode(), means)
        np.testing.assert_allclose(policy.stddev(), np.full((2, 2), np.exp(found)), rtol=1e-5)


# -------------------- The networks ----------------------------------------------------------------
# Acting is deciding one by one, and as in training: test_networks.py and test_memory.py.
NETWORKS = scripts_with("Guider", "Learner", "Policy")


@functools.cache
def make_problem(script, continuous=True):
    """Guider, learner, random parameters of both, actions, and f(params, action) -> policies of
    both for all but the last two axes (of agents, and of numbers in an action)."""
    guider = make_guider(script, "sable", 8, 2, 1, NUM_ACTIONS, continuous)
    learner = script.Learner(8, NUM_ACTIONS, continuous)
    past = {"guider": (), "learner": ()}
    if has_memory(script):
        args = script.Args(embed_dim=8, num_heads=2, learner_hidden_dim=8)
        hidden = script.init_hidden(args, types.SimpleNamespace(num_agents=NUM_AGENTS), 4)
        past = {name: (jnp.ones((4, 1)), random_like(2, x)) for name, x in hidden.items()}
    obs = random_obs(script, 0, (4, 1) if has_memory(script) else 4, NUM_AGENTS, NUM_ACTIONS)
    action = random_like(1, obs.action_mask) if continuous else jnp.argmax(obs.action_mask, -1)
    inputs = {"guider": (obs, action, *past["guider"]), "learner": (obs, *past["learner"])}
    params = {"guider": random_params(guider, 3, *inputs["guider"])}
    params["learner"] = random_params(learner, 4, *inputs["learner"])

    def policies(params, action):
        guided, _ = guider.apply(params["guider"], obs, action, *past["guider"])
        learnt = learner.apply(params["learner"], *inputs["learner"])
        return guided, learnt[0] if has_memory(script) else learnt

    @jax.jit
    def nobody(key):
        """What the first agent is told at the start of training."""
        return guider.init(key, *inputs["guider"])["params"]["nobody"]

    return params, action, jax.jit(policies), nobody(jax.random.PRNGKey(0))


@pytest.mark.parametrize("script", NETWORKS)
def test_guider_sees_the_squashed_actions_of_earlier_agents(script):
    """Agent 1's action changes agent 2 alone, and not at all where tanh is saturated."""
    params, action, policies, _ = make_problem(script)

    def means(x):
        guided, _ = policies(params, action.at[..., 1, 0].set(x))
        return np.asarray(guided.mode())

    one, other = means(-0.5), means(0.5)
    np.testing.assert_array_equal(one[..., :2, :], other[..., :2, :])
    assert np.all(np.any(one[..., 2, :] != other[..., 2, :], axis=-1))
    np.testing.assert_array_equal(means(30.0), means(40.0))


@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
@pytest.mark.parametrize("script", NETWORKS)
def test_first_agent_is_told_what_is_learnt(script, continuous):
    """It starts as no action that an agent can take, and the first agent's policy depends on it."""
    params, action, policies, nobody = make_problem(script, continuous)
    assert np.all(nobody != 0) and np.all(nobody != 1)

    def first_agent(nobody):
        told = {"params": params["guider"]["params"] | {"nobody": nobody}}
        guided, _ = policies(params | {"guider": told}, action)
        return guided.log_prob(action)[..., 0].sum()

    assert np.all(jax.jit(jax.grad(first_agent))(nobody) != 0)


# -------------------- The environment -------------------------------------------------------------
class View(NamedTuple):
    agents_view: jax.Array


class Steer(Environment):
    """Two agents give three numbers each, within bounds of two shapes, and see what they gave.

    Each agent earns its own first number. There is no action_mask.
    """

    own_rewards = True
    minimum, maximum = [1.0, -4.0, 0.0], np.array([[5.0, 4.0, 1.0]] * 2)

    def reset(self, key):
        return 0, restart(View(jnp.zeros((2, 3))), shape=(2,))  # a number of Python's

    def step(self, state, action):
        view = View(action.astype(float))
        timestep = transition(action[:, 0], view, jnp.ones(2))
        last = state == 4
        step_type = jnp.where(last, StepType.LAST, StepType.MID)
        discount = jnp.where(last, jnp.zeros(2), jnp.ones(2))
        return state + 1, timestep.replace(step_type=step_type, discount=discount)

    @property
    def observation_spec(self):
        return specs.Array((2, 3), jnp.float32)

    @property
    def action_spec(self):
        return specs.BoundedArray((2, 3), jnp.float32, self.minimum, self.maximum)


class OddState(NamedTuple):
    key: jax.Array  # typed, and not of the default kind
    half: jax.Array  # () bfloat16
    step_count: jax.Array


class Odd(Environment):
    """Views are images, and the state has what numpy cannot hold."""

    action_spec = specs.MultiDiscreteArray(np.full(2, 3))
    observation_spec = specs.Array((2, 3), jnp.uint8)

    def observe(self, state):
        view = jax.random.randint(state.key, (2, 4, 4, 3), 0, 256).astype(jnp.uint8)
        view = view.at[:, 0, 0, :2].set(jnp.array([0, 255], jnp.uint8))
        return tasks.VectorObservation(view, jnp.ones((2, 3), bool).at[0, 2].set(False))

    def reset(self, key):
        key = jax.random.key(jax.random.bits(key), impl="rbg")
        state = OddState(key, jnp.bfloat16(1.5), jnp.int32(0))
        return state, restart(self.observe(state), shape=(2,))

    def step(self, state, action):
        half = state.half * jnp.bfloat16(1.1)  # rounded
        state = OddState(jax.random.split(state.key)[0], half, state.step_count + 1)
        reward = (half + action).astype(jnp.float32)
        return state, transition(reward, self.observe(state), jnp.ones(2))

    def global_state(self, state):
        return jax.random.uniform(state.key, (3,)) * state.half

    def animate(self, states, speed):
        return [state.half.dtype for state in states], jax.random.key_impl(states[0].key), speed


for name in ("Steer", "Odd"):
    jumanji.register(id=f"{name}-v0", entry_point=f"{__name__}:{name}")


def test_actions_reach_the_bounds():
    """u = 0 is the middle of the bounds, large ones are the bounds themselves. The environment says
    that each agent has a reward of its own, which is not summed."""
    env = script.make_env("Steer-v0", "")
    assert (env.num_agents, env.num_actions, env.continuous) == (2, 3, True)
    state = env.reset(jax.random.PRNGKey(0))
    middle, *_ = env.step(state, jnp.zeros((2, 3)))
    ends, reward, *_ = env.step(state, jnp.array([[-40.0] * 3, [40.0] * 3]))
    np.testing.assert_allclose(middle.obs.agents_view[:, 2:], [[3, 0, 0.5]] * 2)
    np.testing.assert_allclose(ends.obs.agents_view[:, 2:], [[1, -4, 0], [5, 4, 1]])
    assert state.obs.action_mask.shape == (2, 3) and np.all(state.obs.action_mask)
    np.testing.assert_allclose(reward, [1, 5])
    assert ends.episode["return"] == 3  # the mean


def test_odd_state_can_be_saved():
    """Typed keys and bfloat16 are kept as what numpy can hold, through steps and a file, and the
    game is the same, to the bit: rewards, masks and views, which are images from 0 to 1."""
    env, plain = tasks.make_trainable("Odd-v0"), Odd()
    reset, step, plain_step = jax.jit(env.reset), jax.jit(env.step), jax.jit(plain.step)
    state, timestep = reset(jax.random.PRNGKey(0))
    own_state, own_timestep = jax.jit(plain.reset)(jax.random.PRNGKey(0))
    action = jnp.array([1, 2])
    for _ in range(4):
        file = io.BytesIO()
        np.savez(file, *jax.tree.leaves(state))
        file.seek(0)
        leaves = list(np.load(file).values())
        assert [leaf.dtype.name for leaf in leaves] == ["uint32", "float32", "int32"]
        state = jax.tree.unflatten(jax.tree.structure(state), leaves)
        view, own_view = (x.observation.agents_view for x in (timestep, own_timestep))
        assert own_view.dtype == jnp.uint8 and (np.min(view), np.max(view)) == (0, 1)
        np.testing.assert_allclose(view, np.asarray(own_view) / 255, rtol=1e-6)
        mask, own_mask = (x.observation.action_mask for x in (timestep, own_timestep))
        np.testing.assert_array_equal(mask, own_mask)
        np.testing.assert_array_equal(env.global_state(state), plain.global_state(own_state))
        state, timestep = step(state, action)
        own_state, own_timestep = plain_step(own_state, action)
        np.testing.assert_array_equal(timestep.reward, own_timestep.reward)
        assert timestep.reward.dtype == own_timestep.reward.dtype
    # It is drawn by its own `animate`, from its own states.
    assert env.animate([state, state], speed=2) == ([jnp.bfloat16] * 2, "rbg", 2)
