"""Environments that were not made for these scripts, as Jumanji environments that they train on.

Any Jumanji environment, your own among them, is checked (`check`, `check_step`) and adapted
(`Adapter`). Jumanji's games for several agents whose observation is of all of them together get a
view for each (`VIEWS`). JaxMARL's cooperative games lose their auto-reset (`JaxMarl`,
`make_jaxmarl`); those that are not cooperative are refused, with the reason.

What the scripts train on has

    timestep.observation.agents_view   (N, ...), what each of the N agents sees
    timestep.observation.action_mask   (N, A) bool, True where an action is legal; actions that are
                                       A continuous numbers are all legal

and may have, in every timestep, that of a reset included,

    timestep.extras["won"]             () bool, True on the step that ends an episode which is won
    timestep.extras["true_reward"]     () float32, where the reward is shaped: what counts as return

and

    env.own_rewards                    True if an agent's reward is its own
    env.global_state(state)            (S,) float32, for guiders that may know what no agent sees

D1, D16 and D17 are details of docs/details.md.
"""

import contextlib
import functools
import io
import math
import re
import sys
from types import ModuleType
from typing import Any, Callable, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jumanji import specs
from jumanji.env import Environment
from jumanji.types import StepType, TimeStep
from jumanji.wrappers import Wrapper
from matplotlib import pyplot
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from matplotlib.patches import Circle


class TaskError(ValueError):
    """A task that cannot be made, or trained on: one line with the flag and what is allowed."""


class VectorObservation(NamedTuple):
    """What the agents of Connector, SMAX and MPE see."""

    agents_view: jax.Array  # (N, O) float32
    action_mask: jax.Array  # (N, A) bool


def vector_spec(env: Environment) -> specs.Spec:
    """Spec of the `VectorObservation` that a reset gives, of the view without bounds."""
    _, timestep = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
    view, mask = timestep.observation
    view = specs.Array(view.shape, jnp.float32, "agents_view")
    mask = specs.BoundedArray(mask.shape, bool, False, True, "action_mask")
    fields = {"agents_view": view, "action_mask": mask}
    return specs.Spec(VectorObservation, "ObservationSpec", **fields)


def flat(*parts: jax.Array) -> jax.Array:
    """Arrays of any shape, numbers or bool -> (S,) float32."""
    return jnp.concatenate([jnp.ravel(part).astype(jnp.float32) for part in parts])


# -------------------- Checks and the adapter-------------------------------------------------------
def is_continuous(env: Environment) -> bool:
    """True for actions of floats within bounds of less than 1e8, a row for each agent: (N, A)."""
    spec = env.action_spec
    if not isinstance(spec, specs.BoundedArray) or len(spec.shape) != 2:
        return False
    bounds = np.broadcast_arrays(spec.minimum, spec.maximum)
    return jnp.issubdtype(spec.dtype, jnp.floating) and bool(np.all(np.abs(bounds) < 1e8))


def check(env_id: str, env: Environment) -> None:
    """TaskError if an environment lacks what training needs."""
    _, timestep = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
    observation = timestep.observation
    discrete = isinstance(env.action_spec, specs.MultiDiscreteArray)
    needed = ("agents_view", "action_mask") if discrete else ("agents_view",)
    missing = [field for field in needed if not hasattr(observation, field)]
    if missing:
        raise TaskError(f"--env-id {env_id}: its observation has no {' and no '.join(missing)}")
    one_each = discrete and len(env.action_spec.shape) == 1
    if not (one_each or is_continuous(env)):
        needs = "one discrete action per agent, a MultiDiscreteArray (N,), or continuous ones,"
        needs += " a BoundedArray (N, A) of floats within -1e8 and 1e8, not "
        needs += " ".join(str(env.action_spec).split())  # bounds may take several lines
        raise TaskError(f"--env-id {env_id}: needs {needs}")
    view_shape = observation.agents_view.shape
    mask_shape = observation.action_mask.shape if discrete else env.action_spec.shape
    if len(mask_shape) != 2 or view_shape[:1] != mask_shape[:1]:
        name = "action_mask" if discrete else "action_spec"
        needs = f"agents_view (N, ...) and {name} (N, A), not {view_shape} and {mask_shape}"
        raise TaskError(f"--env-id {env_id}: needs {needs}")
    bounds = getattr(env.observation_spec, "agents_view", None)
    if isinstance(bounds, specs.BoundedArray) and bounds.shape != view_shape:
        differs = f"{bounds.shape} in its spec and {view_shape} in a reset"
        raise TaskError(f"--env-id {env_id}: agents_view is {differs}")
    if discrete:
        check_mask(env_id, env, observation.action_mask)
    told = timestep.extras or {}
    if "won" in told and (told["won"].shape, told["won"].dtype) != ((), bool):
        found = f"{told['won'].shape} of {told['won'].dtype}"
        raise TaskError(f"--env-id {env_id}: extras' won must be () of bool, not {found}")
    if "true_reward" in told and told["true_reward"].shape != ():
        found = told["true_reward"].shape
        raise TaskError(f"--env-id {env_id}: extras' true_reward must be (), not {found}")


