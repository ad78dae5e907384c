"""Tests of what a run leaves behind: checkpoints, resuming, every kind of stop, the networks."""

import contextlib
import json
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import CLOCKS, read_rows, run_folder, run_program, scripts_with, slow

SCRIPTS = scripts_with("Args", "main", "load_checkpoint")
SCRIPT = SCRIPTS[0].values[0]  # saving is the same text in all scripts, see test_shape.test_twins
TINY = """--env-id CoordSum-v0 --scenario 2x3-4 --num-envs 4 --num-steps 8 --eval-episodes 4
          --embed-dim 8 --learner-hidden-dim 8 --num-minibatches 2 --update-epochs 2""".split()
BUDGET = ["--total-timesteps", "640", "--num-evals", "4"]  # an evaluation after every 160 steps
HALF = ["--total-timesteps", "320", "--num-evals", "2"]
LONG = ["--total-timesteps", "20000", "--num-evals", "5"]
SIGNALS = ["SIGTERM", *slow(map(pytest.param, ["SIGINT", "SIGHUP", "SIGUSR1"]))]
NETWORKS = ["learner", "guider", "best_learner", "best_guider"]


def start_run(script, flags, run_dir, environ):
    """A finished run -> its folder."""
    run_program(script.__file__, [*TINY, *flags, "--run-dir", run_dir], environ)
    return run_folder(run_dir)


def assert_same_run(folder, other):
    """Both runs have the same rows and the same networks, to the last bit."""
    assert read_rows(folder, CLOCKS) == read_rows(other, CLOCKS)
    for name in NETWORKS:
        file = f"{name}.safetensors"
        assert (folder / file).read_bytes() == (other / file).read_bytes(), name


# -------------------- Going on --------------------------------------------------------------------
@pytest.fixture(scope="module")
def whole(environ, tmp_path_factory):
    """whole(script, *flags) -> the folder of an uninterrupted run, made once."""
    made = {}

    def make(script, *flags):
        key = (script.__name__, *flags)
        if key not in made:
            made[key] = start_run(script, flags, tmp_path_factory.mktemp("whole"), environ)
        return made[key]

    return make


CASES = [(script.values[0], devices) for script in SCRIPTS for devices in (2, 1)]
DEVICES = CASES[:1] + slow(pytest.param(*case) for case in CASES[1:])


