"""Tests of what a run leaves behind: files, metrics, checkpoints, every kind of stop, going on."""

import collections
import contextlib
import json
import math
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import TINY, metrics_of, read_rows, run_folder, run_program, scripts_with, slow

SCRIPTS = scripts_with("Args", "main", "load_checkpoint")
SCRIPT = SCRIPTS[0].values[0]  # saving is the same text in all scripts
BUDGET = ["--total-timesteps", "3200", "--num-evals", "4"]  # 100 iterations
STEPS = [0, 800, 1600, 2400, 3200]  # of the evaluations
NETWORKS = ["learner", "guider", "best_learner", "best_guider"]

Run = collections.namedtuple("Run", "script flags done folder rows")  # done: its process
CASES = [pytest.param((script.values[0], n), id=f"{script.id}-{n}")
         for script in SCRIPTS for n in (2, 1)]


@pytest.fixture(scope="module", params=CASES[:1] + slow(CASES[1:]))
def whole(request, environ, tmp_path_factory):
    """A run of a script, on two devices or one, from its start to its end."""
    folder, (script, num_devices) = tmp_path_factory.mktemp("whole"), request.param
    flags = [*TINY, *BUDGET, "--seed", "7", "--num-devices", num_devices]
    flags += ["--guider", "mat"] if hasattr(script.Args, "guider") else []
    done = run_program(script.__file__, [*flags, "--run-dir", "out"], environ, folder)
    run_dir = run_folder(folder / "out")
    return Run(script, flags, done, run_dir, read_rows(run_dir))


# -------------------- A run -----------------------------------------------------------------------
def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


def test_files(whole):
    """A run leaves its flags, versions and command, its metrics and a picture, in a folder named
    after it."""
    name = whole.script.__name__
    assert re.fullmatch(rf"CoordSum-v0__2x3-4__{name}__7__\d+", whole.folder.name)
    about = json.loads((whole.folder / "args.json").read_text())
    assert about["script"] == f"{name}.py"
    assert about["args"].items() >= {"num_envs": 4, "scenario": "2x3-4", "seed": 7}.items()
    whole.script.Args(**about["args"])
    (start,) = about["starts"]
    assert start["versions"]["jax"] == jax.__version__ and "2x3-4" in start["command"]
    assert is_png(whole.folder / "learning_curve.png")


def test_rows(whole):
    """The documented metrics, finite, and right where they are known; evaluation comes first."""
    assert [row["global_step"] for row in whole.rows] == STEPS
    metrics, training = metrics_of(whole.script), ("charts/", "losses/")
    assert whole.rows[0].keys() == {name for name in metrics if not name.startswith(training)}
    assert all(math.isfinite(x) for row in whole.rows for x in row.values())
    for row in whole.rows:
        assert row["eval/episodic_length"] == 100 and 0 <= row["eval/learner_return"] <= 200
        gap = row["eval/guider_return"] - row["eval/learner_return"]
        assert row["eval/imitation_gap"] == pytest.approx(gap)
    for row in whole.rows[1:]:
        assert row.keys() == metrics
        assert row["charts/num_episodes"] == 800 / 100 and row["charts/episodic_length"] == 100
        assert row["losses/first_ratio"] == pytest.approx(1, abs=1e-4)
        assert row["charts/learning_rate"] == pytest.approx(1e-3)
        assert 0 < row["losses/guider_entropy"] <= math.log(3) + 1e-4
        positive = ("charts/SPS", "losses/guider_grad_norm", "losses/learner_grad_norm")
        assert all(row[name] > 0 for name in positive)
    for name in ("time/train_s", "time/eval_s"):
        assert np.all(np.diff([row[name] for row in whole.rows]) > 0)


def test_plain_lines(whole):
    """Without a terminal there is one plain line for each evaluation, and no progress bar."""
    lines = whole.done.stdout.splitlines()
    assert re.fullmatch(rf"{whole.script.__name__}.py: 2 agents, [12] x cpu", lines[0])
    found = re.findall(r"^global_step=(\d+)  ", whole.done.stdout, re.M)
    assert list(map(int, found)) == STEPS
    assert f"learner {whole.rows[-1]['eval/learner_return']:.4g}  " in lines[-2]
    assert whole.folder.name in lines[-1]
    assert not re.search("\r|\x1b|step/s", whole.done.stdout)
    assert not re.search("\r|step/s", whole.done.stderr)


def test_two_devices_differ_in_what_they_play(whole):
    """D13: each has a key of its own; that parameters are the same is in test_reference.py."""
    with np.load(whole.folder / "checkpoint_0.npz") as file:
        arrays = list(map(file.get, file.files))
    ((key, *others),) = [x for x in arrays if x.dtype == np.uint32 and x.ndim == 2]
    assert not any(np.array_equal(key, other) for other in others)