def check_mask(env_id: str, env: Environment, mask: jax.ShapeDtypeStruct) -> None:
    """TaskError if the action_mask is not of the actions that the spec has, by agent (N,)."""
    num_values = np.asarray(env.action_spec.num_values)
    shape = (len(num_values), int(num_values.max()))
    if mask.shape != shape or mask.dtype != bool:
        needs = f"{shape} of bool, as its action_spec has, not {mask.shape} of {mask.dtype}"
        raise TaskError(f"--env-id {env_id}: its action_mask must be {needs}")
    if np.any(num_values != num_values.max()):
        _, timestep = jax.jit(env.reset)(jax.random.PRNGKey(0))
        beyond = np.arange(num_values.max()) >= num_values[:, None]
        if np.any(beyond & np.asarray(timestep.observation.action_mask)):
            raise TaskError(
                f"--env-id {env_id}: its action_mask must be False beyond an agent's own actions, "
                f"of which its action_spec has {num_values.tolist()}"
            )


def check_step(env_id: str, env: Environment) -> None:
    """TaskError if a step does not give what a reset gives, for training puts one in place of the
    other. Errors of the environment itself show up here."""

    def describe(state, timestep):
        names = ("observation", "reward", "discount", "extras")
        parts = {"state": state, **{name: getattr(timestep, name) for name in names}}
        leaves = jax.tree_util.tree_leaves_with_path(parts)
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): f"{x.dtype}{list(x.shape)}"
            for path, x in leaves
        }

    state, timestep = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
    shape = env.action_spec.shape
    action = jax.ShapeDtypeStruct(shape, jnp.int32 if len(shape) == 1 else jnp.float32)
    of_reset = describe(state, timestep)
    of_step = describe(*jax.eval_shape(env.step, state, action))
    for name in of_reset | of_step:
        first, then = (x.get(name, "nothing") for x in (of_reset, of_step))
        if first != then:
            raise TaskError(f"--env-id {env_id}: {name} is {first} in a reset, {then} in a step")


def feature_scale(env: Environment) -> tuple[jax.Array, jax.Array]:
    """Mean and std of features with bounds, were all numbers between as frequent; 0 and 1 for all
    others. Images without bounds, views of uint8, are taken for 0 and 255.
    """
    spec = getattr(env.observation_spec, "agents_view", None)
    lowest = jnp.float32(getattr(spec, "minimum", -math.inf))
    reach = (jnp.float32(getattr(spec, "maximum", math.inf)) - lowest) / 2
    is_bounded = (reach >= 0) & (reach < 1e8)  # larger numbers are no bounds
    std = jnp.where(reach > 0, reach / math.sqrt(3), 1)
    _, timestep = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
    is_image = timestep.observation.agents_view.dtype == jnp.uint8
    if is_image and not isinstance(spec, specs.BoundedArray):
        return jnp.float32(0), jnp.float32(255)
    return jnp.where(is_bounded, lowest + reach, 0), jnp.where(is_bounded, std, 1)


def is_typed_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def kind_of(leaf: jax.Array) -> Any:
    """The type in which numpy can hold an array: uint32 for typed keys, float32 for bfloat16."""
    if is_typed_key(leaf):
        return jnp.uint32
    return leaf.dtype if leaf.dtype.kind != "V" else jnp.float32


