"""Tests of what joins the parts: the loop of training, an iteration, evaluation, optimizers, keys.

`train` is tested with stand-ins for what it calls, see conftest.train_with_stand_ins, so that
nothing large is compiled. The team's discount is tested here, too.
"""

import dataclasses
import functools
import math
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import (
    STAND_IN_STEPS,
    Clock,
    apply_learner,
    has_memory,
    scripts_with,
    train_with_stand_ins,
)
from jumanji import specs
from jumanji.types import StepType, TimeStep

pytestmark = pytest.mark.usefixtures("quick_compile")


# ------------------------------------------------------------------------- the loop of training
TRAIN = scripts_with("train", "train_iteration", "evaluate")
LOOP_FLAGS = {
    "num_devices": 1,
    "num_evals": 3,
    "learning_rate": 0.5,
    "anneal_lr": True,
    "total_timesteps": 7 * STAND_IN_STEPS + 5,  # seven iterations, and a rest that fills none
}


@pytest.fixture(scope="module", params=TRAIN)
def loop(request):
    """Logger and clock of a run of seven iterations and three evaluations after the first."""
    clock = Clock()
    logger = train_with_stand_ins(request.param, clock, **LOOP_FLAGS)
    return logger, clock


def test_evaluations_are_evenly_spaced(loop):
    """Seven iterations are evaluated before the first and after the third, the fifth and the last.

    What is evaluated are the parameters of that moment.
    """
    logger, _ = loop
    steps = [row["global_step"] for row in logger.rows]
    assert steps == [STAND_IN_STEPS * iteration for iteration in (0, 3, 5, 7)]
    iterations = [int(row["eval/params"]["iteration"][0]) for row in logger.rows]
    assert iterations == [0, 3, 5, 7]


@pytest.mark.parametrize("script", TRAIN)
def test_at_most_one_evaluation_per_iteration(script):
    """More evaluations than iterations give one after each iteration."""
    logger = train_with_stand_ins(script, Clock(), **LOOP_FLAGS | {"num_evals": 20})
    steps = [row["global_step"] for row in logger.rows]
    assert steps == [STAND_IN_STEPS * iteration for iteration in range(8)]


def test_losses_are_means_over_the_interval(loop):
    """The square of the iteration is logged as its mean over iterations 1-3, 4-5 and 6-7."""
    logger, _ = loop
    losses = [row["losses/value_loss"] for row in logger.rows[1:]]
    np.testing.assert_allclose(losses, [(1 + 4 + 9) / 3, (16 + 25) / 2, (36 + 49) / 2], rtol=1e-6)


def test_episodes_are_counted_over_the_interval(loop):
    """Iteration i ends i episodes with a return of 10 i and a length of 20 i in total."""
    logger, _ = loop
    rows = logger.rows[1:]
    assert [row["charts/num_episodes"] for row in rows] == [1 + 2 + 3, 4 + 5, 6 + 7]
    np.testing.assert_allclose([row["charts/episodic_return"] for row in rows], 10, rtol=1e-6)
    np.testing.assert_allclose([row["charts/episodic_length"] for row in rows], 20, rtol=1e-6)


def test_logged_learning_rate_is_that_of_the_last_iteration(loop):
    """The rate falls by a seventh per iteration; the rows end with iterations 3, 5 and 7."""
    logger, _ = loop
    rates = [float(row["charts/learning_rate"]) for row in logger.rows[1:]]
    np.testing.assert_allclose(rates, [0.5 * 5 / 7, 0.5 * 3 / 7, 0.5 * 1 / 7], rtol=1e-6)


def test_times_and_speed(loop):
    """Training and evaluation are timed apart, since the run began; SPS is the interval's."""
    logger, clock = loop
    train_seconds = [row["time/train_s"] for row in logger.rows]
    eval_seconds = [row["time/eval_s"] for row in logger.rows]
    speeds = [row["charts/SPS"] for row in logger.rows[1:]]
    np.testing.assert_allclose(train_seconds, [clock.per_iteration * i for i in (0, 3, 5, 7)])
    np.testing.assert_allclose(eval_seconds, [clock.per_evaluation * i for i in (1, 2, 3, 4)])
    np.testing.assert_allclose(speeds, STAND_IN_STEPS / clock.per_iteration)
    assert len({row["time/compile_s"] for row in logger.rows}) == 1


