"""The pages: links, length, names, commands, the snippets in Python and all changes shown."""

import functools
import importlib.util
import json
import math
import pathlib
import re
import shlex
import sys
import textwrap
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import test_examples
import tyro
from conftest import TINY, first_state, on_one_device, random_params
from PIL import Image

import magpo_ff

ROOT = pathlib.Path(__file__).parent.parent
GUIDE, USAGE = ROOT / "docs" / "reading_group.md", ROOT / "docs" / "usage.md"
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md")), *sorted(ROOT.glob("docs/*.md"))]
BUDGET = ["--total-timesteps", 128, "--num-evals", 2]

pytestmark = pytest.mark.usefixtures("quick_compile")


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


@pytest.mark.parametrize("page", PAGES, ids=lambda x: str(x.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert missing_links(page) == []


def test_length():
    """Pages stay short, and the README's paragraphs, too, without the addresses of links."""
    for page, lines, characters in ((PAGES[0], 140, 12_000), (GUIDE, 220, 24_000)):
        text = page.read_text()
        assert len(text.splitlines()) <= lines and len(text) <= characters, page
    text = re.sub(r"\]\([^)]*\)", "]", prose(PAGES[0]))
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


@pytest.fixture
def load(monkeypatch):
    """load(path) -> the module in a file of ours, which sees what `python PATH` would see."""

    def module_in(path):
        path = ROOT / path
        spec = importlib.util.spec_from_file_location(f"loaded.{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for it
        monkeypatch.syspath_prepend(path.parent)
        spec.loader.exec_module(module)
        return module

    return module_in


@pytest.fixture
def run_here(load, call):
    """run_here(path, *flags) -> status, stdout, stderr of `python PATH FLAGS`, in this process."""
    return lambda path, *flags: call(load(path), *flags)


def is_picture(path):
    with Image.open(path) as picture:
        return picture.format == "PNG" and picture.width > 1000


def test_each_command_is_run_by_a_test_below():
    """But for those that train, which are in test_shape.py."""
    tested = {"benchmark/run.py", "benchmark/speed.py"}
    tested |= {f"docs/{x}.py" for x in "tables matching tether backtracking heatmap saddle".split()}
    found = {tuple(words[:2]) for words in guide_commands()}
    assert {name for _, name in found if not re.match("(variants/)?[mc]", name)} == tested
    assert {python for python, _ in found} == {"python"}


def test_tables(run_here):
    """The student fails with the KL of the code; with backtracking the learner does not."""
    for flags in commands_of("docs/tables.py"):
        _, out, _ = run_here("docs/tables.py", *flags, "--games", 2)
        found = re.findall(r"^(CTDS|MAGPO), (KL\S+ \|\| \S+) +([\d.]+) +([\d.]+)$", out, re.M)
        learner = {(name, direction): float(value) for name, direction, _, value in found}
        assert len(learner) == 4 and all(float(guider) > 0.99 for _, _, guider, _ in found)
        assert learner.pop(("CTDS", "KL(mu || pi)")) < 0.6
        assert min(learner.values()) > 0.99


def test_matching(load, call, monkeypatch):
    """A row for CTDS and one for each delta. The trainings themselves are in test_ctds.py."""
    module, trained = load("docs/matching.py"), []

    def matching(script, num_seeds, **flags):
        trained.append((script.__name__, num_seeds, flags))
        return np.array([0.5, 0.7, 0.8]), np.array([0.9, 0.6, len(trained) / 10])

    monkeypatch.setattr(module, "matching", matching)
    (flags,) = commands_of("docs/matching.py")
    _, out, _ = call(module, *flags)
    assert [row.split() for row in out.splitlines()[1:]] == [
        ["CTDS", "0.70", "0.60", "0.10", "0.60", "0.90"],
        ["MAGPO,", "delta", "1.1", "0.70", "0.60", "0.20", "0.60", "0.90"]]
    assert trained == [
        ("ctds_ff", 10, {}), ("magpo_ff", 10, {"delta": 1.1, "learner_rl_coef": 4.0})]


def test_tether(run_here, load, tmp_path):
    """The picture, and the point at which the double clip lets an outward gradient through. Inside
    of the tether and of PPO's clip the gradient is -r A, beyond it is that of the KL."""
    printed = []
    for flags in commands_of("docs/tether.py"):
        _, out, _ = run_here("docs/tether.py", *flags, "--out", tmp_path / "new" / "x.png")
        assert is_picture(tmp_path / "new" / "x.png")
        numbers = re.findall(r"loss +(-?[\d.]+) +gradient +(-?[\d.]+)", out)
        printed.append(np.array(numbers, float))
    ppo, kl, total = printed[0]
    divergence = 0.3 * math.log(0.3 / 0.1) + 0.7 * math.log(0.7 / 0.9)
    pull = 0.3 * (math.log(0.3 / 0.1) - math.log(0.7 / 0.9))
    np.testing.assert_allclose(ppo, [-0.6, -0.6], atol=1e-3)
    np.testing.assert_allclose(kl, [divergence, pull], atol=1e-3)
    np.testing.assert_allclose(total, ppo + kl, atol=2e-3)

    tether = load("docs/tether.py")
    fig = tether.draw(tether.Options(deltas=(1.5,), behaviour_probs=(0.14,)))
    line = fig.axes[1].lines[0]
    log_ratio, slope = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    inside = np.abs(log_ratio) < math.log(1.5) - 1e-3
    np.testing.assert_allclose(slope[inside], -np.exp(log_ratio[inside]) / 1.4, rtol=1e-3)
    assert np.all(slope[log_ratio > math.log(1.5) + 1e-3] > 0)


@pytest.mark.slow
def test_saddle(run_here, tmp_path):
    """A run's policies add up to 1, and its CSV file is drawn again."""
    i, j = map(TINY.index, ("--num-envs", "--eval-episodes"))
    csv, out = tmp_path / "saddle.csv", tmp_path / "saddle.png"
    (flags,) = commands_of("docs/saddle.py")
    flags += [*TINY[i:j], *TINY[j + 2 :], *BUDGET, "--every", 3, "--start-delta", 4]
    assert run_here("docs/saddle.py", *flags, "--export", csv, "--out", out)[0] == 0
    frame = pd.read_csv(csv)
    assert sorted(frame["global_step"].unique()) == [0, 96, 128]
    assert set(frame["run"]) == {"seed 9, delta 4, then 1.1"}
    sums = frame.groupby(["global_step", "agent"])["probability"].sum()
    np.testing.assert_allclose(sums, 1, atol=1e-3)
    start = frame[frame["global_step"] == 0]
    for policy in ("guider", "guider, deaf", "learner"):  # 63 of 1000 triples add up to 10
        np.testing.assert_allclose(start[policy], 0.063, atol=5e-3)
    out.unlink()
    other = tmp_path / "other.csv"
    frame.assign(run="another").to_csv(other)
    assert run_here("docs/saddle.py", csv, other, "--out", out)[0] == 0 and is_picture(out)


def test_saddle_looks_at_the_policies_of_the_script(load):
    """The guider's table of triples is that of its actions; its marginals are those of a table."""
    saddle = load("docs/saddle.py")
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
    act = jax.jit(functools.partial(magpo_ff.guider_act, guider))
    action, *_ = act(params["guider"], many, jax.random.PRNGKey(0))
    tables = jax.jit(functools.partial(saddle.tables, guider, learner))
    triples, learner_digits = tables(params, obs)
    assert np.sum(triples) == pytest.approx(1, abs=1e-4)
    seen = np.bincount(np.ravel_multi_index(np.asarray(action).T, (10, 10, 10)), minlength=1000)
    np.testing.assert_allclose(seen / 20_000, triples, atol=0.02)
    np.testing.assert_allclose(np.sum(learner_digits, axis=-1), 1, atol=1e-5)


def test_commands_of_the_benchmark(run_here, load, monkeypatch):
    """The sweep is listed, command by command; what is to be timed exists."""
    monkeypatch.chdir(ROOT)
    for flags in commands_of("benchmark/run.py"):
        _, out, _ = run_here("benchmark/run.py", *flags, "--dry-run")
        assert out.count("--exp-name delta_") == 28
    (flags,) = commands_of("benchmark/speed.py")
    speed = load("benchmark/speed.py")
    options = tyro.cli(speed.Options, args=flags)
    settings = [("magpo_rec.py", "sable", name, 64, 128) for name in ("2x10-30", "8x10-30")]
    assert speed.settings(options) == settings


# -------------------- The snippets of the other page ----------------------------------------------
def usage_snippets():
    return re.findall(r"^```python\n(.*?)^```", USAGE.read_text(), re.M | re.S)


@pytest.mark.slow
def test_looking_inside(capsys):
    """The program that collects without compiling what it calls."""
    program, _ = usage_snippets()
    exec(program, {})
    *_, returns = re.findall(r"\[[^[\]]*\]", capsys.readouterr().out)
    assert len(returns.strip("[]").split()) == 4


def test_quickstart(monkeypatch, capsys, tmp_path):
    """The notebook's cells one after the other, from docs/ as Jupyter starts them. In place of
    training stands a run with networks as they start: what a run leaves is in test_resume.py."""
    monkeypatch.chdir(ROOT / "docs")
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())
    code = ["".join(x["source"]) for x in notebook["cells"] if x["cell_type"] == "code"]
    text = re.sub(r"^%pip install .*$", "", "\n".join(code), flags=re.M)
    text = text.replace("runs/quickstart", str(tmp_path))
    accept = magpo_ff.main

    def main():
        folder = tmp_path / "CoordSum-v0__3x10=10__magpo_ff__1__1"
        folder.mkdir()
        test_examples.make_run(magpo_ff, "CoordSum-v0", "3x10=10", folder, embed_dim=4)
        row = {"global_step": 0, "eval/guider_return": 1.5, "eval/learner_return": 0.5}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--dry-run"])
        return accept()

    monkeypatch.setattr(magpo_ff, "main", main)
    monkeypatch.setattr(sys, "argv", [])
    names = {}
    exec(text, names)
    assert names["args"].scenario == "3x10=10" and len(names["rows"]) == 1
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


@pytest.fixture
def load_changed(load, tmp_path):
    """load_changed(script, hunks) -> the module of a script after a change."""

    def module_of(script, hunks):
        path = tmp_path / f"{script}.py"
        path.write_text(change(script, hunks))
        return load(path)

    return module_of


def test_change_of_the_learner(load_changed):
    """It has one dense layer more, of the same width."""
    deeper, _, _ = guide_changes()
    script = load_changed("magpo_ff", deeper)
    learner = script.Learner(8, 3, False)
    obs = script.Observation(np.zeros((1, 2, 5), np.float32), np.ones((1, 2, 3), bool))
    shapes = jax.eval_shape(learner.init, jax.random.PRNGKey(0), obs)["params"]
    assert [shapes[f"Dense_{i}"]["kernel"].shape for i in range(3)] == [(5, 8), (8, 8), (8, 8)]
    assert shapes["Policy_0"]["out"]["kernel"].shape == (8, 3) and len(shapes) == 4


@pytest.mark.parametrize("script", ["magpo_ff", "magpo_rec"])
def test_schedules(script, load_changed, monkeypatch):
    """The guide's goes from 4 to --delta in either script, and those of the other page do what is
    said of them; all of them can be traced."""
    _, shorter, _ = guide_changes()
    _, lines = usage_snippets()
    set_rate, _ = shorter[-1]
    shorter.append((set_rate, set_rate + lines))
    module = load_changed(script, shorter)
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

    def minibatch_loss(params, args, *others):
        return sum(jnp.sum(args.delta * x) for x in jax.tree.leaves(params)), {"ratio": args.delta}

    monkeypatch.setattr(module, "minibatch_loss", minibatch_loss)
    env = module.make_env(args.env_id, args.scenario)
    parts = (args, env, *module.make_networks(args, env))
    state = jax.eval_shape(lambda: first_state(module, parts))
    assert jax.eval_shape(on_one_device(module.train_iteration, *parts), state)[0] == state


def test_order_of_agents(load_changed):
    """It is drawn for each episode and kept in it; every agent plays what was decided for it."""
    *_, drawn = guide_changes()
    script = load_changed("magpo_ff", drawn)
    env = script.make_env("MPE_simple_spread_v3", "")
    state = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.PRNGKey(0), 20))
    assert len({tuple(order) for order in state.order.tolist()}) == 6
    action = np.random.default_rng(0).normal(size=(20, 3, 5)).astype(np.float32)
    after, reward, *_ = jax.jit(jax.vmap(env.step))(state, action)
    np.testing.assert_array_equal(after.order, state.order)
    np.testing.assert_array_equal(np.argmax(after.obs.agents_view[..., :3], -1), state.order)
    plain = magpo_ff.make_env("MPE_simple_spread_v3", "")
    back = np.argsort(state.order, axis=1)
    own_action = np.take_along_axis(action, back[..., None], axis=1)
    fixed = magpo_ff.EnvState(state.game, None, state.episode)
    expected, own_reward, *_ = jax.jit(jax.vmap(plain.step))(fixed, own_action)
    equal = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(equal, after.game, expected.game)
    np.testing.assert_allclose(np.take_along_axis(np.asarray(reward), back, 1), own_reward)


def test_backtracking(run_here, tmp_path):
    """The picture of a run, which can be drawn again, and one line about a folder that is none."""
    (flags,) = commands_of("docs/backtracking.py")
    assert flags == ["runs/RUN_FOLDER"]
    committed = pd.read_csv(ROOT / "benchmark" / "results" / "backtracking.csv")
    args = json.loads(committed.iloc[0].to_json())
    (tmp_path / "args.json").write_text(json.dumps({"args": args}))
    metrics = committed.drop(columns=["env_id", "scenario", "guider", "seed"])
    metrics.to_json(tmp_path / "metrics.jsonl", orient="records", lines=True)
    picture, csv = tmp_path / "x.png", tmp_path / "x.csv"
    found = [
        run_here("docs/backtracking.py", source, *flags, "--out", picture)
        for source, flags in ((tmp_path, ["--export", csv]), (csv, []), (tmp_path / "no", []))]
    assert found[0] == found[1] and found[0][0] == 0 and is_picture(picture)
    line = r"at the end: outside of the tether \d+\.\d%, KL \S+, gap -?\d+\.\d\d\n"
    assert re.search(line, found[0][1])
    status, _, err = found[2]
    assert (status, err.count("\n")) == (2, 1) and err.startswith("backtracking.py: error: ")
