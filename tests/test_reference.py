"""Two iterations of every script are those of the plain reference, most of them on two devices.

The number of CPU devices must be set before JAX's first use, hence a process of its own: this file
is its program, too. `python tests/test_reference.py magpo_rec` runs one case.
"""

import functools
import importlib
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from conftest import has_memory, make_parts, random_like
from reference import pick, stacked, to_host

FLAGS = {
    "num_envs": 4, "num_steps": 4, "num_minibatches": 2, "update_epochs": 2, "gamma": 0.9,
    "gae_lambda": 0.8, "clip_coef": 0.1, "ent_coef": 0.05, "vf_coef": 0.7, "learning_rate": 0.05,
    "max_grad_norm": 0.5, "anneal_lr": True, "total_timesteps": 20 * 16,
}
# A head of two features would tell little more than a sign, after its norm.
GUIDER = {"embed_dim": 8, "num_heads": 2, "guider_mlp": False}
MAGPO = GUIDER | {"delta": 1.2, "learner_rl_coef": 0.6}
CASES = {  # script and what is special -> reference, number of devices, flags
    "magpo_ff": (reference.Magpo, 2, MAGPO),
    "magpo_ff mat": (reference.Magpo, 1, MAGPO | {"guider": "mat"}),
    "magpo_rec": (
        reference.Magpo, 2, MAGPO | {"chunk_steps": 2, "guider_reads_learner": True}),
    "magpo_rec mat": (reference.Magpo, 1, MAGPO | {"guider": "mat"}),
    "ctds_ff": (reference.Magpo, 2, GUIDER),
    "mappo_ff": (reference.Mappo, 2, {}),
    "mappo_rec": (reference.Mappo, 2, {}),
    "happo_rec": (reference.Happo, 2, {}),
    "magpo_ff_residual": (reference.Residual, 2, MAGPO | {"reset_every": 2}),
    "magpo_ff_state": (reference.Magpo, 2, MAGPO),
    "magpo_ff_adaptive continuous": (reference.Adaptive, 1, MAGPO | {"target_kl": 0.1}),
}


class Game:
    """Every start has a number, its tag, which says how long the episode is (1 to 5 steps), how it
    ends (odd: terminated, even: truncated), and whether it is won. Agents have rewards of their
    own, which depend on all actions; what is legal changes."""

    num_agents, num_actions, own_rewards = 3, 3, True

    def __init__(self, script, continuous):
        self.script, self.continuous = script, continuous
        self.example_action = np.zeros((3, 3)) if continuous else np.zeros(3, np.int32)

    def make_state(self, tag, time, done, episode):
        agents = jnp.arange(3)
        view = [jnp.eye(3), jnp.full((3, 1), tag / 2**22), jnp.full((3, 1), time), done[:, None]]
        legal = (tag + time + agents[:, None] + agents) % 4 > 0
        obs = [jnp.concatenate(view, axis=1), legal | self.continuous]
        if "global_state" in self.script.Observation._fields:
            obs.append(jnp.stack([tag / 2**20, time, jnp.sum(done)]))
        return self.script.EnvState((tag, time), self.script.Observation(*obs), episode)

    def reset(self, key):
        tag = jax.random.randint(key, (), 1000, 2**23)
        zeros = dict.fromkeys(("return", "length", "won"), jnp.zeros(()))
        return self.make_state(tag, jnp.zeros((), int), jnp.zeros(3), zeros)

    def step(self, state, action):
        tag, time = state.game[0], state.game[1] + 1
        done = jnp.tanh(action).sum(axis=-1) if self.continuous else action - 1.0
        last = time == 1 + tag % 5
        reward = 3 + jnp.arange(3) * jnp.cos(tag + time) * done - jnp.sum(done) ** 2
        now = {"return": jnp.mean(reward), "length": 1.0, "won": last & (tag % 3 == 0)}
        episode = jax.tree.map(jnp.add, state.episode, now)
        discount = jnp.where(last & (tag % 2 == 1), 0.0, 1.0)
        return self.make_state(tag, time, done, episode), reward, discount, last


