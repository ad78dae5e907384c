"""Tests of the scripts as text: short, flat, alone, alike, and in step with the README."""

import ast
import difflib
import importlib
import io
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tokenize

import conftest
import pytest
from conftest import run_program

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = ["ctds_ff", "magpo_ff", "magpo_rec"]
BASELINES, VARIANTS = (
    [path.stem for path in sorted((ROOT / folder).glob("*.py"))]
    for folder in ("baselines", "variants"))
sys.path += [str(ROOT / "baselines"), str(ROOT / "variants")]
OWN_FILES = {path.stem for path in ROOT.glob("*.py")}
README = ROOT / "README.md"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# Functions and classes that two scripts share by name but not by text, because they are what
# differs.
ALLOWED_DIFFERENCES = {
    ("ctds_ff", "magpo_ff"): {"Args", "check_args", "collect", "minibatch_loss"},
    ("magpo_ff", "magpo_rec"): {
        "Args", "Guider", "Learner", "Mixer", "Observation", "TrainState", "Transition",
        "check_args", "collect", "evaluate", "guider_act", "init_state", "learner_act",
        "make_networks", "minibatch_loss", "play", "train_iteration",
    },
    ("magpo_ff", "mappo_ff"): {
        "Args", "Policy", "TrainState", "Transition", "check_args", "collect", "evaluate",
        "init_state", "log", "make_networks", "make_optimizer", "minibatch_loss", "train_iteration",
    },
    ("magpo_ff", "magpo_ff_adaptive"): {
        "Args", "TrainState", "check_args", "init_state", "train_iteration"},
    ("magpo_ff", "magpo_ff_residual"): {"Args", "Guider", "make_networks", "train_iteration"},
    ("magpo_ff", "magpo_ff_state"): {
        "Guider", "Observation", "TeamEnv.observe", "TeamEnv.reset", "TeamEnv.step", "guider_act",
        "main", "train_iteration"},
    ("magpo_rec", "mappo_rec"): {
        "Args", "Observation", "Policy", "TrainState", "Transition", "check_args", "collect",
        "evaluate", "init_hidden", "init_state", "log", "make_networks", "make_optimizer",
        "minibatch_loss", "train_iteration",
    },
    ("mappo_rec", "happo_rec"): {
        "collect", "init_hidden", "init_state", "learner_act", "make_networks", "train_iteration",
    },
}
# Lines of a file, with blank lines, comments and docstrings.
LIMITS = {
    "magpo_ff": 900, "ctds_ff": 900, "magpo_rec": 1070, "mappo_ff": 750, "mappo_rec": 810,
    "happo_rec": 900, "magpo_ff_adaptive": 960, "magpo_ff_residual": 960, "magpo_ff_state": 960,
}
CHANGED_LINES = {
    ("ctds_ff", "magpo_ff"): 100, ("magpo_ff", "magpo_rec"): 400,
    ("magpo_ff", "magpo_ff_adaptive"): 60, ("magpo_ff", "magpo_ff_residual"): 60,
    ("magpo_ff", "magpo_ff_state"): 60,
}


def path_of(script):
    folder = "baselines" if script in BASELINES else "variants" if script in VARIANTS else ""
    return ROOT / folder / f"{script}.py"


def text(script):
    return path_of(script).read_text()


def definitions(script):
    """The functions and classes at the top level of a script, by name."""
    return {
        node.name: node
        for node in ast.parse(text(script)).body
        if isinstance(node, (*FUNCTIONS, ast.ClassDef))
    }


def is_network(node):
    return isinstance(node, ast.ClassDef) and "Module" in "".join(map(ast.unparse, node.bases))


def pieces(script):
    """The text of all functions, classes and constants at the top level, by name.

    The methods of a class that is no network stand alone, as Class.method.
    """
    lines = text(script).splitlines()

    def source(node):
        first = min([node.lineno] + [x.lineno for x in getattr(node, "decorator_list", [])])
        return "\n".join(lines[first - 1 : node.end_lineno])

    found = {}
    for node in ast.parse(text(script)).body:
        if isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = source(node)
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            continue
        found[node.name] = source(node)
        if isinstance(node, ast.ClassDef) and not is_network(node):
            methods = [n for n in node.body if isinstance(n, FUNCTIONS)]
            for method in methods:
                found[f"{node.name}.{method.name}"] = source(method)
                found[node.name] = found[node.name].replace(source(method), method.name)
    return found