def test_networks_can_be_read_without_jax(whole):
    """Flat names and plain arrays; the best networks are those of the best evaluation."""
    learner = safetensors.numpy.load_file(whole.folder / "learner.safetensors")
    assert learner["params,Dense_0,kernel"].shape == (2 + 1, 8)
    guider = safetensors.numpy.load_file(whole.folder / "guider.safetensors")
    assert guider["params,encoder_0_0,query,kernel"].shape == (8, 8)
    returns = [row["eval/learner_return"] for row in whole.rows]
    best, last = (whole.folder / f"{prefix}learner.safetensors" for prefix in ("best_", ""))
    assert (best.read_bytes() == last.read_bytes()) == (max(returns) == returns[-1])


# -------------------- Stops, and going on ---------------------------------------------------------
def assert_same_run(folder, other):
    """Both runs have the same rows and the same networks, to the last bit."""
    assert read_rows(folder, clocks=False) == read_rows(other, clocks=False)
    for name in NETWORKS:
        file = f"{name}.safetensors"
        assert (folder / file).read_bytes() == (other / file).read_bytes(), name


@contextlib.contextmanager
def started(script, flags, run_dir, environ, line, handler=signal.SIG_DFL):
    """A run that has just printed this line; handler: what it inherits for Ctrl-C and SIGHUP."""
    command = [sys.executable, script.__file__, *map(str, flags), "--run-dir", str(run_dir)]
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


def stop(name, script, flags, run_dir, environ):
    """Sends a signal to a run after its second evaluation -> its folder, once it has ended as it
    should: saved in mid-interval, with exit status 128 + number and a line that says so."""
    with started(script, flags, run_dir, environ, "global_step=800 ") as process:
        process.send_signal(signal.Signals[name])
        out, err = process.communicate(timeout=60)
    folder = run_folder(run_dir)
    assert process.returncode == 128 + signal.Signals[name]
    assert err == f"{script.__name__}.py: interrupted, --resume {folder} goes on\n"
    assert folder.name in out and is_png(folder / "learning_curve.png")
    assert 2 <= len(read_rows(folder)) < len(STEPS)
    return folder


@pytest.mark.slow
def test_resumed_equals_uninterrupted(whole, environ, tmp_path):
    """Stopped by SIGTERM, and from there on in a new process: the very rows and networks of one
    that nobody stopped. With stand-ins for the training it is in test_glue.py."""
    folder = stop("SIGTERM", whole.script, whole.flags, tmp_path / "out", environ)
    run_program(whole.script.__file__, ["--resume", folder], environ, tmp_path)
    assert_same_run(folder, whole.folder)


@pytest.mark.slow
def test_track(environ, tmp_path):
    """Weights & Biases gets a run, without an account; it can be asked for later on."""
    flags = [*TINY, "--total-timesteps", 32, "--num-evals", 1, "--run-dir", "out"]
    run_program(SCRIPT.__file__, flags, environ, tmp_path)
    flags = ["--resume", run_folder(tmp_path / "out"), "--track", "--total-timesteps", 64]
    run_program(SCRIPT.__file__, flags, environ, tmp_path)
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGUSR1"])
def test_signals_end_a_run_in_good_order(name, environ, tmp_path):
    """So do Ctrl-C and the other signals that schedulers send."""
    stop(name, SCRIPT, [*TINY, *BUDGET], tmp_path, environ)


@pytest.mark.slow
def test_ignored_signals_stay_ignored(environ, tmp_path):
    """What nohup does: a run goes on after SIGHUP, and one in the background after SIGINT."""
    flags, line = [*TINY, *BUDGET], SCRIPT.__name__
    with started(SCRIPT, flags, tmp_path, environ, line, signal.SIG_IGN) as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, "") and len(read_rows(run_folder(tmp_path))) == 5


# -------------------- What is saved ---------------------------------------------------------------
def test_checkpoint_comes_back_as_it_was(tmp_path):
    """Structure, shapes, types and values, of arrays and of the progress."""
    tree = {"a": np.arange(6, dtype=np.int8).reshape(2, 3).T, "b": (np.float32(1.5), np.zeros(0))}
    progress = [10, [{"x": 0.1, "y": 1e300}], {"losses/a": 1 / 3}]
    path = tmp_path / "checkpoint_0.npz"
    SCRIPT.save_checkpoint(path, jax.tree.map(np.zeros_like, tree), [9])
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
    SCRIPT.save_checkpoint(path, tree, [1])
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
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("other.npz", "empty.npz", "missing.npz"):
        with pytest.raises(SystemExit):
            SCRIPT.load_checkpoint(tmp_path / name, tree)