def first_states(script, parts, algorithm, num_devices):
    """States (D, ..) of the script in double precision, with random parameters."""
    keys = jax.random.split(jax.random.PRNGKey(0), num_devices)
    shapes = jax.eval_shape(functools.partial(script.init_state, *parts), keys[0], keys[0])
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, float if x.dtype.kind == "f" else int), shapes)
    params = random_like(3, shapes.params, scale=0.7)
    states = []
    for key in keys:
        starts = jax.random.split(key, parts[0].num_envs // num_devices)
        games = stacked(*[algorithm.reset(start) for start in starts])
        states.append(zeros._replace(params=params, env_state=games, key=key))
    return stacked(*states)


def as_reference(script, args, states):
    """The script's states (D, ..) as the reference has them; the first device's where all agree."""
    states = to_host(states)
    first, adam = pick(states, 0), {}
    nothing = dict.fromkeys(first.params)
    games, hidden = ([[] for _ in states.key] for _ in range(2))
    for d, b in np.ndindex(states.env_state.episode["length"].shape):
        games[d].append(pick(states.env_state, (d, b)))
        hidden[d].append(pick(states.hidden, (d, b)) if has_memory(script) else nothing)
    for network in first.params:
        inner = first.opt_state.inner_states[network]
        mu, nu = (optax.tree.get(inner, name)[network] for name in ("mu", "nu"))
        adam[network] = {"count": optax.tree.get(inner, "count"), "mu": mu, "nu": nu}
    log_delta = getattr(first, "log_delta", np.log(getattr(args, "delta", np.inf)))
    scale, iteration = first.value_scale, first.iteration
    return reference.State(
        first.params, adam, games, hidden, list(states.key), scale, iteration, log_delta)


def compare(found, expected):
    def close(path, x, y):
        place = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-8, err_msg=place)

    jax.tree_util.tree_map_with_path(close, found, to_host(expected))


def check(name):
    """One iteration of the script alone, so that games and memories are under way, and then two,
    which have to be those of the reference."""
    kind, num_devices, flags = CASES[name]
    script = importlib.import_module(name.split()[0])
    game = Game(script, "continuous" in name)
    parts = make_parts(script, game, **FLAGS | flags, num_devices=num_devices)
    algorithm = kind(script, *parts)
    states = first_states(script, parts, algorithm, num_devices)
    iterate = functools.partial(script.train_iteration, *parts)
    devices = jax.devices()[:num_devices]
    iterate = jax.pmap(iterate, "device", devices=devices).lower(states).compile()
    states, _ = iterate(states)
    if num_devices == 1:
        states = states._replace(iteration=states.iteration + 12)
    else:  # as if there had been no rewards
        states = states._replace(value_scale=0 * states.value_scale)
    state = as_reference(script, parts[0], states)
    for _ in range(2):
        states, metrics = iterate(states)
        state, expected = reference.iterate(algorithm, state)
        compare(as_reference(script, parts[0], states), state)
        names = metrics.keys() - {"observation", "reward", "target"}
        compare(*({name: x[name] for name in names} for x in (pick(metrics, 0), expected)))
        shared = to_host((states.params, states.opt_state, metrics))
        assert all((x == x[:1]).all() for x in jax.tree.leaves(shared))  # on all devices


def main(names):
    """Prints what is wrong with each of the cases, "" if nothing is."""
    root = pathlib.Path(__file__).parent.parent
    sys.path += map(str, (root, root / "baselines", root / "variants"))
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    report = dict.fromkeys(names, "")
    for name in names:
        try:
            check(name)
        except AssertionError as error:
            report[name] = f"not as the reference: {error}"
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
    sys.exit()


MAT = [name for name in CASES if name.endswith("mat")]  # its parts are tested in test_networks.py


@pytest.mark.parametrize("names", [
    [name for name in CASES if name not in MAT], pytest.param(MAT, marks=pytest.mark.slow)])
def test_two_iterations(names, environ):
    """All in one process, for its first case alone compiles much that others need, too."""
    done = subprocess.run(
        [sys.executable, __file__, *names], env=environ, capture_output=True, text=True,
        timeout=3000)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(names, "")
