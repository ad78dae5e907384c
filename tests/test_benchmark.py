"""Tests of the benchmark folder: statistics, tables, pictures, sweeps, and all commands."""

import importlib
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import tyro

import tasks

ROOT = pathlib.Path(__file__).parent.parent
BENCHMARK = ROOT / "benchmark"
sys.path.append(str(BENCHMARK))
aggregate, evaluations, figures, paper, plot, run, tasks_table = (
    importlib.import_module(name)
    for name in "aggregate evaluations figures paper plot run tasks_table".split())
checkpoint, env_speed, gpu, speed = (
    importlib.import_module(name) for name in "checkpoint env_speed gpu speed".split())

# Writes the steps that a training script writes, without training. --sleep is in seconds.
TOY = """
import dataclasses, json, math, os, time
import tyro

@dataclasses.dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    seed: int = 1
    run_dir: str = "runs"
    num_devices: int = 0
    env_id: str = "CoordSum-v0"
    scenario: str = ""
    num_envs: int = 2
    num_steps: int = 5
    total_timesteps: int = 1_05
    num_evals: int = 2
    eval_episodes: int = 2
    delta: float = math.inf
    anneal_lr: bool = False
    sleep: float = 0.0
    fail: bool = False

args = tyro.cli(Args)
name = f"{args.env_id}__{args.scenario}__{args.exp_name}__{args.seed}__{time.time_ns()}"
folder = f"{args.run_dir}/{name}"
os.makedirs(folder)
about = {"args": vars(args) | {"num_devices": 1}, "script": os.path.basename(__file__)}
json.dump(about, open(f"{folder}/args.json", "w"))
for step in (0, 50, 100):
    with open(f"{folder}/metrics.jsonl", "a") as file:
        row = {"global_step": step, "charts/SPS": 1000.0 + step, "time/compile_s": 7.0}
        file.write(json.dumps(row) + "\\n")
    time.sleep(args.sleep)
    if args.fail:
        raise SystemExit(3)
"""


