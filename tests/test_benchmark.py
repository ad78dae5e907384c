"""Tests of the benchmark folder: statistics, table and pictures, what counts as finished, and every
command's flags."""

import dataclasses
import glob
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tyro

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.join(ROOT, "benchmark"))
import plot  # noqa: E402
import run  # noqa: E402

FILES = sorted(glob.glob(os.path.join(ROOT, "benchmark", "*.txt")))

# Writes what a training script writes, without training; CoordSum's return is the seed. --sleep is
# in seconds.
TOY = """
import dataclasses, json, os, sys, time
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
    delta: float = 1.5
    anneal_lr: bool = False
    sleep: float = 0.0
    fail: bool = False

args = tyro.cli(Args)
folder = f"{args.run_dir}/{args.env_id}__{args.scenario}__{args.exp_name}__{args.seed}"
folder += f"__{time.time_ns()}"
os.makedirs(folder)
about = {"args": dataclasses.asdict(args) | {"num_devices": 1}, "command": " ".join(sys.argv)}
json.dump(about, open(f"{folder}/args.json", "w"))
row = {"eval/learner_return": args.seed, "eval/guider_return": args.seed, "eval/imitation_gap": 0}
with open(f"{folder}/metrics.jsonl", "w") as file:
    for step in (0, 50, 100):
        file.write(json.dumps({"global_step": step, **row}) + "\\n")
        file.flush()
        time.sleep(args.sleep)
        if args.fail:
            raise SystemExit(3)
if hasattr(os, "sched_getaffinity"):
    print("cores", sorted(os.sched_getaffinity(0)))
"""


def commands(path):
    with open(path) as file:
        return [line for line in file.read().splitlines() if line and not line.startswith("#")]


def write_run(run_dir, exp_name, seed, returns, gaps=0.0, num_steps=50, complete=True, **other):
    """A folder as a run leaves it: an evaluation every 100 steps from step 0 on, SPS and KL from
    the second on."""
    args = {
        "env_id": "CoordSum-v0", "scenario": "3x10=10", "exp_name": exp_name, "seed": seed,
        "run_dir": str(run_dir),
    }
    total_timesteps = 100 * (len(returns) - 1) + (10 if complete else 100)
    args |= {"num_envs": 2, "num_steps": num_steps, "total_timesteps": total_timesteps} | other
    folder = os.path.join(
        run_dir, f"{args['env_id']}__{args['scenario']}__{exp_name}__{seed}__{1700000000 + seed}"
    )
    os.makedirs(folder)
    with open(os.path.join(folder, "args.json"), "w") as file:
        json.dump({"args": args, "command": "magpo_ff.py --seed 1"}, file)
    with open(os.path.join(folder, "metrics.jsonl"), "w") as file:
        for i, x in enumerate(returns):
            row = {"global_step": 100 * i, "eval/learner_return": x, "eval/guider_return": x + gaps}
            row |= {"eval/imitation_gap": gaps, "time/train_s": 60.0 * i}
            row |= {"charts/SPS": 1000.0 * i, "losses/learner_kl": 0.25} if i else {}
            file.write(json.dumps(row) + "\n")
    return folder


# -------------------- Statistics ------------------------------------------------------------------
def test_bootstrap_interval_is_exact_for_two_seeds_and_close_to_theory_for_many():
    low, high = plot.bootstrap_interval(np.array([1.0, 3.0]))
    assert (low, high) == (1, 3)  # a quarter of the draws has both seeds alike
    low, high = plot.bootstrap_interval(np.full((4, 2), 7.0))
    np.testing.assert_array_equal([low, high], np.full((2, 2), 7.0))

    values = np.random.default_rng(0).normal(5, 2, size=(400, 3))
    low, high = plot.bootstrap_interval(values)
    half_width = 1.96 * values.std(0) / 20
    np.testing.assert_allclose(low, values.mean(0) - half_width, atol=0.02)
    np.testing.assert_allclose(high, values.mean(0) + half_width, atol=0.02)
    np.testing.assert_array_equal(plot.bootstrap_interval(values), (low, high))  # a fixed seed


