"""Tests of memory: retention's three forms, the GRU, what ends with an episode, and acting against
training."""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_obs, random_params, scripts_with

pytestmark = pytest.mark.usefixtures("quick_compile", "double_precision")
NUM_SEQUENCES, NUM_STEPS, NUM_AGENTS, NUM_ACTIONS, NUM_FEATURES, WIDTH = 3, 12, 3, 4, 5, 8
SCRIPTS = scripts_with("Retention", "Hidden")
for_each_script = pytest.mark.parametrize("script", SCRIPTS)
for_each_kind = pytest.mark.parametrize("kind", ["sable", "mat"])


def random_timesteps(seed, num_steps=NUM_STEPS):
    """Steps since the episode began, (M, T), with episodes that end at random; the first are under
    way for 0 to 4."""
    rng = np.random.default_rng(seed)
    timestep = np.zeros((NUM_SEQUENCES, num_steps))
    timestep[:, 0] = [0, 2, 4]
    for t in range(1, num_steps):
        timestep[:, t] = np.where(rng.random(NUM_SEQUENCES) < 0.25, 0, timestep[:, t - 1] + 1)
    return jnp.asarray(timestep)


def random_like(seed, tree):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), tree)


# -------------------- Retention -------------------------------------------------------------------
@for_each_script
def test_decays(script):
    """decay ** lag to the steps of the chunk, and to the end of the one before; 0 ahead and across
    an episode's start."""
    timestep, decay = random_timesteps(0), np.array([0.5, 0.9])
    within, before = map(np.asarray, script.decays(timestep, jnp.asarray(decay), 4))
    within = within.reshape(NUM_SEQUENCES, 3, 2, 4, 4)
    before = before.reshape(NUM_SEQUENCES, 3, 2, 4)
    starts = np.asarray(timestep) == 0
    for m, k, h, c in np.ndindex(before.shape):
        t = 4 * k + c
        for s in range(4 * k - 1, 4 * k + 4):  # the first is the last step of the chunk before
            found = before[m, k, h, c] if s < 4 * k else within[m, k, h, c, s - 4 * k]
            visible = s <= t and not starts[m, s + 1 : t + 1].any()
            np.testing.assert_allclose(found, decay[h] ** (t - s) if visible else 0.0)
    assert 0 < np.mean(before == 0) < 1


@for_each_script
def test_decays_as_documented(script):
    """The matrix in the docstring: three steps, of which the second begins an episode."""
    within, before = script.decays(jnp.array([[4.0, 0.0, 1.0]]), jnp.array([0.5]), 3)
    np.testing.assert_array_equal(within[0, 0], [[1, 0, 0], [0, 1, 0], [0, 0.5, 1]])
    np.testing.assert_array_equal(before[0, 0], [0.5, 0, 0])


@for_each_script
def test_head_decay(script):
    """From 31 / 32 to 511 / 512, evenly spaced in the logarithm of what is lost; one head has the
    fastest."""
    np.testing.assert_allclose(
        script.head_decay(3, 0.5), 0.5 * (1 - np.array([1 / 32, 1 / 128, 1 / 512])), rtol=1e-6
    )
    np.testing.assert_allclose(script.head_decay(1, 1.0), [31 / 32], rtol=1e-6)


@for_each_script
def test_timestep_encoding(script):
    """Pairs of sine and cosine of the timestep at wavelengths from 2 pi to nearly 10,000 times
    that."""
    encoding = np.asarray(script.timestep_encoding(jnp.array([0.0, 7.0]), 4))
    expected = [[0, 1, 0, 1], [np.sin(7), np.cos(7), np.sin(0.07), np.cos(0.07)]]
    np.testing.assert_allclose(encoding, expected, rtol=1e-6, atol=1e-6)