def test_progress_is_shown_after_each_iteration(loop):
    """With the steps so far, the episodes that ended since the last evaluation, and the speed."""
    logger, clock = loop
    assert logger.total == 7 * STAND_IN_STEPS
    num_steps, global_steps, num_episodes, speeds = zip(*logger.updates)
    assert num_steps == (STAND_IN_STEPS,) * 7
    assert global_steps == tuple(STAND_IN_STEPS * i for i in range(1, 8))
    assert num_episodes == (1, 3, 6, 4, 9, 6, 13)
    np.testing.assert_allclose(speeds, STAND_IN_STEPS / clock.per_iteration)


def test_each_evaluation_has_a_key_of_its_own(loop):
    """No two evaluations play with the same key, nor with one of the parameters or of training."""
    logger, _ = loop
    keys = [tuple(row["eval/key"][0]) for row in logger.rows]
    params = logger.rows[0]["eval/params"]
    params_key = params["params_key"][0]
    keys += [tuple(params_key), tuple(params["first_key"][0])]
    assert len(set(keys)) == 6
    (child,) = jax.random.split(params_key, 1)  # nothing else comes from this key
    assert tuple(np.asarray(child)) not in keys


@pytest.mark.parametrize("script", TRAIN)
def test_all_keys_come_from_the_seed(script):
    """One seed gives the same keys twice; another seed gives others, of all three kinds."""

    def keys(seed):
        logger = train_with_stand_ins(script, Clock(), **LOOP_FLAGS | {"seed": seed})
        row = logger.rows[1]
        found = (row["eval/params"]["params_key"], row["eval/params"]["first_key"], row["eval/key"])
        return [tuple(key[0]) for key in found]

    first, again, other = keys(1), keys(1), keys(2)
    assert first == again
    assert not set(first) & set(other)


@pytest.mark.parametrize("script", TRAIN)
def test_a_loss_that_is_not_finite_ends_the_run(script):
    """The error names the iteration, here the second interval's first; earlier rows are kept."""
    logger = train_with_stand_ins(script, Clock(), finite_until=3, **LOOP_FLAGS)
    assert "losses/value_loss is not finite in iteration 4" in str(logger.error)
    assert [row["global_step"] for row in logger.rows] == [0, 3 * STAND_IN_STEPS]


@pytest.mark.parametrize("script", TRAIN)
def test_a_stop_saves(script):
    """In mid-interval, here after the fourth iteration; so do all evaluations before."""
    logger = train_with_stand_ins(script, Clock(), stop_after=4, **LOOP_FLAGS)
    assert logger.error is None
    assert logger.saved == [0, 3, 4]


@pytest.mark.parametrize("script", TRAIN)
def test_a_stop_after_a_loss_that_is_not_finite_keeps_the_last_checkpoint(script):
    """It ends as an evaluation would have done, and saves nothing over what is good."""
    logger = train_with_stand_ins(script, Clock(), finite_until=3, stop_after=4, **LOOP_FLAGS)
    assert "losses/value_loss is not finite in iteration 4" in str(logger.error)
    assert logger.saved == [0, 3]


@pytest.mark.parametrize("script", scripts_with("StopSignal"))
def test_a_signal_while_processes_agree_is_not_lost(script, monkeypatch):
    """It comes while this process waits for the others, of which none has been told to stop."""
    monkeypatch.setattr(script.signal, "signal", lambda number, handler: None)
    stop = script.StopSignal()

    def gather(number):
        stop.note(15, None)
        return np.array([number, 0])

    monkeypatch.setattr(script.jax, "process_count", lambda: 2)
    monkeypatch.setattr(script.multihost_utils, "process_allgather", gather)
    assert not stop.is_set()  # as the others see it
    assert stop.is_set() and stop.number == 15


