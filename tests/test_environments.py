"""Tests of the environments as the algorithm sees them: recorded episodes, scenarios, other Jumanji environments."""

import functools
import inspect
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jumanji
import numpy as np
import pytest
from conftest import has_memory, scripts_with
from jax.extend import core
from jumanji import specs
from jumanji.env import Environment
from jumanji.types import restart, transition, truncation

pytestmark = pytest.mark.usefixtures("quick_compile")

SCRIPTS = scripts_with("make_env", "TeamEnv")
script = SCRIPTS[0].values[0]  # the others hold the same text, see test_scripts_share_their_environments
GOLDEN = pathlib.Path(__file__).parent / "data" / "golden_envs.npz"
RWARE, LBF, CONNECTOR, COORDSUM = "RobotWarehouse-v0", "LevelBasedForaging-v0", "Connector-v3", "CoordSum-v0"


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_scripts_share_their_environments(other):
    """All scripts hold the same environment code, to the letter, so what is tested below on one holds for all."""
    for name in ("Observation", "Outcome", "TeamEnv", "connector_view", "make_env"):
        assert inspect.getsource(getattr(other, name)) == inspect.getsource(getattr(script, name)), name


# --------------------------------------------------------------------------------------------------- recorded episodes
GOLDEN_TASKS = {
    "rware/tiny-2ag-hard": RWARE,
    "rware/small-4ag": RWARE,
    "lbf/2s-10x10-3p-3f": LBF,
    "lbf/8x8-2p-2f-coop": LBF,
    "connector/con-5x5x3a": CONNECTOR,
}


@pytest.fixture(scope="module", params=GOLDEN_TASKS)
def replay(request):
    """The recordings of a task's two episodes, and what TeamEnv gives for the same keys and actions."""
    with np.load(GOLDEN) as file:
        names = [name for name in file if name.startswith(request.param + "/")]
        recordings = [{n.rsplit("/", 1)[1]: file[n] for n in names if f"/{seed}/" in n} for seed in "01"]
    env = script.make_env(GOLDEN_TASKS[request.param], request.param.split("/")[1])
    steps = max(len(recording["action"]) for recording in recordings)
    actions = [np.pad(r["action"], ((0, steps - len(r["action"])), (0, 0))) for r in recordings]

    @jax.jit
    @jax.vmap
    def episode(key, actions):
        state, obs = env.reset(key)
        return obs, jax.lax.scan(env.step, state, actions)[1]

    first, outcomes = episode(np.stack([r["reset_key"] for r in recordings]), np.stack(actions))
    played = []
    for i, recording in enumerate(recordings):
        cut = jax.tree.map(lambda x: np.asarray(x[i, : len(recording["action"])]), outcomes)
        played.append((jax.tree.map(lambda x: np.asarray(x[i]), first), cut))
    return recordings, played


def test_golden_start(replay):
    """The same key gives the recorded first views, the one-hot id first, and action masks, to the bit."""
    for recording, (first, _) in zip(*replay):
        assert first.agents_view.dtype == np.float32
        np.testing.assert_array_equal(first.agents_view, recording["reset_agents_view"])
        np.testing.assert_array_equal(first.action_mask, recording["reset_action_mask"])


def test_golden_views(replay):
    """The views and masks after each recorded action are the recorded ones, the last of an episode included."""
    for recording, (_, outcomes) in zip(*replay):
        np.testing.assert_array_equal(outcomes.obs.agents_view, recording["agents_view"])
        np.testing.assert_array_equal(outcomes.obs.action_mask, recording["action_mask"])


def test_golden_rewards(replay):
    """Each agent gets the recorded team reward."""
    for recording, (_, outcomes) in zip(*replay):
        np.testing.assert_array_equal(outcomes.reward, recording["reward"])


def test_golden_ends(replay):
    """Episodes end and are won where recorded; discount is 0 at the end, but 1 where it was a truncation."""
    for recording, (_, outcomes) in zip(*replay):
        np.testing.assert_array_equal(outcomes.last, recording["last"])
        np.testing.assert_array_equal(outcomes.won, recording["won"])
        np.testing.assert_array_equal(outcomes.discount == 0, recording["last"] & ~recording["truncated"])
        np.testing.assert_array_equal(outcomes.discount == 1, ~recording["last"] | recording["truncated"])