for_each_script = pytest.mark.parametrize("script", SCRIPTS + BASELINES + VARIANTS)


# -------------------------------------------------------------------------------------- short, flat
@for_each_script
def test_length_of_file(script):
    """A script stays a text that a reading group can go through."""
    assert len(text(script).splitlines()) <= LIMITS[script]


@for_each_script
def test_density(script):
    """It is short because it is simple: a line with text has 9.2 tokens on average, or fewer."""
    kinds = (tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING)
    tokens = tokenize.generate_tokens(io.StringIO(text(script)).readline)
    lines = [line for line in text(script).splitlines() if line.strip()]
    assert round(sum(token.type in kinds for token in tokens) / len(lines), 1) <= 9.2


@pytest.mark.parametrize("pair", CHANGED_LINES, ids="-".join)
def test_diff(pair):
    """Who knows one script reads the next by their difference."""
    left, right = (text(script).splitlines() for script in pair)
    changed = [line for line in difflib.ndiff(left, right) if line[0] in "-+"]
    assert len(changed) < CHANGED_LINES[pair]


def test_length_of_tests():
    """The tests do not outgrow what they test."""
    files = (ROOT / "tests").glob("*.py")
    number = sum(len(file.read_text().splitlines()) for file in files)
    assert number <= 6500


def test_lint():
    """Ruff finds nothing: no line over 100 columns, no dead name."""
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "."]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@for_each_script
def test_no_deep_nesting(script):
    """Functions are at most three deep, statements are indented at most six times."""

    def depth(node):
        below = max(map(depth, ast.iter_child_nodes(node)), default=0)
        return below + isinstance(node, FUNCTIONS)

    tree = ast.parse(text(script))
    assert depth(tree) <= 3
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    assert max(node.col_offset for node in statements) <= 24


@for_each_script
def test_short_functions(script):
    """No function has more than 60 lines, apart from those of network modules."""
    top = [node for node in definitions(script).values() if not is_network(node)]
    functions = [n for node in top for n in ast.walk(node) if isinstance(n, FUNCTIONS)]
    assert len(functions) > 20
    assert [n.name for n in functions if n.end_lineno - n.lineno >= 60] == []


# ------------------------------------------------------------------------------------- alone, alike
def test_suite_is_aimed_at_a_copy(tmp_path, monkeypatch):
    """MAGPO_SCRIPTS names what is tested, also if it is a twin of another script in part; a name
    without a script fails and skips nothing."""
    for name in ("my_algo", "my_twin"):
        (tmp_path / f"{name}.py").write_text(text("magpo_ff"))
    command = "-m pytest -n 0 --collect-only tests/test_networks.py".split()
    environ = {"MAGPO_SCRIPTS": "my_algo my_twin", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | environ, capture_output=True,
        text=True)
    for name in ("my_algo", "my_twin"):
        assert f"test_learner_is_decentralized[{name}]" in done.stdout
    assert done.returncode == 0 and "[magpo_ff" not in done.stdout

    monkeypatch.setattr(conftest, "NAMED", ["nowhere"])
    with pytest.raises(pytest.UsageError, match="no script to test: nowhere"):
        conftest.pytest_configure(None)


def test_twins_are_tested_once(tmp_path, monkeypatch):
    """A script is left out where all that is called, constants too, is the text of an earlier
    one, unless what differs is replaced; comments do not count."""
    text = "A = 1\n\ndef f():\n    return g()\n\ndef g():\n    return A\n"
    changes = {"first": "", "twin": "# a comment\n", "other": "A = 2\n"}
    for name, change in changes.items():
        (tmp_path / f"{name}.py").write_text(text + change)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(conftest, "SCRIPTS", list(changes))
    monkeypatch.setattr(conftest, "NAMED", [])
    assert [x.id for x in conftest.scripts_with("f")] == ["first", "other"]
    for replaced in ("A", "g"):
        assert [x.id for x in conftest.scripts_with("f", replaced=[replaced])] == ["first"]


