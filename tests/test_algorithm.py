"""Tests of the losses, of what the gradients reach, of collection, and of a whole iteration."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    ScriptedEnv,
    apply_guider,
    apply_learner,
    first_state,
    has_memory,
    let_guider_act,
    make_guider,
    make_parts,
    on_one_device,
    random_like,
    random_minibatch,
    scripts_with,
    slow,
    tags_and_times,
)
from jax.extend import core

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
NOTHING_BUT_KL = {"learner_rl_coef": 0.0, "ent_coef": 0.0, "vf_coef": 0.0}


@functools.cache
def make_problem(script):
    """Networks with random parameters, and a minibatch that the guider has acted on before it moved
    a little, so that the clips bite here and there."""
    guider = make_guider(script, "mat", 8, 2, 1, NUM_ACTIONS)
    learner = script.Learner(8, NUM_ACTIONS, False)
    mb, params = random_minibatch(script, 0, guider, learner, NUM_SAMPLES, NUM_AGENTS)
    act = jax.jit(functools.partial(let_guider_act, script, guider))
    mb = act(params["guider"], mb, jax.random.PRNGKey(3))
    log_prob = mb.behaviour_log_prob
    log_prob += 0.3 * jax.random.normal(jax.random.PRNGKey(8), log_prob.shape)
    return guider, learner, params, mb._replace(behaviour_log_prob=log_prob)


@functools.cache
def make_gradient(script):
    """minibatch_loss's gradient and parts by parameters, minibatch and coefficients, delta among
    them; one compilation serves all."""
    guider, learner, *_ = make_problem(script)

    def gradient(params, mb, coefs):
        args = dataclasses.replace(script.Args(), **coefs)
        grad = jax.grad(script.minibatch_loss, has_aux=True)
        return grad(params, args, guider, learner, mb)

    return jax.jit(on_one_device(gradient))


def log_softmax(logits, mask):
    logits = jnp.where(mask, logits, -jnp.inf)
    normaliser = jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True)
    return jnp.where(mask, logits - normaliser, -jnp.inf)


def explicit_kl(log_p, log_q):
    """KL(p || q) of each sample and agent; illegal actions are -inf in both."""
    legal = jnp.isfinite(log_p)
    log_p, log_q = jnp.where(legal, log_p, 0.0), jnp.where(legal, log_q, 0.0)
    return jnp.sum(jnp.where(legal, jnp.exp(log_p) * (log_p - log_q), 0.0), axis=-1)


def losses_by_the_paper(script, delta, learner_rl_coef, ent_coef, vf_coef, clip_coef):
    """Equations 9 and 10, written down anew with probabilities in place of their logarithms, one
    network at a time -> gradients, parts."""
    guider, learner, params, mb = make_problem(script)
    mask, taken = mb.obs.action_mask, jax.nn.one_hot(mb.action, NUM_ACTIONS, dtype=bool)
    advantage = (mb.advantage - jnp.mean(mb.advantage)) / jnp.std(mb.advantage)
    mu_old = jnp.exp(mb.behaviour_log_prob)

    def policies(guider_params, learner_params):
        policy, value = apply_guider(guider, guider_params, mb)
        log_mu = log_softmax(policy.logits, mask)
        log_pi = log_softmax(apply_learner(learner, learner_params, mb).logits, mask)
        mu, pi = (jnp.exp(jnp.sum(jnp.where(taken, x, 0.0), axis=-1)) for x in (log_mu, log_pi))
        return log_mu, log_pi, mu, pi, value

    def entropy(log_policy):
        return -jnp.sum(jnp.where(mask, jnp.exp(log_policy) * log_policy, 0.0), axis=-1)

    def ppo(ratio, near_ratio):
        clipped = jnp.clip(near_ratio, 1 - clip_coef, 1 + clip_coef)
        return -jnp.minimum(ratio * advantage, clipped * advantage)

    def guider_objective(guider_params):
        log_mu, log_pi, mu, pi, value = policies(guider_params, params["learner"])
        r, outside = mu / mu_old, (mu / pi < 1 / delta) | (mu / pi > delta)
        parts = {
            "guider_policy_loss": ppo(r, jnp.clip(mu / pi, 1 / delta, delta) * pi / mu_old),
            "guider_kl": jnp.where(outside, explicit_kl(log_mu, log_pi), 0.0),
            "guider_entropy": entropy(log_mu),
            "value_loss": (value - mb.target) ** 2 / 2,
            "ratio": r,
            "approx_kl": r - 1 - jnp.log(r),
            "clipfrac": jnp.abs(r - 1) > clip_coef,
            "delta_clipfrac": outside,
        }
        parts = jax.tree.map(jnp.mean, parts)
        loss = parts["guider_policy_loss"] + parts["guider_kl"]
        return loss - ent_coef * parts["guider_entropy"] + vf_coef * parts["value_loss"], parts

    def learner_objective(learner_params):
        log_mu, log_pi, _, pi, _ = policies(params["guider"], learner_params)
        parts = {
            "learner_kl": explicit_kl(log_mu, log_pi),
            "learner_policy_loss": ppo(pi / mu_old, pi / mu_old),
            "learner_entropy": entropy(log_pi),
        }
        parts = jax.tree.map(jnp.mean, parts)
        return parts["learner_kl"] + learner_rl_coef * parts["learner_policy_loss"], parts

    guider_grads, parts = jax.jit(jax.grad(guider_objective, has_aux=True))(params["guider"])
    learner_grads, more = jax.jit(jax.grad(learner_objective, has_aux=True))(params["learner"])
    return {"guider": guider_grads, "learner": learner_grads}, parts | more


def assert_close(x, y, tolerance=1e-5):
    """Leaf by leaf, relative to the largest entry of the leaf."""

    def compare(x, y):
        atol = tolerance * (1e-3 + np.abs(y).max())
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)

    jax.tree.map(compare, x, y)


def largest(tree):
    return max(np.abs(x).max() for x in jax.tree.leaves(tree))


MAGPO = scripts_with("minibatch_loss", "double_clip")
CASES = [(script.values[0], delta) for script in MAGPO for delta in (1.0001, 1.5, INF)]
CASES += [(script.values[0], None) for script in scripts_with("minibatch_loss", "gae", "Guider")
          if script not in MAGPO]


@pytest.mark.parametrize("script, delta", CASES, ids=lambda x: getattr(x, "__name__", x))
def test_losses_are_those_of_the_paper(script, delta):
    """Each network's gradient is that of its own objective, Eq. 9 or 10, and the parts are theirs:
    KL(mu || pi), not KL(pi || mu), and masked as a mean over all samples. CTDS has delta = inf and
    lambda = 0."""
    _, _, params, mb = make_problem(script)
    of_paper = COEFS | ({"delta": delta} if delta else {"delta": INF, "learner_rl_coef": 0.0})
    coefs = {name: x for name, x in of_paper.items() if hasattr(script.Args, name)}
    grads, losses = make_gradient(script)(params, mb, coefs)
    expected_grads, expected = losses_by_the_paper(script, **of_paper)
    assert_close(grads, expected_grads, 1e-4)
    assert losses.keys() == expected.keys() or not delta
    assert_close(losses, {name: expected[name] for name in losses}, 1e-4)
    assert 0.1 < losses["clipfrac"] < 0.9
    assert delta != 1.5 or 0.1 < losses["delta_clipfrac"] < 0.9
    assert largest(grads["guider"]) > 1e-2 and largest(grads["learner"]) > 1e-2
    assert np.any(np.sum(mb.obs.action_mask, axis=-1) == 1)  # here and there one action is legal


@pytest.mark.parametrize("script", MAGPO)
def test_no_network_is_moved_by_the_terms_of_the_other(script):
    """KL(mu || pi) alone moves the learner, the guider not at all; the tether moves the guider and
    not the learner, though it is the learner it is tied to."""
    _, _, params, mb = make_problem(script)
    gradient, free = make_gradient(script), {**COEFS, "delta": INF}
    without_advantage = mb._replace(advantage=jnp.zeros_like(mb.advantage))
    grads, _ = gradient(params, without_advantage, free | NOTHING_BUT_KL)
    assert largest(grads["guider"]) == 0 and largest(grads["learner"]) > 1e-2
    free_grads, _ = gradient(params, mb, free)
    tied_grads, _ = gradient(params, mb, free | {"delta": 1.0001})
    assert_close(tied_grads["learner"], free_grads["learner"], 1e-6)
    assert largest(jax.tree.map(jnp.subtract, tied_grads["guider"], free_grads["guider"])) > 1e-2


# ------------- Collection and evaluation, on an environment that follows a script ----------------
NUM_ENVS, NUM_STEPS = 4, 11


def collector(script, parts):
    """`collect` as a function of the state, compiled."""
    networks = parts[2:] if has_memory(script) else parts[2:3]
    return jax.jit(functools.partial(script.collect, *parts[:2], *networks))


@pytest.fixture(scope="module", params=scripts_with("collect", "guider_act", distinct=True))
def collected(request):
    """Two rollouts, the second going on where the first stopped: [(rollout, state afterwards)]."""
    script, env = request.param, ScriptedEnv(request.param)
    parts = make_parts(script, env, num_envs=NUM_ENVS, num_steps=NUM_STEPS)
    state = first_state(script, parts)
    # lengths 2, 2, 3, 4: two end in the same step
    tag, time = jnp.array([1, 5, 2, 3]), jnp.zeros(NUM_ENVS, jnp.int32)
    env_state = jax.vmap(env.make_state)(tag, time, state.env_state.episode)
    state, results, collect = state._replace(env_state=env_state), [], collector(script, parts)
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
SCALE = jnp.array([0.5, 2.0])  # mean and std of the targets so far


@pytest.fixture(scope="module", params=scripts_with("train_iteration", "collect", distinct=True))
def iteration(request):
    """run(seed) -> script, guider, state before, rollout from it, state after, metrics."""
    script = request.param
    flags = {"update_epochs": 2, "anneal_lr": True, "total_timesteps": 4 * NUM_ENVS * 8}
    parts = make_parts(script, ScriptedEnv(script), num_envs=NUM_ENVS, **flags)
    collect = collector(script, parts)
    iterate = jax.jit(on_one_device(script.train_iteration, *parts))
    init = jax.jit(functools.partial(script.init_state, *parts))

    @functools.cache
    def run(seed, repetition=0, iteration=0):
        before = init(*jax.random.split(jax.random.PRNGKey(seed)))
        noise = random_like(0, before.params, 0.3)  # so that values differ
        params = jax.tree.map(jnp.add, before.params, noise)
        before = before._replace(iteration=jnp.int32(iteration), params=params, value_scale=SCALE)
        return script, parts[2], before, collect(before)[1], *iterate(before)

    return run


def test_metrics_of_an_iteration(iteration):
    """Sums over the episodes that ended, and how much of the targets the values explain, which are
    those of what followed each action, not of the fresh episode after it. Values are in the scale
    of the targets, which the state hands on."""
    script, guider, before, rollout, after, metrics = iteration(0)
    last = np.asarray(rollout.last)
    assert metrics["episodes"] == np.sum(last) > 0 and np.any(last & (rollout.discount == 1))
    for name in ("return", "length", "won"):
        total = np.sum(np.asarray(rollout.after.episode[name])[last])
        np.testing.assert_allclose(metrics[name], total, rtol=1e-6)
    next_value = getattr(rollout, "next_value", None)  # with memory: test_memory.py
    if not has_memory(script):
        view, params = rollout.after.obs.agents_view, before.params["guider"]
        _, next_value = jax.jit(functools.partial(guider.apply, method="encode"))(params, view)
    assert np.std(next_value) > 0.05
    value, next_value = (SCALE[0] + SCALE[1] * x for x in (rollout.value, next_value))
    steps = rollout.reward, value, next_value, rollout.discount, rollout.last
    advantage = advantages(script, *steps, 0.99, 0.95)
    target = advantage + value
    unexplained = np.var(advantage) / np.var(target)
    np.testing.assert_allclose(metrics["losses/explained_variance"], 1 - unexplained, rtol=1e-4)
    np.testing.assert_allclose(metrics["charts/learning_rate"], 1e-3, rtol=1e-6)

    seen = np.array([np.mean(target), np.std(target)])  # the first iteration's alone, later mixed
    np.testing.assert_allclose(after.value_scale, seen, rtol=1e-4)
    *_, third, _ = iteration(0, 0, 2)
    np.testing.assert_allclose(third.value_scale, (2 * SCALE + seen) / 3, rtol=1e-4)


def test_iteration_moves_both_networks(iteration):
    """One iteration moves every parameter but those that nothing depends on, and its first ratio is
    1."""
    _, _, before, _, after, metrics = iteration(0)
    for network in ("guider", "learner"):
        old, new = before.params[network], after.params[network]
        moved = jax.tree.map(lambda x, y: np.any(x != y), old, new)
        assert np.mean(jax.tree.leaves(moved)) > 0.8
    assert abs(metrics["losses/first_ratio"] - 1) < 1e-5
    assert not np.array_equal(after.key, before.key) and after.iteration == 1


def test_learning_rate_falls_by_iteration(iteration):
    """With --anneal-lr the third of four iterations has half the rate, and moves half as far in its
    first step of Adam's; the rate is that of the state's iteration."""
    _, _, before, _, first, _ = iteration(0)
    _, _, _, _, third, metrics = iteration(0, 0, 2)
    np.testing.assert_allclose(metrics["charts/learning_rate"], 0.5e-3, rtol=1e-6)
    steps = [
        largest(jax.tree.map(jnp.subtract, after.params, before.params))
        for after in (first, third)
    ]
    assert 0.3 < steps[1] / steps[0] < 0.7 and third.iteration == 3


def test_same_seed_same_parameters(iteration):
    """One seed gives the same parameters to the bit, twice; another seed gives others."""
    for state in (2, 4):  # before and after
        first, again, other = (iteration(*x)[state].params for x in ((0, 0), (0, 1), (1, 0)))
        jax.tree.map(np.testing.assert_array_equal, first, again)
        pairs = zip(jax.tree.leaves(first), jax.tree.leaves(other))
        assert not any(np.array_equal(x, y) for x, y in pairs if x.ndim > 1)


@pytest.mark.parametrize("script", scripts_with("train_iteration", "collect", distinct=True))
def test_minibatches(script, monkeypatch):
    """Each epoch is a permutation of all samples, or with memory of all sequences, and epochs
    differ. Targets have mean 0 and std 1. A loss is the mean over all minibatches, the first ratio
    that of the first."""
    flags = {"num_steps": 4, "num_minibatches": 2, "update_epochs": 3}
    parts, seen = make_parts(script, ScriptedEnv(script), **flags), []

    def minibatch_loss(params, args, guider, learner, mb):
        tag, time = mb.obs.agents_view[..., 0, 1] * 2**22, mb.obs.agents_view[..., 0, 2]
        jax.debug.callback(lambda *x: seen.append(x), tag, time, mb.target, ordered=False)
        loss = sum(jnp.sum(x) for x in jax.tree.leaves(params))
        return 0.0 * loss, {"ratio": tag.ravel()[0], "tag": jnp.mean(tag)}

    monkeypatch.setattr(script, "minibatch_loss", minibatch_loss)
    iterate = jax.jit(on_one_device(script.train_iteration, *parts))
    _, metrics = iterate(first_state(script, parts))
    jax.effects_barrier()
    assert len(seen) == 6
    mean_tag = np.mean([tag for tag, *_ in seen])
    np.testing.assert_allclose(metrics["losses/tag"], mean_tag, rtol=1e-5)
    assert metrics["losses/first_ratio"] in [tag.ravel()[0] for tag, *_ in seen]
    target = np.concatenate([target.ravel() for *_, target in seen])
    np.testing.assert_allclose([np.mean(target), np.std(target)], [0, 1], atol=1e-5)
    samples = [np.stack([tag.ravel(), time.ravel()], axis=1) for tag, time, _ in seen]
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
    parts = make_parts(script, ScriptedEnv(script), num_steps=4)
    state = jax.eval_shape(lambda: first_state(script, parts))

    def two_iterations(state):
        return script.train_iteration(*parts, script.train_iteration(*parts, state)[0])

    jax.eval_shape(jax.jit(on_one_device(two_iterations)), state)


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
    """Equations of a jaxpr and of all those inside (bodies of loops, conditions, calls)."""
    inside = [core.jaxprs_in_params(equation.params) for equation in jaxpr.eqns]
    return len(jaxpr.eqns) + sum(map(count_equations, itertools.chain(*inside)))


def program_size(script, scenario, **flags):
    """Equations of `train_iteration` on CoordSum."""
    chunks = {"chunk_steps": 2} if has_memory(script) else {}
    parts = make_parts(script, script.make_env("CoordSum-v0", scenario), **chunks, **flags)
    state = jax.eval_shape(lambda: first_state(script, parts))
    iterate = on_one_device(script.train_iteration, *parts)
    return count_equations(jax.make_jaxpr(iterate)(state).jaxpr)


GROWING = scripts_with("train_iteration", "Mixer", distinct=True)


@pytest.mark.parametrize("kind", ["sable", "mat"])
@pytest.mark.parametrize("script", GROWING[:1] + slow(GROWING[1:]))
def test_program_does_not_grow(script, kind):
    """The program of an iteration is as long for 16 steps, 6 agents and 3 epochs as for 4, 2 and
    1."""
    size = program_size(script, "2x4-5", guider=kind, num_steps=4, update_epochs=1)
    assert size > 300
    assert program_size(script, "6x4-5", guider=kind, num_steps=16, update_epochs=3) == size