class Adapter(Wrapper):
    """An environment as the scripts expect it.

    D1: features with bounds, in the spec of agents_view, are told with mean 0 and std 1, as if all
    numbers between were as frequent; others as they are. A network may begin with a norm, in which
    a large feature drowns the rest.
    An agent without any legal action has action 0 as its only one.
    D17: continuous actions u are any real numbers, of which the environment does tanh(u), scaled to
    the bounds. The derivative of tanh is the same for two policies, so it cancels in their ratios
    and KLs, and nothing overflows where tanh saturates. All of them are legal in the action_mask.
    State that numpy cannot hold, such as keys of jax.random.key and bfloat16, is kept as what it
    can hold, so that it can be saved.
    """

    def __init__(self, env: Environment):
        super().__init__(env)
        self.continuous = is_continuous(env)
        self.own_spec = env.action_spec  # some make it anew each time, which fails inside jit
        self.mean, self.std = feature_scale(env)

        def note(key):
            state = jax.tree.map(jnp.asarray, env.reset(key)[0])  # Python's numbers, too
            # Of typed keys the name of their implementation, which only keys tell, not shapes.
            self.kinds = [
                jax.random.key_impl(leaf) if is_typed_key(leaf) else leaf.dtype
                for leaf in jax.tree.leaves(state)
            ]
            return state

        jax.eval_shape(note, jax.random.PRNGKey(0))

    def pack(self, state: Any) -> Any:
        """The environment's own state -> state that numpy can hold."""
        state = jax.tree.map(jnp.asarray, state)
        state = jax.tree.map(
            lambda leaf: jax.random.key_data(leaf) if is_typed_key(leaf) else leaf, state
        )
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, kind_of(leaf)), state)

    def unpack(self, state: Any) -> Any:
        """What `pack` gave -> the environment's own state."""
        leaves, structure = jax.tree.flatten(state)
        own = [
            jax.random.wrap_key_data(leaf, impl=kind)
            if isinstance(kind, str)
            else leaf.astype(kind)
            for leaf, kind in zip(leaves, self.kinds)
        ]
        return jax.tree.unflatten(structure, own)

    def reset(self, key: jax.Array) -> tuple[Any, TimeStep]:
        """Starts an episode."""
        state, timestep = self._env.reset(key)
        return self.pack(state), self.adapt(timestep)

    def step(self, state: Any, action: jax.Array) -> tuple[Any, TimeStep]:
        """action: (N,) int32, or u (N, A) float32."""
        if self.continuous:
            lowest, highest = self.own_spec.minimum, self.own_spec.maximum
            action = (highest + lowest) / 2 + (highest - lowest) / 2 * jnp.tanh(action)
        state, timestep = self._env.step(self.unpack(state), action)
        return self.pack(state), self.adapt(timestep)

    def adapt(self, timestep: TimeStep) -> TimeStep:
        """The timestep with `VectorObservation`."""
        view = (timestep.observation.agents_view - self.mean) / self.std
        if self.continuous:
            mask = jnp.ones(self.own_spec.shape, bool)
        else:
            mask = timestep.observation.action_mask
            mask = mask.at[:, 0].max(~jnp.any(mask, axis=-1))
        observation = VectorObservation(view, mask)
        return timestep.replace(observation=observation, extras=timestep.extras or {})

    @property
    def global_state(self) -> Callable:
        """The environment's own `global_state`, for states of this one."""
        global_state = self._env.global_state
        return lambda state: global_state(self.unpack(state))

    @property
    def animate(self) -> Callable | None:
        """The environment's own `animate`, for states of this one."""
        animate = self._env.animate
        if animate is None:  # it cannot be drawn
            return None
        return lambda states, *args, **kwargs: animate(
            [self.unpack(state) for state in states], *args, **kwargs
        )


# -------------------- JaxMARL ---------------------------------------------------------------------
def import_jaxmarl() -> ModuleType:
    """Imports JaxMARL, without the two lines that it prints.

    Not at the top of this file: the import takes seconds and starts JAX's backend.

    Raises:
        ModuleNotFoundError: with what to install, if it is not there.
    """
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr", "__stdout__")}
    # Both, because the import itself sets sys.stdout to sys.__stdout__ before it prints.
    sys.stdout = sys.__stdout__ = io.StringIO()
    try:
        import jaxmarl
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"needs {error.name} (pip install jaxmarl)") from error
    finally:
        for name, stream in streams.items():
            setattr(sys, name, stream)
    return jaxmarl


class JaxMarlState(NamedTuple):
    """The state of a `JaxMarl` environment."""

    key: jax.Array  # for the next step
    game_state: Any  # JaxMARL's own state