def imports(node):
    """The top-level names of all modules that a part of a script imports."""
    found = [n for n in ast.walk(node) if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = [getattr(n, "module", None) or alias.name for n in found for alias in n.names]
    return {name.split(".")[0] for name in names}


@for_each_script
def test_stands_alone(script):
    """At module level a script imports nothing of ours and nothing optional; inside functions only
    tasks is ours."""
    body = ast.parse(text(script)).body
    inside = [node for node in body if isinstance(node, (*FUNCTIONS, ast.ClassDef))]
    at_import = set().union(*(imports(node) for node in body if node not in inside))
    assert "jax" in at_import
    assert at_import & (OWN_FILES | {"jaxmarl", "wandb", "jumanji"}) == set()
    assert set().union(*map(imports, inside)) & OWN_FILES == {"tasks"}


@pytest.mark.parametrize("pair", ALLOWED_DIFFERENCES, ids="-".join)
def test_twins(pair):
    """What two scripts share by name is the same to the letter, apart from what is listed, which
    differs."""
    left, right = (pieces(script) for script in pair)
    shared = left.keys() & right.keys()
    assert len(shared) > 10
    assert {n for n in shared if left[n] != right[n]} == ALLOWED_DIFFERENCES[pair]


# ------------------------------------------------------------------------------------ the algorithm
@pytest.mark.parametrize("script", ["magpo_ff", "magpo_rec"])
def test_four_steps(script):
    """The four steps are marked once each; the three of the loss in order, before the iteration."""
    assert re.findall(r"# STEP (\d)/4", text(script)) == ["2", "3", "4", "1"]


# --------------------------------------------------------------------------------------- the README
def details(script):
    return [int(number) for number in re.findall(r"\bD(\d+):", text(script))]


def test_details():
    """Each numbered detail has its number once in a script, and those of the top-level scripts and
    of the environments have one row each in docs/details.md."""
    for script in SCRIPTS + BASELINES + VARIANTS:
        assert len(details(script)) == len(set(details(script))) > 5
    table = (README.parent / "docs" / "details.md").read_text()
    rows = re.findall(r"^\| *D(\d+) *\|", table, re.M)
    assert sorted(map(int, rows)) == sorted(
        {n for file in [*SCRIPTS, "tasks", "adapters"] for n in details(file)})


def commands(document):
    """The commands `python SCRIPT.py ...` in indented or fenced lines, those that go on after a
    backslash joined."""
    lines = document.replace("\\\n", " ").splitlines()
    start = r"\s*(?:\$ )?python3? (baselines/|variants/)?(\w+)\.py\b([^#|&;]*)"
    found = [match for match in (re.match(start, line) for line in lines) if match]
    known = BASELINES + VARIANTS, SCRIPTS  # with the folder, without it
    return [(x[2], shlex.split(x[3])) for x in found if x[2] in known[x[1] is None]]


def check_command(script, flags, call, environ):
    """Runs a command with --dry-run; one that asks for several devices needs a process of its
    own."""
    if "--num-devices" in flags:
        run_program(path_of(script), [*flags, "--dry-run"], environ)
        return
    status, _, err = call(importlib.import_module(script), *flags, "--dry-run")
    assert status == 0, (script, flags, err)


@for_each_script
def test_commands_of_the_docstring(script, call, environ, monkeypatch, tmp_path):
    """The two commands at the top of a script are accepted as they stand."""
    monkeypatch.chdir(tmp_path)
    found = commands(ast.get_docstring(ast.parse(text(script))))
    assert len(found) == 2 and {name for name, _ in found} == {script}
    for name, flags in found:
        check_command(name, flags, call, environ)


@pytest.mark.parametrize("page", ["README.md", "docs/reading_group.md"])
def test_commands_of_a_page(page, call, environ, monkeypatch, tmp_path):
    """The training commands in a page are accepted as they stand."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^ *```(?:bash|sh|shell|console)\n(.*?)^ *```", text, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    found = commands("\n".join(blocks))
    assert {name for name, _ in found} >= set(SCRIPTS)
    for name, flags in found:
        if not {"--resume", "--eval-only"} & set(flags):  # these need a run to go on from
            check_command(name, flags, call, environ)
