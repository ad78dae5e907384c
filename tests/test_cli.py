"""Tests of the scripts as programs: flags, refusals, what a run writes, and how it ends."""

import dataclasses
import inspect
import json
import math
import pathlib
import re
import shutil
import signal
import threading
import types

import jax
import pytest
from conftest import has_memory, read_rows, run_folder, run_program, scripts_with, slow

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = scripts_with("Args", "main")
SCRIPT = SCRIPTS[0].values[0]  # for what is the same text in all scripts
TINY = """--env-id CoordSum-v0 --scenario 2x3-4 --num-envs 4 --num-steps 8 --total-timesteps 128
          --num-evals 2 --eval-episodes 4 --embed-dim 8 --learner-hidden-dim 8 --num-minibatches 2
          --update-epochs 2""".split()

CHARTS = {"charts/SPS", "charts/learning_rate", "charts/num_episodes"}
EPISODES = {"charts/episodic_return", "charts/episodic_length"}  # only where episodes ended
EVAL = {
    "eval/learner_return", "eval/learner_return_std", "eval/guider_return", "eval/imitation_gap",
    "eval/episodic_length",
}
WIN_RATE = {"eval/win_rate"}  # only where the environment has one
LOSSES = {
    "losses/" + name
    for name in """guider_policy_loss guider_kl guider_entropy value_loss learner_kl
          learner_policy_loss learner_entropy approx_kl clipfrac delta_clipfrac first_ratio
          explained_variance guider_grad_norm learner_grad_norm""".split()
}
TIME = {"time/compile_s", "time/train_s", "time/eval_s"}
NOT_IN_CTDS = {"losses/guider_kl", "losses/delta_clipfrac", "losses/learner_policy_loss"}


def losses_of(script):
    return LOSSES - (set() if hasattr(script, "double_clip") else NOT_IN_CTDS)


# --------------------------------------------------------------------------- flags, in this process
@pytest.fixture(autouse=True)
def untrained(monkeypatch, tmp_path):
    """An empty folder, and no training in this process."""
    monkeypatch.chdir(tmp_path)
    for script in SCRIPTS:
        monkeypatch.setattr(script.values[0], "train", lambda *_: pytest.fail("training began"))


BAD_VALUES = """num-envs -4 0, total-timesteps 10 -1, num-evals 0 -1, eval-episodes 0 -2,
    num-steps 0 -8, num-minibatches 0 -2 3, update-epochs 0, embed-dim 0, num-heads -1 0,
    num-blocks 0, learner-hidden-dim -1, num-devices -1, seed -1, learning-rate -1 0 nan inf,
    gamma 2 -0.1 nan, gae-lambda 1.1 nan, clip-coef 0 nan, ent-coef -1 nan inf, vf-coef -0.5 nan,
    max-grad-norm 0 nan, env-id Nope-v0 Cleaner-v0, scenario bogus"""
BAD_TETHERS = "delta 1 0.5 -2 nan, learner-rl-coef -1 nan"
# Chunks have steps, decay does not grow, and minibatches hold whole sequences: there are 64.
BAD_MEMORY = "chunk-steps -1, decay-scaling-factor -0.1 1.5 nan, num-minibatches 128"
# A scenario that the environment does not have or cannot build; heads share the guider's width.
BAD_PAIRS = """--env-id RobotWarehouse-v0 --scenario bogus
    --env-id LevelBasedForaging-v0 --scenario bogus
    --env-id Connector-v3 --scenario bogus
    --env-id RobotWarehouse-v0 --scenario tiny-1ag-hard
    --env-id LevelBasedForaging-v0 --scenario 3x3-2p-2f
    --env-id Snake-v1 --scenario con-5x5x3a
    --num-heads 3 --embed-dim 10"""


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
    ("--num-evals 1", 3), ("--env-id LevelBasedForaging-v0 --scenario 8x8-2p-2f-coop", 2)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run(script, flags, num_agents, call, monkeypatch, tmp_path):
    """--dry-run says how many agents there are; it compiles, makes and trains nothing."""
    monkeypatch.setattr(jax, "pmap", lambda *_, **__: pytest.fail("a device program was made"))
    status, out, err = call(script, "--dry-run", *flags.split())
    assert (status, err, len(out.splitlines())) == (0, "", 1)
    assert f"py: {num_agents} agents, 1 x cpu" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_delta_inf_is_allowed(script, call):
    """delta = inf takes the tether away; the baseline has no such flag."""
    status, _, err = call(script, "--dry-run", "--delta", "inf")
    assert (status == 0) == hasattr(script, "double_clip"), err


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_runs_in_one_second(script, monkeypatch, tmp_path):
    """The second run takes the next free name; a folder that cannot be made is refused by flag."""
    monkeypatch.setattr(script, "time", types.SimpleNamespace(time=lambda: 1000.5))
    args = script.Args(run_dir=str(tmp_path / "runs"), num_devices=1, env_id="module:Mine-v0")
    names = [script.open_run(args)[0].name for _ in range(3)]
    stem = f"module_Mine-v0____{script.__name__}__1__"
    assert names == [f"{stem}1000", f"{stem}1001", f"{stem}1002"]
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit:
        script.open_run(dataclasses.replace(args, run_dir=str(tmp_path / "file")))
    assert exit.value.code == 2