def retention_by_definition(retention, params, x, source, causal, timestep, decay, hidden):
    """The plain quadratic sum over all pairs of tokens of a sequence, and what the hidden state at
    its start adds."""
    num_agents, (num_sequences, num_steps) = retention.num_agents, timestep.shape
    query, key, value = (np.asarray(y) for y in retention.apply(
        params, x, source, num_steps * num_agents, method="qkv"))
    mixed, starts = np.zeros_like(value), np.asarray(timestep) == 0  # (M, H, T * N, E / H)
    for m in range(num_sequences):
        for i in range(num_steps * num_agents):
            t = i // num_agents
            if not starts[m, : t + 1].any():
                mixed[m, :, i] += (
                    np.einsum("hd,hde->he", query[m, :, i], hidden[m]) * decay[:, None] ** (t + 1)
                )
            for j in range(num_steps * num_agents):
                s = j // num_agents
                seen = (j <= i if causal else s <= t) and not starts[m, s + 1 : t + 1].any()
                scores = (
                    np.sum(query[m, :, i] * key[m, :, j], axis=-1, keepdims=True)
                    * decay[:, None] ** (t - s)
                )
                mixed[m, :, i] += seen * scores * value[m, :, j] if seen else 0.0
    return retention.apply(params, jnp.asarray(mixed), source, method="project")


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
@for_each_script
def test_three_forms_of_retention(script, causal, num_heads):
    """Chunks of any length = step after step (= agent after agent in the decoder) = the definition,
    resets included."""
    retention = script.Retention(NUM_AGENTS, num_heads, WIDTH)
    timestep, decay = random_timesteps(1), script.head_decay(num_heads, 0.8)
    assert np.sum(timestep[:, 1:] == 0) >= 5
    x, source, position = random_like(
        2, [jnp.zeros((NUM_SEQUENCES * NUM_STEPS * NUM_AGENTS, WIDTH))] * 3
    )
    hidden = random_like(3, jnp.zeros((NUM_SEQUENCES, num_heads) + 2 * (WIDTH // num_heads,)))

    def past(timestep, position, chunk_steps):
        return script.Past(position, *script.decays(timestep, decay, chunk_steps))

    params = random_params(retention, 4, x, source, causal, past(timestep, position, 4), hidden)
    expected = retention_by_definition(
        retention, params, x + position, source + position, causal, timestep, np.asarray(decay),
        np.asarray(hidden),
    )
    assert np.std(expected) > 0.1
    ends = []
    for chunk_steps in (1, 3, 4, 12):
        mixed, end = jax.jit(retention.apply, static_argnums=3)(
            params, x, source, causal, past(timestep, position, chunk_steps), hidden)
        np.testing.assert_allclose(mixed, expected, rtol=1e-8, atol=1e-8)
        ends.append(end)

    decode = jax.jit(functools.partial(retention.apply, params, method="decode"))
    whole_step = jax.jit(functools.partial(retention.apply, params), static_argnums=2)

    def by_step(y):
        return y.reshape(NUM_SEQUENCES, NUM_STEPS, NUM_AGENTS, WIDTH).swapaxes(0, 1)  # (T, M, N, E)

    state, steps = hidden, []
    for t, (one_x, one_source, one_position) in enumerate(
        zip(*map(by_step, (x, source, position)))
    ):
        if causal:
            state = state * ((timestep[:, t] > 0)[:, None] * decay)[..., None, None]
            for agent in range(NUM_AGENTS):
                mixed, state = decode(
                    one_x[:, agent], one_source[:, agent], state, agent, one_position[:, agent]
                )
                steps.append(mixed)
        else:
            flat = [y.reshape(-1, WIDTH) for y in (one_x, one_source, one_position)]
            mixed, state = whole_step(
                *flat[:2], False, past(timestep[:, t : t + 1], flat[2], 1), state
            )
            steps.append(mixed.reshape(NUM_SEQUENCES, NUM_AGENTS, WIDTH).swapaxes(0, 1))
    recurrent = (
        jnp.stack(steps).reshape(NUM_STEPS, NUM_AGENTS, NUM_SEQUENCES, WIDTH).transpose(2, 0, 1, 3)
    )
    np.testing.assert_allclose(recurrent.reshape(-1, WIDTH), expected, rtol=1e-8, atol=1e-8)
    for end in ends:
        np.testing.assert_allclose(end, state, rtol=1e-8, atol=1e-8)


# -------------------- Guider and learner over a sequence ------------------------------------------
@functools.cache
def make_problem(script, kind, chunk_steps=4):
    """Guider and learner with random parameters, observations (M, T, ...), actions, timesteps and
    hidden states."""
    guider = script.Guider(kind, NUM_AGENTS, NUM_ACTIONS, 2, 2, WIDTH, 0.8, chunk_steps)
    learner = script.Learner(NUM_ACTIONS, WIDTH)
    obs = random_obs(script, 0, NUM_SEQUENCES * NUM_STEPS, NUM_AGENTS, NUM_ACTIONS, NUM_FEATURES)
    obs = jax.tree.map(lambda x: x.reshape(NUM_SEQUENCES, NUM_STEPS, *x.shape[1:]), obs)
    action = jnp.asarray(
        np.random.default_rng(1).integers(NUM_ACTIONS, size=(NUM_SEQUENCES, NUM_STEPS, NUM_AGENTS))
    )
    guider_hidden = guider.apply({}, NUM_SEQUENCES, method="init_hidden")
    hidden = random_like(
        2, script.Hidden(guider_hidden, jnp.zeros((NUM_SEQUENCES, NUM_AGENTS, WIDTH)))
    )
    timestep = random_timesteps(3)
    params = script.Pair(random_params(guider, 4, obs.agents_view, action, timestep, hidden.guider),
                           random_params(learner, 5, obs.agents_view, timestep, hidden.learner))
    return guider, learner, params, obs, action, timestep, hidden


@functools.cache
def compiled(script, kind):
    """f(view, action, timestep, hidden) -> the guider's logits and values, the learner's logits,
    all (M, T, N, ...)."""
    guider, learner, params, *_ = make_problem(script, kind)

    @jax.jit
    def everything(view, action, timestep, hidden):
        return (*guider.apply(params.guider, view, action, timestep, hidden.guider),
                learner.apply(params.learner, view, timestep, hidden.learner)[0])

    return everything


@pytest.mark.parametrize("kind, chunk_steps", [("sable", 4), ("sable", 12), ("mat", 4)])
@for_each_script
def test_acting_equals_training(script, kind, chunk_steps):
    """Log-probs, values and learner's logits of acting step after step are those of one pass over
    the whole rollout."""
    guider, learner, params, obs, _, timestep, hidden = make_problem(script, kind, chunk_steps)

    @jax.jit
    def act_along():
        def step(hidden, inputs):
            obs, timestep, key = inputs
            action, log_prob, value, guider_hidden = script.guider_act(
                guider, params.guider, obs, timestep, hidden.guider, key)
            logits, learner_hidden = learner.apply(
                params.learner, obs.agents_view[:, None], timestep[:, None], hidden.learner)
            return script.Hidden(guider_hidden, learner_hidden), (
                action, log_prob, value, logits[:, 0],
            )

        inputs = jax.tree.map(lambda x: x.swapaxes(0, 1), (obs, timestep))
        end, results = jax.lax.scan(
            step, hidden, (*inputs, jax.random.split(jax.random.PRNGKey(0), NUM_STEPS))
        )
        return end, [x.swapaxes(0, 1) for x in results]

    end, (action, log_prob, value, learner_logits) = act_along()
    logits, expected_value = jax.jit(guider.apply)(
        params.guider, obs.agents_view, action, timestep, hidden.guider
    )
    expected = script.action_distribution(logits, obs.action_mask).log_prob(action)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(value, expected_value, rtol=1e-8, atol=1e-8)
    expected, learner_end = jax.jit(learner.apply)(
        params.learner, obs.agents_view, timestep, hidden.learner
    )
    np.testing.assert_allclose(learner_logits, expected, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(end.learner, learner_end, rtol=1e-8, atol=1e-8)
    assert np.ptp(log_prob) > 0.1 and np.ptp(value) > 0.1 and np.ptp(learner_logits) > 0.1


@for_each_kind
@for_each_script
def test_nothing_crosses_the_start_of_an_episode(script, kind):
    """Other observations, actions and hidden states before a start change nothing after it, to the
    bit; sable and the GRU see them where there is no start, and mat never does."""
    *_, obs, action, _, hidden = make_problem(script, kind)
    view, everything, steps = (
        obs.agents_view, compiled(script, kind), np.arange(NUM_STEPS, dtype=float),
    )
    other_view, other_action = (
        view.at[:, :5].multiply(-1.0),
        action.at[:, :5].set((action[:, :5] + 1) % NUM_ACTIONS),
    )
    other_hidden = jax.tree.map(lambda x: -2 * x, hidden)
    for start in (True, False):
        timestep = np.tile(steps + 1, (NUM_SEQUENCES, 1))
        timestep[:, 5:] -= 6 * start
        before = everything(view, action, jnp.asarray(timestep), hidden)
        after = everything(other_view, other_action, jnp.asarray(timestep), other_hidden)
        same = [np.array_equal(x[:, 5:], y[:, 5:]) for x, y in zip(before, after)]
        assert same == ([True] * 3 if start else [kind == "mat", kind == "mat", False])
        assert not any(np.array_equal(x[:, :5], y[:, :5]) for x, y in zip(before, after))


@for_each_kind
@for_each_script
def test_causality_in_time_and_agents(script, kind):
    """An action changes the logits of later agents of its step, and of all agents later; an
    observation those of its step, too. Nothing earlier changes, to the bit."""
    *_, obs, action, _, hidden = make_problem(script, kind)
    everything, view = compiled(script, kind), obs.agents_view
    timestep = jnp.tile(jnp.arange(NUM_STEPS, dtype=float), (NUM_SEQUENCES, 1))
    before = everything(view, action, timestep, hidden)

    def changed(view, action):
        after = everything(view, action, timestep, hidden)
        logits, value, learner_logits = (np.asarray(x != y) for x, y in zip(before, after))
        # each (T, N)
        return logits.any(axis=(0, 3)), value.any(axis=0), learner_logits.any(axis=(0, 3))

    sable = kind == "sable"
    for t, agent in ((0, 0), (5, 1), (11, 2)):
        other_action = action.at[:, t, agent].set((action[:, t, agent] + 1) % NUM_ACTIONS)
        logits, value, learner_logits = changed(view, other_action)
        assert (
            not logits[:t].any()
            and not logits[t, : agent + 1].any()
            and logits[t, agent + 1 :].all()
        )
        assert np.all(logits[t + 1 :] == sable)
        assert not value.any() and not learner_logits.any()
        logits, value, learner_logits = changed(view.at[:, t, agent].multiply(-1.0), action)
        for x in (logits, value):
            assert not x[:t].any() and x[t].all() and np.all(x[t + 1 :] == sable)
        assert not learner_logits[:t].any() and learner_logits[t:, agent].all()
        assert not np.delete(learner_logits, agent, axis=1).any()


@for_each_script
def test_learner_is_decentralized_over_time(script):
    """The Jacobian of agent i's logits is 0 for what agent j saw, and for what i saw later or in an
    earlier episode."""
    _, learner, params, obs, _, timestep, hidden = make_problem(script, "mat")
    timestep = timestep[1]

    def logits(view):
        return learner.apply(params.learner, view[None], timestep[None], hidden.learner[1:2])[0][0]

    jacobian = np.asarray(jax.jit(jax.jacrev(logits))(obs.agents_view[1]))  # (T, N, A, T, N, O)
    depends = np.any(jacobian != 0, axis=(2, 5))  # (T, N, T, N)
    for t, i, s, j in np.ndindex(depends.shape):
        assert depends[t, i, s, j] == (i == j and s <= t and timestep[t] >= t - s)


@for_each_script
def test_learner_by_hand(script):
    """An MLP, flax's GRU cell with a state that is 0 at the start of an episode, an MLP, in a plain
    loop."""
    _, learner, params, obs, _, timestep, hidden = make_problem(script, "mat")
    logits, end = learner.apply(params.learner, obs.agents_view, timestep, hidden.learner)
    layers, cell = params.learner["params"], nn.GRUCell(WIDTH)

    def dense(name, x):
        return x @ layers[name]["kernel"] + layers[name]["bias"]

    state, gru = hidden.learner.reshape(-1, WIDTH), {"params": layers["GRUCell_0"]}
    for t in range(NUM_STEPS):
        state = jnp.where(jnp.repeat(timestep[:, t] == 0, NUM_AGENTS)[:, None], 0.0, state)
        x = jnp.maximum(dense("Dense_0", obs.agents_view[:, t].reshape(-1, NUM_FEATURES)), 0.0)
        state, _ = cell.apply(gru, state, x)
        expected = dense("Dense_2", jnp.maximum(dense("Dense_1", state), 0.0))
        np.testing.assert_allclose(
            logits[:, t].reshape(-1, NUM_ACTIONS), expected, rtol=1e-8, atol=1e-8
        )
    np.testing.assert_allclose(end.reshape(-1, WIDTH), state, rtol=1e-8, atol=1e-8)


@for_each_script
def test_no_memory_without_decay(script):
    """--decay-scaling-factor 0 leaves sable the agents of one step: each step of a sequence is as
    if it were alone."""
    _, _, params, obs, action, timestep, hidden = make_problem(script, "sable")
    guider = script.Guider("sable", NUM_AGENTS, NUM_ACTIONS, 2, 2, WIDTH, 0.0, 4)
    apply = jax.jit(functools.partial(guider.apply, params.guider))
    logits, value = apply(obs.agents_view, action, timestep, hidden.guider)
    for t in range(NUM_STEPS):
        inputs = (x[:, t : t + 1] for x in (obs.agents_view, action, timestep))
        alone, alone_value = apply(*inputs, hidden.guider)
        np.testing.assert_allclose(logits[:, t : t + 1], alone, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(value[:, t : t + 1], alone_value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "num_steps, num_agents, chunk_steps",
    [
        (128, 2, 16), (128, 3, 8), (128, 4, 8), (128, 32, 1), (128, 64, 1), (100, 3, 10), (7, 3, 7),
        (4, 2, 4),
    ],
)
@for_each_script
def test_default_chunks(script, num_steps, num_agents, chunk_steps):
    """By default a chunk holds at most 32 tokens, and at least one step, and divides the
    rollout."""
    env = types.SimpleNamespace(num_agents=num_agents, num_actions=3, continuous=False)
    assert script.make_networks(script.Args(num_steps=num_steps), env)[0].chunk_steps == chunk_steps
    args = script.Args(num_steps=num_steps, chunk_steps=num_steps)
    assert script.make_networks(args, env)[0].chunk_steps == num_steps


# -------------------- Rollouts --------------------------------------------------------------------
class CountingEnv:
    """Agents see the environment's number and the time; episodes take 3 + number % 3 steps, odd
    ones are truncated."""

    num_agents, num_actions, has_win_rate = 2, 3, False
    continuous, no_action = False, np.zeros(2, np.int32)

    def __init__(self, script):
        self.script = script

    def observe(self, state):
        view = jnp.stack(
            [jnp.arange(2.0), jnp.full(2, state["number"]) / 8, jnp.full(2, state["time"]) / 2],
            axis=-1,
        )
        return self.script.Observation(view, jnp.ones((2, 3), bool))

    def reset(self, key):
        state = {"number": jax.random.randint(key, (), 0, 16).astype(float), "time": jnp.zeros(())}
        return state, self.observe(state)

    def step(self, state, action):
        state = {"number": state["number"], "time": state["time"] + 1}
        last = state["time"] == 3 + state["number"] % 3
        discount = jnp.where(last & (state["number"] % 2 == 0), 0.0, 1.0)
        return state, self.script.Outcome(
            self.observe(state), action.astype(float), discount, last, jnp.zeros((), bool))


@pytest.fixture(scope="module", params=SCRIPTS)
def rollouts(request):
    """Script, networks, parameters, and two rollouts, one after the other: [(state before, rollout,
    state after)]."""
    script = request.param
    env = CountingEnv(script)
    args = script.Args(
        num_envs=4, num_steps=8, num_devices=1, embed_dim=8, learner_hidden_dim=8, chunk_steps=4
    )
    guider, learner = script.make_networks(args, env)
    optimizers = script.make_optimizers(args)
    init = jax.jit(functools.partial(script.init_state, args, env, guider, learner, optimizers))
    state = init(*jax.random.split(jax.random.PRNGKey(0)))
    state = state._replace(
        params=jax.tree.map(
            lambda x: jnp.asarray(x + np.random.default_rng(1).normal(0, 0.3, x.shape), float),
            state.params,
        )
    )
    collect, found = jax.jit(functools.partial(script.collect, args, env, guider, learner)), []
    for _ in range(2):
        after, rollout, _ = collect(state)
        found.append((state, rollout, after))
        state = after
    return script, guider, learner, state.params, found


def test_every_first_ratio_is_one_over_whole_rollouts(rollouts):
    """The log-probs of acting are those of training from the state at the start of the rollout,
    across resets."""
    script, guider, _, params, found = rollouts
    apply = jax.jit(functools.partial(guider.apply, params.guider))
    for before, rollout, _ in found:
        obs, action, timestep = jax.tree.map(
            lambda x: x.swapaxes(0, 1), (rollout.obs, rollout.action, rollout.timestep))
        logits, value = apply(obs.agents_view, action, timestep, before.hidden.guider)
        log_prob = script.action_distribution(logits, obs.action_mask).log_prob(action)
        np.testing.assert_allclose(
            np.exp(log_prob.swapaxes(0, 1) - rollout.behaviour_log_prob), 1.0, rtol=0, atol=1e-8
        )
        np.testing.assert_allclose(value.swapaxes(0, 1), rollout.value, rtol=1e-8, atol=1e-8)
        assert np.sum(rollout.last) >= 4 and np.ptp(rollout.behaviour_log_prob) > 0.1
        np.testing.assert_array_equal(
            rollout.timestep[1:], np.where(rollout.last[:-1], 0, rollout.timestep[:-1] + 1)
        )
    assert np.any(found[1][1].timestep[0] > 0) and np.any(found[0][1].timestep[0] == 0)


def test_learner_goes_along(rollouts):
    """The learner's state after a rollout is that of one pass over all that its agents saw."""
    _, _, learner, params, found = rollouts
    for before, rollout, after in found:
        view, timestep = rollout.obs.agents_view.swapaxes(0, 1), rollout.timestep.T
        _, hidden = learner.apply(params.learner, view, timestep, before.hidden.learner)
        np.testing.assert_allclose(after.hidden.learner, hidden, rtol=1e-8, atol=1e-8)
        assert np.ptp(hidden) > 0.1


def test_next_value_is_that_of_the_true_last_observation(rollouts):
    """The next value is the next step's, and where an episode was cut off that of what followed,
    with its memory."""
    _, guider, _, params, found = rollouts
    (before, rollout, _), (_, next_rollout, _) = found
    value, kinds = jnp.concatenate([rollout.value, next_rollout.value]), set()
    encode = jax.jit(
        functools.partial(guider.clone(chunk_steps=1).apply, params.guider, method="encode")
    )
    steps = jnp.arange(6.0)[None]
    for t, b in np.ndindex(*rollout.last.shape):
        if not rollout.last[t, b]:
            np.testing.assert_allclose(
                rollout.next_value[t, b], value[t + 1, b], rtol=1e-8, atol=1e-8
            )
            kinds |= {"end of the rollout"} if t == rollout.last.shape[0] - 1 else {"within"}
            continue
        if rollout.discount[t, b] == 0:
            continue  # nothing reads it
        length = int(rollout.timestep[t, b]) + 1
        view = rollout.obs.agents_view[t + 1 - length : t + 1, b]  # the episode, from its start
        final = view[-1].at[:, 2].add(0.5)  # one step on
        # then nothing
        view = jnp.concatenate([view, final[None], jnp.zeros((5 - length, *final.shape))])[None]
        hidden = jax.tree.map(lambda x: x[b : b + 1], before.hidden.guider["encoder"])
        _, expected, _ = encode(view, steps, hidden)
        np.testing.assert_allclose(
            rollout.next_value[t, b], expected[0, length], rtol=1e-8, atol=1e-8
        )
        kinds |= {"truncated"}
    assert kinds == {"within", "end of the rollout", "truncated"}


@for_each_script
def test_minibatches_keep_sequences_whole(script):
    """Each epoch is a permutation of the environments; a sequence keeps its steps in order, and its
    hidden state."""
    args = script.Args(num_minibatches=2, update_epochs=3)
    number = jnp.arange(20).reshape(5, 4)  # (T, B), 4 t + b
    fields = {name: number for name in script.Transition._fields} | {
        "obs": script.Observation(number, number)
    }
    hidden = script.Hidden(jnp.arange(4), jnp.arange(4))
    samples, indices = script.make_minibatches(
        args, script.Transition(**fields), number, number, hidden, jax.random.PRNGKey(0))
    for name, field in samples._asdict().items():
        expected = np.arange(4) if name == "hidden" else np.arange(20).reshape(5, 4).T
        assert all(np.array_equal(x, expected) for x in jax.tree.leaves(field))
    assert indices.shape == (6, 2)
    epochs = np.asarray(indices).reshape(3, 4)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(4), (3, 1)))
    assert len({tuple(order) for order in epochs}) > 1


@for_each_script
def test_evaluation_begins_without_memory(script):
    """Both networks play from hidden states of their own, with timesteps 0, 1, 2, ..., and remember
    what they saw."""
    env, seen = CountingEnv(script), []

    def act(obs, timestep, hidden, key):
        jax.debug.callback(
            lambda *x: seen.append(x), timestep, hidden, obs.agents_view[:, 0, 2] * 2
        )
        return jnp.zeros((5, 2), jnp.int32), hidden + 10

    script.play(env, act, jnp.zeros(5), 5, jax.random.PRNGKey(0))
    jax.effects_barrier()
    for n, (timestep, hidden, time) in enumerate(sorted(seen, key=lambda x: x[0][0])):
        assert np.all(timestep == n) and np.all(hidden == 10 * n) and np.all(time == n)
    assert 3 <= len(seen) <= 5
