"""The pages: links, tables, names, and every command, snippet and change that they show."""

import importlib
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import sys
import textwrap
from types import SimpleNamespace

import jax
import numpy as np
import pandas as pd
import pytest
import tyro
import yaml
from conftest import (
    first_state,
    on_one_device,
    random_params,
    read_rows,
    run_folder,
    run_program,
)
from PIL import Image

import magpo_ff

ROOT = pathlib.Path(__file__).parent.parent
GUIDE, USAGE = ROOT / "docs" / "reading_group.md", ROOT / "docs" / "usage.md"
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md")), *sorted(ROOT.glob("docs/*.md"))]
TINY = """--num-envs 4 --num-steps 8 --eval-episodes 4 --embed-dim 8 --learner-hidden-dim 8
          --update-epochs 2 --num-minibatches 2 --total-timesteps 128 --num-evals 2""".split()

pytestmark = pytest.mark.usefixtures("quick_compile")
for_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda x: str(x.relative_to(ROOT)))


# -------------------- The pages -------------------------------------------------------------------
def prose(page):
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    found = []
    for heading in re.findall(r"^#+ (.+?) *$", prose(page), re.M):
        text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        again = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", other) is not None
                    for other in found)
        found.append(f"{anchor}-{again}" if again else anchor)
    return found


def missing_links(page):
    """The links to files and anchors of the repository that lead nowhere."""
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", link):  # https: and the like
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    return missing


@for_each_page
def test_links_lead_somewhere(page):
    assert missing_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    """Of a file that is missing and of an anchor; code blocks do not count."""
    page = tmp_path / "page.md"
    links = "[a](page.md#one-two) [b](none.md) [c](#three) [d](#one-two-1) [e](https://x.y/z)"
    page.write_text(f"# One `two`\n## One two\n{links}\n```\n[f](none.md)\n```\n")
    assert missing_links(page) == ["none.md", "#three"]


@for_each_page
def test_tables_have_as_many_cells_in_each_row(page):
    """As many as the first row, of which the second row shows the alignment."""
    tables = re.findall(r"(?:^ *\|.*\n?)+", prose(page), re.M)
    for rows in (table.strip().splitlines() for table in tables):
        cells = [len(re.findall(r"(?<!\\)\|", row)) - 1 for row in rows]
        assert set(cells) == {cells[0]}, rows[0]
        assert re.fullmatch(r"[ |:-]+", rows[1]), rows[0]


@pytest.mark.parametrize("page, lines, characters", [
    (ROOT / "README.md", 140, 12_000), (GUIDE, 220, 24_000)], ids=["README.md", "reading_group.md"])
def test_length(page, lines, characters):
    text = page.read_text()
    assert len(text.splitlines()) <= lines and len(text) <= characters


def test_paragraphs_are_short():
    """The README's paragraphs have at most 500 characters, without the addresses of links."""
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"```.*?```", "", PAGES[0].read_text(), flags=re.S))
    paragraphs = [x for x in text.split("\n\n") if not x.strip().startswith(("|", "$$"))]
    assert max(map(len, paragraphs)) <= 500, max(paragraphs, key=len)


@pytest.mark.parametrize("page", [GUIDE, USAGE], ids=lambda page: page.name)
def test_what_is_named_exists(page):
    """Flags are of our programs, or said to be gone; files and other names are there."""
    text = prose(page)
    gone = "".join(re.findall(r"^Gone are .*", text, re.M))
    files = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    code = "\n".join(file.read_text() for file in files if file.name != "test_docs.py")
    for name in " ".join(re.findall(r"`([^`\n]+)`", text)).split():
        if name.startswith("--"):
            field = name[2:].partition("=")[0].replace("-", "_")
            is_flag = re.search(rf"^    {field}: ", code, re.M)
            assert (f"`{name}`" in gone) != bool(is_flag), name
        elif name.endswith((".py", ".txt")):
            assert [*ROOT.glob(name), *ROOT.glob(f"*/{name}")], name
        elif re.fullmatch(r"[A-Za-z]\w+(\.\w+)?", name):
            assert re.search(rf"\b{name.split('.')[-1]}\b", code), name


