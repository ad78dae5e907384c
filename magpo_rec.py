"""MAGPO, recurrent: Multi-Agent Guided Policy Optimization (arXiv 2507.18059, ICLR 2026) in one file.

    python magpo_rec.py --env-id RobotWarehouse-v0 --delta 1.5
    python magpo_rec.py --env-id CoordSum-v0 --scenario 3x10=10 --learning-rate 1e-3 --delta 1.1 --learner-rl-coef 4

A centralized autoregressive guider mu(a|s) = prod_j mu(a_j | o, a_1..a_{j-1}) explores and is improved by PPO; a
decentralized learner pi(a|s) = prod_j pi(a_j | o_j) follows it and is what gets deployed. An iteration has four steps:

    1. collect   a rollout with the guider                                       `collect`
    2. improve   the guider by PPO, its ratio clipped twice                      `double_clip`, `guider_loss`
    3. follow    the learner minimises KL(mu || pi) + lambda * its own PPO term  `learner_loss`
    4. backtrack the guider returns to the learner where it strayed from it      `kl_mask`, `backtrack_loss`

Steps 2 to 4 are one gradient step on each minibatch (`minibatch_loss`, `train_iteration`). How is the guider brought
back to the learner? No parameter is ever copied. Within a factor delta of the learner the guider is free; the double
clip stops the gradient that would push it out, and where it is outside already, a KL term pulls it back in.

Shapes: T steps of a rollout, B environments per device, M samples of a minibatch, N agents, A actions, O observation
features, E embedding, H heads, D devices.
"""
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import re
import sys
import time
from typing import Any, Callable, Literal, NamedTuple, Optional, Tuple

import distrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax.linen.initializers import normal, orthogonal
from tqdm import tqdm


# -------------------- Flags -------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Args:  # tyro shows the comment behind a flag as its help; [in brackets]: the official code's name
    # The run
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # name of the experiment, part of the run's folder name
    seed: int = 1  # seed of parameters, environments, actions and minibatches
    run_dir: str = "runs"  # folder in which the run's own folder is made
    num_devices: int = 0  # devices to train on; 0: every GPU or TPU there is, or one CPU device
    dry_run: bool = False  # check all flags, print what would run, and stop before anything is compiled
    track: bool = False  # log to Weights & Biases as well (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "magpo"  # Weights & Biases project
    wandb_entity: Optional[str] = None  # Weights & Biases team; None: your own account

    # The environment
    env_id: str = "CoordSum-v0"  # CoordSum-v0, Connector-v3 or a Jumanji environment with agents_view and action_mask
    scenario: str = ""  # the task's name in the papers, e.g. tiny-2ag, con-5x5x3a, 3x10-30; "": the id's own defaults
    num_envs: int = 64  # environments stepped in parallel, over all devices

    # Budget and evaluation
    total_timesteps: int = 20_000_000  # environment steps of the run, over all environments; whole iterations are run
    num_evals: int = 20  # evaluations after the one at step 0, evenly spaced, at most one an iteration [num_evaluation]
    eval_episodes: int = 32  # episodes per evaluation of each, learner and guider, over all devices [num_eval_episodes]
    eval_greedy: bool = False  # evaluate with the most likely actions in place of sampled ones [evaluation_greedy]

    # The algorithm
    delta: float = 1.5  # > 1: mu may take an action this much more or less likely than pi; inf: no tether [clip_gpo]
    learner_rl_coef: float = 1.0  # lambda: weight of the learner's own PPO term beside its imitation [alpha]
    learning_rate: float = 2.5e-4  # Adam's learning rate, of guider and learner [actor_lr]
    anneal_lr: bool = False  # let the learning rate fall linearly to 0 over the run [decay_learning_rates]
    num_steps: int = 128  # T: steps of one rollout in each environment [rollout_length]
    num_minibatches: int = 2  # minibatches per epoch
    update_epochs: int = 4  # passes over each rollout [ppo_epochs]
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    norm_adv: bool = True  # normalise advantages per minibatch
    clip_coef: float = 0.2  # epsilon: PPO's clip of the probability ratio [clip_eps]
    clip_vloss: bool = True  # clip the value loss by epsilon, too
    ent_coef: float = 0.01  # weight of the guider's entropy bonus; the learner has none
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of a gradient, separately for guider and learner

    # The networks
    guider: Literal["sable", "mat"] = "sable"  # the guider's mixing: retention over time (sable), attention (mat)
    embed_dim: int = 64  # E: width of the guider [n_embd]
    num_heads: int = 1  # H: heads of the guider [n_head]
    num_blocks: int = 1  # blocks of the guider's encoder, and of its decoder [n_block]
    decay_scaling_factor: float = 0.8  # times the decay per step of sable's memory; 0: it remembers nothing
    chunk_steps: int = 0  # C: steps that sable compares pair by pair in training, for speed alone; 0: some 32 tokens
    learner_hidden_dim: int = 128  # width of the learner's three hidden layers, the middle one a GRU


def check_args(args: Args) -> None:
    """Raises ValueError, with the flag, its value and what is allowed, on flags that cannot work together."""
    positive = "num_envs total_timesteps num_evals eval_episodes num_steps num_minibatches update_epochs embed_dim " \
        "num_heads num_blocks learner_hidden_dim learning_rate max_grad_norm clip_coef"
    rules = [(name, lambda x: 0 < x < math.inf, "must be above 0, and finite") for name in positive.split()]
    rules += [(name, lambda x: 0 <= x < math.inf, "must be finite and not negative")
              for name in ("learner_rl_coef", "ent_coef", "vf_coef", "num_devices", "chunk_steps")]
    rules += [("seed", lambda x: 0 <= x < 2**32, "must be in [0, 2**32)")]
    rules += [(name, lambda x: 0 <= x <= 1, "must be in [0, 1]")
              for name in ("gamma", "gae_lambda", "decay_scaling_factor")]
    rules += [("delta", lambda x: x > 1, "must be above 1 (1.1 is a short tether, 4 a long one, inf is none)")]
    rules += [("embed_dim", lambda x: x % args.num_heads == 0, f"must be divisible by --num-heads {args.num_heads}")]
    rules += [("chunk_steps", lambda x: x == 0 or args.num_steps % x == 0, f"must divide --num-steps {args.num_steps}")]
    steps = args.num_envs * args.num_steps
    rules += [("total_timesteps", lambda x: x >= steps, f"leaves no update: --num-envs * --num-steps is {steps}")]
    for name, allowed, text in rules:
        if not allowed(getattr(args, name)):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: {text}")


def choose_devices(args: Args) -> list:
    """Returns the devices to train on; raises ValueError if there are too few or the work cannot be shared out."""
    if args.num_devices == 0:
        args.num_devices = 1 if jax.default_backend() == "cpu" else jax.local_device_count()
    if args.num_devices > jax.local_device_count():
        raise ValueError(f"--num-devices {args.num_devices}: there are only {jax.local_device_count()}")
    for name in ("num_envs", "eval_episodes"):
        if getattr(args, name) % args.num_devices:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be divisible by --num-devices "
                             f"{args.num_devices}")
    batch_size = args.num_envs // args.num_devices
    if batch_size % args.num_minibatches:
        raise ValueError(f"--num-minibatches {args.num_minibatches}: must divide the {batch_size} environments on each "
                         f"device (--num-envs / --num-devices), for sequences stay whole")
    return jax.local_devices()[: args.num_devices]


# -------------------- Environment -------------------------------------------------------------------------------------
class Observation(NamedTuple):
    agents_view: jax.Array  # (N, O) float32, the one-hot agent id first
    action_mask: jax.Array  # (N, A) bool, True where legal


class Outcome(NamedTuple):
    """What a step brings; obs is what followed the action, also at the end of an episode."""

    obs: Observation
    reward: jax.Array  # (N,) float32
    discount: jax.Array  # () float32, 0 where the episode terminated
    last: jax.Array  # () bool, the episode ended: terminated or truncated
    won: jax.Array  # () bool


