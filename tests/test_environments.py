"""Tests of the environments as the algorithm sees them: recorded episodes, ids, what is refused."""

import functools
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jumanji
import numpy as np
import pytest
from conftest import first_state, make_parts, on_one_device, scripts_with
from jax.extend import core
from jumanji import specs
from jumanji.env import Environment
from jumanji.types import restart, transition, truncation

import tasks

pytestmark = pytest.mark.usefixtures("quick_compile")

script = scripts_with("make_env", "TeamEnv")[0].values[0]  # the others hold the same text
GOLDEN = pathlib.Path(__file__).parent / "data" / "golden_envs.npz"
RWARE, LBF, CONNECTOR = "RobotWarehouse-v0", "LevelBasedForaging-v0", "Connector-v3"
COORDSUM, SMAX, SPREAD = "CoordSum-v0", "SMAX", "MPE_simple_spread_v3"


# -------------------------------------------------------------------------------- recorded episodes
GOLDEN_TASKS = {
    "rware/tiny-2ag-hard": RWARE,
    "rware/small-4ag": RWARE,
    "lbf/2s-10x10-3p-3f": LBF,
    "lbf/8x8-2p-2f-coop": LBF,
    "connector/con-5x5x3a": CONNECTOR,
    "smax/2s3z": SMAX,
    "mpe/simple_spread_3ag": SPREAD,
}


MORE = ("rware/small-4ag", "lbf/8x8-2p-2f-coop")  # what their names mean is in test_tasks.py


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if name in MORE else []) for name in GOLDEN_TASKS])
def test_golden(name):
    """The same keys and actions give two recorded episodes again, to the bit: views, the ids first,
    and masks, from the start to the last step; rewards; ends and wins."""
    with np.load(GOLDEN) as file:
        names = [key for key in file if key.startswith(f"{name}/")]
        recordings = [
            {key.rsplit("/", 1)[1]: file[key] for key in names if f"/{seed}/" in key}
            for seed in "01"
        ]
    env_id, scenario = GOLDEN_TASKS[name], name.split("/")[1]
    # What is recorded is the task itself, before any tanh of actions and scale of features.
    env = script.TeamEnv(tasks.make(env_id, scenario))
    has_chance = env_id in (SMAX, SPREAD)  # in its steps

    def step(state, inputs):
        step_key, action = inputs
        if has_chance:
            state = state._replace(game=state.game._replace(key=step_key))
        state, *results = env.step(state, action)
        return state, (state.obs, state.episode["won"], *results)

    def episode(reset_key, step_keys, actions):
        state = env.reset(reset_key)
        return state.obs, jax.lax.scan(step, state, (step_keys, actions))[1]

    steps = max(len(recording["action"]) for recording in recordings)
    # With few optimisations the last digits of JaxMARL's games differ.
    jax.config.update("jax_disable_most_optimizations", not has_chance)
    play = jax.jit(episode)
    for recording in recordings:
        length = len(recording["action"])
        inputs = [recording["step_key"], recording["action"]]
        inputs = [np.pad(x, ((0, steps - length), *[(0, 0)] * (x.ndim - 1))) for x in inputs]
        first, results = play(recording["reset_key"], *inputs)
        obs, won, reward, discount, last = jax.tree.map(lambda x: x[:length], results)
        assert obs.agents_view.dtype == np.float32
        for field in ("agents_view", "action_mask"):
            np.testing.assert_array_equal(getattr(first, field), recording[f"reset_{field}"])
            np.testing.assert_array_equal(getattr(obs, field), recording[field])
        np.testing.assert_array_equal(reward, recording["reward"])
        np.testing.assert_array_equal(last, recording["last"])
        np.testing.assert_array_equal(won, recording["won"])
        # The discount is 0 at the end, but 1 at a truncation.
        np.testing.assert_array_equal(discount, ~(recording["last"] & ~recording["truncated"]))
    jax.config.update("jax_disable_most_optimizations", True)


def test_rware_time_limit_terminates():
    """RWARE's time limit has discount 0, like a collision, and ends the returns."""
    env = script.make_env(RWARE, "tiny-2ag")

    @jax.jit
    def step_after(step_count):
        state = env.reset(jax.random.PRNGKey(0))
        late = state._replace(game=state.game.replace(step_count=step_count))
        return env.step(late, jnp.zeros(2, jnp.int32))

    for step_count, ends in ((498, False), (499, True)):
        _, _, discount, last = step_after(step_count)
        assert (last, discount) == (ends, 0 if ends else 1)


# --------------------------------------------------------------------- another Jumanji environment
class LanesState(NamedTuple):
    key: jax.Array
    step_count: jax.Array


class LanesObservation(NamedTuple):
    agents_view: jax.Array
    action_mask: jax.Array
    extra: jax.Array