def test_workflow():
    """GitHub runs what .ci/run runs, with the versions of Python that the README names, and the
    slow tests by the README's command."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    slow = workflow["jobs"]["slow"]["steps"][-1]["run"]
    assert slow.removeprefix("python") in (ROOT / "README.md").read_text()
    job = workflow["jobs"]["tests"]
    assert {"run": ".ci/run"} in job["steps"] and os.access(ROOT / ".ci" / "run", os.X_OK)
    readme = (ROOT / "README.md").read_text()
    first, last = re.search(r"Python 3\.(\d+) to 3\.(\d+)", readme).groups()
    versions = [f"3.{minor}" for minor in range(int(first), int(last) + 1)]
    assert job["strategy"]["matrix"]["python"] == versions


# -------------------- The commands of the guide ---------------------------------------------------
def guide_commands():
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", GUIDE.read_text(), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def commands_of(program):
    """The arguments of each of the guide's commands that runs this program."""
    found = [words[2:] for words in guide_commands() if words[1] == program]
    assert found, program
    return found


def load(path, monkeypatch):
    """The module in a file, which sees what `python PATH` would see."""
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for it
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    spec.loader.exec_module(module)
    return module


def run_here(path, monkeypatch, *flags):
    """Runs a program of ours as `python PATH FLAGS`, in this process -> its exit status."""
    monkeypatch.setattr(sys, "argv", [path, *map(str, flags)])
    return load(ROOT / path, monkeypatch).main()


def is_picture(path):
    with Image.open(path) as picture:
        return picture.format == "PNG" and picture.width > 1000


VARIANTS = [f"variants/magpo_ff_{name}" for name in ("adaptive", "residual", "state")]


def test_each_command_is_run_by_a_test_below():
    tested = {"magpo_ff.py", "magpo_rec.py", "ctds_ff.py", "benchmark/run.py", "benchmark/speed.py"}
    docs = "tables matching tether backtracking heatmap saddle".split()
    tested |= {f"docs/{name}.py" for name in docs} | {f"{name}.py" for name in VARIANTS}
    assert {tuple(words[:2]) for words in guide_commands()} == {("python", name) for name in tested}


@pytest.mark.parametrize("script", ["magpo_ff", "ctds_ff", "magpo_rec", *VARIANTS])
def test_training_commands_are_accepted(script, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for flags in commands_of(f"{script}.py"):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags, "--dry-run"])
        module = importlib.import_module(script.replace("/", "."))
        assert module.main() == 0, (flags, capsys.readouterr().err)


def test_tables(monkeypatch, capsys):
    """The student fails with the KL of the code; with backtracking the learner does not."""
    for flags in commands_of("docs/tables.py"):
        run_here("docs/tables.py", monkeypatch, *flags, "--games", 2)
        found = re.findall(r"^(CTDS|MAGPO), (KL\S+ \|\| \S+) +([\d.]+) +([\d.]+)$",
                           capsys.readouterr().out, re.M)
        learner = {(name, direction): float(value) for name, direction, _, value in found}
        assert len(learner) == 4 and all(float(guider) > 0.99 for _, _, guider, _ in found)
        assert learner.pop(("CTDS", "KL(mu || pi)")) < 0.6
        assert min(learner.values()) > 0.99


def test_matching(monkeypatch, capsys):
    """A row for CTDS and one for each delta. Its trainings are those of test_matching_game in
    test_ctds.py, which tests their results, and are not run again."""
    import test_ctds

    trained = []

    def matching(script, num_seeds=None, **flags):
        assert num_seeds in (10, None)  # the guide's ten, or those of the test
        trained.append((script.__name__, flags))
        return np.array([0.5, 0.7, 0.8]), np.array([0.9, 0.6, len(trained) / 10])

    monkeypatch.setattr(test_ctds, "matching", matching)
    (flags,) = commands_of("docs/matching.py")
    run_here("docs/matching.py", monkeypatch, *flags)
    assert [row.split() for row in capsys.readouterr().out.splitlines()[1:]] == [
        ["CTDS", "0.70", "0.60", "0.10", "0.60", "0.90"],
        ["MAGPO,", "delta", "1.1", "0.70", "0.60", "0.20", "0.60", "0.90"]]
    with pytest.raises(AssertionError):  # for the numbers above are no results
        test_ctds.test_matching_game()
    expected = [("ctds_ff", {}), ("magpo_ff", {"delta": 1.1, "learner_rl_coef": 4.0})]
    assert trained == 2 * expected