@pytest.mark.parametrize("script, devices", DEVICES, ids=lambda x: getattr(x, "__name__", x))
def test_resumed_equals_uninterrupted(script, devices, whole, environ, tmp_path):
    """k iterations, a new process, k more: the very rows and networks of 2 k in one process."""
    flags = ["--num-devices", str(devices)]
    folder = start_run(script, [*HALF, *flags], tmp_path, environ)
    assert len(read_rows(folder)) == 3
    run_program(script.__file__, ["--resume", folder, *BUDGET], environ)
    assert_same_run(folder, whole(script, *BUDGET, *flags))
    about = json.loads((folder / "args.json").read_text())
    assert about["args"]["total_timesteps"] == 640


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--total-timesteps", "320"]])
def test_resuming_a_finished_run(flags, whole, environ, tmp_path):
    """Nothing is left to do, also in a moved folder; nothing is made where it is called."""
    finished = whole(SCRIPT, *BUDGET)
    folder = pathlib.Path(shutil.copytree(finished, tmp_path / "moved" / finished.name))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environ = {k: x for k, x in environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = run_program(SCRIPT.__file__, ["--resume", folder, *flags], environ, elsewhere)
    assert "nothing to do" in done.stdout
    assert_same_run(folder, finished)
    assert list(elsewhere.iterdir()) == []


ODD_ENV = """
import coordsum, jax, jumanji
import jax.numpy as jnp

class Odd(coordsum.CoordSum):
    def reset(self, key):
        state, timestep = super().reset(jax.random.key(jax.random.bits(key)))
        return state.replace(episode_return=jnp.bfloat16(0)), timestep

    def step(self, state, action):
        state, timestep = super().step(state, action)
        level = state.episode_return.astype(jnp.bfloat16)
        reward = timestep.reward + level.astype(jnp.float32)
        return state.replace(episode_return=level), timestep.replace(reward=reward)

jumanji.register(id="Odd-v0", entry_point=f"{__name__}:Odd")
"""


@pytest.mark.slow  # the packing itself is in test_continuous.py
def test_state_that_numpy_cannot_hold(environ, tmp_path):
    """Typed keys and bfloat16 in the environment's state are saved, and resumed to the bit."""
    (tmp_path / "odd.py").write_text(ODD_ENV)
    flags = [*TINY, "--env-id", "odd:Odd-v0", "--scenario", ""]
    for name, budget in (("whole", BUDGET), ("half", HALF)):
        run_program(SCRIPT.__file__, [*flags, *budget, "--run-dir", name], environ, tmp_path)
    half = run_folder(tmp_path / "half")
    run_program(SCRIPT.__file__, ["--resume", half, *BUDGET], environ, tmp_path)
    assert_same_run(half, run_folder(tmp_path / "whole"))


def test_nobody_reads_on(environ, tmp_path):
    """`| head -1` does not cost the checkpoint of the first evaluation."""
    command = [sys.executable, SCRIPT.__file__, *TINY, *BUDGET, "--run-dir", str(tmp_path)]
    line = subprocess.run(
        f"{shlex.join(command)} | head -1", shell=True, env=environ, capture_output=True, text=True)
    assert len(line.stdout.splitlines()) == 1
    folder = run_folder(tmp_path)
    assert len(list(folder.glob("checkpoint_0.npz"))) == 1 and len(read_rows(folder)) >= 1


@contextlib.contextmanager
def started(flags, run_dir, environ, line, handler=signal.SIG_DFL):
    """A run that has just printed this line; handler: what it inherits for Ctrl-C and SIGHUP."""
    command = [sys.executable, SCRIPT.__file__, *TINY, *flags, "--run-dir", str(run_dir)]
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, handler) for number in numbers]
    process = subprocess.Popen(
        command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for number, own in zip(numbers, before):
        signal.signal(number, own)
    try:
        while not process.stdout.readline().startswith(line):
            assert process.poll() is None, process.stderr.read()
        yield process
    finally:
        process.kill()


@pytest.mark.parametrize("name", SIGNALS)
def test_signals_end_a_run_in_good_order(name, environ, tmp_path):
    """Ctrl-C and what schedulers send save in mid-interval, and exit with 128 + number."""
    with started(LONG, tmp_path, environ, "global_step=4000 ") as process:
        process.send_signal(signal.Signals[name])
        out, err = process.communicate(timeout=60)
    folder = run_folder(tmp_path)
    assert process.returncode == 128 + signal.Signals[name]
    assert err == f"{SCRIPT.__name__}.py: interrupted, --resume {folder} goes on\n"
    assert folder.name in out
    assert (folder / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert 2 <= len(read_rows(folder)) < 6


@pytest.mark.slow
def test_ignored_signals_stay_ignored(environ, tmp_path):
    """What nohup does: a run goes on after SIGHUP, and one in the background after SIGINT."""
    with started(HALF, tmp_path, environ, SCRIPT.__name__, signal.SIG_IGN) as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, "") and len(read_rows(run_folder(tmp_path))) == 3


@pytest.mark.slow
def test_killed_run_goes_on(whole, environ, tmp_path):
    """After SIGKILL the rows that followed the last checkpoint come again, and none is doubled."""
    with started(LONG, tmp_path, environ, "global_step=4000 ") as process:
        process.kill()
        process.communicate(timeout=60)
    folder = run_folder(tmp_path)
    text = (folder / "metrics.jsonl").read_text().replace("\n", "\r\n")  # as Windows may leave it
    torn = '{"global_step": 1, "a row after the checkpoint": 1}\n{"a torn'
    (folder / "metrics.jsonl").write_text(text + torn)
    run_program(SCRIPT.__file__, ["--resume", folder], environ)
    assert_same_run(folder, whole(SCRIPT, *LONG))
    assert len(list(folder.glob("checkpoint_*"))) == 1


# -------------------- What is saved ---------------------------------------------------------------
def test_networks_can_be_read_without_jax(whole):
    """Flat names and plain arrays; the best networks are those of the best evaluation."""
    folder = whole(SCRIPT, *BUDGET)
    learner = safetensors.numpy.load_file(folder / "learner.safetensors")
    assert learner["params,Dense_0,kernel"].shape == (2 + 1, 8)
    guider = safetensors.numpy.load_file(folder / "guider.safetensors")
    assert guider["params,encoder_0_0,query,kernel"].shape == (8, 8)
    returns = [row["eval/learner_return"] for row in read_rows(folder)]
    best, last = (folder / f"{prefix}learner.safetensors" for prefix in ("best_", ""))
    assert (best.read_bytes() == last.read_bytes()) == (max(returns) == returns[-1])


def test_checkpoint_comes_back_as_it_was(tmp_path):
    """Structure, shapes, types and values, of arrays and of the progress."""
    tree = {"a": np.arange(6, dtype=np.int8).reshape(2, 3).T, "b": (np.float32(1.5), np.zeros(0))}
    progress = {"iteration": 10, "rows": [{"x": 0.1, "y": 1e300}], "sums": {"losses/a": 1 / 3}}
    path = tmp_path / "checkpoint_0.npz"
    SCRIPT.save_checkpoint(path, jax.tree.map(np.zeros_like, tree), {"iteration": 9})
    SCRIPT.save_checkpoint(path, tree, progress)
    loaded, same_progress = SCRIPT.load_checkpoint(path, tree)
    jax.tree.map(np.testing.assert_array_equal, tree, loaded)
    assert jax.tree.map(lambda x: x.dtype, tree) == jax.tree.map(lambda x: x.dtype, loaded)
    assert same_progress == progress
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint_0.npz"]


def test_every_damage_is_noticed(tmp_path, capsys):
    """A flipped byte or a cut anywhere in a checkpoint is refused in one line, never read; so are
    arrays of other shapes or types."""
    tree = {"a": np.arange(8.0), "b": np.ones((2, 2), bool)}
    path = tmp_path / "checkpoint_0.npz"
    SCRIPT.save_checkpoint(path, tree, {"iteration": 1})
    data = path.read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for place in rng.integers(len(data), size=200):
        flipped = bytearray(data)
        flipped[place] ^= 1
        for damaged in (bytes(flipped), data[:place]):
            path.write_bytes(damaged)
            try:
                loaded, _ = SCRIPT.load_checkpoint(path, tree)
            except SystemExit as exit:
                err = capsys.readouterr().err
                assert exit.code == 2 and str(path) in err and len(err.splitlines()) == 1
                refused += 1
            else:  # the byte was one that a zip does not use, such as a date
                jax.tree.map(np.testing.assert_array_equal, loaded, tree)
    assert refused > 300
    path.write_bytes(data)
    for like in (tree | {"a": np.arange(8)}, tree | {"a": np.arange(9.0)}, {"a": np.arange(8.0)}):
        with pytest.raises(SystemExit):
            SCRIPT.load_checkpoint(path, like)
    np.savez(tmp_path / "other.npz", np.zeros(3))
    for data in (b"", (tmp_path / "other.npz").read_bytes()):
        path.write_bytes(data)
        with pytest.raises(SystemExit):
            SCRIPT.load_checkpoint(path, tree)


# -------------------- Refusals --------------------------------------------------------------------
def snapshot(folder):
    """What the files of a folder hold, without args.json, which a run that goes on writes anew."""
    return {x.name: x.read_bytes() for x in folder.iterdir() if x.name != "args.json"}


DAMAGES = {  # a file, what becomes of its bytes (None: it is gone), what the line says
    "no args.json": ("args.json", lambda data: None, "is no run of magpo"),
    "args.json is cut": ("args.json", lambda data: data[:20], "is no run of magpo"),
    "another script": (
        "args.json", lambda data: data.replace(b'"script": "', b'"script": "my_'),
        f"it is one of my_{SCRIPT.__name__}.py"),
    "unknown flag": (
        "args.json", lambda data: data.replace(b'"seed"', b'"no_such_flag": 1, "seed"'),
        "no_such_flag"),
    "no checkpoint": ("checkpoint_0.npz", lambda data: None, "No such file"),
}


@pytest.mark.parametrize("file, change, text", DAMAGES.values(), ids=DAMAGES)
def test_unusable_folders(file, change, text, whole, call, tmp_path):
    """One line that names --resume, exit status 2, and nothing is touched or made."""
    finished = whole(SCRIPT, *BUDGET)
    folder = pathlib.Path(shutil.copytree(finished, tmp_path / finished.name))
    data = change((folder / file).read_bytes())
    (folder / file).unlink()
    if data is not None:
        (folder / file).write_bytes(data)
    before = snapshot(folder)
    for path, reason in ((folder, text), (tmp_path / "nothing", "nothing: is no run of magpo")):
        status, _, err = call(SCRIPT, "--resume", path, "--total-timesteps", 6400)
        assert (status, len(err.splitlines())) == (2, 1), err
        assert "--resume" in err and reason in err
    assert snapshot(folder) == before and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("flags", [
    "--seed 2", "--delta 2.0", "--num-envs 8", "--env-id RobotWarehouse-v0", "--guider mat",
    "--learning-rate 2e-3", "--anneal-lr", "--num-devices 2", "--exp-name other"])
def test_flags_that_may_not_change(flags, whole, call):
    """Another value of a flag that makes the run what it is, is refused by its name."""
    folder = whole(SCRIPT, *BUDGET)
    before, about = snapshot(folder), (folder / "args.json").read_bytes()
    status, out, err = call(SCRIPT, "--resume", folder, *flags.split())
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert flags.split()[0] in err and "total_timesteps" in err
    assert (snapshot(folder), (folder / "args.json").read_bytes()) == (before, about)


# -------------------- Disks -----------------------------------------------------------------------
@pytest.mark.slow
def test_full_disk(environ, tmp_path):
    """The first file that does not fit ends the run in one line, status 1; no part of it stays."""
    limit = ["sh", "-c", 'ulimit -f 40; exec "$@"', "sh"]  # 40 blocks of 512 bytes a file
    command = [*limit, sys.executable, SCRIPT.__file__, *TINY, *HALF, "--run-dir", str(tmp_path)]
    no_cache = {k: x for k, x in environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    no_cache["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    done = subprocess.run(command, env=no_cache, capture_output=True, text=True, timeout=400)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(r"cannot write \S+/learning_curve.png: File too large", done.stderr)
    assert list(tmp_path.glob("*/*.new")) == []


@pytest.mark.slow
def test_vanished_folder(environ, tmp_path):
    """So does a folder that is no longer there."""
    with started(LONG, tmp_path, environ, "global_step=0 ") as process:
        # unlike removing it, moving it takes one step, even while the run writes into it
        run_folder(tmp_path).rename(tmp_path / ".moved")
        _, err = process.communicate(timeout=100)
    assert process.returncode == 1 and len(err.splitlines()) == 1, err
    assert re.search(r"cannot write \S+: No such file or directory", err)
