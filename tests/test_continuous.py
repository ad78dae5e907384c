"""Tests of continuous actions: the squashed Gaussian, both networks, the environment's bounds."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jumanji
import numpy as np
import pytest
from conftest import (
    apply_guider,
    apply_learner,
    has_memory,
    let_guider_act,
    make_guider,
    random_minibatch,
    scripts_with,
)
from jumanji import specs
from jumanji.env import Environment
from jumanji.types import StepType, restart, transition

pytestmark = pytest.mark.usefixtures("quick_compile", "double_precision")

SCRIPTS = scripts_with("Guider", "Learner", "SquashedGaussian")
script = SCRIPTS[0].values[0]  # for what all scripts share to the letter
NUM_AGENTS, NUM_ACTIONS = 3, 2


def policy(mean, std):
    """The policy that `action_distribution` makes of means and standard deviations (..., A)."""
    mean, std = np.broadcast_arrays(np.asarray(mean, float), std)
    logits = np.concatenate([mean, np.log(std)], axis=-1)
    return script.action_distribution(jnp.asarray(logits), jnp.ones(mean.shape, bool))


# -------------------------------------------------------------------------------- the distribution
def test_log_prob_is_that_of_a_gaussian():
    """Of all components together, by the density written out."""
    mean, std, u = np.array([0.3, -1.0]), np.array([0.5, 1.2]), np.array([0.9, -2.0])
    by_hand = np.sum(-0.5 * ((u - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi))
    np.testing.assert_allclose(policy(mean, std).log_prob(u), by_hand)


def squashed_log_prob(mean, std, action):
    """Log-density of tanh(u) at an action in (-1, 1), by the change of variables."""
    return policy(mean, std).log_prob(np.arctanh(action)) - np.sum(np.log(1 - action**2), axis=-1)


def test_jacobian_cancels_in_ratios():
    """The ratio of two policies is the same for u and for tanh(u)."""
    first, second = ([0.3, -1.0], [0.5, 1.2]), ([0.1, -0.8], [0.7, 0.9])
    action = np.random.default_rng(0).uniform(-0.99, 0.99, (20, 2))
    u = np.arctanh(action)
    of_u = policy(*first).log_prob(u) - policy(*second).log_prob(u)
    of_action = squashed_log_prob(*first, action) - squashed_log_prob(*second, action)
    np.testing.assert_allclose(of_u, of_action, atol=1e-9)


def test_kl():
    """KL of two diagonal Gaussians, which the squashing does not change, by its formula."""
    m1, s1, m2, s2 = [0.3, -1.0], np.array([0.5, 1.2]), [0.1, -0.8], np.array([0.7, 0.9])
    shift = (np.array(m1) - m2) / s2
    by_hand = np.sum(np.log(s2 / s1) + (s1 / s2) ** 2 / 2 + shift**2 / 2 - 0.5)
    np.testing.assert_allclose(policy(m1, s1).kl_divergence(policy(m2, s2)), by_hand)


@pytest.mark.parametrize("mean, std, tolerance", [
    (0.0, 0.3, 1e-5), (0.5, 0.6, 1e-4), (2.0, 0.6, 1e-4), (0.0, 1.0, 1e-3), (-1.0, 2.0, 0.03),
])
def test_entropy_is_that_of_the_squashed_action(mean, std, tolerance):
    """Against the integral of -p log p over the action, on a fine grid of u."""
    u = np.linspace(mean - 9 * std, mean + 9 * std, 20_001)
    log_density = policy([[mean]], std).log_prob(u[:, None])
    log_slope = 2 * (np.log(2) - u - np.logaddexp(0, -2 * u))
    weight = np.exp(log_density) * (u[1] - u[0])
    by_grid = -np.sum(weight * (log_density - log_slope))
    np.testing.assert_allclose(policy([mean], std).entropy(), by_grid, atol=tolerance)


def test_entropy_is_bounded():
    """By log 2 for each component, the entropy of a uniform action in [-1, 1]: std does not run
    away, because beyond about 1 a larger one lowers the entropy."""
    entropies = [float(policy([0.0], std).entropy()) for std in (0.3, 0.9, 2.5)]
    assert max(entropies) == entropies[1] < np.log(2)


def test_log_std_has_bounds():
    """Beyond them it is cut off, so no policy becomes a point."""
    mask = jnp.ones(1, bool)
    for log_std, bound in zip((-9.0, 9.0), script.LOG_STD_BOUNDS):
        distribution = script.action_distribution(jnp.array([0.0, log_std]), mask)
        np.testing.assert_allclose(distribution.distribution.scale, np.exp(bound))


def test_greedy_action_is_the_mean():
    np.testing.assert_array_equal(policy([0.3, -1.0], 0.5).mode(), [0.3, -1.0])


def test_discrete_policies_are_categorical():
    """As many logits as actions are the logits of a choice."""
    distribution = script.action_distribution(jnp.zeros(4), jnp.array([True, False, True, True]))
    np.testing.assert_allclose(distribution.probs, [1 / 3, 0, 1 / 3, 1 / 3])


# ------------------------------------------------------------------------------------ the networks
def continuous_parts(script, kind="sable", seed=0):
    """Guider, learner, minibatch of random continuous actions, random parameters."""
    guider = make_guider(script, kind, NUM_AGENTS, NUM_ACTIONS, 2, 1, 8, continuous=True)
    learner = script.Learner(NUM_ACTIONS, 8, continuous=True)
    return guider, learner, *random_minibatch(script, seed, guider, learner, 4)


def log_std_of(params):
    """The one parameter of this name in a network."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    (log_std,) = [x for path, x in flat if path[-1].key == "log_std"]
    return np.asarray(log_std)