@pytest.mark.parametrize("has_win_rate", [False, True])
@pytest.mark.parametrize("script", TRAIN)
def test_environment_says_if_there_is_a_win_rate(script, has_win_rate):
    """The evaluation row is told whether the environment has a win rate."""
    logger = train_with_stand_ins(script, Clock(), has_win_rate=has_win_rate, **LOOP_FLAGS)
    assert {row["eval/has_win_rate"] for row in logger.rows} == {has_win_rate}


@pytest.mark.parametrize("script", scripts_with("eval_row"))
def test_evaluation_row_is_about_the_learner(script):
    """Spread, length and win rate are the learner's, over the episodes of all devices."""
    returns = np.array([[1.0, 3.0], [5.0, 7.0]])  # (D, episodes)
    lengths = np.array([[2.0, 4.0], [6.0, 8.0]])
    wins = np.array([[0.0, 1.0], [1.0, 1.0]])
    ended = np.ones((2, 2))
    learner_results = script.Episodes(returns, lengths, wins, ended)
    guider_results = script.Episodes(np.zeros((2, 2)), np.full((2, 2), 9.0), ended, ended)
    row = script.eval_row(learner_results, guider_results, True)
    assert (row["eval/learner_return"], row["eval/guider_return"]) == (4, 0)
    assert (row["eval/episodic_length"], row["eval/win_rate"]) == (5, 0.75)
    np.testing.assert_allclose(row["eval/learner_return_std"], math.sqrt(5), rtol=1e-6)
    assert row["eval/imitation_gap"] == -4


# ------------------------------------------------------------------------------------ optimizers
OPTIMIZERS = scripts_with("make_optimizers", "learning_rate")


def steps_of(optimizer, gradients):
    """The steps against these gradients, one after the other, of a single parameter."""
    parameter = jnp.zeros(())
    opt_state, steps = optimizer.init(parameter), []
    for gradient in gradients:
        update, opt_state = optimizer.update(jnp.asarray(gradient), opt_state, parameter)
        steps.append(-float(update))
    return steps


@pytest.mark.parametrize("script", OPTIMIZERS)
def test_learning_rate_falls_with_the_iterations(script):
    """All updates of an iteration have its learning rate, in both networks.

    Adam's step against a gradient that does not change is as long as the learning rate.
    """
    args = script.Args(
        num_envs=4,
        num_steps=8,
        total_timesteps=140,
        update_epochs=3,
        num_minibatches=2,
        learning_rate=0.5,
        anneal_lr=True,
        max_grad_norm=1.0,
    )
    for optimizer in script.make_optimizers(args):
        steps = steps_of(optimizer, [1.0] * 24)
        np.testing.assert_allclose(steps, np.repeat([0.5, 0.375, 0.25, 0.125], 6), rtol=1e-4)
    args = dataclasses.replace(args, anneal_lr=False)
    for optimizer in script.make_optimizers(args):
        np.testing.assert_allclose(steps_of(optimizer, [1.0] * 24), 0.5, rtol=1e-4)


@pytest.mark.parametrize("script", OPTIMIZERS)
def test_steps_by_hand(script):
    """Adam with epsilon 1e-5 on gradients cut off at the largest norm; shorter ones stay."""
    args = script.Args(learning_rate=0.5, max_grad_norm=2.0)
    mean = (0.9 * 1.0 + 2.0) / 1.9  # of gradients 1 and 2
    square = (0.999 * 1.0 + 4.0) / 1.999
    for optimizer in script.make_optimizers(args):
        _, second_step = steps_of(optimizer, [1.0, 50.0])
        np.testing.assert_allclose(second_step, 0.5 * mean / math.sqrt(square), rtol=1e-4)
        (tiny_step,) = steps_of(optimizer, [1e-5])
        np.testing.assert_allclose(tiny_step, 0.25, rtol=1e-4)