class JaxMarl(Environment):
    """A cooperative game of JaxMARL as a Jumanji environment, without JaxMARL's auto-reset.

    - agents see vectors of one length: what an agent sees is flattened, and zeros follow
    - action: (N,) int32, an agent with fewer actions than others has no more legal ones; or
      (N, A) float32 within the game's bounds, an agent with fewer uses the first ones
    - reward: () float32, the team's, which the game gives to each agent; with `own_rewards` (N,),
      each agent's own; with `shaped` the game's hints of all agents are added to the team's, and
      extras["true_reward"] is what it was without
    - an episode ends when the game says so, and is cut off, by D8, if it ends for time alone
    """

    def __init__(
        self, game: Any, agents: Sequence[str] = (), own_rewards: bool = False, shaped: bool = False
    ):
        """game: JaxMARL's environment; agents: who is in the team, if not all; all others do
        nothing, or what the game has them do."""
        self.game = game
        self.agents = tuple(agents or game.agents)
        self.num_agents = len(self.agents)
        self.own_rewards = own_rewards
        self.shaped = shaped
        self.spaces = [game.action_space(agent) for agent in self.agents]
        self.continuous = hasattr(self.spaces[0], "low")
        sizes = [space.shape[0] if self.continuous else int(space.n) for space in self.spaces]
        self.num_actions = max(sizes)
        self.own_actions = np.arange(self.num_actions) < np.array(sizes)[:, None]  # (N, A)
        super().__init__()

    def reset(self, key: jax.Array) -> tuple[JaxMarlState, TimeStep]:
        """Starts an episode."""
        obs, game_state = self.game.reset(key)
        rewards = dict.fromkeys(self.game.agents, jnp.float32(0))
        info = {"shaped_reward": rewards}
        timestep = self.make_timestep(StepType.FIRST, False, obs, game_state, rewards, info)
        return JaxMarlState(following_key(key), game_state), timestep

    def step(self, state: JaxMarlState, action: jax.Array) -> tuple[JaxMarlState, TimeStep]:
        """action: (N,) int32 or (N, A) float32."""
        actions = {
            agent: jnp.zeros(space.shape, space.dtype)
            for agent, space in zip(self.game.agents, map(self.game.action_space, self.game.agents))
        }
        for j, (agent, space) in enumerate(zip(self.agents, self.spaces)):
            actions[agent] = action[j, : space.shape[0]] if self.continuous else action[j]
        obs, game_state, rewards, done, info = self.game.step_env(
            state.key, state.game_state, actions
        )
        # Only this entry ends an episode: in SMAX those of the agents say who is dead, and after a
        # win the survivors' are False.
        step_type = jnp.where(done["__all__"], StepType.LAST, StepType.MID)
        terminated = done["__all__"] & self.ends_anyway(state, actions, game_state)
        timestep = self.make_timestep(step_type, terminated, obs, game_state, rewards, info)
        return JaxMarlState(following_key(state.key), game_state), timestep

    def ends_anyway(self, state: JaxMarlState, actions: dict, after: Any) -> jax.Array:
        """() bool: does the step end the episode for another reason than time? It does if it ends
        one that has just begun. Compiled, little of this second step is left."""

        def set_back(path, leaf):
            is_clock = jax.tree_util.keystr(path[-1:], simple=True) in ("step", "steps")
            return jnp.zeros_like(leaf) if is_clock else leaf

        early = jax.tree_util.tree_map_with_path(set_back, state.game_state)
        _, _, _, done, _ = self.game.step_env(state.key, early, actions)
        return done["__all__"]

    def make_timestep(self, step_type, terminated, obs, game_state, rewards, info) -> TimeStep:
        """The timestep of a state; at a time limit the discount is 1, which makes a truncation."""
        views = [jnp.ravel(obs[agent]).astype(jnp.float32) for agent in self.agents]
        longest = max(map(len, views))
        agents_view = jnp.stack([jnp.pad(view, (0, longest - len(view))) for view in views])
        observation = VectorObservation(agents_view, self.action_mask(game_state))
        extras = self.extras(game_state, rewards)
        reward = jnp.stack([jnp.float32(rewards[agent]) for agent in self.agents])
        if not self.own_rewards:  # what is not shared after all stops the training
            reward = jnp.where(jnp.all(reward == reward[0]), reward[0], jnp.nan)
        if self.shaped:
            extras["true_reward"] = jnp.mean(reward)
            hints = jnp.stack([info["shaped_reward"][agent] for agent in self.agents])
            reward += hints if self.own_rewards else jnp.sum(hints)
        return TimeStep(
            step_type=jnp.int8(step_type),
            reward=reward,
            discount=1.0 - jnp.float32(terminated),
            observation=observation,
            extras=extras,
        )

    def action_mask(self, game_state: Any) -> jax.Array:
        """(N, A) bool, for a game without legal and illegal actions each agent's own ones."""
        tell = getattr(self.game, "get_legal_moves", self.game.get_avail_actions)
        try:
            legal = [] if self.continuous else tell(game_state)
        except NotImplementedError:
            legal = []
        mask = jnp.asarray(self.own_actions)
        for j, agent in enumerate(self.agents if legal else ()):
            mask = mask.at[j, : len(legal[agent])].set(legal[agent].astype(bool))
        return mask

    def extras(self, game_state: Any, rewards: dict) -> dict:
        """won, where a game can be won."""
        return {}

    @functools.cached_property
    def global_state(self) -> Callable:
        """What no agent sees, where the game tells it; else it is missing."""
        if not hasattr(self.game, "get_world_state"):
            raise AttributeError("JaxMARL's game has no get_world_state")
        tell = self.game.get_world_state
        return lambda state: flat(*jax.tree.leaves(tell(state.game_state)))

    @functools.cached_property
    def action_spec(self) -> specs.Array:
        """Spec of the action: (N,) int32, each below its agent's number, or (N, A) float32."""
        if not self.continuous:
            return specs.MultiDiscreteArray(jnp.array(self.own_actions.sum(axis=1), jnp.int32))
        lowest, highest = -np.ones(self.own_actions.shape), np.ones(self.own_actions.shape)
        for j, space in enumerate(self.spaces):
            lowest[j, : space.shape[0]] = space.low
            highest[j, : space.shape[0]] = space.high
        return specs.BoundedArray(self.own_actions.shape, jnp.float32, lowest, highest)

    @functools.cached_property
    def observation_spec(self) -> specs.Spec:
        """Spec of `VectorObservation`, without the bounds that JaxMARL announces: in Overcooked
        255, for ones and zeros."""
        return vector_spec(self)

    @functools.cached_property
    def reward_spec(self) -> specs.Array:
        """Spec of the reward: () or (N,) float32."""
        shape = (self.num_agents,) if self.own_rewards else ()
        return specs.Array(shape, jnp.float32, "reward")

    # Of states of the game a figure, and a function that draws the state of an index into it.
    drawing = None

    @property
    def animate(self) -> Callable | None:
        """`make_gif`, for games that can be drawn."""
        return self.make_gif if self.drawing else None

    def make_gif(
        self, states: Sequence[JaxMarlState], interval: int = 200, save_path: str = ""
    ) -> FuncAnimation:
        """Draws a frame per unbatched state, for `interval` ms each; save_path: file for a GIF."""
        game_states = [jax.tree.map(np.asarray, state.game_state) for state in states]
        figure, draw = self.drawing(game_states)
        figure.set_size_inches(8, 8)
        animation = FuncAnimation(figure, draw, frames=len(states), interval=interval)
        if save_path:
            animation.save(save_path, writer=PillowWriter(fps=1000 / interval))
        pyplot.close(figure)
        return animation


