"""Tests of the clipped ratio, of evaluation, and of keys.

An iteration, with collection, advantages, losses, gradients and all, is in test_reference.py.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    ScriptedEnv,
    first_state,
    has_memory,
    make_parts,
    on_one_device,
    scripts_with,
    slow,
    tags_and_times,
)
from jax.extend import core

pytestmark = pytest.mark.usefixtures("quick_compile")


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
    for learner in (pi, jnp.full_like(mu, -1e9)):
        np.testing.assert_array_equal(script.double_clip(mu, learner, mu_old, math.inf, 0.2), ppo)
    near_pi = script.double_clip(mu, pi, mu_old, 1 + 1e-9, 0.2)
    np.testing.assert_allclose(near_pi, np.clip(np.exp(pi - mu_old), 0.8, 1.2), rtol=1e-6)


# -------------------- Evaluation, on an environment that follows a script -------------------------
@pytest.mark.parametrize("script", scripts_with("play"))
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


@pytest.mark.parametrize("script", scripts_with("evaluate", "Guider"))
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
        if name == "guider":
            episode |= {"length": [9.0] * 4, "won": [1.0] * 4}
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


# -------------------- Keys ------------------------------------------------------------------------
@pytest.fixture
def checked_keys():
    """Has JAX raise an error where a program uses a key twice; only typed keys are checked."""
    with jax.enable_custom_prng(True), jax.debug_key_reuse(True):
        yield


@pytest.mark.parametrize("script", scripts_with("init_state", "play"))
def test_no_key_is_used_twice(script, checked_keys):
    """The start and an evaluation split each key before they use it again, in all their steps. The
    keys of an iteration are in test_reference.py."""

    def act(obs, *others):
        return jax.random.randint(others[-1], obs.agents_view.shape[:2], 0, 3), *others[1:-1]

    parts = make_parts(script, ScriptedEnv(script))
    jax.eval_shape(lambda: first_state(script, parts))
    hidden = [jnp.zeros(())] if has_memory(script) else []
    play = functools.partial(script.play, parts[1], act, *hidden, 4)
    jax.eval_shape(jax.jit(play), jax.random.PRNGKey(0))


# -------------------- Size ------------------------------------------------------------------------
GROWING = scripts_with("train_iteration", "Guider", "Learner")


@pytest.mark.parametrize("script", GROWING[:1] + slow(GROWING[1:]))
def test_program_does_not_grow(script):
    """An iteration has as many equations for 16 steps, 6 agents and 3 epochs as for 4, 2 and 1."""

    def count(jaxpr):
        inside = [core.jaxprs_in_params(equation.params) for equation in jaxpr.eqns]
        return len(jaxpr.eqns) + sum(map(count, itertools.chain(*inside)))

    def size(scenario, **flags):
        flags |= {"chunk_steps": 2} if has_memory(script) else {}
        env = script.make_env("CoordSum-v0", scenario)
        parts = make_parts(script, env, guider="sable", **flags)
        state = jax.eval_shape(lambda: first_state(script, parts))
        program = on_one_device(script.train_iteration, *parts)
        return count(jax.make_jaxpr(program)(state).jaxpr)

    small = size("2x4-5", num_steps=4, update_epochs=1)
    assert 300 < small == size("6x4-5", num_steps=16, update_epochs=3)
