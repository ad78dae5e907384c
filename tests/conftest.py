"""Which scripts define what, and random inputs that the tests share."""

import ast
import importlib
import importlib.util
import inspect
import os
import types

import jaxlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # bitwise claims are made for the CPU
# Without XLA's own emitters for fusions programs compile in two thirds of the time, and the suite
# does little else. A release that no longer knows the flag would end the process.
if tuple(int(part) for part in jaxlib.__version__.split(".")[:2]) < (0, 11):
    no_emitters = " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + no_emitters

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

# Files that take minutes come first, so that no worker is left with one of them at the end.
LONGEST_FIRST = """test_cli test_resume test_environments test_algorithm test_memory test_baselines
    test_tasks test_devices test_distributed test_examples test_glue""".split()


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def scripts_with(*names, feed_forward=False, distinct=False):
    """pytest parameters: the scripts that define all of `names`.

    feed_forward leaves out the script with memory over time; distinct, for what takes long to
    compile, leaves out those in which the code of all `names` is that of an earlier script.
    """
    scripts = ("magpo_ff", "ctds_ff") + (() if feed_forward else ("magpo_rec",))
    modules = [importlib.import_module(name) for name in scripts if importlib.util.find_spec(name)]
    modules = [module for module in modules if all(hasattr(module, name) for name in names)]
    if distinct:
        sources = [
            [inspect.getsource(getattr(module, name)) for name in names] for module in modules
        ]
        texts = [[ast.unparse(ast.parse(source)) for source in group] for group in sources]
        modules = [module for i, module in enumerate(modules) if texts[i] not in texts[:i]]
    return [pytest.param(module, id=module.__name__) for module in modules]


@pytest.fixture(scope="module")
def double_precision():
    """Everything in float64, with actions in int32 as ever, so that a difference is an error and no
    rounding.

    In float32 two ways to compute Sable differ by 1e-3 now and then: agent 0's retention is
    (query . key) value, of which the group norm leaves little more than the sign of query . key,
    and that may be close to 0.
    """

    def with_int32(function):
        def distribution(*inputs):
            policy = function(*inputs)
            if isinstance(policy, distrax.Categorical):
                return distrax.Categorical(policy.logits, dtype=jnp.int32)
            return policy

        return distribution

    jax.config.update("jax_enable_x64", True)
    with pytest.MonkeyPatch.context() as patch:
        for script in (param.values[0] for param in scripts_with("action_distribution")):
            patch.setattr(script, "action_distribution", with_int32(script.action_distribution))
        yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module")