def following_key(key: jax.Array) -> jax.Array:
    """A key for the next step, other than those into which JaxMARL splits `key` itself, which are
    what folding in 0, 1, 2, .. gives."""
    return jax.random.fold_in(key, 2**31)


class Smax(JaxMarl):
    """The allies of SMAX; the enemies belong to the environment.

    - action: (N,) int32, 0 up, 1 right, 2 down, 3 left, 4 stop, 5 + j shoot at enemy j
    - reward: () float32, the share of the enemies' health that the step took, and 1 for a win
    - the episode terminates when one side is dead, and is cut off after `time_limit` steps
    - a dead agent sees zeros, can only stop, and has the team's reward like all others
    """

    @property
    def time_limit(self) -> int:
        return self.game.max_steps + 1  # the game looks at its clock before the clock ticks

    def survivors(self, game_state: Any) -> tuple[jax.Array, jax.Array]:
        """() bool each: is an ally alive, is an enemy alive?"""
        alive = game_state.state.unit_alive  # the allies first
        return jnp.any(alive[: self.num_agents]), jnp.any(alive[self.num_agents :])

    def ends_anyway(self, state: JaxMarlState, actions: dict, after: Any) -> jax.Array:
        """() bool: one side is dead. A second step is not needed to know it."""
        ally, enemy = self.survivors(after)
        return ~ally | ~enemy

    def extras(self, game_state: Any, rewards: dict) -> dict:
        """won: only the enemies are dead, the very case in which the last reward is at least 1."""
        ally, enemy = self.survivors(game_state)
        return {"won": ally & ~enemy}

    def drawing(self, game_states: list) -> tuple[Figure, Callable]:
        """One frame per step; JaxMARL's own drawing takes about 10 s for each."""
        figure = Figure()
        positions = np.concatenate([game_state.state.unit_positions for game_state in game_states])
        low, high = positions.min(axis=0), positions.max(axis=0)
        middle, reach = (low + high) / 2, np.max(high - low) / 2 + 1
        limits = np.stack([middle - reach, middle + reach], axis=1)  # of x and y, the same scale
        return figure, lambda frame: self.draw(figure, limits, game_states[frame].state)

    def draw(self, figure: Figure, limits: np.ndarray, state: Any) -> None:
        """Units as circles, allies in blue, paler with less health, and lines to their targets."""
        figure.clear()
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set(xlim=limits[0], ylim=limits[1], xticks=[], yticks=[])
        ax.set_title(f"step {state.step}", y=0.95)
        share = state.unit_health / np.asarray(self.game.unit_type_health)[state.unit_types]
        for unit in np.flatnonzero(state.unit_alive):
            is_ally = unit < self.num_agents
            color = "tab:blue" if is_ally else "tab:red"
            position = state.unit_positions[unit]
            kind = state.unit_types[unit]  # whose initial is drawn, e.g. s for a stalker
            radius = self.game.unit_type_radiuses[kind]
            ax.add_patch(Circle(position, radius, facecolor="white", edgecolor=color))
            ax.add_patch(Circle(position, radius, color=color, alpha=share[unit]))
            letter = self.game.unit_type_shorthands[kind]
            ax.text(*position, letter, fontsize=14, ha="center", va="center")
            # Below 0 if it does not shoot; an enemy counts the allies from the last one down.
            shot = state.prev_attack_actions[unit] - self.game.num_movement_actions
            if shot >= 0:
                target = self.num_agents + shot if is_ally else self.num_agents - 1 - shot
                ends = np.stack([position, state.unit_positions[target]], axis=1)
                ax.plot(*ends, color=color, linewidth=1, zorder=0)


