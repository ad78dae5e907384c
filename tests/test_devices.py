"""Two devices are one: the same gradient from the same samples, equal parameters for ever,
different experience.

The number of CPU devices must be set before JAX's first use, hence a process of its own: this file
is its program, too.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile

import pytest
from conftest import make_guider, random_minibatch, scripts_with

GRADIENT = scripts_with("minibatch_loss", "Transition", "Guider")[:1]
TRAINING = scripts_with("init_state", "collect", "train_iteration")[:1]
LOOP = scripts_with("train", "train_iteration", "evaluate")


def gradient_difference(script):
    """How far apart, relative to each leaf, the mean gradient of two devices is from one device's
    on all samples."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    guider, learner = make_guider(script, "mat", 8, 1, 1, 4), script.Learner(8, 4, False)
    mb, params = random_minibatch(script, 0, guider, learner, 32, 2)
    half = jnp.arange(len(mb.action)) >= len(mb.action) // 2
    # so that the devices' means differ
    shift = jnp.where(half, 3.0, 0.0).reshape(-1, *[1] * (mb.action.ndim - 1))
    mb = mb._replace(advantage=mb.advantage + shift)
    loss = functools.partial(script.minibatch_loss, args=script.Args())

    def gradient(mb):
        grads = jax.grad(lambda p: loss(p, guider=guider, learner=learner, mb=mb)[0])(params)
        return jax.lax.pmean(grads, "device")

    def on_devices(number):
        shares = jax.tree.map(lambda x: x.reshape(number, -1, *x.shape[1:]), mb)
        grads = jax.pmap(gradient, axis_name="device", devices=jax.devices()[:number])(shares)
        return jax.tree.map(lambda x: np.asarray(x)[0], grads)

    one, two = on_devices(1), on_devices(2)
    difference = jax.tree.map(lambda x, y: np.abs(y - x).max() / (1e-3 + np.abs(x).max()), one, two)
    assert max(np.abs(x).max() for x in jax.tree.leaves(one)) > 1e-2
    return float(max(jax.tree.leaves(difference)))


def train_on_two(script):
    """What one iteration on two devices leaves: what is equal on both, and have the parameters
    moved?"""
    import jax
    import numpy as np

    args = script.Args(
        num_envs=8, num_steps=4, num_devices=2, update_epochs=2, embed_dim=4, learner_hidden_dim=4)
    env = script.make_env("CoordSum-v0", "2x4-5")
    parts = (args, env, *script.make_networks(args, env))
    keys = jax.random.split(jax.random.PRNGKey(0), 2)
    init = jax.pmap(functools.partial(script.init_state, *parts), in_axes=(None, 0))
    before = init(jax.random.PRNGKey(1), keys)
    iterate = functools.partial(script.train_iteration, *parts)
    after, metrics = jax.pmap(iterate, axis_name="device")(before)

    def same(tree):
        return all(np.array_equal(x[0], x[1]) for x in jax.tree.leaves(tree))

    matrices = [
        [x for x in jax.tree.leaves(state.params) if x.ndim > 2] for state in (before, after)]
    views = after.env_state.obs.agents_view
    return {
        "parameters equal at the start": same(before.params),
        "parameters equal": same((after.params, after.opt_state)), "metrics equal": same(metrics),
        "parameters moved": not any(np.array_equal(x, y) for x, y in zip(*matrices)),
        "start states equal": same(before.env_state.obs.agents_view),
        "observations equal": same(views),
        # how often agent 0 played what
        "actions equal": same(after.env_state.game.counts.sum(axis=2)),
        "keys equal": same(after.key), "shape of observations": list(views.shape[:3]),
    }


def keys_of_two(script):
    """The keys that `train` gives two devices, lists with an entry for each, and those of the
    evaluations, which one device plays."""
    import numpy as np
    from test_glue import train_with_stand_ins

    with tempfile.TemporaryDirectory() as folder:
        flags = {"num_devices": 2, "num_evals": 2, "total_timesteps": 64}
        loop = train_with_stand_ins(script, folder, **flags)
        with np.load(f"{folder}/checkpoint_0.npz") as file:
            first, params = file["arr_0"].tolist(), file["arr_2"].tolist()
    evaluations = [key.tolist() for _, key in loop.evaluations]
    return {"parameters": params, "start": first, "evaluations": evaluations}


if __name__ == "__main__":
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_disable_most_optimizations", True)  # a third of the time to compile
    report = {"gradient": {param.id: gradient_difference(param.values[0]) for param in GRADIENT},
              "training": {param.id: train_on_two(param.values[0]) for param in TRAINING},
              "loop": {param.id: keys_of_two(param.values[0]) for param in LOOP}}
    print(json.dumps(report))
    sys.exit()


@pytest.fixture(scope="module")
def report():
    """What this file prints when run."""
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.path.dirname(os.path.dirname(__file__)),
    }
    result = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("script", [param.id for param in GRADIENT])
def test_gradient_is_that_of_one_device(report, script):
    """The mean of two devices' gradients is one device's on all samples, with advantages normalised
    over both."""
    assert report["gradient"][script] < 1e-5


@pytest.mark.parametrize("script", [param.id for param in TRAINING])
def test_parameters_stay_equal(report, script):
    """After an iteration parameters, optimizer states and metrics are the same to the bit on both,
    and have moved."""
    for name in (
        "parameters equal at the start", "parameters equal", "metrics equal", "parameters moved",
    ):
        assert report["training"][script][name], name


@pytest.mark.parametrize("script", [param.id for param in TRAINING])
def test_experience_differs(report, script):
    """Each device has its half of the environments, and start states, actions and keys of its
    own."""
    assert report["training"][script]["shape of observations"] == [2, 4, 2]
    for name in ("start states equal", "observations equal", "actions equal", "keys equal"):
        assert not report["training"][script][name], name


@pytest.mark.parametrize("script", [param.id for param in LOOP])
def test_each_device_has_keys_of_its_own(report, script):
    """D13: both devices have one key for the parameters, and each its own for all else; each
    evaluation has one, too."""
    keys = report["loop"][script]
    first, second = keys["parameters"]
    assert first == second
    assert len(keys["evaluations"]) == 3
    assert len({tuple(key) for key in [first, *keys["start"], *keys["evaluations"]]}) == 1 + 2 + 3
