"""examples/seeds.py: several seeds side by side are those seeds, each alone."""

import pathlib
import re

import numpy as np
import pytest
import safetensors.numpy
from conftest import TINY, read_rows, run_program

from examples import seeds

ROOT = pathlib.Path(__file__).parent.parent
FLAGS = [*TINY, "--total-timesteps", "96", "--num-evals", "2", "--guider", "mat"]


def run(program, flags, folder, environ):
    run_program(ROOT / program, [*FLAGS, *flags, "--run-dir", folder], environ)
    return {path.name.split("__")[3]: path for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("script", ["magpo_ff.py", "magpo_rec.py"])
def test_seeds_side_by_side(script, environ, tmp_path):
    """The rows and networks of a seed are those of a run alone, up to rounding; seeds differ."""
    together = ["--script", script, "--seeds", "1", "2"]
    both = run("examples/seeds.py", together, tmp_path / "both", environ)
    alone = run(script, ["--seed", "2"], tmp_path / "alone", environ)
    assert both.keys() == {"1", "2"}
    rows = (read_rows(folders["2"], clocks=False) for folders in (both, alone))
    for row, expected in zip(*rows, strict=True):
        assert row.keys() == expected.keys()
        for name in row:
            np.testing.assert_allclose(row[name], expected[name], rtol=1e-3, atol=1e-5)
    networks = [safetensors.numpy.load_file(path / "learner.safetensors")
                for path in (both["2"], alone["2"], both["1"])]
    for name, array in networks[0].items():
        np.testing.assert_allclose(array, networks[1][name], rtol=1e-3, atol=1e-5)
        assert array.ndim < 2 or not np.allclose(array, networks[2][name])


@pytest.mark.slow
@pytest.mark.parametrize("script", ["magpo_ff.py", "baselines/mappo_ff.py"])
def test_default_sizes(script, environ, tmp_path):
    """The README's command starts, with networks of their usual sizes, and its seeds do not wait
    for each other for ever, as the QR of orthogonal matrices does where it is done side by side."""
    command = re.search("^python (examples/seeds.py .*)$", (ROOT / "README.md").read_text(), re.M)
    program, *flags = command[1].replace("--script magpo_ff.py", f"--script {script}").split()
    assert script in flags and not any("dim" in flag for flag in flags)
    flags += """--num-envs 4 --num-steps 8 --total-timesteps 32 --num-evals 1
                --eval-episodes 2""".split()
    run_program(ROOT / program, [*flags, "--run-dir", tmp_path], environ)
    num_seeds = flags.index("--env-id") - flags.index("--seeds") - 1
    assert len(list(tmp_path.glob("*/learner.safetensors"))) == num_seeds > 1


@pytest.mark.slow
def test_not_finite(environ, tmp_path):
    """A seed whose training breaks down ends in a line that names it, and not in rows of NaN."""
    flags = [*FLAGS, "--seeds", "5", "6", "--learning-rate", "4e9", "--run-dir", tmp_path]
    done = run_program(ROOT / "examples/seeds.py", flags, environ, succeeds=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].endswith(" with seed 5")
    assert [len(read_rows(folder)) for folder in tmp_path.iterdir()] == [1, 1]


@pytest.mark.parametrize("flags, names", [
    ("--script nowhere.py", "--script nowhere.py"), ("--script tasks.py", "--script tasks.py"),
    ("--num-envs 0", "--num-envs 0"), ("--env-id Nope-v0", "--env-id Nope-v0"),
    ("--track", "--track"), ("--dry-run", "--dry-run"), ("--num-devices 2", "--num-devices"),
    ("--seed 2", "--seed:"), ("--seeds", "--seeds"), ("--seeds 1 -2", "--seed -2"),
])
def test_flag_errors(flags, names, call, tmp_path):
    """One line that names flag and value, status 2."""
    status, out, err = call(seeds, *flags.split(), "--run-dir", tmp_path / "runs")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert names in err and list(tmp_path.iterdir()) == []