class Mpe(JaxMarl):
    """Multi-particle environments, whose episodes are cut off after `time_limit` steps."""

    @property
    def time_limit(self) -> int:
        return self.game.max_steps + 1  # the game looks at its clock before the clock ticks

    def drawing(self, game_states: list) -> tuple[Figure, Callable]:
        """JaxMARL's own."""
        from jaxmarl.environments.mpe import MPEVisualizer

        with contextlib.redirect_stdout(io.StringIO()):  # it prints whether the agents talk
            visualizer = MPEVisualizer(self.game, game_states)
        return visualizer.fig, visualizer.update


class Spread(Mpe):
    """Agents that should cover the landmarks, and not bump into each other.

    - action: (N, 5) float32 within -1..1, of which 1 to 4 push to the left, right, down and up
    - reward: (N,) float32, for each agent half of the team's and half of its own, which is -1 for
      each agent it touches
    - the episode never terminates, and is cut off after `time_limit` steps

    D16: actions between -1 and 1 go to the game as they are. It announces 0..1, but does not clip:
    (0, -1, 1, -1, 1) is a force of (10, 10), twice the largest within 0..1.
    """

    @functools.cached_property
    def action_spec(self) -> specs.BoundedArray:
        """Spec of the action: (N, 5) float32."""
        return specs.BoundedArray((self.num_agents, self.num_actions), jnp.float32, -1.0, 1.0)


class Overcooked(JaxMarl):
    """Two cooks in a kitchen. (Those of the second version could be drawn with a package more.)"""

    def drawing(self, game_states: list) -> tuple[Figure, Callable]:
        """JaxMARL's own pictures."""
        from jaxmarl.viz.overcooked_visualizer import OvercookedVisualizer

        edge = self.game.agent_view_size - 2  # of the board, around the kitchen

        def picture(state):
            kitchen = state.maze_map[edge:-edge, edge:-edge]
            cooks = {"agent_dir_idx": state.agent_dir_idx, "agent_inv": state.agent_inv}
            return OvercookedVisualizer._render_grid(kitchen, highlight_mask=None, **cooks)

        figure = Figure()
        ax = figure.add_axes((0, 0, 1, 1))
        ax.axis("off")
        image = ax.imshow(picture(game_states[0]))
        return figure, lambda frame: image.set_data(picture(game_states[frame]))


class SwitchRiddle(JaxMarl):
    """Prisoners one of whom has to tell, by a switch alone, that all have been in the room."""

    def extras(self, game_state: Any, rewards: dict) -> dict:
        """won: somebody tells it, and it is true."""
        return {"won": rewards[self.agents[0]] > 0}


class JaxNav(JaxMarl):
    """Robots that drive to their goals by lidar."""

    def extras(self, game_state: Any, rewards: dict) -> dict:
        """won: all robots are at their goals, and none of them has bumped into anything."""
        arrived = game_state.goal_reached & ~game_state.move_term
        return {"won": jnp.all(arrived) & game_state.ep_done}


