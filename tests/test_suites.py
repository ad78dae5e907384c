"""A task of each suite is trained on, on tiny sizes; CoordSum's are in test_cli.py."""

import importlib
import math

import pytest
from conftest import read_rows, run_folder

pytestmark = [pytest.mark.usefixtures("quick_compile"), pytest.mark.slow]

# A script for each suite, as the environments are the same text in all scripts.
TASKS = [
    ("magpo_rec", "MPE_simple_spread_v3", "simple_spread_3ag"),
    ("magpo_rec", "SMAX", "3s_vs_5z"), ("magpo_rec", "Connector-v3", "con-5x5x3a"),
    ("magpo_ff", "RobotWarehouse-v0", "tiny-2ag"),
    ("ctds_ff", "LevelBasedForaging-v0", "2s-8x8-2p-2f-coop"),
    ("ctds_ff", "MPE_simple_spread_v3", "simple_spread_3ag")]
WINNABLE = {"Connector-v3", "SMAX"}
TINY = """--num-envs 2 --num-steps 4 --total-timesteps 16 --num-evals 1 --eval-episodes 2
          --embed-dim 4 --learner-hidden-dim 4 --num-minibatches 1 --update-epochs 1
          --guider mat""".split()


@pytest.mark.parametrize("name, env_id, scenario", TASKS)
def test_trains(name, env_id, scenario, call, tmp_path):
    """Two iterations and two evaluations; acting = training, and all numbers are finite."""
    script = importlib.import_module(name)
    flags = ["--env-id", env_id, "--scenario", scenario, "--run-dir", str(tmp_path)]
    assert call(script, *flags, *TINY)[0] == 0
    start, end = read_rows(run_folder(tmp_path))
    assert (start["global_step"], end["global_step"]) == (0, 16)
    assert all(math.isfinite(x) for row in (start, end) for x in row.values())
    assert end["losses/first_ratio"] == pytest.approx(1, abs=1e-4)
    assert ("eval/win_rate" in end) == (env_id in WINNABLE)