# ---------------------------------------------------------------- an environment for what follows
class Walk:
    """Agents see who they are, a number that the start state draws, and the time; actions are paid.

    An episode takes 3 + number % 4 steps, is truncated if the number is even and terminated if it
    is odd, and is won if the number is divisible by 3.
    """

    num_agents, num_actions, has_win_rate = 2, 3, True
    continuous, no_action = False, np.zeros(2, np.int32)

    def __init__(self, script, num_numbers):
        self.script, self.num_numbers = script, num_numbers

    def observe(self, state):
        view = [jnp.arange(2.0), jnp.full(2, state["number"] / 4), jnp.full(2, state["time"] / 2)]
        return self.script.Observation(jnp.stack(view, axis=-1), jnp.ones((2, 3), bool))

    def reset(self, key):
        number = jax.random.randint(key, (), 0, self.num_numbers).astype(float)
        state = {"number": number, "time": jnp.zeros(())}
        return state, self.observe(state)

    def step(self, state, action):
        number, time = state["number"], state["time"] + 1
        state = {"number": number, "time": time}
        last = time == 3 + number % 4
        discount = jnp.where(last & (number % 2 == 1), 0.0, 1.0)
        reward = action.astype(jnp.float32) * jnp.array([1.0, 3.0])
        won = last & (number % 3 == 0)
        return state, self.script.Outcome(self.observe(state), reward, discount, last, won)


def small_parts(script, env, **flags):
    """Flags, environment and networks of a small width."""
    args = script.Args(embed_dim=4, learner_hidden_dim=4, **flags)
    return args, env, *script.make_networks(args, env)


def random_like(shapes, seed):
    """Random arrays of these shapes.

    The networks' own start takes long to compile, and its policies are nearly uniform.
    """
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(x.dtype), shapes)


def first_state(script, parts, optimizers, key):
    """What init_state returns, with random parameters in place of the networks' own."""
    params_key = jax.random.PRNGKey(0)
    init_state = functools.partial(script.init_state, *parts, optimizers)

    @jax.jit
    def all_but_parameters():  # the rest of init_state's program is not compiled
        return init_state(params_key, key)._replace(params=None, opt_state=None)

    params = random_like(jax.eval_shape(init_state, params_key, key).params, seed=1)
    opt_state = [optimizer.init(p) for optimizer, p in zip(optimizers, params)]
    return all_but_parameters()._replace(params=params, opt_state=script.Pair(*opt_state))


# ---------------------------------------------------------------------------------- one iteration
NUM_DEVICES, NUM_UPDATES = 2, 4


def recording_optimizer():
    """Gradient descent that keeps its gradients' norms and sum; its state has the rate."""

    def init(params):
        return {
            "rate": np.float32(0),
            "count": np.int32(0),
            "norms": np.zeros(2 * NUM_UPDATES, np.float32),
            "sum": jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params),
        }

    def update(grads, opt_state, params=None):
        del params
        steps = jax.tree.map(lambda g: -opt_state["rate"] * g, grads)
        norms = opt_state["norms"].at[opt_state["count"]].set(optax.tree.norm(grads))
        total = jax.tree.map(jnp.add, opt_state["sum"], grads)
        count = opt_state["count"] + 1
        return steps, {"rate": opt_state["rate"], "count": count, "norms": norms, "sum": total}

    return optax.GradientTransformation(init, update)


def with_rate(state, rate):
    """The state, with this rate for both networks."""
    rates = np.full(NUM_DEVICES, rate, np.float32)
    opt_state = [{**opt_state, "rate": rates} for opt_state in state.opt_state]
    return state._replace(opt_state=type(state.opt_state)(*opt_state))


class Iterations(NamedTuple):
    """Two iterations on two devices, the first with a rate of 0, the second with two rates.

    The second begins in the middle of episodes. With gamma 0 the target of a step is its reward,
    and its advantage is the reward minus the value. All arrays (D, ...).
    """

    script: types.ModuleType
    learner: object
    middle: object  # the state after the first iteration
    rollout: object  # of the second iteration, (D, T, B, ...)
    episodes: dict  # sums over the episodes that ended in it, of each device
    frozen: tuple  # the state after it and its metrics, with a rate of 0
    moved: tuple  # the same with a rate of 0.01


