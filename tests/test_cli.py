"""Tests of the scripts as programs: flags, refusals, what a run writes and prints, and how it
ends."""

import dataclasses
import inspect
import json
import math
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from conftest import scripts_with

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = scripts_with("Args", "main")
MAGPO = [script for script in SCRIPTS if hasattr(script.values[0], "double_clip")]
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
@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(script, *flags) -> exit status, stdout, stderr of its main, in an empty folder; training
    is forbidden."""

    def main(script, *flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags])
        monkeypatch.setattr(script, "train", lambda *_: pytest.fail("training began"))
        try:
            status = script.main()
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return main


BAD_VALUES = """--num-envs -4, --num-envs 0, --total-timesteps 10, --total-timesteps -1,
                --num-evals 0, --num-evals -1, --eval-episodes 0, --eval-episodes -2, --num-steps 0,
                --num-steps -8, --num-minibatches 0, --num-minibatches -2, --num-minibatches 3,
                --update-epochs 0, --embed-dim 0, --num-heads -1, --num-heads 0, --num-blocks 0,
                --learner-hidden-dim -1, --num-devices -1, --seed -1, --learning-rate -1,
                --learning-rate 0, --learning-rate nan, --learning-rate inf, --gamma 2,
                --gamma -0.1, --gamma nan, --gae-lambda 1.1, --gae-lambda nan, --clip-coef 0,
                --clip-coef nan, --ent-coef -1, --ent-coef nan, --ent-coef inf, --vf-coef -0.5,
                --vf-coef nan, --max-grad-norm 0, --max-grad-norm nan, --env-id Nope-v0,
                --env-id Cleaner-v0, --scenario bogus"""
BAD_VALUES = [
    entry.strip() for line in BAD_VALUES.splitlines() for entry in line.split(",") if entry.strip()
]
BAD_TETHERS = [
    "--delta 1", "--delta 0.5", "--delta -2", "--delta nan", "--learner-rl-coef -1",
    "--learner-rl-coef nan",
]


def check_refusal(flag, value, status, out, err, folder):
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1 and err.endswith("\n"), err
    named = re.search(rf"{flag} ([^\s:,]+)", err)
    assert named and (named[1] == value or float(named[1]) == float(value)), err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_value(script, bad, call, tmp_path):
    """An impossible value: exit status 2, one line that names flag and value, nothing on stdout, no
    folder."""
    check_refusal(*bad.split(), *call(script, *bad.split()), tmp_path)


@pytest.mark.parametrize("bad", BAD_TETHERS)
@pytest.mark.parametrize("script", MAGPO)
def test_bad_tether(script, bad, call, tmp_path):
    """delta must be above 1 and lambda not negative."""
    check_refusal(*bad.split(), *call(script, *bad.split()), tmp_path)


@pytest.mark.parametrize(
    "env_id, scenario",
    [
        ("RobotWarehouse-v0", "bogus"), ("LevelBasedForaging-v0", "bogus"),
        ("Connector-v3", "bogus"), ("CoordSum-v0", "bogus"), ("RobotWarehouse-v0", "tiny-1ag-hard"),
        ("LevelBasedForaging-v0", "3x3-2p-2f"), ("Snake-v1", "con-5x5x3a"),
    ],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_scenario(script, env_id, scenario, call, tmp_path):
    """A scenario that the environment does not have or cannot build is refused like a bad value."""
    check_refusal(
        "--scenario", scenario, *call(script, "--env-id", env_id, "--scenario", scenario), tmp_path
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_heads_share_the_width(script, call, tmp_path):
    """The guider's width must be divisible by its heads; both flags are named."""
    status, out, err = call(script, "--embed-dim", "10", "--num-heads", "3")
    check_refusal("--embed-dim", "10", status, out, err, tmp_path)
    assert "--num-heads 3" in err


@pytest.mark.parametrize("bad", [
    "--chunk-steps -1", "--chunk-steps 3", "--chunk-steps 256", "--decay-scaling-factor -0.1",
    "--decay-scaling-factor 1.5", "--decay-scaling-factor nan", "--num-minibatches 128"])