def test_tether(monkeypatch, capsys, tmp_path):
    """The picture, and the point at which the double clip lets an outward gradient through."""
    printed = []
    for flags in commands_of("docs/tether.py"):
        run_here("docs/tether.py", monkeypatch, *flags, "--out", tmp_path / "new" / "x.png")
        assert is_picture(tmp_path / "new" / "x.png")
        numbers = re.findall(r"loss +(-?[\d.]+) +gradient +(-?[\d.]+)", capsys.readouterr().out)
        printed.append(np.array(numbers, float))
    ppo, kl, total = printed[0]
    divergence = 0.3 * math.log(0.3 / 0.1) + 0.7 * math.log(0.7 / 0.9)
    pull = 0.3 * (math.log(0.3 / 0.1) - math.log(0.7 / 0.9))
    np.testing.assert_allclose(ppo, [-0.6, -0.6], atol=1e-3)
    np.testing.assert_allclose(kl, [divergence, pull], atol=1e-3)
    np.testing.assert_allclose(total, ppo + kl, atol=2e-3)


def test_tether_draws_the_functions_of_the_script(monkeypatch):
    """Inside of the tether and of PPO's clip the gradient is -r A, beyond it is that of the KL."""
    tether = load(ROOT / "docs" / "tether.py", monkeypatch)
    fig = tether.draw(tether.Options(deltas=(1.5,), behaviour_probs=(0.14,)))
    line = fig.axes[1].lines[0]
    log_ratio, slope = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    inside = np.abs(log_ratio) < math.log(1.5) - 1e-3
    np.testing.assert_allclose(slope[inside], -np.exp(log_ratio[inside]) / 1.4, rtol=1e-3)
    outside = log_ratio > math.log(1.5) + 1e-3
    assert np.all(slope[outside] > 0)


@pytest.mark.slow
def test_saddle(monkeypatch, capsys, tmp_path):
    """A run's policies add up to 1, and its CSV file is drawn again."""
    tiny = TINY[: TINY.index("--eval-episodes")] + TINY[TINY.index("--embed-dim") :]
    csv, out = tmp_path / "saddle.csv", tmp_path / "saddle.png"
    (flags,) = commands_of("docs/saddle.py")
    flags += [*tiny, "--every", 3, "--start-delta", 4, "--export", csv, "--out", out]
    assert run_here("docs/saddle.py", monkeypatch, *flags) == 0
    frame = pd.read_csv(csv)
    assert sorted(frame["global_step"].unique()) == [0, 96, 128]
    assert set(frame["run"]) == {"seed 1, delta 4, then 1.1"}
    sums = frame.groupby(["global_step", "agent"])["probability"].sum()
    np.testing.assert_allclose(sums, 1, atol=1e-3)
    start = frame[frame["global_step"] == 0]
    for policy in ("guider", "guider, deaf", "learner"):  # 63 of 1000 triples add up to 10
        np.testing.assert_allclose(start[policy], 0.063, atol=5e-3)
    out.unlink()
    other = tmp_path / "other.csv"
    frame.assign(run="another").to_csv(other)
    assert run_here("docs/saddle.py", monkeypatch, csv, other, "--out", out) == 0
    assert is_picture(out)
    figure1 = ROOT / "benchmark" / "results" / "figure1.csv"
    for bad, line in {
        ("--scenario", "3x10-30"): "--scenario 3x10-30: must be 3x10=10",
        ("--every", "0"): "--every 0: must be above 0",
        ("--start-delta", "0.5"): "--start-delta 0.5: must be above 1, or 0 for none",
        (figure1,): f"{figure1}: has no column run",
    }.items():
        assert run_here("docs/saddle.py", monkeypatch, *bad, "--out", out) == 2
        assert capsys.readouterr().err == f"saddle.py: error: {line}\n"


