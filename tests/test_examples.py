"""Tests of the examples that use a finished run."""

import functools
import importlib
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_obs, read_rows, scripts_with, slow
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import save_file

from examples import enjoy, use_learner

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = scripts_with("Learner", "main", feed_forward=True)[:1]
SIZES = {"guider": "mat", "embed_dim": 4, "learner_hidden_dim": 8}

pytestmark = pytest.mark.usefixtures("quick_compile")


def make_run(script, env_id, scenario, folder, **flags):
    """What the examples read of a run, whose last networks are as they start and whose best are
    others -> args, env, networks .., parameters of the last."""
    args = script.Args(env_id=env_id, scenario=scenario, num_envs=1, num_devices=1, **flags)
    env = script.make_env(env_id, scenario)
    parts = (args, env, *script.make_networks(args, env))
    init = functools.partial(script.init_state, *parts)
    params = jax.jit(lambda *keys: init(*keys).params)(*jax.random.split(jax.random.PRNGKey(0)))
    for name, tree in params.items():
        arrays = flatten_dict(jax.device_get(tree), sep=",")
        save_file(arrays, folder / f"{name}.safetensors")
        others = {name: x + 1 for name, x in arrays.items()}
        save_file(others, folder / f"best_{name}.safetensors")
    about = {"script": script.SCRIPT, "args": vars(args), "starts": []}
    (folder / "args.json").write_text(json.dumps(about))
    return *parts, params


@pytest.fixture(scope="module", params=SCRIPTS + slow(scripts_with("init_hidden")))
def finished(request, tmp_path_factory):
    """A script, the folder of a run of it, and what `make_run` returns."""
    script, folder = request.param, tmp_path_factory.mktemp("run")
    parts = make_run(script, "CoordSum-v0", "2x3-4", folder, eval_episodes=4, **SIZES)
    return script, folder, parts


@pytest.mark.parametrize("flags", [
    ["--guider", "--which", "last", "--greedy"], pytest.param([], marks=pytest.mark.slow)], ids=str)
def test_enjoy(finished, flags, call, tmp_path):
    """Figures with an interval, and a GIF of as many frames as asked for."""
    _, folder, _ = finished
    gif = tmp_path / "episode.gif"
    status, out, _ = call(enjoy, folder, "--episodes", 8, "--gif", gif, "--max-frames", 4, *flags)
    assert status is None
    assert re.search(r"mean return: \d+\.\d+ \+- \d+\.\d+", out)
    assert "mean length: 100.000 +- 0.000" in out and "4 states" in out
    with Image.open(gif) as picture:
        assert picture.format == "GIF" and 1 < picture.n_frames <= 4


def test_enjoy_gives_the_figures_of_the_run(finished):
    """The last networks, played with the key of an evaluation, have its very return."""
    script, folder, (*parts, params) = finished
    key = jax.random.PRNGKey(1)
    row = jax.jit(functools.partial(script.evaluate, *parts))(params, key)
    for name in ("learner", "guider"):
        options = enjoy.Options(folder, episodes=4, which="last", guider=name == "guider")
        _, env, act, make_hidden = enjoy.load_team(options)
        hidden = [make_hidden(4)] if make_hidden else []
        episode = script.play(env, act, *hidden, 4, key)
        assert np.mean(episode["return"]) == row[f"eval/{name}_return"]


def test_use_learner_decides_as_the_script(finished):
    """The actions are the script's greedy ones, step after step, also after an episode's end."""
    script, folder, _ = finished
    found, args = use_learner.load_script(folder)
    env = script.make_env(args.env_id, args.scenario)
    learner, params = use_learner.load_learner(script, args, env, folder / "learner.safetensors")
    assert found is script
    params = jax.tree.map(lambda x: 5 * x, params)  # so that the actions differ
    own_hidden = [jnp.ones(8)] * 2
    hidden = jnp.ones((1, 2, 8))
    taken = []
    for seed, timestep in enumerate([0.0, 1.0, 2.0, 0.0, 1.0]):
        obs = random_obs(script, seed, 1, 2, 3, num_features=3)
        key = jax.random.PRNGKey(0)
        if hasattr(script, "init_hidden"):
            past = (jnp.full(1, timestep), hidden)
            expected, _, hidden = script.learner_act(learner, params, obs, *past, key, greedy=True)
        else:
            expected, _ = script.learner_act(learner, params, obs, key, greedy=True)
        for j in range(2):
            inputs = (learner, params, jax.tree.map(lambda x: x[0, j], obs))
            if hasattr(script, "init_hidden"):
                results = use_learner.decide_with_memory(*inputs, timestep, own_hidden[j])
                action, own_hidden[j] = results
            else:
                action = use_learner.decide(*inputs)
            assert action == expected[0, j]
            taken.append(int(action))
    assert len(set(taken)) > 1


@pytest.mark.parametrize("example", [enjoy, use_learner])
def test_no_run(example, call, tmp_path):
    """A folder that is no run, or one of an earlier version, ends in one line that names it, status
    2."""
    for text in ("No such file", "an earlier version made it"):
        status, out, err = call(example, tmp_path)
        assert (status, out, len(err.splitlines())) == (2, "", 1)
        assert str(tmp_path) in err and text in err
        (tmp_path / "args.json").write_text('{"script": "magpo_ff.py", "args": {}}')


