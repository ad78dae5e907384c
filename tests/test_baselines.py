"""Tests of the baselines: who sees what, runs, and flags. Training: test_reference.py."""

import dataclasses
import functools
import importlib
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    METRICS,
    TINY,
    ScriptedEnv,
    first_state,
    has_memory,
    make_parts,
    on_one_device,
    random_obs,
    random_params,
    read_rows,
    run_folder,
)
from test_cli import test_every_flag_is_read as check_that_flags_are_read
from test_examples import make_run
from test_glue import num_iterations, train_with_stand_ins

import magpo_ff
from examples import enjoy, use_learner

ROOT = pathlib.Path(__file__).parent.parent
sys.path.append(str(ROOT / "baselines"))
mappo_ff, mappo_rec, happo_rec = map(
    importlib.import_module, ("mappo_ff", "mappo_rec", "happo_rec"))
BASELINES = [pytest.param(x, id=x.__name__) for x in (mappo_ff, mappo_rec, happo_rec)]

pytestmark = pytest.mark.usefixtures("quick_compile")
for_each_baseline = pytest.mark.parametrize("script", BASELINES)


# -------------------- The critic ------------------------------------------------------------------
@pytest.mark.parametrize("script", BASELINES[:2])  # HAPPO's has the text of the second one
def test_critic_sees_all(script):
    """The value depends on the views of all agents, and with memory on earlier steps of the same
    episode, on no later ones and on no other game."""
    obs, past, seen = random_obs(script, 0, (2, 3), 3, 4), (), np.eye(3, dtype=bool)
    if has_memory(script):
        timestep = np.array([[1.0, 2, 0], [0, 1, 2]])  # an episode begins inside
        past = jnp.asarray(timestep), jnp.ones((2, 8))
        lag = np.arange(3)[:, None] - np.arange(3)
        seen = (lag >= 0) & (lag <= timestep[..., None])  # (M, T, T)
    critic = script.Critic(8, 3)
    params = random_params(critic, 1, obs, *past)

    def value(view):
        found = critic.apply(params, obs._replace(agents_view=view), *past)
        return found[0] if past else found

    by_view = jax.jit(jax.jacobian(value))(obs.agents_view)  # (M, T, N) by (M, T, N, O)
    depends = np.any(by_view != 0, axis=-1)
    seen = np.broadcast_to(seen, (2, 3, 3))
    expected = np.eye(2, dtype=bool)[:, None, :, None] & seen[:, :, None]  # (M, T, M, T)
    expected = np.broadcast_to(expected[:, :, None, :, :, None], depends.shape)
    np.testing.assert_array_equal(depends, expected)


# -------------------- As programs -----------------------------------------------------------------
OF_A_GUIDER = re.compile("guider|learner_kl|delta|imitation")
METRICS = {name for name in METRICS if not OF_A_GUIDER.search(name)} | {"losses/critic_grad_norm"}


def test_training_loop(tmp_path):
    """It logs what a learner alone has played, and saves; the rest of it is in test_glue.py."""
    loop = train_with_stand_ins(mappo_ff, tmp_path)
    assert loop.saved == [0, 3, 5, 7] and len(loop.rows) == 4
    assert num_iterations(tmp_path / "best_keys.safetensors") == 0
    assert (tmp_path / "learning_curve.png").stat().st_size > 5000


@for_each_baseline
def test_values_of_agents_with_rewards_of_their_own(script):
    """MAPPO's critic has one for each, or one for the team; each agent of HAPPO has a critic."""
    env = ScriptedEnv(script)
    for own_rewards in (False, True):
        env.own_rewards = own_rewards
        parts = make_parts(script, env)
        _, rollout = on_one_device(script.collect, *parts)(first_state(script, parts))
        differ = own_rewards or script is happo_rec
        assert np.any(rollout.value[..., 0] != rollout.value[..., 1]) == differ