def by_nothing(variant: str) -> dict:
    if variant:
        raise ValueError("has no scenarios")
    return {}


def by_number(most: int, variant: str) -> dict:
    """Nag, for N agents."""
    match = re.fullmatch(r"([1-9][0-9]?)ag", variant or "1ag")
    if match is None or int(match[1]) > most:
        raise ValueError(f"a scenario is Nag, for N agents, at most {most}, e.g. 3ag")
    return {"num_agents": int(match[1])} if variant else {}


def by_name(names: dict, keyword: str, variant: str) -> dict:
    """One of the names that the game knows."""
    if variant and variant not in names:
        raise ValueError(f"a scenario is one of {', '.join(names)}")
    return {keyword: names[variant]} if variant else {}


def by_kitchen(variant: str) -> dict:
    from jaxmarl.environments.overcooked import overcooked_layouts

    return by_name(overcooked_layouts, "layout", variant)


def by_kitchen_v2(variant: str) -> dict:
    from jaxmarl.environments.overcooked_v2.layouts import overcooked_v2_layouts

    return by_name(overcooked_v2_layouts, "layout", variant)


def by_map(variant: str) -> dict:
    from jaxmarl.environments.smax.smax_env import MAP_NAME_TO_SCENARIO

    return by_name(MAP_NAME_TO_SCENARIO, "scenario", variant)


GAMES = {  # the cooperative ones: what adapts them, and what a scenario is
    "MPE_simple_v3": (Mpe, by_nothing),
    "MPE_simple_spread_v3": (Mpe, by_nothing),
    "MPE_simple_reference_v3": (Mpe, by_nothing),
    "MPE_simple_speaker_listener_v4": (Mpe, by_nothing),
    "MPE_simple_facmac_v1": (Mpe, by_nothing),
    "MPE_simple_facmac_3a_v1": (Mpe, by_nothing),
    "MPE_simple_facmac_6a_v1": (Mpe, by_nothing),
    "MPE_simple_facmac_9a_v1": (Mpe, by_nothing),
    "switch_riddle": (SwitchRiddle, functools.partial(by_number, 99)),
    "HeuristicEnemySMAX": (Smax, by_map),
    "hanabi": (JaxMarl, functools.partial(by_number, 5)),
    "overcooked": (Overcooked, by_kitchen),
    "overcooked_v2": (JaxMarl, by_kitchen_v2),
    "jaxnav": (JaxNav, functools.partial(by_number, 40)),  # many more find no place to start
}
BRAX = ("ant_4x2", "halfcheetah_6x1", "hopper_3x1", "humanoid_9|8", "walker2d_2x3")
GAMES |= dict.fromkeys(BRAX, (JaxMarl, by_nothing))
OWN_REWARDS = ("MPE_simple_spread_v3", "MPE_simple_reference_v3")  # half of them, by `local_ratio`
ENEMIES = "is not cooperative: some agents win what others lose"
SELFISH = "is not cooperative: each agent is paid for itself, also at the cost of others"
REFUSED = {
    "MPE_simple_tag_v3": ENEMIES,
    "MPE_simple_world_comm_v3": ENEMIES,
    "MPE_simple_crypto_v3": ENEMIES,
    "MPE_simple_push_v3": ENEMIES,
    "MPE_simple_adversary_v3": ENEMIES,
    "SMAX": f"{ENEMIES}; --env-id SMAX is the game against the heuristic enemy",
    "LearnedPolicyEnemySMAX": "needs a trained policy for the enemy",
    "storm": SELFISH,
    "storm_2p": SELFISH,
    "storm_np": SELFISH,
    "coin_game": SELFISH,
}


def make_jaxmarl(env_id: str, scenario: str) -> Environment:
    """A cooperative game of JaxMARL, jaxmarl:NAME, with its own defaults. `GAMES` has what a
    scenario is; -shaped after it adds the hints that the game gives to the reward, -own trains each
    agent on its own reward.

    Raises:
        TaskError: on a game or a scenario that cannot be had, with the reason.
    """
    name = env_id.removeprefix("jaxmarl:")
    alone = scenario in ("own", "shaped", "shaped-own")  # without the - before it
    variant, shaped, own = re.fullmatch("(.*?)(-shaped)?(-own)?", "-" * alone + scenario).groups()
    own, shaped = bool(own), bool(shaped)
    try:
        jaxmarl = import_jaxmarl()
        if name in REFUSED:
            raise ValueError(REFUSED[name])
        if name not in jaxmarl.registered_envs:
            raise ValueError(f"unknown, try one of {', '.join(GAMES)}")
        if name in OWN_REWARDS and not own:
            raise ValueError("pays its agents differently, --scenario=-own trains each on its own")
        adapter, options_of = GAMES.get(name, (JaxMarl, by_nothing))
        if shaped and not name.startswith("overcooked"):
            raise ValueError("gives no hints that -shaped could add to its reward")
        options = options_of(variant)
        if name == "jaxnav":
            options["rew_lambda"] = 0.5 if own else 0.0  # how much of a reward is an agent's own
        if name in BRAX:
            options["auto_reset"] = False
        game = jaxmarl.make(name, **options)
        team = getattr(game, "adversaries", ())  # of facmac, whose prey moves by itself
        env = adapter(game, team, own, shaped)
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        flags = f"--env-id {env_id}" + f" --scenario {scenario}" * bool(scenario)
        reason = str(error).partition("\n")[0]
        raise TaskError(f"{flags}: {reason}") from error
    return env