@pytest.fixture(scope="module", params=scripts_with("train_iteration", "collect", distinct=True))
def iterations(request):
    script = request.param
    parts = small_parts(
        script,
        Walk(script, 8),
        num_envs=8,
        num_steps=6,
        num_devices=NUM_DEVICES,
        update_epochs=2,
        num_minibatches=2,
        norm_adv=False,
        gamma=0.0,
    )
    optimizers = script.Pair(recording_optimizer(), recording_optimizer())
    collect, collected = script.collect, []

    def collect_and_keep(*inputs):
        collected.append(collect(*inputs))
        return collected[-1]

    def iterate(state):
        state, metrics = script.train_iteration(*parts, optimizers, state)
        _, rollout, episodes = collected[-1]
        return state, metrics, rollout, episodes

    states = [
        first_state(script, parts, optimizers, jax.random.PRNGKey(seed))
        for seed in range(NUM_DEVICES)
    ]
    start = jax.tree.map(lambda *x: np.stack(x), *states)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "collect", collect_and_keep)
        iterate = jax.jit(jax.vmap(iterate, axis_name="device"))
        middle, *_ = iterate(start)
        *frozen, rollout, episodes = iterate(with_rate(middle, 0.0))
        *moved, _, _ = iterate(with_rate(middle, 0.01))
    return Iterations(script, parts[-1], middle, rollout, episodes, frozen, moved)