def write_run(run_dir, exp_name, seed, returns, gap=0.0, num_steps=50, complete=True, **other):
    """A folder as a run leaves it: an evaluation every 100 steps, a KL from the second on."""
    args = {"env_id": "CoordSum-v0", "scenario": "3x10=10", "exp_name": exp_name, "seed": seed}
    args |= {"run_dir": str(run_dir), "num_envs": 2, "num_steps": num_steps}
    args["total_timesteps"] = 100 * (len(returns) - 1) + (10 if complete else 100)
    args |= other
    name = f"{args['env_id']}__{args['scenario']}__{exp_name}__{seed}__{1700000000 + seed}"
    folder = pathlib.Path(run_dir, name)
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"args": args, "script": "magpo_ff.py"}))
    rows = []
    for i, x in enumerate(returns):
        row = {"global_step": 100 * i, "eval/learner_return": x, "eval/guider_return": x + gap}
        row |= {"time/compile_s": 10.0, "time/train_s": 60.0 * i, "time/eval_s": 1.0 * i}
        rows.append(row | ({"losses/learner_kl": 0.25} if i else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluation(exp_name, seed, step, learner, env_id="CoordSum-v0", scenario="3x10=10", **other):
    """A row of a table of evaluations."""
    row = {"env_id": env_id, "scenario": scenario, "exp_name": exp_name, "seed": seed}
    row |= {"global_step": step, "learner": learner, "guider": learner + 1, "win_rate": None}
    return row | {"learner_kl": None, "wall_seconds": 0.5 * step} | other


# -------------------- Statistics ------------------------------------------------------------------
def test_aggregates_by_hand(capsys, tmp_path):
    rows = []
    for exp_name, scenario, start, ends in (
        ("a", "3x10=10", 0, (10, 6)), ("b", "3x10=10", 0, (5, 5)),
        ("a", "other", -6, (-2, -2)), ("b", "other", -6, (-1, -1)),
        ("a", "of a alone", 0, (1e6, 1e6)),
    ):
        for seed, end in enumerate(ends):
            task = {"scenario": scenario, "guider": None}
            rows.append(evaluation(exp_name, seed, 0, float(start), **task))
            rows.append(evaluation(exp_name, seed, 100, float(end), **task))
    pd.DataFrame(rows).to_csv(tmp_path / "x.csv", index=False)

    frame = evaluations.group(evaluations.read([str(tmp_path / "x.csv")]), "", {}, {})
    scores = aggregate.normalise(evaluations.final(frame, 1), frame)
    assert list(scores) == ["a", "b"]
    np.testing.assert_allclose(scores["a"], [[1, 0.6], [0.8, 0.8]])
    np.testing.assert_allclose(scores["b"], [[0.5, 0.5], [1, 1]])

    out = str(tmp_path / "a.png")
    words = [str(tmp_path / "x.csv"), "--reference", "a", "--last", "1", "--out", out]
    assert aggregate.main(words) == 0
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[2] for row in table] == [
        "0.8 [0.7, 0.9]", "0.75 [0.75, 0.75]",  # mean
        "0.8 [0.7, 0.9]", "0.75 [0.75, 0.75]",  # IQM, of the middle two of four runs
        "0.5 [0.5, 0.5]"]  # better in the first task, worse in the second
    assert pathlib.Path(out).read_bytes()[:4] == b"\x89PNG"
    assert aggregate.main([str(tmp_path / "x.csv"), "--reference", "c"]) == 2
    assert "--reference c: must be one of a, b" in capsys.readouterr().err


# -------------------- Evaluations -----------------------------------------------------------------
def test_runs_are_read_with_warnings(tmp_path, capsys):
    for seed in (2, 1):
        write_run(tmp_path, "delta_10", seed, [0, seed])
        write_run(tmp_path, "delta_2", seed, [0, seed], gap=3.0)
    unfinished = write_run(tmp_path, "delta_2", 3, [0, 1], complete=False)
    write_run(tmp_path, "delta_2", 4, [0, 4], num_steps=25)
    write_run(tmp_path, "delta_inf", 1, [0, 1])
    write_run(tmp_path / "again", "delta_inf", 1, [0, 5])
    again = "CoordSum-v0__3x10=10__delta_inf__1__1"
    os.rename(tmp_path / f"again/{again}700000001", tmp_path / f"{again}800000000")

    frame = evaluations.read_runs(str(tmp_path))
    warnings = capsys.readouterr().err
    assert f"not finished: {unfinished}\n" in warnings
    assert "seeds of one name differ in num_steps" in warnings
    assert "the later one counts" in warnings
    assert list(frame.columns) == evaluations.COLUMNS
    last = frame[frame["global_step"] == 100].set_index(["exp_name", "seed"])
    assert last["learner"].to_dict() == {
        ("delta_10", 1): 1, ("delta_10", 2): 2, ("delta_2", 1): 1, ("delta_2", 2): 2,
        ("delta_2", 4): 4, ("delta_inf", 1): 5,
    }
    row = last.loc["delta_2", 2]
    assert (row["guider"], row["learner_kl"], row["wall_seconds"]) == (5, 0.25, 71)
    assert pd.isna(row["win_rate"])
    assert frame[frame["global_step"] == 0]["learner_kl"].isna().all()
    assert 3 in set(evaluations.read_runs(str(tmp_path), partial=True)["seed"])


def test_exported_evaluations_are_read_as_the_runs_were(tmp_path):
    write_run(tmp_path / "runs", "a", 1, [0.1, 20 / 3], scenario="")
    file = str(tmp_path / "results" / "x.csv")
    assert plot.main([str(tmp_path / "runs"), "--export", file]) == 0
    assert pathlib.Path(file).read_text().splitlines()[0] == ",".join(evaluations.COLUMNS)
    of_runs, of_file = evaluations.read([str(tmp_path / "runs")]), evaluations.read([file])
    pd.testing.assert_frame_equal(of_runs, of_file, check_dtype=False, rtol=1e-5)
    assert (of_file["scenario"] == "").all()
    key, out = "time/eval_s", str(tmp_path / "x.png")
    words = [str(tmp_path / "runs"), "--keys", key, "--export", file, "--out", out]
    assert plot.main(words) == 0 and os.path.exists(out)
    assert evaluations.read([file], keys=(key,))[key].tolist() == [0, 1]
    assert plot.main([str(tmp_path / "runs"), "--keys", "charts/nothing"]) == 2


# -------------------- Tables and pictures ---------------------------------------------------------
@pytest.fixture
def results(tmp_path):
    """A CSV file with two tasks, three seeds of two groups in the one, one seed in the other."""
    rows = []
    for seed in (1, 2, 3):
        for i, step in enumerate((0, 1000, 2000)):
            rows.append(evaluation("magpo", seed, step, 10.0 * i + seed, learner_kl=0.5))
            rows.append(evaluation("mappo", seed, step, 4.0 * i, guider=None))
    for step in (0, 1000):
        rows.append(evaluation("magpo", 1, step, step, env_id="LevelBasedForaging-v0",
                               scenario="8x8-2p-2f", win_rate=0.25))
    pd.DataFrame(rows).to_csv(tmp_path / "x.csv", index=False)
    return str(tmp_path / "x.csv")


def test_table(results, tmp_path, capsys):
    assert plot.main([results, "--last", "1", "--table", str(tmp_path / "x.md")]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "x.md").read_text() == text
    head, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert rows[0] == [
        "CoordSum-v0 3x10=10", "magpo", "3", "2,000", "22 [21, 23]", "21", "0%", "23", "1", "0.5",
        "", "16.7"]
    assert rows[1][head.index("guider")] == ""  # it has none
    assert rows[2][head.index("learner [95% CI]")] == "1e+03"  # one seed: no interval
    assert rows[2][head.index("win_rate")] == "0.25"


@pytest.mark.parametrize("returns, fall", [
    ([5, 25, 45, 25, 35], 0), ([0, 60, 120, 120, 0, 0], 60 / 100), ([4, 3, 2], 0),
    ([-30, -20, -10, -40, -10], 1 / 3), ([0, 3, 6, 3, 0, 0, 300, 300, 300], 3 / 300)])
def test_worst_fall(returns, fall):
    """Of means of three evaluations, below the best before, as a share of what was gained."""
    assert evaluations.worst_fall(pd.Series(returns, dtype=float)) == pytest.approx(fall)


@pytest.mark.parametrize("only", ["figure1", pytest.param("", marks=pytest.mark.slow)])
def test_every_picture_can_be_redrawn(only, tmp_path, monkeypatch, capsys):
    """From the first and last evaluations of each run, for speed."""
    commands = [x for x in run.read_lines(str(BENCHMARK / "figures.txt")) if only in x]
    monkeypatch.chdir(tmp_path)
    for folder in ("benchmark/results", "docs"):
        (tmp_path / folder).mkdir(parents=True)
    for file in BENCHMARK.glob("results/*.csv"):
        frame = pd.read_csv(file)
        if "exp_name" in frame:  # the others have other columns
            step = frame["global_step"]
            steps = frame.groupby(evaluations.RUN, dropna=False)["global_step"]
            frame = frame[(step == steps.transform("min")) | (step == steps.transform("max"))]
        frame.to_csv(tmp_path / "benchmark" / "results" / file.name, index=False)
    assert figures.main(["--only", only]) == 0
    assert "left out" not in capsys.readouterr().err
    pictures = [line.split("--out ")[1].split()[0] for line in commands]
    assert len(set(pictures)) == len(commands)
    for picture in pictures:
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"

    (tmp_path / "benchmark" / "results" / "figure1.csv").unlink()
    assert figures.main(["--only", "figure1"]) == 0
    assert "there is no benchmark/results/figure1.csv" in capsys.readouterr().err


def numbers(text):
    return [float(x) for x in re.findall(r"-?\d+\.?\d*", text)]


def readme_tables(heading):
    """The rows of a section's tables in benchmark/README.md, by first cell; the first counts."""
    _, section = re.split(rf"\n##+ {heading}\n", (BENCHMARK / "README.md").read_text())
    lines = section.split("\n##")[0].splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows[::-1]}


