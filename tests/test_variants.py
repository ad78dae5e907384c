"""The variants: what each changes, and that without it, it is magpo_ff.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    CLOCKS,
    ScriptedEnv,
    first_state,
    make_guider,
    make_parts,
    on_one_device,
    random_like,
    random_minibatch,
    read_rows,
    run_folder,
    run_program,
)

import magpo_ff
import tasks
import variants.magpo_ff_adaptive as adaptive
import variants.magpo_ff_residual as residual
import variants.magpo_ff_state as with_state

pytestmark = pytest.mark.usefixtures("quick_compile")


def iterate(script, start=(), **flags):
    """One iteration from a start at which guider and learner differ -> state, metrics."""
    parts = make_parts(script, ScriptedEnv(script), **flags)
    state = first_state(script, parts)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape), state.params)
    state = state._replace(params=jax.tree.map(jnp.float32, params), **dict(start))
    return jax.jit(on_one_device(script.train_iteration, *parts))(state)


# -------------------- Tether of its own length ----------------------------------------------------
def test_an_adaptive_tether_that_is_never_too_long_is_a_fixed_one():
    """It then stays at --delta, and the parameters are those of magpo_ff.py."""
    fixed, _ = iterate(magpo_ff, delta=1.3)
    state, metrics = iterate(adaptive, delta=1.3, target_kl=1e3)
    np.testing.assert_allclose(metrics["charts/delta"], 1.3, rtol=1e-6)
    np.testing.assert_allclose(state.log_delta, np.log(1.3), rtol=1e-6)
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(fixed.params)):
        np.testing.assert_allclose(x, y, atol=1e-4)


def test_an_adaptive_tether_follows_the_kl():
    """From where it was, by the rate times the difference, within its bounds; and it is used."""
    start = {"log_delta": jnp.log(1.2)}
    fixed, expected = iterate(magpo_ff, delta=1.2)
    state, metrics = iterate(adaptive, start, target_kl=0.02, tether_rate=0.1)
    kl = metrics["losses/learner_kl"]
    np.testing.assert_allclose(kl, expected["losses/learner_kl"], rtol=1e-4)
    np.testing.assert_allclose(state.log_delta, np.log(1.2) + 0.1 * (0.02 - kl), atol=1e-5)
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(fixed.params)):
        np.testing.assert_allclose(x, y, atol=1e-4)
    args = adaptive.Args(delta=4, target_kl=0.02, tether_rate=2)
    for learner_kl, bound in ((10, adaptive.SHORTEST), (0.02, 1.2), (-10, 4)):
        found = adaptive.tether(args, jnp.log(1.2), learner_kl)
        np.testing.assert_allclose(found, np.log(bound), rtol=1e-5)


# -------------------- Exact backtracking ----------------------------------------------------------
def make_residual(continuous):
    """A guider with a base, and a minibatch with parameters for both networks."""
    learner = residual.Learner(8, 3, continuous)
    guider = make_guider(residual, "sable", 8, 1, 1, 3, continuous).clone(base=learner)
    return guider, learner, *random_minibatch(residual, 0, guider, learner, 4, 2)


@pytest.mark.parametrize("continuous", [False, True])
def test_after_a_reset_the_guider_is_the_learner(continuous):
    """For every action; a reset is due every --reset-every iterations, and keeps the trunk."""
    guider, learner, mb, params = make_residual(continuous)
    state = residual.TrainState(params, *[None] * 4, jnp.int32(4))
    kept = residual.backtrack(residual.Args(reset_every=3), state).params
    jax.tree.map(np.testing.assert_array_equal, kept, params)
    reset = residual.backtrack(residual.Args(reset_every=2), state).params
    before, after = params["guider"]["params"], reset["guider"]["params"]
    differs = jax.tree.map(lambda x, y: np.any(x != y), before, after)
    changed = {name for name, found in differs.items() if any(jax.tree.leaves(found))}
    assert changed == {"base", "correction"}
    jax.tree.map(np.testing.assert_array_equal, reset["learner"], params["learner"])

    policy = learner.apply(params["learner"], mb.obs)
    for params, is_learner in ((kept, False), (reset, True)):
        guided, _ = guider.apply(params["guider"], mb.obs, mb.action)
        apart = np.max(np.abs(guided.kl_divergence(policy)))
        assert apart < 1e-6 if is_learner else apart > 1e-2


def test_a_base_that_does_not_care_leaves_magpo():
    """With a base of equal logits the losses and gradients are those of magpo_ff.py; no gradient
    moves the base."""
    guider, learner, mb, params = make_residual(False)
    own = params["guider"]["params"]
    own["base"] = jax.tree.map(jnp.zeros_like, own["base"])
    loss = on_one_device(
        jax.value_and_grad(residual.minibatch_loss, has_aux=True), params, residual.Args(delta=1.3),
        guider, learner)
    (_, losses), grads = jax.jit(loss)(mb)
    found = grads["guider"]["params"]
    assert all(np.all(x == 0) for x in jax.tree.leaves(found.pop("base")))
    found["policy"] = found.pop("correction")

    plain = {name: x for name, x in own.items() if name not in ("base", "correction")}
    params["guider"] = {"params": plain | {"policy": own["correction"]}}
    guider = make_guider(magpo_ff, "sable", 8, 1, 1, 3)
    loss = on_one_device(
        jax.value_and_grad(magpo_ff.minibatch_loss, has_aux=True), params, magpo_ff.Args(delta=1.3),
        guider, learner)
    (_, expected), expected_grads = jax.jit(loss)(mb)
    equal = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4)
    jax.tree.map(equal, (losses, grads), (expected, expected_grads))


# -------------------- A guider that knows the state -----------------------------------------------
def test_only_the_guider_reads_the_state():
    """With a state of zeros it is magpo_ff.py's; with another one the learner is the same."""
    guider = make_guider(magpo_ff, "sable", 8, 1, 1, 3)
    mb, params = random_minibatch(magpo_ff, 0, guider, magpo_ff.Learner(8, 3, False), 4, 2)
    plain = guider.apply(params["guider"], mb.obs, mb.action)
    knowing = make_guider(with_state, "sable", 8, 1, 1, 3)
    obs = with_state.Observation(*mb.obs, jnp.zeros((4, 6)))
    embed = knowing.init(jax.random.PRNGKey(0), obs, mb.action)["params"]["state_embed"]
    own = {"params": params["guider"]["params"] | {"state_embed": embed}}
    guided = jax.jit(knowing.apply)(own, obs, mb.action)
    for x, y in zip(jax.tree.leaves(guided), jax.tree.leaves(plain)):
        np.testing.assert_allclose(x, y, atol=1e-6)

    def outputs(state):
        seen = obs._replace(global_state=state)
        learner = with_state.Learner(8, 3, False).apply(params["learner"], seen).logits
        policy, value = knowing.apply(own, seen, mb.action)
        return learner, policy.logits, value

    learner, *guided = jax.jit(jax.jacobian(outputs))(random_like(1, obs.global_state))
    assert np.all(learner == 0)
    for read in guided:  # by each agent of each sample, and from its own game
        of_game = np.abs(read).reshape(4, 2, -1, 4, 6).sum(axis=(1, 2, 4))
        assert np.all((of_game > 1e-6) == np.eye(4, dtype=bool))


