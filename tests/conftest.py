"""Which scripts define what, and random inputs that the tests share."""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import os
import pathlib
import subprocess
import sys

import jaxlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # bitwise claims are made for the CPU
# Without XLA's own emitters for fusions programs compile in two thirds of the time, and the suite
# does little else. A release that no longer knows the flag would end the process.
if tuple(int(part) for part in jaxlib.__version__.split(".")[:2]) < (0, 11):
    no_emitters = " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + no_emitters

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Files that take minutes come first, so that no worker is left with one of them at the end.
LONGEST_FIRST = """test_reference test_tasks test_resume test_environments test_docs test_benchmark
    test_networks test_memory test_own_games test_shape test_algorithm test_examples""".split()
# MAGPO_SCRIPTS=my_algo aims the tests at a copy of a script (names with commas between).
NAMED = os.environ.get("MAGPO_SCRIPTS", "").replace(",", " ").split()
SCRIPTS = NAMED or ["magpo_ff", "ctds_ff", "magpo_rec"]


def pytest_configure(config):
    """No script, or one that is named and not there, fails the run: nothing would be tested."""
    missing = [name for name in NAMED if not importlib.util.find_spec(name)]
    if missing or not any(map(importlib.util.find_spec, SCRIPTS)):
        raise pytest.UsageError(f"no script to test: {', '.join(missing or SCRIPTS)}")


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def scripts_with(*names, feed_forward=False, replaced=()):
    """pytest parameters: the scripts that define all of `names`, one for each text of them.

    A script is left out if all that `names` need, but for what a test replaces, is the same text in
    an earlier one; of those that MAGPO_SCRIPTS names none is. feed_forward leaves out the scripts
    with memory over time.
    """
    modules = [importlib.import_module(name) for name in SCRIPTS if importlib.util.find_spec(name)]
    modules = [module for module in modules if all(hasattr(module, name) for name in names)]
    modules = [module for module in modules if not (feed_forward and has_memory(module))]
    if not NAMED:
        texts = [needed(module, names, replaced) for module in modules]
        modules = [module for i, module in enumerate(modules) if texts[i] not in texts[:i]]
    return [pytest.param(module, id=module.__name__) for module in modules]


def needed(module, names, replaced=()):
    """The texts of the functions, classes and constants `names` of a module, and of all of the
    module that these name, and so on."""
    nodes, texts, names = {}, {}, list(names)
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.Assign):
            nodes[ast.unparse(node.targets[0])] = node
        elif hasattr(node, "name"):
            nodes[node.name] = node
    while names:
        name = names.pop()
        if name in nodes and name not in texts and name not in replaced:
            texts[name] = ast.unparse(nodes[name])
            names += [x.id for x in ast.walk(nodes[name]) if isinstance(x, ast.Name)]
    return texts


def slow(parameters):
    """The same pytest parameters, left out by default."""
    return [pytest.param(*x.values, id=x.id, marks=pytest.mark.slow) for x in parameters]


@pytest.fixture(scope="module")
def double_precision():
    """Everything in float64, so that a difference is an error and no rounding.

    In float32 two ways to compute Sable differ by 1e-3 now and then: agent 0's retention is
    (query . key) value, of which the group norm leaves little more than the sign of query . key,
    and that may be close to 0.
    """
    jax.config.update("jax_enable_x64", True)
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


def run_program(path, flags, environ, folder=None, succeeds=True):
    """Runs `python PATH FLAGS` in a folder -> the finished process."""
    command = [sys.executable, str(path), *map(str, flags)]
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 or not succeeds, done.stderr
    return done


def run_folder(run_dir):
    """The only run's folder in a folder."""
    (folder,) = [path for path in pathlib.Path(run_dir).iterdir() if path.name[0] != "."]
    return folder


def read_rows(folder, clocks=True):
    """The rows of a run's metrics.jsonl, each complete JSON; clocks: with what differs between two
    runs of the same."""
    text = (folder / "metrics.jsonl").read_text()
    assert text.endswith("\n") and "NaN" not in text and "Infinity" not in text
    rows = [json.loads(line) for line in text.splitlines()]
    without = () if clocks else ("time/", "charts/SPS")
    return [{k: x for k, x in row.items() if not k.startswith(without)} for row in rows]


TINY = """--env-id CoordSum-v0 --scenario 2x3-4 --num-envs 4 --num-steps 8 --eval-episodes 4
    --embed-dim 8 --learner-hidden-dim 8 --num-minibatches 2 --update-epochs 2""".split()

# The metrics of a run in which episodes end. Only Connector and SMAX have eval/win_rate besides.
METRICS = set(
    """global_step charts/SPS charts/learning_rate charts/num_episodes charts/episodic_return
    charts/episodic_length eval/learner_return eval/learner_return_std eval/guider_return
    eval/imitation_gap eval/episodic_length losses/guider_policy_loss losses/guider_kl
    losses/guider_entropy losses/value_loss losses/learner_kl losses/learner_policy_loss
    losses/learner_entropy losses/approx_kl losses/clipfrac losses/delta_clipfrac
    losses/first_ratio losses/explained_variance losses/guider_grad_norm losses/learner_grad_norm
    time/compile_s time/train_s time/eval_s""".split())