def test_saddle_looks_at_the_policies_of_the_script(monkeypatch):
    """The guider's table of triples is that of its actions; its marginals are those of a table."""
    saddle = load(ROOT / "docs" / "saddle.py", monkeypatch)
    rng = np.random.default_rng(0)
    digits = rng.dirichlet(np.ones(10), size=3)
    triples = saddle.independent(digits)
    assert triples[saddle.TRIPLES.tolist().index([4, 3, 3])] == pytest.approx(
        digits[0, 4] * digits[1, 3] * digits[2, 3])
    np.testing.assert_allclose(saddle.marginals(triples), digits)

    env = magpo_ff.make_env("CoordSum-v0", "3x10=10")
    guider, learner = magpo_ff.make_networks(magpo_ff.Args(embed_dim=8, guider="mat"), env)
    obs = env.reset(jax.random.PRNGKey(0)).obs
    many = jax.tree.map(lambda x: np.broadcast_to(x, (20_000, *x.shape)), obs)
    params = {"guider": random_params(guider, 1, obs, np.zeros(3, int))}
    params["learner"] = random_params(learner, 2, obs)
    action, *_ = magpo_ff.guider_act(guider, params["guider"], many, jax.random.PRNGKey(0))
    triples, learner_digits = saddle.tables(guider, learner, params, obs)
    assert np.sum(triples) == pytest.approx(1, abs=1e-4)
    seen = np.bincount(np.ravel_multi_index(np.asarray(action).T, (10, 10, 10)), minlength=1000)
    np.testing.assert_allclose(seen / 20_000, triples, atol=0.02)
    np.testing.assert_allclose(np.sum(learner_digits, axis=-1), 1, atol=1e-5)


def test_commands_of_the_benchmark(monkeypatch, capsys):
    """The sweep is listed, command by command; what is to be timed exists."""
    monkeypatch.chdir(ROOT)
    for flags in commands_of("benchmark/run.py"):
        run_here("benchmark/run.py", monkeypatch, *flags, "--dry-run")
        assert capsys.readouterr().out.count("--exp-name delta_") == 28
    (flags,) = commands_of("benchmark/speed.py")
    speed = load(ROOT / "benchmark" / "speed.py", monkeypatch)
    options = tyro.cli(speed.Options, args=flags)
    settings = [("magpo_rec.py", "sable", name, 64, 128) for name in ("2x10-30", "8x10-30")]
    assert speed.settings(options) == settings


def test_scaled_tells_the_same_target():
    scaled = importlib.import_module("docs.scaled")
    for seed in range(5):
        state, timestep = scaled.Scaled().reset(jax.random.PRNGKey(seed))
        told = timestep.observation.agents_view * scaled.STD + scaled.MEAN
        np.testing.assert_allclose(told, np.full((3, 1), state.target), atol=1e-5)


def test_heatmap(monkeypatch, capsys, tmp_path):
    """A cell is the mean over seeds of the last evaluations."""
    rows = []
    bases = {"1.1": 10, "inf": 20}
    for delta, coef, seed in itertools.product(bases, (0, 4), (1, 2)):
        run = {"env_id": "CoordSum-v0", "scenario": "3x10=10", "seed": seed, "guider": 30.0,
               "exp_name": f"delta_{delta}_lambda_{coef}", "win_rate": None, "learner_kl": None}
        for step, learner in ((0, 0.0), (100, bases[delta] + coef + seed)):
            rows.append(run | {"global_step": step, "learner": learner})
    csv = tmp_path / "heatmap.csv"
    pd.DataFrame(rows).assign(wall_seconds=1.0).to_csv(csv, index=False)
    (flags,) = commands_of("docs/heatmap.py")
    assert flags == ["benchmark/runs/heatmap"]
    out = ["--last", "1", "--out", tmp_path / "heatmap.png"]
    assert run_here("docs/heatmap.py", monkeypatch, csv, *out) == 0
    assert is_picture(tmp_path / "heatmap.png")
    printed = capsys.readouterr().out
    for row in ("1.1 | 0.0 | 11.5 | 30.0 | 18.5", "inf | 4.0 | 25.5 | 30.0 | 4.5"):
        assert f"| {row} |" in printed

    csv.write_text(csv.read_text().replace("delta_inf_lambda_4", "other"))
    assert run_here("docs/heatmap.py", monkeypatch, csv, *out) == 2
    error = capsys.readouterr().err
    assert error.startswith("heatmap.py: error: other: ") and error.count("\n") == 1


# -------------------- The snippets of the other page ----------------------------------------------
def usage_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", USAGE.read_text(), re.M | re.S)


@pytest.mark.slow
def test_looking_inside(capsys):
    """The program that collects without compiling what it calls."""
    program, _ = usage_blocks("python")
    exec(program, {})
    *_, returns = re.findall(r"\[[^[\]]*\]", capsys.readouterr().out)
    assert len(returns.strip("[]").split()) == 4