@pytest.mark.parametrize("env_id", tasks.GLOBAL_STATES)
def test_global_states(env_id):
    """What the state of a game tells, after a few steps."""
    env = tasks.make_trainable(env_id, tasks.PAPER_TASKS[env_id][0])
    state, timestep = jax.jit(env.reset)(jax.random.PRNGKey(1))
    action = env.action_spec.generate_value()
    for _ in range(3):
        state, timestep = jax.jit(env.step)(state, action)
    found = np.asarray(jax.jit(env.global_state)(state))
    assert found.dtype == np.float32 and found.ndim == 1 and np.all(np.isfinite(found))
    if env_id == "CoordSum-v0":
        counts = state.counts[state.target]
        assert (found[:10] * 100).sum() == pytest.approx(counts.sum())
        assert found[10:].tolist() == np.eye(10)[np.argmax(counts)].tolist()
    elif env_id == "RobotWarehouse-v0":
        shelves, robots, requested = found[: 3 * state.grid[0].size].reshape(3, -1).sum(axis=1)
        assert (robots, requested) == (2, 2) and shelves == len(state.shelves.is_requested)
    elif env_id == "LevelBasedForaging-v0":
        assert (found[:4].reshape(2, 2) * 8).tolist() == state.agents.position.tolist()
        assert found[-2:].tolist() == (~state.food_items.eaten).tolist()
    elif env_id == "Connector-v3":
        assert found[:25].sum() == 25 - 2 * 3 and np.all(found[25:] < 1)
    elif env_id == "SMAX":
        assert np.all(found[:100].reshape(10, 10)[:, 0] > 0)  # ten units, all in good health
    else:
        assert found[:12].tolist() == state.game_state.p_pos.ravel().tolist()


def test_environment_without_a_global_state(call):
    """It is refused in one line."""
    status, _, err = call(with_state, "--env-id", "examples.my_env:Meet-v0", "--dry-run")
    assert status == 2 and len(err.splitlines()) == 1
    assert "--env-id examples.my_env:Meet-v0: needs a method global_state" in err


# -------------------- All of them -----------------------------------------------------------------
@pytest.mark.slow  # saving is the same text as in the scripts
@pytest.mark.parametrize("script", [adaptive, residual, with_state])
def test_resumed_equals_uninterrupted(script, environ, tmp_path):
    """Two iterations, a new process, and two more: the rows of four in one process."""
    flags = """--env-id CoordSum-v0 --scenario 2x3-4 --num-envs 4 --num-steps 8 --eval-episodes 4
        --embed-dim 8 --learner-hidden-dim 8 --num-minibatches 2 --update-epochs 2""".split()
    whole = ["--total-timesteps", "128", "--num-evals", "4"]
    half = ["--total-timesteps", "64", "--num-evals", "2"]
    for name, budget in (("whole", whole), ("half", half)):
        flags_of_run = [*flags, *budget, "--run-dir", tmp_path / name]
        run_program(script.__file__, flags_of_run, environ)
    folder = run_folder(tmp_path / "half")
    run_program(script.__file__, ["--resume", folder, *whole], environ)
    assert read_rows(folder, CLOCKS) == read_rows(run_folder(tmp_path / "whole"), CLOCKS)