# Both feed-forward scripts hold the same networks.
NETWORKS = scripts_with("Guider", "Learner", "guider_act", "AppendLogStd", distinct=True)


@pytest.mark.parametrize("kind", ["sable", "mat"])
@pytest.mark.parametrize("script", NETWORKS)
def test_acting_equals_training(script, kind):
    """The log-probs and values with which the guider acts are those of training: first ratio 1."""
    guider, _, mb, params = continuous_parts(script, kind)
    act = jax.jit(functools.partial(let_guider_act, script, guider))
    mb = act(params.guider, mb, jax.random.PRNGKey(0))
    logits, value = apply_guider(guider, params.guider, mb)
    log_prob = script.action_distribution(logits, mb.obs.action_mask).log_prob(mb.action)
    assert mb.action.shape == (*log_prob.shape, NUM_ACTIONS)
    np.testing.assert_allclose(log_prob, mb.behaviour_log_prob, atol=1e-8)
    np.testing.assert_allclose(value, mb.value, atol=1e-8)


@pytest.mark.parametrize("script", NETWORKS)
def test_guider_sees_the_squashed_actions_of_earlier_agents(script):
    """Agent 1's action changes agent 2 alone, and not at all where tanh is saturated."""
    guider, _, mb, params = continuous_parts(script)

    def logits(action):
        return np.asarray(apply_guider(guider, params.guider, mb._replace(action=action))[0])

    def with_action(x):
        return mb.action.at[..., -1, 1, 0].set(x)

    one, other = logits(with_action(-0.5)), logits(with_action(0.5))
    np.testing.assert_array_equal(one[..., :2, :], other[..., :2, :])
    assert np.all(np.any(one[..., 2, :] != other[..., 2, :], axis=-1)[..., -1:])
    np.testing.assert_array_equal(logits(with_action(30.0)), logits(with_action(40.0)))


@pytest.mark.parametrize("script", NETWORKS)
def test_nobody_is_no_action(script):
    """The first agent sees a flag; an action of zeros by the agent before has none."""
    features = script.action_features(jnp.zeros((1, 2)), 2, continuous=True)
    np.testing.assert_array_equal(features, [[0, 0, 0]])
    guider, _, mb, params = continuous_parts(script)
    same = jax.tree.map(lambda x: jnp.zeros_like(x), mb.obs.agents_view)
    mb = mb._replace(obs=mb.obs._replace(agents_view=same), action=jnp.zeros_like(mb.action))
    logits, _ = apply_guider(guider, params.guider, mb)
    assert np.all(np.any(logits[..., 0, :] != logits[..., 1, :], axis=-1))