def test_nothing_changes_without_a_step(iterations):
    """All minibatches give back the probabilities of acting, in the middle of episodes, too."""
    _, metrics = iterations.frozen
    assert np.any(iterations.middle.running_length > 0)
    np.testing.assert_allclose(metrics["losses"]["first_ratio"], 1.0, rtol=0, atol=1e-5)
    np.testing.assert_allclose(metrics["losses"]["approx_kl"], 0.0, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(metrics["losses"]["clipfrac"], 0.0)


def test_each_step_starts_where_the_last_one_ended(iterations):
    """Later minibatches see other parameters, and only the first one those that acted."""
    _, metrics = iterations.moved
    np.testing.assert_allclose(metrics["losses"]["first_ratio"], 1.0, rtol=0, atol=1e-5)
    assert np.all(metrics["losses"]["approx_kl"] > 1e-5)


def test_parameters_take_all_steps(iterations):
    """The parameters end where the steps of the optimizers, all taken, lead."""
    state, _ = iterations.moved
    for before, after, opt_before, opt_after in zip(
        iterations.middle.params, state.params, iterations.middle.opt_state, state.opt_state
    ):
        gradients = jax.tree.map(np.subtract, opt_after["sum"], opt_before["sum"])
        expected = jax.tree.map(lambda x, gradient: x - 0.01 * gradient, before, gradients)
        assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        jax.tree.map(assert_close, after, expected)
        assert max(np.abs(gradient).max() for gradient in jax.tree.leaves(gradients)) > 0.1


def test_optimizers_go_on(iterations):
    """Each optimizer counts the updates of both iterations."""
    for opt_before, opt_after in zip(iterations.middle.opt_state, iterations.frozen[0].opt_state):
        np.testing.assert_array_equal(opt_before["count"], NUM_UPDATES)
        np.testing.assert_array_equal(opt_after["count"], 2 * NUM_UPDATES)


def test_optimizers_get_whole_gradients_of_different_minibatches(iterations):
    """Each optimizer gets the gradients whose mean norm is logged, one from each minibatch."""
    state, metrics = iterations.frozen
    for name in ("guider", "learner"):
        norms = np.asarray(getattr(state.opt_state, name)["norms"])[:, NUM_UPDATES:]
        logged = metrics["losses"][f"{name}_grad_norm"]
        np.testing.assert_allclose(logged, norms.mean(axis=1), rtol=1e-5)
        assert norms[0, 0] != norms[0, 1] and norms[0, 2] != norms[0, 3]  # of one epoch each
        np.testing.assert_allclose(norms[0], norms[1], rtol=1e-5)


def learner_log_prob(iterations):
    """The learner's log-probabilities of the actions taken, (D, T, B, N)."""

    rollout, state = iterations.rollout, iterations.middle
    inputs = {"obs": rollout.obs}
    memory = has_memory(iterations.script)
    if memory:  # the learner reads sequences, (B, T, ...)
        inputs = {"obs": rollout.obs, "timestep": rollout.timestep}
        inputs = jax.tree.map(lambda x: x.swapaxes(1, 2), inputs) | {"hidden": state.hidden}

    @jax.jit
    @jax.vmap
    def log_probs(params, inputs):
        minibatch = types.SimpleNamespace(**inputs)
        return jax.nn.log_softmax(apply_learner(iterations.learner, params, minibatch))

    log_prob = log_probs(state.params.learner, inputs)  # of all actions
    if memory:
        log_prob = log_prob.swapaxes(1, 2)
    return jnp.take_along_axis(log_prob, rollout.action[..., None], axis=-1)[..., 0]


def test_clipped_share_is_that_outside_the_tether(iterations):
    """delta_clipfrac is the share of actions that are outside the tether, not inside."""
    if not hasattr(iterations.script, "double_clip"):
        pytest.skip("there is no tether")
    _, metrics = iterations.frozen
    delta = iterations.script.Args().delta
    ratio = np.exp(iterations.rollout.behaviour_log_prob - learner_log_prob(iterations))
    outside = (ratio > delta) | (ratio < 1 / delta)
    assert abs(np.mean(outside) - 0.5) > 0.05
    np.testing.assert_allclose(metrics["losses"]["delta_clipfrac"], np.mean(outside), rtol=1e-5)


def test_explained_variance(iterations):
    """One minus the share of the rewards' variance that the values leave unexplained."""
    _, metrics = iterations.frozen
    rollout = iterations.rollout
    unexplained = np.var(rollout.reward - rollout.value, axis=(1, 2, 3)).mean()
    total = np.var(rollout.reward, axis=(1, 2, 3)).mean()
    expected = 1 - unexplained / total
    assert abs(expected - 0.5) > 0.1
    np.testing.assert_allclose(metrics["losses"]["explained_variance"], expected, rtol=1e-4)


def test_losses_are_means_over_all_samples(iterations):
    """Over all minibatches of both epochs and both devices; each sample counts once in an epoch."""
    _, metrics = iterations.frozen
    rollout = iterations.rollout
    expected = 0.5 * np.mean(np.square(rollout.reward - rollout.value))
    np.testing.assert_allclose(metrics["losses"]["value_loss"], expected, rtol=1e-5)
    for count in metrics["num_finite"].values():
        np.testing.assert_array_equal(count, NUM_UPDATES)


def test_episodes_of_all_devices_count(iterations):
    """The number, returns and lengths of ended episodes are summed over the devices."""
    _, metrics = iterations.frozen
    for name, of_each in iterations.episodes.items():
        assert of_each.shape == (NUM_DEVICES,) and np.all(of_each > 0)
        np.testing.assert_allclose(metrics["episodes"][name], np.sum(of_each), rtol=1e-6)


# ------------------------------------------------------------------------------------- evaluation
EVALUATE = scripts_with("evaluate", "play", "guider_act", "learner_act", distinct=True)


def evaluations(script, num_numbers, **flags):
    """evaluate(params, key), of eight episodes on each of two devices, and random parameters."""
    parts = small_parts(
        script, Walk(script, num_numbers), eval_episodes=16, num_envs=4, num_devices=2, **flags
    )
    init_state = functools.partial(script.init_state, *parts, script.make_optimizers(parts[0]))
    shapes = jax.eval_shape(init_state, *jax.random.split(jax.random.PRNGKey(0)))
    return jax.jit(functools.partial(script.evaluate, *parts)), random_like(shapes.params, seed=1)


@pytest.mark.parametrize("script", EVALUATE)
def test_greedy_evaluation(script):
    """With --eval-greedy all episodes from one start state are the same, with both networks."""
    evaluate, params = evaluations(script, 1, eval_greedy=True)
    for key in jax.random.split(jax.random.PRNGKey(0), 3):
        for total, length, _, _ in evaluate(params, key):
            assert total.shape == (8,) and np.all(length == 3)
            assert len(set(np.asarray(total))) == 1


@pytest.mark.parametrize("script", EVALUATE)
def test_evaluation(script):
    """Both networks play from the same start states, each with parameters of its own."""
    evaluate, params = evaluations(script, 64)
    key = jax.random.PRNGKey(0)
    learner_episodes, guider_episodes = evaluate(params, key)
    learner_return, length, won, _ = learner_episodes
    guider_return, guider_length, guider_won, _ = guider_episodes
    assert len(set(np.asarray(length))) > 1 and 0 < np.mean(won) < 1
    np.testing.assert_array_equal(length, guider_length)
    np.testing.assert_array_equal(won, guider_won)

    others = params._replace(learner=random_like(params.learner, seed=2))
    other_learner, same_guider = evaluate(others, key)
    assert not np.array_equal(other_learner[0], learner_return)
    np.testing.assert_array_equal(same_guider[0], guider_return)

    others = params._replace(guider=random_like(params.guider, seed=2))
    same_learner, other_guider = evaluate(others, key)
    np.testing.assert_array_equal(same_learner[0], learner_return)
    assert not np.array_equal(other_guider[0], guider_return)


class NotANumberAfterTheEnd:
    """Episodes of one to five steps, a reward of 1 in each; after the last step it is NaN."""

    def __init__(self, script):
        self.script = script

    def observe(self):
        return self.script.Observation(jnp.zeros((2, 1)), jnp.ones((2, 1), bool))

    def reset(self, key):
        return jax.random.randint(key, (), 1, 6), self.observe()

    def step(self, steps_left, action):
        del action
        steps_left -= 1
        reward = jnp.where(steps_left >= 0, jnp.ones(2), jnp.nan)
        last = steps_left <= 0
        outcome = self.script.Outcome(self.observe(), reward, 1.0, last, jnp.zeros((), bool))
        return steps_left, outcome


@pytest.mark.parametrize("script", EVALUATE)
def test_rewards_after_the_end_do_not_count(script):
    """Nor if they are no numbers, as where a physics engine goes on with a crashed robot."""
    memory = (jnp.zeros(()),) if has_memory(script) else ()

    def act(obs, *memory_and_key):
        action = jnp.zeros((16, 2), jnp.int32)
        return (action, memory_and_key[1]) if memory else action

    env = NotANumberAfterTheEnd(script)
    episodes = script.play(env, act, *memory, 16, jax.random.PRNGKey(0))
    np.testing.assert_array_equal(episodes.returns, episodes.length)
    assert set(np.asarray(episodes.length)) > {1, 5}


@pytest.mark.parametrize("script", scripts_with("evaluate", "play", "Hidden"))
def test_both_networks_remember_in_evaluation(script, monkeypatch):
    """What each network hands to its next step is not the empty memory that it began with."""

    def play_one_step(env, act, hidden, num_episodes, key):
        _, obs = jax.vmap(env.reset)(jax.random.split(key, num_episodes))
        _, next_hidden = act(obs, jnp.zeros(num_episodes), hidden, key)
        return hidden, next_hidden

    monkeypatch.setattr(script, "play", play_one_step)
    evaluate, params = evaluations(script, 64)
    for hidden, next_hidden in evaluate(params, jax.random.PRNGKey(0)):
        assert all(np.all(x == 0) for x in jax.tree.leaves(hidden))
        assert all(np.any(x != 0) for x in jax.tree.leaves(next_hidden))


# ------------------------------------------------------------------------------------------- keys
@pytest.fixture
def checked_keys():
    """Has JAX raise an error where a program uses a key twice; only typed keys are checked."""
    with jax.enable_custom_prng(True), jax.debug_key_reuse(True):
        yield


@pytest.mark.parametrize(
    "script", scripts_with("train_iteration", "collect", "init_state", distinct=True)
)
def test_training_uses_no_key_twice(script, checked_keys):
    """The start and two iterations split each key before they use it again, in all their steps."""
    parts = small_parts(script, Walk(script, 8), num_envs=4, num_steps=4, num_devices=1)
    optimizers = script.make_optimizers(parts[0])
    init = jax.jit(functools.partial(script.init_state, *parts, optimizers))
    state = jax.eval_shape(init, *jax.random.split(jax.random.PRNGKey(0)))

    def two_iterations(state):
        state, _ = script.train_iteration(*parts, optimizers, state)
        return script.train_iteration(*parts, optimizers, state)

    on_one_device = jax.vmap(two_iterations, in_axes=None, axis_size=1, axis_name="device")
    jax.eval_shape(jax.jit(on_one_device), state)


@pytest.mark.parametrize("script", scripts_with("play", distinct=True))
def test_play_uses_no_key_twice(script, checked_keys):
    """Episodes start from different states, and each step acts with a key of its own."""

    def act(obs, *others):
        action = jax.random.randint(others[-1], obs.agents_view.shape[:2], 0, 3)
        return (action, others[1]) if has_memory(script) else action

    hidden = [jnp.zeros(())] if has_memory(script) else []
    play = jax.jit(lambda key: script.play(Walk(script, 8), act, *hidden, 4, key))
    jax.eval_shape(play, jax.random.PRNGKey(0))


# ----------------------------------------------------------------------------- the team's discount
class LightsObservation(NamedTuple):
    agents_view: jax.Array  # (N, 1)
    action_mask: jax.Array  # (N, A)


class Lights:
    """A Jumanji environment; its state says if a step is the last, and the agents' discounts."""

    action_spec = specs.MultiDiscreteArray(np.full(2, 3))

    def timestep(self, last, discount):
        observation = LightsObservation(jnp.zeros((2, 1)), jnp.ones((2, 3), bool))
        step_type = jnp.where(last, StepType.LAST, StepType.MID)
        return TimeStep(
            step_type=step_type, reward=jnp.ones(2), discount=discount, observation=observation
        )

    def reset(self, key):
        del key
        state = (jnp.zeros((), bool), jnp.ones(2))
        return state, self.timestep(*state)

    def step(self, state, action):
        del action
        return state, self.timestep(*state)


def make_team_env(script, env):
    """A TeamEnv whose agents see what the environment shows them."""
    return script.TeamEnv(env)


@pytest.mark.parametrize(
    "last, discounts, expected",
    [
        (True, [0.0, 0.0], 0.0),
        (True, [0.0, 1.0], 1.0),
        (True, [1.0, 0.0], 1.0),
        (True, [1.0, 1.0], 1.0),
        (False, [0.0, 0.0], 1.0),
        (False, [0.0, 1.0], 1.0),
        (False, [1.0, 1.0], 1.0),
    ],
)
@pytest.mark.parametrize("script", scripts_with("TeamEnv"))
def test_discount_of_the_team(script, last, discounts, expected):
    """The team's returns end only with an episode, and only if all agents' returns end."""
    env = make_team_env(script, Lights())
    _, outcome = env.step((jnp.asarray(last), jnp.asarray(discounts)), jnp.zeros(2, jnp.int32))
    assert (bool(outcome.last), float(outcome.discount)) == (last, expected)


# ------------------------------------------------------------------------- episodes without an end
@pytest.mark.parametrize("script", scripts_with("evaluate", "eval_row"))
def test_endless_episodes_end_the_run(script, monkeypatch):
    """Evaluation gives up after a bounded number of steps, and the row says so in one line."""
    monkeypatch.setattr(script, "MAX_EPISODE_STEPS", 5)  # an episode takes 3 to 6 steps
    evaluate, params = evaluations(script, 64)
    episodes = evaluate(params, jax.random.PRNGKey(0))
    assert np.max(episodes[0].length) == 5 and 0 < np.mean(episodes[0].ended) < 1
    with pytest.raises(script.RunError, match=r"episodes have not ended after 5 steps$"):
        script.eval_row(*jax.tree.map(np.asarray, episodes), False)
