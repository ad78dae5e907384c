"""Tests of the examples that use a finished run."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import has_memory, random_obs, scripts_with
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = scripts_with("Learner", "main", feed_forward=True)[:1] + scripts_with("Hidden")
TINY = """--env-id CoordSum-v0 --scenario 2x3-4 --num-envs 4 --num-steps 8 --eval-episodes 4
          --embed-dim 8 --learner-hidden-dim 8 --update-epochs 1 --guider mat
          --total-timesteps 64 --num-evals 1""".split()


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=SCRIPTS)
def finished(request, environ, tmp_path_factory):
    """A script, and the folder of a tiny run of it."""
    script, run_dir = request.param, tmp_path_factory.mktemp("runs")
    command = [sys.executable, script.__file__, *TINY, "--run-dir", str(run_dir)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder,) = run_dir.iterdir()
    return script, folder


@pytest.fixture
def call(monkeypatch, capsys):
    """call(example, *flags) -> exit status, stdout, stderr."""

    def main(name, *flags):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        try:
            status = load_example(name).main()
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return main


@pytest.mark.parametrize("flags", [[], ["--guider", "--which", "last", "--greedy"]], ids=str)
def test_enjoy(finished, flags, call, tmp_path):
    """Figures with an interval, and a GIF of as many frames as asked for."""
    _, folder = finished
    gif = tmp_path / "episode.gif"
    status, out, _ = call("enjoy", folder, "--episodes", 8, "--gif", gif, "--max-frames", 4, *flags)
    assert status is None
    assert re.search(r"mean return: \d+\.\d+ \+- \d+\.\d+", out)
    assert "mean length: 100.000 +- 0.000" in out and "4 states" in out
    with Image.open(gif) as picture:
        assert picture.format == "GIF" and 1 < picture.n_frames <= 4


def test_enjoy_gives_the_figures_of_the_run(finished, call):
    """The last networks, played with the key of the last evaluation, have its very return."""
    script, folder = finished
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    enjoy = load_example("enjoy")
    options = enjoy.Options(str(folder), episodes=4, which="last")
    _, args, env, networks, params = enjoy.load_run(options)
    eval_key = jax.random.split(jax.random.PRNGKey(args.seed), 3)[2]
    key = jax.random.split(jax.random.fold_in(eval_key, 2), 1)[0]
    learner_episodes, guider_episodes = script.evaluate(args, env, *networks, params, key)
    assert np.mean(learner_episodes.returns) == row["eval/learner_return"]
    assert np.mean(guider_episodes.returns) == row["eval/guider_return"]


def test_use_learner(finished, call):
    """One episode in which each agent decides alone."""
    _, folder = finished
    status, out, _ = call("use_learner", folder)
    assert status is None and re.fullmatch(r"100 steps, return \d+\.000\n", out)


def test_use_learner_decides_as_the_script(finished):
    """The actions are the script's greedy ones, step after step, also after an episode's end."""
    script, folder = finished
    use = load_example("use_learner")
    learner, params = use.load_learner(script, folder / "learner.safetensors")
    params = jax.tree.map(lambda x: 5 * x, params)  # so that the actions differ
    own_hidden = [jnp.ones(8)] * 2
    hidden = jnp.ones((1, 2, 8))
    taken = []
    for seed, timestep in enumerate([0.0, 1.0, 2.0, 0.0, 1.0]):
        obs = random_obs(script, seed, 1, 2, 3, num_features=3)
        key = jax.random.PRNGKey(0)
        if has_memory(script):
            past = (jnp.full(1, timestep), hidden)
            expected, hidden = script.learner_act(learner, params, obs, *past, key, greedy=True)
        else:
            expected = script.learner_act(learner, params, obs, key, greedy=True)
        for j in range(2):
            inputs = (learner, params, obs.agents_view[0, j], obs.action_mask[0, j])
            if has_memory(script):
                action, own_hidden[j] = use.decide_with_memory(*inputs, timestep, own_hidden[j])
            else:
                action = use.decide(*inputs)
            assert action == expected[0, j]
            taken.append(int(action))
    assert len(set(taken)) > 1


@pytest.mark.parametrize("example", ["enjoy", "use_learner"])
def test_no_run(example, call, tmp_path):
    """A folder that is no run ends in one line that names it, status 2."""
    status, out, err = call(example, tmp_path)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert str(tmp_path) in err


@pytest.mark.slow
@pytest.mark.parametrize(
    "env_id, scenario", [("SMAX", "3m"), ("MPE_simple_spread_v3", "simple_spread_3ag")]
)
def test_enjoy_jaxmarl(env_id, scenario, call, tmp_path, quick_compile):
    """The games of JaxMARL are drawn, too, and a win rate is among the figures."""
    script = SCRIPTS[0].values[0]
    flags = {"env_id": env_id, "scenario": scenario, "guider": "mat", "embed_dim": 4,
             "learner_hidden_dim": 4}
    args, env = script.Args(**flags, num_envs=1, num_devices=1), script.make_env(env_id, scenario)
    parts = (args, env, *script.make_networks(args, env), script.make_optimizers(args))
    keys = jax.random.split(jax.random.PRNGKey(0), (2, 1))
    params = jax.jit(jax.vmap(lambda *keys: script.init_state(*parts, *keys).params))(*keys)
    script.save_networks(str(tmp_path), "best_", params)
    about = {"script": f"{script.__name__}.py", "args": flags}
    (tmp_path / "args.json").write_text(json.dumps(about))
    gif = tmp_path / "team.gif"
    status, out, _ = call("enjoy", tmp_path, "--episodes", 2, "--gif", gif, "--max-frames", 4)
    assert status is None
    assert ("win rate: " in out) == env.has_win_rate and "4 states" in out
    with Image.open(gif) as picture:
        assert picture.format == "GIF" and picture.size == (400, 400)
        assert 1 < picture.n_frames <= 4
