"""The variants: what each changes in the networks, and that without it they are magpo_ff.py's.

Their iterations are in test_reference.py.
"""

from types import SimpleNamespace

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    ScriptedEnv,
    make_guider,
    random_like,
    random_obs,
    random_params,
)

import magpo_ff
import variants.magpo_ff_adaptive as adaptive
import variants.magpo_ff_residual as residual
import variants.magpo_ff_state as with_state

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_a_tether_has_bounds():
    """It moves by the rate times the difference from the target, and stays between the shortest
    and --delta; that it is used, and how it follows the KL, is in test_reference.py."""
    args = adaptive.Args(delta=4, target_kl=0.02, tether_rate=2)
    for learner_kl, length in ((10, adaptive.SHORTEST), (0.02, 1.2), (0.01, 1.2243), (-10, 4)):
        found = adaptive.tether(args, jnp.log(1.2), learner_kl)
        np.testing.assert_allclose(found, np.log(length), rtol=1e-3)


def test_a_tether_begins_with_its_longest():
    network = SimpleNamespace(init=lambda *_: {"x": jnp.zeros(1)})
    parts = adaptive.Args(delta=3, num_envs=1, num_devices=1), ScriptedEnv(adaptive)
    state = adaptive.init_state(*parts, network, network, *jax.random.split(jax.random.PRNGKey(0)))
    np.testing.assert_allclose(np.exp(state.log_delta), 3, rtol=1e-6)


# -------------------- Exact backtracking ----------------------------------------------------------
def make_problem(guider, learner):
    """Observations and actions of two agents in four games, and parameters of both networks."""
    obs = random_obs(magpo_ff, 0, 4, 2, 3)
    action = jnp.argmax(obs.action_mask, axis=-1)
    if guider.continuous:
        action = random_like(1, obs.action_mask)
    params = {"guider": random_params(guider, 2, obs, action)}
    params["learner"] = random_params(learner, 3, obs)
    return obs, action, params


def make_residual(continuous):
    """A guider with a base, its learner, and the problem above."""
    learner = residual.Learner(8, 3, continuous)
    guider = make_guider(residual, "sable", 8, 1, 1, 3, continuous).clone(base=learner)
    return guider, learner, *make_problem(guider, learner)


@pytest.mark.parametrize("continuous", [False, True])
def test_after_a_reset_the_guider_is_the_learner(continuous):
    """For every action; a reset is due every --reset-every iterations, and keeps the trunk."""
    guider, learner, obs, action, params = make_residual(continuous)
    state = residual.TrainState(params, *[None] * 4, jnp.int32(4))
    kept = residual.backtrack(residual.Args(reset_every=3), state).params
    jax.tree.map(np.testing.assert_array_equal, kept, params)
    reset = residual.backtrack(residual.Args(reset_every=2), state).params
    before, after = params["guider"]["params"], reset["guider"]["params"]
    differs = jax.tree.map(lambda x, y: np.any(x != y), before, after)
    changed = {name for name, found in differs.items() if any(jax.tree.leaves(found))}
    assert changed == {"base", "correction"}
    jax.tree.map(np.testing.assert_array_equal, reset["learner"], params["learner"])

    @jax.jit
    def distance(params):
        """KL(mu || pi), and the gradient that moves the guider."""

        def kl(own):
            guided, _ = guider.apply(own, obs, action)
            return jnp.max(guided.kl_divergence(learner.apply(params["learner"], obs)))

        return jax.value_and_grad(kl)(params["guider"])

    (apart, gradient), (none, _) = distance(kept), distance(reset)
    assert apart > 1e-2 and none < 1e-6
    assert all(np.all(x == 0) for x in jax.tree.leaves(gradient["params"]["base"]))
    assert np.any(gradient["params"]["correction"]["out"]["kernel"] != 0)