class TeamEnv:
    """A cooperative Jumanji environment as the algorithm sees it: `reset` and `step`, unbatched, without auto-reset.

    D1: the agent's one-hot id comes first in its view, all else is passed on as it is, unnormalised.
    D2: all agents get the team's reward: a scalar is repeated, a vector is summed first (LBF, Connector).
    """

    def __init__(self, env: Any, view: Callable[[Any], jax.Array]):
        """view: maps the environment's observation to (N, ...) features of each agent."""
        self.env, self.view = env, view
        _, timestep = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
        self.num_agents, self.num_actions = timestep.observation.action_mask.shape
        self.has_win_rate = "ratio_connections" in (timestep.extras or {})

    def observe(self, observation: Any) -> Observation:
        view = self.view(observation).reshape(self.num_agents, -1).astype(jnp.float32)
        agents_view = jnp.concatenate([jnp.eye(self.num_agents), view], axis=-1)  # (N, O)
        return Observation(agents_view, observation.action_mask)

    def reset(self, key: jax.Array) -> Tuple[Any, Observation]:
        state, timestep = self.env.reset(key)
        return state, self.observe(timestep.observation)

    def step(self, state: Any, action: jax.Array) -> Tuple[Any, Outcome]:
        """action: (N,) int32."""
        state, timestep = self.env.step(state, action)
        last = timestep.last()
        reward = jnp.full((self.num_agents,), jnp.sum(timestep.reward), jnp.float32)
        # D3: only the environment's own word ends the returns. Connector reports 0 for each agent that is connected or
        # stuck, long before the team's episode is over, so the team's discount is 0 only once all of them are 0.
        discount = jnp.where(last, jnp.max(timestep.discount), 1.0)
        won = last & (timestep.extras["ratio_connections"] == 1.0) if self.has_win_rate else jnp.zeros((), bool)
        return state, Outcome(self.observe(timestep.observation), reward, discount, last, won)


def connector_view(observation: Any) -> jax.Array:
    """Connector's shared (G, G) grid -> each agent's (N, 54) vector view.

    D4: the papers' vector view with its quirks: coordinates divided by G * G, (0, 0) for the target of a connected
    agent, and a board edge that reads 1 in both windows. The grid holds 3j + 1, 3j + 2, 3j + 3 for agent j's path,
    head and target.
    """
    grid, num_agents = observation.grid, observation.action_mask.shape[0]
    size = grid.shape[0]
    part = jnp.where(grid > 0, (grid - 1) % 3, -1)  # 0: path, 1: head, 2: target, -1: empty

    def view(agent):
        head_row, head_col = jnp.unravel_index(jnp.argmax(grid == 3 * agent + 2), grid.shape)
        target_row, target_col = jnp.unravel_index(jnp.argmax(grid == 3 * agent + 3), grid.shape)
        blockers = jnp.where(part == 1, 1.0, jnp.where(part == 0, -1.0, 0.0))
        targets = jnp.where(grid == 3 * agent + 3, 1.0, jnp.where(part == 2, -1.0, 0.0))
        maps = jnp.pad(jnp.stack([blockers, targets]), ((0, 0), (2, 2), (2, 2)), constant_values=1.0)
        windows = jax.lax.dynamic_slice(maps, (0, head_row, head_col), (2, 5, 5))
        coordinates = jnp.stack([head_row, head_col, target_row, target_col]) / (size * size)
        return jnp.concatenate([coordinates, windows.reshape(-1)])

    return jax.vmap(view)(jnp.arange(num_agents))


def scenario_kwargs(env_id: str, scenario: str) -> dict:
    """Parses a scenario by the rule of its environment -> arguments of the environment; ValueError if not."""
    from jumanji.environments.routing.connector.generator import LegacyRandomWalkGenerator
    from jumanji.environments.routing.lbf.generator import RandomGenerator as LbfGenerator
    from jumanji.environments.routing.robot_warehouse.generator import RandomGenerator as RwareGenerator

    def parse(rule, example):
        match = re.fullmatch(rule, scenario)
        if match is None:
            raise ValueError(f"does not follow the rule {rule}, for example {example}")
        return [int(group) if (group or "").isdigit() else group for group in match.groups()]

    if env_id == "CoordSum-v0":
        import coordsum

        return coordsum.parse_scenario(scenario)
    if not scenario:
        return {}
    if env_id == "RobotWarehouse-v0":
        size, agents, level = parse(r"(tiny|small|medium|large|xlarge)-(\d+)ag(-easy|-hard)?", "small-4ag-hard")
        rows, columns = {"tiny": (1, 3), "small": (2, 3), "medium": (2, 5), "large": (3, 5), "xlarge": (4, 5)}[size]
        requests = {"-easy": 2 * agents, None: agents, "-hard": agents // 2}[level]
        if requests == 0:
            raise ValueError("leaves no shelf to request")
        return {"generator": RwareGenerator(rows, columns, 8, agents, sensor_range=1, request_queue_size=requests)}
    if env_id == "LevelBasedForaging-v0":
        sight, size, agents, food, coop = parse(r"(?:(\d+)s-)?(\d+)x\2-(\d+)p-(\d+)f(-coop)?", "2s-10x10-3p-3f")
        sight = size if sight is None else sight
        return {"generator": LbfGenerator(size, agents, food, sight, max_agent_level=2, force_coop=coop is not None)}
    if env_id == "Connector-v3":
        size, agents = parse(r"con-(\d+)x\1x(\d+)a", "con-5x5x3a")
        if 2 * agents > size**2:
            raise ValueError("leaves no room for every agent's head and target")
        # D5: the papers' boards; the environment's own default generator draws other ones.
        return {"generator": LegacyRandomWalkGenerator(size, agents), "time_limit": size**2}
    raise ValueError(f"{env_id} takes none")


def make_env(env_id: str, scenario: str) -> TeamEnv:
    """Makes the environment; scenario "" stands for its own defaults.

    Raises ValueError, in one line, on an unknown id or scenario or an environment that lacks what is needed.
    """
    import jumanji  # here, because it starts JAX's backend, and --num-devices has to be set before that

    if env_id == "CoordSum-v0":
        try:
            import coordsum  # registers it
        except ModuleNotFoundError:
            raise ValueError("--env-id CoordSum-v0: needs coordsum.py beside this file") from None
    known = "CoordSum-v0, RobotWarehouse-v0, LevelBasedForaging-v0, Connector-v3"
    if env_id not in jumanji.registered_environments():
        raise ValueError(f"--env-id {env_id}: unknown, try {known} or the id of another Jumanji environment")
    try:
        env = jumanji.make(env_id, **scenario_kwargs(env_id, scenario))
        jax.eval_shape(env.reset, jax.random.PRNGKey(0))  # some sizes fail only here
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"--scenario {scenario}: {str(error).splitlines()[0]}") from error
    needed = {"action_mask", "grid" if env_id == "Connector-v3" else "agents_view"}
    missing = needed - set(getattr(env.observation_spec, "_specs", {}))
    if missing:
        raise ValueError(f"--env-id {env_id}: its observation has no {' and no '.join(sorted(missing))}, try {known}")
    if not isinstance(env.action_spec, jumanji.specs.MultiDiscreteArray):
        raise ValueError(f"--env-id {env_id}: needs one discrete action per agent, it has {env.action_spec}")
    return TeamEnv(env, connector_view if env_id == "Connector-v3" else lambda observation: observation.agents_view)


# -------------------- Networks ----------------------------------------------------------------------------------------
# Tokens, one per sequence, step and agent, stay flattened to (M * T * N, E): two dense layers and a GELU on them take
# 13 ms forward and backward on two CPU cores, on (M, N, E) 20 ms (M = 4096, N = 3, E = 64).
class Past(NamedTuple):
    """How retention sees time, in K chunks of C steps."""

    position: jax.Array  # (M * T * N, E) timestep encoding of the tokens
    weights: jax.Array  # (M, K, H, C, 1 + C) of what earlier chunks left, and of each step of the chunk