def committed_table(name):
    """The table of results/NAME.csv, a dict a group, with numbers of three digits."""
    guider_of = {"ctds": "ctce", "ctds_mat": "ctce_mat"} if name == "suites_ff" else {}
    file = str(BENCHMARK / "results" / f"{name}.csv")
    frame = evaluations.group(evaluations.read([file]), "", {}, guider_of)
    return aggregate.make_table(evaluations.final(frame, 3)).to_dict("records")


LEARNER = "learner [95% CI]"
SUITES = ["magpo", "mappo", "ctds", "ctce", "ctds_mat", "ctce_mat"]
MAGPO = [("variants", "magpo", column) for column in (LEARNER, "guider")]
EXACT, STATE, STATE_FREE = (
    [("variants", run, column) for column in (LEARNER, "guider")]
    for run in ("exact", "state", "state_free"))


@pytest.mark.parametrize("heading, num_tasks, columns", [
    ("Six suites without memory", 6, [("suites_ff", group, LEARNER) for group in SUITES]),
    ("A tether that sets its own length", 6, [("variants", "adaptive", LEARNER), MAGPO[0]]),
    ("Exact backtracking", 2, [*MAGPO, *EXACT]),
    ("A guider that knows the state", 3, [*MAGPO, *STATE, *STATE_FREE])])
