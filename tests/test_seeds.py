"""examples/seeds.py: several seeds side by side are those seeds, each alone."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

ROOT = pathlib.Path(__file__).parent.parent
FLAGS = """--env-id CoordSum-v0 --scenario 2x3-4 --num-envs 4 --num-steps 8 --eval-episodes 4
           --embed-dim 8 --learner-hidden-dim 8 --update-epochs 1 --total-timesteps 96
           --num-evals 2 --guider mat""".split()


def run(program, flags, folder, environ):
    done = subprocess.run(
        [sys.executable, ROOT / program, *FLAGS, *flags, "--run-dir", str(folder)],
        env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {path.name.split("__")[3]: path for path in folder.iterdir()}


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "script", ["magpo_ff.py", pytest.param("magpo_rec.py", marks=pytest.mark.slow)]
)
def test_seeds_side_by_side(script, environ, tmp_path):
    """The rows and networks of a seed are those of a run alone, up to rounding; seeds differ."""
    together = ["--script", script, "--seeds", "1", "2"]
    both = run("examples/seeds.py", together, tmp_path / "both", environ)
    alone = run(script, ["--seed", "2"], tmp_path / "alone", environ)
    assert both.keys() == {"1", "2"}
    for row, expected in zip(rows(both["2"]), rows(alone["2"]), strict=True):
        for name in row.keys() - {"charts/SPS"}:
            np.testing.assert_allclose(row[name], expected[name], rtol=1e-3, atol=1e-5)
    networks = [safetensors.numpy.load_file(path / "learner.safetensors")
                for path in (both["2"], alone["2"], both["1"])]
    for name, array in networks[0].items():
        np.testing.assert_allclose(array, networks[1][name], rtol=1e-3, atol=1e-5)
        assert array.ndim < 2 or not np.allclose(array, networks[2][name])