def test_every_metric_is_documented():
    """The metrics named in docs/usage.md are those that runs write."""
    text = (ROOT / "docs" / "usage.md").read_text()
    named = re.findall(r"`((?:charts|eval|losses|time)/\w+)`", text)
    assert set(named) == CHARTS | EPISODES | EVAL | WIN_RATE | LOSSES | TIME


# ------------------------------------------------------------------------------- runs, as processes
def check_png(path):
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


@pytest.fixture(scope="module", params=SCRIPTS[:1] + slow(SCRIPTS[1:]))
def smoke(request, environ, tmp_path_factory):
    """Script, finished process, folder and rows of a tiny run of each script."""
    folder, script = tmp_path_factory.mktemp("smoke"), request.param
    flags = [*TINY, "--run-dir", "out", "--seed", "7"]
    flags += ["--guider", "mat"] if hasattr(script.Args, "guider") else []
    flags += ["--track"] if script is SCRIPT else []
    done = run_program(script.__file__, flags, environ, folder)
    run_dir = run_folder(folder / "out")
    return script, done, run_dir, read_rows(run_dir)


def test_smoke_files(smoke):
    """A run leaves its flags, versions and command, its metrics and a picture, in a folder named
    after it; with --track a Weights & Biases run, too, that needs no account."""
    script, done, folder, _ = smoke
    assert re.fullmatch(rf"CoordSum-v0__2x3-4__{script.__name__}__7__\d+", folder.name)
    about = json.loads((folder / "args.json").read_text())
    assert about["args"].keys() == {field.name for field in dataclasses.fields(script.Args)}
    assert about["args"].items() >= {"num_envs": 4, "num_devices": 1, "seed": 7}.items()
    assert about["versions"]["jax"] == jax.__version__
    assert about["args"]["scenario"] == "2x3-4"
    check_png(folder / "learning_curve.png")
    runs = list(folder.parent.parent.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(runs) == (script is SCRIPT)


def test_smoke_rows(smoke):
    """The documented metrics, finite, and right where they are known; evaluation comes first."""
    script, _, _, rows = smoke
    assert [row["global_step"] for row in rows] == [0, 64, 128]
    assert rows[0].keys() == {"global_step"} | EVAL | TIME
    assert all(math.isfinite(x) for row in rows for x in row.values())
    for row in rows:
        assert row["eval/episodic_length"] == 100 and 0 <= row["eval/learner_return"] <= 200
        gap = row["eval/guider_return"] - row["eval/learner_return"]
        assert row["eval/imitation_gap"] == pytest.approx(gap)
    for row in rows[1:]:
        assert row.keys() == {"global_step"} | CHARTS | EVAL | losses_of(script) | TIME
        assert row["charts/num_episodes"] == 0  # they take 100 steps, so none ends within 32
        assert row["losses/first_ratio"] == pytest.approx(1, abs=1e-4)
        assert row["charts/learning_rate"] == pytest.approx(1e-3)
        assert 0 < row["losses/guider_entropy"] <= math.log(3) + 1e-4
        positive = ("charts/SPS", "losses/guider_grad_norm", "losses/learner_grad_norm")
        assert all(row[name] > 0 for name in positive)
    assert rows[2]["time/train_s"] > rows[1]["time/train_s"] > rows[0]["time/train_s"] == 0
    assert rows[2]["time/eval_s"] > rows[1]["time/eval_s"] > rows[0]["time/eval_s"] > 0


def test_smoke_prints_plain_lines(smoke):
    """Without a terminal there is one plain line for each evaluation, and no progress bar."""
    script, done, folder, rows = smoke
    lines = done.stdout.splitlines()
    assert lines[0] == f"{script.__name__}.py: 2 agents, 1 x cpu"
    assert [int(x) for x in re.findall(r"^global_step=(\d+)  ", done.stdout, re.M)] == [0, 64, 128]
    assert f"{rows[2]['eval/learner_return']:.2f}" in lines[3] and folder.name in lines[-1]
    assert not re.search("\r|\x1b|step/s", done.stdout)
    assert not re.search("\r|step/s", done.stderr)


def test_alone(environ, tmp_path):
    """A copy in an empty folder trains on a Jumanji environment, for whole iterations, and logs its
    episodes. A scenario needs tasks.py, and is refused in one line."""
    copy = shutil.copy(SCRIPT.__file__, tmp_path / "mine.py")
    environ = {name: value for name, value in environ.items() if name != "PYTHONPATH"}
    flags = """--env-id LevelBasedForaging-v0 --num-envs 2 --num-steps 128 --num-evals 1
               --total-timesteps 300 --eval-episodes 2 --embed-dim 4 --learner-hidden-dim 4
               --num-minibatches 1 --update-epochs 1 --guider sable --run-dir out""".split()
    assert run_program(copy, flags, environ, tmp_path).stderr == ""
    folder = run_folder(tmp_path / "out")
    rows = read_rows(folder)
    assert folder.name.startswith("LevelBasedForaging-v0____mine__1__")
    assert [row["global_step"] for row in rows] == [0, 256]
    check_png(folder / "learning_curve.png")
    row = rows[1]
    assert row.keys() == {"global_step"} | CHARTS | EPISODES | EVAL | losses_of(SCRIPT) | TIME
    assert row["charts/num_episodes"] >= 2
    assert 0 <= row["charts/episodic_return"] <= 1 and 0 < row["charts/episodic_length"] <= 100
    assert row["losses/first_ratio"] == pytest.approx(1, abs=1e-4)

    flags = ["--env-id", "RobotWarehouse-v0", "--scenario", "tiny-2ag"]
    done = run_program(copy, flags, environ, tmp_path, succeeds=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "--scenario tiny-2ag" in done.stderr and "tasks.py" in done.stderr


@pytest.mark.slow
def test_not_a_number(environ, tmp_path):
    """A loss that is not finite: status 1, one line that names it; earlier rows are kept."""
    flags = [*TINY, "--run-dir", "out", "--guider", "mat", "--learning-rate", "4e9"]
    done = run_program(SCRIPT.__file__, flags, environ, tmp_path, succeeds=False)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "not all is finite in iteration 1" in done.stderr and "nan" in done.stderr
    folder = run_folder(tmp_path / "out")
    assert [row["global_step"] for row in read_rows(folder)] == [0]
    check_png(folder / "learning_curve.png")


@pytest.mark.parametrize("variables, flags, text", [
    ({}, "--num-devices 99", "--num-devices 99"),
    ({}, "--num-envs 3 --num-devices 2", "--num-envs 3: "),
    ({"JAX_PLATFORMS": "cuda"}, "", "JAX_PLATFORMS"),
    ({"JAX_DISABLE_JIT": "1"}, "", "JAX_DISABLE_JIT"),
    ({"WANDB_MODE": "online", "WANDB_API_KEY": ""}, "--track", "--track"),
])
def test_surroundings_that_do_not_work(variables, flags, text, environ, tmp_path):
    """Too few devices, no GPU, no compiler, no login: one line, status 2, no folder."""
    done = run_program(SCRIPT.__file__, flags.split(), environ | variables, succeeds=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert text in done.stderr and list(tmp_path.glob("runs/CoordSum*")) == []


@pytest.mark.parametrize("env_id, scenario", [
    ("RobotWarehouse-v0", ""), *slow([pytest.param("SMAX", "2s3z")])])
def test_double_precision_is_ignored(env_id, scenario, environ):
    """JAX_ENABLE_X64=1, of which some environments know nothing, changes nothing."""
    flags = ["--dry-run", "--env-id", env_id, "--scenario", scenario]
    assert run_program(SCRIPT.__file__, flags, environ | {"JAX_ENABLE_X64": "1"}).stderr == ""


def test_main_leaves_signals_alone(call):
    """Called from another program main() sets no handler, and it works in a thread."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before, results = [signal.getsignal(number) for number in numbers], []
    thread = threading.Thread(target=lambda: results.append(call(SCRIPT, "--dry-run")[0]))
    thread.start()
    thread.join()
    assert results == [0]
    assert [signal.getsignal(number) for number in numbers] == before
