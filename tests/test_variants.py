"""The variants: what each changes, and that without it, it is magpo_ff.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ScriptedEnv, first_state, make_parts, on_one_device

import magpo_ff
import variants.magpo_ff_adaptive as adaptive

pytestmark = pytest.mark.usefixtures("quick_compile")


def iterate(script, start=(), **flags):
    """One iteration from a start at which guider and learner differ -> state, metrics."""
    parts = make_parts(script, ScriptedEnv(script), **flags)
    state = first_state(script, parts)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape), state.params)
    state = state._replace(params=jax.tree.map(jnp.float32, params), **dict(start))
    return jax.jit(on_one_device(script.train_iteration, *parts))(state)


def test_an_adaptive_tether_that_may_cost_anything_is_a_fixed_one():
    """It then stays at --delta, and the parameters are those of magpo_ff.py."""
    fixed, _ = iterate(magpo_ff, delta=1.3)
    state, metrics = iterate(adaptive, delta=1.3, max_cost=1e3)
    np.testing.assert_allclose(metrics["charts/delta"], 1.3, rtol=1e-6)
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(fixed.params)):
        np.testing.assert_allclose(x, y, atol=1e-4)


@pytest.mark.slow
def test_an_adaptive_tether_shortens_where_deciding_apart_costs():
    """From where it was, by the rate times the difference, within its bounds; else it lengthens."""
    start = {"log_delta": jnp.log(1.2)}
    state, metrics = iterate(adaptive, start, delta=1.5, max_cost=1e-6, tether_rate=0.1)
    cost = float(metrics["charts/cost"])
    assert 0.01 < abs(cost) < 1
    np.testing.assert_allclose(state.log_delta, np.log(1.2) + 0.1 * (1e-6 - cost), atol=1e-5)
    state, _ = iterate(adaptive, start, delta=1.5, max_cost=1e-6, tether_rate=1e6)
    bound = adaptive.SHORTEST if cost > 0 else 1.5
    np.testing.assert_allclose(state.log_delta, np.log(bound), rtol=1e-5)


def test_cost_of_deciding_apart_by_hand():
    """Nothing if the learner is the guider; all of the advantage if it never does what pays."""

    class Learner:
        def apply(self, params, obs):
            return self

        def log_prob(self, action):
            return self.log_probs

    advantage = jnp.array([[1.0, -1.0]])[..., None] * jnp.ones(2)  # (1 step, 2 environments, 2)
    behaviour = jnp.log(jnp.full((1, 2, 2), 0.5))
    fields = dict.fromkeys(adaptive.Transition._fields)
    fields |= {"behaviour_log_prob": behaviour, "advantage": advantage}
    rollout = adaptive.Transition(**fields)
    learner = Learner()
    never, twice = jnp.full(2, -jnp.inf), jnp.log(jnp.full(2, 0.5 * 2**0.5))
    for log_probs, cost in ((behaviour[0], 0), ([never, twice], 1), ([twice, never], -1)):
        learner.log_probs = jnp.stack(list(log_probs))[None]
        found = on_one_device(adaptive.cost_of_deciding_apart, learner, {"learner": None})(rollout)
        np.testing.assert_allclose(found, cost, atol=1e-5)
