"""Tests of the losses, of what the gradients reach, of collection, and of a whole iteration."""

import dataclasses
import functools
import math

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    apply_guider,
    apply_learner,
    has_memory,
    let_guider_act,
    make_guider,
    random_minibatch,
    random_params,
    scripts_with,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
INF = math.inf


# -------------------- Advantages ------------------------------------------------------------------
@pytest.mark.parametrize("gae_lambda", [1.0, 0.7, 0.4, 0.0])
@pytest.mark.parametrize("script", scripts_with("gae"))
def test_gae_equals_a_plain_loop(script, gae_lambda):
    """Random terminations (discount 0), truncations (last, discount 1) and plain steps; agents
    differ."""
    rng = np.random.default_rng(0)
    reward, value, next_value = rng.normal(size=(3, 9, 6, 2))  # (T, B, N)
    kind = rng.integers(3, size=(9, 6))
    last, discount = kind > 0, np.where(kind == 1, 0.0, 1.0)
    expected = np.zeros_like(reward)
    for b in range(6):
        for n in range(2):
            trace = 0.0
            for t in reversed(range(9)):
                target = reward[t, b, n] + (0.0 if kind[t, b] == 1 else 0.9 * next_value[t, b, n])
                trace = target - value[t, b, n] + (0.0 if last[t, b] else 0.9 * gae_lambda * trace)
                expected[t, b, n] = trace
    inputs = [jnp.asarray(x, jnp.float32) for x in (reward, value, next_value, discount)]
    advantage, value_target = script.gae(*inputs, jnp.asarray(last), 0.9, gae_lambda)
    np.testing.assert_allclose(advantage, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(value_target, expected + value, rtol=1e-5, atol=1e-5)


GAE_BY_HAND = [  # lambda, what the middle step ends with, advantages
    (1.0, "nothing", [3.75, 3.5, 3.0]),
    (1.0, "truncation", [3.0, 2.0, 3.0]),
    (1.0, "termination", [2.5, 1.0, 3.0]),
    (0.7, "nothing", [3.0675, 3.05, 3.0]),
    (0.7, "truncation", [2.7, 2.0, 3.0]),
    (0.7, "termination", [2.35, 1.0, 3.0]),
    (0.4, "nothing", [2.52, 2.6, 3.0]),
    (0.4, "truncation", [2.4, 2.0, 3.0]),
    (0.4, "termination", [2.2, 1.0, 3.0]),
]


@pytest.mark.parametrize("gae_lambda, end, by_hand", GAE_BY_HAND)
@pytest.mark.parametrize("script", scripts_with("gae"))
def test_gae_by_hand(script, gae_lambda, end, by_hand):
    """Three steps, gamma 0.5, errors 2, 2, 3; a termination takes gamma * next_value = 1 off the
    middle one."""
    # errors: 2 + 0, 1 + 1, 4 + 1 - 2
    value, next_value = jnp.array([0.0, 0.0, 2.0]), jnp.array([0.0, 2.0, 2.0])
    reward, last = jnp.array([2.0, 1.0, 4.0]), jnp.array([False, end != "nothing", False])
    discount = jnp.array([1.0, 0.0 if end == "termination" else 1.0, 1.0])
    steps = [x.reshape(3, 1, 1) for x in (reward, value, next_value)]
    advantage, value_target = script.gae(*steps, discount[:, None], last[:, None], 0.5, gae_lambda)
    np.testing.assert_allclose(advantage.ravel(), by_hand, rtol=1e-6)
    np.testing.assert_allclose(value_target.ravel(), np.array(by_hand) + value.ravel(), rtol=1e-6)


# -------------------- The parts of the loss -------------------------------------------------------
# pi = 0.2, delta = 2, epsilon = 0.2; rows: mu / pi below, inside, above the tether; columns: what
# PPO's clip does then.
DOUBLE_CLIP_TABLE = [  # mu, mu_old, the clipped ratio, its derivative with respect to log mu
    (0.05, 0.200, 0.80, 0.0), (0.05, 0.10, 1.00, 0.0), (0.05, 0.05, 1.20, 0.0),  # mu becomes 0.1
    (0.30, 0.600, 0.80, 0.0), (0.30, 0.3125, 0.96, 0.96), (0.30, 0.15, 1.20, 0.0),
    (0.80, 0.800, 0.80, 0.0), (0.80, 0.40, 1.00, 0.0), (0.80, 0.20, 1.20, 0.0),  # mu becomes 0.4
]


@pytest.mark.parametrize("mu, mu_old, clipped, slope", DOUBLE_CLIP_TABLE)
@pytest.mark.parametrize("script", scripts_with("double_clip"))
def test_double_clip_table(script, mu, mu_old, clipped, slope):
    """Value and gradient by hand; the gradient is exactly 0 wherever a clip bites, and always so
    for the learner."""
    logs = [jnp.log(x) for x in (mu, 0.2, mu_old)]
    value, slopes = jax.value_and_grad(script.double_clip, argnums=(0, 1))(*logs, 2.0, 0.2)
    np.testing.assert_allclose(value, clipped, rtol=1e-6)
    np.testing.assert_allclose(slopes[0], slope, rtol=1e-6)
    assert slopes[1] == 0


@pytest.mark.parametrize("script", scripts_with("double_clip"))
def test_double_clip_limits(script):
    """delta = inf is PPO's clip to the bit; delta -> 1 leaves the learner's own ratio."""
    mu, pi, mu_old = jnp.asarray(np.random.default_rng(1).normal(0, 0.3, (3, 1000)), jnp.float32)
    ppo = jnp.clip(jnp.exp(mu - mu_old), 1 - 0.2, 1 + 0.2)
    np.testing.assert_array_equal(script.double_clip(mu, pi, mu_old, INF, 0.2), ppo)
    np.testing.assert_array_equal(
        script.double_clip(mu, jnp.full_like(mu, -1e9), mu_old, INF, 0.2), ppo
    )
    near_pi = script.double_clip(mu, pi, mu_old, 1 + 1e-9, 0.2)
    np.testing.assert_allclose(near_pi, np.clip(np.exp(pi - mu_old), 0.8, 1.2), rtol=1e-6)


@pytest.mark.parametrize("script", scripts_with("kl_mask"))
def test_kl_mask(script):
    """On where mu / pi < 1 / delta or > delta, and nowhere for delta = inf."""
    mu = jnp.log(jnp.array([0.49, 0.51, 1.0, 1.99, 2.01])) - 3.0
    np.testing.assert_array_equal(script.kl_mask(mu, -3.0, 2.0), [True, False, False, False, True])
    np.testing.assert_array_equal(
        script.kl_mask(jnp.array([-1e9, 0.0]), jnp.array([0.0, -1e9]), INF), [False, False]
    )


@pytest.mark.parametrize("script", scripts_with("guider_loss"))
def test_guider_loss(script):
    """The pessimistic one of two products, by hand: 2.4, -0.8, -1.5, 1.0."""
    ratio, clipped = jnp.array([[1.5, 0.5], [1.5, 0.5]]), jnp.array([[1.2, 0.8], [1.2, 0.8]])
    advantage = jnp.array([[2.0, -1.0], [-1.0, 2.0]])
    np.testing.assert_allclose(
        script.guider_loss(ratio, clipped, advantage), -(2.4 - 0.8 - 1.5 + 1.0) / 4, rtol=1e-6
    )


@pytest.mark.parametrize(
    "clip_vloss, by_hand", [(True, (1.69 + 1 + 1) / 6), (False, (1 + 1 + 1) / 6)]
)
@pytest.mark.parametrize("script", scripts_with("value_loss"))
def test_value_loss(script, clip_vloss, by_hand):
    """Half the mean of the squared errors 1, 1, 1; clipped, the first is 1.3 ** 2, the third would
    be only 0.7 ** 2."""
    value, old, target = (
        jnp.array([[1.0, 3.0, 1.0]]), jnp.array([[0.5, 3.1, 0.5]]), jnp.array([[2.0, 2.0, 0.0]]),
    )
    np.testing.assert_allclose(
        script.value_loss(value, old, target, 0.2, clip_vloss), by_hand, rtol=1e-6
    )


# (M, N, A) = (2, 1, 3)
MU, PI = [[[0.5, 0.3, 0.2]], [[0.1, 0.8, 0.1]]], [[[0.2, 0.2, 0.6]], [[0.3, 0.4, 0.3]]]
# KL(mu || pi)
KLS = [sum(p * math.log(p / q) for p, q in zip(mu, pi)) for (mu,), (pi,) in zip(MU, PI)]
RATIO, ADVANTAGE = jnp.array([[1.5], [0.5]]), jnp.array([[2.0], [-1.0]])


def log_policies():
    return jnp.log(jnp.array(MU)), jnp.log(jnp.array(PI))


@pytest.mark.parametrize("script", scripts_with("learner_loss"))
def test_learner_loss(script):
    """KL(mu || pi), not KL(pi || mu), as an explicit sum; its gradient is pi - mu; magpo's RL term
    is PPO's."""
    log_mu, log_pi = log_policies()
    extra = (RATIO, ADVANTAGE, 0.2) if hasattr(script, "double_clip") else ()

    def parts(logits):
        result = script.learner_loss(
            distrax.Categorical(log_mu), distrax.Categorical(logits), *extra
        )
        return result if extra else (result, 0.0)

    np.testing.assert_allclose(parts(log_pi)[0], sum(KLS) / 2, rtol=1e-5)
    slope = jax.grad(lambda logits: parts(logits)[0])(log_pi)
    np.testing.assert_allclose(slope, (np.array(PI) - np.array(MU)) / 2, rtol=1e-5, atol=1e-7)
    if extra:
        np.testing.assert_allclose(parts(log_pi)[1], -(2.4 - 0.8) / 2, rtol=1e-6)


@pytest.mark.parametrize("script", scripts_with("backtrack_loss"))
def test_backtrack_loss(script):
    """KL(mu || pi) of the masked samples, divided by the number of all; no gradient from the
    others."""
    log_mu, log_pi = log_policies()
    mask = jnp.array([[True], [False]])

    def loss(logits):
        return script.backtrack_loss(distrax.Categorical(logits), distrax.Categorical(log_pi), mask)

    value, slope = jax.value_and_grad(loss)(log_mu)
    np.testing.assert_allclose(value, KLS[0] / 2, rtol=1e-6)
    assert np.any(slope[0] != 0) and np.all(slope[1] == 0)


@pytest.mark.parametrize("script", scripts_with("normalise"))
def test_normalise(script):
    """Mean 0 and variance 1 over all devices together, not on each."""
    x = jnp.asarray(
        np.random.default_rng(2).normal([[3.0], [5.0]], [[1.0], [4.0]], (2, 64)), jnp.float32
    )
    y = np.asarray(jax.vmap(script.normalise, axis_name="device")(x), np.float64)
    assert abs(y.mean()) < 1e-6 and abs(y.var() - 1) < 1e-5
    assert abs(y[0].mean()) > 0.1
    constant = jax.vmap(script.normalise, axis_name="device")(jnp.ones((2, 4)))
    np.testing.assert_array_equal(constant, jnp.zeros((2, 4)))


# -------------------- The loss of a minibatch, and whom its gradients reach -----------------------
NUM_SAMPLES, NUM_AGENTS, NUM_ACTIONS = 32, 3, 4
COEFS = {"learner_rl_coef": 0.7, "ent_coef": 0.03, "vf_coef": 0.6, "clip_coef": 0.2}
NOTHING_BUT_KL = {**COEFS, "learner_rl_coef": 0.0, "ent_coef": 0.0, "vf_coef": 0.0}


@functools.cache
def make_problem(script):
    """Networks with random parameters, and a minibatch that the guider, as it is, has acted on."""
    guider = make_guider(
        script, "mat", NUM_AGENTS, NUM_ACTIONS, num_heads=2, num_blocks=1, embed_dim=8
    )
    learner = script.Learner(NUM_ACTIONS, hidden_dim=8)
    mb, params = random_minibatch(script, 0, guider, learner, NUM_SAMPLES)
    mb = jax.jit(functools.partial(let_guider_act, script, guider))(
        params.guider, mb, jax.random.PRNGKey(3)
    )
    return guider, learner, params, mb._replace(value_target=mb.value + mb.value_target)


@functools.cache
def make_gradient(script, delta):
    """minibatch_loss's gradient and parts on one device; one compilation serves all
    coefficients."""
    guider, learner, _, _ = make_problem(script)
    args = script.Args(**({"delta": delta} if delta else {}))

    def gradient(params, mb, coefs):
        loss = functools.partial(
            script.minibatch_loss, args=dataclasses.replace(args, **coefs), guider=guider,
            learner=learner,
        )
        return jax.vmap(
            lambda mb: jax.grad(lambda p: loss(p, mb=mb), has_aux=True)(params), axis_name="device"
        )(mb)

    compiled = jax.jit(gradient)
    return lambda params, mb, coefs: jax.tree.map(
        lambda x: x[0], compiled(params, jax.tree.map(lambda x: x[None], mb), coefs))


def log_softmax(logits, mask):
    logits = jnp.where(mask, logits, -jnp.inf)
    return jnp.where(
        mask, logits - jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True), -jnp.inf
    )