def test_iqm_drops_a_quarter_on_each_side():
    np.testing.assert_allclose(
        plot.iqm(np.array([100.0, 2, 3, 4, -50, 5, 6, 7])), np.mean([3, 4, 5, 6])
    )
    # 3 seeds: none is dropped
    np.testing.assert_allclose(plot.iqm(np.array([[1.0, 1], [2, 5], [3, 9]])), [2, 5])
    np.testing.assert_allclose(plot.iqm(np.array([-100.0, 1, 2, 3, 100])), 2)


def test_seeds_are_compared_at_the_steps_that_all_of_them_have():
    runs = [[{"global_step": s, "x": s + seed} for s in steps]
            for seed, steps in ((0, [0, 10, 20, 30]), (1, [0, 20, 30, 40]), (2, [0, 20, 30]))]
    runs[2][0].pop("x")
    steps, values = plot.curves(runs, "x")
    np.testing.assert_array_equal(steps, [20, 30])
    np.testing.assert_array_equal(values, [[20, 30], [21, 31], [22, 32]])
    np.testing.assert_array_equal(plot.final(runs, "x", 1), [30, 31, 32])
    np.testing.assert_array_equal(plot.final(runs, "x", 3), [25, 26, 27])
    assert np.isnan(plot.final(runs, "y", 3)).all()


# -------------------- Groups, table and pictures --------------------------------------------------
def test_groups_hold_finished_runs_sorted_by_number_and_seed(tmp_path, capsys):
    for seed in (2, 1):
        write_run(tmp_path, "delta_10", seed, [0, seed])
        write_run(tmp_path, "delta_2", seed, [0, seed])
    write_run(tmp_path, "delta_inf", 1, [0, 1])
    write_run(tmp_path, "magpo_3x10-30", 1, [0, 1], scenario="3x10-30")
    unfinished = write_run(tmp_path, "delta_2", 3, [0, 1], complete=False)
    write_run(tmp_path, "delta_2", 4, [0, 4], num_steps=25)
    write_run(tmp_path / "again", "delta_inf", 1, [0, 5])
    os.rename(tmp_path / "again/CoordSum-v0__3x10=10__delta_inf__1__1700000001",
              tmp_path / "CoordSum-v0__3x10=10__delta_inf__1__1800000000")

    groups = plot.read_groups([str(tmp_path)])
    task = ("CoordSum-v0", "3x10=10")
    assert list(groups) == [
        ("CoordSum-v0", "3x10-30", "magpo"), (*task, "delta_2"), (*task, "delta_10"),
        (*task, "delta_inf"),
    ]
    assert [rows[-1]["eval/learner_return"] for rows in groups[(*task, "delta_2")]] == [1, 2, 4]
    # the newest
    assert [rows[-1]["eval/learner_return"] for rows in groups[(*task, "delta_inf")]] == [5]
    warnings = capsys.readouterr().err
    assert f"not finished: {unfinished}\n" in warnings
    assert "seeds differ in num_steps" in warnings and "seed twice" in warnings

    assert len(plot.read_groups([str(tmp_path)], partial=True)[(*task, "delta_2")]) == 4
    groups = plot.read_groups([str(tmp_path)], only="3x10=10 delta_1", labels={"delta_10": "ten"})
    assert list(groups) == [(*task, "ten")]


@pytest.mark.parametrize("flags", [
    [],
    ["--panels", "eval/learner_return", "losses/learner_kl", "losses/guider_kl", "--iqm"],
    ["--bars", "--last", "1"],
])
def test_table_and_picture(tmp_path, monkeypatch, capsys, flags):
    for seed in (1, 2, 3):
        write_run(tmp_path / "runs", "magpo", seed, [0, 10, 20 + seed], gaps=0.5)
        write_run(tmp_path / "runs", "ctds", seed, [0, 4, 8], gaps=50)
    write_run(
        tmp_path / "runs", "magpo", 1, [0, 0.2, 0.4, 0.6], env_id="LevelBasedForaging-v0",
        scenario="8x8-2p-2f",
    )
    paths = ["--out", str(tmp_path / "a.png"), "--table", str(tmp_path / "a.md")]
    monkeypatch.setattr(
        sys, "argv",
        ["plot.py", str(tmp_path / "runs"), *paths, "--baseline", "30:known best", *flags],
    )
    assert plot.main() == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "a.md").read_text()
    assert text == capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert len({len(row) for row in rows}) == 1 and len(rows) == 5
    if "--last" in flags:
        assert rows[3] == [
            "CoordSum-v0 3x10=10 magpo", "3", "200", "22.00 [21.00, 23.00]", "22.00", "22.50",
            "0.500", "0.25", "1,500", "2.0",
        ]
        assert rows[4][3] == "0.600"  # one seed: no interval
    else:
        # the mean over three evaluations
        assert rows[2][3] == "4.00 [4.00, 4.00]" and rows[4][3] == "0.400"


