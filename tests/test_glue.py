"""Tests of what joins the parts: the loop of training with its stops, resuming and files, and the
team's discount.

`train` is tested with stand-ins for what it calls, so that nothing large is compiled.
"""

import errno
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import scripts_with
from jax.experimental import io_callback
from jumanji.types import StepType

pytestmark = pytest.mark.usefixtures("quick_compile")


# -------------------- Training with stand-ins for its parts ---------------------------------------
STAND_INS = ["init_state", "train_iteration", "make_networks", "evaluate", "open_run"]
TRAIN = scripts_with("train", "double_clip", replaced=STAND_INS)
TRAIN = TRAIN or scripts_with("train", replaced=STAND_INS)
STAND_IN_STEPS = 32  # of an iteration: 4 environments, 8 steps
LOOP_FLAGS = {
    "num_evals": 3,
    "learning_rate": 0.5,
    "total_timesteps": 7 * STAND_IN_STEPS + 5,  # seven iterations, and a rest that fills none
}


class Clock:
    """In place of the module `time`: time passes only where a stand-in lets it."""

    per_iteration, per_evaluation = 3.0, 5.0

    def __init__(self):
        self.seconds = 1000.0

    def time(self):
        return self.seconds


def train_with_stand_ins(
    script, folder, finite_until=1000, stop_after=None, endless=False, faults=(), **flags
):
    """Runs `train` with functions that cost nothing in place of those it calls -> what it did:
    rows, what was tracked, arguments of evaluations, iterations, checkpoints, exit status.

    The "parameters" are the keys that the start got and the number of iterations so far. Iteration
    i has a value loss of i * i, is finite (with `faults`) if i <= finite_until, and ends i episodes
    with a return of 10 i and a length of 20 i in total. The learner's return is the square of how
    far the iterations are from 4. A signal comes during iteration `stop_after`. Files are real.
    """
    clock, names = Clock(), ("rows", "tracked", "evaluations", "trained", "saved", "released")
    loop = types.SimpleNamespace(status=None, **{name: [] for name in names})

    def init_state(args, env, guider, learner, params_key, key):
        fields = dict.fromkeys(script.TrainState._fields, jnp.zeros(()))
        fields["params"] = {"keys": {"params": params_key, "first": key, "i": jnp.zeros(1)}}
        return script.TrainState(**fields)

    def note_iteration(number):
        clock.seconds += clock.per_iteration
        loop.trained.append(int(number))
        if number == stop_after:
            script.STOP.append(15)
        return np.float32(0)

    def train_iteration(args, env, guider, learner, state):
        i = state.params["keys"]["i"][0] + 1
        number = i + io_callback(note_iteration, jax.ShapeDtypeStruct((), jnp.float32), i)
        loss = jnp.where(i <= finite_until, number * number, jnp.nan)
        metrics = {"losses/value_loss": loss, "charts/learning_rate": 0.5 / number}
        metrics |= {"return": 10 * number, "length": 20 * number, "won": 0.0, "episodes": number}
        metrics |= {x: loss if x in faults else 0.0 for x in ("observation", "reward", "target")}
        params = {"keys": state.params["keys"] | {"i": i[None]}}
        metrics = jax.tree.map(jnp.float32, metrics)
        return state._replace(params=params), metrics

    def note_evaluation(keys, key):
        clock.seconds += clock.per_evaluation
        loop.evaluations.append((jax.tree.map(np.asarray, keys), np.asarray(key)))
        return np.float32(jnp.nan if endless else 0)

    def evaluate(args, env, guider, learner, params, key):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        zero = io_callback(note_evaluation, shape, params["keys"], key)
        returns = (params["keys"]["i"][0] - 4) ** 2 + zero
        return {"eval/learner_return": returns, "eval/guider_return": -returns}

    save_checkpoint, log = script.save_checkpoint, script.log

    def save_and_note(path, state, progress):
        loop.saved.append(progress[0])
        save_checkpoint(path, state, progress)

    def log_and_note(folder, tracker, rows, params):
        loop.rows = json.loads(json.dumps(rows))
        return log(folder, tracker, rows, params)

    tracker = types.SimpleNamespace(log=lambda row, step: loop.tracked.append((step, row)))
    lock = types.SimpleNamespace(release=lambda: loop.released.append(1))
    opened = pathlib.Path(folder), lock, tracker
    sizes = {"num_envs": 4, "num_steps": 8, "num_devices": 1}
    args = script.Args(**sizes | LOOP_FLAGS | flags)
    stand_ins = {
        "make_networks": lambda args, env: (None, None), "init_state": init_state, "STOP": [0],
        "train_iteration": train_iteration, "evaluate": evaluate, "time": clock,
        "log": log_and_note, "save_checkpoint": save_and_note,
        "open_run": lambda args, starts: opened,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in stand_ins.items():
            patch.setattr(script, name, stand_in)
        try:
            script.train(args, None, [])
        except SystemExit as end:
            loop.status = end.code
    return loop


@pytest.fixture(scope="module", params=TRAIN)
def loop(request, tmp_path_factory):
    """A run of seven iterations and three evaluations after the first -> it, script, folder."""
    folder = tmp_path_factory.mktemp("loop")
    return train_with_stand_ins(request.param, folder), request.param, folder


def test_evaluations_are_evenly_spaced(loop):
    """Seven iterations are evaluated before the first and after the third, the fifth and the last.

    What is evaluated are the parameters of that moment, which are saved each time. Of the returns
    16, 1, 1 and 9 the first is the best; the last networks are the newest.
    """
    loop, _, folder = loop
    steps = [row["global_step"] for row in loop.rows]
    assert steps == [STAND_IN_STEPS * iteration for iteration in (0, 3, 5, 7)]
    assert [keys["i"] for keys, _ in loop.evaluations] == [0, 3, 5, 7] == loop.saved
    assert num_iterations(folder / "best_keys.safetensors") == 0
    assert num_iterations(folder / "keys.safetensors") == 7
    assert loop.released == [1]  # the lock


@pytest.mark.parametrize("script", TRAIN)
def test_at_most_one_evaluation_per_iteration(script, tmp_path):
    """More evaluations than iterations give one after each; of the first and the last, which are
    equally good, the last is the best."""
    flags = {"num_evals": 20, "total_timesteps": 8 * STAND_IN_STEPS}
    loop = train_with_stand_ins(script, tmp_path, **flags)
    steps = [row["global_step"] for row in loop.rows]
    assert steps == [STAND_IN_STEPS * iteration for iteration in range(9)]
    assert num_iterations(tmp_path / "best_keys.safetensors") == 8


def test_means_and_sums_over_the_interval(loop):
    """The square of the iteration is logged as its mean over iterations 1-3, 4-5 and 6-7, and the
    episodes that ended in them are counted; Weights & Biases gets each row at its step."""
    assert loop[0].tracked == [(row["global_step"], row) for row in loop[0].rows]
    rows = loop[0].rows[1:]
    assert "charts/episodic_return" not in loop[0].rows[0]
    losses = [row["losses/value_loss"] for row in rows]
    np.testing.assert_allclose(losses, [(1 + 4 + 9) / 3, (16 + 25) / 2, (36 + 49) / 2], rtol=1e-6)
    assert [row["charts/num_episodes"] for row in rows] == [1 + 2 + 3, 4 + 5, 6 + 7]
    np.testing.assert_allclose([row["charts/episodic_return"] for row in rows], 10, rtol=1e-6)
    np.testing.assert_allclose([row["charts/episodic_length"] for row in rows], 20, rtol=1e-6)


def test_times_and_speed(loop):
    """Training and evaluation are timed apart, since the run began; SPS is the interval's."""
    loop, _, _ = loop
    train_seconds = [row["time/train_s"] for row in loop.rows]
    eval_seconds = [row["time/eval_s"] for row in loop.rows]
    speeds = [row["charts/SPS"] for row in loop.rows[1:]]
    np.testing.assert_allclose(train_seconds, [Clock.per_iteration * i for i in (0, 3, 5, 7)])
    np.testing.assert_allclose(eval_seconds, [Clock.per_evaluation * i for i in (1, 2, 3, 4)])
    np.testing.assert_allclose(speeds, STAND_IN_STEPS / Clock.per_iteration)
    assert "charts/SPS" not in loop.rows[0]
    assert len({row["time/compile_s"] for row in loop.rows}) == 1


def num_iterations(path):
    """The number of iterations in a file of networks."""
    return safetensors.numpy.load_file(path)["i"]


def test_keys(loop, tmp_path):
    """No two evaluations play with the same key, nor with one of the parameters or of training. One
    seed gives the same keys twice; another seed gives others, of all three kinds."""
    first, script, _ = loop

    def keys(loop):
        start, own = loop.evaluations[0][0], [key for _, key in loop.evaluations]
        return [tuple(key) for key in (start["params"], start["first"], *own)]

    again, other = (train_with_stand_ins(script, tmp_path, seed=seed) for seed in (1, 2))
    assert len(set(keys(first))) == 6 and keys(first) == keys(again)
    assert not set(keys(again)) & set(keys(other))


@pytest.mark.parametrize("faults, named", [
    (["target", "reward", "observation"], "observation"), (["target", "reward"], "reward"),
    (["target"], "target"), ([], "losses/value_loss")])
@pytest.mark.parametrize("script", TRAIN)
def test_what_is_not_finite_ends_the_run(faults, named, script, tmp_path, capsys):
    """One line names the iteration, here the second interval's first, and the cause; earlier rows
    and the checkpoint are kept, also if a signal comes at the same time."""
    loop = train_with_stand_ins(
        script, tmp_path, finite_until=3, stop_after=4, faults=faults)
    err = capsys.readouterr().err
    assert loop.status == 1 and len(err.splitlines()) == 1
    assert f"error: {named} is nan in iteration 4" in err
    assert [row["global_step"] for row in loop.rows] == [0, 3 * STAND_IN_STEPS]
    assert loop.saved == [0, 3]


@pytest.mark.parametrize("script", TRAIN)
def test_endless_episodes_end_the_run(script, tmp_path, capsys):
    """An evaluation in which an episode does not end: one line with the limit, status 1."""
    loop = train_with_stand_ins(script, tmp_path, endless=True)
    err = capsys.readouterr().err
    assert (loop.status, len(err.splitlines()), loop.saved) == (1, 1, [])
    assert str(script.MAX_EPISODE_STEPS) in err


# -------------------- Stops and going on ----------------------------------------------------------
def contents(folder):
    """What does not depend on the clock of all files but the picture."""
    with np.load(folder / "checkpoint_0.npz") as file:
        saved = {name: file[name].tolist() for name in file.files if name != "progress"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: x for name, x in row.items() if name != "time/compile_s"} for row in rows]
    networks = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    return saved, rows, networks