def explicit_kl(log_p, log_q):
    """KL(p || q) of each sample and agent; illegal actions are -inf in both."""
    legal = jnp.isfinite(log_p)
    log_p, log_q = jnp.where(legal, log_p, 0.0), jnp.where(legal, log_q, 0.0)
    return jnp.sum(jnp.where(legal, jnp.exp(log_p) * (log_p - log_q), 0.0), axis=-1)


def gradients_by_the_paper(script, mb, delta, learner_rl_coef, ent_coef, vf_coef, clip_coef):
    """Equations 9 and 10, written down anew with probabilities in place of their logarithms, one
    network at a time."""
    guider, learner, params, _ = make_problem(script)
    mask, taken = mb.obs.action_mask, jax.nn.one_hot(mb.action, NUM_ACTIONS, dtype=bool)
    advantage = (mb.advantage - jnp.mean(mb.advantage)) / jnp.std(mb.advantage)
    mu_old = jnp.exp(mb.behaviour_log_prob)

    def policies(guider_params, learner_params):
        logits, value = apply_guider(guider, guider_params, mb)
        log_mu, log_pi = (
            log_softmax(logits, mask),
            log_softmax(apply_learner(learner, learner_params, mb), mask),
        )
        mu, pi = (jnp.exp(jnp.sum(jnp.where(taken, x, 0.0), axis=-1)) for x in (log_mu, log_pi))
        return log_mu, log_pi, mu, pi, value

    def guider_objective(guider_params):
        log_mu, log_pi, mu, pi, value = policies(guider_params, params.learner)
        r, r_near = mu / mu_old, jnp.clip(mu / pi, 1 / delta, delta) * pi / mu_old
        outside = (mu / pi < 1 / delta) | (mu / pi > delta)
        near_value = mb.value + jnp.clip(value - mb.value, -clip_coef, clip_coef)
        entropy = -jnp.sum(
            jnp.where(mask, jnp.exp(log_mu) * jnp.where(mask, log_mu, 0.0), 0.0), axis=-1
        )
        policy_loss = -jnp.minimum(
            r * advantage, jnp.clip(r_near, 1 - clip_coef, 1 + clip_coef) * advantage
        )
        value_loss = 0.5 * jnp.maximum(
            (value - mb.value_target) ** 2, (near_value - mb.value_target) ** 2
        )
        kl = jnp.where(outside, explicit_kl(log_mu, log_pi), 0.0)
        return jnp.mean(policy_loss + kl - ent_coef * entropy + vf_coef * value_loss)

    def learner_objective(learner_params):
        log_mu, log_pi, mu, pi, value = policies(params.guider, learner_params)
        rho = pi / mu_old
        policy_loss = -jnp.minimum(
            rho * advantage, jnp.clip(rho, 1 - clip_coef, 1 + clip_coef) * advantage
        )
        return jnp.mean(explicit_kl(log_mu, log_pi) + learner_rl_coef * policy_loss)

    objectives = script.Pair(guider_objective, learner_objective)
    return jax.jit(
        lambda params: script.Pair(*[jax.grad(f)(p) for f, p in zip(objectives, params)])
    )(params)