def timestep_encoding(timestep: jax.Array, embed_dim: int) -> jax.Array:
    """Sines and cosines of the steps since the episode began (arXiv 1706.03762): (...,) -> (..., E)."""
    feature = jnp.arange(embed_dim)
    frequency = 10_000.0 ** -(2 * (feature // 2) / embed_dim)
    return jnp.sin(timestep[..., None] * frequency + jnp.pi / 2 * (feature % 2))


def head_decay(num_heads: int, scaling_factor: float) -> jax.Array:
    """Each head's decay per step, (H,): 31 / 32 to 511 / 512, as in arXiv 2307.08621, times the scaling factor."""
    return scaling_factor * (1 - jnp.exp2(jnp.linspace(-5, -9, num_heads)))


def retention_weights(timestep: jax.Array, decay: jax.Array, chunk_steps: int) -> jax.Array:
    """How much of the past each step of a chunk still sees: timestep (M, T), decay (H,) -> (M, K, H, C, 1 + C).

    Column 0 is for what the chunks before left, column 1 + s for step s of the chunk itself: decay ** lag, and 0 ahead.
    D14: step n of an episode sees n steps back, and so nothing of the episode before.
    """
    step = jnp.arange(chunk_steps)
    lag = step[:, None] - jnp.arange(-1, chunk_steps)  # (C, 1 + C)
    seen = (lag >= 0) & (lag <= timestep.reshape(timestep.shape[0], -1, 1, chunk_steps, 1))
    return jnp.where(seen, decay[:, None, None] ** jnp.maximum(lag, 0), 0.0)


class Attention(nn.Module):
    """Multi-head attention over the agents of one step (Multi-Agent Transformer, arXiv 2205.14953), without biases.

    It remembers nothing: of its hidden state, keys and values, it only sees those of the same step.
    """

    num_agents: int
    num_heads: int
    embed_dim: int

    def setup(self):
        dense = functools.partial(nn.Dense, self.embed_dim, use_bias=False, kernel_init=orthogonal(0.01))
        self.query, self.key, self.value, self.out = dense(), dense(), dense(), dense()

    def heads(self, x, source, num_tokens):
        """Tokens (M * L, E) -> scaled queries from x, keys and values from source, each (M, H, L, E / H)."""
        shape = (-1, num_tokens, self.num_heads, self.embed_dim // self.num_heads)
        tokens = (self.query(x) / math.sqrt(shape[-1]), self.key(source), self.value(source))
        return (y.reshape(shape).swapaxes(1, 2) for y in tokens)

    def __call__(self, x, source, causal, past, hidden):
        """All steps and agents at once, each agent seeing itself and, if causal, only the earlier ones of its step.

        (M * T * N, E) -> (M * T * N, E), hidden after the last step.
        """
        query, key, value = self.heads(x, source, self.num_agents)
        seen = jnp.tril(jnp.ones((self.num_agents, self.num_agents), bool)) | (not causal)
        weights = jax.nn.softmax(jnp.where(seen, query @ key.swapaxes(-1, -2), -1e9))  # (M * T, H, N, N)
        return self.project(weights @ value, source), hidden

    def project(self, mixed, source):
        """Mixes the heads: (M, H, L, E / H) -> tokens (M * L, E)."""
        return self.out(mixed.swapaxes(1, 2).reshape(-1, self.embed_dim))

    def init_hidden(self, batch_size):
        """Keys and values of the agents that have acted, each (M, H, N, E / H)."""
        zeros = jnp.zeros((batch_size, self.num_heads, self.num_agents, self.embed_dim // self.num_heads))
        return zeros, zeros

    def decode(self, x, source, hidden, agent, position):
        """The same for the tokens (M, E) of one agent, the earlier ones being in the hidden state -> (M, E), hidden."""
        query, *new = self.heads(x, source, 1)
        keys, values = (jax.lax.dynamic_update_slice_in_dim(old, y, agent, axis=2) for old, y in zip(hidden, new))
        seen = jnp.arange(self.num_agents) <= agent
        weights = jax.nn.softmax(jnp.where(seen, query @ keys.swapaxes(-1, -2), -1e9))
        return self.project(weights @ values, source), (keys, values)


class Retention(Attention):
    """Retention over agents and time (Sable, arXiv 2410.01706).

    It is attention with a decay per step in place of the softmax, so that a sum of key (outer product) value, its
    hidden state, stands for all that came before: S_t = decay * S_{t-1} + sum_j k_j v_j^T, and agent j reads q_j S.
    D6: Sable's particulars: all matrices start as normal(1 / E), a group norm inside each head, and an output gate that
    reads what the keys read; queries, keys, values and gate see the timestep encoding, too.
    """

    def setup(self):
        dense = functools.partial(nn.Dense, self.embed_dim, use_bias=False, kernel_init=normal(1 / self.embed_dim))
        self.query, self.key, self.value, self.out, self.gate = dense(), dense(), dense(), dense(), dense()
        self.head_norm = nn.GroupNorm(num_groups=self.num_heads)

    def __call__(self, x, source, causal, past, hidden):
        """All pairs of tokens within a chunk, the hidden state between chunks: for a fixed C linear in T."""
        num_samples, num_chunks, _, chunk_steps, _ = past.weights.shape
        source = source + past.position
        query, key, value = self.heads(x + past.position, source, chunk_steps * self.num_agents)  # (M * K, H, C * N, .)
        weights = jnp.repeat(past.weights.reshape(-1, *past.weights.shape[2:]), self.num_agents, axis=2)
        from_hidden, within = weights[..., :1], jnp.repeat(weights[..., 1:], self.num_agents, axis=3)
        within = jnp.tril(within) if causal else within  # (M * K, H, C * N, C * N)

        # What a chunk adds to the hidden state, and what is left of it then, both as its last token sees them.
        added = (key * within[..., -1, :, None]).swapaxes(-1, -2) @ value  # (M * K, H, E / H, E / H)
        kept = from_hidden[..., -1:, :]
        by_chunk = [y.reshape(num_samples, num_chunks, *y.shape[1:]).swapaxes(0, 1) for y in (kept, added)]
        hidden, before = jax.lax.scan(lambda h, chunk: (h * chunk[0] + chunk[1], h), hidden, by_chunk)
        before = before.swapaxes(0, 1).reshape(added.shape)
        mixed = (query @ key.swapaxes(-1, -2) * within) @ value + (query @ before) * from_hidden
        return self.project(mixed, source), hidden

    def project(self, mixed, source):
        mixed = self.head_norm(mixed.swapaxes(1, 2).reshape(-1, self.embed_dim))
        return self.out(nn.swish(self.gate(source)) * mixed)

    def init_hidden(self, batch_size):
        """The decayed sum over all that came before, (M, H, E / H, E / H)."""
        return jnp.zeros((batch_size, self.num_heads) + 2 * (self.embed_dim // self.num_heads,))

    def decode(self, x, source, hidden, agent, position):
        query, key, value = self.heads(x + position, source + position, 1)
        hidden = hidden + key.swapaxes(-1, -2) @ value
        return self.project(query @ hidden, source + position), hidden


class Block(nn.Module):
    """Mixes tokens over agents and time, in the decoder also observations with actions, then an MLP; norms after sums.

    `mat` is attention, layer norm and a GELU MLP; `sable` is retention, RMS norm and SwiGLU.
    """

    guider: str
    num_agents: int
    num_heads: int
    embed_dim: int

    def setup(self):
        mix, norm = {"mat": (Attention, nn.LayerNorm), "sable": (Retention, nn.RMSNorm)}[self.guider]
        self.self_mix, self.cross_mix = (mix(self.num_agents, self.num_heads, self.embed_dim) for _ in range(2))
        self.norms = [norm() for _ in range(3)]
        dense = functools.partial(nn.Dense, self.embed_dim, kernel_init=orthogonal(math.sqrt(2)))
        self.mlp = [dense() for _ in range(2 if self.guider == "mat" else 3)]

    def feed_forward(self, x):
        hidden = nn.gelu(self.mlp[1](x)) if self.guider == "mat" else nn.swish(self.mlp[1](x)) * self.mlp[2](x)
        return self.norms[2](x + self.mlp[0](hidden))

    def encode(self, x, past, hidden):
        """Observation tokens (M * T * N, E) -> (M * T * N, E), hidden; every agent sees all of its step."""
        mixed, hidden = self.self_mix(x, x, False, past, hidden)
        return self.feed_forward(self.norms[0](x + mixed)), hidden

    def decode_all(self, x, obs_tokens, past, hidden):
        """Action and observation tokens (M * T * N, E) -> (M * T * N, E); agent j sees the actions of agents < j."""
        x = self.norms[0](x + self.self_mix(x, x, True, past, hidden[0])[0])
        mixed, _ = self.cross_mix(obs_tokens, x, True, past, hidden[1])
        return self.feed_forward(self.norms[1](obs_tokens + mixed))

    def init_hidden(self, batch_size):
        return self.self_mix.init_hidden(batch_size), self.cross_mix.init_hidden(batch_size)

    def decode_one(self, x, obs_tokens, hidden, agent, position):
        """The same for the tokens (M, E) of one agent, with what the earlier ones left in the hidden state."""
        mixed, self_hidden = self.self_mix.decode(x, x, hidden[0], agent, position)
        x = self.norms[0](x + mixed)
        mixed, cross_hidden = self.cross_mix.decode(obs_tokens, x, hidden[1], agent, position)
        return self.feed_forward(self.norms[1](obs_tokens + mixed)), (self_hidden, cross_hidden)


class Guider(nn.Module):
    """mu: an encoder of all agents' observations with a value head, and a decoder that takes agent after agent.

    Its hidden state, {"encoder": [...], "decoder": [...]}, lists those of the blocks.
    """

    guider: str
    num_agents: int
    num_actions: int
    num_heads: int
    num_blocks: int
    embed_dim: int
    decay_scaling_factor: float
    chunk_steps: int

    def setup(self):
        norm = {"mat": nn.LayerNorm, "sable": nn.RMSNorm}[self.guider]
        embed = functools.partial(nn.Dense, self.embed_dim, kernel_init=orthogonal(math.sqrt(2)))
        block = functools.partial(Block, self.guider, self.num_agents, self.num_heads, self.embed_dim)

        def head(width):
            return nn.Sequential([embed(), nn.gelu, norm(), nn.Dense(width, kernel_init=orthogonal(0.01))])

        self.obs_embed = nn.Sequential([norm(), embed(), nn.gelu, norm()])
        self.encoder, self.value_head = [block() for _ in range(self.num_blocks)], head(1)
        self.action_embed = nn.Sequential([embed(use_bias=False), nn.gelu, norm()])
        self.decoder, self.policy_head = [block() for _ in range(self.num_blocks)], head(self.num_actions)

    def past(self, timestep: jax.Array) -> Past:
        """timestep (M, T) -> what retention needs to know of time."""
        position = timestep_encoding(timestep, self.embed_dim)[:, :, None]  # (M, T, 1, E)
        position = jnp.repeat(position, self.num_agents, axis=2).reshape(-1, self.embed_dim)
        decay = head_decay(self.num_heads, self.decay_scaling_factor)
        return Past(position, retention_weights(timestep, decay, min(self.chunk_steps, timestep.shape[1])))

    def encode(self, agents_view: jax.Array, timestep: jax.Array, hidden: list) -> Tuple[jax.Array, jax.Array, list]:
        """agents_view (M, T, N, O), timestep (M, T) -> observation tokens (M * T * N, E), value (M, T, N), hidden.

        hidden: of the encoder, before the first step; returned: after the last one. timestep: steps since the episode
        began, 0 at its first observation.
        """
        obs_tokens = self.obs_embed(agents_view.reshape(-1, agents_view.shape[-1]))
        past, new_hidden = self.past(timestep), []
        for block, block_hidden in zip(self.encoder, hidden):
            obs_tokens, block_hidden = block.encode(obs_tokens, past, block_hidden)
            new_hidden.append(block_hidden)
        return obs_tokens, self.value_head(obs_tokens).reshape(agents_view.shape[:-1]), new_hidden

    def __call__(
        self, agents_view: jax.Array, action: jax.Array, timestep: jax.Array, hidden: dict
    ) -> Tuple[jax.Array, jax.Array]:
        """Training, all steps and agents at once: agents_view (M, T, N, O), action (M, T, N), timestep (M, T).

        Returns logits (M, T, N, A), value (M, T, N). Agent j's logits depend on all earlier steps of its episode and,
        of its own step, on all observations and the actions of agents < j. D7: the agents keep the order in which they
        acted.
        """
        obs_tokens, value, _ = self.encode(agents_view, timestep, hidden["encoder"])
        # Actions shifted by one agent; class 0 stands for "nobody before me". One-hot and not a table, whose gradient
        # would be a scatter.
        previous = jnp.pad(action[..., :-1] + 1, ((0, 0), (0, 0), (1, 0)))
        x = self.action_embed(jax.nn.one_hot(previous.reshape(-1), self.num_actions + 1))
        past = self.past(timestep)
        for block, block_hidden in zip(self.decoder, hidden["decoder"]):
            x = block.decode_all(x, obs_tokens, past, block_hidden)
        return self.policy_head(x).reshape(*action.shape, self.num_actions), value

    def init_hidden(self, batch_size: int) -> dict:
        """The hidden state before an episode; any other is as good, for timestep 0 forgets it."""
        return {
            "encoder": [block.self_mix.init_hidden(batch_size) for block in self.encoder],
            "decoder": [block.init_hidden(batch_size) for block in self.decoder]}

    def begin_step(self, hidden: list, timestep: jax.Array) -> list:
        """The decoder's hidden state, before the first agent of a step decodes, timestep (M,)."""
        if self.guider == "mat":
            return hidden  # every key and value is replaced before it is seen
        kept = (timestep > 0)[:, None] * head_decay(self.num_heads, self.decay_scaling_factor)  # (M, H)
        return jax.tree.map(lambda x: x * kept[..., None, None], hidden)

    def decode_one(
        self, obs_tokens: jax.Array, previous: jax.Array, hidden: list, agent: jax.Array, position: jax.Array):
        """Acting, one agent: obs_tokens (M, E) of that agent, previous (M,) action + 1 of the one before (0: nobody).

        Returns logits (M, A) and the decoder's hidden state; the cost of an agent grows linearly in N for mat, not at
        all for sable.
        """
        x = self.action_embed(jax.nn.one_hot(previous, self.num_actions + 1))
        new_hidden = []
        for block, block_hidden in zip(self.decoder, hidden):
            x, block_hidden = block.decode_one(x, obs_tokens, block_hidden, agent, position)
            new_hidden.append(block_hidden)
        return self.policy_head(x), new_hidden


class Learner(nn.Module):
    """pi: one MLP-GRU-MLP for all agents, each of which sees its own observations alone; its id is part of them."""

    num_actions: int
    hidden_dim: int

    @nn.compact
    def __call__(self, agents_view: jax.Array, timestep: jax.Array, hidden: jax.Array) -> Tuple[jax.Array, jax.Array]:
        """agents_view (M, T, N, O), timestep (M, T), hidden (M, N, F) -> logits (M, T, N, A), hidden.

        hidden: before the first step; returned: after the last one. It is 0 wherever an episode begins, at timestep 0.
        """
        num_samples, num_steps, num_agents, _ = agents_view.shape
        by_step = agents_view.swapaxes(0, 1)  # (T, M, N, O)
        dense = functools.partial(nn.Dense, kernel_init=orthogonal(math.sqrt(2)))
        x = nn.relu(dense(self.hidden_dim)(by_step.reshape(-1, by_step.shape[-1])))
        x = x.reshape(num_steps, num_samples * num_agents, self.hidden_dim)
        running = jnp.repeat(timestep.T > 0, num_agents, axis=1)[..., None]  # (T, M * N, 1)

        def step(cell, hidden, inputs):
            x, running = inputs
            hidden, _ = cell(hidden * running, x)
            return hidden, hidden

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        hidden, x = scan(nn.GRUCell(self.hidden_dim), hidden.reshape(-1, self.hidden_dim), (x, running))
        x = nn.relu(dense(self.hidden_dim)(x.reshape(-1, self.hidden_dim)))
        logits = nn.Dense(self.num_actions, kernel_init=orthogonal(0.01))(x)
        logits = logits.reshape(num_steps, num_samples, num_agents, -1).swapaxes(0, 1)
        return logits, hidden.reshape(num_samples, num_agents, self.hidden_dim)


def action_distribution(logits: jax.Array, action_mask: jax.Array) -> distrax.Categorical:
    """The one place that knows the kind of action. Illegal actions get probability 0, with finite gradients."""
    return distrax.Categorical(logits=jnp.where(action_mask, logits, -1e9), dtype=jnp.int32)


def guider_act(
    guider: Guider, params: Any, obs: Observation, timestep: jax.Array, hidden: dict, key: jax.Array,
    greedy: bool = False):
    """One step: encodes it, then decodes agent after agent; obs (B, N, ...), timestep (B,), hidden.

    Returns action (B, N) int32, log_prob (B, N), value (B, N), hidden.
    """
    batch_size, num_agents, _ = obs.agents_view.shape
    obs_tokens, value, encoder_hidden = guider.apply(
        params, obs.agents_view[:, None], timestep[:, None], hidden["encoder"], method="encode")
    obs_tokens = obs_tokens.reshape(batch_size, num_agents, -1)
    position = timestep_encoding(timestep, guider.embed_dim)

    def decode(carry, inputs):
        previous, hidden = carry
        agent, key, token, action_mask = inputs
        logits, hidden = guider.apply(params, token, previous, hidden, agent, position, method="decode_one")
        policy = action_distribution(logits, action_mask)
        action = policy.mode() if greedy else policy.sample(seed=key)
        return (action + 1, hidden), (action, policy.log_prob(action))

    decoder_hidden = guider.apply(params, hidden["decoder"], timestep, method="begin_step")
    agents_first = jax.tree.map(lambda x: x.swapaxes(0, 1), (obs_tokens, obs.action_mask))  # (N, B, ...)
    inputs = (jnp.arange(num_agents), jax.random.split(key, num_agents), *agents_first)
    carry = (jnp.zeros(batch_size, jnp.int32), decoder_hidden)
    (_, decoder_hidden), (action, log_prob) = jax.lax.scan(decode, carry, inputs)
    return action.T, log_prob.T, value[:, 0], {"encoder": encoder_hidden, "decoder": decoder_hidden}


def learner_act(
    learner: Learner, params: Any, obs: Observation, timestep: jax.Array, hidden: jax.Array, key: jax.Array,
    greedy: bool = False):
    """One step, all agents at once, each from what it saw itself: obs (B, N, ...), timestep (B,), hidden (B, N, F).

    Returns action (B, N) int32, hidden.
    """
    logits, hidden = learner.apply(params, obs.agents_view[:, None], timestep[:, None], hidden)
    policy = action_distribution(logits[:, 0], obs.action_mask)
    return policy.mode() if greedy else policy.sample(seed=key), hidden


# -------------------- Containers --------------------------------------------------------------------------------------
class Params(NamedTuple):
    guider: Any
    learner: Any


class Hidden(NamedTuple):
    """What guider and learner remember, (B, ...)."""

    guider: Any
    learner: jax.Array


class Transition(NamedTuple):
    """One step; a rollout stacks them to (T, B, ...)."""

    obs: Observation
    timestep: jax.Array  # () steps since the episode began, 0 at its first observation
    action: jax.Array  # (N,) int32
    behaviour_log_prob: jax.Array  # (N,) of the guider that acted
    value: jax.Array  # (N,)
    reward: jax.Array  # (N,)
    discount: jax.Array  # (), 0 where the episode terminated
    last: jax.Array  # () bool, the episode ended
    next_value: jax.Array  # (N,) of what followed the action, before any reset; of no use where discount is 0


class Minibatch(NamedTuple):
    """What the losses read: whole rollouts of M environments, (M, T, ...)."""

    obs: Observation
    timestep: jax.Array  # (M, T)
    action: jax.Array  # (M, T, N) int32
    behaviour_log_prob: jax.Array  # (M, T, N)
    value: jax.Array  # (M, T, N) at collection
    advantage: jax.Array  # (M, T, N)
    value_target: jax.Array  # (M, T, N)
    hidden: Hidden  # (M, ...) before the first step, as it was at collection


class TrainState(NamedTuple):
    params: Params
    opt_state: Params
    env_state: Any  # (B, ...)
    obs: Observation  # (B, N, ...)
    hidden: Hidden  # (B, ...)
    running_return: jax.Array  # (B,) of the episodes under way
    running_length: jax.Array  # (B,), which is also the timestep of obs
    key: jax.Array


# -------------------- The algorithm, as pure functions ----------------------------------------------------------------
def gae(reward, value, next_value, discount, last, gamma, gae_lambda):
    """Generalised advantage estimation (arXiv 1506.02438) -> advantage, value_target (T, B, N).

    reward, value, next_value: (T, B, N); discount, last: (T, B).
    D8: at a time limit that the environment signals as truncation (last, but discount 1) the value of the true last
    observation is used. The official code takes every last step for a termination.
    """

    def backwards(next_advantage, step):
        reward, value, next_value, discount, last = step
        error = reward + gamma * discount[:, None] * next_value - value
        advantage = error + gamma * gae_lambda * (1.0 - last[:, None]) * next_advantage
        return advantage, advantage

    steps = (reward, value, next_value, discount, last)
    _, advantage = jax.lax.scan(backwards, jnp.zeros_like(value[0]), steps, reverse=True)
    return advantage, advantage + value


def double_clip(guider_log_prob, learner_log_prob, behaviour_log_prob, delta, clip_coef):
    """The twice clipped ratio of the guider (Eq. 9): first to within delta of the learner, then as in PPO.

    D9: clip(mu / pi, 1 / delta, delta) * pi, in log space: the nearest log-probability that the tether allows. For
    delta = inf it is mu itself, to the bit. No gradient goes to the learner.
    """
    near = jax.lax.stop_gradient(learner_log_prob)
    near = jnp.clip(guider_log_prob, near - math.log(delta), near + math.log(delta))
    return jnp.clip(jnp.exp(near - behaviour_log_prob), 1 - clip_coef, 1 + clip_coef)


def kl_mask(guider_log_prob, learner_log_prob, delta):
    """True where the guider is outside the tether for the action taken: mu / pi < 1 / delta or > delta (Eq. 9)."""
    return jnp.abs(guider_log_prob - learner_log_prob) > math.log(delta)


def guider_loss(ratio, clipped_ratio, advantage):
    """The guider's PPO loss (Eq. 9): mean over samples and agents of -min(r * A, clipped r * A)."""
    return -jnp.mean(jnp.minimum(ratio * advantage, clipped_ratio * advantage))


def value_loss(value, old_value, value_target, clip_coef, clip_vloss):
    """0.5 * mean squared error of the guider's value head; the larger of it and its clipped form if clip_vloss."""
    error = jnp.square(value - value_target)
    if clip_vloss:
        clipped_value = old_value + jnp.clip(value - old_value, -clip_coef, clip_coef)
        error = jnp.maximum(error, jnp.square(clipped_value - value_target))
    return 0.5 * jnp.mean(error)


def learner_loss(guider_policy, learner_policy, ratio, advantage, clip_coef):
    """The two terms of the learner's loss (Eq. 10): KL(mu || pi) to the guider as it is now, and its own PPO loss.

    ratio: pi / mu_old, for the guider collected the data. guider_policy must carry no gradient.
    """
    kl = jnp.mean(guider_policy.kl_divergence(learner_policy))
    clipped_ratio = jnp.clip(ratio, 1 - clip_coef, 1 + clip_coef)
    return kl, -jnp.mean(jnp.minimum(ratio * advantage, clipped_ratio * advantage))


def backtrack_loss(guider_policy, learner_policy, mask):
    """KL(mu || pi) where the mask is on, as a mean over all samples and agents (Eq. 9). learner_policy: no gradient."""
    return jnp.mean(mask * guider_policy.kl_divergence(learner_policy))


def normalise(x: jax.Array) -> jax.Array:
    """To mean 0 and variance 1 over the minibatches of all devices together."""
    mean = jax.lax.pmean(jnp.mean(x), "device")
    variance = jax.lax.pmean(jnp.mean(jnp.square(x - mean)), "device")
    return (x - mean) / (jnp.sqrt(variance) + 1e-8)


# -------------------- One iteration: the four steps -------------------------------------------------------------------
def collect(
    args: Args, env: TeamEnv, guider: Guider, learner: Learner, state: TrainState
) -> Tuple[TrainState, Transition, dict]:
    """Plays T steps in B environments with the guider -> state, rollout (T, B, ...), sums over the ended episodes.

    The learner watches: its hidden state goes along.

    D11: fresh start states come from a pool of B made once per rollout, because a reset inside the step would be
    computed for every environment in every step. The k-th episode that ends is followed by entry k; if more than B end,
    the entries are used again from the first on.
    """
    key, pool_key, act_key = jax.random.split(state.key, 3)
    batch_size = state.running_length.shape[0]
    pool = jax.vmap(env.reset)(jax.random.split(pool_key, batch_size))

    def step(carry, inputs):
        (state, num_ended), (key, final) = carry, inputs
        # STEP 1/4: the guider acts
        timestep = state.running_length
        action, log_prob, value, guider_hidden = guider_act(
            guider, state.params.guider, state.obs, timestep, state.hidden.guider, key)
        env_state, (next_obs, reward, discount, last, _) = jax.vmap(env.step)(state.env_state, action)
        _, learner_hidden = learner.apply(
            state.params.learner, state.obs.agents_view[:, None], timestep[:, None], state.hidden.learner)
        # The next step encodes what follows anyway; its value has to come from here only where it would be lost.
        following = (next_obs.agents_view[:, None], timestep[:, None] + 1, guider_hidden["encoder"])
        encode = functools.partial(guider.apply, state.params.guider, *following, method="encode")
        needed = final | jnp.any(last & (discount > 0))
        next_value = jax.lax.cond(needed, lambda: encode()[1][:, 0], lambda: jnp.zeros_like(value))
        transition = Transition(state.obs, timestep, action, log_prob, value, reward, discount, last, next_value)

        entry = (num_ended + jnp.cumsum(last) - 1) % batch_size
        fresh = jax.tree.map(lambda x: x[entry], pool)
        select = jax.vmap(lambda last, new, old: jax.tree.map(functools.partial(jnp.where, last), new, old))
        env_state, obs = select(last, fresh, (env_state, next_obs))

        running_return, running_length = state.running_return + jnp.mean(reward, axis=1), state.running_length + 1
        episodes = {
            "return": jnp.sum(running_return * last), "length": jnp.sum(running_length * last), "number": jnp.sum(last)}
        state = state._replace(
            env_state=env_state, obs=obs, hidden=Hidden(guider_hidden, learner_hidden),
            running_return=running_return * ~last, running_length=running_length * ~last)
        return (state, num_ended + jnp.sum(last, dtype=jnp.int32)), (transition, episodes)

    carry = (state._replace(key=key), jnp.zeros((), jnp.int32))
    inputs = (jax.random.split(act_key, args.num_steps), jnp.arange(args.num_steps) == args.num_steps - 1)
    (state, _), (rollout, episodes) = jax.lax.scan(step, carry, inputs)
    next_value = jnp.concatenate([rollout.value[1:], rollout.next_value[-1:]])
    rollout = rollout._replace(next_value=jnp.where(rollout.last[..., None], rollout.next_value, next_value))
    return state, rollout, jax.tree.map(lambda x: jnp.sum(x, dtype=jnp.float32), episodes)


def minibatch_loss(params: Params, args: Args, guider: Guider, learner: Learner, mb: Minibatch):
    """Steps 2 to 4 on one minibatch -> total loss, dict of its parts.

    D10: one forward pass of each network serves all terms, and stop_gradients keep apart what belongs to whom.
    """
    guider_logits, value = guider.apply(
        params.guider, mb.obs.agents_view, mb.action, mb.timestep, mb.hidden.guider)
    learner_logits, _ = learner.apply(params.learner, mb.obs.agents_view, mb.timestep, mb.hidden.learner)
    guider_policy = action_distribution(guider_logits, mb.obs.action_mask)
    learner_policy = action_distribution(learner_logits, mb.obs.action_mask)
    guider_log_prob, learner_log_prob = guider_policy.log_prob(mb.action), learner_policy.log_prob(mb.action)
    advantage = normalise(mb.advantage) if args.norm_adv else mb.advantage

    # STEP 2/4: the guider improves
    log_ratio = guider_log_prob - mb.behaviour_log_prob
    ratio = jnp.exp(log_ratio)
    clipped_ratio = double_clip(guider_log_prob, learner_log_prob, mb.behaviour_log_prob, args.delta, args.clip_coef)
    guider_policy_loss = guider_loss(ratio, clipped_ratio, advantage)
    guider_entropy = jnp.mean(guider_policy.entropy())
    critic_loss = value_loss(value, mb.value, mb.value_target, args.clip_coef, args.clip_vloss)
    loss = guider_policy_loss - args.ent_coef * guider_entropy + args.vf_coef * critic_loss

    # STEP 3/4: the learner follows
    fixed_guider_policy = action_distribution(jax.lax.stop_gradient(guider_logits), mb.obs.action_mask)
    learner_ratio = jnp.exp(learner_log_prob - mb.behaviour_log_prob)
    learner_kl, learner_policy_loss = learner_loss(
        fixed_guider_policy, learner_policy, learner_ratio, advantage, args.clip_coef)
    loss += learner_kl + args.learner_rl_coef * learner_policy_loss

    # STEP 4/4: the guider backtracks to the learner, where it is outside the tether
    fixed_learner_policy = action_distribution(jax.lax.stop_gradient(learner_logits), mb.obs.action_mask)
    mask = kl_mask(guider_log_prob, learner_log_prob, args.delta)
    guider_kl = backtrack_loss(guider_policy, fixed_learner_policy, mask)
    loss += guider_kl

    return loss, {
        "guider_policy_loss": guider_policy_loss,
        "guider_entropy": guider_entropy,
        "guider_kl": guider_kl,
        "value_loss": critic_loss,
        "learner_kl": learner_kl,
        "learner_policy_loss": learner_policy_loss,
        "learner_entropy": jnp.mean(learner_policy.entropy()),
        "approx_kl": jnp.mean(ratio - 1 - log_ratio),  # http://joschu.net/blog/kl-approx.html
        "clipfrac": jnp.mean(jnp.abs(ratio - 1) > args.clip_coef),
        "delta_clipfrac": jnp.mean(mask),
        "ratio": jnp.mean(ratio),
    }


def make_minibatches(
    args: Args, rollout: Transition, advantage, value_target, hidden: Hidden, key: jax.Array
) -> Tuple[Minibatch, Any]:
    """-> all sequences (B, T, ...), and indices (epochs * minibatches, M) that permute them anew in each epoch.

    hidden: at the start of the rollout.
    """
    steps = (rollout.obs, rollout.timestep, rollout.action, rollout.behaviour_log_prob, rollout.value, advantage,
             value_target)
    samples = Minibatch(*jax.tree.map(lambda x: x.swapaxes(0, 1), steps), hidden)  # (T, B, ...) -> (B, T, ...)
    permute = functools.partial(jax.random.permutation, x=samples.action.shape[0])
    indices = jax.vmap(permute)(jax.random.split(key, args.update_epochs))
    return samples, indices.reshape(args.update_epochs * args.num_minibatches, -1)


def train_iteration(
    args: Args, env: TeamEnv, guider: Guider, learner: Learner, optimizers: Params, state: TrainState
) -> Tuple[TrainState, dict]:
    """One rollout and all updates from it, on one device of the pmap axis "device" -> state, metrics to add up."""
    hidden = state.hidden
    state, rollout, episodes = collect(args, env, guider, learner, state)
    advantage, value_target = gae(
        rollout.reward, rollout.value, rollout.next_value, rollout.discount, rollout.last, args.gamma, args.gae_lambda)

    key, shuffle_key = jax.random.split(state.key)
    samples, indices = make_minibatches(args, rollout, advantage, value_target, hidden, shuffle_key)

    def update(carry, index):
        params, opt_state = carry
        mb = jax.tree.map(lambda x: x[index], samples)
        grads, losses = jax.grad(minibatch_loss, has_aux=True)(params, args, guider, learner, mb)
        grads, losses = jax.lax.pmean((grads, losses), "device")
        losses["guider_grad_norm"] = optax.tree.norm(grads.guider)
        losses["learner_grad_norm"] = optax.tree.norm(grads.learner)
        # D12: guider and learner have an optimizer each, so that neither's gradient norm scales the other's step.
        results = [opt.update(g, s) for opt, g, s in zip(optimizers, grads, opt_state)]
        updates, opt_state = Params(*[u for u, _ in results]), Params(*[s for _, s in results])
        return (optax.apply_updates(params, updates), opt_state), losses

    (params, opt_state), losses = jax.lax.scan(update, (state.params, state.opt_state), indices)  # losses: scalars
    state = state._replace(params=params, opt_state=opt_state, key=key)

    # value_target - value is the advantage, so its variance is what the values leave unexplained.
    unexplained, total = jax.lax.pmean((jnp.var(advantage), jnp.var(value_target)), "device")
    first_ratio, means = losses.pop("ratio")[0], jax.tree.map(jnp.mean, losses)
    means |= {"first_ratio": first_ratio, "explained_variance": 1 - unexplained / (total + 1e-8)}
    finite = jax.tree.map(lambda x: jnp.sum(jnp.isfinite(x), dtype=jnp.float32), losses)  # minibatches
    return state, {"losses": means, "finite": finite, "episodes": jax.lax.psum(episodes, "device")}


# -------------------- Evaluation --------------------------------------------------------------------------------------
def play(
    env: TeamEnv, act: Callable, hidden: Any, num_episodes: int, key: jax.Array
) -> Tuple[jax.Array, jax.Array, jax.Array]:
    """Plays whole episodes, all at once, without auto-reset -> return, length, won, each (num_episodes,) float32.

    act(obs, timestep, hidden, key) -> action (num_episodes, N), hidden; hidden: before the first step. Warning: it
    waits for the last episode to end, however long that takes.
    """
    key, reset_key = jax.random.split(key)
    state, obs = jax.vmap(env.reset)(jax.random.split(reset_key, num_episodes))
    zeros = jnp.zeros(num_episodes)

    def unfinished(carry):
        return ~jnp.all(carry[3])

    def step(carry):
        state, obs, (timestep, hidden), ended, (total, length, won), key = carry
        key, act_key = jax.random.split(key)
        action, hidden = act(obs, timestep, hidden, act_key)
        state, outcome = jax.vmap(env.step)(state, action)
        running = 1.0 - ended
        total += running * jnp.mean(outcome.reward, axis=1)
        won += running * outcome.won
        ended |= outcome.last
        return state, outcome.obs, (timestep + 1, hidden), ended, (total, length + running, won), key

    carry = (state, obs, (zeros, hidden), jnp.zeros(num_episodes, bool), (zeros, zeros, zeros), key)
    return jax.lax.while_loop(unfinished, step, carry)[4]


def evaluate(
    args: Args, env: TeamEnv, guider: Guider, learner: Learner, params: Params, key: jax.Array
) -> Tuple[Tuple, Tuple]:
    """Plays eval_episodes / D episodes with the learner and as many with the guider, from the same start states."""

    def act_as_learner(obs, timestep, hidden, key):
        return learner_act(learner, params.learner, obs, timestep, hidden, key, args.eval_greedy)

    def act_as_guider(obs, timestep, hidden, key):
        action, _, _, hidden = guider_act(guider, params.guider, obs, timestep, hidden, key, args.eval_greedy)
        return action, hidden

    num_episodes = args.eval_episodes // args.num_devices
    hidden = init_hidden(args, env, guider, num_episodes)
    return (play(env, act_as_learner, hidden.learner, num_episodes, key),
            play(env, act_as_guider, hidden.guider, num_episodes, key))


# -------------------- Setup, logging ----------------------------------------------------------------------------------
def make_networks(args: Args, env: TeamEnv) -> Tuple[Guider, Learner]:
    # Of 4, 8, 16 and 32 steps RWARE tiny-4ag is fastest with 8, which are 32 tokens (benchmark/speed.py --chunk-steps).
    divisors = [c for c in range(1, args.num_steps + 1) if args.num_steps % c == 0]
    chunk_steps = args.chunk_steps or max(c for c in divisors if c == 1 or c * env.num_agents <= 32)
    guider = Guider(args.guider, env.num_agents, env.num_actions, args.num_heads, args.num_blocks, args.embed_dim,
                    args.decay_scaling_factor, chunk_steps)
    return guider, Learner(env.num_actions, args.learner_hidden_dim)


def init_hidden(args: Args, env: TeamEnv, guider: Guider, batch_size: int) -> Hidden:
    """The hidden states before an episode, (batch_size, ...)."""
    learner_hidden = jnp.zeros((batch_size, env.num_agents, args.learner_hidden_dim))
    return Hidden(guider.apply({}, batch_size, method="init_hidden"), learner_hidden)


def learning_rate(args: Args, iteration: int) -> Any:
    """The learning rate in an iteration, counted from 0."""
    num_iterations = args.total_timesteps // (args.num_envs * args.num_steps)
    return args.learning_rate * (1 - iteration / num_iterations) if args.anneal_lr else args.learning_rate


def make_optimizers(args: Args) -> Params:
    def schedule(count):
        return learning_rate(args, count // (args.update_epochs * args.num_minibatches))

    optimizer = optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.adam(schedule, eps=1e-5))
    return Params(guider=optimizer, learner=optimizer)


def init_state(args: Args, env: TeamEnv, guider: Guider, learner: Learner, optimizers: Params, params_key, key):
    """params_key: the same on all devices; D13: key: another on each, for environments, actions and minibatches."""
    key, reset_key = jax.random.split(key)
    batch_size = args.num_envs // args.num_devices
    env_state, obs = jax.vmap(env.reset)(jax.random.split(reset_key, batch_size))
    guider_key, learner_key = jax.random.split(params_key)
    hidden = init_hidden(args, env, guider, batch_size)
    one = jax.tree.map(lambda x: x[:1], hidden)
    view, action, timestep = obs.agents_view[:1, None], jnp.zeros((1, 1, env.num_agents), jnp.int32), jnp.zeros((1, 1))
    params = Params(guider.init(guider_key, view, action, timestep, one.guider),
                    learner.init(learner_key, view, timestep, one.learner))
    opt_state = Params(*[optimizer.init(p) for optimizer, p in zip(optimizers, params)])
    zeros = jnp.zeros(batch_size)
    return TrainState(params, opt_state, env_state, obs, hidden, zeros, zeros, key)


def train_row(args: Args, metrics: dict, iteration: int, interval: int) -> dict:
    """Metrics summed over `interval` iterations that began after `iteration` -> values to log.

    Raises FloatingPointError, with the term and the iteration, on a loss that is not finite.
    """
    updates = args.update_epochs * args.num_minibatches
    worst = min(metrics["finite"], key=metrics["finite"].get)
    if metrics["finite"][worst] < interval * updates:
        raise FloatingPointError(
            f"losses/{worst} is not finite in iteration {iteration + int(metrics['finite'][worst]) // updates + 1}")
    row = {f"losses/{name}": x / interval for name, x in metrics["losses"].items()}
    row["charts/learning_rate"] = learning_rate(args, iteration + interval - 1)
    row["charts/num_episodes"] = number = metrics["episodes"]["number"]
    if number:
        row["charts/episodic_return"] = metrics["episodes"]["return"] / number
        row["charts/episodic_length"] = metrics["episodes"]["length"] / number
    return row


def eval_row(learner_results: Tuple, guider_results: Tuple, has_win_rate: bool) -> dict:
    """Returns, lengths and wins of the episodes of learner and guider -> values to log."""
    (learner_return, length, won), (guider_return, _, _) = learner_results, guider_results
    row = {"eval/learner_return": np.mean(learner_return), "eval/learner_return_std": np.std(learner_return)}
    row |= {"eval/guider_return": np.mean(guider_return), "eval/episodic_length": np.mean(length)}
    row["eval/imitation_gap"] = row["eval/guider_return"] - row["eval/learner_return"]
    return row | ({"eval/win_rate": np.mean(won)} if has_win_rate else {})


def plot_learning_curve(rows: list, title: str, path: str) -> None:
    """Draws the returns of guider and learner over environment steps as a PNG."""
    from matplotlib.figure import Figure  # not pyplot, which would look for a display

    fig = Figure(figsize=(7, 4.2), layout="constrained")
    ax = fig.add_subplot(title=title, xlabel="environment steps", ylabel="return per evaluation episode")
    steps = [row["global_step"] for row in rows]
    ax.plot(steps, [row["eval/guider_return"] for row in rows], "--", label="guider, centralized")
    ax.plot(steps, [row["eval/learner_return"] for row in rows], "-", label="learner, decentralized")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(path, dpi=150)


class Logger:
    """metrics.jsonl, Weights & Biases and the terminal, with the same keys everywhere."""

    def __init__(self, args: Args):
        scenario = re.sub(r"[^\w.=-]", "_", args.scenario)
        self.name = f"{args.env_id}__{scenario}__{args.exp_name}__{args.seed}__{int(time.time())}"
        self.folder = os.path.join(args.run_dir, self.name)
        try:
            os.makedirs(self.folder)
        except OSError as error:
            raise ValueError(f"--run-dir {args.run_dir}: cannot make {self.folder}: {error.strerror}") from error
        about = {"args": dataclasses.asdict(args), "command": " ".join(sys.argv)}
        packages = ("jax", "flax", "optax", "distrax", "jumanji", "numpy")
        about["versions"] = {name: importlib.metadata.version(name) for name in packages}
        about["devices"] = [device.device_kind for device in jax.local_devices()[: args.num_devices]]
        with open(os.path.join(self.folder, "args.json"), "w") as file:
            json.dump(about, file, indent=2)
        self.rows, self.wandb = [], None
        self.file = open(os.path.join(self.folder, "metrics.jsonl"), "w")
        if args.track:
            import wandb

            self.wandb = wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=self.name,
                                    config=about, save_code=True, dir=self.folder)
        self.bar = tqdm(total=args.total_timesteps, unit="step", unit_scale=True, disable=not sys.stderr.isatty())
        self.bar.set_postfix_str("compiling")

    def log(self, row: dict) -> None:
        row = {name: int(x) if name == "global_step" else float(x) for name, x in row.items()}
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.wandb:
            self.wandb.log(row, step=row["global_step"])
        text = f"learner {row['eval/learner_return']:.2f}  guider {row['eval/guider_return']:.2f}"
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            print(f"global_step={row['global_step']}  {text}  SPS {row.get('charts/SPS', 0):.0f}", flush=True)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.rows:
            path = os.path.join(self.folder, "learning_curve.png")
            plot_learning_curve(self.rows, self.name.rsplit("__", 1)[0], path)
        if self.wandb:
            self.wandb.finish()
        print(f"metrics and learning curve: {self.folder}")


def train(args: Args, env: TeamEnv, devices: list, logger: Logger) -> None:
    """Compiles, then alternates intervals of training with evaluation, and logs."""
    guider, learner = make_networks(args, env)
    optimizers = make_optimizers(args)
    steps_per_iteration = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // steps_per_iteration
    eval_iterations = sorted({math.ceil(num_iterations * (i + 1) / args.num_evals) for i in range(args.num_evals)})

    start = time.time()
    key, params_key, eval_key = jax.random.split(jax.random.PRNGKey(args.seed), 3)
    parts = (args, env, guider, learner)
    init = jax.pmap(functools.partial(init_state, *parts, optimizers), in_axes=(None, 0), devices=devices)
    keys = jax.random.split(key, args.num_devices)
    init = init.lower(params_key, keys).compile({"xla_backend_optimization_level": 0})  # it runs once, so compile fast
    state = init(params_key, keys)  # every leaf (D, ...)
    iterate = jax.pmap(
        functools.partial(train_iteration, *parts, optimizers), axis_name="device", devices=devices, donate_argnums=0)
    iterate = iterate.lower(state).compile()
    evaluate_both = jax.pmap(functools.partial(evaluate, *parts), devices=devices)
    evaluate_both = evaluate_both.lower(state.params, jax.random.split(eval_key, args.num_devices)).compile()
    add = jax.jit(lambda metrics, new: jax.tree.map(jnp.add, metrics, new))
    clock = {"time/compile_s": time.time() - start, "time/train_s": 0.0, "time/eval_s": 0.0}
    logger.bar.reset(num_iterations * steps_per_iteration)  # the time left is reckoned from here

    iteration = 0
    for interval_end in [0] + eval_iterations:
        interval, start, metrics = interval_end - iteration, time.time(), None
        for _ in range(interval):
            state, new_metrics = iterate(state)
            metrics = new_metrics if metrics is None else add(metrics, new_metrics)
            jax.block_until_ready(metrics)  # so that the progress bar tells the truth and Ctrl-C works at once
            logger.bar.update(steps_per_iteration)
        row = {"global_step": interval_end * steps_per_iteration}
        if interval:
            seconds = time.time() - start
            clock["time/train_s"] += seconds
            row |= train_row(args, jax.tree.map(lambda x: np.asarray(x)[0], metrics), iteration, interval)
            row["charts/SPS"] = interval * steps_per_iteration / seconds
        start = time.time()
        eval_keys = jax.random.split(jax.random.fold_in(eval_key, interval_end), args.num_devices)
        results = jax.tree.map(np.asarray, evaluate_both(state.params, eval_keys))  # each (D, episodes)
        clock["time/eval_s"] += time.time() - start
        logger.log(row | eval_row(*results, env.has_win_rate) | clock)
        iteration = interval_end


# -------------------- Main --------------------------------------------------------------------------------------------
def main() -> int:
    """Parses and checks the flags, trains, and returns the exit status."""
    args = tyro.cli(Args)
    script = os.path.basename(__file__)
    try:
        check_args(args)
        if args.num_devices > 1:
            # XLA splits the CPU into devices only if told so before its first use. With a thread for each, two devices
            # on two cores train a fifth faster than one that splits each operation over both (benchmark/speed.py).
            jax.config.update("jax_num_cpu_devices", args.num_devices)
            os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
        devices = choose_devices(args)
        env = make_env(args.env_id, args.scenario)
        task = f"{args.env_id} {args.scenario}".strip()
        print(f"{script}: {task}, {env.num_agents} agents, {env.num_actions} actions, {args.guider} guider, "
              f"{args.total_timesteps} steps, {args.num_devices} x {devices[0].device_kind}")
        if args.dry_run:
            return 0
        logger = Logger(args)
    except ValueError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        return 2
    try:
        train(args, env, devices, logger)
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        return 130
    except FloatingPointError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        return 1
    finally:
        logger.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