def test_the_readme_has_the_committed_returns_of_the_suites(heading, num_tasks, columns):
    """In the rows that name a scenario, a column each; behind a return may be the share won."""
    committed = {}
    for name in {name for name, _, _ in columns}:
        for line in committed_table(name):
            committed[name, line["task"].split()[1], line["run"]] = line
    scenarios = {scenario for _, scenario, _ in committed}
    rows = {name.rpartition(" ")[2].strip("`"): x for name, x in readme_tables(heading).items()}
    rows = {scenario: cells for scenario, cells in rows.items() if scenario in scenarios}
    assert len(rows) == num_tasks
    for scenario, cells in rows.items():
        for cell, (name, group, column) in zip(cells[:len(columns)], columns, strict=True):
            line = committed[name, scenario, group]
            assert line["seeds"] == (3 if name == "suites_ff" else 5) or scenario == "tiny-4ag"
            expected = numbers(line[column])
            if "won" in cell:
                expected.append(round(100 * float(line["win_rate"])))
            where = f"{scenario} {group}"
            np.testing.assert_allclose(numbers(cell), expected, 5e-3, 6e-3, err_msg=where)


def test_the_readme_has_the_committed_returns_of_figure_1():
    readme = readme_tables("The toy game")
    names = {
        "magpo_mat": "MAGPO, mat", "magpo_sable": "MAGPO, sable", "ctds_mat": "CTDS, mat",
        "ctds_sable": "CTDS, sable", "mappo": "MAPPO",
    }
    table = committed_table("figure1")
    assert {line["run"] for line in table} == set(names)
    for line in table:
        seeds, *cells, kl = readme[names[line["run"]]]
        assert int(seeds) == line["seeds"]
        for cell, column in zip(cells, ("learner [95% CI]", "worst seed", "guider", "gap")):
            np.testing.assert_allclose(numbers(cell), numbers(line[column]), rtol=5e-3, atol=0.06)
        np.testing.assert_allclose(numbers(kl), numbers(line["learner_kl"]), rtol=0.05)