def test_empty_folder_is_an_error_in_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path)])
    with pytest.raises(SystemExit) as error:
        plot.main()
    assert error.value.code == 2 and "no finished runs" in capsys.readouterr().err


# -------------------- Running ---------------------------------------------------------------------
@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with toy.py in it; returns a function that runs benchmark/run.py on lines ->
    finished process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.py").write_text(TOY)

    def sweep(lines, *flags):
        (tmp_path / "sweep.txt").write_text("# a comment\n\n" + "\n".join(lines))
        command = [sys.executable, os.path.join(ROOT, "benchmark", "run.py"), "sweep.txt", *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return sweep


def finished(line):
    run.read_defaults.cache_clear()  # some tests change the script
    return run.is_finished(*run.parse(line))


def test_parse_takes_defaults_and_flags(toy):
    script, args = run.parse(
        'python toy.py --seed 3 --scenario "" --delta=inf --anneal-lr --total-timesteps 1_000'
    )
    assert script == "toy.py"
    assert args == {
        "exp_name": "toy", "seed": 3, "run_dir": "runs", "num_devices": 0, "env_id": "CoordSum-v0",
        "scenario": "", "num_envs": 2, "num_steps": 5, "total_timesteps": 1000,
        "delta": float("inf"), "anneal_lr": True, "sleep": 0.0, "fail": False,
    }
    assert run.parse("python toy.py --no-anneal-lr")[1]["anneal_lr"] is False
    for flags in ("--typo 3", "--seed", "seed 3", "--no-seed 3"):
        with pytest.raises(ValueError, match="has no flag"):
            run.parse(f"python toy.py {flags}")


def test_finished_means_the_last_step_with_the_same_arguments(toy, tmp_path):
    line = "python toy.py --scenario 3x10=10 --delta 1.10 --run-dir out --seed 1"
    assert not finished(line)
    assert toy([line]).returncode == 0
    assert finished(line)
    assert finished(line.replace("1.10", "1.1") + " --no-anneal-lr")  # the same in other words
    for changed in (
        "--delta 1.2", "--seed 2", "--anneal-lr", "--total-timesteps 110", "--exp-name other",
    ):
        assert not finished(f"{line} {changed}")
    assert not finished(line.replace(" --delta 1.10", ""))  # back to the default

    (tmp_path / "toy.py").write_text(TOY.replace("num_envs: int = 2", "num_envs: int = 4"))
    assert not finished(line)  # a default has changed
    (tmp_path / "toy.py").write_text(TOY.replace("fail: bool", "new: int = 3\n    fail: bool"))
    # a flag that did not exist: its default was in force
    assert finished(line) and not finished(line + " --new 4")
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "other.py").write_text(TOY)
    assert not finished(line.replace("toy.py", "other.py --exp-name toy"))

    metrics = next(tmp_path.glob("out/*/metrics.jsonl"))
    text = metrics.read_text()
    metrics.write_text(text[:-1])  # cut off while the last line was written
    assert not finished(line)
    metrics.unlink()
    assert not finished(line)


def test_an_interrupted_sweep_continues_where_it_stopped(toy, tmp_path):
    lines = [f"python toy.py --run-dir out --exp-name a --seed {seed}" for seed in (1, 2, 3)]
    slow = [line + " --sleep 30" for line in lines[1:]]
    (tmp_path / "sweep.txt").write_text("\n".join([lines[0]] + slow))
    sweep = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, "benchmark", "run.py"), "sweep.txt", "--jobs", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    deadline = time.time() + 30
    while len(list(tmp_path.glob("out/*/metrics.jsonl"))) < 3 and time.time() < deadline:
        time.sleep(0.05)
    sweep.send_signal(signal.SIGINT)
    out, err = sweep.communicate(timeout=20)  # the children hold none of its pipes and are gone
    assert sweep.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert "done after 0.0 min: CoordSum-v0____a__1" in out

    before = {path.name for path in tmp_path.glob("out/*/")}
    assert len(before) == 3
    again = toy(lines, "--only", "seed [12] ")
    assert again.returncode == 0 and "1 of 2 commands have finished" in again.stdout
    after = {path.name for path in tmp_path.glob("out/*/")}
    # seed 2: old folder gone, new one there; 1 and 3 untouched
    assert len(after) == 3 and len(after - before) == 1
    assert [finished(line) for line in lines] == [True, True, False]
    assert (
        "0 of 1" in toy(lines, "--only", "seed 3 ", "--dry-run").stdout and not finished(lines[2])
    )


