"""Tests that nothing spoils a run: names, locks, and calls that are refused."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest
from conftest import TINY, run_folder, run_program, scripts_with
from filelock import FileLock

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = scripts_with("open_run", "parse_args", "train")[0].values[0]  # the same text in all
SHORT = [*TINY, "--total-timesteps", "32", "--num-evals", "1"]
LONGER = ("--total-timesteps", 320)


@pytest.fixture(scope="module")
def finished(environ, tmp_path_factory):
    """The folder of a run; what a test makes of its files is made of a copy."""
    folder = tmp_path_factory.mktemp("finished")
    run_program(SCRIPT.__file__, [*SHORT, "--run-dir", folder], environ)
    return run_folder(folder)


@pytest.fixture
def run(finished, tmp_path):
    return pathlib.Path(shutil.copytree(finished, tmp_path / "runs" / finished.name))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


NAME_IT = """
import sys, types, {name} as script
script.time = types.SimpleNamespace(time=lambda: 1000.5)
folder, lock, _ = script.open_run(script.Args(run_dir=sys.argv[1], num_devices=1), [])
print(folder.name, flush=True)
sys.stdin.read()
"""


def test_several_runs_begin_at_once(environ, tmp_path):
    """Four processes that begin in the same second have a folder each."""
    program = NAME_IT.format(name=SCRIPT.__name__)
    command = [sys.executable, "-c", program, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    processes = [subprocess.Popen(command, env=environ, **pipes) for _ in range(4)]
    names = [process.communicate("")[0].strip() for process in processes]
    stem = f"CoordSum-v0____{SCRIPT.__name__}__1__"
    assert sorted(names) == [f"{stem}{second}" for second in (1000, 1001, 1002, 1003)]
    assert {path.name for path in tmp_path.iterdir() if path.name[0] != "."} == set(names)


def damage(folder):
    data = (folder / "checkpoint_0.npz").read_bytes()
    (folder / "checkpoint_0.npz").write_bytes(data[:2000])


def edit(folder):
    """Makes the run one with a guider of another size, as an edited script would."""
    about = (folder / "args.json").read_text()
    (folder / "args.json").write_text(about.replace('"embed_dim": 8', '"embed_dim": 4'))


def forget_starts(folder):
    about = json.loads((folder / "args.json").read_text())
    del about["starts"]
    (folder / "args.json").write_text(json.dumps(about))


@pytest.mark.parametrize("change, flags, status, text", [
    (damage, LONGER, 2, "checkpoint_0.npz"),
    (edit, LONGER, 2, "checkpoint_0.npz"),
    (forget_starts, LONGER, 2, "an earlier version made it"),
    (lambda folder: None, ("--total-timesteps", 32), 0, "nothing to do"),
    (lambda folder: None, ("--gamma", 0.5), 2, "--gamma"),
])
def test_a_call_that_is_refused_changes_nothing(change, flags, status, text, run, call):
    """Nor does one with nothing to do: no byte of a file of the run is another afterwards."""
    change(run)
    before = contents(run)
    found, out, err = call(SCRIPT, "--resume", run, *flags)
    assert found == status and text in out + err
    assert contents(run) == before


def test_another_script_is_refused_without_asserts(run, environ):
    """Also by `python -O`, which leaves out assert statements."""
    before = contents(run)
    command = [sys.executable, "-O", str(ROOT / "ctds_ff.py"), "--resume", str(run)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"{SCRIPT.SCRIPT} or an earlier version made it" in done.stderr
    assert contents(run) == before


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
