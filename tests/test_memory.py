"""Tests of memory: retention's three forms, the GRU, and what ends with an episode.

That acting is deciding one by one, and as in training, is in test_reference.py.
"""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    ScriptedEnv,
    random_like,
    random_obs,
    random_params,
    scripts_with,
    tags_and_times,
)

pytestmark = pytest.mark.usefixtures("quick_compile", "double_precision")
NUM_SEQUENCES, NUM_STEPS, NUM_AGENTS, NUM_ACTIONS, NUM_FEATURES, WIDTH = 3, 12, 3, 4, 5, 8
SCRIPTS = scripts_with("Mixer", "decays")
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


# -------------------- Retention -------------------------------------------------------------------
@for_each_script
def test_timestep_encoding(script):
    """Pairs of sine and cosine of the timestep at wavelengths from 2 pi to nearly 10,000 times
    that."""
    encoding = np.asarray(script.timestep_encoding(jnp.array([0.0, 7.0]), 4))
    expected = [[0, 1, 0, 1], [np.sin(7), np.cos(7), np.sin(0.07), np.cos(0.07)]]
    np.testing.assert_allclose(encoding, expected, rtol=1e-6, atol=1e-6)


def retention_by_definition(params, x, source, causal, timestep, decay, memory, encoding):
    """The plain quadratic sum over all pairs of tokens of a sequence, and what the memory at its
    start adds -> tokens (M, T, N, E)."""
    layers, num_heads, shape = params["params"], len(decay), x.shape

    def heads(name, y):  # (M, H, T * N, E / H)
        y = (y + encoding) @ layers[name]["kernel"]
        return y.reshape(shape[0], -1, num_heads, WIDTH // num_heads).swapaxes(1, 2)

    query = heads("query", x) / np.sqrt(WIDTH // num_heads)
    key, value = heads("key", source), heads("value", source)
    token = np.arange(NUM_STEPS * NUM_AGENTS)
    step, episode = token // NUM_AGENTS, np.cumsum(np.asarray(timestep) == 0, axis=1)
    lag, episode = step[:, None] - step, np.repeat(episode, NUM_AGENTS, axis=1)
    seen = (token[:, None] >= token) if causal else (lag >= 0)
    seen = (seen & (episode[:, :, None] == episode[:, None]))[:, None]
    decay = decay[:, None, None]
    mixed = (query @ key.swapaxes(2, 3) * seen * decay ** np.maximum(lag, 0)) @ value
    old = query @ memory * decay ** (step[:, None] + 1)  # 0 once an episode has begun
    mixed = (mixed + old * (episode == 0)[:, None, :, None]).swapaxes(1, 2)
    mean, variance = mixed.mean(-1, keepdims=True), mixed.var(-1, keepdims=True)
    normed = ((mixed - mean) / np.sqrt(variance + 1e-6)).reshape(shape)
    gate = (source + encoding) @ layers["gate"]["kernel"]
    normed = normed * layers["head_norm"]["scale"] + layers["head_norm"]["bias"]
    summed = x + normed * nn.swish(gate) @ layers["out"]["kernel"]
    rms = np.sqrt(np.mean(summed**2, axis=-1, keepdims=True) + 1e-6)
    return summed / rms * layers["norm"]["scale"]


@pytest.mark.parametrize("num_heads, scaling, causal", [
    (1, 0.8, True), (2, 0.8, True), (2, 0.8, False), (2, 0.0, False)])  # causal: in the decoder
@for_each_script
def test_three_forms_of_retention(script, num_heads, scaling, causal):
    """Chunks of any length = step after step = the definition, resets included; without decay
    (--decay-scaling-factor 0) each step is alone."""
    timestep = random_timesteps(1)
    tokens = jnp.zeros((NUM_SEQUENCES, NUM_STEPS, NUM_AGENTS, WIDTH))
    x, source = random_like(2, [tokens, tokens])
    head_width = WIDTH // num_heads
    memory = random_like(3, jnp.zeros((NUM_SEQUENCES, num_heads, head_width, head_width)))

    def mixer(chunk_steps):
        network = script.Mixer("sable", num_heads, scaling, chunk_steps)
        return network, jax.jit(network.apply, static_argnums=5)

    params = random_params(mixer(4)[0], 4, x, source, timestep, memory, causal)
    decay = scaling * (1 - np.array([1 / 32, 1 / 512]))[:num_heads]
    encoding = script.timestep_encoding(timestep, WIDTH)[:, :, None]
    expected = retention_by_definition(
        params, x, source, causal, timestep, decay, memory, encoding)
    assert np.std(expected) > 0.1
    one_step, state = mixer(4)[1], memory
    for t in range(NUM_STEPS):
        step = (y[:, t : t + 1] for y in (x, source, timestep))
        mixed, state = one_step(params, *step, state, causal)
        np.testing.assert_allclose(mixed[:, 0], expected[:, t], rtol=1e-6, atol=1e-6)
    for chunk_steps in (1, 3, 12):
        mixed, end = mixer(chunk_steps)[1](params, x, source, timestep, memory, causal)
        np.testing.assert_allclose(mixed, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(end, state, rtol=1e-8, atol=1e-8)


# -------------------- Guider and learner over a sequence ------------------------------------------
@functools.cache
def make_problem(script, kind):
    """Guider and learner with random parameters, observations (M, T, ...), actions, timesteps and
    hidden states."""
    guider = script.Guider(kind, WIDTH, 2, 2, 0.8, 4, NUM_ACTIONS, False, reads_learner=True)
    learner = script.Learner(WIDTH, NUM_ACTIONS, False)
    shape = (NUM_SEQUENCES, NUM_STEPS)
    obs = random_obs(script, 0, shape, NUM_AGENTS, NUM_ACTIONS, NUM_FEATURES)
    action = np.random.default_rng(1).integers(NUM_ACTIONS, size=(*shape, NUM_AGENTS))
    args = script.Args(embed_dim=WIDTH, num_heads=2, num_blocks=2, learner_hidden_dim=WIDTH)
    env = types.SimpleNamespace(num_agents=NUM_AGENTS)
    hidden = random_like(2, script.init_hidden(args, env, NUM_SEQUENCES))
    timestep, action = random_timesteps(3), jnp.asarray(action, jnp.int32)
    params = {"guider": random_params(guider, 4, obs, action, timestep, hidden["guider"])}
    params["learner"] = random_params(learner, 5, obs, timestep, hidden["learner"])
    return guider, learner, params, obs, action, timestep, hidden


@functools.cache
def compiled(script, kind):
    """f(view, action, timestep, hidden) -> the guider's logits and values, the learner's logits,
    all (M, T, N, ...); nothing is masked."""
    guider, learner, params, obs, *_ = make_problem(script, kind)
    everything_legal = jnp.ones_like(obs.action_mask)

    @jax.jit
    def everything(view, action, timestep, hidden):
        seen = obs._replace(agents_view=view, action_mask=everything_legal)
        policy, value = guider.apply(params["guider"], seen, action, timestep, hidden["guider"])
        learner_policy, _ = learner.apply(params["learner"], seen, timestep, hidden["learner"])
        return policy.logits, value, learner_policy.logits

    return everything


@for_each_kind
@for_each_script
def test_nothing_crosses_the_start_of_an_episode(script, kind):
    """Other observations, actions and hidden states before a start change nothing after it, to the
    bit; sable and the GRU see them where there is no start, and mat never does."""
    *_, obs, action, _, hidden = make_problem(script, kind)
    view, everything = obs.agents_view, compiled(script, kind)
    other_view = view.at[:, :5].multiply(-1.0)
    other_action = action.at[:, :5].set((action[:, :5] + 1) % NUM_ACTIONS)
    other_hidden = jax.tree.map(lambda x: -2 * x, hidden)
    for start in (True, False):
        timestep = np.tile(np.arange(NUM_STEPS, dtype=float) + 1, (NUM_SEQUENCES, 1))
        timestep[:, 5:] -= 6 * start
        before = everything(view, action, jnp.asarray(timestep), hidden)
        after = everything(other_view, other_action, jnp.asarray(timestep), other_hidden)
        same = [np.array_equal(x[:, 5:], y[:, 5:]) for x, y in zip(before, after)]
        assert same == ([True] * 3 if start else [kind == "mat", kind == "mat", False])
        assert not any(np.array_equal(x[:, :5], y[:, :5]) for x, y in zip(before, after))


@for_each_kind
@for_each_script
def test_causality_in_time_and_agents(script, kind):
    """An action changes the policies of later agents of its step, and of all agents later; an
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
    later = everything(view, action, timestep + 1, hidden)  # mat is told no timestep
    assert np.array_equal(later[0], before[0]) == np.array_equal(later[1], before[1]) != sable
    for t, agent in ((0, 0), (5, 1), (11, 2)):
        other_action = action.at[:, t, agent].set((action[:, t, agent] + 1) % NUM_ACTIONS)
        logits, value, learner_logits = changed(view, other_action)
        assert not logits[:t].any() and not logits[t, : agent + 1].any()
        assert logits[t, agent + 1 :].all() and np.all(logits[t + 1 :] == sable)
        assert not value.any() and not learner_logits.any()
        logits, value, learner_logits = changed(view.at[:, t, agent].multiply(-1.0), action)
        for x in (logits, value):
            assert not x[:t].any() and x[t].all() and np.all(x[t + 1 :] == sable)
        assert not learner_logits[:t].any() and learner_logits[t:, agent].all()
        assert not np.delete(learner_logits, agent, axis=1).any()


@for_each_script
def test_guider_reads_what_its_learner_remembers(script):
    """Policies and values depend on it (D20), those of a guider without D20 do not."""
    guider, _, params, obs, action, timestep, hidden = make_problem(script, "mat")
    other = obs._replace(remembered=-obs.remembered)
    for network in (guider, guider.clone(reads_learner=False)):
        inputs = (action, timestep, hidden["guider"])
        policy, value = network.apply(params["guider"], obs, *inputs)
        changed, other_value = network.apply(params["guider"], other, *inputs)
        assert np.any(policy.logits != changed.logits) == network.reads_learner
        assert np.any(value != other_value) == network.reads_learner


@for_each_script
def test_learner_by_hand(script):
    """An MLP, flax's GRU cell with a state that is 0 at the start of an episode, an MLP, in a plain
    loop."""
    _, learner, params, obs, _, timestep, hidden = make_problem(script, "mat")
    obs = obs._replace(action_mask=jnp.ones_like(obs.action_mask))
    policy, end = learner.apply(params["learner"], obs, timestep, hidden["learner"])
    layers, cell = params["learner"]["params"], nn.GRUCell(WIDTH)

    def dense(weights, x):
        return x @ weights["kernel"] + weights["bias"]

    state, gru = hidden["learner"], {"params": layers["GRUCell_0"]}
    for t in range(NUM_STEPS):
        state = jnp.where((timestep[:, t] == 0)[:, None, None], 0.0, state)
        x = jnp.maximum(dense(layers["Dense_0"], obs.agents_view[:, t]), 0.0)
        state, _ = cell.apply(gru, state, x)
        features = jnp.maximum(dense(layers["Dense_1"], state), 0.0)
        expected = dense(layers["Policy_0"]["out"], features)
        expected -= jax.scipy.special.logsumexp(expected, axis=-1, keepdims=True)
        np.testing.assert_allclose(
            jax.nn.log_softmax(policy.logits[:, t]), expected, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(end, state, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "num_steps, num_agents, chunk_steps",
    [(128, 2, 16), (128, 3, 8), (128, 32, 1), (128, 64, 1), (100, 3, 10), (7, 3, 7), (4, 2, 4)],
)
@for_each_script
def test_default_chunks(script, num_steps, num_agents, chunk_steps):
    """By default a chunk holds at most 32 tokens, and at least one step, and divides the rollout;
    a flag sets the most that a chunk may have."""
    env = types.SimpleNamespace(num_agents=num_agents, num_actions=3, continuous=False)
    guider, _ = script.make_networks(script.Args(num_steps=num_steps), env)
    assert guider.chunk_steps == chunk_steps
    args = script.Args(num_steps=num_steps, chunk_steps=num_steps)
    assert script.make_networks(args, env)[0].chunk_steps == num_steps


# -------------------- Evaluation ------------------------------------------------------------------
@for_each_script
def test_evaluation_begins_without_memory(script):
    """A network plays from a hidden state of its own, with timesteps 0, 1, 2, ..., and remembers
    what it saw."""
    env, seen = ScriptedEnv(script), []

    def act(obs, timestep, hidden, key):
        jax.debug.callback(lambda *x: seen.append(x), timestep, hidden, obs)
        return jnp.zeros((5, 2), jnp.int32), "whatever", hidden + 10

    script.play(env, act, jnp.zeros(5), 5, jax.random.PRNGKey(0))
    jax.effects_barrier()
    for n, (timestep, hidden, obs) in enumerate(sorted(seen, key=lambda x: x[1][0])):
        tag, time = tags_and_times(obs)
        running = time <= tag % 4  # an ended game goes on in time, but its length stays
        assert np.all(timestep[running] == n) and np.all(hidden == 10 * n) and running.any()
    assert len(seen) == 1 + np.max(tag % 4) > 2
