"""Tests of the scripts as programs: their flags, and what they refuse."""

import dataclasses
import inspect
import pathlib
import re
import shutil
import signal
import threading

import jax
import pytest
import wandb
from conftest import (
    METRICS,
    has_memory,
    metrics_of,
    read_rows,
    run_folder,
    run_program,
    scripts_with,
    slow,
)

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = scripts_with("Args", "main")
SCRIPT = SCRIPTS[0].values[0]  # for what is the same text in all scripts


# --------------------------------------------------------------------------- flags, in this process
@pytest.fixture(autouse=True)
def untrained(monkeypatch, tmp_path):
    """An empty folder, and no training in this process."""
    monkeypatch.chdir(tmp_path)
    for script in SCRIPTS:
        monkeypatch.setattr(script.values[0], "train", lambda *_: pytest.fail("training began"))


BAD_VALUES = """num-envs -4 0, total-timesteps 10 -1 8191, num-evals 0 -1, eval-episodes 0 -2,
    num-steps 0 -8, num-minibatches 0 -2 3 8192, update-epochs 0, embed-dim 0, num-heads -1 0,
    num-blocks 0, learner-hidden-dim -1, num-devices -1, seed -1 4294967296,
    learning-rate -1 0 nan inf, gamma 2 -0.1 nan, gae-lambda 1.1 nan, clip-coef 0 nan,
    ent-coef -1 nan inf, vf-coef -0.5 nan, max-grad-norm 0 nan,
    env-id Nope-v0 Snake-v1, scenario bogus"""
BAD_TETHERS = "delta 1 0.5 -2 nan, learner-rl-coef -1 nan"
# Chunks have steps, decay does not grow, and minibatches hold whole sequences: there are 64.
BAD_MEMORY = "chunk-steps -1, decay-scaling-factor -0.1 1.5 nan, num-minibatches 128"
# A scenario that the environment cannot build; heads share the guider's width evenly.
BAD_PAIRS = """--env-id RobotWarehouse-v0 --scenario tiny-1ag-hard
    --num-heads 3 --embed-dim 10
    --num-heads 64 --embed-dim 64"""


def bad_flags(script):
    """What main() has to refuse: a flag with a value, or two of which the last is named."""
    text = BAD_VALUES + (f", {BAD_TETHERS}" if hasattr(script, "double_clip") else "")
    text += f", {BAD_MEMORY}" if has_memory(script) else ""
    entries = [entry.split() for entry in text.split(",")]
    singles = [f"--{flag} {value}" for flag, *values in entries for value in values]
    return singles + [line.strip() for line in BAD_PAIRS.splitlines()]


BAD = [
    pytest.param(script, flags, id=f"{script.__name__}-{flags}")
    for (script,) in (parameter.values for parameter in SCRIPTS) for flags in bad_flags(script)]


@pytest.mark.parametrize("script, flags", BAD)
def test_bad_value(script, flags, call, tmp_path):
    """Exit status 2, one line that names flag and value, nothing on stdout, no folder."""
    status, out, err = call(script, *flags.split())
    flag, value = flags.split()[-2:]
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1 and err.endswith("\n"), err
    named = re.search(rf"{flag} ([^\s:,]+)", err)
    assert named and (named[1] == value or float(named[1]) == float(value)), err
    assert flag != "--embed-dim" or value == "0" or "--num-heads" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, call):
    """--help lists every flag with a text of its own."""
    status, out, err = call(script, "--help")
    assert (status, err) == (0, "")
    lines = [line.strip(" │|") for line in out.splitlines()]
    texts = {}
    for chunk in re.split(r"^--", "\n".join(lines), flags=re.M)[1:]:
        flag, rest = re.match(r"([a-z-]+)(?:, --no-[a-z-]+)?(.*)", chunk, re.S).groups()
        rest = re.sub(r"^ [A-Z{]\S*", "", rest)
        texts[flag] = re.sub(r"\(default:.*", "", rest, flags=re.S)
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(script.Args)}
    assert fields <= texts.keys()
    assert {flag for flag in fields if len(re.findall("[a-z]", texts[flag])) < 8} == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script):
    """Every flag is read somewhere else than where it is checked."""
    source = inspect.getsource(script).replace(inspect.getsource(script.check_args), "")
    fields = [field.name for field in dataclasses.fields(script.Args)]
    assert len(fields) > 25
    assert [name for name in fields if not re.search(rf"\bargs\.{name}\b", source)] == []