def test_an_interrupted_run_goes_on_from_its_checkpoint(toy, tmp_path, monkeypatch):
    line = "python toy.py --run-dir out --exp-name a --total-timesteps 100"
    assert toy([line]).returncode == 0
    (folder,) = (path for path in tmp_path.glob("out/*") if path.is_dir())
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(rows[:-1]))
    (folder / "checkpoint_5_0.npz").touch()
    started = []
    monkeypatch.setattr(run.subprocess, "Popen", lambda words, **_: started.append(words))
    for command in (line, line + " --seed 2"):
        run.start(command, run.parse(command)[1], cores=[])
    resumed, fresh = started
    assert resumed[-2:] == ["--resume", os.path.join("out", folder.name)]
    assert "--resume" not in fresh and folder.is_dir()


def test_finished_runs_with_other_flags_are_kept(toy, tmp_path):
    for delta in ("1.1", "1.2"):
        assert toy([f"python toy.py --run-dir out --delta {delta}"]).returncode == 0
    assert len(list(tmp_path.glob("out/*/"))) == 2


def test_failures_are_named_and_the_others_still_run(toy):
    lines = ["python toy.py --run-dir out --seed 1 --fail", "python toy.py --run-dir out --seed 2"]
    sweep = toy(lines)
    assert sweep.returncode == 1 and finished(lines[1])
    assert sweep.stderr == f"failed: {lines[0]}\n" and "FAILED with status 3" in sweep.stdout
    for lines, message in (
        (["python toy.py --typo 1"], "no flag --typo"),
        (["python toy.py"] * 2, "same name"),
    ):
        sweep = toy(lines)
        assert sweep.returncode == 2 and message in sweep.stderr


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
@pytest.mark.parametrize("jobs", [1, 2])
def test_each_job_has_its_own_cores(toy, tmp_path, jobs):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < jobs:
        pytest.skip("too few cores")
    assert toy(
        [f"python toy.py --run-dir out --seed {i}" for i in range(jobs)], "--jobs", str(jobs)
    ).returncode == 0
    shares = [json.loads(path.read_text().split("cores")[1]) for path in tmp_path.glob("out/*.log")]
    assert sorted(core for share in shares for core in share) == cores and len(shares) == jobs


# -------------------- The commands ----------------------------------------------------------------
def test_every_command_is_one_that_its_script_takes(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [line for path in FILES for line in commands(path)]
    assert len(FILES) == 7 and lines
    for line in lines:
        python, script, *flags = shlex.split(line)
        assert python == "python"
        module = importlib.import_module(script.removesuffix(".py"))
        args = tyro.cli(module.Args, args=flags)
        module.check_args(args)
        # raises if minibatches do not divide the work
        module.choose_devices(dataclasses.replace(args))
        parsed_script, parsed = run.parse(line)
        assert parsed_script == script and parsed == vars(args), line


def test_every_scenario_exists(monkeypatch):
    monkeypatch.chdir(ROOT)
    import tasks

    args = [run.parse(line)[1] for path in FILES for line in commands(path)]
    for env_id, scenario in {(x["env_id"], x["scenario"]) for x in args}:
        tasks.make(env_id, scenario)  # raises if not


def test_commands_of_a_file_differ_and_stay_in_its_own_folder(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in FILES:
        stem = os.path.basename(path).removesuffix(".txt")
        parsed = [run.parse(line) for line in commands(path)]
        assert {args["run_dir"] for _, args in parsed} == {f"benchmark/runs/{stem}"}
        assert len({run.run_name(args) for _, args in parsed}) == len(parsed)
        contents = [(script, {**args, "exp_name": ""}) for script, args in parsed]
        assert all(contents.count(x) == 1 for x in contents)