def test_a_copy_beside_the_run_comes_first(monkeypatch, tmp_path):
    """It made the run, and not the repository's script of the same name."""
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text('{"script": "magpo_ff.py", "args": {}, "starts": []}')
    (tmp_path / "magpo_ff.py").write_text("Args = dict\n")
    monkeypatch.delitem(sys.modules, "magpo_ff", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    script, _ = use_learner.load_script(folder)
    assert script.__file__ == str(tmp_path / "magpo_ff.py")


OWN_ENV = """
import jax.numpy as jnp
import jumanji

from examples.my_env import Meet


class Blind(Meet):
    animate = None


jumanji.register(id="Blind-v0", entry_point="blind:Blind")
"""


def test_enjoy_own_environment(call, tmp_path, monkeypatch):
    """The example's environment is drawn, after figures of all episodes; one that cannot be says
    what it needs, in one line."""
    script = SCRIPTS[0].values[0]
    gif = tmp_path / "team.gif"
    flags = ["--episodes", 4, "--gif", gif, "--max-frames", 3]
    make_run(script, "examples.my_env:Meet-v0", "", tmp_path, **SIZES)
    played = {"return": [1.0, 2, 3, 6], "length": [10.0] * 4, "won": [1.0, 0, 0, 0]}
    monkeypatch.setattr(script, "play", lambda *_: {x: jnp.array(y) for x, y in played.items()})
    status, out, _ = call(enjoy, tmp_path, *flags)
    assert status is None
    assert [line.partition(" (")[0] for line in out.splitlines()[:3]] == [  # 1.96 std / sqrt(4)
        "mean return: 3.000 +- 2.117", "mean length: 10.000 +- 0.000", "win rate: 0.250 +- 0.490"]
    with Image.open(gif) as picture:
        assert picture.n_frames == 3
    for name in ("team", "nowhere/team.gif"):
        status, out, err = call(enjoy, tmp_path, "--gif", tmp_path / name)
        assert (status, out, len(err.splitlines())) == (2, "", 1) and name in err

    (tmp_path / "blind.py").write_text(OWN_ENV)
    monkeypatch.chdir(tmp_path)
    make_run(script, "blind:Blind-v0", "", tmp_path, **SIZES)
    status, _, err = call(enjoy, tmp_path, *flags)
    assert status == 2 and len(err.splitlines()) == 1
    assert "--gif" in err and "animate(" in err


def test_learner_of_a_copy(call, tmp_path):
    """A script that lies beside its runs is found, with networks of its own; one that is nowhere is
    named, with the folders that were searched."""
    script = SCRIPTS[0].values[0]
    text = pathlib.Path(script.__file__).read_text()
    layer = "x = nn.relu(Dense(self.hidden_dim)(x))\n"
    assert text.count(layer) == 1
    (tmp_path / "deeper.py").write_text(text.replace(layer, layer + "        " + layer))
    (tmp_path / "runs" / "one").mkdir(parents=True)
    sys.path.insert(0, str(tmp_path))
    try:
        copy = importlib.import_module("deeper")
    finally:
        sys.path.remove(str(tmp_path))
    make_run(copy, "CoordSum-v0", "2x3-4", tmp_path / "runs" / "one", **SIZES)
    status, out, _ = call(use_learner, tmp_path / "runs" / "one")
    assert status is None and out.startswith("100 steps")
    assert call(enjoy, tmp_path / "runs" / "one", "--episodes", 2)[0] is None
    (tmp_path / "deeper.py").unlink()
    for example in (use_learner, enjoy):
        status, _, err = call(example, tmp_path / "runs" / "one")
        assert status == 2 and len(err.splitlines()) == 1
        assert "deeper.py" in err and str(tmp_path) in err and str(ROOT) in err


# ------------------------------------------------------------------------------------------ the zoo
ZOO = sorted(path.parent for path in (ROOT / "zoo").glob("*/args.json"))


@pytest.mark.parametrize("folder", [
    pytest.param(folder, id=folder.name, marks=[] if "10=10" in folder.name else pytest.mark.slow)
    for folder in ZOO])
def test_zoo(folder, call):
    """Each trained learner can be loaded and plays an episode, and so does its guider."""
    best = max(row["eval/learner_return"] for row in read_rows(folder))
    status, out, _ = call(enjoy, folder, "--episodes", 32)
    assert status is None and out.startswith("mean return: ")
    assert abs(float(out.split()[2]) - best) < 0.3 * abs(best)
    assert call(enjoy, folder, "--guider", "--episodes", 2)[0] is None
    assert call(use_learner, folder)[0] is None


def test_zoo_is_whole():
    """Nine runs, which take little room."""
    files = [path for path in (ROOT / "zoo").rglob("*") if path.is_file()]
    assert len(ZOO) == 9 and sum(path.stat().st_size for path in files) < 3e6
