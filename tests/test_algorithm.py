"""Tests of the losses, of what the gradients reach, of collection, and of a whole iteration."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    ScriptedEnv,
    apply_guider,
    apply_learner,
    has_memory,
    let_guider_act,
    make_guider,
    random_minibatch,
    random_params,
    scripts_with,
    tags_and_times,
    zero_hidden,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
INF = math.inf


# -------------------- Advantages ------------------------------------------------------------------
def advantages(script, reward, value, next_value, discount, last, gamma, gae_lambda):
    """`gae` of arrays (T, B, N) and (T, B)."""
    steps = {"reward": reward, "value": value, "discount": discount, "last": last}
    rollout = script.Transition(**dict.fromkeys(script.Transition._fields) | steps)
    if has_memory(script):
        return script.gae(rollout._replace(next_value=next_value), gamma, gae_lambda)
    return script.gae(rollout, next_value, gamma, gae_lambda)


@pytest.mark.parametrize("gae_lambda", [1.0, 0.7, 0.0])
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
    found = advantages(script, *inputs, jnp.asarray(last), 0.9, gae_lambda)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


GAE_BY_HAND = [  # lambda, what the middle step ends with, advantages
    (1.0, "nothing", [3.75, 3.5, 3.0]), (1.0, "truncation", [3.0, 2.0, 3.0]),
    (1.0, "termination", [2.5, 1.0, 3.0]), (0.7, "nothing", [3.0675, 3.05, 3.0]),
    (0.7, "truncation", [2.7, 2.0, 3.0]), (0.7, "termination", [2.35, 1.0, 3.0]),
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
    found = advantages(script, *steps, discount[:, None], last[:, None], 0.5, gae_lambda)
    np.testing.assert_allclose(found.ravel(), by_hand, rtol=1e-6)


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
    far = jnp.full_like(mu, -1e9)
    np.testing.assert_array_equal(script.double_clip(mu, far, mu_old, INF, 0.2), ppo)
    near_pi = script.double_clip(mu, pi, mu_old, 1 + 1e-9, 0.2)
    np.testing.assert_allclose(near_pi, np.clip(np.exp(pi - mu_old), 0.8, 1.2), rtol=1e-6)


@pytest.mark.parametrize("script", scripts_with("double_clip"))
def test_delta_may_be_traced(script):
    """A schedule of delta is a number inside the compiled program."""
    found = jax.jit(script.double_clip)(-1.0, -2.0, -1.5, jnp.float32(2.0), 0.2)
    np.testing.assert_allclose(found, script.double_clip(-1.0, -2.0, -1.5, 2.0, 0.2), rtol=1e-6)


@pytest.mark.parametrize("script", scripts_with("ppo_loss"))
def test_ppo_loss(script):
    """The pessimistic one of two products, by hand: 2.4, -0.8, -1.5, 1.0."""
    ratio, clipped = jnp.array([[1.5, 0.5], [1.5, 0.5]]), jnp.array([[1.2, 0.8], [1.2, 0.8]])
    advantage = jnp.array([[2.0, -1.0], [-1.0, 2.0]])
    expected = -(2.4 - 0.8 - 1.5 + 1.0) / 4
    np.testing.assert_allclose(script.ppo_loss(ratio, clipped, advantage), expected, rtol=1e-6)


# -------------------- The loss of a minibatch, and whom its gradients reach -----------------------
NUM_SAMPLES, NUM_AGENTS, NUM_ACTIONS = 32, 3, 4
COEFS = {"learner_rl_coef": 0.7, "ent_coef": 0.03, "vf_coef": 0.6, "clip_coef": 0.2}
NOTHING_BUT_KL = {**COEFS, "learner_rl_coef": 0.0, "ent_coef": 0.0, "vf_coef": 0.0}


@functools.cache
def make_problem(script):
    """Networks with random parameters, and a minibatch that the guider, as it is, has acted on."""
    guider = make_guider(script, "mat", 8, 2, 1, NUM_ACTIONS)
    learner = script.Learner(8, NUM_ACTIONS, False)
    mb, params = random_minibatch(script, 0, guider, learner, NUM_SAMPLES, NUM_AGENTS)
    act = jax.jit(functools.partial(let_guider_act, script, guider))
    return guider, learner, params, act(params["guider"], mb, jax.random.PRNGKey(3))


@functools.cache
def make_gradient(script, delta):
    """minibatch_loss's gradient and parts on one device; one compilation serves all
    coefficients."""
    guider, learner, _, _ = make_problem(script)
    args = script.Args(**({"delta": delta} if delta else {}))

    def gradient(params, mb, coefs):
        own_args = dataclasses.replace(args, **coefs)

        def loss(params, mb):
            return script.minibatch_loss(params, own_args, guider, learner, mb)

        in_pmap = jax.vmap(jax.grad(loss, has_aux=True), in_axes=(None, 0), axis_name="device")
        return in_pmap(params, jax.tree.map(lambda x: x[None], mb))

    compiled = jax.jit(gradient)
    return lambda *inputs: jax.tree.map(lambda x: x[0], compiled(*inputs))


def log_softmax(logits, mask):
    logits = jnp.where(mask, logits, -jnp.inf)
    normaliser = jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True)
    return jnp.where(mask, logits - normaliser, -jnp.inf)


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
    mu_old, target = jnp.exp(mb.behaviour_log_prob), mb.value + mb.advantage

    def policies(guider_params, learner_params):
        policy, value = apply_guider(guider, guider_params, mb)
        log_mu = log_softmax(policy.logits, mask)
        log_pi = log_softmax(apply_learner(learner, learner_params, mb).logits, mask)
        mu, pi = (jnp.exp(jnp.sum(jnp.where(taken, x, 0.0), axis=-1)) for x in (log_mu, log_pi))
        return log_mu, log_pi, mu, pi, value

    def guider_objective(guider_params):
        log_mu, log_pi, mu, pi, value = policies(guider_params, params["learner"])
        r, r_near = mu / mu_old, jnp.clip(mu / pi, 1 / delta, delta) * pi / mu_old
        clipped = jnp.clip(r_near, 1 - clip_coef, 1 + clip_coef)
        policy_loss = -jnp.minimum(r * advantage, clipped * advantage)
        outside = (mu / pi < 1 / delta) | (mu / pi > delta)
        kl = jnp.where(outside, explicit_kl(log_mu, log_pi), 0.0)
        entropy = -jnp.sum(jnp.where(mask, jnp.exp(log_mu) * log_mu, 0.0), axis=-1)
        near_value = mb.value + jnp.clip(value - mb.value, -clip_coef, clip_coef)
        value_loss = 0.5 * jnp.maximum((value - target) ** 2, (near_value - target) ** 2)
        return jnp.mean(policy_loss + kl - ent_coef * entropy + vf_coef * value_loss)

    def learner_objective(learner_params):
        log_mu, log_pi, mu, pi, value = policies(params["guider"], learner_params)
        rho = pi / mu_old
        clipped = jnp.clip(rho, 1 - clip_coef, 1 + clip_coef)
        policy_loss = -jnp.minimum(rho * advantage, clipped * advantage)
        return jnp.mean(explicit_kl(log_mu, log_pi) + learner_rl_coef * policy_loss)

    objectives = {"guider": guider_objective, "learner": learner_objective}
    return {name: jax.jit(jax.grad(f))(params[name]) for name, f in objectives.items()}


def assert_close(x, y, tolerance=1e-5):
    """Leaf by leaf, relative to the largest entry of the leaf."""

    def compare(x, y):
        atol = tolerance * (1e-3 + np.abs(y).max())
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)

    jax.tree.map(compare, x, y)


def largest(tree):
    return max(np.abs(x).max() for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("script", scripts_with("minibatch_loss", "gae", "Guider"))
def test_gradients_are_those_of_the_paper(script):
    """Each network's gradient is that of its own objective, Eq. 9 or 10; for ctds with delta inf
    and lambda 0."""
    guider, learner, params, mb = make_problem(script)
    tether = hasattr(script, "double_clip")
    # A guider that has moved since, so that ratios are not 1 and all clips bite somewhere.
    noise = 0.3 * jax.random.normal(jax.random.PRNGKey(8), mb.behaviour_log_prob.shape)
    mb = mb._replace(behaviour_log_prob=mb.behaviour_log_prob + noise, value=mb.value + noise)
    coefs = {name: x for name, x in COEFS.items() if tether or name != "learner_rl_coef"}
    grads, losses = make_gradient(script, 1.5 if tether else None)(params, mb, coefs)
    no_tether = {"delta": INF, "learner_rl_coef": 0.0}
    of_paper = COEFS | ({"delta": 1.5} if tether else no_tether)
    assert 0.1 < losses["clipfrac"] < 0.9
    if tether:
        assert 0.1 < losses["delta_clipfrac"] < 0.9
    assert_close(grads, gradients_by_the_paper(script, mb, **of_paper), 1e-4)
    assert largest(grads["guider"]) > 1e-2 and largest(grads["learner"]) > 1e-2


@pytest.mark.parametrize("script", scripts_with("minibatch_loss", distinct=True))
def test_parts_of_the_loss_by_hand(script):
    """KL(mu || pi), not KL(pi || mu); the masked KL as a mean over all samples; half the mean of
    the larger squared error of the values."""
    guider, learner, params, mb = make_problem(script)
    policy, value = apply_guider(guider, params["guider"], mb)
    log_mu = log_softmax(policy.logits, mb.obs.action_mask)
    log_pi = log_softmax(apply_learner(learner, params["learner"], mb).logits, mb.obs.action_mask)
    kl = explicit_kl(log_mu, log_pi)
    mb = mb._replace(value=mb.value + 0.5, advantage=mb.advantage + 1.0)
    tether = {"delta": 1.5} if hasattr(script, "double_clip") else {}
    _, losses = make_gradient(script, tether.get("delta"))(params, mb, {})
    np.testing.assert_allclose(losses["learner_kl"], np.mean(kl), rtol=1e-5)
    target = mb.value + mb.advantage
    errors = (value - target) ** 2, (mb.value - 0.2 - target) ** 2  # clipped: old value less 0.2
    expected = 0.5 * np.mean(np.maximum(*errors))
    np.testing.assert_allclose(losses["value_loss"], expected, rtol=1e-4)
    if tether:
        taken = mb.action[..., None]
        log_ratio = jnp.take_along_axis(log_mu - log_pi, taken, axis=-1)[..., 0]
        mask = np.abs(log_ratio) > np.log(1.5)
        assert 0.2 < np.mean(mask) < 0.8
        np.testing.assert_allclose(losses["guider_kl"], np.mean(mask * kl), rtol=1e-5)
        np.testing.assert_allclose(losses["delta_clipfrac"], np.mean(mask), rtol=1e-5)


MAGPO = scripts_with("minibatch_loss", "double_clip")


@pytest.mark.parametrize("script", MAGPO)
def test_advantages_are_normalised_over_all_devices(script):
    """The loss of two devices is that of one with both halves, though their advantages differ."""
    guider, learner, params, mb = make_problem(script)
    mb = mb._replace(advantage=mb.advantage + jnp.arange(len(mb.action)).reshape(-1, *[1] * (
        mb.advantage.ndim - 1)))

    def loss(mb):
        return script.minibatch_loss(params, script.Args(), guider, learner, mb)[1]

    @functools.partial(jax.jit, static_argnums=0)
    def on_devices(number, mb):
        halves = jax.tree.map(lambda x: x.reshape(number, -1, *x.shape[1:]), mb)
        return jax.tree.map(jnp.mean, jax.vmap(loss, axis_name="device")(halves))

    assert_close(on_devices(2, mb), on_devices(1, mb))


@pytest.mark.parametrize("script", MAGPO)
def test_learner_terms_give_the_guider_no_gradient(script):
    """With no advantage, entropy bonus, value loss or tether, KL(mu || pi) moves the learner, the
    guider not at all."""
    _, _, params, mb = make_problem(script)
    mb = mb._replace(advantage=jnp.zeros_like(mb.advantage))
    grads, losses = make_gradient(script, INF)(params, mb, NOTHING_BUT_KL)
    assert largest(grads["guider"]) == 0
    assert largest(grads["learner"]) > 1e-2 and losses["learner_kl"] > 0.1


@pytest.mark.parametrize("script", MAGPO)
def test_guider_terms_give_the_learner_no_gradient(script):
    """The tether moves the guider and not the learner, though it is the learner it is tied to."""
    _, _, params, mb = make_problem(script)
    free, _ = make_gradient(script, INF)(params, mb, COEFS)
    tied, losses = make_gradient(script, 1.0001)(params, mb, COEFS)
    assert losses["guider_kl"] > 0.1 and largest(free["guider"]) > 1e-2
    assert_close(tied["learner"], free["learner"], 1e-6)
    assert largest(jax.tree.map(jnp.subtract, tied["guider"], free["guider"])) > 1e-2


@pytest.mark.parametrize("script", MAGPO)
def test_outside_the_tether_only_the_kl_moves_the_guider(script):
    """An advantage that would push mu further out gives no gradient, one that pulls it in does; the
    KL pulls it in."""
    guider, learner, params, mb = make_problem(script)
    mask = mb.obs.action_mask
    log_pi = log_softmax(apply_learner(learner, params["learner"], mb).logits, mask)
    learner_log_prob = jnp.take_along_axis(log_pi, mb.action[..., None], axis=-1)[..., 0]
    outwards = jnp.sign(mb.behaviour_log_prob - learner_log_prob)
    gradient = make_gradient(script, 1.0001)
    kl_grads, inwards_grads, outwards_grads = (
        gradient(params, mb._replace(advantage=sign * outwards), NOTHING_BUT_KL)[0]["guider"]
        for sign in (0, -1, 1)
    )
    assert_close(outwards_grads, kl_grads, 1e-6)
    assert largest(jax.tree.map(jnp.subtract, inwards_grads, kl_grads)) > 1e-2
    untied, _ = make_gradient(script, INF)(params, mb._replace(advantage=outwards), NOTHING_BUT_KL)
    assert largest(untied["guider"]) > 1e-2

    def divergence(guider_params):
        policy, _ = apply_guider(guider, guider_params, mb)
        return jnp.mean(explicit_kl(log_softmax(policy.logits, mask), log_pi))

    step = 1e-3 / largest(kl_grads)
    stepped = jax.tree.map(lambda p, g: p - step * g, params["guider"], kl_grads)
    assert divergence(stepped) < divergence(params["guider"]) - 1e-4


@pytest.mark.parametrize("script", MAGPO)
def test_every_first_ratio_is_one(script):
    """On what the guider did itself no single ratio differs from 1 by more than 1e-5: none is
    beyond a clip of 1e-5."""
    _, _, params, mb = make_problem(script)
    _, losses = make_gradient(script, 1.5)(params, mb, {**COEFS, "clip_coef": 1e-5})
    assert losses["clipfrac"] == 0
    assert abs(losses["ratio"] - 1) < 1e-5 and abs(losses["approx_kl"]) < 1e-6


@pytest.mark.parametrize("script", MAGPO)
def test_gradients_are_finite_with_one_legal_action(script):
    """All but one action masked for two of the agents; the learner has not seen the mask and
    dislikes that action."""
    _, _, params, mb = make_problem(script)
    one_legal = jnp.asarray(np.eye(NUM_ACTIONS, dtype=bool)[[0, 1]])
    mask = mb.obs.action_mask.at[..., :2, :].set(one_legal)
    mb = mb._replace(
        obs=mb.obs._replace(action_mask=mask),
        action=mb.action.at[..., 0].set(0).at[..., 1].set(1),
        behaviour_log_prob=mb.behaviour_log_prob.at[..., :2].set(0.0),
    )
    grads, losses = make_gradient(script, 1.5)(params, mb, COEFS)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((grads, losses)))
    assert largest(grads["guider"]) > 1e-2 and largest(grads["learner"]) > 1e-2


# ------------- Collection and evaluation, on an environment that follows a script ----------------
NUM_ENVS, NUM_STEPS = 4, 11


@pytest.fixture(scope="module", params=scripts_with("collect", "guider_act", distinct=True))
def collected(request):
    """Two rollouts, the second going on where the first stopped: [(rollout, state afterwards)]."""
    script = request.param
    env = ScriptedEnv(script)
    args = script.Args(num_envs=NUM_ENVS, num_steps=NUM_STEPS, num_devices=1)
    guider = make_guider(script, "sable", 4, 1, 1, 3)
    learner = script.Learner(4, 3, False)
    # lengths 2, 2, 3, 4: two end in the same step
    tag, zeros = jnp.array([1, 5, 2, 3]), jnp.zeros(4)
    episode = dict.fromkeys(("return", "length", "won"), zeros)
    env_state = jax.vmap(env.make_state)(tag, jnp.zeros(4, jnp.int32), episode)
    obs, action = env_state.obs, jnp.zeros((4, 2), jnp.int32)
    fields = {"opt_state": None, "env_state": env_state, "key": jax.random.PRNGKey(1)}
    fields["iteration"] = 0
    if has_memory(script):
        fields["hidden"] = zero_hidden(script, guider, learner, 4, 2)
        obs, action = script.add_time((obs, action))
        hidden, timestep = fields["hidden"], zeros[:, None]
        params = {"guider": random_params(guider, 0, obs, action, timestep, hidden["guider"])}
        params["learner"] = random_params(learner, 1, obs, timestep, hidden["learner"])
    else:
        params = {"guider": random_params(guider, 0, obs, action)}
    networks = (guider, learner) if has_memory(script) else (guider,)
    collect = jax.jit(functools.partial(script.collect, args, env, *networks))
    state, results = script.TrainState(params=params, **fields), []
    for _ in range(2):
        state, rollout = collect(state)
        results.append((rollout, state))
    return results


def test_collect_records_what_the_environment_did(collected):
    """`after` is what followed the action, also at the end, and only a termination has discount
    0."""
    for rollout, _ in collected:
        tag, time = tags_and_times(rollout.obs)
        next_tag, next_time = tags_and_times(rollout.after.obs)
        np.testing.assert_array_equal(next_tag, tag)
        np.testing.assert_array_equal(next_time, time + 1)
        np.testing.assert_array_equal(rollout.last, time + 1 == 1 + tag % 4)
        np.testing.assert_array_equal(rollout.discount == 0, rollout.last & (tag % 2 == 1))
        np.testing.assert_array_equal(rollout.reward, (time + 1)[..., None] * np.array([1, 3]))
        assert set(np.unique(rollout.discount)) == {0.0, 1.0}


def test_collect_goes_on_or_starts_afresh(collected):
    """An observation is the one before it, one step on, or the start of a fresh episode if that had
    ended."""
    seen = [tags_and_times(rollout.obs) for rollout, _ in collected]
    seen.append([x[None] for x in tags_and_times(collected[-1][1].env_state.obs)])
    tag, time = (np.concatenate(x) for x in zip(*seen))  # (2 * T + 1, B)
    last = np.concatenate([rollout.last for rollout, _ in collected])
    np.testing.assert_array_equal(time[1:], np.where(last, 0, time[:-1] + 1))
    np.testing.assert_array_equal(tag[1:][~last], tag[:-1][~last])


def test_collect_takes_fresh_states_in_turn(collected):
    """The first B episodes that end are followed by B different states; then by the same ones, in
    that order."""
    used = []
    for rollout, state in collected:
        after = tags_and_times(state.env_state.obs)[0][None]
        tag = np.concatenate([tags_and_times(rollout.obs)[0], after])
        fresh = tag[1:][np.asarray(rollout.last)]  # by time, then by environment
        assert len(fresh) > 2 * NUM_ENVS and len(set(fresh[:NUM_ENVS])) == NUM_ENVS
        np.testing.assert_array_equal(fresh, np.resize(fresh[:NUM_ENVS], len(fresh)))
        used.append(set(fresh))
    assert not used[0] & used[1]  # each rollout has a pool of its own
    assert np.sum(collected[0][0].last[1]) >= 2  # several in one step


def test_episodes_are_counted_whole(collected):
    """Return and length of the episodes that ended, those begun in an earlier rollout included in
    full; they begin anew with the next episode."""
    for rollout, state in collected:
        last = np.asarray(rollout.last)
        length = (1 + tags_and_times(rollout.obs)[0] % 4)[last]
        episode = jax.tree.map(lambda x: np.asarray(x)[last], rollout.after.episode)
        np.testing.assert_array_equal(episode["length"], length)
        np.testing.assert_array_equal(episode["return"], length * (length + 1))  # 2 + 4 + ..
        running = tags_and_times(state.env_state.obs)[1]
        np.testing.assert_array_equal(state.env_state.episode["length"], running)
    assert np.any(running > 0)


@pytest.mark.parametrize("script", scripts_with("play", distinct=True))
def test_play_counts_each_episode_to_its_end(script, monkeypatch):
    """Return, length and win of each episode are its own, whatever the environment does after its
    end; NaN for those that go on at the limit."""
    starts = []

    def note(obs):
        tag, time = tags_and_times(obs)
        starts.extend([tag] if np.all(time == 0) else [])

    def act(obs, *rest):
        jax.debug.callback(note, obs)
        return jnp.zeros(obs.agents_view.shape[:2], jnp.int32), "whatever", rest[-2:][0]

    hidden = [jnp.zeros(())] if has_memory(script) else []
    play = functools.partial(script.play, ScriptedEnv(script), act, *hidden, 16)
    episode = play(jax.random.PRNGKey(0))
    jax.effects_barrier()
    (tag,) = starts
    assert set(tag % 4) == {0, 1, 2, 3} and len(set(tag)) == 16
    np.testing.assert_array_equal(episode["length"], 1 + tag % 4)
    np.testing.assert_array_equal(episode["return"], (1 + tag % 4) * (2 + tag % 4))  # 2 + 4 + ..
    np.testing.assert_array_equal(episode["won"], tag % 3 == 0)
    monkeypatch.setattr(script, "MAX_EPISODE_STEPS", 2)
    np.testing.assert_array_equal(np.isnan(play(jax.random.PRNGKey(0))["return"]), tag % 4 > 1)


@pytest.mark.parametrize("script", scripts_with("evaluate", "Guider", distinct=True))
def test_evaluation(script, monkeypatch):
    """Both networks play from the same keys; means, standard deviation and gap, by hand."""
    env, called = ScriptedEnv(script), []
    found = {"learner": [1.0, 3.0, 5.0, 7.0], "guider": [8.0, 8.0, 10.0, 10.0]}

    def play(env, act, *rest):
        *_, number, key = rest
        called.append((number, np.asarray(key).tolist()))
        name = act.func.__name__.removesuffix("_act")
        assert act.keywords == {"greedy": True}
        episode = {"return": found[name], "length": [2.0, 2, 2, 4], "won": [1.0, 0, 0, 0]}
        return jax.tree.map(jnp.asarray, episode, is_leaf=lambda x: isinstance(x, list))

    monkeypatch.setattr(script, "play", play)
    args = script.Args(eval_episodes=4, eval_greedy=True)
    networks = script.make_networks(args, env)
    params = {"guider": None, "learner": None}
    row = script.evaluate(args, env, *networks, params, jax.random.PRNGKey(5))
    assert {name: float(x) for name, x in row.items()} == {
        "eval/learner_return": 4.0, "eval/learner_return_std": pytest.approx(5**0.5),
        "eval/guider_return": 9.0, "eval/imitation_gap": 5.0, "eval/episodic_length": 2.5,
        "eval/win_rate": 0.25,
    }
    assert called == [(4, [0, 5])] * 2


# -------------------- A whole iteration -----------------------------------------------------------
@pytest.fixture(scope="module", params=scripts_with("train_iteration", "collect", distinct=True))
def iteration(request):
    """run(seed) -> script, guider, state before, state after, metrics, and what `collect` and `gae`
    gave and were given."""
    script, seen = request.param, {}

    def watched(name):
        function = getattr(script, name)

        def call(*inputs):
            outputs = function(*inputs)
            note = functools.partial(lambda name, *x: seen.update({name: x}), name)
            jax.debug.callback(note, *((outputs[1],) if name == "collect" else inputs))
            return outputs

        return call

    sizes = {"num_envs": NUM_ENVS, "num_steps": 8, "num_devices": 1, "update_epochs": 2}
    args = script.Args(**sizes, embed_dim=4, learner_hidden_dim=4, anneal_lr=True)
    args = dataclasses.replace(args, total_timesteps=4 * NUM_ENVS * 8)
    env = ScriptedEnv(script)
    parts = (args, env, *script.make_networks(args, env))
    init = jax.jit(functools.partial(script.init_state, *parts))
    iterate = functools.partial(script.train_iteration, *parts)
    iterate = jax.pmap(iterate, axis_name="device", devices=jax.devices()[:1])

    @functools.cache
    def run(seed, repetition=0, iteration=0):
        before = init(*jax.random.split(jax.random.PRNGKey(seed)))
        before = before._replace(iteration=jnp.int32(iteration))
        results = iterate(jax.tree.map(lambda x: x[None], before))
        state, metrics = jax.tree.map(lambda x: np.asarray(x)[0], results)
        jax.effects_barrier()
        return script, parts[2], before, state, metrics, dict(seen)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("collect", "gae"):
            patch.setattr(script, name, watched(name))
        run(0)  # compiles, so that the watched functions are part of the program
    return run


def test_advantages_use_the_true_last_observation(iteration):
    """gae gets the value of what followed each action, not of the fresh episode after it."""
    script, guider, before, _, _, seen = iteration(0)
    (rollout,), (_, *rest) = seen["collect"], seen["gae"]
    gamma, gae_lambda = rest[-2:]
    if not has_memory(script):  # with memory: test_memory.py
        encode = jax.jit(functools.partial(guider.apply, method="encode"))
        _, expected = encode(before.params["guider"], rollout.after.obs.agents_view)
        assert np.ptp(rest[0]) > 1e-3
        np.testing.assert_allclose(rest[0], expected, rtol=0, atol=1e-2 * np.ptp(rest[0]))
    assert np.any(rollout.last & (rollout.discount == 1))
    np.testing.assert_allclose((gamma, gae_lambda), (0.99, 0.95), rtol=1e-6)


def test_metrics_of_an_iteration(iteration):
    """Sums over the episodes that ended, and how much of the targets the values explain."""
    script, _, _, _, metrics, seen = iteration(0)
    (rollout,) = seen["collect"]
    last = np.asarray(rollout.last)
    assert metrics["episodes"] == np.sum(last) > 0
    for name in ("return", "length", "won"):
        total = np.sum(np.asarray(rollout.after.episode[name])[last])
        np.testing.assert_allclose(metrics[name], total, rtol=1e-6)
    advantage = script.gae(*seen["gae"])
    unexplained = np.var(advantage) / np.var(advantage + rollout.value)
    np.testing.assert_allclose(metrics["losses/explained_variance"], 1 - unexplained, rtol=1e-4)
    np.testing.assert_allclose(metrics["charts/learning_rate"], 1e-3, rtol=1e-6)


def test_iteration_moves_both_networks(iteration):
    """One iteration moves every parameter but those that nothing depends on, and its first ratio is
    1."""
    _, _, before, after, metrics, _ = iteration(0)
    for network in ("guider", "learner"):
        old, new = before.params[network], after.params[network]
        moved = jax.tree.map(lambda x, y: np.any(x != y), old, new)
        assert np.mean(jax.tree.leaves(moved)) > 0.8
    assert abs(metrics["losses/first_ratio"] - 1) < 1e-5
    assert not np.array_equal(after.key, before.key) and after.iteration == 1


def test_learning_rate_falls_by_iteration(iteration):
    """With --anneal-lr the third of four iterations has half the rate, and moves half as far in its
    first step of Adam's; the rate is that of the state's iteration."""
    _, _, before, first, metrics, _ = iteration(0)
    _, _, _, third, third_metrics, _ = iteration(0, 0, 2)
    np.testing.assert_allclose(third_metrics["charts/learning_rate"], 0.5e-3, rtol=1e-6)
    steps = [
        largest(jax.tree.map(jnp.subtract, after.params, before.params))
        for after in (first, third)
    ]
    assert 0.3 < steps[1] / steps[0] < 0.7 and third.iteration == 3


def test_same_seed_same_parameters(iteration):
    """One seed gives the same parameters to the bit, twice; another seed gives others."""
    for state in (2, 3):  # before and after
        first, again, other = (iteration(*x)[state].params for x in ((0, 0), (0, 1), (1, 0)))
        jax.tree.map(np.testing.assert_array_equal, first, again)
        pairs = zip(jax.tree.leaves(first), jax.tree.leaves(other))
        assert not any(np.array_equal(x, y) for x, y in pairs if x.ndim > 1)


@pytest.mark.parametrize("script", scripts_with("train_iteration", "minibatch_loss"))
def test_minibatches(script, monkeypatch):
    """Each epoch is a permutation of all samples, or with memory of all sequences, and epochs
    differ; a loss is the mean over all minibatches, the first ratio that of the first."""
    args = script.Args(num_envs=4, num_steps=4, num_devices=1, num_minibatches=2, update_epochs=3)
    env, seen = ScriptedEnv(script), []

    def minibatch_loss(params, args, guider, learner, mb):
        tag, time = mb.obs.agents_view[..., 0, 1] * 2**22, mb.obs.agents_view[..., 0, 2]
        jax.debug.callback(lambda *x: seen.append(x), tag, time, ordered=False)
        loss = sum(jnp.sum(x) for x in jax.tree.leaves(params))
        return 0.0 * loss, {"ratio": tag.ravel()[0], "tag": jnp.mean(tag)}

    monkeypatch.setattr(script, "minibatch_loss", minibatch_loss)
    parts = (args, env, *script.make_networks(args, env))
    state = jax.jit(functools.partial(script.init_state, *parts))(
        *jax.random.split(jax.random.PRNGKey(0)))
    iterate = jax.vmap(functools.partial(script.train_iteration, *parts), axis_name="device")
    _, metrics = jax.jit(iterate)(jax.tree.map(lambda x: x[None], state))
    jax.effects_barrier()
    assert len(seen) == 6
    mean_tag = np.mean([tag for tag, _ in seen])
    np.testing.assert_allclose(metrics["losses/tag"], mean_tag, rtol=1e-5)
    assert metrics["losses/first_ratio"] in [tag.ravel()[0] for tag, _ in seen]
    samples = [np.stack([tag.ravel(), time.ravel()], axis=1) for tag, time in seen]
    assert all(len(x) == 8 for x in samples)
    # In each epoch every sample once: each occurs three times in all, and minibatches differ.
    _, counts = np.unique(np.concatenate(samples), axis=0, return_counts=True)
    assert np.all(counts % 3 == 0)
    assert len({x.tobytes() for x in samples}) > 2


@pytest.fixture
def checked_keys():
    """Has JAX raise an error where a program uses a key twice; only typed keys are checked."""
    with jax.enable_custom_prng(True), jax.debug_key_reuse(True):
        yield


@pytest.mark.parametrize("script", scripts_with("train_iteration", "collect", distinct=True))
def test_training_uses_no_key_twice(script, checked_keys, monkeypatch):
    """The start and two iterations split each key before they use it again, in all their steps. The
    guider alone is meant to use the same numbers when it decides again."""

    def guider_act(guider, params, obs, *others):
        key = others[-1]
        action = jax.random.randint(key, obs.agents_view.shape[:2], 0, 3)
        results = action, jnp.zeros(action.shape), jnp.zeros(action.shape)
        return (*results, others[1]) if has_memory(script) else results

    monkeypatch.setattr(script, "guider_act", guider_act)
    args = script.Args(num_envs=4, num_steps=4, num_devices=1, embed_dim=4, learner_hidden_dim=4)
    env = ScriptedEnv(script)
    parts = (args, env, *script.make_networks(args, env))
    init = jax.jit(functools.partial(script.init_state, *parts))
    state = jax.eval_shape(init, *jax.random.split(jax.random.PRNGKey(0)))

    def two_iterations(state):
        return script.train_iteration(*parts, script.train_iteration(*parts, state)[0])

    on_one_device = jax.vmap(two_iterations, in_axes=None, axis_size=1, axis_name="device")
    jax.eval_shape(jax.jit(on_one_device), state)


@pytest.mark.parametrize("script", scripts_with("play", distinct=True))
def test_play_uses_no_key_twice(script, checked_keys):
    """Episodes start from different states, and each step acts with a key of its own."""

    def act(obs, *others):
        action = jax.random.randint(others[-1], obs.agents_view.shape[:2], 0, 3)
        return (action, others[1]) if has_memory(script) else (action,)

    hidden = [jnp.zeros(())] if has_memory(script) else []
    play = functools.partial(script.play, ScriptedEnv(script), act, *hidden, 4)
    jax.eval_shape(jax.jit(play), jax.random.PRNGKey(0))


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
    parts = (args, env, *script.make_networks(args, env))
    keys = jax.random.split(jax.random.PRNGKey(0))
    state = jax.eval_shape(functools.partial(script.init_state, *parts), *keys)
    iterate = functools.partial(script.train_iteration, *parts)
    return count_equations(jax.make_jaxpr(iterate, axis_env=[("device", 1)])(state).jaxpr)


@pytest.mark.parametrize("kind", ["sable", "mat"])
@pytest.mark.parametrize("script", scripts_with("train_iteration", "Mixer", distinct=True))
def test_program_does_not_grow(script, kind):
    """The program of an iteration is as long for 16 steps, 6 agents and 3 epochs as for 4, 2 and
    1."""
    size = program_size(script, "2x4-5", guider=kind, num_steps=4, update_epochs=1)
    assert size > 300
    assert program_size(script, "6x4-5", guider=kind, num_steps=16, update_epochs=3) == size
