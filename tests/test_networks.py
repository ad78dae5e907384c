"""Tests of guider and learner: masks, the two ways to decode, who sees what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    ScriptedEnv,
    first_state,
    make_guider,
    make_parts,
    random_obs,
    random_params,
    scripts_with,
)

NUM_ACTIONS, NUM_FEATURES = 4, 5
GUIDER_SCRIPTS = scripts_with("Guider", "guider_act", feed_forward=True)
LEARNER_SCRIPTS = scripts_with("Learner", "learner_act", feed_forward=True)
pytestmark = pytest.mark.usefixtures("quick_compile", "double_precision")


@functools.cache
def build(script, kind, num_agents, num_blocks, num_heads, continuous=False):
    """A guider with large random parameters, and its two ways to decode, compiled."""
    guider = make_guider(script, kind, 16, num_heads, num_blocks, NUM_ACTIONS, continuous)
    obs = random_obs(script, 0, 1, num_agents, NUM_ACTIONS)
    action = jnp.zeros((1, num_agents, NUM_ACTIONS) if continuous else (1, num_agents), int)
    params = random_params(guider, 1, obs, action)
    act = jax.jit(functools.partial(script.guider_act, guider), static_argnames="greedy")
    return guider, jax.jit(guider.apply), act, params


def make_learner(script):
    """A learner with random parameters, and its two functions, compiled."""
    learner = script.Learner(8, NUM_ACTIONS, False)
    act = jax.jit(functools.partial(script.learner_act, learner), static_argnames="greedy")
    params = random_params(learner, 1, random_obs(script, 0, 1, 1, NUM_ACTIONS))
    return jax.jit(learner.apply), act, params


def masked_log_softmax(logits, mask):
    """By hand, in float64: log-probabilities of the legal actions, -inf for the others."""
    logits = np.where(mask, np.asarray(logits, np.float64), -np.inf)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


SHAPES = [  # kind, agents, blocks, heads, continuous
    ("mat", 8, 1, 2, False), ("mat", 1, 1, 1, False), ("sable", 5, 1, 2, True)]
FIVE_AGENTS = [("mat", 5, 2, 4), ("sable", 5, 2, 1)]


def counting_passes(guider, passes):
    """The guider, with a list that gets longer with each pass of the decoder."""

    class Counting(type(guider)):
        def decode(self, *inputs):
            jax.debug.callback(lambda: passes.append(1))
            return super().decode(*inputs)

    names = guider.__dataclass_fields__.keys() - {"parent", "name"}
    return Counting(**{name: getattr(guider, name) for name in names})


def sharpened(params):
    """Parameters with which policies hang on what they are told."""
    policy = params["params"]["policy"]
    policy = policy | {"out": jax.tree.map(lambda x: 8.0 * x, policy["out"])}
    return {"params": params["params"] | {"policy": policy}}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("script", GUIDER_SCRIPTS)
def test_fixed_point_is_deciding_one_by_one(script, shape):
    """Deciding all at once again and again gives what agent after agent would decide with the same
    random numbers, after at most N passes, sampled or greedily. Log-probs and values are those of
    one parallel pass over the actions, which is what training sees."""
    guider, _, _, soft_params = build(script, *shape)
    num_agents, passes = shape[1], []
    obs, key = random_obs(script, 5, 256, num_agents, NUM_ACTIONS), jax.random.PRNGKey(6)
    act = functools.partial(script.guider_act, counting_passes(guider, passes))
    act = jax.jit(act, static_argnames="greedy")

    @jax.jit
    def one_pass(params, action):
        """What agents do, sampled and greedily, if they are told of these actions; the log-probs
        and values of these actions."""
        policy, value = guider.apply(params, obs, action)
        decided = {False: policy.sample(seed=key), True: policy.mode()}
        return decided, policy.log_prob(action), value

    for params, greedy in ((soft_params, False), (sharpened(soft_params), False),
                           (soft_params, True)):
        passes.clear()
        action, *found = act(params, obs, key, greedy=greedy)
        jax.effects_barrier()
        assert 1 <= len(passes) <= num_agents
        one_by_one = np.zeros_like(action)
        alone, *_ = one_pass(params, one_by_one)
        for agent in range(num_agents):
            decided, *_ = one_pass(params, one_by_one)
            one_by_one[:, agent] = decided[greedy][:, agent]
        np.testing.assert_allclose(action, one_by_one, rtol=1e-9, atol=1e-9)
        _, *expected = one_pass(params, one_by_one)
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)
        # It is no accident: agents who are told nothing decide otherwise.
        differs = np.abs(alone[greedy] - action) > 1e-6
        assert np.any(differs) == (num_agents > 1)


@pytest.mark.parametrize("script", GUIDER_SCRIPTS)
def test_fixed_point_ends_on_nan(script):
    """Broken parameters do not hang the loop, although NaN never equals itself."""
    _, _, act, params = build(script, "sable", 3, 1, 2, True)
    broken = jax.tree.map(lambda x: jnp.nan * x, params)
    obs = random_obs(script, 7, 4, 3, NUM_ACTIONS)
    assert np.all(np.isnan(act(broken, obs, jax.random.PRNGKey(0))[0]))


@pytest.mark.parametrize("shape", FIVE_AGENTS, ids=str)
@pytest.mark.parametrize("script", GUIDER_SCRIPTS)
def test_what_each_agent_depends_on(script, shape):
    """Another action of agent j leaves the policies of agents <= j as they are, to the bit, and
    changes all later. The guider is centralized: another observation of agent j changes the values
    of all agents."""
    _, apply, _, params = build(script, *shape)
    obs = random_obs(script, 5, 16, 5, NUM_ACTIONS)
    obs = obs._replace(action_mask=jnp.ones_like(obs.action_mask))
    action = jax.random.randint(jax.random.PRNGKey(6), (16, 5), 0, NUM_ACTIONS)
    policy, value = apply(params, obs, action)
    for agent in range(5):
        other = action.at[:, agent].set((action[:, agent] + 1) % NUM_ACTIONS)
        changed, changed_value = apply(params, obs, other)
        same = slice(agent + 1)
        np.testing.assert_array_equal(changed.logits[:, same], policy.logits[:, same])
        np.testing.assert_array_equal(changed_value, value)
        if agent < 4:
            difference = np.abs(changed.logits - policy.logits)[:, agent + 1 :]
            assert np.all(difference.max(axis=(0, 2)) > 1e-4)
        other = obs._replace(agents_view=obs.agents_view.at[:, agent].multiply(-1.0))
        _, changed_value = apply(params, other, action)
        assert np.all(np.abs(changed_value - value).max(axis=0) > 1e-4)


@pytest.mark.parametrize("script", LEARNER_SCRIPTS)
def test_learner_takes_legal_actions(script):
    """Greedy ones are the likeliest; log-probs are those of the policy, and finite."""
    apply, act, params = make_learner(script)
    obs = random_obs(script, 12, 256, 2, NUM_ACTIONS)
    log_probs = masked_log_softmax(apply(params, obs).logits, obs.action_mask)
    for greedy in (False, True):
        action, log_prob = act(params, obs, jax.random.PRNGKey(13), greedy=greedy)
        expected = np.take_along_axis(log_probs, np.asarray(action)[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(log_prob, expected, rtol=1e-8, atol=1e-12)
        assert np.all(np.isfinite(expected)) and np.all(expected == log_probs.max(-1)) == greedy


@pytest.mark.parametrize("script", scripts_with("Policy"))
def test_masked_policy(script):
    """Illegal actions have probability 0, the entropy is that of the legal ones, and gradients are
    finite."""
    logits = jnp.array([[1.0, 2.0, 3.0], [1.0, 1.0, -4.0], [5.0, 6.0, 7.0]])
    mask = jnp.array([[True, True, True], [True, True, False], [False, True, False]])
    expected = np.exp([1.0, 2.0, 3.0]) / np.exp([1.0, 2.0, 3.0]).sum()
    network = script.Policy(3, False)
    params = {"params": {"out": {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}}}

    @jax.jit
    def all_at_once(logits):
        policy, other = (network.apply(params, x, mask) for x in (logits, 2 * logits))
        log_prob, kl = policy.log_prob(jnp.array([0, 0, 1])), policy.kl_divergence(other)
        return jnp.sum(policy.entropy() + log_prob + kl), (policy.probs, policy.entropy())

    slope, (probs, entropy) = jax.grad(all_at_once, has_aux=True)(logits)
    np.testing.assert_allclose(probs, [expected, [0.5, 0.5, 0], [0, 1, 0]], rtol=1e-6)
    by_hand = [-(expected * np.log(expected)).sum(), np.log(2), 0.0]
    np.testing.assert_allclose(entropy, by_hand, rtol=1e-6)
    assert entropy[2] == 0 and np.all(np.isfinite(slope))


@pytest.mark.parametrize("script", LEARNER_SCRIPTS)
def test_learner_is_decentralized(script):
    """The Jacobian of agent i's logits with respect to agent j's observation is 0 for j != i, and
    not 0 for j = i."""
    apply, _, params = make_learner(script)
    obs = random_obs(script, 14, 1, 3, NUM_ACTIONS)
    obs = obs._replace(action_mask=jnp.ones_like(obs.action_mask))

    def logits(view):
        return apply(params, obs._replace(agents_view=view[None])).logits[0]

    jacobian = np.asarray(jax.jit(jax.jacrev(logits))(obs.agents_view[0]))  # (N, A, N, O)
    for i in range(3):
        for j in range(3):
            assert np.any(jacobian[i, :, j] != 0) == (i == j)


# -------------------- By hand ---------------------------------------------------------------------
def normed(kind, layer, x):
    """LayerNorm (mat) or RMSNorm (sable)."""
    x = x - x.mean(-1, keepdims=True) * (kind == "mat")
    x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    return x * layer["scale"] + layer.get("bias", 0.0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["mat", "sable"])
@pytest.mark.parametrize("script", scripts_with("Mixer", feed_forward=True))
def test_mixer_by_hand(script, kind, causal):
    """Head by head and agent by agent: attention, or retention with a norm for each head and a gate
    that reads what keys read."""
    x, source = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)))
    mixer = script.Mixer(kind, 2)
    params = random_params(mixer, 1, x, source, causal)
    found, layers = mixer.apply(params, x, source, causal), params["params"]
    inputs = {"query": x, "key": source, "value": source}
    query, key, value = (inputs[name] @ layers[name]["kernel"] for name in inputs)
    mixed = np.zeros((3, 8))
    for agent, head in np.ndindex(3, 2):
        part, seen = slice(4 * head, 4 * head + 4), slice(agent + 1 if causal else 3)
        scores = key[seen, part] @ query[agent, part] / np.sqrt(4)
        mixed[agent, part] = y = jax.nn.softmax(scores) @ value[seen, part]
        if kind == "sable":
            y = scores @ value[seen, part]
            mixed[agent, part] = (y - y.mean()) / np.sqrt(y.var() + 1e-6)
    if kind == "sable":
        mixed = mixed * layers["head_norm"]["scale"] + layers["head_norm"]["bias"]
        mixed = mixed * jax.nn.swish(source @ layers["gate"]["kernel"])
    expected = normed(kind, layers["norm"], x + mixed @ layers["out"]["kernel"])
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["mat", "sable"])
@pytest.mark.parametrize("script", scripts_with("Mlp"))
def test_mlp_by_hand(script, kind):
    """GELU of two layers (mat), SwiGLU of three (sable)."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)))
    mlp = script.Mlp(kind)
    params = random_params(mlp, 1, x)
    layers = params["params"]
    up, gate = (x @ layers[name]["kernel"] + layers[name]["bias"]
                for name in ("up", "up" if kind == "mat" else "gate"))
    hidden = jax.nn.gelu(up) if kind == "mat" else jax.nn.swish(up) * gate
    out = hidden @ layers["down"]["kernel"] + layers["down"]["bias"]
    expected = normed(kind, layers["norm"], x + out)
    np.testing.assert_allclose(mlp.apply(params, x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("script", LEARNER_SCRIPTS)
def test_learner_by_hand(script):
    """Two layers of ReLU and the policy, whose last layer starts small: all actions alike."""
    obs = random_obs(script, 3, 2, 3, NUM_ACTIONS)
    obs = obs._replace(action_mask=jnp.ones_like(obs.action_mask))
    learner = script.Learner(8, NUM_ACTIONS, False)
    params = random_params(learner, 1, obs)
    first, second, last = (params["params"][name] for name in ("Dense_0", "Dense_1", "Policy_0"))
    x = obs.agents_view
    for layer in (first, second):
        x = jnp.maximum(x @ layer["kernel"] + layer["bias"], 0.0)
    logits = x @ last["out"]["kernel"] + last["out"]["bias"]
    expected = masked_log_softmax(logits, obs.action_mask)
    found = jax.nn.log_softmax(learner.apply(params, obs).logits)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    start = learner.init(jax.random.PRNGKey(0), obs)["params"]["Policy_0"]["out"]["kernel"]
    np.testing.assert_allclose(np.linalg.svd(start)[1], 0.01, rtol=1e-4)


@pytest.mark.parametrize("script", scripts_with("Guider", "make_networks"))
def test_guider_without_mlp(script):
    """--no-guider-mlp leaves a norm of it, and observations are normed first."""
    for has_mlp in (True, False):
        parts = make_parts(script, ScriptedEnv(script), guider_mlp=has_mlp)
        params = jax.eval_shape(lambda: first_state(script, parts)).params["guider"]["params"]
        assert ("up" in params["decoder_0_2"]) == ("up" in params["encoder_0_1"]) == has_mlp
        assert "scale" in params["obs_embed"]["layers_0"]


@pytest.mark.parametrize("script", scripts_with("Dense"))
def test_dense_is_flaxs(script):
    """It flattens and restores the axes before the last, and is flax's dense layer otherwise."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 5)))
    layer = script.Dense(6, bias_init=jax.nn.initializers.normal(1.0))
    params = layer.init(jax.random.PRNGKey(0), x)
    weights = params["params"]
    expected = x @ weights["kernel"] + weights["bias"]
    np.testing.assert_allclose(layer.apply(params, x), expected, rtol=1e-8, atol=1e-8)