class Lanes(Environment):
    """Two agents, three actions, views (2, 4), a reward for each agent, truncated after 3 steps."""

    action_spec = specs.MultiDiscreteArray(np.full(2, 3))
    # Without action_mask and extra: a spec may leave out what the algorithm needs.
    observation_spec = specs.Spec(
        LanesObservation, "ObservationSpec", agents_view=specs.Array((2, 2, 4), jnp.int32))

    def observe(self, state):
        view = jnp.full((2, 2, 4), state.step_count, jnp.int32).at[1].add(10)
        mask = jnp.ones((2, 3), bool).at[0, 2].set(False)
        return LanesObservation(view, mask, jnp.zeros(7))

    def extras(self, state):
        return {}

    def reset(self, key):
        state = LanesState(key, jnp.int32(0))
        return state, restart(self.observe(state), extras=self.extras(state), shape=(2,))

    def step(self, state, action):
        state = LanesState(state.key, state.step_count + 1)
        reward = jnp.asarray(action, jnp.float32)
        results = (reward, self.observe(state), jnp.ones(2), self.extras(state))
        return state, jax.lax.cond(state.step_count == 3, truncation, transition, *results)


class WonLanes(Lanes):
    """The same, won in the third step."""

    def extras(self, state):
        return {"won": state.step_count >= 2}  # which counts at the end alone


class OneAction(Lanes):  # for the whole team
    action_spec = specs.DiscreteArray(9)


class OneForce(Lanes):  # for one agent of the team alone
    action_spec = specs.BoundedArray((1, 3), float, -1.0, 1.0)


class OneMask(Lanes):
    """The same with a single mask for the whole team."""

    def observe(self, state):
        return super().observe(state)._replace(action_mask=jnp.ones(3, bool))


class Broken(Lanes):
    """An environment with a mistake in its reset."""

    def reset(self, key):
        raise ValueError("the well is dry")


for kind in (Lanes, WonLanes, OneAction, OneMask, OneForce, Broken):
    if f"{kind.__name__}-v0" not in jumanji.registered_environments():
        jumanji.register(id=f"{kind.__name__}-v0", entry_point=f"{__name__}:{kind.__name__}")


@pytest.mark.parametrize("name", ["Lanes", "WonLanes"])
def test_other_environment(name):
    """A registered environment is played as it is: flat views, which are not scaled, and summed
    rewards."""
    env = script.make_env(f"{name}-v0", "")
    assert env.has_win_rate == (name == "WonLanes")
    state = env.reset(jax.random.PRNGKey(0))
    np.testing.assert_array_equal(state.obs.agents_view, [[1, 0] + 8 * [0], [0, 1] + 8 * [10]])
    np.testing.assert_array_equal(state.obs.action_mask, [[True, True, False], [True, True, True]])
    for t in (1, 2, 3):
        state, reward, discount, last = env.step(state, jnp.array([1, 2]))
        view = [[1, 0] + 8 * [t], [0, 1] + 8 * [t + 10]]
        np.testing.assert_array_equal(state.obs.agents_view, view)
        np.testing.assert_array_equal(reward, [3, 3])
        assert (last, discount) == (t == 3, 1)
        assert state.episode == {"return": 3 * t, "length": t, "won": t == 3 and name == "WonLanes"}


# ------------------------------------------------------------------------- modules of environments
def test_example():
    """The example's module registers it; the module may be named again. The team earns 1 where all
    stand in one place, and has won if they do so at the end."""
    for _ in range(2):
        env = script.make_env("examples.my_env:Meet-v0", "")
    assert (env.num_agents, env.num_actions, env.has_win_rate) == (3, 3, True)
    state, step = env.reset(jax.random.PRNGKey(0)), jax.jit(env.step)
    rewards, wins = [], []
    for place in ([2, 3, 3], [0, 6, 6]):
        game = state.game._replace(place=jnp.array(place), step_count=jnp.int32(9))
        # agent 0 goes to the right
        after, reward, discount, last = step(state._replace(game=game), jnp.array([2, 0, 0]))
        assert last and discount == 1
        rewards.append(reward[0])
        wins.append(bool(after.episode["won"]))
    np.testing.assert_allclose(rewards, [1, 1 / 6], rtol=1e-6)
    assert wins == [True, False]