# -------------------- Running ---------------------------------------------------------------------
@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Makes toy.py; returns a function that runs benchmark/run.py on lines -> finished process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.py").write_text(TOY)

    def sweep(lines, *flags):
        (tmp_path / "sweep.txt").write_text("# a comment\n\n" + "\n".join(lines))
        command = [sys.executable, BENCHMARK / "run.py", "./sweep.txt", *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return sweep


def finished(line):
    run.read_defaults.cache_clear()  # some tests change the script
    return run.is_finished(run.parse(f"{line} --run-dir runs/sweep"))


def test_parse_takes_defaults_and_flags(toy):
    command = run.parse(
        'python toy.py --seed 3 --scenario "" --num-envs=2 --anneal-lr --total-timesteps 1_000')
    assert command.script == "toy.py"
    assert command.args == {
        "exp_name": "toy", "seed": 3, "run_dir": "runs", "num_devices": 0, "env_id": "CoordSum-v0",
        "scenario": "", "num_envs": 2, "num_steps": 5, "total_timesteps": 1000, "num_evals": 2,
        "eval_episodes": 2, "delta": float("inf"), "anneal_lr": True, "sleep": 0.0, "fail": False,
    }
    assert run.parse("python toy.py --no-anneal-lr").args["anneal_lr"] is False
    for flags, message in (
        ("--typo 3", "no flag --typo"), ("--seed", "--seed lacks its value"),
        ("seed 3", "seed is not a flag"), ("--no-seed 3", "no flag --no-seed"),
    ):
        with pytest.raises(ValueError, match=message):
            run.parse(f"python toy.py {flags}")


def test_a_command_runs_once_a_seed_with_the_budget_asked_for(toy):
    lines = ["python toy.py --exp-name a", "python toy.py \\\n    --exp-name b --num-evals 9"]
    names = ["--exp-name a", "--exp-name b --num-evals 9"]
    sweep = toy(lines, "--seeds", "4", "2", "--dry-run")
    assert sweep.stdout.splitlines()[1:] == [
        f"python toy.py {name} --run-dir runs/sweep --seed {seed}"
        for seed in (4, 2) for name in names]
    sweep = toy(lines, "--dry-run", "--only", "b", "--total-timesteps", "30", "--num-evals", "3")
    (line,) = sweep.stdout.splitlines()[1:]
    args = run.parse(line).args
    assert (args["exp_name"], args["seed"]) == ("b", 1)
    assert (args["total_timesteps"], args["num_evals"]) == (30, 3)


def test_finished_means_the_last_step_with_the_same_arguments(toy, tmp_path):
    line = "python toy.py --scenario 3x10=10 --delta 1.10"
    assert not finished(line)
    assert toy([line]).returncode == 0
    assert finished(line)
    assert finished(line.replace("1.10", "1.1") + " --no-anneal-lr")  # the same in other words
    for changed in (
        "--delta 1.2", "--seed 2", "--anneal-lr", "--total-timesteps 110", "--exp-name other",
    ):
        assert not finished(f"{line} {changed}")
    default = line.replace(" --delta 1.10", "")
    assert not finished(default)
    assert toy([default]).returncode == 0
    assert finished(line) and finished(default)  # a finished run with other flags is kept

    (tmp_path / "toy.py").write_text(TOY.replace("num_envs: int = 2", "num_envs: int = 4"))
    assert not finished(line)  # a default has changed
    (tmp_path / "toy.py").write_text(TOY.replace("fail: bool", "new: int = 3\n    fail: bool"))
    # a flag that did not exist: its default was in force
    assert finished(line) and not finished(line + " --new 4")
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "other.py").write_text(TOY)
    assert not finished(line.replace("toy.py", "other.py --exp-name toy"))

    for path in tmp_path.glob("runs/sweep/*/metrics.jsonl"):
        path.unlink()
    assert not finished(line)