def quick_compile():
    """Compiles with few optimisations, in a third of the time: for tests that run each program a
    few times only."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def environ(tmp_path_factory):
    """The variables for runs as processes: a shared cache of compiled programs, and hardly any
    optimisation; wandb needs no account."""
    cache = str(tmp_path_factory.mktemp("cache"))
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
        "WANDB_MODE": "offline",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0",
    }


def random_params(network, seed, *inputs):
    """Parameters of a network for inputs of these shapes: numbers of order 1 in place of the
    network's own start.

    The heads start at a scale of 0.01, which would hide most differences, and orthogonal starts
    take long to compile.
    """
    rng = np.random.default_rng(seed)

    def draw(path, x):
        return jnp.asarray((path[-1].key == "scale") + rng.normal(0, 0.3, x.shape), float)

    shapes = jax.eval_shape(lambda: network.init(jax.random.PRNGKey(0), *inputs))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_obs(script, seed, batch_size, num_agents, num_actions, num_features=5):
    """An Observation (M, N, ...) in which each agent has at least one legal action, and about half
    of the others."""
    rng = np.random.default_rng(seed)
    mask = rng.random((batch_size, num_agents, num_actions)) < 0.5
    mask |= np.eye(num_actions, dtype=bool)[
        rng.integers(num_actions, size=(batch_size, num_agents))
    ]
    view = rng.normal(size=(batch_size, num_agents, num_features))
    return script.Observation(jnp.asarray(view, float), jnp.asarray(mask))


def has_memory(script):
    """True for the script whose networks remember earlier steps."""
    return hasattr(script, "Hidden")


def make_guider(
    script, kind, num_agents, num_actions, num_heads, num_blocks, embed_dim, continuous=False
):
    """A guider; one with memory decays by 0.8 and trains in chunks of two steps."""
    others = {"continuous": continuous}
    if has_memory(script):
        others |= {"decay_scaling_factor": 0.8, "chunk_steps": 2}
    return script.Guider(kind, num_agents, num_actions, num_heads, num_blocks, embed_dim, **others)


def random_minibatch(script, seed, guider, learner, num_samples):
    """A Minibatch with random actions and numbers: of samples, or with memory of half as many
    sequences of two steps.

    -> minibatch, random parameters.
    """
    rng, memory = np.random.default_rng(seed), has_memory(script)
    shape = (num_samples // 2, 2) if memory else (num_samples,)
    obs = random_obs(script, seed, num_samples, guider.num_agents, guider.num_actions)
    obs = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), obs)
    fields = {"obs": obs, "action": jnp.argmax(obs.action_mask, axis=-1).astype(jnp.int32)}
    if guider.continuous:
        size = (*shape, guider.num_agents, guider.num_actions)
        fields["action"] = jnp.asarray(rng.normal(size=size), float)
    for name in ("behaviour_log_prob", "value", "advantage", "value_target"):
        fields[name] = jnp.asarray(rng.normal(size=(*shape, guider.num_agents)), float)
    if memory:
        # some episodes begin with the first step, some with the second
        start = rng.integers(3, size=shape[0])
        fields["timestep"] = jnp.asarray(
            np.stack([start, (start + 1) * (start < 2)], axis=1), float
        )
        learner_hidden = np.zeros((shape[0], guider.num_agents, learner.hidden_dim))
        hidden = script.Hidden(guider.apply({}, shape[0], method="init_hidden"), learner_hidden)
        fields["hidden"] = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape), float), hidden
        )
    mb = script.Minibatch(**fields)
    inputs = (mb.obs.agents_view, mb.action), (mb.obs.agents_view,)
    if memory:
        inputs = [(*x, mb.timestep, hidden) for x, hidden in zip(inputs, mb.hidden)]
    return mb, script.Pair(
        random_params(guider, seed, *inputs[0]), random_params(learner, seed + 1, *inputs[1])
    )


def apply_guider(guider, params, mb):
    """The guider on a minibatch of either kind -> logits, value."""
    memory = (mb.timestep, mb.hidden.guider) if hasattr(mb, "hidden") else ()
    return guider.apply(params, mb.obs.agents_view, mb.action, *memory)


def apply_learner(learner, params, mb):
    """The learner on a minibatch of either kind -> logits."""
    if hasattr(mb, "hidden"):
        return learner.apply(params, mb.obs.agents_view, mb.timestep, mb.hidden.learner)[0]
    return learner.apply(params, mb.obs.agents_view)


def let_guider_act(script, guider, params, mb, key):
    """The minibatch with actions that the guider takes itself, their log-probs and its values, step
    after step."""
    if not has_memory(script):
        action, log_prob, value = script.guider_act(guider, params, mb.obs, key)
        return mb._replace(action=action, behaviour_log_prob=log_prob, value=value)

    def step(hidden, inputs):
        *results, hidden = script.guider_act(guider, params, *inputs[:2], hidden, inputs[2])
        return hidden, results

    obs, timestep = jax.tree.map(lambda x: x.swapaxes(0, 1), (mb.obs, mb.timestep))
    keys = jax.random.split(key, timestep.shape[0])
    _, results = jax.lax.scan(step, mb.hidden.guider, (obs, timestep, keys))
    action, log_prob, value = (x.swapaxes(0, 1) for x in results)
    return mb._replace(action=action, behaviour_log_prob=log_prob, value=value)


# ------------------------------------------------------------ training with stand-ins for its parts
STAND_IN_STEPS = 32  # of an iteration: 4 environments, 8 steps


class Clock:
    """In place of the module `time`: time passes only where a stand-in lets it."""

    per_iteration, per_evaluation = 3.0, 5.0

    def __init__(self):
        self.seconds = 1000.0

    def time(self):
        return self.seconds

    monotonic = perf_counter = time

    def wait(self, seconds):
        """Lets time pass where a compiled program is run -> 0, which the program must use."""

        def advance():
            self.seconds += seconds
            return np.float32(0)

        return io_callback(advance, jax.ShapeDtypeStruct((), jnp.float32))


class RowLogger:
    """A logger that keeps the rows, what it is shown, and the error that ended the run."""

    def __init__(self):
        self.rows, self.error = [], None
        self.saved = []
        self.log = lambda row: self.rows.append(row) or 0
        self.is_main, self.folder = True, ""
        self.total, self.updates = None, []

    def begin(self, done, total):
        self.total = total

    def update(self, num_steps, global_step, episodes, speed):
        self.updates.append((num_steps, global_step, float(episodes["number"][0]), speed))


def train_with_stand_ins(
    script, clock, has_win_rate=False, finite_until=1000, stop_after=None, **flags
):
    """Runs `train` with functions that cost nothing in place of those it calls -> RowLogger.

    The "parameters" are the keys that the start got and the number of iterations so far. Iteration
    i has a value loss of i * i, is finite if i <= finite_until, and ends i episodes with a return
    of 10 i and a length of 20 i in total. Rows hold the parameters and the key that the evaluation
    got, with the devices first. With stop_after the run is told to stop after so many iterations,
    and saves: logger.saved lists the iterations at which it would write a checkpoint.
    """

    def init_state(args, env, guider, learner, optimizers, params_key, key):
        fields = dict.fromkeys(script.TrainState._fields, jnp.zeros(()))
        fields["params"] = {"params_key": params_key, "first_key": key, "iteration": jnp.zeros(())}
        fields["key"] = key
        return script.TrainState(**fields)

    def train_iteration(args, env, guider, learner, optimizers, state):
        iteration = state.params["iteration"] + 1
        number = iteration + clock.wait(clock.per_iteration)
        num_updates = args.update_epochs * args.num_minibatches
        finite = jnp.where(iteration <= finite_until, num_updates, 0.0)
        metrics = {
            "losses": {"value_loss": number * number},
            "num_finite": {"value_loss": finite},
            "episodes": {"number": number, "return": 10 * number, "length": 20 * number},
        }
        return state._replace(params={**state.params, "iteration": iteration}), metrics

    def evaluate(args, env, guider, learner, params, key):
        iteration = params["iteration"] + clock.wait(clock.per_evaluation)
        return {**params, "iteration": iteration}, key

    def eval_row(learner_results, guider_results, has_win_rate):
        row = {"eval/params": learner_results, "eval/key": guider_results}
        row["eval/learner_return"] = 0.0
        return row | {"eval/has_win_rate": has_win_rate}

    sizes = {"num_envs": 4, "num_steps": 8, "eval_episodes": 4}
    updates = {"update_epochs": 2, "num_minibatches": 2}
    args = script.Args(**sizes, **updates, **flags, save=stop_after is not None)
    env = types.SimpleNamespace(
        num_agents=2, num_actions=3, continuous=False, has_win_rate=has_win_rate
    )
    logger = RowLogger()

    def is_set():
        return stop_after is not None and len(logger.updates) >= stop_after

    def save_checkpoint(folder, tree, progress):
        logger.saved.append(progress.iteration)

    stop = types.SimpleNamespace(is_set=is_set)
    with pytest.MonkeyPatch.context() as patch:
        for stand_in in (init_state, train_iteration, evaluate, eval_row):
            patch.setattr(script, stand_in.__name__, stand_in)
        patch.setattr(script, "time", clock)
        patch.setattr(script, "save_networks", lambda folder, prefix, params: None)
        patch.setattr(script, "save_checkpoint", save_checkpoint)
        try:
            script.train(args, env, jax.local_devices()[: args.num_devices], logger, stop)
        except script.RunError as error:
            logger.error = error
    return logger