@pytest.mark.parametrize("flags, num_agents", [
    ("--num-evals 1 --seed 0 --gamma 0 --gae-lambda 0 --ent-coef 0 --vf-coef 0", 3),
    ("--env-id LevelBasedForaging-v0 --scenario 8x8-2p-2f-coop", 2)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run(script, flags, num_agents, call, monkeypatch, tmp_path):
    """--dry-run says how many agents there are; it compiles, makes and trains nothing."""
    monkeypatch.setattr(jax, "pmap", lambda *_, **__: pytest.fail("a device program was made"))
    status, out, err = call(script, "--dry-run", *flags.split())
    assert (status, err, len(out.splitlines())) == (0, "", 1)
    assert f"py: {num_agents} agents, 1 x cpu" in out
    assert list(tmp_path.iterdir()) == []


def test_every_metric_is_documented():
    """The metrics named in docs/usage.md are those that runs write."""
    text = (ROOT / "docs" / "usage.md").read_text()
    named = re.findall(r"`((?:charts|eval|losses|time)/\w+)`", text)
    assert {*named, "global_step"} == METRICS | {"eval/win_rate"}


# ------------------------------------------------------------------------------- runs, as processes
ALONE = "--env-id RobotWarehouse-v0 --num-envs 2 --eval-episodes 2 --run-dir out"
BUDGET = "--num-steps 512 --total-timesteps 1100 --num-evals 1 --num-minibatches 1"


@pytest.mark.parametrize("flags", ["--dry-run", pytest.param(BUDGET, marks=pytest.mark.slow)])
def test_alone(flags, environ, tmp_path):
    """A copy in an empty folder knows the environments of Jumanji; it trains on them for whole
    iterations, and logs their episodes."""
    copy = shutil.copy(SCRIPT.__file__, tmp_path / "mine.py")
    environ = {name: value for name, value in environ.items() if name != "PYTHONPATH"}
    done = run_program(copy, [*ALONE.split(), *flags.split()], environ, tmp_path)
    assert done.stderr == "" and done.stdout.startswith("mine.py: 4 agents, 1 x cpu\n")
    if flags == BUDGET:
        folder = run_folder(tmp_path / "out")
        assert folder.name.startswith("RobotWarehouse-v0____mine__1__")
        _, row = read_rows(folder)
        assert row["global_step"] == 1024 and row.keys() == metrics_of(SCRIPT)
        assert row["charts/num_episodes"] >= 2 and 0 < row["charts/episodic_length"] <= 500


def test_surroundings_that_do_not_work(call, monkeypatch, capsys, tmp_path):
    """No GPU, no login: one line, status 2, no run. There are stand-ins for what JAX and Weights &
    Biases say; devices are below."""
    monkeypatch.setattr(jax, "device_count", lambda: jax.devices("no such backend"))
    status, _, err = call(SCRIPT, "--dry-run")
    assert (status, len(err.splitlines())) == (2, 1) and "JAX_PLATFORMS): " in err

    def refuse(**settings):
        assert settings["id"] == settings["name"][-64:]  # the seed and the second are in it
        raise wandb.Error("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(SystemExit, match="2"):
        SCRIPT.open_run(SCRIPT.Args(track=True, run_dir=str(tmp_path), exp_name=64 * "x"), [])
    assert list(tmp_path.glob("*/args.json")) == []
    assert capsys.readouterr().err == f"{SCRIPT.SCRIPT}: error: --track: no API key\n"


@pytest.mark.parametrize("devices, num_envs, text", [
    (4, 4, "--num-devices 4: must be at most 2"),
    (2, 3, "--num-envs 3: must be divisible by --num-devices 2"),
    (2, 6, "--num-minibatches 256: must be a divisor of ")])  # not of the 384 on a device
@pytest.mark.parametrize("script", scripts_with("check_args", "Args"))
def test_devices_that_do_not_fit(script, devices, num_envs, text, monkeypatch, capsys):
    """There are two: more are refused, and so are environments that they cannot share evenly."""
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    with pytest.raises(SystemExit) as end:
        script.check_args(script.Args(
            num_devices=devices, num_envs=num_envs, num_minibatches=256))
    assert end.value.code == 2 and text in capsys.readouterr().err


@pytest.mark.parametrize("env_id, scenario", [
    ("CoordSum-v0", ""),
    *slow([pytest.param("RobotWarehouse-v0", ""), pytest.param("SMAX", "2s3z")])])
def test_double_precision_is_ignored(env_id, scenario, call):
    """JAX_ENABLE_X64=1, of which some environments know nothing, changes nothing."""
    jax.config.update("jax_enable_x64", True)
    status, _, err = call(SCRIPT, "--dry-run", "--env-id", env_id, "--scenario", scenario)
    is_double = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    assert (status, err, is_double) == (0, "", False)


def test_main_leaves_signals_alone(call, monkeypatch):
    """Called from another program main() sets no handler, and it works in a thread."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before, results = [signal.getsignal(number) for number in numbers], []
    thread = threading.Thread(target=lambda: results.append(call(SCRIPT, "--dry-run")[0]))
    thread.start()
    thread.join()
    assert results == [0]
    monkeypatch.setattr(SCRIPT, "STOP", [0])  # what the program itself does at the first signal
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, SCRIPT.note_signal)
    for number in (signal.SIGUSR1, signal.SIGTERM):  # one of another kind is noted as well
        assert signal.getsignal(number) == SCRIPT.note_signal
        signal.raise_signal(number)
        assert signal.getsignal(number) == signal.SIG_DFL  # the same again kills
    assert SCRIPT.STOP == [0, signal.SIGUSR1, signal.SIGTERM]
    signal.signal(signal.SIGUSR1, before[-1])
    signal.signal(signal.SIGTERM, before[1])
    assert [signal.getsignal(number) for number in numbers] == before
