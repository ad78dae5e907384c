"""Tests of what a run leaves behind: checkpoints, resuming, every kind of stop, the networks."""

import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import scripts_with

SCRIPTS = scripts_with("Args", "main", "load_checkpoint")
SCRIPT = SCRIPTS[0].values[0]  # saving is the same text in all scripts, see test_shape.test_twins
TINY = """--env-id CoordSum-v0 --scenario 2x3-4 --num-envs 4 --num-steps 8 --eval-episodes 4
          --embed-dim 8 --learner-hidden-dim 8 --num-minibatches 2 --update-epochs 2""".split()
BUDGET = ["--total-timesteps", "640", "--num-evals", "4"]  # an evaluation after every 160 steps
HALF = ["--total-timesteps", "320", "--num-evals", "2"]
LONG = ["--total-timesteps", "20000", "--num-evals", "5"]
NETWORKS = ["learner", "guider", "best_learner", "best_guider"]


def run(script, flags, environ):
    """Runs a script -> the finished process."""
    command = [sys.executable, script.__file__, *flags]
    return subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=400)


def run_folder(run_dir):
    """The only run's folder in a folder."""
    (folder,) = [path for path in pathlib.Path(run_dir).iterdir() if path.name[0] != "."]
    return folder


def start_run(script, flags, run_dir, environ):
    """A finished run -> its folder."""
    done = run(script, [*TINY, *flags, "--run-dir", str(run_dir)], environ)
    assert done.returncode == 0, done.stderr
    return run_folder(run_dir)


def resume(script, folder, flags, environ):
    """Goes on with a run, which must finish -> its folder."""
    done = run(script, ["--resume", str(folder), *flags], environ)
    assert done.returncode == 0, done.stderr
    return folder