@pytest.mark.parametrize("stop_after", [3, 4, 6, 7])
def test_stopped_and_resumed_equals_uninterrupted(stop_after, loop, tmp_path):
    """A signal saves after the iteration in which it comes, in mid-interval too; whatever became of
    metrics.jsonl, the same rows and networks follow."""
    _, script, folder = loop
    stopped = train_with_stand_ins(script, tmp_path, stop_after=stop_after)
    assert stopped.trained == list(range(1, stop_after + 1)) and stopped.saved[-1] == stop_after
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes().replace(b"\n", b"\r\n") + b'{"global_step": 1}\r\n{"a')
    resumed = train_with_stand_ins(script, tmp_path, resume=str(tmp_path))
    assert resumed.trained == list(range(stop_after + 1, 8))
    if stop_after < 7:
        assert contents(tmp_path) == contents(folder)


@pytest.mark.parametrize("done", [5, 7])
@pytest.mark.parametrize("script", TRAIN)
def test_nothing_to_do(script, done, tmp_path, capsys):
    """A run that is resumed with its budget done, or with a smaller one, says so in one line,
    compiles nothing large and leaves the files alone."""
    train_with_stand_ins(script, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    flags = {"resume": str(tmp_path), "total_timesteps": done * STAND_IN_STEPS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", lambda *_: pytest.fail("it compiles"))
        loop = train_with_stand_ins(script, tmp_path, **flags)
    out, err = capsys.readouterr()
    assert (loop.trained, loop.evaluations, loop.saved, loop.status, err) == ([], [], [], None, "")
    assert len(out.splitlines()) == 1 and f"--total-timesteps {done * STAND_IN_STEPS}" in out
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("script", TRAIN)
def test_more_timesteps_than_before(script, tmp_path):
    """A longer budget goes on from where the run ended, with its rows."""
    train_with_stand_ins(script, tmp_path)
    flags = {"resume": str(tmp_path), "total_timesteps": 10 * STAND_IN_STEPS, "num_evals": 5}
    loop = train_with_stand_ins(script, tmp_path, **flags)
    steps = [row["global_step"] // STAND_IN_STEPS for row in loop.rows]
    assert (loop.trained, steps) == ([8, 9, 10], [0, 3, 5, 7, 8, 10])
    np.testing.assert_allclose(loop.rows[-1]["time/train_s"], 10 * Clock.per_iteration)


FILES = """metrics.jsonl keys.safetensors best_keys.safetensors learning_curve.png
           checkpoint_0.npz""".split()


@pytest.mark.parametrize("first", FILES)
@pytest.mark.parametrize("script", TRAIN)
def test_full_disk(script, first, tmp_path, monkeypatch, capsys):
    """From some file on nothing can be written: one line names that file, status 1, and what is
    there is whole and can be resumed."""
    replace, state = pathlib.Path.replace, {"writes": 0, "full": False}

    def replace_until_full(new, path):
        state["writes"] += path.name == first
        state["full"] |= state["writes"] > 1  # the disk fills up after the first evaluation
        if state["full"]:
            new.write_bytes(new.read_bytes()[:-1])
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(new, path)

    monkeypatch.setattr(pathlib.Path, "replace", replace_until_full)
    flags = {"total_timesteps": 8 * STAND_IN_STEPS, "num_evals": 1}  # the second is as good
    loop = train_with_stand_ins(script, tmp_path, **flags)
    err = capsys.readouterr().err
    assert loop.status == 1 and len(err.splitlines()) == 1
    assert f"cannot write {tmp_path / first}: [Errno 28] No space left on device" in err
    assert {path.name for path in tmp_path.iterdir() if path.name[:4] != "new_"} == set(FILES)
    monkeypatch.undo()
    resumed = train_with_stand_ins(script, tmp_path, **flags, resume=str(tmp_path))
    assert resumed.trained == list(range(1, 9)) and len(resumed.rows) == 2


@pytest.mark.parametrize("script", TRAIN)
def test_all_is_saved_before_a_line_is_printed(script, tmp_path, monkeypatch):
    """If nobody reads it (`| head -1`), the checkpoint of the first evaluation is there."""

    def write(line):
        assert "learner 16  guider -16 " in line
        raise BrokenPipeError

    monkeypatch.setattr(script.tqdm, "write", write)
    with pytest.raises(BrokenPipeError):
        train_with_stand_ins(script, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)


# -------------------- The team's discount ---------------------------------------------------------
@pytest.mark.parametrize("last, discounts, expected", [
    (True, [0.0, 0.0], 0.0), (True, [0.0, 1.0], 1.0), (True, [1.0, 0.0], 1.0),
    (True, [1.0, 1.0], 1.0), (False, [0.0, 0.0], 1.0), (False, [0.0, 1.0], 1.0),
    (False, [1.0, 1.0], 1.0),
])
@pytest.mark.parametrize("script", scripts_with("TeamEnv"))
def test_discount_of_the_team(script, last, discounts, expected, monkeypatch):
    """The team's returns end only with an episode, and only if all agents' returns end."""
    env = script.make_env("CoordSum-v0", "2x3-4")
    state = env.reset(jax.random.PRNGKey(0))
    _, timestep = env.env.reset(jax.random.PRNGKey(0))
    step_type = StepType.LAST if last else StepType.MID
    timestep = timestep.replace(step_type=step_type, discount=jnp.array(discounts))
    monkeypatch.setattr(env.env, "step", lambda game, action: (game, timestep.replace(reward=1.0)))
    _, _, discount, ended = env.step(state, jnp.zeros(2, jnp.int32))
    assert (bool(ended), float(discount)) == (last, expected)
