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
LONGEST_FIRST = """test_algorithm test_baselines test_resume test_cli test_benchmark test_memory
    test_environments test_tasks test_examples test_docs test_devices test_ctds""".split()
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


def scripts_with(*names, feed_forward=False, distinct=False):
    """pytest parameters: the scripts that define all of `names`.

    feed_forward leaves out the scripts with memory over time; distinct, for what takes long to
    compile, leaves out those in which the code of all `names` is that of an earlier script.
    """
    modules = [importlib.import_module(name) for name in SCRIPTS if importlib.util.find_spec(name)]
    modules = [module for module in modules if all(hasattr(module, name) for name in names)]
    modules = [module for module in modules if not (feed_forward and has_memory(module))]
    if distinct:
        sources = [
            [inspect.getsource(getattr(module, name)) for name in names] for module in modules
        ]
        texts = [[ast.unparse(ast.parse(source)) for source in group] for group in sources]
        modules = [module for i, module in enumerate(modules) if texts[i] not in texts[:i]]
    return [pytest.param(module, id=module.__name__) for module in modules]


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


def read_rows(folder, without=()):
    """The rows of a run's metrics.jsonl, each complete JSON, without names that start so."""
    text = (folder / "metrics.jsonl").read_text()
    assert text.endswith("\n") and "NaN" not in text and "Infinity" not in text
    rows = [json.loads(line) for line in text.splitlines()]
    return [{k: x for k, x in row.items() if not k.startswith(without)} for row in rows]


CLOCKS = ("time/", "charts/SPS")  # what differs between two runs of the same


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
    return script.Observation(jnp.asarray(view, float), jnp.asarray(mask))


def make_guider(script, kind, embed_dim, num_heads, num_blocks, num_actions, continuous=False):
    """A guider; one with memory decays by 0.8 and trains in chunks of at most four steps."""
    memory = (0.8, 4) if has_memory(script) else ()
    sizes = (embed_dim, num_heads, num_blocks)
    return script.Guider(kind, *sizes, *memory, num_actions, continuous)


def zero_hidden(script, guider, learner, batch_size, num_agents):
    """The hidden states of guider and learner before an episode; None without memory."""
    if not has_memory(script):
        return None
    args = script.Args(
        embed_dim=guider.embed_dim, num_heads=guider.num_heads, num_blocks=guider.num_blocks,
        learner_hidden_dim=learner.hidden_dim,
    )
    env = type("Env", (), {"num_agents": num_agents})
    return script.init_hidden(args, env, batch_size)


def past(mb, name):
    """What a network with memory needs besides the observations of a minibatch."""
    return (mb.timestep, mb.hidden[name]) if hasattr(mb, "timestep") else ()


def random_minibatch(script, seed, guider, learner, num_samples, num_agents):
    """A minibatch with random actions and numbers: of samples, or with memory of half as many
    sequences of two steps, some of which begin with an episode.

    -> minibatch, random parameters.
    """
    rng, memory = np.random.default_rng(seed), has_memory(script)
    shape = (num_samples // 2, 2) if memory else (num_samples,)
    obs = random_obs(script, seed, shape, num_agents, guider.num_actions)
    fields = dict.fromkeys(script.Transition._fields)
    fields |= {"obs": obs, "action": jnp.argmax(obs.action_mask, axis=-1).astype(jnp.int32)}
    if guider.continuous:
        fields["action"] = random_like(seed + 1, obs.action_mask)
    for name in ("behaviour_log_prob", "value", "advantage", "target"):
        fields[name] = jnp.asarray(rng.normal(size=(*shape, num_agents)), float)
    if memory:
        start = rng.integers(3, size=shape[0])
        timestep = np.stack([start, (start + 1) * (start < 2)], axis=1)
        hidden = zero_hidden(script, guider, learner, shape[0], num_agents)
        fields["timestep"] = jnp.asarray(timestep, float)
        fields["hidden"] = random_like(seed + 2, hidden)
    mb = script.Transition(**fields)
    guider_inputs = (mb.obs, mb.action, *past(mb, "guider"))
    params = {"guider": random_params(guider, seed, *guider_inputs)}
    params["learner"] = random_params(learner, seed + 1, mb.obs, *past(mb, "learner"))
    return mb, params


def apply_guider(guider, params, mb):
    """The guider on a minibatch of either kind -> policies, value."""
    return guider.apply(params, mb.obs, mb.action, *past(mb, "guider"))


def apply_learner(learner, params, mb):
    """The learner on a minibatch of either kind -> policies."""
    policy = learner.apply(params, mb.obs, *past(mb, "learner"))
    return policy[0] if isinstance(policy, tuple) else policy


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
    _, results = jax.lax.scan(step, mb.hidden["guider"], (obs, timestep, keys))
    action, log_prob, value = (x.swapaxes(0, 1) for x in results)
    return mb._replace(action=action, behaviour_log_prob=log_prob, value=value)


class ScriptedEnv:
    """Every start state has a number, its tag, and an episode does what the tag says; agents see
    the tag and the time.

    The episode takes 1 + tag % 4 steps, is terminated if the tag is odd and truncated if it is
    even, and is won if the tag is divisible by 3. Step t = 1, 2, .. pays agents t and 3t, a step
    beyond the end 1000.
    """

    num_agents, num_actions, has_win_rate, continuous = 2, 3, True, False

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