@pytest.mark.parametrize("text, error", [
    ("1 / 0", ZeroDivisionError),
    ("import no_such_module", ModuleNotFoundError),
    ("raise ValueError('mine')", ValueError),
])
def test_error_inside_a_module(text, error, monkeypatch, tmp_path):
    """What a module of the current directory raises while it is imported is passed on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "half_done.py").write_text(text)
    with pytest.raises(error) as raised:
        script.make_env("half_done:Lanes-v0", "")
    assert type(raised.value) is error


# ----------------------------------------------------------------------------------------- refusals
@pytest.fixture
def refusal(capsys):
    """refusal(env_id, scenario) -> the one line with which make_env ends the program."""

    def call(env_id, scenario=""):
        with pytest.raises(SystemExit) as end:
            script.make_env(env_id, scenario)
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2
        return line.removeprefix(f"{script.SCRIPT}: error: ")

    return call


def test_error_inside_an_environment():
    """An error raised by an environment is passed on, and no flag is blamed for it."""
    with pytest.raises(ValueError, match="^the well is dry") as raised:
        script.make_env("Broken-v0", "")
    assert type(raised.value) is ValueError


MODULE = "examples.my_env"


@pytest.mark.parametrize("env_id, scenario, start", [
    ("nowhere:Lanes-v0", "", "--env-id nowhere:Lanes-v0: there is no module nowhere"),
    ("jumanji.env.x:Y-v0", "", "--env-id jumanji.env.x:Y-v0: there is no module"),
    ("examples.nowhere:Meet-v0", "", "--env-id examples.nowhere:Meet-v0: there is no module"),
    ("nowhere.my_env:Meet-v0", "", "--env-id nowhere.my_env:Meet-v0: there is no module"),
    (f"{MODULE}:A-v0", "", f"--env-id {MODULE}:A-v0: {MODULE} does not register A-v0"),
    (":Lanes-v0", "", "--env-id :Lanes-v0: unknown"),
    (f"{MODULE}:", "", f"--env-id {MODULE}:: unknown"),
    (".my_env:Meet-v0", "", "--env-id .my_env:Meet-v0: unknown"),
    ("a..b:C-v0", "", "--env-id a..b:C-v0: unknown"),
    ("Lanes-v0", "tiny-2ag", "--scenario tiny-2ag: Lanes-v0 takes none"),
    ("MPE_simple_spread_v3", "3ag", "--scenario 3ag: does not follow the rule simple_spread_Nag"),
    ("Nope-v0", "x", f"--env-id Nope-v0: unknown, try {', '.join(tasks.SUITES)}, jaxmarl:"),
    ("Snake-v1", "", "--env-id Snake-v1: its observation has no agents_view"),
    ("OneAction-v0", "", "--env-id OneAction-v0: needs one discrete action per agent"),
    ("OneMask-v0", "", "--env-id OneMask-v0: needs agents_view (N, ...) and action_mask (N, A)"),
    ("OneForce-v0", "", "--env-id OneForce-v0: needs agents_view (N, ...) and action_spec (N, A)"),
])
def test_refusals(env_id, scenario, start, refusal):
    """What cannot be played is refused in one line with the flag, its value and the reason."""
    assert refusal(env_id, scenario).startswith(start)


@pytest.mark.parametrize("env_id, scenario, module", [
    (COORDSUM, "", "tasks"), (RWARE, "tiny-2ag", "tasks"), (CONNECTOR, "", "tasks"),
    (LBF, "", "tasks"),  # it has bounds, at which tasks.py scales
    ("Snake-v1", "", "tasks"), (COORDSUM, "", "coordsum"), (COORDSUM, "3x10-30", "coordsum"),
    (SMAX, "", "jaxmarl"), (SMAX, "2s3z", "jaxmarl"),
])
def test_missing_file(env_id, scenario, module, monkeypatch, refusal):
    """Without tasks.py, coordsum.py or JaxMARL what needs it is refused, with its name."""
    monkeypatch.setitem(sys.modules, module, None)
    registered = jumanji.registered_environments() - {COORDSUM}  # other tests import coordsum
    monkeypatch.setattr(jumanji, "registered_environments", lambda: registered)
    message = refusal(env_id, scenario)
    assert message.startswith("--") and (scenario or env_id) in message.partition(":")[0]
    assert module in message.partition(":")[2]


# ----------------------------------------------------------------------------------------- training
def calls(jaxpr, inside=()):
    """Yields the name of each jitted call in a jaxpr, and the loops and branches around it."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if "name" in equation.params:
            yield equation.params["name"], inside
        around = inside + ((name,) if name in ("scan", "while", "cond") else ())
        for sub in core.jaxprs_in_params(equation.params):
            yield from calls(sub, around)


@pytest.mark.parametrize("script", scripts_with(
    "init_state", "train_iteration", "evaluate", "make_networks", replaced=["minibatch_loss"]))
def test_other_environment_trains(script):
    """An iteration on a registered environment keeps the state's shapes. It resets only where the
    starts have run out: elsewhere inside the rollout a reset would run at every step. Evaluation
    resets once for each network, in front of its loop, and plays without auto-reset."""
    env = script.make_env("Lanes-v0", "")
    env.env.reset, env.env.step = jax.jit(env.env.reset), jax.jit(env.env.step)  # named in a jaxpr
    parts = make_parts(script, env, num_steps=5, num_minibatches=2, update_epochs=1)
    state = jax.eval_shape(lambda: first_state(script, parts))
    iterate, evaluate = (
        functools.partial(f, *parts) for f in (script.train_iteration, script.evaluate))
    program, (after, _) = jax.make_jaxpr(on_one_device(iterate), return_shape=True)(state)
    played = jax.make_jaxpr(evaluate)(state.params, state.key)
    found = [[x for x in calls(y.jaxpr) if x[0] in ("reset", "step")] for y in (program, played)]
    assert after == state
    assert sorted(found[0]) == [("reset", ("scan", "cond")), ("step", ("scan",))]
    assert sorted(found[1]) == 2 * [("reset", ())] + 2 * [("step", ("while",))]