def test_rware_time_limit_terminates():
    """RWARE reports its time limit with discount 0, which cannot be told from a collision and ends the returns."""
    env = script.make_env(RWARE, "tiny-2ag")
    (state, _), step = jax.jit(env.reset)(jax.random.PRNGKey(0)), jax.jit(env.step)
    for step_count, last in ((498, False), (499, True)):
        late = state.replace(step_count=jnp.full_like(state.step_count, step_count))
        _, outcome = step(late, jnp.zeros(2, jnp.int32))
        assert (outcome.last, outcome.discount) == (last, 0 if last else 1)


def test_connector_win():
    """An episode is won when all agents are connected on its last step, and only Connector has a win rate."""
    env = script.make_env(CONNECTOR, "con-5x5x3a")
    assert env.has_win_rate
    assert not script.make_env(LBF, "8x8-2p-2f-coop").has_win_rate
    shapes = jax.eval_shape(env.reset, jax.random.PRNGKey(0))[0]
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    grid, rows, ones = np.zeros((5, 5), np.int32), jnp.arange(3), jnp.ones(3, jnp.int32)
    grid[:3, 1], grid[:3, 2] = (2, 5, 8), (3, 6, 9)  # each head to the left of its target
    heads, targets = jnp.stack([rows, ones], 1), jnp.stack([rows, 2 * ones], 1)
    agents = state.agents.replace(id=rows, start=heads, position=heads, target=targets)
    state = state.replace(grid=jnp.asarray(grid), agents=agents, action_mask=jnp.ones((3, 5), bool))
    step = jax.jit(env.step)
    _, partly = step(state, jnp.array([2, 2, 0]))  # 2: to the right
    _, fully = step(state, jnp.array([2, 2, 2]))
    assert not partly.last and not partly.won and partly.discount == 1
    assert fully.last and fully.won and fully.discount == 0
    np.testing.assert_allclose(fully.reward, 3 * (1 - 0.03), rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ scenario names
def shapes(env):
    """The numbers of agents, features and actions, without compiling anything."""
    _, obs = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
    assert obs.agents_view.dtype == jnp.float32 and obs.action_mask.dtype == bool
    assert (env.num_agents, env.num_actions) == obs.action_mask.shape and obs.agents_view.shape[0] == env.num_agents
    return *obs.agents_view.shape, obs.action_mask.shape[1]


# the paper's scenarios: name, agents, rows and columns of the board, requested shelves
RWARE_SCENARIOS = [
    ("tiny-2ag", 2, (11, 10), 2),
    ("tiny-2ag-hard", 2, (11, 10), 1),
    ("tiny-4ag", 4, (11, 10), 4),
    ("tiny-4ag-hard", 4, (11, 10), 2),
    ("small-4ag", 4, (20, 10), 4),
    ("small-4ag-hard", 4, (20, 10), 2),
    ("medium-4ag", 4, (20, 16), 4),
    ("medium-4ag-hard", 4, (20, 16), 2),
    ("medium-6ag", 6, (20, 16), 6),
    ("large-4ag", 4, (29, 16), 4),
    ("large-4ag-hard", 4, (29, 16), 2),
    ("large-8ag", 8, (29, 16), 8),
    ("large-8ag-hard", 8, (29, 16), 4),
    ("xlarge-4ag", 4, (38, 16), 4),
    ("xlarge-4ag-hard", 4, (38, 16), 2),
    ("tiny-4ag-easy", 4, (11, 10), 8),  # not in the paper, but of the same family
]


@pytest.mark.parametrize("name, num_agents, board, requests", RWARE_SCENARIOS)
def test_rware_scenarios(name, num_agents, board, requests):
    """size-Nag[-easy|-hard] sets the board, the agents and the requests: N of them, 2 N if easy, N / 2 if hard."""
    env = script.make_env(RWARE, name)
    assert shapes(env) == (num_agents, 66 + num_agents, 5)
    state, _ = jax.eval_shape(env.env.reset, jax.random.PRNGKey(0))
    assert state.grid.shape[-2:] == board and state.request_queue.shape == (requests,)
    assert env.env.time_limit == 500 and env.env.sensor_range == 1


LBF_SCENARIOS = [
    ("2s-8x8-2p-2f-coop", 2, 2, 8, 2, True),
    ("8x8-2p-2f-coop", 2, 2, 8, 8, True),
    ("2s-10x10-3p-3f", 3, 3, 10, 2, False),
    ("10x10-3p-3f", 3, 3, 10, 10, False),
    ("15x15-3p-5f", 3, 5, 15, 15, False),
    ("15x15-4p-3f", 4, 3, 15, 15, False),
    ("15x15-4p-5f", 4, 5, 15, 15, False),
]


@pytest.mark.parametrize("name, num_agents, num_food, size, sight, coop", LBF_SCENARIOS)
def test_lbf_scenarios(name, num_agents, num_food, size, sight, coop):
    """[Ss-]GxG-Np-Ff[-coop] sets sight (the whole board without it), board, players, food and forced cooperation."""
    env = script.make_env(LBF, name)
    assert shapes(env) == (num_agents, 3 * (num_agents + num_food) + num_agents, 6)
    generator = env.env._generator
    assert (generator.grid_size, generator.fov, generator.force_coop) == (size, sight, coop)
    assert (generator.num_food, generator.max_agent_level, env.env.time_limit) == (num_food, 2, 100)


@pytest.mark.parametrize("name, size, num_agents", [
    ("con-5x5x3a", 5, 3), ("con-7x7x5a", 7, 5), ("con-10x10x10a", 10, 10), ("con-15x15x23a", 15, 23)])
def test_connector_scenarios(name, size, num_agents):
    """con-GxGxNa sets board, agents, a time limit of G * G, and the papers' generator of boards."""
    env = script.make_env(CONNECTOR, name)
    assert shapes(env) == (num_agents, 54 + num_agents, 5)
    assert (env.env.grid_size, env.env.time_limit) == (size, size * size)
    assert type(env.env._generator).__name__ == "LegacyRandomWalkGenerator"


@pytest.mark.parametrize("name, num_agents, num_actions, max_target", [
    ("3x10-30", 3, 10, 30), ("3x30-50", 3, 30, 50), ("5x20-80", 5, 20, 80), ("8x15-100", 8, 15, 100)])
def test_coordsum_scenarios(name, num_agents, num_actions, max_target):
    """NxA-M sets agents, actions and targets; each agent sees its id and the target."""
    env = script.make_env(COORDSUM, name)
    assert shapes(env) == (num_agents, num_agents + 1, num_actions)
    assert (env.env.max_target, env.env.time_limit) == (max_target, 100)


@pytest.mark.parametrize("env_id, expected", [
    (RWARE, (4, 70, 5)), (LBF, (2, 14, 6)), (CONNECTOR, (10, 64, 5)), (COORDSUM, (3, 4, 10))])
def test_no_scenario(env_id, expected):
    """Without a scenario an environment has its own defaults."""
    assert shapes(script.make_env(env_id, "")) == expected


def refusal(env_id, scenario):
    """The one line with which make_env refuses."""
    with pytest.raises(ValueError) as error:
        script.make_env(env_id, scenario)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("env_id, scenario", [
    (RWARE, "tiny"), (RWARE, "huge-2ag"), (RWARE, "tiny-2ag-impossible"), (RWARE, "tiny-2ag "), (RWARE, "con-5x5x3a"),
    (LBF, "8x8"), (LBF, "8x9-2p-2f"), (LBF, "8x8-2p-2f-hard"), (CONNECTOR, "5x5x3a"), (CONNECTOR, "con-5x6x3a"),
    (COORDSUM, "3x10"), (COORDSUM, "tiny-2ag")])
def test_names_that_break_the_rule(env_id, scenario):
    """A scenario's name that does not follow the rule is refused in one line that names the flag and the name."""
    message = refusal(env_id, scenario)
    assert "--scenario" in message and scenario in message


@pytest.mark.parametrize("env_id, scenario", [
    (RWARE, "tiny-0ag"),  # no agents
    (RWARE, "tiny-1ag-hard"),  # no requested shelves
    (RWARE, "tiny-500ag"),  # more agents than cells
    (RWARE, "tiny-30ag-easy"),  # more requests than shelves
    (LBF, "3x3-2p-2f"),  # too small a board
    (LBF, "8x8-0p-2f"),
    (LBF, "8x8-2p-0f"),
    (LBF, "8x8-2p-30f"),  # more food than fits
    (LBF, "0s-8x8-2p-2f"),
    (LBF, "9s-8x8-2p-2f"),  # sees farther than the board
    (CONNECTOR, "con-0x0x1a"),
    (CONNECTOR, "con-3x3x0a"),
    (CONNECTOR, "con-1x1x1a"),  # fewer than two cells for each agent
    (CONNECTOR, "con-2x2x9a"),
    (CONNECTOR, "con-5x5x13a"),
    (COORDSUM, "0x3-4"),
    (COORDSUM, "2x3=9"),  # a target out of reach
    (COORDSUM, "2x3-0")])
def test_scenarios_that_cannot_be_built(env_id, scenario):
    """A scenario that follows the rule but makes no game is refused in one line that names the flag and the name."""
    message = refusal(env_id, scenario)
    assert "--scenario" in message and scenario in message


@pytest.mark.parametrize("env_id, scenario", [("Nope-v0", ""), ("Nope-v0", "tiny-2ag"), ("Connector-v2", "con-5x5x3a"),
                                              ("nonsense", ""), ("", "")])
def test_unknown_ids(env_id, scenario):
    """An unknown id is refused by name, with known ones to try, whatever the scenario."""
    message = refusal(env_id, scenario)
    assert f"--env-id {env_id}" in message and "unknown" in message and RWARE in message


@pytest.mark.parametrize("env_id, lacks", [
    ("Cleaner-v0", "no agents_view"), ("SearchAndRescue-v0", "no action_mask and no agents_view"),
    ("Snake-v1", "no agents_view")])
def test_what_an_environment_lacks(env_id, lacks):
    """An environment that the algorithm cannot play is refused by name, with what is missing."""
    message = refusal(env_id, "")
    assert f"--env-id {env_id}" in message and lacks in message


@pytest.mark.parametrize("env_id", ["Cleaner-v0", "Snake-v1", "Lanes-v0"])
def test_scenario_for_an_environment_without(env_id):
    """A scenario is refused where the environment has none, instead of being ignored."""
    message = refusal(env_id, "tiny-2ag")
    assert "--scenario tiny-2ag" in message and env_id in message


# ---------------------------------------------------------------------------------------- another Jumanji environment
class LanesState(NamedTuple):
    key: jax.Array
    step_count: jax.Array


class LanesObservation(NamedTuple):
    agents_view: jax.Array
    action_mask: jax.Array
    extra: jax.Array


class Lanes(Environment):
    """Two agents, three actions, views of shape (2, 4), a reward for each agent, truncation after three steps."""

    num_values = (3, 3)

    def observe(self, state):
        view = jnp.full((2, 2, 4), state.step_count, jnp.int32).at[1].add(10)
        return LanesObservation(view, jnp.ones((2, 3), bool).at[0, 2].set(False), jnp.zeros(7))

    def reset(self, key):
        state = LanesState(key, jnp.int32(0))
        return state, restart(self.observe(state), shape=(2,))

    def step(self, state, action):
        state = LanesState(state.key, state.step_count + 1)
        reward = jnp.asarray(action, jnp.float32)
        kinds = [functools.partial(kind, shape=(2,)) for kind in (truncation, transition)]
        return state, jax.lax.cond(state.step_count == 3, *kinds, reward, self.observe(state))

    @property
    def observation_spec(self):
        view = specs.Array((2, 2, 4), jnp.int32, "agents_view")
        mask = specs.BoundedArray((2, 3), bool, False, True, "action_mask")
        extra = specs.Array((7,), jnp.float32, "extra")
        return specs.Spec(LanesObservation, "ObservationSpec", agents_view=view, action_mask=mask, extra=extra)

    @property
    def action_spec(self):
        return specs.MultiDiscreteArray(jnp.array(self.num_values, jnp.int32))


class OneAction(Lanes):
    """The same with a single action for the whole team."""

    @property
    def action_spec(self):
        return specs.DiscreteArray(9)


for id, name in (("Lanes-v0", "Lanes"), ("OneAction-v0", "OneAction")):
    if id not in jumanji.registered_environments():
        jumanji.register(id=id, entry_point=f"{__name__}:{name}")


def test_other_environment():
    """A registered Jumanji environment is played as it is: flat views behind the id, summed rewards, truncation."""
    env = script.make_env("Lanes-v0", "")
    state, obs = env.reset(jax.random.PRNGKey(0))
    np.testing.assert_array_equal(obs.agents_view, [[1, 0] + 8 * [0], [0, 1] + 8 * [10]])
    np.testing.assert_array_equal(obs.action_mask, [[True, True, False], [True, True, True]])
    for t in (1, 2, 3):
        state, outcome = env.step(state, jnp.array([1, 2]))
        np.testing.assert_array_equal(outcome.obs.agents_view, [[1, 0] + 8 * [t], [0, 1] + 8 * [t + 10]])
        np.testing.assert_array_equal(outcome.reward, [3, 3])
        assert (outcome.last, outcome.discount, outcome.won) == (t == 3, 1, False)


def test_one_action_for_all():
    """An environment that takes one action for the whole team is refused by name."""
    message = refusal("OneAction-v0", "")
    assert "--env-id OneAction-v0" in message and "one discrete action per agent" in message


def tiny_iteration(script, env):
    """The training iteration of a script on tiny sizes, for one device, and the shapes of the state it takes."""
    args = script.Args(num_envs=4, num_devices=1, num_steps=5, num_minibatches=2, update_epochs=1, embed_dim=4,
                       total_timesteps=40, learner_hidden_dim=4)
    guider, learner = script.make_networks(args, env)
    optimizers = script.make_optimizers(args)
    parts = (args, env, guider, learner, optimizers)
    init = lambda keys: script.init_state(*parts, jax.random.PRNGKey(0), keys)  # noqa: E731
    state = jax.eval_shape(jax.vmap(init), jax.random.split(jax.random.PRNGKey(1), 1))
    return jax.vmap(lambda state: script.train_iteration(*parts, state), axis_name="device"), state


@pytest.mark.parametrize("script", scripts_with("train_iteration", "init_state", "make_networks", "make_optimizers"))
def test_other_environment_trains(script):
    """A training iteration can be traced on a registered Jumanji environment, and keeps the state's shapes."""
    iteration, state = tiny_iteration(script, script.make_env("Lanes-v0", ""))
    assert jax.eval_shape(iteration, state)[0] == state


def calls(jaxpr, loops=()):
    """Yields the name of each jitted call in a jaxpr, and the loops around it."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if "name" in equation.params:
            yield equation.params["name"], loops
        inside = loops + ((name,) if name in ("scan", "while") else ())
        for sub in core.jaxprs_in_params(equation.params):
            yield from calls(sub, inside)


def marked_env(script):
    """CoordSum, whose reset and step show up by name in a jaxpr."""
    env = script.make_env(COORDSUM, "2x3-4")
    reset, step = env.env.reset, env.env.step

    def marked_reset(key):
        return reset(key)

    def marked_step(state, action):
        return step(state, action)

    env.env.reset, env.env.step = jax.jit(marked_reset), jax.jit(marked_step)
    return env


@pytest.mark.parametrize("script", scripts_with("train_iteration", "init_state", "make_networks", "make_optimizers"))
def test_no_reset_inside_the_rollout(script):
    """An iteration resets environments once, before the scan over steps: a reset inside would run at every step."""
    iteration, state = tiny_iteration(script, marked_env(script))
    found = list(calls(jax.make_jaxpr(iteration)(state).jaxpr))
    assert [loops for name, loops in found if name == "marked_reset"] == [()]
    assert [loops for name, loops in found if name == "marked_step"] == [("scan",)]


@pytest.mark.parametrize("script", scripts_with("play"))
def test_no_reset_inside_evaluation(script):
    """Evaluation resets once, in front of its loop, and plays without auto-reset."""
    env, memory = marked_env(script), has_memory(script)

    def act(obs, *memory_and_key):
        action = jnp.zeros((3, 2), jnp.int32)
        return (action, memory_and_key[1]) if memory else action

    hidden = [jnp.zeros(())] if memory else []
    jaxpr = jax.make_jaxpr(lambda key: script.play(env, act, *hidden, 3, key))(jax.random.PRNGKey(0))
    found = list(calls(jaxpr.jaxpr))
    assert [loops for name, loops in found if name == "marked_reset"] == [()]
    assert [loops for name, loops in found if name == "marked_step"] == [("while",)]