@pytest.mark.parametrize(
    "script", [script for script in SCRIPTS if hasattr(script.values[0], "Hidden")]
)
def test_bad_memory(script, bad, call, tmp_path):
    """Chunks divide the rollout, decay does not grow, and minibatches hold whole sequences: there
    are 64."""
    check_refusal(*bad.split(), *call(script, *bad.split()), tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, call):
    """--help lists every flag with a text of its own."""
    status, out, err = call(script, "--help")
    assert (status, err) == (0, "")
    lines = [line.strip(" │|") for line in out.splitlines()]
    chunks = re.split(r"^--", "\n".join(lines), flags=re.M)[1:]
    texts = {}
    for chunk in chunks:
        flag, rest = re.match(r"([a-z-]+)(.*)", chunk, re.S).groups()
        rest = re.sub(r"^, --no-[a-z-]+", "", rest)
        texts[flag] = re.sub(
            r"\(default:.*", "", re.sub(r"^ (?:[A-Z{]\S*)", "", rest), flags=re.S
        ).strip()
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


@pytest.mark.parametrize(
    "flags, names",
    [
        ("--num-evals 1", ["CoordSum-v0", "3 agents", "10 actions"]),
        (
            "--env-id LevelBasedForaging-v0 --scenario 8x8-2p-2f-coop",
            ["LevelBasedForaging-v0 8x8-2p-2f-coop", "2 agents"],
        ),
    ],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run(script, flags, names, call, monkeypatch, tmp_path):
    """--dry-run says in one line what would run, and compiles no network, makes no folder, trains
    nothing."""
    monkeypatch.setattr(jax, "pmap", lambda *_, **__: pytest.fail("a device program was made"))
    status, out, err = call(script, "--dry-run", *flags.split())
    assert (status, err, len(out.splitlines())) == (0, "", 1)
    assert all(name in out for name in names), out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_delta_inf_is_allowed(script, call):
    """delta = inf takes the tether away; the baseline has no such flag."""
    status, _, err = call(script, "--dry-run", "--delta", "inf")
    assert (status == 0) == hasattr(script, "double_clip"), err


# ---------------------------------------------------------------------------- rows, in this process
@pytest.mark.parametrize("script", SCRIPTS)
def test_win_rate_only_where_there_is_one(script):
    """The evaluation row holds means over episodes, and a win rate only for environments that have
    one."""
    learner = script.Episodes([1.0, 3.0], [10.0, 20.0], [0.0, 1.0], [1.0, 1.0])
    guider = script.Episodes([4.0, 6.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0])
    results = jax.tree.map(np.array, (learner, guider), is_leaf=lambda x: isinstance(x, list))
    row = script.eval_row(*results, True)
    assert row.keys() == EVAL | WIN_RATE and script.eval_row(*results, False).keys() == EVAL
    expected = {
        "learner_return": 2, "learner_return_std": 1, "guider_return": 5, "imitation_gap": 3,
        "episodic_length": 15, "win_rate": 0.5,
    }
    assert row == {f"eval/{name}": x for name, x in expected.items()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_learning_rate(script):
    """The learning rate stays, or falls linearly with --anneal-lr: whole at the first iteration,
    never 0."""
    args = script.Args(num_envs=4, num_steps=8, total_timesteps=140, learning_rate=0.5)
    assert [script.learning_rate(args, i) for i in range(4)] == [0.5] * 4
    args = dataclasses.replace(args, anneal_lr=True)
    assert [float(script.learning_rate(args, i)) for i in range(4)] == [0.5, 0.375, 0.25, 0.125]


@pytest.mark.parametrize("script", SCRIPTS)
def test_wandb_gets_the_same_rows(script, monkeypatch, tmp_path, capsys):
    """wandb is given the flags, and the row of metrics.jsonl at its global_step; it is finished at
    the end."""
    logged, given = [], {}

    def init(**kwargs):
        given.update(kwargs)
        return types.SimpleNamespace(
            log=lambda row, step: logged.append((step, dict(row))), id="an id",
            finish=lambda: logged.append("finish"),
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    args = script.Args(run_dir=str(tmp_path), track=True, num_devices=1)
    args = dataclasses.replace(args, wandb_project_name="project", wandb_entity="team")
    logger = script.Logger(args)
    row = {
        "global_step": 64, "eval/learner_return": 1.5, "eval/guider_return": 2.5,
        "losses/value_loss": 0.25,
    }
    logger.log(row)
    logger.close()
    (folder,) = tmp_path.iterdir()
    assert (
        logged == [(64, json.loads((folder / "metrics.jsonl").read_text())), "finish"]
        and logged[0][1] == row
    )
    assert (given["project"], given["entity"], given["name"]) == ("project", "team", folder.name)


def test_every_metric_is_documented():
    """The metrics named in docs/usage.md are those that runs write."""
    text = (ROOT / "docs" / "usage.md").read_text()
    named = re.findall(r"`((?:charts|eval|losses|time)/\w+)`", text)
    assert set(named) == CHARTS | EPISODES | EVAL | WIN_RATE | LOSSES | TIME


# ------------------------------------------------------------------------------- runs, as processes
def run(path, flags, folder, environ):
    """Runs a script in a folder -> the finished process."""
    command = [sys.executable, str(path), *flags]
    return subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=400
    )


def read_rows(run_dir):
    """The rows of the only run in a folder; every line must be complete JSON without NaN."""
    (folder,) = pathlib.Path(run_dir).iterdir()

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    text = (folder / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return folder, [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def check_png(path):
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


@pytest.fixture(scope="module", params=SCRIPTS)
def smoke(request, environ, tmp_path_factory):
    """Script, finished process, folder and rows of a tiny run of each script."""
    folder, script = tmp_path_factory.mktemp("smoke"), request.param
    flags = [*TINY, "--run-dir", "out", "--seed", "7"]
    flags += ["--guider", "mat"] if hasattr(script.Args, "guider") else []
    flags += ["--track"] if script is MAGPO[0].values[0] else []
    done = run(script.__file__, flags, folder, environ)
    assert done.returncode == 0, done.stderr
    return script, done, *read_rows(folder / "out")


def test_smoke_files(smoke):
    """A run leaves its flags, versions, devices and command, its metrics and a picture, in a folder
    named after it."""
    script, done, folder, _ = smoke
    assert re.fullmatch(rf"CoordSum-v0__2x3-4__{script.__name__}__7__\d+", folder.name)
    about = json.loads((folder / "args.json").read_text())
    assert about["args"].keys() == {field.name for field in dataclasses.fields(script.Args)}
    assert (about["args"]["num_envs"], about["args"]["num_devices"], about["args"]["seed"]) == (
        4, 1, 7,
    )
    assert about["versions"]["jax"] == jax.__version__ and len(about["devices"]) == 1
    assert "--scenario 2x3-4" in about["command"]
    check_png(folder / "learning_curve.png")


def test_smoke_tracked(smoke):
    """With --track there is a Weights & Biases run that needs no account; without it there is
    none."""
    script, _, folder, _ = smoke
    assert len(list(folder.glob("wandb/offline-run-*/run-*.wandb"))) == (
        script is MAGPO[0].values[0]
    )


def test_smoke_rows(smoke):
    """Evaluation comes first, at step 0, then after each interval with exactly the documented
    metrics."""
    script, _, _, rows = smoke
    assert [row["global_step"] for row in rows] == [0, 64, 128]
    assert rows[0].keys() == {"global_step"} | EVAL | TIME
    for row in rows[1:]:  # episodes take 100 steps, so none ends within 32
        assert row.keys() == {"global_step"} | CHARTS | EVAL | losses_of(script) | TIME
        assert row["charts/num_episodes"] == 0


def test_smoke_values(smoke):
    """All values are finite numbers, and those that are known beforehand are right."""
    _, _, _, rows = smoke
    assert all(
        isinstance(x, (int, float)) and math.isfinite(x) for row in rows for x in row.values()
    )
    for row in rows:
        assert row["eval/episodic_length"] == 100 and 0 <= row["eval/learner_return"] <= 200
        assert row["eval/imitation_gap"] == pytest.approx(
            row["eval/guider_return"] - row["eval/learner_return"]
        )
    for row in rows[1:]:
        assert row["losses/first_ratio"] == pytest.approx(1, abs=1e-4)
        assert 0 < row["losses/guider_entropy"] <= math.log(3) + 1e-4
        assert (
            row["charts/SPS"] > 0
            and row["losses/guider_grad_norm"] > 0
            and row["losses/learner_grad_norm"] > 0
        )
    assert [row["charts/learning_rate"] for row in rows[1:]] == [1e-3, 1e-3]
    assert rows[2]["time/train_s"] > rows[1]["time/train_s"] > rows[0]["time/train_s"] == 0
    assert rows[2]["time/eval_s"] > rows[1]["time/eval_s"] > rows[0]["time/eval_s"] > 0


def test_smoke_prints_plain_lines(smoke):
    """Without a terminal there is one plain line for each evaluation, and no progress bar."""
    script, done, folder, rows = smoke
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{script.__name__}.py: CoordSum-v0 2x3-4, 2 agents, 3 actions")
    assert [int(x) for x in re.findall(r"^global_step=(\d+)  ", done.stdout, re.M)] == [0, 64, 128]
    assert f"{rows[2]['eval/learner_return']:.2f}" in lines[3] and folder.name in lines[-1]
    assert (
        "\r" not in done.stdout + done.stderr
        and "\x1b" not in done.stdout
        and "step/s" not in done.stderr
    )


@pytest.fixture(scope="module")
def alone(environ, tmp_path_factory):
    """Finished process, folder and rows of a copy of the script with nothing beside it; two
    episodes of 100 steps."""
    folder, script = tmp_path_factory.mktemp("alone"), MAGPO[0].values[0]
    copy = shutil.copy(script.__file__, folder / "mine.py")
    flags = """--env-id LevelBasedForaging-v0 --num-envs 2 --num-steps 128 --num-evals 1
               --total-timesteps 300 --eval-episodes 2 --embed-dim 4 --learner-hidden-dim 4
               --num-minibatches 1 --update-epochs 1 --guider sable --run-dir out""".split()
    done = run(copy, flags, folder, {k: v for k, v in environ.items() if k != "PYTHONPATH"})
    assert done.returncode == 0, done.stderr
    return done, *read_rows(folder / "out")


def test_alone(alone):
    """The script copied to an empty folder trains on a Jumanji environment; what does not fill an
    iteration is left."""
    done, folder, rows = alone
    assert folder.name.startswith("LevelBasedForaging-v0____mine__1__") and done.stderr == ""
    assert [row["global_step"] for row in rows] == [0, 256]
    check_png(folder / "learning_curve.png")


def test_alone_episodes(alone):
    """Where episodes ended, their number, mean return and mean length are logged."""
    row = alone[2][1]
    assert row.keys() == {"global_step"} | CHARTS | EPISODES | EVAL | LOSSES | TIME
    assert row["charts/num_episodes"] >= 2
    assert 0 <= row["charts/episodic_return"] <= 1 and 0 < row["charts/episodic_length"] <= 100
    assert row["losses/first_ratio"] == pytest.approx(1, abs=1e-4)


def test_alone_without_tasks(environ, tmp_path):
    """Where tasks.py is not beside the script, a scenario is refused in one line."""
    copy = shutil.copy(MAGPO[0].values[0].__file__, tmp_path / "mine.py")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    alone = {name: value for name, value in environ.items() if name != "PYTHONPATH"}
    done = run(copy, ["--env-id", "RobotWarehouse-v0", "--scenario", "tiny-2ag"], elsewhere, alone)
    check_refusal("--scenario", "tiny-2ag", done.returncode, done.stdout, done.stderr, elsewhere)
    assert "tasks" in done.stderr


@pytest.mark.slow
def test_my_env_on_two_devices(environ, tmp_path):
    """A module is imported after the CPU is split into devices; its environment has a win rate."""
    flags = """--env-id examples.my_env:Meet-v0 --num-devices 2 --num-envs 4 --num-steps 16
               --total-timesteps 64 --num-evals 1 --eval-episodes 2 --embed-dim 4
               --learner-hidden-dim 4 --update-epochs 1 --guider mat --run-dir out""".split()
    done = run(MAGPO[0].values[0].__file__, flags, tmp_path, environ)
    assert done.returncode == 0, done.stderr
    folder, rows = read_rows(tmp_path / "out")
    assert len(json.loads((folder / "args.json").read_text())["devices"]) == 2
    assert [row["global_step"] for row in rows] == [0, 64]
    assert rows[1].keys() == {"global_step"} | CHARTS | EPISODES | EVAL | WIN_RATE | LOSSES | TIME


BROKEN = """
import jumanji

class Broken(jumanji.environments.Snake):
    def reset(self, key):
        raise ValueError("the well is dry")

jumanji.register(id="Broken-v0", entry_point=f"{__name__}:Broken")
"""


def test_error_inside_an_environment(environ, tmp_path):
    """An error in an environment of the current directory comes with its traceback."""
    (tmp_path / "my_broken.py").write_text(BROKEN)
    flags = ["--env-id", "my_broken:Broken-v0"]
    done = run(MAGPO[0].values[0].__file__, flags, tmp_path, environ)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Traceback") and "my_broken.py" in done.stderr
    assert "ValueError: the well is dry\n" in done.stderr and "--env-id" not in done.stderr


@pytest.mark.parametrize("script", MAGPO[:1])
def test_interrupt(script, environ, tmp_path):
    """Ctrl-C: exit status 130, one short line on stderr, whole lines of metrics and a learning
    curve."""
    flags = [
        *TINY, "--guider", "mat", "--run-dir", "out", "--total-timesteps", "64000000",
        "--num-evals", "1000000",
    ]
    # a child inherits SIG_IGN, but no handler
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, script.__file__, *flags], cwd=tmp_path, env=environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    signal.signal(signal.SIGINT, before)
    try:
        while not process.stdout.readline().startswith("global_step=64 "):
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        start = time.time()
        out, err = process.communicate(timeout=60)
        assert time.time() - start < 30
    finally:
        process.kill()
    folder, rows = read_rows(tmp_path / "out")
    goes_on = f"--resume {pathlib.Path('out') / folder.name} goes on"
    assert (process.returncode, err) == (130, f"{script.__name__}.py: interrupted, {goes_on}\n")
    assert len(rows) >= 2 and rows[1]["global_step"] == 64 and folder.name in out
    check_png(folder / "learning_curve.png")


@pytest.mark.slow
@pytest.mark.parametrize("script", MAGPO[:1])
def test_not_a_number(script, environ, tmp_path):
    """A loss that is not finite: exit status 1, one line with the term and the iteration; earlier
    rows are kept."""
    flags = [*TINY, "--run-dir", "out", "--guider", "mat", "--learning-rate", "1e30"]
    done = run(script.__file__, flags, tmp_path, environ)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    term, iteration = re.search(
        r"(losses/\w+) is not finite in iteration (\d+)", done.stderr
    ).groups()
    assert term in LOSSES and iteration == "1"
    folder, rows = read_rows(tmp_path / "out")
    assert [row["global_step"] for row in rows] == [0]
    check_png(folder / "learning_curve.png")


@pytest.mark.parametrize(
    "flags, flag, value",
    [
        ("--delta 1", "--delta", "1"), ("--num-devices 99", "--num-devices", "99"),
        ("--num-envs 3 --num-devices 2", "--num-envs", "3"),
        ("--eval-episodes 5 --num-devices 2", "--eval-episodes", "5"),
    ],
)
def test_bad_value_as_a_process(flags, flag, value, environ, tmp_path):
    """The exit status reaches the shell; work that the devices cannot share is refused."""
    done = run(MAGPO[0].values[0].__file__, flags.split(), tmp_path, environ)
    check_refusal(flag, value, done.returncode, done.stdout, done.stderr, tmp_path)