def read_rows(folder):
    """The rows of metrics.jsonl without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    clocks = ("time/", "charts/SPS")
    rows = [json.loads(line) for line in lines]
    return [{k: x for k, x in row.items() if not k.startswith(clocks)} for row in rows]


def assert_same_run(folder, other):
    """Both runs have the same rows and the same networks, to the last bit."""
    assert read_rows(folder) == read_rows(other)
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


DEVICES = [(script.values[0], 1) for script in SCRIPTS] + [(SCRIPTS[-1].values[0], 2)]
DEVICES = [  # ctds_ff.py saves as magpo_ff.py does; magpo_rec.py is there on two devices
    pytest.param(*case, marks=pytest.mark.slow if i in (1, 2) else ())
    for i, case in enumerate(DEVICES)
]


@pytest.mark.parametrize("script, devices", DEVICES, ids=lambda x: getattr(x, "__name__", x))
def test_resumed_equals_uninterrupted(script, devices, whole, environ, tmp_path):
    """k iterations, a new process, k more: the very rows and networks of 2 k in one process."""
    flags = ["--num-devices", str(devices)]
    folder = start_run(script, [*HALF, *flags], tmp_path, environ)
    assert len(read_rows(folder)) == 3
    resume(script, folder, BUDGET, environ)
    assert_same_run(folder, whole(script, *BUDGET, *flags))
    about = json.loads((folder / "args.json").read_text())
    assert about["args"]["total_timesteps"] == 640 and "--resume" in about["command"]


def test_resuming_a_finished_run_changes_nothing(whole, environ, tmp_path):
    """There is nothing left to do, and no row is added."""
    finished = whole(SCRIPT, *BUDGET)
    folder = pathlib.Path(shutil.copytree(finished, tmp_path / finished.name))
    resume(SCRIPT, folder, [], environ)
    assert_same_run(folder, finished)


def stop_after_first_interval(script, flags, run_dir, environ, stop):
    """Starts a run, calls stop(process) after its second evaluation -> status, stderr, folder."""
    command = [sys.executable, script.__file__, *TINY, *flags, "--run-dir", str(run_dir)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child inherits SIG_IGN
    process = subprocess.Popen(
        command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    try:
        while not process.stdout.readline().startswith("global_step=4000 "):
            assert process.poll() is None, process.stderr.read()
        stop(process)
        _, err = process.communicate(timeout=100)
    finally:
        process.kill()
    return process.returncode, err, run_folder(run_dir)


@pytest.mark.parametrize("number", [
    pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_signals_end_a_run_in_good_order(number, whole, environ, tmp_path):
    """Ctrl-C and SIGTERM save in mid-interval, draw the curve, and exit with 130 and 143."""
    status, err, folder = stop_after_first_interval(
        SCRIPT, LONG, tmp_path, environ, lambda process: process.send_signal(number))
    assert status == 128 + number
    assert err == f"magpo_ff.py: interrupted, --resume {folder} goes on\n".replace(
        "magpo_ff", SCRIPT.__name__)
    assert (folder / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert len(read_rows(folder)) < 6
    resume(SCRIPT, folder, [], environ)
    assert_same_run(folder, whole(SCRIPT, *LONG))


def test_killed_run_goes_on(whole, environ, tmp_path):
    """After SIGKILL the rows that followed the last checkpoint come again, and none is doubled."""
    status, _, folder = stop_after_first_interval(
        SCRIPT, LONG, tmp_path, environ, lambda process: process.kill())
    assert status == -signal.SIGKILL
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"global_step": 1, "a row after the checkpoint": 1}\n{"a torn')
    resume(SCRIPT, folder, [], environ)
    assert_same_run(folder, whole(SCRIPT, *LONG))
    assert len(list(folder.glob("checkpoint_*"))) == 1


# -------------------- What is saved ---------------------------------------------------------------
def test_networks_can_be_read_without_jax(whole):
    """Flat names and plain arrays; the best networks are those of the best evaluation."""
    folder = whole(SCRIPT, *BUDGET)
    learner = safetensors.numpy.load_file(folder / "learner.safetensors")
    assert learner["params,Dense_0,kernel"].shape == (2 + 1, 8)
    guider = safetensors.numpy.load_file(folder / "guider.safetensors")
    assert guider["params,encoder_0,self_mix,query,kernel"].shape == (8, 8)
    returns = [row["eval/learner_return"] for row in read_rows(folder)]
    best, last = (folder / f"{prefix}learner.safetensors" for prefix in ("best_", ""))
    assert (best.read_bytes() == last.read_bytes()) == (max(returns) == returns[-1])


def test_no_save(environ, tmp_path):
    """--no-save leaves metrics alone, which cannot be resumed."""
    folder = start_run(SCRIPT, [*HALF, "--no-save"], tmp_path, environ)
    names = {path.name for path in folder.iterdir()}
    assert names == {"args.json", "metrics.jsonl", "learning_curve.png"}
    done = run(SCRIPT, ["--resume", str(folder)], environ)
    assert done.returncode == 2 and "no checkpoint" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_checkpoint_comes_back_as_it_was(tmp_path, monkeypatch):
    """Structure, shapes, types and values; earlier checkpoints go once the new one is whole."""
    tree = {"a": np.arange(6, dtype=np.int8).reshape(2, 3).T, "b": (np.float32(1.5), np.zeros(0))}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    folder = str(tmp_path)
    SCRIPT.save_checkpoint(folder, tree, SCRIPT.Progress(iteration=9))
    progress = SCRIPT.Progress(iteration=10, best_return=-np.inf, train_seconds=0.1)
    SCRIPT.save_checkpoint(folder, tree, progress)
    loaded, same_progress = SCRIPT.load_checkpoint(folder, like)
    jax.tree.map(np.testing.assert_array_equal, tree, loaded)
    assert jax.tree.map(lambda x: x.dtype, tree) == jax.tree.map(lambda x: x.dtype, loaded)
    assert same_progress == progress
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_10_0.npz"]


def test_every_damage_is_noticed(tmp_path):
    """A flipped byte or a cut anywhere in a checkpoint is refused in one line, never read."""
    tree = {"a": np.arange(8.0), "b": np.ones((2, 2), bool)}
    SCRIPT.save_checkpoint(str(tmp_path), tree, SCRIPT.Progress(iteration=1))
    path = tmp_path / "checkpoint_1_0.npz"
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(len(data), size=200):
        flipped = bytearray(data)
        flipped[place] ^= 1
        for damaged in (bytes(flipped), data[:place]):
            path.write_bytes(damaged)
            try:
                loaded, _ = SCRIPT.load_checkpoint(str(tmp_path), tree)
            except SCRIPT.FlagError as error:
                assert str(path) in str(error) and "\n" not in str(error)
            else:  # the byte was one that a zip does not use, such as a date
                jax.tree.map(np.testing.assert_array_equal, loaded, tree)


# -------------------- Refusals --------------------------------------------------------------------
def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_json(path, **changes):
    about = json.loads(path.read_text())
    about.update(changes)
    path.write_text(json.dumps(about))


def newest(folder):
    (path,) = folder.glob("checkpoint_*")
    return path


def write_newer_checkpoint(folder):
    with np.load(newest(folder)) as file:
        arrays = dict(file)
    about = json.loads(str(arrays["about"]))
    arrays["about"] = json.dumps(about | {"format": 1000})
    np.savez(newest(folder), **arrays)


def add_unknown_flag(folder):
    about = json.loads((folder / "args.json").read_text())
    edit_json(folder / "args.json", args=about["args"] | {"no_such_flag": 1})


DAMAGES = {  # what is done to a run's folder -> what the line says
    "no args.json": (lambda folder: (folder / "args.json").unlink(), "is no run's folder"),
    "args.json is cut": (
        lambda folder: (folder / "args.json").write_text('{"args":'), "is no run's folder"),
    "another script": (
        lambda folder: edit_json(folder / "args.json", script="other.py"), "is a run of other.py"),
    "unknown flag": (add_unknown_flag, "no_such_flag"),
    "no checkpoint": (lambda folder: newest(folder).unlink(), "has no checkpoint"),
    "empty checkpoint": (lambda folder: newest(folder).write_bytes(b""), "cannot use"),
    "cut checkpoint": (
        lambda folder: newest(folder).write_bytes(newest(folder).read_bytes()[:5000]),
        "cannot use"),
    "foreign checkpoint": (lambda folder: np.savez(newest(folder), np.zeros(3)), "cannot use"),
    "newer checkpoint": (write_newer_checkpoint, "newer version"),
    "metrics lost": (lambda folder: (folder / "metrics.jsonl").unlink(), "metrics.jsonl"),
    "metrics cut": (
        lambda folder: (folder / "metrics.jsonl").write_text("{}\n"), "metrics.jsonl: it lacks"),
    "metrics are no text": (
        lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff" * 100_000), "metrics.jsonl"),
}


@pytest.fixture
def call(monkeypatch, capsys):
    """call(*flags) -> exit status, stdout, stderr of main, in this process."""

    def main(*flags):
        monkeypatch.setattr(sys, "argv", [f"{SCRIPT.__name__}.py", *flags])
        monkeypatch.setattr(SCRIPT, "use_cache", lambda args: None)
        monkeypatch.setattr(SCRIPT, "StopSignal", lambda: types.SimpleNamespace(number=0))
        try:
            status = SCRIPT.main()
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return main


@pytest.mark.parametrize("damage", DAMAGES)
def test_unusable_folders(damage, whole, call, tmp_path):
    """One line that names --resume, exit status 2, and nothing in the folder is touched."""
    finished = whole(SCRIPT, *BUDGET)
    folder = pathlib.Path(shutil.copytree(finished, tmp_path / finished.name))
    act, text = DAMAGES[damage]
    act(folder)
    before = snapshot(folder)
    status, _, err = call("--resume", str(folder))
    assert (status, len(err.splitlines())) == (2, 1), err
    assert "--resume" in err and text in err
    assert snapshot(folder) == before


def test_no_such_folder(call, tmp_path):
    """A path that is not there is refused by name."""
    status, out, err = call("--resume", str(tmp_path / "nothing"))
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "--resume" in err and "nothing" in err


@pytest.mark.parametrize("flags", [
    "--seed 2", "--delta 2.0", "--num-envs 8", "--env-id RobotWarehouse-v0", "--guider mat",
    "--learning-rate 2e-3", "--no-norm-adv", "--num-devices 2", "--exp-name other"])
def test_flags_that_may_not_change(flags, whole, call):
    """Another value of a flag that makes the run what it is, is refused by its name."""
    folder = whole(SCRIPT, *BUDGET)
    before = snapshot(folder)
    status, out, err = call("--resume", str(folder), *flags.split())
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert flags.split()[0].replace("--no-", "--") in err and "total-timesteps" in err
    assert snapshot(folder) == before


# -------------------- Disks -----------------------------------------------------------------------
def test_full_disk(environ, tmp_path):
    """A checkpoint that does not fit ends the run in one line that names the file, status 1."""

    limit = ["sh", "-c", 'ulimit -f 40; exec "$@"', "sh"]  # 40 blocks of 512 bytes a file
    flags = [*TINY, *HALF, "--run-dir", str(tmp_path), "--no-cache"]
    no_cache = {k: x for k, x in environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [*limit, sys.executable, SCRIPT.__file__, *flags], env=no_cache, capture_output=True,
        text=True, timeout=400)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(r"cannot write \S+/\w+\.(npz|png): File too large", done.stderr)


def test_vanished_folder(environ, tmp_path):
    """So does a folder that is no longer there."""
    command = [sys.executable, SCRIPT.__file__, *TINY, *LONG, "--run-dir", str(tmp_path)]
    process = subprocess.Popen(
        command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        while not process.stdout.readline().startswith("global_step=0 "):
            assert process.poll() is None, process.stderr.read()
        # unlike removing it, moving it takes one step, even while the run writes into it
        run_folder(tmp_path).rename(tmp_path / ".moved")
        _, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 1 and len(err.splitlines()) == 1, err
    assert re.search(r"cannot write \S+: No such file or directory", err)


# -------------------- The terminal ----------------------------------------------------------------
def test_there_is_a_line_every_minute(monkeypatch, tmp_path, capsys):
    """Without a progress bar: return while collecting, speed and time left, once a minute."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(SCRIPT, "time", types.SimpleNamespace(time=lambda: clock.now))
    logger = SCRIPT.Logger(SCRIPT.Args(run_dir=str(tmp_path), num_devices=1))
    logger.begin(0, 60_000)
    nothing = {"number": np.zeros(1), "return": np.zeros(1)}
    episodes = {"number": np.array([4.0]), "return": np.array([10.0])}
    for seconds, sums in ((59, nothing), (61, nothing), (119, episodes), (122, episodes)):
        clock.now = 1000.0 + seconds
        logger.update(100, 100 * seconds, sums, speed=50.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "global_step=6100  no episode has ended  SPS 50  18 min left",
        "global_step=12200  collecting 2.50  SPS 50  16 min left"]