@for_each_baseline
def test_evaluation(script, monkeypatch):
    """The learner alone is evaluated; what an iteration returns is in test_reference.py."""
    found = jnp.array([[1.0, 3, 5, 7], [2, 2, 2, 4]])

    def play(env, act, *rest):
        assert act.func is script.learner_act and act.keywords == {"greedy": True}
        return dict(zip(("return", "length"), found))

    monkeypatch.setattr(script, "play", play)
    parts = make_parts(script, script.make_env("CoordSum-v0", "2x3-4"), eval_greedy=True)
    assert script.evaluate(*parts, {"learner": None}, None) == {
        "eval/learner_return": 4, "eval/learner_return_std": pytest.approx(5**0.5),
        "eval/episodic_length": 2.5}


def test_enjoy(call, tmp_path):
    """The example plays the very episodes of an evaluation; there is no guider."""
    sizes = {"learner_hidden_dim": 4, "critic_hidden_dim": 4, "eval_episodes": 4}
    *parts, params = make_run(happo_rec, "CoordSum-v0", "2x3-4", tmp_path, **sizes)
    key = jax.random.PRNGKey(1)
    row = jax.jit(functools.partial(happo_rec.evaluate, *parts))(params, key)
    options = enjoy.Options(tmp_path, episodes=4, which="last", max_frames=4)
    script, env, act, make_hidden = enjoy.load_team(options)
    episode = script.play(env, act, make_hidden(4), 4, key)
    assert np.mean(episode["return"]) == row["eval/learner_return"]
    states, _ = enjoy.play_episode(options, env, act, make_hidden)
    assert len(states) == 4
    for tree in params.values():  # agents start with networks of their own
        assert not np.allclose(*tree["params"]["Dense_0"]["kernel"])
    options = dataclasses.replace(options, which="best", greedy=True, max_frames=101)
    _, total = enjoy.play_episode(options, *enjoy.load_team(options)[1:])
    assert call(use_learner, tmp_path)[1] == f"100 steps, return {total:.3f}\n"

    status, _, err = call(enjoy, tmp_path, "--guider")
    assert status == 2 and "--guider: happo_rec.py has none" in err


@pytest.mark.slow
@for_each_baseline
def test_smoke(script, call, monkeypatch, tmp_path):
    """A run from another folder than the repository's root: tasks.py is found."""
    monkeypatch.chdir(tmp_path)
    i = TINY.index("--embed-dim")
    flags = [*TINY[:i], *TINY[i + 2 :], "--critic-hidden-dim", 8, "--total-timesteps", 64]
    status, out, _ = call(script, *flags, "--num-evals", 1)
    rows = read_rows(run_folder(tmp_path / "runs"))
    assert status == 0 and [row["global_step"] for row in rows] == [0, 64]
    assert rows[-1].keys() == METRICS - {"charts/episodic_return", "charts/episodic_length"}
    assert np.all(np.isfinite(list(rows[-1].values())))
    assert abs(rows[-1]["losses/first_ratio"] - 1) < 1e-5
    assert out.startswith(f"{script.__name__}.py: 2 agents, 1 x cpu")
    names = {path.stem for path in tmp_path.glob("runs/*/*.safetensors")}
    assert names == {"learner", "critic", "best_learner", "best_critic"}


# -------------------- Flags -----------------------------------------------------------------------
@for_each_baseline
def test_flags(script):
    """The flags are MAGPO's without a guider's and the tether's, and one more; each is read."""
    check_that_flags_are_read(script)
    own = {field.name for field in dataclasses.fields(script.Args)}
    magpo = {field.name for field in dataclasses.fields(magpo_ff.Args)}
    assert own - magpo == {"critic_hidden_dim"}
    guiders = {"guider", "embed_dim", "num_heads", "num_blocks", "guider_mlp"}
    assert magpo - own == guiders | {"delta", "learner_rl_coef"}


@pytest.mark.parametrize("flag, value", [
    ("--critic-hidden-dim", "0"), ("--num-minibatches", "3"), ("--ent-coef", "-1")])
@for_each_baseline
def test_bad_value(script, flag, value, call, monkeypatch, tmp_path):
    """An impossible value: exit status 2, one line that names flag and value, no folder."""
    monkeypatch.chdir(tmp_path)
    status, out, err = call(script, flag, value)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert f"{flag} {value}" in err
    assert list(tmp_path.iterdir()) == []