def test_an_interrupted_sweep_continues_where_it_stopped(toy, tmp_path):
    def folders():
        return {path.name for path in tmp_path.glob("runs/sweep/*/")}

    fast, slow = "python toy.py --exp-name fast", "python toy.py --exp-name slow"
    (tmp_path / "sweep.txt").write_text(f"{fast}\n{slow} --sleep 30")
    words = [sys.executable, BENCHMARK / "run.py", "sweep.txt", "--jobs", "2"]
    sweep = subprocess.Popen(
        [*words, "--seeds", "1", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 30
    while len(list(tmp_path.glob("runs/sweep/*slow*/metrics.jsonl"))) < 2:
        assert time.time() < deadline
        time.sleep(0.05)
    sweep.send_signal(signal.SIGINT)
    out, err = sweep.communicate(timeout=20)  # the children hold none of its pipes and are gone
    assert sweep.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert "done after 0.0 min: CoordSum-v0____fast__1" in out

    before = folders()
    again = toy([fast, slow])
    assert again.returncode == 0 and "1 of 2 commands have finished" in again.stdout
    # seed 1 of the slow one: old folder gone, new one there; all others untouched
    assert len(before) == len(folders()) == 4 and len(folders() - before) == 1
    assert [finished(f"{slow} --seed {seed}") for seed in (1, 2)] == [True, False]
    again = toy([fast, slow], "--seeds", "1", "2", "--dry-run")
    assert "3 of 4" in again.stdout and not finished(f"{slow} --seed 2")


def test_an_interrupted_run_goes_on_from_its_checkpoint(toy, tmp_path, monkeypatch):
    line = "python toy.py --exp-name a --total-timesteps 100"
    assert toy([line]).returncode == 0
    (folder,) = (path for path in tmp_path.glob("runs/sweep/*") if path.is_dir())
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(rows[:-1]))
    (folder / "checkpoint_0.npz").touch()
    started = []
    monkeypatch.setattr(run.subprocess, "Popen", lambda words, **_: started.append(words))
    for seed in (1, 2):
        run.start(run.parse(f"{line} --run-dir runs/sweep --seed {seed}"), cores=[])
    resumed, fresh = started
    assert resumed[1:] == ["toy.py", "--resume", f"runs/sweep/{folder.name}"]
    assert "--resume" not in fresh and folder.is_dir()


def test_failures_are_named_and_the_others_still_run(toy):
    lines = ["python toy.py --exp-name a --fail", "python toy.py --exp-name b"]
    sweep = toy(lines)
    assert sweep.returncode == 1 and finished(lines[1])
    assert sweep.stderr == f"failed: {lines[0]} --run-dir runs/sweep --seed 1\n"
    assert "FAILED with status 3" in sweep.stdout


def test_what_cannot_be_run_is_one_line(toy):
    for lines, flags, message in (
        (["python toy.py --typo 1"], [], "no flag --typo"),
        (["python toy.py"] * 2, [], "same name"),
        (["python toy.py --seed 3"], [], "--seed and --run-dir are added"),
        (["python none.py"], [], "none.py"),
        (["python toy.py"], ["--only", "x"], "--only x: found in no command of ./sweep.txt"),
        (["python toy.py"], ["--jobs", "0"], "--jobs 0: must be above 0"),
    ):
        sweep = toy(lines, *flags)
        assert sweep.returncode == 2 and message in sweep.stderr
        assert sweep.stderr.startswith("run.py: error: ") and sweep.stderr.count("\n") == 1


# -------------------- Measuring -------------------------------------------------------------------
def test_speed(toy, tmp_path, monkeypatch, capsys):
    """A script without a guider is timed once; flags that speed.py does not have reach it."""
    guider = 'guider: str = "mat"\n    fail: bool'
    (tmp_path / "other.py").write_text(TOY.replace("fail: bool", guider))
    words = "speed.py --scripts toy.py other.py --rounds 2 --iterations 1 --delta 3".split()
    monkeypatch.setattr(sys, "argv", words)
    speed.main()
    first, *rows = capsys.readouterr().out.splitlines()
    assert first == "CoordSum-v0 --delta 3"
    numbers = "3x10-30 | 64 | 128 | 1,100 [1,100, 1,100] | 7 [7, 7]"
    names = ("toy.py | ", "other.py | mat", "other.py | sable")
    for row, name in zip(rows[3:], names, strict=True):
        assert row.startswith(f"| {name} | {numbers} | ")
    monkeypatch.setattr(sys, "argv", [*words, "--typo", "1"])
    with pytest.raises(SystemExit, match="speed.py: error: toy.py has failed"):
        speed.main()


# -------------------- The commands ----------------------------------------------------------------
def test_every_command_is_one_that_its_script_takes(monkeypatch):
    """The commands of a file differ, and each scenario exists (the paper's: test_tasks.py)."""
    monkeypatch.chdir(ROOT)
    scenarios, parsed = set(), set()
    for path in set(BENCHMARK.glob("*.txt")) - {BENCHMARK / "figures.txt"}:
        commands = run.make_commands(run.Options(f"benchmark/{path.name}"))
        contents = [(x.script, {**x.args, "exp_name": ""}) for x in commands]
        assert all(contents.count(x) == 1 for x in contents)
        for command in commands:
            python, script, *flags = shlex.split(command.line)
            assert (python, script) == ("python", command.script)
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            names = (script, *[word for word in flags if word.startswith("--")])
            if names not in parsed:  # tyro takes its time, and one of each kind is enough
                parsed.add(names)
                assert command.args == vars(tyro.cli(module.Args, args=flags)), command.line
            # exits if minibatches do not divide the work
            args = module.Args(**command.args | {"num_devices": 1})
            module.check_args(args)
            assert getattr(args, "guider", "mat") in ("mat", "sable")
            if args.scenario not in tasks.PAPER_TASKS.get(args.env_id, []):
                scenarios.add((args.env_id, args.scenario))
    for env_id, scenario in scenarios:
        tasks.make(tasks.import_module_of(env_id), scenario)  # raises if not
    # run.py adds flags at the end: the later of two values counts.
    flags = ["--total-timesteps", "9", "--total-timesteps", "7"]
    assert tyro.cli(module.Args, args=flags).total_timesteps == 7


def test_paper_txt_is_what_paper_py_writes_and_has_the_tasks_and_budget_of_the_paper(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert (BENCHMARK / "paper.txt").read_text() == paper.write_commands()
    all_args = [run.parse(line).args for line in run.read_lines("benchmark/paper.txt")]
    by_scenario = {args["scenario"]: args for args in all_args}
    assert len(all_args) == len(by_scenario) == 43
    names = [(env_id, name) for env_id, group in tasks.PAPER_TASKS.items() for name in group]
    assert {(args["env_id"], args["scenario"]) for args in all_args} == set(names)
    for args in all_args:
        steps = args["num_envs"] * args["num_steps"]
        assert args["total_timesteps"] // steps * steps == 19_988_480 == 1220 * 128 * 128
        assert args["guider"] == "sable" and args["num_evals"] == 122


TUNED = "num_minibatches max_grad_norm update_epochs clip_coef ent_coef learning_rate".split()
TUNED_NETWORK = ["embed_dim", "num_heads", "num_blocks", "decay_scaling_factor"]
TETHER = ["delta", "learner_rl_coef"]
COLUMNS = {  # of the official list -> the flag, where its name is another
    "ppo_epochs": "update_epochs", "clip_eps": "clip_coef", "n_embd": "embed_dim",
    "n_head": "num_heads", "n_block": "num_blocks", "alpha": "learner_rl_coef",
}


@pytest.mark.parametrize("name", ["paper", "rware_rec", "suites_ff"])
def test_commands_have_the_tuned_hyperparameters_that_their_file_promises(name):
    """MAPPO has those of MAGPO. suites_ff.txt takes only delta and lambda."""
    table = pd.read_csv(BENCHMARK / "tuned_params.csv", comment="#")
    table["learning_rate"] = table["actor_lr"].fillna(table["critic_lr"])
    table["scenario"] = table["task"].replace(paper.SCENARIOS)
    rows = table.rename(columns=COLUMNS).set_index(["system_name", "scenario"])
    for line in run.read_lines(str(BENCHMARK / f"{name}.txt")):
        args = run.parse(line).args
        row = rows.loc["magpo", args["scenario"]]
        flags = [] if name == "suites_ff" else [*TUNED, *TUNED_NETWORK]
        flags = [x for x in flags if x in args]
        if args["exp_name"] == "magpo":
            flags += TETHER
        assert {x: args[x] for x in flags} == {x: row[x] for x in flags}, line


def test_tasks_md_is_what_tasks_table_py_writes():
    assert (BENCHMARK / "tasks.md").read_text() == tasks_table.write_table()
