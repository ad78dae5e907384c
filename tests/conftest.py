"""Which scripts define what, and random inputs that the tests share."""

import ast
import importlib
import importlib.util
import inspect
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # bitwise claims are made for the CPU

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def scripts_with(*names, feed_forward=False, distinct=False):
    """pytest parameters: the scripts that define all of `names`.

    feed_forward leaves out the script with memory over time; distinct, for what takes long to compile, leaves out those
    in which the code of all `names` is that of an earlier script.
    """
    scripts = ("magpo_ff", "ctds_ff") + (() if feed_forward else ("magpo_rec",))
    modules = [importlib.import_module(name) for name in scripts if importlib.util.find_spec(name)]
    modules = [module for module in modules if all(hasattr(module, name) for name in names)]
    if distinct:
        sources = [[inspect.getsource(getattr(module, name)) for name in names] for module in modules]
        texts = [[ast.unparse(ast.parse(source)) for source in group] for group in sources]
        modules = [module for i, module in enumerate(modules) if texts[i] not in texts[:i]]
    return [pytest.param(module, id=module.__name__) for module in modules]


@pytest.fixture(scope="module")
def quick_compile():
    """Compiles with few optimisations, in a third of the time: for tests that run each program a few times only."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def random_params(network, seed, *inputs):
    """Parameters of a network for inputs of these shapes: numbers of order 1 in place of the network's own start.

    The heads start at a scale of 0.01, which would hide most differences, and orthogonal starts take long to compile.
    """
    rng = np.random.default_rng(seed)

    def draw(path, x):
        return jnp.asarray((path[-1].key == "scale") + rng.normal(0, 0.3, x.shape), float)

    shapes = jax.eval_shape(network.init, jax.random.PRNGKey(0), *inputs)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_obs(script, seed, batch_size, num_agents, num_actions, num_features=5):
    """An Observation (M, N, ...) in which each agent has at least one legal action, and about half of the others."""
    rng = np.random.default_rng(seed)
    mask = rng.random((batch_size, num_agents, num_actions)) < 0.5
    mask |= np.eye(num_actions, dtype=bool)[rng.integers(num_actions, size=(batch_size, num_agents))]
    view = rng.normal(size=(batch_size, num_agents, num_features))
    return script.Observation(jnp.asarray(view, float), jnp.asarray(mask))
