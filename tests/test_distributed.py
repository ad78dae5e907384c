"""Tests of several processes: two on this machine, with two CPU devices each, are one with four."""

import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import TINY, read_rows, run_folder, scripts_with

SCRIPT = scripts_with("start_jax", "main")[0].values[0]
FLAGS = [*TINY, "--num-envs", "8"]
BUDGET = ["--total-timesteps", "640", "--num-evals", "2"]


def start(flags, environ):
    """Starts a process of the script."""
    command = [sys.executable, SCRIPT.__file__, *flags]
    return subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_two(flags, environ):
    """Starts two processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    together["JAX_NUM_CPU_DEVICES"] = "2"
    return [
        start([*flags, "--distributed"], together | {"JAX_PROCESS_ID": str(i)}) for i in range(2)]


def finish(processes):
    """Waits for processes -> their exit statuses, what the first printed, all that they warned."""
    try:
        results = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    err = "".join(err for _, err in results)
    return [process.returncode for process in processes], results[0][0], err


@pytest.fixture(scope="module")
def one(environ, tmp_path_factory):
    """The folder of a run in one process."""
    run_dir = tmp_path_factory.mktemp("one")
    flags = [*FLAGS, *BUDGET, "--num-devices", "4", "--run-dir", str(run_dir)]
    statuses, _, err = finish([start(flags, environ)])
    assert statuses == [0], err
    return run_folder(run_dir)


@pytest.mark.slow
def test_two_processes_are_one(one, environ, tmp_path):
    """The same losses and returns up to the order of a sum; one folder, logged by one."""
    flags = [*FLAGS, *BUDGET, "--run-dir", str(tmp_path)]
    statuses, out, err = finish(start_two(flags, environ))
    assert statuses == [0, 0], err
    folder = run_folder(tmp_path)
    rows = (read_rows(run, clocks=False) for run in (folder, one))
    for row, expected in zip(*rows, strict=True):
        assert row.keys() == expected.keys()
        for name in row:
            np.testing.assert_allclose(row[name], expected[name], rtol=1e-4, atol=1e-6)
    names = {path.name for path in folder.glob("checkpoint_*")}
    assert names == {"checkpoint_0.npz", "checkpoint_1.npz"}
    assert out.count("global_step=640 ") == 1


@pytest.mark.slow
def test_two_processes_stop_and_go_on(one, environ, tmp_path):
    """SIGTERM to one of them stops both after the same iteration; both go on from there."""
    half = [*FLAGS, "--total-timesteps", "320", "--num-evals", "1", "--run-dir", str(tmp_path)]
    statuses, _, err = finish(start_two(half, environ))
    assert statuses == [0, 0], err
    folder = run_folder(tmp_path)
    flags = ["--resume", str(folder), "--total-timesteps", "64000000", "--num-evals", "200000"]
    processes = start_two(flags, environ)
    while not processes[0].stdout.readline().startswith("global_step=640 "):
        assert processes[0].poll() is None, processes[0].stderr.read()
    processes[1].send_signal(signal.SIGTERM)
    statuses, _, err = finish(processes)
    assert statuses == [128 + signal.SIGTERM] * 2, err
    assert read_rows(folder, clocks=False)[:1] == read_rows(one, clocks=False)[:1]
    last = read_rows(one)[-1]
    (same,) = [row for row in read_rows(folder) if row["global_step"] == last["global_step"]]
    for name in ("eval/learner_return", "eval/guider_return"):
        assert same[name] == last[name]
    assert len(list(folder.glob("checkpoint_*"))) == 2


@pytest.mark.slow
def test_a_lost_process_ends_the_other(environ, tmp_path):
    """It ends with a message and a status, not with a hang."""
    flags = [*FLAGS, "--total-timesteps", "64000000", "--run-dir", str(tmp_path)]
    processes = start_two(flags, environ)
    while not processes[0].stdout.readline().startswith("global_step=0 "):
        assert processes[0].poll() is None, processes[0].stderr.read()
    processes[0].kill()
    statuses, _, err = finish(processes)
    assert statuses[1] not in (0, -signal.SIGKILL)
    assert "another process is lost" in err or "coordination service" in err


@pytest.mark.parametrize("variables, text", [
    ({"JAX_NUM_PROCESSES": "two"}, "two"), ({"JAX_NUM_PROCESSES": "2"}, "coordinator_address"),
    ({"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "localhost:9"}, "process id")])
def test_unusable_variables(variables, text, call, monkeypatch):
    """A process that cannot tell which one it is: one line that says why, status 2."""
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    status, _, err = call(SCRIPT, "--distributed", "--dry-run")
    assert status == 2 and len(err.splitlines()) == 1
    assert "--distributed" in err and text in err