def assert_close(x, y, tolerance=1e-5):
    """Leaf by leaf, relative to the largest entry of the leaf."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            x, y, rtol=0, atol=tolerance * (1e-3 + np.abs(y).max())
        ),
        x, y,
    )


def largest(tree):
    return max(np.abs(x).max() for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("script", scripts_with("minibatch_loss", "gae", "Learner"))
def test_gradients_are_those_of_the_paper(script):
    """Each network's gradient is that of its own objective, Eq. 9 or 10; for ctds with delta inf
    and lambda 0."""
    guider, learner, params, mb = make_problem(script)
    tether = hasattr(script, "double_clip")
    coefs = {name: x for name, x in COEFS.items() if tether or name != "learner_rl_coef"}
    noise = jnp.asarray(np.random.default_rng(5).normal(0, 0.2, (2, *mb.action.shape)), jnp.float32)
    mb = mb._replace(behaviour_log_prob=mb.behaviour_log_prob + noise[0], value=mb.value + noise[1])
    grads, losses = make_gradient(script, 1.5 if tether else None)(params, mb, coefs)
    expected = gradients_by_the_paper(
        script, mb,
        **{**COEFS, "delta": 1.5 if tether else INF, "learner_rl_coef": 0.7 if tether else 0.0},
    )
    assert 0.1 < losses["clipfrac"] < 0.9
    if tether:
        assert 0.1 < losses["delta_clipfrac"] < 0.9
    assert_close(grads, expected, 1e-4)
    assert largest(grads.guider) > 1e-2 and largest(grads.learner) > 1e-2


MAGPO = scripts_with("minibatch_loss", "double_clip", "kl_mask")


@pytest.mark.parametrize("script", MAGPO)
def test_learner_terms_give_the_guider_no_gradient(script):
    """With no advantage, entropy bonus, value loss or tether, KL(mu || pi) moves the learner, the
    guider not at all."""
    _, _, params, mb = make_problem(script)
    mb = mb._replace(advantage=jnp.zeros_like(mb.advantage))
    grads, losses = make_gradient(script, INF)(params, mb, NOTHING_BUT_KL)
    assert (
        largest(grads.guider) == 0 and largest(grads.learner) > 1e-2 and losses["learner_kl"] > 0.1
    )


@pytest.mark.parametrize("script", MAGPO)
def test_guider_terms_give_the_learner_no_gradient(script):
    """The tether moves the guider and not the learner, though it is the learner it is tied to."""
    _, _, params, mb = make_problem(script)
    free, _ = make_gradient(script, INF)(params, mb, COEFS)
    tied, losses = make_gradient(script, 1.0001)(params, mb, COEFS)
    assert losses["guider_kl"] > 0.1 and largest(free.guider) > 1e-2
    assert_close(tied.learner, free.learner, 1e-6)
    assert largest(jax.tree.map(jnp.subtract, tied.guider, free.guider)) > 1e-2


@pytest.mark.parametrize("script", MAGPO)
def test_outside_the_tether_only_the_kl_moves_the_guider(script):
    """An advantage that would push mu further out gives no gradient, one that pulls it in does; the
    KL pulls it in."""
    guider, learner, params, mb = make_problem(script)
    mask = mb.obs.action_mask
    log_pi = log_softmax(apply_learner(learner, params.learner, mb), mask)
    learner_log_prob = jnp.take_along_axis(log_pi, mb.action[..., None], axis=-1)[..., 0]
    outwards = jnp.sign(mb.behaviour_log_prob - learner_log_prob)
    gradient = make_gradient(script, 1.0001)
    kl_grads, inwards_grads, outwards_grads = (
        gradient(params, mb._replace(advantage=sign * outwards), NOTHING_BUT_KL)[0].guider
        for sign in (0, -1, 1)
    )
    assert_close(outwards_grads, kl_grads, 1e-6)
    assert largest(jax.tree.map(jnp.subtract, inwards_grads, kl_grads)) > 1e-2
    untied, _ = make_gradient(script, INF)(params, mb._replace(advantage=outwards), NOTHING_BUT_KL)
    assert largest(untied.guider) > 1e-2

    def divergence(guider_params):
        logits, _ = apply_guider(guider, guider_params, mb)
        return jnp.mean(explicit_kl(log_softmax(logits, mask), log_pi))

    step = 1e-3 / largest(kl_grads)
    stepped = jax.tree.map(lambda p, g: p - step * g, params.guider, kl_grads)
    assert divergence(stepped) < divergence(params.guider) - 1e-4


@pytest.mark.parametrize("script", MAGPO)
def test_every_first_ratio_is_one(script):
    """On what the guider did itself no single ratio differs from 1 by more than 1e-5: none is
    beyond a clip of 1e-5."""
    _, _, params, mb = make_problem(script)
    _, losses = make_gradient(script, 1.5)(params, mb, {**COEFS, "clip_coef": 1e-5})
    assert (
        losses["clipfrac"] == 0
        and abs(losses["ratio"] - 1) < 1e-5
        and abs(losses["approx_kl"]) < 1e-6
    )


@pytest.mark.parametrize("script", MAGPO)
def test_gradients_are_finite_with_one_legal_action(script):
    """All but one action masked for two of the agents; the learner has not seen the mask and
    dislikes that action."""
    _, _, params, mb = make_problem(script)
    one_legal = jnp.asarray(np.eye(NUM_ACTIONS, dtype=bool)[[0, 1]])
    mask = mb.obs.action_mask.at[..., :2, :].set(one_legal)
    action = mb.action.at[..., 0].set(0).at[..., 1].set(1)
    mb = mb._replace(obs=mb.obs._replace(action_mask=mask), action=action,
                     behaviour_log_prob=mb.behaviour_log_prob.at[..., :2].set(0.0))
    grads, losses = make_gradient(script, 1.5)(params, mb, COEFS)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((grads, losses)))
    assert largest(grads.guider) > 1e-2 and largest(grads.learner) > 1e-2


# ------------- Collection, minibatches, evaluation, on an environment that follows a script -------
class ScriptedEnv:
    """Every start state has a number, its tag, and an episode does what the tag says; agents see
    the tag and the time.

    The episode takes 1 + tag % 4 steps, is terminated if the tag is odd and truncated if it is
    even, and is won if the tag is divisible by 3. Step t = 1, 2, .. pays agents t and 3t, a step
    beyond the end 1000.
    """

    num_agents, num_actions, has_win_rate = 2, 3, True
    continuous, no_action = False, np.zeros(2, np.int32)

    def __init__(self, script):
        self.script = script

    def observe(self, tag, time):
        # All of one size, so that the norm in front of the networks does not drown the time.
        view = jnp.stack([jnp.arange(2), jnp.full(2, tag) / 2**22, jnp.full(2, time)], axis=-1)
        return self.script.Observation(view.astype(jnp.float32), jnp.ones((2, 3), bool))

    def reset(self, key):
        tag = jax.random.randint(key, (), 1000, 2**23)  # exact in float32
        return {"tag": tag, "time": 0 * tag}, self.observe(tag, 0)

    def step(self, state, action):
        tag, time = state["tag"], state["time"] + 1
        last = time == 1 + tag % 4
        reward = jnp.where(time > 1 + tag % 4, 1000.0, time * jnp.array([1.0, 3.0]))
        outcome = self.script.Outcome(
            self.observe(tag, time), reward, jnp.where(last & (tag % 2 == 1), 0.0, 1.0), last,
            last & (tag % 3 == 0),
        )
        return {"tag": tag, "time": time}, outcome


NUM_ENVS, NUM_STEPS = 4, 11


def tags_and_times(obs):
    view = np.asarray(obs.agents_view)
    return (view[..., 0, 1] * 2**22).astype(int), view[..., 0, 2].astype(int)


@pytest.fixture(scope="module", params=scripts_with("collect", "guider_act", distinct=True))
def collected(request):
    """Two rollouts, the second going on where the first stopped: [(rollout, sums over episodes,
    state afterwards)]."""
    script = request.param
    env, args = (
        ScriptedEnv(script),
        script.Args(num_envs=NUM_ENVS, num_steps=NUM_STEPS, num_devices=1),
    )
    guider, learner = make_guider(script, "sable", 2, 3, 1, 1, 4), script.Learner(3, hidden_dim=4)
    # lengths 2, 2, 3, 4: two end in the same step
    tag, time = jnp.array([1, 5, 2, 3]), jnp.zeros(4, jnp.int32)
    obs, memory = jax.vmap(env.observe)(tag, time), has_memory(script)
    if memory:
        start = script.init_hidden(dataclasses.replace(args, learner_hidden_dim=4), env, guider, 4)
        first_view, zeros = obs.agents_view[:, None], jnp.zeros((4, 1))
        params = script.Pair(
            random_params(
                guider, 0, first_view, jnp.zeros((4, 1, 2), jnp.int32), zeros, start.guider
            ),
            random_params(learner, 1, first_view, zeros, start.learner),
        )
    else:
        params = script.Pair(
            random_params(guider, 0, obs.agents_view, jnp.zeros((4, 2), jnp.int32)), None
        )
    fields = {
        "params": params, "opt_state": None, "env_state": {"tag": tag, "time": time}, "obs": obs,
        "running_return": jnp.zeros(4), "running_length": jnp.zeros(4),
        "key": jax.random.PRNGKey(1),
    }
    state = script.TrainState(**fields, **({"hidden": start} if memory else {}))
    networks = (guider, learner) if memory else (guider,)
    collect, results = jax.jit(functools.partial(script.collect, args, env, *networks)), []
    for _ in range(2):
        state, rollout, episodes = collect(state)
        results.append((rollout, episodes, state))
    return results


def test_collect_records_what_the_environment_did(collected):
    """next_obs is what followed the action, also at the end, and only a termination has discount
    0."""
    for rollout, _, _ in collected:
        tag, time = tags_and_times(rollout.obs)
        if hasattr(rollout, "next_obs"):  # with memory there is its value alone, see test_memory.py
            next_tag, next_time = tags_and_times(rollout.next_obs)
            np.testing.assert_array_equal(next_tag, tag)
            np.testing.assert_array_equal(next_time, time + 1)
        np.testing.assert_array_equal(rollout.last, time + 1 == 1 + tag % 4)
        np.testing.assert_array_equal(rollout.discount == 0, rollout.last & (tag % 2 == 1))
        np.testing.assert_array_equal(rollout.reward, (time + 1)[..., None] * np.array([1, 3]))
        assert set(np.unique(rollout.discount)) == {0.0, 1.0}


def test_collect_goes_on_or_starts_afresh(collected):
    """An observation is the one before it, one step on, or the start of a fresh episode if that had
    ended."""
    tag, time = (np.concatenate(x) for x in zip(
        *(tags_and_times(rollout.obs) for rollout, _, _ in collected),
        [x[None] for x in tags_and_times(collected[-1][2].obs)]))  # (2 * T + 1, B)
    last = np.concatenate([rollout.last for rollout, _, _ in collected])
    np.testing.assert_array_equal(time[1:], np.where(last, 0, time[:-1] + 1))
    np.testing.assert_array_equal(tag[1:][~last], tag[:-1][~last])


def test_collect_takes_fresh_states_in_turn(collected):
    """The first B episodes that end are followed by B different states; then by the same ones, in
    that order."""
    used = []
    for rollout, _, state in collected:
        tag = np.concatenate([tags_and_times(rollout.obs)[0], tags_and_times(state.obs)[0][None]])
        fresh = tag[1:][np.asarray(rollout.last)]  # by time, then by environment
        assert len(fresh) > 2 * NUM_ENVS and len(set(fresh[:NUM_ENVS])) == NUM_ENVS
        np.testing.assert_array_equal(fresh, np.resize(fresh[:NUM_ENVS], len(fresh)))
        used.append(set(fresh))
    assert not used[0] & used[1]  # each rollout has a pool of its own
    assert np.sum(collected[0][0].last[1]) >= 2  # several in one step


def test_collect_sums_over_whole_episodes(collected):
    """Returns, lengths and number of the episodes that ended, those begun in an earlier rollout
    included in full."""
    for rollout, episodes, _ in collected:
        length = (1 + tags_and_times(rollout.obs)[0] % 4)[np.asarray(rollout.last)]
        assert float(episodes["number"]) == len(length)
        assert float(episodes["length"]) == np.sum(length)
        assert float(episodes["return"]) == np.sum(length * (length + 1))  # 2 + 4 + .. + 2 * length
    state = collected[0][2]
    np.testing.assert_array_equal(state.running_length, tags_and_times(state.obs)[1])
    assert np.any(state.running_length > 0)


@pytest.mark.parametrize(
    "script", scripts_with("make_minibatches", "Transition", feed_forward=True)
)
def test_minibatches(script):
    """Each epoch is a permutation of all samples, epochs differ, and the parts of a sample stay
    together."""
    args = script.Args(num_minibatches=2, update_epochs=3)
    number = jnp.arange(20).reshape(5, 4)  # (T, B)
    fields = {name: number for name in script.Transition._fields} | {
        "obs": script.Observation(number, number)
    }
    samples, indices = script.make_minibatches(
        args, script.Transition(**fields), number, number, jax.random.PRNGKey(0))
    assert all(np.array_equal(x, np.arange(20)) for x in jax.tree.leaves(samples))
    assert indices.shape == (6, 10)
    epochs = np.asarray(indices).reshape(3, 20)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(20), (3, 1)))
    assert len({tuple(order) for order in [np.arange(20), *epochs]}) == 4


@pytest.mark.parametrize("script", scripts_with("play", distinct=True))
def test_play_counts_each_episode_to_its_end(script):
    """Return, length and win of each episode are its own, whatever the environment does after its
    end."""
    starts = []

    def note(obs):
        tag, time = tags_and_times(obs)
        starts.extend([tag] if np.all(time == 0) else [])

    def act(obs, *memory_and_key):
        jax.debug.callback(note, obs)
        action = jnp.zeros(obs.agents_view.shape[:2], jnp.int32)
        return (action, memory_and_key[1]) if has_memory(script) else action

    hidden = [jnp.zeros(())] if has_memory(script) else []
    episodes = script.play(ScriptedEnv(script), act, *hidden, 16, jax.random.PRNGKey(0))
    jax.effects_barrier()
    (tag,) = starts
    assert set(tag % 4) == {0, 1, 2, 3} and len(set(tag)) == 16
    np.testing.assert_array_equal(episodes.length, 1 + tag % 4)
    # 2 + 4 + .. + 2 * length
    np.testing.assert_array_equal(episodes.returns, (1 + tag % 4) * (2 + tag % 4))
    np.testing.assert_array_equal(episodes.won, tag % 3 == 0)
    assert np.all(episodes.ended)


# -------------------- A whole iteration -----------------------------------------------------------
@pytest.fixture(scope="module", params=scripts_with("train_iteration", "collect", distinct=True))
def iteration(request):
    """run(seed) -> guider, state before, state after, metrics, and what `collect` and `gae` were
    given and gave."""
    script, seen = request.param, {}

    def watched(name):
        function = getattr(script, name)

        def call(*inputs):
            outputs = function(*inputs)
            jax.debug.callback(
                lambda *x: seen.update({name: x}), *((outputs[1],) if name == "collect" else inputs)
            )
            return outputs

        return call

    env, args = (
        ScriptedEnv(script),
        script.Args(
            num_envs=NUM_ENVS, num_steps=8, num_devices=1, update_epochs=2, embed_dim=4,
            learner_hidden_dim=4,
        ),
    )
    parts = (args, env, *script.make_networks(args, env), script.make_optimizers(args))
    init = jax.jit(functools.partial(script.init_state, *parts))
    iterate = jax.pmap(
        functools.partial(script.train_iteration, *parts), axis_name="device",
        devices=jax.devices()[:1],
    )

    @functools.cache
    def run(seed, repetition=0):
        before = init(*jax.random.split(jax.random.PRNGKey(seed)))
        state, metrics = jax.tree.map(
            lambda x: np.asarray(x)[0], iterate(jax.tree.map(lambda x: x[None], before))
        )
        jax.effects_barrier()
        return parts[2], before, state, metrics, dict(seen)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("collect", "gae"):
            patch.setattr(script, name, watched(name))
        run(0)  # compiles, so that the watched functions are part of the program
    return run


def test_advantages_use_the_true_last_observation(iteration):
    """gae gets the value of what followed each action, not of the fresh episode after it, and the
    rollout as it was."""
    guider, before, _, _, seen = iteration(0)
    (rollout,), (reward, value, next_value, discount, last, gamma, gae_lambda) = (
        seen["collect"],
        seen["gae"],
    )
    # collected along with the memory it needs, see test_memory.py
    if hasattr(rollout, "next_value"):
        expected = rollout.next_value
    else:
        view = rollout.next_obs.agents_view  # (T, B, N, O)
        encode = jax.jit(functools.partial(guider.apply, method="encode"))
        _, expected = encode(before.params.guider, view.reshape(-1, *view.shape[2:]))
    assert np.ptp(next_value) > 1e-3
    np.testing.assert_allclose(
        next_value, expected.reshape(value.shape), rtol=0, atol=1e-2 * np.ptp(next_value)
    )
    for given, recorded in (
        (reward, rollout.reward), (value, rollout.value), (discount, rollout.discount),
        (last, rollout.last),
    ):
        np.testing.assert_array_equal(given, recorded)
    assert np.any(last & (discount == 1))
    np.testing.assert_allclose((gamma, gae_lambda), (0.99, 0.95), rtol=1e-6)


def test_iteration_moves_both_networks(iteration):
    """One iteration moves every parameter but those that nothing depends on, and its first ratio is
    1."""
    _, before, after, metrics, _ = iteration(0)
    for network in ("guider", "learner"):
        old, new = getattr(before.params, network), getattr(after.params, network)
        moved = jax.tree.map(lambda x, y: np.any(x != y), old, new)
        assert np.mean(jax.tree.leaves(moved)) > 0.8
    assert abs(metrics["losses"]["first_ratio"] - 1) < 1e-5
    assert not np.array_equal(after.key, before.key)


def test_same_seed_same_parameters(iteration):
    """One seed gives the same parameters to the bit, twice; another seed gives others."""
    for state in (1, 2):  # before and after
        first, again, other = (iteration(*x)[state].params for x in ((0, 0), (0, 1), (1, 0)))
        jax.tree.map(np.testing.assert_array_equal, first, again)
        pairs = zip(jax.tree.leaves(first), jax.tree.leaves(other))
        assert not any(np.array_equal(x, y) for x, y in pairs if x.ndim > 1)


def count_equations(jaxpr):
    """Equations of a jaxpr and, recursively, of all those inside (bodies of scans, conditions,
    calls)."""
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                total += count_equations(inner) if hasattr(inner, "eqns") else 0
    return total


def program_size(script, scenario, **flags):
    """Equations of `train_iteration` on CoordSum."""
    chunks = {"chunk_steps": 2} if has_memory(script) else {}
    args = script.Args(num_envs=4, num_devices=1, embed_dim=4, **chunks, **flags)
    env = script.make_env("CoordSum-v0", scenario)
    parts = (args, env, *script.make_networks(args, env), script.make_optimizers(args))
    keys = jax.random.split(jax.random.PRNGKey(0))
    state = jax.eval_shape(functools.partial(script.init_state, *parts), *keys)
    jaxpr = jax.make_jaxpr(
        functools.partial(script.train_iteration, *parts), axis_env=[("device", 1)]
    )(state)
    return count_equations(jaxpr.jaxpr)


@pytest.mark.parametrize("kind", ["sable", "mat"])
@pytest.mark.parametrize(
    "script",
    scripts_with(
        "train_iteration", "collect", "gae", "make_minibatches", "guider_act", "Guider",
        "EncoderBlock", "DecoderBlock", distinct=True,
    ),
)
def test_program_does_not_grow(script, kind):
    """The program of an iteration is as long for 16 steps, 6 agents and 3 epochs as for 4, 2 and
    1."""
    size = program_size(script, "2x4-5", guider=kind, num_steps=4, update_epochs=1)
    assert size > 500
    assert program_size(script, "6x4-5", guider=kind, num_steps=16, update_epochs=3) == size