# -------------------- Jumanji's games for several agents ------------------------------------------
class View(Wrapper):
    """A game of Jumanji whose observation is of all agents together, with a view for each agent.
    Subclasses say what each sees, `view`."""

    def reset(self, key: jax.Array) -> tuple[Any, TimeStep]:
        """Starts an episode."""
        state, timestep = self._env.reset(key)
        return state, self.adapt(timestep)

    def step(self, state: Any, action: jax.Array) -> tuple[Any, TimeStep]:
        """action: (N,) int32 or (N, A) float32."""
        state, timestep = self._env.step(state, action)
        return state, self.adapt(timestep)

    def adapt(self, timestep: TimeStep) -> TimeStep:
        """The timestep with `VectorObservation`."""
        observation = timestep.observation
        if hasattr(observation, "action_mask"):
            mask = observation.action_mask
        else:
            mask = jnp.ones(self.action_spec.shape, bool)  # continuous
        observation = VectorObservation(self.view(observation), mask)
        return timestep.replace(observation=observation)

    @functools.cached_property
    def observation_spec(self) -> specs.Spec:
        """Spec of `VectorObservation`."""
        return vector_spec(self)


class CleanerView(View):
    """Each agent sees which tiles are dirty, which are walls, where it and all others are, and how
    much of the time has passed, because the game terminates when it is up."""

    def view(self, observation: Any) -> jax.Array:
        """(N, 2 G + 3 + 2 N) float32, of G tiles; places as shares of the board."""
        grid, places = observation.grid, observation.agents_locations
        time = observation.step_count / self._env.time_limit
        board = flat(grid == 0, grid == 2, time)  # jumanji.environments.routing.cleaner.constants
        places = places / jnp.array(grid.shape)
        return jax.vmap(lambda place: flat(board, place, places))(places)


class SearchAndRescueView(View):
    """Each agent sees the distances along its rays, how many targets are left, and how much of the
    time has passed, because the game terminates when it is up."""

    def view(self, observation: Any) -> jax.Array:
        """(N, C R + 2) float32, of C kinds of things on R rays."""
        shared = observation.targets_remaining, observation.step / self._env.time_limit
        return jax.vmap(lambda rays: flat(rays, *shared))(observation.searcher_views)


class MultiCvrpView(View):
    """Each vehicle sees all customers, itself, and all vehicles."""

    def view(self, observation: Any) -> jax.Array:
        """(N, 7 K + 4 + 4 N) float32, of K nodes, the depot first; capacities as shares of a full
        one, times of the last window's end, places of the map."""
        env, vehicles = self._env, observation.vehicles
        demands = observation.nodes.demands / env._max_capacity
        windows, coeffs = observation.windows, observation.coeffs
        times = windows.start / env._max_end_window, windows.end / env._max_end_window
        places = observation.nodes.coordinates / env._map_max
        nodes = flat(places, demands, *times, coeffs.early, coeffs.late)
        columns = vehicles.coordinates / env._map_max, vehicles.local_times / env._max_end_window
        columns = jnp.column_stack([*columns, vehicles.capacities / env._max_capacity])
        return jax.vmap(lambda own: flat(nodes, own, columns))(columns)

    @functools.cached_property
    def action_spec(self) -> specs.MultiDiscreteArray:
        """Spec of the action: (N,) int32, the next node."""
        num_vehicles, num_nodes = self._env._num_vehicles, self._env._num_customers + 1
        return specs.MultiDiscreteArray(jnp.full(num_vehicles, num_nodes, jnp.int32))


VIEWS = {
    "Cleaner-v0": CleanerView,
    "SearchAndRescue-v0": SearchAndRescueView,
    "MultiCVRP-v0": MultiCvrpView,
}