@pytest.mark.parametrize("script", NETWORKS)
def test_learner_is_decentralized(script):
    """An agent's mean depends on its own observation alone; log std on nothing."""
    _, learner, mb, params = continuous_parts(script)

    def last_step(view):
        logits = apply_learner(learner, params.learner, mb._replace(obs=mb.obs._replace(
            agents_view=view)))
        return logits[0, -1] if has_memory(script) else logits[0]

    jacobian = jax.jacobian(last_step)(mb.obs.agents_view)  # (N, 2 A, M, .., N, O)
    jacobian = np.abs(jacobian).sum(axis=(-1, *range(2, jacobian.ndim - 2)))  # (N, 2 A, N)
    means, log_stds = np.split(jacobian, 2, axis=1)
    assert np.all(log_stds == 0)
    for agent in range(NUM_AGENTS):
        others = np.delete(means[agent], agent, axis=-1)
        assert np.all(others == 0) and np.all(means[agent, :, agent] > 0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_gradients_are_finite_at_saturated_actions(script):
    """Of all terms and parameters, the log std among them, where tanh(u) is 1 in float32."""
    guider, learner, mb, params = continuous_parts(script)
    mb = mb._replace(action=mb.action.at[..., 0, :].set(40.0))
    args = script.Args()

    def loss(params):
        return script.minibatch_loss(params, args, guider, learner, mb)[0]

    grad = jax.jit(jax.vmap(jax.grad(loss), axis_name="device"))
    grads = grad(jax.tree.map(lambda x: x[None], params))
    for tree in grads:
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))
        assert np.all(log_std_of(tree) != 0)


# --------------------------------------------------------------------------------- the environment
class View(NamedTuple):
    agents_view: jax.Array


class Steer(Environment):
    """Two agents give three numbers each, within bounds; what they gave is what they see.

    Each agent earns its own first number. There is no action_mask.
    """

    own_rewards = True
    minimum, maximum = [1.0, -4.0, 0.0], [5.0, 4.0, 1.0]

    def reset(self, key):
        return jnp.int32(0), restart(View(jnp.zeros((2, 3))), shape=(2,))

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


class Unbounded(Steer):
    minimum, maximum = [1.0, -np.inf, 0.0], [5.0, np.inf, 1.0]


class OneLowest(Steer):
    """Jumanji keeps bounds of different shapes as they are."""

    minimum, maximum = 0.0, np.full((2, 3), 2.0)


for name in ("Steer", "Unbounded", "OneLowest"):
    jumanji.register(id=f"{name}-v0", entry_point=f"{__name__}:{name}")


def test_actions_reach_the_bounds():
    """u = 0 is the middle of the bounds, large ones are the bounds themselves."""
    env = script.make_env("Steer-v0", "")
    assert (env.num_agents, env.num_actions, env.continuous) == (2, 3, True)
    state, obs = env.reset(jax.random.PRNGKey(0))
    _, middle = env.step(state, jnp.zeros((2, 3)))
    _, ends = env.step(state, jnp.array([[-40.0] * 3, [40.0] * 3]))
    np.testing.assert_allclose(middle.obs.agents_view[:, 2:], [[3, 0, 0.5]] * 2)
    np.testing.assert_allclose(ends.obs.agents_view[:, 2:], [[1, -4, 0], [5, 4, 1]])
    assert obs.action_mask.shape == (2, 3) and np.all(obs.action_mask)


def test_bounds_may_differ_in_shape():
    """A number for all components on one side, an array on the other."""
    env = script.make_env("OneLowest-v0", "")
    np.testing.assert_allclose(env.bounded(jnp.zeros((2, 3))), np.ones((2, 3)))


def test_own_rewards_are_not_summed():
    """An environment that says so gives each agent the reward that is its own."""
    env = script.make_env("Steer-v0", "")
    state, _ = env.reset(jax.random.PRNGKey(0))
    _, outcome = env.step(state, jnp.array([[-40.0] * 3, [40.0] * 3]))
    np.testing.assert_allclose(outcome.reward, [1, 5])


def test_unbounded_actions_are_refused():
    """In one line that names the flag and what is allowed."""
    with pytest.raises(script.FlagError) as error:
        script.make_env("Unbounded-v0", "")
    message = str(error.value)
    assert message.startswith("--env-id Unbounded-v0: needs ") and "finite bounds" in message
    assert "\n" not in message