def test_a_base_that_does_not_care_leaves_magpo():
    """With a base of equal logits the guider is that of magpo_ff.py."""
    guider, _, obs, action, params = make_residual(False)
    own = params["guider"]["params"]
    own["base"] = jax.tree.map(jnp.zeros_like, own["base"])
    plain = {name: x for name, x in own.items() if name not in ("base", "correction")}
    plain |= {"policy": own["correction"]}
    magpo_guider = make_guider(magpo_ff, "sable", 8, 1, 1, 3)
    found, value = jax.jit(guider.apply)({"params": own}, obs, action)
    expected, expected_value = jax.jit(magpo_guider.apply)({"params": plain}, obs, action)
    np.testing.assert_allclose(found.probs, expected.probs, atol=1e-6)
    np.testing.assert_allclose(value, expected_value, atol=1e-6)


def test_std_of_a_correction():
    """It is the base's times exp(log_std), small or large, and so always above 0."""
    base = distrax.Independent(distrax.Normal(jnp.ones((2, 3)), jnp.full(3, 0.5)), 1)
    out = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
    for log_std in (-9.0, 0.0, 2.0):
        params = {"params": {"out": out, "log_std": jnp.full(3, log_std)}}
        found = residual.Correction(3, True).apply(params, jnp.ones((2, 4)), base)
        np.testing.assert_allclose(found.mode(), np.full((2, 3), 5))
        np.testing.assert_allclose(found.stddev(), np.full((2, 3), 0.5 * np.exp(log_std)), 1e-6)


# -------------------- A guider that knows the state -----------------------------------------------
def test_only_the_guider_reads_the_state():
    """With a state of zeros it is magpo_ff.py's; with another one the learner is the same."""
    guider, learner = make_guider(magpo_ff, "sable", 8, 1, 1, 3), magpo_ff.Learner(8, 3, False)
    plain_obs, action, params = make_problem(guider, learner)
    knowing = make_guider(with_state, "sable", 8, 1, 1, 3)
    obs = with_state.Observation(*plain_obs, jnp.zeros((4, 6)))
    embed = random_params(knowing, 1, obs, action)["params"]["state_embed"]
    own = {"params": params["guider"]["params"] | {"state_embed": embed}}

    def outputs(state):
        seen = obs._replace(global_state=state)
        learnt = with_state.Learner(8, 3, False).apply(params["learner"], seen)
        policy, value = knowing.apply(own, seen, action)
        return learnt.logits, policy.logits, value

    _, *found = jax.jit(outputs)(obs.global_state)
    policy, value = jax.jit(guider.apply)(params["guider"], plain_obs, action)
    for x, y in zip(found, (policy.logits, value)):
        np.testing.assert_allclose(x, y, atol=1e-6)
    learnt, *guided = jax.jit(jax.jacobian(outputs))(random_like(1, obs.global_state))
    assert np.all(learnt == 0)
    for read in guided:  # by each agent of each sample, and from its own game
        of_game = np.abs(read).reshape(4, 2, -1, 4, 6).sum(axis=(1, 2, 4))
        assert np.all((of_game > 1e-6) == np.eye(4, dtype=bool))


def test_the_state_is_that_of_now():
    """After a reset and after a step what the guider reads is of the game as it is then."""
    env = with_state.make_env("CoordSum-v0", "2x3=2")
    state = env.reset(jax.random.PRNGKey(0))
    after, *_ = env.step(state, jnp.array([2, 0]))
    for now in (state, after):
        np.testing.assert_array_equal(now.obs.global_state, env.env.global_state(now.game))
    assert np.any(after.obs.global_state != state.obs.global_state)
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(with_state.unit_length(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize("delta", ["1.01", "inf"])
def test_a_tether_has_to_have_bounds(delta, call):
    """Those that it could not keep are refused; it begins with the longest."""
    status, _, err = call(adaptive, "--delta", delta, "--dry-run")
    assert status == 2 and f"--delta {delta}: must be above 1.02" in err


def test_environment_without_a_global_state(call):
    """It is refused in one line."""
    status, _, err = call(with_state, "--env-id", "examples.my_env:Meet-v0", "--dry-run")
    assert status == 2 and len(err.splitlines()) == 1
    assert "--env-id examples.my_env:Meet-v0: needs a method global_state" in err