def test_sweep(monkeypatch, capsys, tmp_path):
    """Each command that an agent of Weights & Biases makes of the sweep is accepted."""
    from wandb.sdk.launch.sweeps import utils

    (text,) = usage_blocks("yaml")
    sweep = yaml.safe_load(text)
    monkeypatch.chdir(tmp_path)
    values = [x.get("values", [x.get("value")]) for x in sweep["parameters"].values()]
    seen = []
    for chosen in itertools.product(*values):
        named = {name: {"value": x} for name, x in zip(sweep["parameters"], chosen)}
        macros = utils.create_sweep_command_args({"args": named})
        command, flags = utils.make_launch_sweep_entrypoint(macros, list(sweep["command"]))
        assert command[1:] == ["python", "${program}"] and sweep["program"] == "magpo_ff.py"
        monkeypatch.setattr(sys, "argv", ["magpo_ff.py", *flags, "--dry-run"])
        args = magpo_ff.parse_args()
        seen.append((args.env_id, args.track, args.anneal_lr, args.delta))
        assert magpo_ff.main() == 0, capsys.readouterr().err
    choices = ["LevelBasedForaging-v0"], [True], [True, False], [1.1, 1.5]
    assert seen == list(itertools.product(*choices))


def test_quickstart(call, monkeypatch, capsys, tmp_path):
    """The notebook's cells one after the other, from docs/ as Jupyter starts them, fewer steps."""
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setattr(sys, "argv", [])
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())
    code = ["".join(x["source"]) for x in notebook["cells"] if x["cell_type"] == "code"]
    text = re.sub(r"^%pip install .*$", "", "\n".join(code), flags=re.M)
    text = text.replace("150_000", "4096").replace("runs/quickstart", str(tmp_path))
    names = {}
    exec(text, names)
    assert names["rows"]["global_step"].tolist() == [0, 2048, 4096]
    assert len(re.findall(r"step \d/100 \| target 10 \|", capsys.readouterr().out)) == 5


# -------------------- The changes of the guide ----------------------------------------------------
def guide_changes():
    """The guide's diff blocks, each a list of (lines before, lines after)."""
    changes = []
    for block in re.findall(r"^```diff\n(.*?)^```", GUIDE.read_text(), re.M | re.S):
        hunks = [hunk for hunk in re.split(r"^@@.*\n", block, flags=re.M) if hunk]
        lines = [hunk.splitlines(keepends=True) for hunk in hunks]
        sides = [[[line[1:] for line in hunk if line[0] in kinds] for kinds in (" -", " +")]
                 for hunk in lines]
        changes.append([("".join(before), "".join(after)) for before, after in sides])
    return changes


def change(script, hunks):
    """The text of a script after a change, whose lines must be found in it once."""
    text = (ROOT / f"{script}.py").read_text()
    for before, after in hunks:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


def load_changed(script, hunks, folder, monkeypatch):
    path = folder / f"{script}.py"
    path.write_text(change(script, hunks))
    return load(path, monkeypatch)


def test_change_of_the_learner(monkeypatch, tmp_path):
    """It has one dense layer more, of the same width."""
    deeper, _, _ = guide_changes()
    script = load_changed("magpo_ff", deeper, tmp_path, monkeypatch)
    learner = script.Learner(8, 3, False)
    obs = script.Observation(np.zeros((1, 2, 5), np.float32), np.ones((1, 2, 3), bool))
    shapes = jax.eval_shape(learner.init, jax.random.PRNGKey(0), obs)["params"]
    assert [shapes[f"Dense_{i}"]["kernel"].shape for i in range(3)] == [(5, 8), (8, 8), (8, 8)]
    assert shapes["Policy_0"]["out"]["kernel"].shape == (8, 3) and len(shapes) == 4


@pytest.mark.parametrize("script", ["magpo_ff", "magpo_rec"])
def test_schedules(script, monkeypatch, tmp_path):
    """The guide's goes from 4 to --delta in either script, and those of the other page do what is
    said of them; all of them can be traced."""
    _, shorter, _ = guide_changes()
    _, lines = usage_blocks("python")
    above = "    optimizer = make_optimizer(args, rate)\n"
    shorter.append((above, lines + above))
    module = load_changed(script, shorter, tmp_path, monkeypatch)
    args = module.Args(
        scenario="2x3-4", num_envs=4, num_steps=8, total_timesteps=320, num_devices=1, delta=1.1)
    deltas = [float(module.tether(args, number)) for number in range(11)]
    assert deltas[0] == 4.0 and deltas[-1] == pytest.approx(1.1)
    np.testing.assert_allclose(np.diff(np.log(deltas)), math.log(1.1 / 4.0) / 10, rtol=1e-5)

    found = {}
    for iteration in (0, 9, 100, 200):
        state = SimpleNamespace(iteration=iteration)
        names = {**vars(module), "args": args, "state": state, "rate": 1e-3}
        exec(textwrap.dedent(lines), names)
        found[iteration] = names["args"].delta, names["args"].learner_rl_coef, names["rate"]
    expected = [(4, 4, 1e-4), (3.775, 3.654, 1e-3), (1.5, 1.464, 1e-3), (1.5, 0.536, 1e-3)]
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-3)

    env = module.make_env(args.env_id, args.scenario)
    parts = (args, env, *module.make_networks(args, env))
    state = jax.eval_shape(lambda: first_state(module, parts))
    assert jax.eval_shape(on_one_device(module.train_iteration, *parts), state)[0] == state


