"""Tests of guider and learner: masks, the two ways to decode, who sees what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_obs, random_params, scripts_with

NUM_ACTIONS, NUM_FEATURES = 4, 5
GUIDER_SCRIPTS = scripts_with(
    "Attention", "Retention", "EncoderBlock", "DecoderBlock", "mlp", "Guider",
    "action_distribution", "guider_act", feed_forward=True, distinct=True,
)
LEARNER_SCRIPTS = scripts_with(
    "Learner", "action_distribution", "learner_act", feed_forward=True, distinct=True
)
pytestmark = pytest.mark.usefixtures("quick_compile", "double_precision")


@functools.cache
def make_guider(script, kind, num_agents, num_blocks, num_heads):
    """A guider with large random parameters, and its two ways to decode, compiled."""
    guider = script.Guider(kind, num_agents, NUM_ACTIONS, num_heads, num_blocks, embed_dim=16)
    view, action = jnp.zeros((1, num_agents, NUM_FEATURES)), jnp.zeros((1, num_agents), jnp.int32)
    params = random_params(guider, 1, view, action)
    act = jax.jit(functools.partial(script.guider_act, guider), static_argnames="greedy")
    return jax.jit(guider.apply), act, params


def make_learner(script):
    """A learner with random parameters, and its two functions, compiled."""
    learner = script.Learner(NUM_ACTIONS, hidden_dim=8)
    act = jax.jit(functools.partial(script.learner_act, learner), static_argnames="greedy")
    return jax.jit(learner.apply), act, random_params(learner, 1, jnp.zeros((1, 1, NUM_FEATURES)))


def masked_log_softmax(logits, mask):
    """By hand, in float64: log-probabilities of the legal actions, -inf for the others."""
    logits = np.where(mask, np.asarray(logits, np.float64), -np.inf)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# Every pair of values of (kind, agents), (kind, blocks), (kind, heads), (agents, blocks), (agents,
# heads) occurs.
SHAPES = [
    ("mat", 1, 1, 1), ("sable", 1, 2, 4), ("mat", 2, 2, 4), ("sable", 2, 1, 1), ("mat", 5, 1, 4),
    ("sable", 5, 2, 1), ("sable", 5, 1, 4),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("script", GUIDER_SCRIPTS)
def test_parallel_decoding_equals_sequential(script, shape):
    """The log-probs and values with which the guider acted are those of one parallel pass over the
    same actions."""
    apply, act, params = make_guider(script, *shape)
    obs = random_obs(script, 2, 16, shape[1], NUM_ACTIONS)
    action, log_prob, value = act(params, obs, jax.random.PRNGKey(3))
    logits, parallel_value = apply(params, obs.agents_view, action)
    log_probs = masked_log_softmax(logits, obs.action_mask)
    expected = np.take_along_axis(log_probs, np.asarray(action)[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_prob, expected, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(value, parallel_value, rtol=1e-8, atol=1e-8)
    assert (
        log_prob.shape == value.shape == (16, shape[1])
        and np.ptp(log_prob) > 0.1
        and np.ptp(value) > 0.1
    )


@pytest.mark.parametrize("shape", [("mat", 5, 1, 4), ("sable", 5, 2, 1)], ids=str)
@pytest.mark.parametrize("script", GUIDER_SCRIPTS)
def test_greedy_guider_takes_the_argmax_agent_after_agent(script, shape):
    """Greedy decoding equals a loop that fills in agent after agent the legal argmax of the
    parallel pass."""
    apply, act, params = make_guider(script, *shape)
    obs = random_obs(script, 4, 16, 5, NUM_ACTIONS)
    expected = np.zeros((16, 5), np.int32)
    for agent in range(5):
        logits, _ = apply(params, obs.agents_view, expected)
        expected[:, agent] = masked_log_softmax(logits, obs.action_mask)[:, agent].argmax(-1)
    np.testing.assert_array_equal(act(params, obs, jax.random.PRNGKey(0), greedy=True)[0], expected)


@pytest.mark.parametrize("shape", [("mat", 5, 1, 4), ("sable", 5, 2, 1)], ids=str)
@pytest.mark.parametrize("script", GUIDER_SCRIPTS)
def test_logits_depend_on_earlier_actions_alone(script, shape):
    """Another action of agent j leaves the logits of agents <= j as they are, to the bit, and
    changes all later."""
    apply, _, params = make_guider(script, *shape)
    view = random_obs(script, 5, 16, 5, NUM_ACTIONS).agents_view
    action = jax.random.randint(jax.random.PRNGKey(6), (16, 5), 0, NUM_ACTIONS)
    logits, value = apply(params, view, action)
    for agent in range(5):
        changed, changed_value = apply(
            params, view, action.at[:, agent].set((action[:, agent] + 1) % NUM_ACTIONS)
        )
        np.testing.assert_array_equal(changed[:, : agent + 1], logits[:, : agent + 1])
        np.testing.assert_array_equal(changed_value, value)
        if agent < 4:
            assert np.all(np.abs(changed - logits)[:, agent + 1 :].max(axis=(0, 2)) > 1e-4)


@pytest.mark.parametrize("shape", [("mat", 5, 1, 4), ("sable", 5, 2, 1)], ids=str)
@pytest.mark.parametrize("script", GUIDER_SCRIPTS)
def test_every_value_depends_on_every_observation(script, shape):
    """The guider is centralized: another observation of agent j changes the values of all
    agents."""
    apply, _, params = make_guider(script, *shape)
    view = random_obs(script, 7, 16, 5, NUM_ACTIONS).agents_view
    action = jnp.zeros((16, 5), jnp.int32)
    _, value = apply(params, view, action)
    for agent in range(5):
        _, changed = apply(params, view.at[:, agent].multiply(-1.0), action)
        assert np.all(np.abs(changed - value).max(axis=0) > 1e-4)


@pytest.mark.parametrize("kind", ["mat", "sable"])
@pytest.mark.parametrize("script", GUIDER_SCRIPTS)
def test_guider_never_takes_an_illegal_action(script, kind):
    """In 10,000 draws every legal action occurs and no other; log-probs are finite."""
    _, act, params = make_guider(script, kind, 2, *{"mat": (2, 4), "sable": (1, 1)}[kind])
    obs = random_obs(script, 8, 1, 2, NUM_ACTIONS)
    obs = obs._replace(
        action_mask=jnp.array([[[True, False, True, False], [False, False, False, True]]])
    )
    many = jax.tree.map(lambda x: jnp.repeat(x, 10_000, axis=0), obs)
    action, log_prob, _ = act(params, many, jax.random.PRNGKey(9))
    assert [set(np.unique(action[:, agent])) for agent in range(2)] == [{0, 2}, {3}]
    assert np.all(np.isfinite(log_prob)) and np.all(log_prob[:, 1] == 0)


@pytest.mark.parametrize("script", LEARNER_SCRIPTS)
def test_learner_never_takes_an_illegal_action(script):
    """In 10,000 draws every legal action occurs and no other; greedy: the likeliest legal one."""
    apply, act, params = make_learner(script)
    obs = random_obs(script, 10, 1, 2, NUM_ACTIONS)
    obs = obs._replace(
        action_mask=jnp.array([[[True, False, True, False], [False, False, False, True]]])
    )
    many = jax.tree.map(lambda x: jnp.repeat(x, 10_000, axis=0), obs)
    action = act(params, many, jax.random.PRNGKey(11))
    assert [set(np.unique(action[:, agent])) for agent in range(2)] == [{0, 2}, {3}]

    obs = random_obs(script, 12, 64, 2, NUM_ACTIONS)
    greedy = act(params, obs, jax.random.PRNGKey(13), greedy=True)
    likeliest = masked_log_softmax(apply(params, obs.agents_view), obs.action_mask).argmax(-1)
    np.testing.assert_array_equal(greedy, likeliest)


@pytest.mark.parametrize("script", scripts_with("action_distribution", distinct=True))
def test_masked_distribution(script):
    """Illegal actions have probability 0, the entropy is that of the legal ones, and gradients are
    finite."""
    logits = jnp.array([[1.0, 2.0, 3.0], [1.0, 1.0, -4.0], [5.0, 6.0, 7.0]])
    mask = jnp.array([[True, True, True], [True, True, False], [False, True, False]])
    expected = np.exp([1.0, 2.0, 3.0]) / np.exp([1.0, 2.0, 3.0]).sum()

    @jax.jit
    def all_at_once(logits):
        policy, other = (
            script.action_distribution(logits, mask),
            script.action_distribution(2 * logits, mask),
        )
        log_prob, kl = policy.log_prob(jnp.array([0, 0, 1])), policy.kl_divergence(other)
        return jnp.sum(policy.entropy() + log_prob + kl), (policy.probs, policy.entropy())

    slope, (probs, entropy) = jax.grad(all_at_once, has_aux=True)(logits)
    np.testing.assert_allclose(probs, [expected, [0.5, 0.5, 0], [0, 1, 0]], rtol=1e-6)
    np.testing.assert_allclose(
        entropy, [-(expected * np.log(expected)).sum(), np.log(2), 0.0], rtol=1e-6
    )
    assert entropy[2] == 0 and np.all(np.isfinite(slope))


@pytest.mark.parametrize("script", LEARNER_SCRIPTS)
def test_learner_is_decentralized(script):
    """The Jacobian of agent i's logits with respect to agent j's observation is 0 for j != i, and
    not 0 for j = i."""
    apply, _, params = make_learner(script)
    view = random_obs(script, 14, 1, 3, NUM_ACTIONS).agents_view[0]
    # (N, A, N, O)
    jacobian = np.asarray(jax.jacrev(lambda view: apply(params, view[None])[0])(view))
    for i in range(3):
        for j in range(3):
            assert np.any(jacobian[i, :, j] != 0) == (i == j)
