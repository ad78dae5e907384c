"""Tests that nothing spoils a run: names, locks, and calls that are refused."""

import functools
import inspect
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import TINY, scripts_with
from filelock import FileLock

import ctds_ff

SCRIPT = scripts_with("open_run", "parse_args", "train")[0].values[0]  # the same text in all
SHORT = [*TINY, "--total-timesteps", "32", "--num-evals", "1", "--num-devices", "1"]
LONGER = ("--total-timesteps", 320)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The folder of a run of one iteration, with zeros in its checkpoint: nothing is trained."""
    monkeypatch.setattr(sys, "argv", [SCRIPT.SCRIPT, *SHORT, "--run-dir", str(tmp_path / "runs")])
    args, starts = SCRIPT.parse_args()
    folder, lock, _ = SCRIPT.open_run(args, starts)
    lock.release()
    env = SCRIPT.make_env(args.env_id, args.scenario)
    init = functools.partial(SCRIPT.init_state, args, env, *SCRIPT.make_networks(args, env))
    key, keys = jax.random.PRNGKey(0), jax.random.split(jax.random.PRNGKey(0), 1)
    like = jax.eval_shape(jax.pmap(init, in_axes=(None, 0)), key, keys)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    SCRIPT.save_checkpoint(folder / "checkpoint_0.npz", zeros, (1, [], {}))
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_several_runs_begin_at_once(monkeypatch, tmp_path):
    """Four that begin in the same second have a folder each."""
    monkeypatch.setattr(SCRIPT, "time", SimpleNamespace(time=lambda: 1000.5))
    args = SCRIPT.Args(run_dir=str(tmp_path), num_devices=1)
    with ThreadPoolExecutor(4) as pool:
        folders = [folder for folder, *_ in pool.map(SCRIPT.open_run, [args] * 4, [[]] * 4)]
    stem = f"CoordSum-v0____{SCRIPT.__name__}__1__"
    expected = [tmp_path / f"{stem}{second}" for second in (1000, 1001, 1002, 1003)]
    assert sorted(folders) == sorted(tmp_path.iterdir()) == expected


def damage(folder):
    data = (folder / "checkpoint_0.npz").read_bytes()
    (folder / "checkpoint_0.npz").write_bytes(data[:2000])


def edit(old, new):
    """Edits args.json."""

    def change(folder):
        about = (folder / "args.json").read_text()
        (folder / "args.json").write_text(about.replace(old, new))

    return change


MAY_NOT_CHANGE = """--seed 2, --num-envs 8, --env-id RobotWarehouse-v0, --guider mat, --delta 2,
    --learning-rate 2e-3, --anneal-lr, --num-devices 3, --exp-name other""".split(",")
KEEP = edit("", "")


@pytest.mark.parametrize("change, flags, status, text", [
    (damage, LONGER, 2, "checkpoint_0.npz"),
    (edit('"embed_dim": 8', '"embed_dim": 4'), LONGER, 2, "checkpoint_0.npz"),  # another guider
    (edit("{", ""), LONGER, 2, "is no run of "),
    (edit('"anneal_lr": false,', ""), LONGER, 2, "an earlier version made it"),
    (edit('"script": "', '"script": "my_'), LONGER, 2, ".py or an earlier version made it"),
    (edit('"seed"', '"save": 1, "seed"'), LONGER, 2, "an earlier version made it"),
    (KEEP, ("--total-timesteps", 32), 0, "nothing to do"),
    *[(KEEP, flags.split(), 2, f"{flags.split()[0]}: ") for flags in MAY_NOT_CHANGE],
])
def test_a_call_that_is_refused_changes_nothing(change, flags, status, text, run, call):
    """It ends with one line. Nor does one with nothing to do: no byte of a file of the run is
    another afterwards."""
    change(run)
    before = contents(run)
    found, out, err = call(SCRIPT, "--resume", run, *flags)
    assert found == status and text in out + err and len(err.splitlines()) == (status == 2)
    assert contents(run) == before


def test_another_script_is_refused(run, call):
    """Also by `python -O`, which leaves out assert statements: there are none."""
    before = contents(run)
    status, _, err = call(ctds_ff, "--resume", run)
    assert (status, len(err.splitlines())) == (2, 1)
    assert f"{SCRIPT.SCRIPT} or an earlier version made it" in err
    assert contents(run) == before
    assert not re.search("^ *assert ", inspect.getsource(SCRIPT), re.M)


def test_two_processes_in_one_run(run, call):
    """The second is refused in a line; a lock that nobody holds any more does not block."""
    before = contents(run)
    with FileLock(run / ".lock"):
        status, _, err = call(SCRIPT, "--resume", run, *LONGER)
        assert (status, len(err.splitlines())) == (2, 1) and f"{run.name}/.lock" in err
        assert contents(run) == before
    args, starts = SCRIPT.Args(resume=str(run), run_dir=str(run.parent)), [{}]
    _, lock, _ = SCRIPT.open_run(args, starts)
    assert lock.is_locked
    lock.release()


def test_each_start_is_kept(run, call, monkeypatch, capsys):
    """Going on keeps the versions of the first start, and tells in a line that others are here now.
    From within the run's folder it is `--resume .`."""
    about = json.loads((run / "args.json").read_text())
    about["starts"][0]["versions"]["jax"] = "0.0.1"
    (run / "args.json").write_text(json.dumps(about))
    monkeypatch.chdir(run)
    flags = ["--resume", ".", *map(str, LONGER), "--eval-episodes", "2", "--eval-greedy"]
    monkeypatch.setattr(sys, "argv", [SCRIPT.SCRIPT, *flags])
    args, starts = SCRIPT.parse_args()
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "0.0.1" in err
    assert (args.resume, args.run_dir) == (str(run), str(run.parent))
    _, lock, _ = SCRIPT.open_run(args, starts)
    lock.release()
    first, second = json.loads((run / "args.json").read_text())["starts"]
    assert first == about["starts"][0] and second["command"] == [SCRIPT.SCRIPT, *flags]
    status, _, err = call(SCRIPT, *flags, "--dry-run")
    assert (status, err) == (0, "")  # the start before was with these versions


@pytest.mark.parametrize("flags", [
    ("--run-dir", ""), ("--resume", ""), ("--exp-name", 300 * "x"), ("--run-dir", "file"),
    ("--run-dir", "file/runs"), ("--run-dir", "link")], ids=str)
def test_folders_that_cannot_be(flags, call, monkeypatch, tmp_path):
    """One line that names the flag, status 2, and nothing is made."""
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    status, _, err = call(SCRIPT, *TINY, *flags)
    assert (status, len(err.splitlines())) == (2, 1) and "--run-dir" in err
    left = {path.name for path in tmp_path.iterdir()} - {"runs"}
    assert left == {"file", "link"} and list(tmp_path.glob("runs/*")) == []