NOT_IN_CTDS = {"losses/guider_kl", "losses/delta_clipfrac", "losses/learner_policy_loss"}


def metrics_of(script):
    return METRICS - (set() if hasattr(script, "double_clip") else NOT_IN_CTDS)


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module, *flags) -> exit status, stdout, stderr of its main(), in this process."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", "unused")  # a user's own is left alone
    jax.config.update("jax_enable_compilation_cache", False)

    def main(module, *flags):
        name = module.__name__.split(".")[-1]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        try:
            status = module.main()
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    yield main
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_enable_compilation_cache", True)


def has_memory(script):
    """True for a script whose networks remember earlier steps."""
    return hasattr(script, "init_hidden")


def make_parts(script, env, **flags):
    """What the functions of an iteration take first, of small sizes -> (args, env, networks ..)."""
    sizes = {"num_envs": 4, "num_steps": 8, "num_devices": 1, "embed_dim": 4}
    sizes |= {"learner_hidden_dim": 4, "critic_hidden_dim": 4}
    known = {field.name for field in dataclasses.fields(script.Args)}
    args = script.Args(**{name: x for name, x in sizes.items() if name in known} | flags)
    return args, env, *script.make_networks(args, env)


def first_state(script, parts, seed=0):
    """The state before the first iteration."""
    init = jax.jit(functools.partial(script.init_state, *parts))
    return init(*jax.random.split(jax.random.PRNGKey(seed)))


def on_one_device(function, *first):
    """The function, with these first arguments, as it runs on one device with an axis "device"."""
    function = functools.partial(function, *first)
    return jax.vmap(function, in_axes=None, out_axes=None, axis_size=1, axis_name="device")


def random_like(seed, tree, scale=1.0):
    """A tree of arrays of the same shapes, with numbers of order 1 in them."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, scale, x.shape), float), tree)


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


def random_obs(script, seed, batch_shape, num_agents, num_actions, num_features=5):
    """An Observation (.., N, ..) in which each agent has at least one legal action, and about half
    of the others."""
    rng = np.random.default_rng(seed)
    shape = (*np.atleast_1d(batch_shape), num_agents)
    mask = rng.random((*shape, num_actions)) < 0.5
    mask |= np.eye(num_actions, dtype=bool)[rng.integers(num_actions, size=shape)]
    view = rng.normal(size=(*shape, num_features))
    obs = script.Observation(jnp.asarray(view, float), jnp.asarray(mask))
    if "remembered" in obs._fields:
        obs = obs._replace(remembered=jnp.asarray(rng.normal(size=(*shape, 4))))
    return obs


def make_guider(script, kind, embed_dim, num_heads, num_blocks, num_actions, continuous=False):
    """A guider; one with memory decays by 0.8 and trains in chunks of at most four steps."""
    memory = (0.8, 4) if has_memory(script) else ()
    sizes = (embed_dim, num_heads, num_blocks)
    return script.Guider(kind, *sizes, *memory, num_actions, continuous)


class ScriptedEnv:
    """Every start state has a number, its tag, and an episode does what the tag says; agents see
    the tag and the time.

    The episode takes 1 + tag % 4 steps, is terminated if the tag is odd and truncated if it is
    even, and is won if the tag is divisible by 3. Step t = 1, 2, .. pays agents t and 3t, a step
    beyond the end 1000.
    """

    num_agents, num_actions, has_win_rate, continuous, own_rewards = 2, 3, True, False, True

    def __init__(self, script):
        self.script, self.env = script, self
        self.example_action = jnp.zeros(2, jnp.int32)

    def make_state(self, tag, time, episode):
        # All of one size, so that the norm in front of the networks does not drown the time.
        view = jnp.stack([jnp.arange(2), jnp.full(2, tag) / 2**22, jnp.full(2, time)], axis=-1)
        obs = self.script.Observation(view.astype(float), jnp.ones((2, 3), bool))
        return self.script.EnvState({"tag": tag, "time": time}, obs, episode)

    def reset(self, key):
        tag = jax.random.randint(key, (), 1000, 2**23)  # exact in float32
        zeros = dict.fromkeys(("return", "length", "won"), jnp.zeros(()))
        return self.make_state(tag, jnp.int32(0), zeros)

    def step(self, state, action):
        tag, time = state.game["tag"], state.game["time"] + 1
        last = time == 1 + tag % 4
        reward = jnp.where(time > 1 + tag % 4, 1000.0, time * jnp.array([1.0, 3.0]))
        now = {"return": jnp.mean(reward), "length": 1.0, "won": last & (tag % 3 == 0)}
        episode = jax.tree.map(jnp.add, state.episode, now)
        discount = jnp.where(last & (tag % 2 == 1), 0.0, 1.0)
        return self.make_state(tag, time, episode), reward, discount, last


def tags_and_times(obs):
    view = np.asarray(obs.agents_view)
    return (view[..., 0, 1] * 2**22).astype(int), view[..., 0, 2].astype(int)