def test_order_of_agents(monkeypatch, tmp_path):
    """It is drawn for each episode and kept in it; every agent plays what was decided for it."""
    *_, drawn = guide_changes()
    script = load_changed("magpo_ff", drawn, tmp_path, monkeypatch)
    env = script.make_env("MPE_simple_spread_v3", "")
    state = jax.vmap(env.reset)(jax.random.split(jax.random.PRNGKey(0), 20))
    assert len({tuple(order) for order in state.order.tolist()}) == 6
    action = np.random.default_rng(0).normal(size=(20, 3, 5)).astype(np.float32)
    after, reward, *_ = jax.vmap(env.step)(state, action)
    np.testing.assert_array_equal(after.order, state.order)
    np.testing.assert_array_equal(np.argmax(after.obs.agents_view[..., :3], -1), state.order)
    plain = magpo_ff.make_env("MPE_simple_spread_v3", "")
    back = np.argsort(state.order, axis=1)
    own_action = np.take_along_axis(action, back[..., None], axis=1)
    fixed = magpo_ff.EnvState(state.game, None, state.episode)
    expected, own_reward, *_ = jax.vmap(plain.step)(fixed, own_action)
    jax.tree.map(np.testing.assert_array_equal, after.game, expected.game)
    np.testing.assert_allclose(np.take_along_axis(np.asarray(reward), back, 1), own_reward)


@pytest.fixture(scope="module")
def changed_run(environ, tmp_path_factory):
    """The folder of a tiny run of magpo_ff.py with all changes of the guide."""
    folder = tmp_path_factory.mktemp("changed")
    hunks = [hunk for hunks in guide_changes() for hunk in hunks]
    (folder / "magpo_changed.py").write_text(change("magpo_ff", hunks))
    flags = ["--env-id", "examples.my_env:Meet-v0", *TINY, "--run-dir", folder / "runs"]
    flags += ["--delta", 1.01, "--learning-rate", 0.01, "--total-timesteps", 640]
    environ = environ | {"PYTHONPATH": str(ROOT)}
    run_program(folder / "magpo_changed.py", flags, environ, ROOT)
    return run_folder(folder / "runs")


@pytest.mark.slow
def test_changed_tether_shortens_in_a_run(changed_run):
    """Hardly anything is outside of it in the first half, and in the second much is."""
    _, early, late = (row.get("losses/delta_clipfrac") for row in read_rows(changed_run))
    assert early < 0.01 < 0.05 < late


@pytest.mark.slow
def test_backtracking(changed_run, monkeypatch, capsys, tmp_path):
    """The picture of a run, and one line about a folder that is none."""
    (flags,) = commands_of("docs/backtracking.py")
    assert flags == ["runs/RUN_FOLDER"]
    more = ["--out", tmp_path / "x.png"]
    export = ["--export", tmp_path / "x.csv"]
    assert run_here("docs/backtracking.py", monkeypatch, changed_run, *more, *export) == 0
    assert is_picture(tmp_path / "x.png")
    out = capsys.readouterr().out
    assert re.search(r"at the end: outside of the tether \d+\.\d%, KL \S+, gap -?\d+\.\d\d\n", out)
    (tmp_path / "x.png").unlink()
    assert run_here("docs/backtracking.py", monkeypatch, tmp_path / "x.csv", *more) == 0
    assert is_picture(tmp_path / "x.png")
    assert capsys.readouterr().out == out
    assert run_here("docs/backtracking.py", monkeypatch, tmp_path, *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("backtracking.py: error: ") and error.count("\n") == 1
