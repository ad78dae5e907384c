"""MAGPO, feed-forward: Multi-Agent Guided Policy Optimization (arXiv 2507.18059) in one file.

    python magpo_ff.py --env-id RobotWarehouse-v0 --delta 1.5
    python magpo_ff.py --env-id CoordSum-v0 --scenario 3x10=10 --delta 1.1 --learner-rl-coef 4

Two policies are trained together, for a team of N agents of which each sees a part of the state:

- the guider mu is centralized and autoregressive: the agents decide one after the other, and each
  sees the observations o = (o_1, .., o_N) of all and the actions of those before it,
  mu(a | o) = prod_j mu(a_j | o, a_1, .., a_{j-1}). It explores, and PPO improves it;
- the learner pi is decentralized: each agent decides alone, from its own observation,
  pi(a | o) = prod_j pi(a_j | o_j). It follows the guider, and is what gets deployed.

A guider that is left alone finds strategies that no learner can follow. So it is kept on a tether
of length delta: for the actions taken, mu / pi should stay within [1 / delta, delta]. An iteration
has four steps:

    1. collect    the guider plays a rollout                           `collect`
    2. improve    the guider by PPO, its ratio clipped twice           `double_clip`, `guider_loss`
    3. follow     the learner: KL(mu || pi) + lambda * its PPO loss    `learner_loss`
    4. backtrack  the guider, where it is beyond the tether's end      `kl_mask`, `backtrack_loss`

Steps 2 to 4 are one gradient step on each minibatch (`minibatch_loss`, `train_iteration`). How is
the guider brought back to the learner? No parameter is ever copied. The double clip stops the
gradient that would take it further out, and where it is out already a KL term pulls it back.

Shapes in comments: T steps of a rollout, B environments on a device, M samples given to a network
at once (of a minibatch, or of B environments), N agents, A actions, O features of an observation,
E width of the guider, H heads, L tokens that look at each other, D devices. D with a number (D1,
D2, ..) is a detail of the implementation, which the README explains and compares with the official
code.
"""
import dataclasses
import functools
import importlib
import importlib.metadata
import io
import json
import math
import os
import re
import signal
import sys
import time
from typing import Any, Callable, Literal, NamedTuple, Optional, Tuple

import distrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
import tyro
from einops import rearrange
from flax.linen.initializers import constant, normal, orthogonal
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from tqdm import tqdm


# -------------------- Flags -----------------------------------------------------------------------
@dataclasses.dataclass
class Args:  # tyro shows the comment behind a flag as its help; [in brackets]: the official name
    # The run
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # experiment, part of the folder name
    seed: int = 1  # seed of parameters, environments, actions and minibatches
    run_dir: str = "runs"  # folder in which the run's own folder is made
    num_devices: int = 0  # devices to train on; 0: every GPU or TPU there is, or one CPU device
    distributed: bool = False  # this process is one of several, on one host or many; see README
    save: bool = True  # at every evaluation save the run, to resume it, and both networks
    resume: str = ""  # go on with the run in this folder, with its own flags
    cache: bool = True  # keep compiled programs in RUN_DIR/.jax_cache, for later runs
    dry_run: bool = False  # check all flags, trace one step, print what would run, and stop
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "magpo"  # Weights & Biases project
    wandb_entity: Optional[str] = None  # Weights & Biases team; None: your own account

    # The environment
    env_id: str = "CoordSum-v0"  # a Jumanji environment; my_module:MyEnv-v0 imports my_module first
    scenario: str = ""  # the task's name in the papers, e.g. tiny-2ag; "": the id's own defaults
    num_envs: int = 64  # environments stepped in parallel, over all devices

    # Budget and evaluation
    total_timesteps: int = 20_000_000  # steps, summed over environments; only whole iterations run
    num_evals: int = 20  # evaluations, evenly spaced, after the one at step 0 [num_evaluation]
    eval_episodes: int = 32  # episodes that learner and guider each play in an evaluation
    eval_greedy: bool = False  # evaluate the likeliest actions, not sampled [evaluation_greedy]

    # The algorithm
    delta: float = 1.5  # > 1: length of the tether, the largest mu / pi; inf: no tether [clip_gpo]
    learner_rl_coef: float = 1.0  # lambda: weight of the learner's PPO loss beside its KL [alpha]
    # D15: these three are larger than the official defaults of 2.5e-4, 0.5 and 2.
    learning_rate: float = 1e-3  # Adam's learning rate, of guider and learner [actor_lr]
    max_grad_norm: float = 10.0  # largest norm of a gradient, for guider and learner separately
    num_minibatches: int = 4  # minibatches per epoch
    anneal_lr: bool = False  # let the learning rate fall linearly to 0 [decay_learning_rates]
    num_steps: int = 128  # T: steps of one rollout in each environment [rollout_length]
    update_epochs: int = 4  # passes over each rollout [ppo_epochs]
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    norm_adv: bool = True  # normalise advantages per minibatch
    clip_coef: float = 0.2  # epsilon: PPO's clip of the probability ratio [clip_eps]
    clip_vloss: bool = True  # clip the value loss by epsilon, too
    ent_coef: float = 0.01  # weight of the guider's entropy bonus; the learner has none
    vf_coef: float = 0.5  # weight of the value loss

    # The networks
    guider: Literal["sable", "mat"] = "sable"  # the guider mixes agents by retention or attention
    embed_dim: int = 64  # E: width of the guider [n_embd]
    num_heads: int = 1  # H: heads of the guider [n_head]
    num_blocks: int = 1  # blocks of the guider's encoder, and of its decoder [n_block]
    learner_hidden_dim: int = 128  # width of the learner's two hidden layers


class FlagError(ValueError):
    """A flag that cannot be obeyed; its text is the one line that the user sees."""


def check_args(args: Args) -> None:
    """Raises FlagError, naming the flag, its value and what is allowed, if flags cannot work."""

    def require(allowed: bool, name: str, rule: str) -> None:
        if not allowed:
            raise FlagError(f"--{name.replace('_', '-')} {getattr(args, name)}: {rule}")

    sizes = "num_envs total_timesteps num_evals eval_episodes num_steps num_minibatches"
    sizes += " update_epochs embed_dim num_heads num_blocks learner_hidden_dim"
    for name in f"{sizes} learning_rate max_grad_norm clip_coef".split():
        require(0 < getattr(args, name) < math.inf, name, "must be above 0, and finite")
    for name in ("learner_rl_coef", "ent_coef", "vf_coef", "num_devices"):
        require(0 <= getattr(args, name) < math.inf, name, "must be finite and not negative")
    for name in ("gamma", "gae_lambda"):
        require(0 <= getattr(args, name) <= 1, name, "must be in [0, 1]")
    require(0 <= args.seed < 2**32, "seed", "must be in [0, 2**32)")
    require(args.delta > 1, "delta", "must be above 1 (1.1 is a short tether, inf is none)")
    rule = f"must be divisible by --num-heads {args.num_heads}"
    require(args.embed_dim % args.num_heads == 0, "embed_dim", rule)
    steps = args.num_envs * args.num_steps
    rule = f"leaves no update: --num-envs * --num-steps is {steps}"
    require(args.total_timesteps >= steps, "total_timesteps", rule)


def start_jax(args: Args) -> None:
    """Sets JAX up before its first use; FlagError if processes do not find each other."""
    num_processes = 1
    if args.distributed:
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away
        settings = {}  # JAX finds SLURM, Open MPI, Kubernetes and TPU pods by itself
        try:
            if "JAX_NUM_PROCESSES" in os.environ:
                num_processes = int(os.environ["JAX_NUM_PROCESSES"])
                settings["num_processes"] = num_processes
                settings["process_id"] = int(os.environ["JAX_PROCESS_ID"])
            jax.distributed.initialize(
                **settings, heartbeat_timeout_seconds=30, shutdown_timeout_seconds=30)
        except KeyError as error:
            raise FlagError(f"--distributed: the variable {error} is not set") from error
        except (RuntimeError, ValueError) as error:
            raise FlagError(f"--distributed: {str(error).splitlines()[0]}") from error
    if args.num_devices > num_processes:
        # XLA splits the CPU into devices only if told so before its first use. One thread for each
        # is faster than every operation split over all cores (benchmark/speed.py).
        jax.config.update("jax_num_cpu_devices", args.num_devices // num_processes)
        one_thread = " --xla_cpu_multi_thread_eigen=false"
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + one_thread


def use_cache(args: Args) -> None:
    """Keeps compiled programs beside the runs, unless the user has chosen a place for them."""
    if args.cache and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.join(args.run_dir, ".jax_cache"))
        # With a limit to its size JAX locks the folder, so that several runs may share it.
        jax.config.update("jax_compilation_cache_max_size", 2**30)


def choose_devices(args: Args) -> list:
    """Returns the devices to train on, and sets args.num_devices if that is 0.

    Raises FlagError if there are too few devices or the work cannot be shared out evenly.
    """
    number = jax.device_count()
    if args.num_devices == 0:
        one_cpu = jax.default_backend() == "cpu" and jax.process_count() == 1
        args.num_devices = 1 if one_cpu else number
    if args.num_devices > number:
        raise FlagError(f"--num-devices {args.num_devices}: there are only {number}")
    if args.distributed and args.num_devices != number:
        raise FlagError(f"--num-devices {args.num_devices}: all processes together have {number}")
    rule = f"must be divisible by --num-devices {args.num_devices}"
    if args.num_envs % args.num_devices != 0:
        raise FlagError(f"--num-envs {args.num_envs}: {rule}")
    if args.eval_episodes % args.num_devices != 0:
        raise FlagError(f"--eval-episodes {args.eval_episodes}: {rule}")
    samples = args.num_envs // args.num_devices * args.num_steps
    if samples % args.num_minibatches != 0:
        rule = f"must divide the {samples} samples of a rollout on each device"
        rule += " (--num-envs / --num-devices * --num-steps)"
        raise FlagError(f"--num-minibatches {args.num_minibatches}: {rule}")
    return jax.devices()[: args.num_devices]


# -------------------- Environment -----------------------------------------------------------------
class Observation(NamedTuple):
    agents_view: jax.Array  # (N, O) float32, the one-hot agent id first
    action_mask: jax.Array  # (N, A) bool, True where legal; for continuous actions everywhere


class Outcome(NamedTuple):
    """What a step brings; obs is what followed the action, also at the end of an episode."""

    obs: Observation
    reward: jax.Array  # (N,) float32
    discount: jax.Array  # () float32, 0 where the episode terminated
    last: jax.Array  # () bool, the episode ended: terminated or truncated
    won: jax.Array  # () bool


def is_continuous(action_spec: Any) -> bool:
    """True for actions of floats within finite bounds, a row for each agent: (N, A)."""
    if not hasattr(action_spec, "maximum") or len(action_spec.shape) != 2:
        return False
    is_float = jnp.issubdtype(action_spec.dtype, jnp.floating)
    bounds = np.broadcast_arrays(action_spec.minimum, action_spec.maximum)
    return is_float and bool(np.all(np.isfinite(bounds)))


class TeamEnv:
    """A cooperative Jumanji environment as the algorithm sees it: one game, without auto-reset.

    D1: the agent's one-hot id comes first in its view; the rest is passed on as it is.
    D2: all agents get the team's reward: a scalar is repeated, a vector is summed first. If the
    environment says `own_rewards = True`, each agent gets its own entry of the vector.
    """

    def __init__(self, env: Any):
        """env: its observation has agents_view (N, ...), its action_spec is of one of two kinds.

        Discrete: a MultiDiscreteArray (N,), and the observation has an action_mask (N, A), too.
        Continuous: a BoundedArray (N, A) of floats, A being the components of an action.
        The key "won" in its timestep's extras, () bool, is optional and makes a win rate.
        """
        self.env = env
        _, timestep = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
        self.continuous = is_continuous(env.action_spec)
        mask = env.action_spec if self.continuous else timestep.observation.action_mask
        self.num_agents, self.num_actions = mask.shape
        self.no_action = np.zeros(
            env.action_spec.shape, np.float32 if self.continuous else np.int32)
        if self.continuous:
            lowest = np.array(env.action_spec.minimum)
            highest = np.array(env.action_spec.maximum)
            self.middle = (highest + lowest) / 2
            self.reach = (highest - lowest) / 2
        self.own_rewards = getattr(env, "own_rewards", False)
        self.has_win_rate = "won" in (timestep.extras or {})

    def observe(self, observation: Any) -> Observation:
        view = rearrange(observation.agents_view, "n ... -> n (...)").astype(jnp.float32)
        view = jnp.concatenate([jnp.eye(self.num_agents), view], axis=-1)
        everything = jnp.ones((self.num_agents, self.num_actions), bool)
        return Observation(view, everything if self.continuous else observation.action_mask)

    def reset(self, key: jax.Array) -> Tuple[Any, Observation]:
        state, timestep = self.env.reset(key)
        return state, self.observe(timestep.observation)

    def bounded(self, action: jax.Array) -> jax.Array:
        """Continuous actions as the environment takes them: tanh brings them within its bounds."""
        return self.middle + self.reach * jnp.tanh(action)

    def step(self, state: Any, action: jax.Array) -> Tuple[Any, Outcome]:
        """action: (N,) int32, or (N, A) float32, see `bounded`."""
        if self.continuous:
            action = self.bounded(action)
        state, timestep = self.env.step(state, action)
        last = timestep.last()
        reward = timestep.reward if self.own_rewards else jnp.sum(timestep.reward)
        reward = jnp.broadcast_to(reward, (self.num_agents,)).astype(jnp.float32)
        # D3: an agent may be done, with discount 0, long before the team's episode is over (in
        # Connector: connected or stuck). The episode terminates once all discounts are 0.
        discount = jnp.where(last, jnp.max(timestep.discount), 1.0)
        won = last & timestep.extras["won"] if self.has_win_rate else jnp.zeros((), bool)
        return state, Outcome(self.observe(timestep.observation), reward, discount, last, won)


def first_observation(env: Any) -> Any:
    """The observation of a reset, with shapes and dtypes in place of numbers."""
    _, timestep = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
    return timestep.observation


def import_module_of(env_id: str) -> str:
    """Imports the module of `module:Id-v0`, which registers the id, like Gymnasium -> `Id-v0`."""
    import jumanji

    match = re.fullmatch(r"(\w+(?:\.\w+)*):(.+)", env_id)
    if match is None:
        return env_id
    module, name = match.groups()
    sys.path.append(os.getcwd())
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, what it imports is not
        raise FlagError(f"--env-id {env_id}: there is no module {module}") from error
    if name not in jumanji.registered_environments():
        raise FlagError(f"--env-id {env_id}: {module} does not register {name} with Jumanji")
    return name


def make_task(env_id: str, scenario: str) -> Any:
    """The environment that tasks.py makes; FlagError if it is not there or refuses."""
    try:
        import tasks

        return tasks.make(env_id, scenario)
    except ModuleNotFoundError as error:
        flag = f"--scenario {scenario}" if scenario else f"--env-id {env_id}"
        missing = f"{error}, which is neither beside this file nor installed"
        raise FlagError(f"{flag}: {missing}") from error
    except ValueError as error:
        raise FlagError(str(error)) from error


def make_env(env_id: str, scenario: str) -> TeamEnv:
    """Makes the environment of a Jumanji id; scenario "" stands for its own defaults.

    A registered environment with agents_view needs no other file; for all else there is tasks.py.
    Raises FlagError on an unknown id or scenario, or if the environment lacks what is needed. Its
    own errors are shown as they are.
    """
    import jumanji  # here, because it starts JAX's backend, and num_devices is set before that

    name = import_module_of(env_id)
    if scenario or name not in jumanji.registered_environments():
        env = make_task(name, scenario)
    else:
        env = jumanji.make(name)
        if not hasattr(first_observation(env), "agents_view"):
            env = make_task(name, scenario)

    # What the environment gives counts, not its observation_spec, which nothing here needs.
    observation = first_observation(env)
    discrete = isinstance(env.action_spec, jumanji.specs.MultiDiscreteArray)
    needed = ("agents_view", "action_mask") if discrete else ("agents_view",)
    missing = [field for field in needed if not hasattr(observation, field)]
    if missing:
        raise FlagError(f"--env-id {env_id}: its observation has no {' and no '.join(missing)}")
    if not (discrete or is_continuous(env.action_spec)):
        needs = "one discrete action per agent, a MultiDiscreteArray, or continuous ones,"
        needs += f" a BoundedArray (N, A) of floats with finite bounds, not {env.action_spec}"
        raise FlagError(f"--env-id {env_id}: needs {needs}")
    view_shape = observation.agents_view.shape
    mask_shape = observation.action_mask.shape if discrete else env.action_spec.shape
    if len(mask_shape) != 2 or view_shape[:1] != mask_shape[:1]:
        name = "action_mask" if discrete else "action_spec"
        needs = f"agents_view (N, ...) and {name} (N, A), not {view_shape} and {mask_shape}"
        raise FlagError(f"--env-id {env_id}: needs {needs}")

    team_env = TeamEnv(env)
    state, _ = jax.eval_shape(team_env.reset, jax.random.PRNGKey(0))
    # An environment's own errors show up here.
    jax.eval_shape(team_env.step, state, team_env.no_action)
    return team_env


# -------------------- Networks --------------------------------------------------------------------
# Tokens, one per sample and agent, stay flattened to (M * N, E), on which dense layers are faster.
def split_heads(tokens: jax.Array, num_tokens: int, num_heads: int) -> jax.Array:
    """(M * L, E) -> (M, H, L, E / H), for L tokens that look at each other."""
    return rearrange(tokens, "(m l) (h e) -> m h l e", l=num_tokens, h=num_heads)


class Attention(nn.Module):
    """Multi-head attention over the agents of a step, without biases (MAT, arXiv 2205.14953)."""

    num_agents: int
    num_heads: int
    embed_dim: int

    def setup(self):
        dense = functools.partial(nn.Dense, use_bias=False, kernel_init=orthogonal(0.01))
        self.query = dense(self.embed_dim)
        self.key = dense(self.embed_dim)
        self.value = dense(self.embed_dim)
        self.out = dense(self.embed_dim)

    def qkv(self, x, source, num_tokens):
        """Tokens (M * L, E) -> q from x, k and v from source, each (M, H, L, E / H)."""
        q = split_heads(self.query(x), num_tokens, self.num_heads)
        k = split_heads(self.key(source), num_tokens, self.num_heads)
        v = split_heads(self.value(source), num_tokens, self.num_heads)
        return q, k, v

    def attend(self, q, k, v, seen):
        """q (M, H, I, E / H) looks at k and v (M, H, J, E / H) where seen (I, J) -> (M * I, E)."""
        scale = math.sqrt(self.embed_dim // self.num_heads)
        scores = (q / scale) @ rearrange(k, "m h j e -> m h e j")  # (M, H, I, J)
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e9))
        mixed = weights @ v
        return self.out(rearrange(mixed, "m h i e -> (m i) (h e)"))

    def __call__(self, x, source, causal):
        """All agents at once; if causal, each sees itself and the earlier ones. (M * N, E)"""
        q, k, v = self.qkv(x, source, self.num_agents)
        everyone = jnp.ones((self.num_agents, self.num_agents), bool)
        seen = jnp.tril(everyone) if causal else everyone
        return self.attend(q, k, v, seen)

    def init_hidden(self, batch_size):
        """Keys and values of the agents that have acted, each (M, H, N, E / H)."""
        head_dim = self.embed_dim // self.num_heads
        zeros = jnp.zeros((batch_size, self.num_heads, self.num_agents, head_dim))
        return zeros, zeros

    def decode(self, x, source, hidden, agent):
        """The same for the tokens (M, E) of one agent -> (M, E), hidden with its k and v."""
        q, k, v = self.qkv(x, source, num_tokens=1)
        keys, values = hidden
        keys = jax.lax.dynamic_update_slice_in_dim(keys, k, agent, axis=2)
        values = jax.lax.dynamic_update_slice_in_dim(values, v, agent, axis=2)
        seen = jnp.arange(self.num_agents) <= agent
        return self.attend(q, keys, values, seen), (keys, values)


class Retention(nn.Module):
    """Retention over the agents of a step, without memory of earlier ones (arXiv 2410.01706).

    Attention without the softmax: agent i reads sum_{j <= i} (q_i . k_j) v_j = q_i S_i, where the
    state S_i = sum_{j <= i} k_j v_j^T stands for all earlier agents, whatever their number.
    D6: Sable's particulars: all matrices start as normal(1 / E), a group norm inside each head,
    and an output gate that reads what the keys read.
    """

    num_agents: int
    num_heads: int
    embed_dim: int

    def setup(self):
        start = normal(1 / self.embed_dim)
        dense = functools.partial(nn.Dense, use_bias=False, kernel_init=start)
        self.query = dense(self.embed_dim)
        self.key = dense(self.embed_dim)
        self.value = dense(self.embed_dim)
        self.gate = dense(self.embed_dim)
        self.out = dense(self.embed_dim)
        self.head_norm = nn.GroupNorm(num_groups=self.num_heads)

    def qkv(self, x, source, num_tokens):
        """Tokens (M * L, E) -> scaled q from x, k and v from source, each (M, H, L, E / H)."""
        scale = math.sqrt(self.embed_dim // self.num_heads)
        q = split_heads(self.query(x), num_tokens, self.num_heads) / scale
        k = split_heads(self.key(source), num_tokens, self.num_heads)
        v = split_heads(self.value(source), num_tokens, self.num_heads)
        return q, k, v

    def project(self, mixed, source):
        """Norms, gates and mixes the heads: (M, H, L, E / H), tokens (M * L, E) -> (M * L, E)."""
        mixed = self.head_norm(rearrange(mixed, "m h l e -> (m l) (h e)"))
        return self.out(nn.swish(self.gate(source)) * mixed)

    def __call__(self, x, source, causal):
        """All agents at once; if causal, each sees itself and the earlier ones. (M * N, E)"""
        q, k, v = self.qkv(x, source, self.num_agents)
        scores = q @ rearrange(k, "m h j e -> m h e j")  # (M, H, I, J), q_i . k_j
        if causal:
            scores = jnp.tril(scores)
        return self.project(scores @ v, source)

    def init_hidden(self, batch_size):
        """S, the sum over the agents that have acted, (M, H, E / H, E / H)."""
        head_dim = self.embed_dim // self.num_heads
        return jnp.zeros((batch_size, self.num_heads, head_dim, head_dim))

    def decode(self, x, source, hidden, agent):
        """The same for the tokens (M, E) of one agent -> (M, E), S with its k v^T added."""
        q, k, v = self.qkv(x, source, num_tokens=1)
        hidden = hidden + rearrange(k, "m h 1 e -> m h e 1") @ v
        return self.project(q @ hidden, source), hidden


MIXER = {"mat": Attention, "sable": Retention}
NORM = {"mat": nn.LayerNorm, "sable": nn.RMSNorm}


def make_mlp(kind: str, embed_dim: int) -> list:
    """The dense layers of `mlp`: down and up for mat; down, up and gate for sable."""
    num_layers = {"mat": 2, "sable": 3}[kind]
    start = orthogonal(math.sqrt(2))
    return [nn.Dense(embed_dim, kernel_init=start) for _ in range(num_layers)]


def mlp(layers: list, x: jax.Array) -> jax.Array:
    """A GELU MLP of two layers, or a SwiGLU of three: (..., E) -> (..., E)."""
    if len(layers) == 2:
        down, up = layers
        return down(nn.gelu(up(x)))
    down, up, gate = layers
    return down(nn.swish(up(x)) * gate(x))


class EncoderBlock(nn.Module):
    """Mixes observation tokens over agents, then an MLP; norms come after the sums."""

    kind: str
    num_agents: int
    num_heads: int
    embed_dim: int

    def setup(self):
        self.self_mix = MIXER[self.kind](self.num_agents, self.num_heads, self.embed_dim)
        self.norm_1 = NORM[self.kind]()
        self.mlp = make_mlp(self.kind, self.embed_dim)
        self.norm_2 = NORM[self.kind]()

    def __call__(self, x):
        """Observation tokens (M * N, E) -> (M * N, E); every agent sees all."""
        x = self.norm_1(x + self.self_mix(x, x, causal=False))
        return self.norm_2(x + mlp(self.mlp, x))


class DecoderBlock(nn.Module):
    """Mixes action tokens over agents, then these with observation tokens, then an MLP."""

    kind: str
    num_agents: int
    num_heads: int
    embed_dim: int

    def setup(self):
        self.self_mix = MIXER[self.kind](self.num_agents, self.num_heads, self.embed_dim)
        self.norm_1 = NORM[self.kind]()
        self.cross_mix = MIXER[self.kind](self.num_agents, self.num_heads, self.embed_dim)
        self.norm_2 = NORM[self.kind]()
        self.mlp = make_mlp(self.kind, self.embed_dim)
        self.norm_3 = NORM[self.kind]()

    def __call__(self, x, obs_tokens):
        """Action and observation tokens (M * N, E) -> (M * N, E); agent j sees agents <= j."""
        x = self.norm_1(x + self.self_mix(x, x, causal=True))
        x = self.norm_2(obs_tokens + self.cross_mix(obs_tokens, x, causal=True))
        return self.norm_3(x + mlp(self.mlp, x))

    def init_hidden(self, batch_size):
        return self.self_mix.init_hidden(batch_size), self.cross_mix.init_hidden(batch_size)

    def decode(self, x, obs_tokens, hidden, agent):
        """The same for the tokens (M, E) of one agent; hidden stands for the earlier ones."""
        self_hidden, cross_hidden = hidden
        mixed, self_hidden = self.self_mix.decode(x, x, self_hidden, agent)
        x = self.norm_1(x + mixed)
        mixed, cross_hidden = self.cross_mix.decode(obs_tokens, x, cross_hidden, agent)
        x = self.norm_2(obs_tokens + mixed)
        return self.norm_3(x + mlp(self.mlp, x)), (self_hidden, cross_hidden)


def make_head(kind: str, embed_dim: int, width: int) -> nn.Module:
    """Two layers from a token (E,) to (width,) outputs, which start near 0."""
    wide = nn.Dense(embed_dim, kernel_init=orthogonal(math.sqrt(2)))
    out = nn.Dense(width, kernel_init=orthogonal(0.01))
    return nn.Sequential([wide, nn.gelu, NORM[kind](), out])


def action_features(action: jax.Array, num_actions: int, continuous: bool) -> jax.Array:
    """What an agent is told of the action before it: (...) int32 or (..., A) float -> (..., 1 + A).

    The first feature is 0 here; it is 1, and all others 0, where nobody is before. One-hot and not
    a table of embeddings, whose gradient is a slow scatter.
    """
    if continuous:
        squashed = jnp.tanh(action)
        return jnp.concatenate([jnp.zeros_like(squashed[..., :1]), squashed], axis=-1)
    return jax.nn.one_hot(action + 1, num_actions + 1)


LOG_STD_START = -0.5  # of Gaussian policies; std is then 0.6
LOG_STD_BOUNDS = (-5.0, 1.0)


class AppendLogStd(nn.Module):
    """Completes a policy of continuous actions: mean (..., A) -> mean and log std (..., 2 A)."""

    @nn.compact
    def __call__(self, mean):
        log_std = self.param("log_std", constant(LOG_STD_START), mean.shape[-1:])
        return jnp.concatenate([mean, jnp.broadcast_to(log_std, mean.shape)], axis=-1)


class Guider(nn.Module):
    """mu: an encoder of all observations with a value head, and a decoder of agent after agent."""

    kind: str  # sable or mat
    num_agents: int
    num_actions: int
    num_heads: int
    num_blocks: int
    embed_dim: int
    continuous: bool = False

    def setup(self):
        norm = NORM[self.kind]
        dense = functools.partial(nn.Dense, self.embed_dim, kernel_init=orthogonal(math.sqrt(2)))
        sizes = (self.kind, self.num_agents, self.num_heads, self.embed_dim)

        self.obs_embed = nn.Sequential([norm(), dense(), nn.gelu, norm()])
        self.encoder = [EncoderBlock(*sizes) for _ in range(self.num_blocks)]
        self.value_head = make_head(self.kind, self.embed_dim, 1)

        self.action_embed = nn.Sequential([dense(use_bias=False), nn.gelu, norm()])
        self.decoder = [DecoderBlock(*sizes) for _ in range(self.num_blocks)]
        policy_head = make_head(self.kind, self.embed_dim, self.num_actions)
        if self.continuous:
            policy_head = nn.Sequential([policy_head, AppendLogStd()])
        self.policy_head = policy_head

    def encode(self, agents_view: jax.Array) -> Tuple[jax.Array, jax.Array]:
        """agents_view (M, N, O) -> observation tokens (M * N, E), value (M, N)."""
        x = self.obs_embed(rearrange(agents_view, "m n o -> (m n) o"))
        for block in self.encoder:
            x = block(x)
        value = rearrange(self.value_head(x), "(m n) 1 -> m n", n=self.num_agents)
        return x, value

    def __call__(self, agents_view: jax.Array, action: jax.Array) -> Tuple[jax.Array, jax.Array]:
        """Training: agents_view (M, N, O), action (M, N, ..) -> logits (M, N, A), value (M, N).

        All agents at once; agent j's logits depend on the actions of agents < j alone.
        D7: the agents keep the order in which they acted.
        """
        obs_tokens, value = self.encode(agents_view)
        features = action_features(action, self.num_actions, self.continuous)  # (M, N, 1 + A)
        nobody = jnp.zeros_like(features[:, :1]).at[..., 0].set(1.0)
        previous = jnp.concatenate([nobody, features[:, :-1]], axis=1)  # j gets that of j - 1
        x = self.action_embed(rearrange(previous, "m n f -> (m n) f"))
        for block in self.decoder:
            x = block(x, obs_tokens)
        logits = rearrange(self.policy_head(x), "(m n) a -> m n a", n=self.num_agents)
        return logits, value

    def init_hidden(self, batch_size: int) -> list:
        """What the decoder's blocks remember before the first agent decides."""
        return [block.init_hidden(batch_size) for block in self.decoder]

    def decode(self, obs_tokens: jax.Array, previous: jax.Array, hidden: list, agent: jax.Array):
        """Acting, one agent: obs_tokens (M, E), previous (M, 1 + A), see `action_features`.

        Returns logits (M, A) and the hidden state with this agent added. The cost of an agent grows
        linearly in N for mat, not at all for sable.
        """
        x = self.action_embed(previous)
        new_hidden = []
        for block, block_hidden in zip(self.decoder, hidden):
            x, block_hidden = block.decode(x, obs_tokens, block_hidden, agent)
            new_hidden.append(block_hidden)
        return self.policy_head(x), new_hidden


class Learner(nn.Module):
    """pi: one MLP for all agents, each of which sees its own observation alone, its id in it."""

    num_actions: int
    hidden_dim: int
    continuous: bool = False

    @nn.compact
    def __call__(self, agents_view: jax.Array) -> jax.Array:
        """agents_view (..., O) -> logits (..., A)."""
        x = rearrange(agents_view, "... o -> (...) o")
        x = nn.relu(nn.Dense(self.hidden_dim, kernel_init=orthogonal(math.sqrt(2)))(x))
        x = nn.relu(nn.Dense(self.hidden_dim, kernel_init=orthogonal(math.sqrt(2)))(x))
        logits = nn.Dense(self.num_actions, kernel_init=orthogonal(0.01))(x)
        if self.continuous:
            logits = AppendLogStd()(logits)
        return logits.reshape(*agents_view.shape[:-1], -1)


# -------------------- Policies --------------------------------------------------------------------
class SquashedGaussian(distrax.Independent):
    """Continuous actions: a Gaussian over u (..., A), where tanh(u) in [-1, 1] is what is done.

    D17: all deal in u but the environment and agents that are told of it. The derivative of tanh is
    the same for two policies, so it cancels in their ratios and KL, and nothing overflows where
    tanh saturates. It counts in the entropy alone, which is that of tanh(u): H(u) + E[log
    tanh'(u)], by quadrature (off by 1e-3 at std 1). log std is a parameter for each component of an
    action, the same in every state.
    """

    def entropy(self):
        nodes, weights = np.polynomial.hermite_e.hermegauss(8)
        gaussian = self.distribution
        u = gaussian.loc[..., None] + gaussian.scale[..., None] * nodes  # (..., A, 8)
        log_slope = 2 * (math.log(2) - u - nn.softplus(-2 * u))  # log(1 - tanh(u) ** 2)
        mean_log_slope = jnp.sum(log_slope * (weights / np.sum(weights)), axis=-1)
        return super().entropy() + jnp.sum(mean_log_slope, axis=-1)


def action_distribution(logits: jax.Array, action_mask: jax.Array) -> distrax.Distribution:
    """The policies of the agents, (..., A). Illegal actions have probability 0.

    For continuous actions the "logits" are mean and log std, (..., 2 A), and nothing is illegal.
    """
    if logits.shape[-1] == 2 * action_mask.shape[-1]:
        mean, log_std = jnp.split(logits, 2, axis=-1)
        std = jnp.exp(jnp.clip(log_std, *LOG_STD_BOUNDS))
        return SquashedGaussian(distrax.Normal(mean, std), reinterpreted_batch_ndims=1)
    return distrax.Categorical(logits=jnp.where(action_mask, logits, -1e9), dtype=jnp.int32)


def guider_act(guider: Guider, params: Any, obs: Observation, key: jax.Array, greedy=False):
    """Decides agent after agent, each knowing the actions before it: obs (B, N, ...).

    Returns action (B, N, ..), log_prob (B, N), value (B, N).
    """
    batch_size, num_agents, _ = obs.agents_view.shape
    obs_tokens, value = guider.apply(params, obs.agents_view, method="encode")

    def decide(carry, inputs):
        previous, hidden = carry
        agent, key, token, action_mask = inputs
        logits, hidden = guider.apply(params, token, previous, hidden, agent, method="decode")
        policy = action_distribution(logits, action_mask)
        action = policy.mode() if greedy else policy.sample(seed=key)
        previous = action_features(action, guider.num_actions, guider.continuous)
        return (previous, hidden), (action, policy.log_prob(action))

    nobody = jnp.zeros((batch_size, 1 + guider.num_actions)).at[:, 0].set(1.0)
    hidden = guider.apply(params, batch_size, method="init_hidden")
    keys = jax.random.split(key, num_agents)
    tokens = rearrange(obs_tokens, "(b n) e -> n b e", n=num_agents)
    action_mask = rearrange(obs.action_mask, "b n a -> n b a")
    by_agent = (jnp.arange(num_agents), keys, tokens, action_mask)
    _, (action, log_prob) = jax.lax.scan(decide, (nobody, hidden), by_agent)
    action = rearrange(action, "n b ... -> b n ...")
    return action, rearrange(log_prob, "n b -> b n"), value


def learner_act(learner: Learner, params: Any, obs: Observation, key: jax.Array, greedy=False):
    """All agents at once, each from its own observation: obs (B, N, ...) -> action (B, N, ..)."""
    policy = action_distribution(learner.apply(params, obs.agents_view), obs.action_mask)
    return policy.mode() if greedy else policy.sample(seed=key)


# -------------------- Containers ------------------------------------------------------------------
class Pair(NamedTuple):
    """One for each network: parameters, gradients, optimizers or their states."""

    guider: Any
    learner: Any


class Transition(NamedTuple):
    """One step; a rollout stacks them to (T, B, ...)."""

    obs: Observation
    action: jax.Array  # (N,) int32, or (N, A) float32 if continuous, before tanh
    behaviour_log_prob: jax.Array  # (N,) of the guider that acted, mu_old
    value: jax.Array  # (N,)
    reward: jax.Array  # (N,)
    discount: jax.Array  # (), 0 where the episode terminated
    last: jax.Array  # () bool, the episode ended
    next_obs: Observation  # what followed the action, before any reset


class Minibatch(NamedTuple):
    """What the losses read, (M, ...)."""

    obs: Observation
    action: jax.Array  # (M, N) int32, or (M, N, A) float32
    behaviour_log_prob: jax.Array  # (M, N)
    value: jax.Array  # (M, N) at collection
    advantage: jax.Array  # (M, N)
    value_target: jax.Array  # (M, N)


class TrainState(NamedTuple):
    """What one iteration hands to the next, on each device."""

    params: Pair
    opt_state: Pair
    env_state: Any  # (B, ...)
    obs: Observation  # (B, N, ...)
    running_return: jax.Array  # (B,) of the episodes under way
    running_length: jax.Array  # (B,)
    key: jax.Array


# -------------------- The algorithm, as pure functions --------------------------------------------
def gae(reward, value, next_value, discount, last, gamma, gae_lambda):
    """Generalised advantage estimation (arXiv 1506.02438) -> advantage, value_target (T, B, N).

    reward, value, next_value: (T, B, N); discount, last: (T, B).
    D8: at a time limit that the environment signals as truncation (last, but discount 1) the value
    of the true last observation is used. The official code takes every end for a termination.
    """

    def backwards(next_advantage, step):
        reward, value, next_value, discount, last = step
        error = reward + gamma * discount[:, None] * next_value - value
        trace = gamma * gae_lambda * (1.0 - last[:, None])
        advantage = error + trace * next_advantage
        return advantage, advantage

    steps = (reward, value, next_value, discount, last)
    _, advantage = jax.lax.scan(backwards, jnp.zeros_like(value[0]), steps, reverse=True)
    return advantage, advantage + value


def double_clip(guider_log_prob, learner_log_prob, behaviour_log_prob, delta, clip_coef):
    """The guider's ratio mu / mu_old, clipped twice (Eq. 9): to the tether, then as in PPO.

    D9: clip(mu / pi, 1 / delta, delta) * pi, in log space: the nearest log-probability within the
    tether. For delta = inf it is mu itself, to the bit. No gradient goes to the learner.
    A clip that bites stops the gradient, but the minimum in `guider_loss` may take the plain ratio:
    with mu = 0.3, pi = 0.1, mu_old = 0.5, delta = 1.5 and A > 0 it is 0.6, below the clipped 0.8,
    and pushes mu further out. There `backtrack_loss` pulls, here more weakly; mu comes back once
    mu_old is out, too, where the clip stops the push (docs/reading_group.md).
    """
    center = jax.lax.stop_gradient(learner_log_prob)
    reach = math.log(delta)
    tethered = jnp.clip(guider_log_prob, center - reach, center + reach)
    ratio = jnp.exp(tethered - behaviour_log_prob)
    return jnp.clip(ratio, 1 - clip_coef, 1 + clip_coef)


def kl_mask(guider_log_prob, learner_log_prob, delta):
    """True beyond the end of the tether, for the action taken: mu / pi > delta or < 1 / delta."""
    return jnp.abs(guider_log_prob - learner_log_prob) > math.log(delta)


def guider_loss(ratio, clipped_ratio, advantage):
    """The guider's PPO loss: mean over samples and agents of -min(r * A, clipped r * A).

    Each agent has a ratio of its own, of its conditional policy, although action and reward are
    joint: the product of N ratios would leave PPO's clip after ever smaller steps. This is the
    sequential update of Corollary 4.2, done for all agents at once.
    """
    return -jnp.mean(jnp.minimum(ratio * advantage, clipped_ratio * advantage))


def value_loss(value, old_value, value_target, clip_coef, clip_vloss):
    """0.5 * mean squared error of the values; with clip_vloss the larger of it and clipped one."""
    error = jnp.square(value - value_target)
    if clip_vloss:
        clipped_value = old_value + jnp.clip(value - old_value, -clip_coef, clip_coef)
        error = jnp.maximum(error, jnp.square(clipped_value - value_target))
    return 0.5 * jnp.mean(error)


def learner_loss(guider_policy, learner_policy, ratio, advantage, clip_coef):
    """The two terms of the learner's loss (Eq. 10), unweighted: KL(mu || pi), and its PPO loss.

    guider_policy: as it is now, without gradient.
    ratio: pi / mu_old. The advantage is the guider's, who collected the data; the tether keeps pi
    near enough for it to serve both. Theorem 4.1 minimises KL(pi || mu), which picks one solution;
    the code, as the official one, KL(mu || pi), which averages solutions and leaves it to the
    tether to part them (tests/test_theory.py). So improvement is not guaranteed.
    """
    kl = jnp.mean(guider_policy.kl_divergence(learner_policy))
    clipped_ratio = jnp.clip(ratio, 1 - clip_coef, 1 + clip_coef)
    policy_loss = -jnp.mean(jnp.minimum(ratio * advantage, clipped_ratio * advantage))
    return kl, policy_loss


def backtrack_loss(guider_policy, learner_policy, mask):
    """KL(mu || pi) where the mask is on, as a mean over all samples (Eq. 9); it moves mu alone."""
    return jnp.mean(mask * guider_policy.kl_divergence(learner_policy))


def normalise(x: jax.Array) -> jax.Array:
    """To mean 0 and variance 1 over the minibatches of all devices together."""
    mean = jax.lax.pmean(jnp.mean(x), "device")
    variance = jax.lax.pmean(jnp.mean(jnp.square(x - mean)), "device")
    return (x - mean) / (jnp.sqrt(variance) + 1e-8)


# -------------------- One iteration ---------------------------------------------------------------


def begin_next_step(
    state: TrainState, env_state: Any, outcome: Outcome, pool: Any, num_ended: jax.Array
) -> Tuple[TrainState, dict]:
    """Starts anew where an episode ended -> state, sums over the episodes that ended.

    D11: fresh starts come from a pool of B made once per rollout, because a reset inside the step
    would be computed for every environment in every step. The k-th episode that ends is followed
    by entry k; if more than B end, the entries are used again from the first on.
    pool: start states and observations (B, ...); num_ended: episodes that ended earlier in the
    rollout.
    """
    last = outcome.last
    # The number of each ended episode, from 0; what the others get here is never used.
    entry = (num_ended + jnp.cumsum(last) - 1) % last.shape[0]

    def replace_ended(fresh, current):
        return jax.vmap(jnp.where)(last, fresh[entry], current)

    env_state, obs = jax.tree.map(replace_ended, pool, (env_state, outcome.obs))

    running_return = state.running_return + jnp.mean(outcome.reward, axis=1)
    running_length = state.running_length + 1
    sums = {"return": jnp.sum(running_return * last), "length": jnp.sum(running_length * last)}
    sums["number"] = jnp.sum(last)
    state = state._replace(env_state=env_state, obs=obs)
    state = state._replace(running_return=running_return * ~last)
    state = state._replace(running_length=running_length * ~last)
    return state, sums


def collect(
    args: Args, env: TeamEnv, guider: Guider, state: TrainState
) -> Tuple[TrainState, Transition, dict]:
    """Plays T steps in B environments -> state, rollout (T, B, ...), sums over ended episodes.

    """
    key, pool_key, act_key = jax.random.split(state.key, 3)
    batch_size = state.running_length.shape[0]
    pool = jax.vmap(env.reset)(jax.random.split(pool_key, batch_size))

    def step(carry, key):
        state, num_ended = carry
        # STEP 1/4: the guider acts
        action, log_prob, value = guider_act(guider, state.params.guider, state.obs, key)
        env_state, outcome = jax.vmap(env.step)(state.env_state, action)
        last = outcome.last
        before = (state.obs, action, log_prob, value)
        after = (outcome.reward, outcome.discount, last, outcome.obs)
        transition = Transition(*before, *after)
        state, sums = begin_next_step(state, env_state, outcome, pool, num_ended)
        num_ended += jnp.sum(last, dtype=jnp.int32)
        return (state, num_ended), (transition, sums)

    carry = (state._replace(key=key), jnp.zeros((), jnp.int32))
    keys = jax.random.split(act_key, args.num_steps)
    (state, _), (rollout, sums) = jax.lax.scan(step, carry, keys)
    return state, rollout, jax.tree.map(lambda x: jnp.sum(x, dtype=jnp.float32), sums)


def minibatch_loss(params: Pair, args: Args, guider: Guider, learner: Learner, mb: Minibatch):
    """Steps 2 to 4 on one minibatch -> total loss, dict of its parts.

    Per sample and agent, for the action taken, with r = mu / mu_old:
    Eq. 9   mean[-min(r A, double_clip A)] + mean[mask KL(mu || pi)] - ent_coef H + vf_coef L_value
    Eq. 10  mean[KL(mu || pi)] + lambda mean[-min(rho A, clip(rho) A)] with rho = pi / mu_old
    D10: one forward pass of each network serves all terms. The first line moves the guider alone,
    the second the learner, because each reads the other's policy through a stop_gradient.
    """
    guider_logits, value = guider.apply(params.guider, mb.obs.agents_view, mb.action)
    learner_logits = learner.apply(params.learner, mb.obs.agents_view)
    guider_policy = action_distribution(guider_logits, mb.obs.action_mask)
    learner_policy = action_distribution(learner_logits, mb.obs.action_mask)
    guider_log_prob = guider_policy.log_prob(mb.action)  # (M, N)
    learner_log_prob = learner_policy.log_prob(mb.action)  # (M, N)
    advantage = normalise(mb.advantage) if args.norm_adv else mb.advantage

    # STEP 2/4: the guider improves
    log_ratio = guider_log_prob - mb.behaviour_log_prob
    ratio = jnp.exp(log_ratio)
    clipped_ratio = double_clip(
        guider_log_prob, learner_log_prob, mb.behaviour_log_prob, args.delta, args.clip_coef)
    guider_policy_loss = guider_loss(ratio, clipped_ratio, advantage)
    guider_entropy = jnp.mean(guider_policy.entropy())
    critic_loss = value_loss(value, mb.value, mb.value_target, args.clip_coef, args.clip_vloss)
    loss = guider_policy_loss - args.ent_coef * guider_entropy + args.vf_coef * critic_loss

    # STEP 3/4: the learner follows
    fixed_guider_policy = jax.lax.stop_gradient(guider_policy)
    learner_ratio = jnp.exp(learner_log_prob - mb.behaviour_log_prob)
    learner_kl, learner_policy_loss = learner_loss(
        fixed_guider_policy, learner_policy, learner_ratio, advantage, args.clip_coef)
    loss += learner_kl + args.learner_rl_coef * learner_policy_loss

    # STEP 4/4: the guider backtracks, where it is beyond the tether's end
    fixed_learner_policy = jax.lax.stop_gradient(learner_policy)
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
    args: Args, rollout: Transition, advantage, value_target, key: jax.Array
) -> Tuple[Minibatch, jax.Array]:
    """All samples (T * B, ...), and indices (epochs * minibatches, M), permuted in each epoch."""
    collected = (rollout.obs, rollout.action, rollout.behaviour_log_prob, rollout.value)
    samples = Minibatch(*collected, advantage, value_target)
    samples = jax.tree.map(lambda x: rearrange(x, "t b ... -> (t b) ..."), samples)
    number = samples.action.shape[0]
    keys = jax.random.split(key, args.update_epochs)
    order = jax.vmap(lambda key: jax.random.permutation(key, number))(keys)
    indices = rearrange(order, "epoch (mb m) -> (epoch mb) m", mb=args.num_minibatches)
    return samples, indices


def train_iteration(
    args: Args, env: TeamEnv, guider: Guider, learner: Learner, optimizers: Pair, state: TrainState
) -> Tuple[TrainState, dict]:
    """One rollout and all updates from it -> state, metrics to add up over iterations.

    It runs on each device of the pmap axis "device", which shares gradients and metrics.
    """
    state, rollout, episodes = collect(args, env, guider, state)

    # One pass of the encoder gives every next value, also those of the true last observations.
    next_view = rearrange(rollout.next_obs.agents_view, "t b n o -> (t b) n o")
    _, next_value = guider.apply(state.params.guider, next_view, method="encode")
    next_value = rearrange(next_value, "(t b) n -> t b n", t=args.num_steps)
    steps = (rollout.reward, rollout.value, next_value, rollout.discount, rollout.last)
    advantage, value_target = gae(*steps, args.gamma, args.gae_lambda)

    key, shuffle_key = jax.random.split(state.key)
    samples, indices = make_minibatches(args, rollout, advantage, value_target, shuffle_key)

    def update(carry, index):
        params, opt_state = carry
        mb = jax.tree.map(lambda x: x[index], samples)
        grads, losses = jax.grad(minibatch_loss, has_aux=True)(params, args, guider, learner, mb)
        grads, losses = jax.lax.pmean((grads, losses), "device")
        losses["guider_grad_norm"] = optax.tree.norm(grads.guider)
        losses["learner_grad_norm"] = optax.tree.norm(grads.learner)
        # D12: an optimizer each, so that neither's gradient norm scales the other's step.
        guider_step, guider_opt = optimizers.guider.update(grads.guider, opt_state.guider)
        learner_step, learner_opt = optimizers.learner.update(grads.learner, opt_state.learner)
        params = optax.apply_updates(params, Pair(guider_step, learner_step))
        return (params, Pair(guider_opt, learner_opt)), losses

    carry = (state.params, state.opt_state)
    (params, opt_state), losses = jax.lax.scan(update, carry, indices)  # losses: (updates,) each
    state = state._replace(params=params, opt_state=opt_state, key=key)

    num_finite = jax.tree.map(lambda x: jnp.sum(jnp.isfinite(x), dtype=jnp.float32), losses)
    means = jax.tree.map(jnp.mean, losses)
    del means["ratio"]
    means["first_ratio"] = losses["ratio"][0]  # 1 as long as acting and training agree
    # value_target - value is the advantage, so its variance is what the values leave unexplained.
    unexplained = jax.lax.pmean(jnp.var(advantage), "device")
    total = jax.lax.pmean(jnp.var(value_target), "device")
    means["explained_variance"] = 1 - unexplained / (total + 1e-8)
    episodes = jax.lax.psum(episodes, "device")
    return state, {"losses": means, "num_finite": num_finite, "episodes": episodes}


# -------------------- Evaluation ------------------------------------------------------------------
MAX_EPISODE_STEPS = 10_000  # evaluation gives up on longer episodes; raise it if yours are longer


class Episodes(NamedTuple):
    """Episodes played, each field (num_episodes,) float32."""

    returns: jax.Array
    length: jax.Array  # steps
    won: jax.Array  # 1 where won
    ended: jax.Array  # 0 where the episode went on after MAX_EPISODE_STEPS


def play(env: TeamEnv, act: Callable, num_episodes: int, key: jax.Array) -> Episodes:
    """Plays whole episodes, all at once, without auto-reset, until the last of them ends.

    act(obs, key) -> action (num_episodes, N).
    """
    key, reset_key = jax.random.split(key)
    env_state, obs = jax.vmap(env.reset)(jax.random.split(reset_key, num_episodes))
    zeros = jnp.zeros(num_episodes)

    def goes_on(carry):
        episodes, step_count, *_ = carry
        return ~jnp.all(episodes.ended) & (step_count < MAX_EPISODE_STEPS)

    def step(carry):
        episodes, step_count, env_state, obs, key = carry
        key, act_key = jax.random.split(key)
        env_state, outcome = jax.vmap(env.step)(env_state, act(obs, act_key))
        running = 1.0 - episodes.ended
        reward = jnp.mean(outcome.reward, axis=1)  # may be NaN once the episode has ended
        returns = episodes.returns + jnp.where(episodes.ended, 0.0, reward)
        length = episodes.length + running
        won = episodes.won + running * outcome.won
        ended = jnp.maximum(episodes.ended, outcome.last)
        episodes = Episodes(returns, length, won, ended)
        return episodes, step_count + 1, env_state, outcome.obs, key

    carry = (Episodes(zeros, zeros, zeros, zeros), 0, env_state, obs, key)
    episodes, *_ = jax.lax.while_loop(goes_on, step, carry)
    return episodes


def evaluate(
    args: Args, env: TeamEnv, guider: Guider, learner: Learner, params: Pair, key: jax.Array
) -> Tuple[Episodes, Episodes]:
    """Plays eval_episodes / D episodes with learner and guider each, from the same start states."""

    def act_as_learner(obs, key):
        return learner_act(learner, params.learner, obs, key, args.eval_greedy)

    def act_as_guider(obs, key):
        action, _, _ = guider_act(guider, params.guider, obs, key, args.eval_greedy)
        return action

    num_episodes = args.eval_episodes // args.num_devices
    learner_episodes = play(env, act_as_learner, num_episodes, key)
    guider_episodes = play(env, act_as_guider, num_episodes, key)
    return learner_episodes, guider_episodes


# -------------------- Setup -----------------------------------------------------------------------
def make_networks(args: Args, env: TeamEnv) -> Tuple[Guider, Learner]:
    sizes = (args.num_heads, args.num_blocks, args.embed_dim)
    guider = Guider(args.guider, env.num_agents, env.num_actions, *sizes, env.continuous)
    learner = Learner(env.num_actions, args.learner_hidden_dim, env.continuous)
    return guider, learner


def learning_rate(args: Args, iteration: int) -> Any:
    """The learning rate in an iteration, counted from 0."""
    if not args.anneal_lr:
        return args.learning_rate
    num_iterations = args.total_timesteps // (args.num_envs * args.num_steps)
    return args.learning_rate * (1 - iteration / num_iterations)


def make_optimizers(args: Args) -> Pair:
    """Adam for guider and learner, each behind a clip of its gradient's norm."""

    def schedule(num_updates):
        return learning_rate(args, num_updates // (args.update_epochs * args.num_minibatches))

    clip = optax.clip_by_global_norm(args.max_grad_norm)
    optimizer = optax.chain(clip, optax.adam(schedule, eps=1e-5))
    return Pair(guider=optimizer, learner=optimizer)


def init_state(
    args: Args, env: TeamEnv, guider: Guider, learner: Learner, optimizers: Pair, params_key, key
) -> TrainState:
    """The state of one device before the first iteration.

    params_key is the same on all devices. D13: key is another on each, for environments, actions
    and minibatches.
    """
    key, reset_key = jax.random.split(key)
    batch_size = args.num_envs // args.num_devices
    env_state, obs = jax.vmap(env.reset)(jax.random.split(reset_key, batch_size))
    guider_key, learner_key = jax.random.split(params_key)
    first_view = obs.agents_view[:1]
    no_action = env.no_action[None]
    guider_params = guider.init(guider_key, first_view, no_action)
    learner_params = learner.init(learner_key, first_view)
    params = Pair(guider_params, learner_params)
    opt_state = Pair(optimizers.guider.init(guider_params), optimizers.learner.init(learner_params))
    zeros = jnp.zeros(batch_size)
    return TrainState(params, opt_state, env_state, obs, zeros, zeros, key)


# -------------------- Saving and resuming ---------------------------------------------------------
CHECKPOINT_FORMAT = 1
MAY_CHANGE = (  # flags that may differ from those of the run that --resume goes on with
    "total_timesteps", "num_evals", "eval_episodes", "eval_greedy", "save", "cache", "dry_run",
    "track", "wandb_project_name", "wandb_entity", "resume", "distributed")


class RunError(Exception):
    """Training cannot go on; its text is the one line that the user sees."""


@dataclasses.dataclass
class Progress:
    """How far a run has come; a checkpoint holds it beside the state."""

    iteration: int = 0  # iterations done
    last_eval: int = -1  # the iteration after which the last evaluation was; -1: none yet
    best_return: float = -math.inf  # of the learner, in any evaluation
    interval_seconds: float = 0.0  # of training since the last evaluation
    compile_seconds: float = 0.0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    metrics_bytes: int = 0  # length of metrics.jsonl, on the process that logs


class StopSignal:
    """Notes Ctrl-C or SIGTERM, so that training ends in good order; the same again kills it."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # as a background job ignores Ctrl-C
                signal.signal(number, self.note)

    def note(self, number: int, frame: Any) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def is_set(self) -> bool:
        """Whether any process was told to stop; on several hosts all must ask at the same time."""
        number = self.number
        if jax.process_count() > 1:
            number = int(np.max(multihost_utils.process_allgather(np.array(number))))
        if number != 0:
            self.number = number  # never back to 0: a signal may have come in meanwhile
        return number != 0


def write_whole(path: str, data: bytes) -> None:
    """Writes a file so that at any moment the old or the new one is there, whole, or RunError."""
    try:
        with open(path + ".new", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".new", path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error


def save_networks(folder: str, prefix: str, params: Pair) -> None:
    """Writes the parameters (D, ...) of each network to {prefix}{network}.safetensors.

    Arrays have flat names such as params,Dense_0,kernel (JaxMARL's convention), and can be read
    without JAX.
    """
    for network, tree in params._asdict().items():
        flat = flatten_dict(tree, sep=",")
        arrays = {name: np.ascontiguousarray(np.asarray(x)[0]) for name, x in flat.items()}
        path = os.path.join(folder, f"{prefix}{network}.safetensors")
        write_whole(path, safetensors.numpy.save(arrays))


def find_checkpoints(folder: str) -> dict:
    """The checkpoints of this process, {iterations done: path}."""
    found = {}
    for name in os.listdir(folder):
        match = re.fullmatch(rf"checkpoint_(\d+)_{jax.process_index()}\.npz", name)
        if match:
            found[int(match[1])] = os.path.join(folder, name)
    return found


def save_checkpoint(folder: str, tree: Any, progress: Progress) -> None:
    """Writes a tree of arrays and the progress as a zip of arrays, each with its checksum.

    Earlier checkpoints are removed once the new one is whole, on several hosts that of every host.
    """
    about = {"format": CHECKPOINT_FORMAT, "progress": dataclasses.asdict(progress)}
    file = io.BytesIO()
    np.savez(file, *jax.tree.leaves(tree), about=json.dumps(about))
    path = os.path.join(folder, f"checkpoint_{progress.iteration}_{jax.process_index()}.npz")
    write_whole(path, file.getvalue())
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("every process has saved")
    for earlier in set(find_checkpoints(folder).values()) - {path}:
        os.remove(earlier)


def load_checkpoint(folder: str, like: Any) -> Tuple[Any, Progress]:
    """Reads a tree of the structure, shapes and types of `like`, and the progress.

    Raises FlagError if the newest checkpoint is missing, damaged, newer, or does not fit.
    """
    paths = find_checkpoints(folder)
    newest = max(paths, default=-1)
    if jax.process_count() > 1:
        newest = int(np.min(multihost_utils.process_allgather(np.array(newest))))
    if newest not in paths:
        why = "it was made with --no-save, or stopped before its first evaluation"
        raise FlagError(f"--resume {folder}: has no checkpoint: {why}")
    shapes, structure = jax.tree.flatten(like)
    try:
        with np.load(paths[newest]) as file:
            about = json.loads(str(file["about"]))
            if about["format"] > CHECKPOINT_FORMAT:
                raise ValueError("a newer version of this script wrote it")
            leaves = [file[f"arr_{i}"] for i in range(len(shapes))]
        for x, y in zip(leaves, shapes):
            if (x.shape, x.dtype) != (y.shape, y.dtype):
                raise ValueError(f"it has {x.dtype} {x.shape} in place of {y.dtype} {y.shape}")
        return jax.tree.unflatten(structure, leaves), Progress(**about["progress"])
    except Exception as error:  # a damaged file may raise about any
        reason = str(error).partition("\n")[0]
        raise FlagError(f"--resume: cannot use {paths[newest]}: {reason}") from error


def parse_args() -> Args:
    """Reads the flags; with --resume those of the run are the defaults, and few may differ.

    Raises FlagError on a folder that is no run of this script, or another value of a flag.
    """
    args = tyro.cli(Args)
    if not args.resume:
        return args
    try:
        with open(os.path.join(args.resume, "args.json")) as file:
            about = json.load(file)
        script, saved = about["script"], about["args"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise FlagError(f"--resume {args.resume}: is no run's folder: {error}") from error
    if script != os.path.basename(__file__):
        raise FlagError(f"--resume {args.resume}: is a run of {script}")
    unknown = saved.keys() - {field.name for field in dataclasses.fields(Args)}
    if unknown:
        raise FlagError(f"--resume {args.resume}: has a flag that is unknown here: {min(unknown)}")
    of_the_run = Args(**saved | {"resume": args.resume, "dry_run": False})
    args = tyro.cli(Args, default=of_the_run)
    for name, value in dataclasses.asdict(of_the_run).items():
        if name not in MAY_CHANGE and getattr(args, name) != value:
            allowed = ", ".join(MAY_CHANGE).replace("_", "-")
            rule = f"the run has {value}, and only these may change: {allowed}"
            raise FlagError(f"--{name.replace('_', '-')} {getattr(args, name)}: {rule}")
    return args


# -------------------- Logging ---------------------------------------------------------------------
def check_finite(args: Args, sums: dict, progress: Progress) -> None:
    """Raises RunError, with the term and the iteration, on a loss that was not finite.

    sums: of metrics (D, ...) since the last evaluation. Such a loss is taken to stay so, which
    dates it by the number of updates before.
    """
    num_updates = args.update_epochs * args.num_minibatches
    start = max(progress.last_eval, 0)
    num_finite = {name: int(np.asarray(x)[0]) for name, x in sums["num_finite"].items()}
    worst = min(num_finite, key=num_finite.get)
    if num_finite[worst] < (progress.iteration - start) * num_updates:
        failed = start + num_finite[worst] // num_updates + 1
        raise RunError(f"losses/{worst} is not finite in iteration {failed}")


def train_row(args: Args, metrics: dict, iteration: int, interval: int) -> dict:
    """Metrics summed over `interval` iterations that began after `iteration` -> values to log."""
    row = {f"losses/{name}": total / interval for name, total in metrics["losses"].items()}
    row["charts/learning_rate"] = learning_rate(args, iteration + interval - 1)
    episodes = metrics["episodes"]
    row["charts/num_episodes"] = episodes["number"]
    if episodes["number"] > 0:
        row["charts/episodic_return"] = episodes["return"] / episodes["number"]
        row["charts/episodic_length"] = episodes["length"] / episodes["number"]
    return row


def eval_row(learner_episodes: Episodes, guider_episodes: Episodes, has_win_rate: bool) -> dict:
    """The evaluation's episodes -> values to log; RunError if one of them has not ended."""
    ended = np.concatenate([learner_episodes.ended, guider_episodes.ended], axis=None)
    if not np.all(ended):
        endless = f"{np.sum(ended == 0)} of {ended.size} episodes have not ended"
        raise RunError(f"evaluation: {endless} after {MAX_EPISODE_STEPS} steps")
    row = {"eval/learner_return": np.mean(learner_episodes.returns)}
    row["eval/learner_return_std"] = np.std(learner_episodes.returns)
    row["eval/guider_return"] = np.mean(guider_episodes.returns)
    row["eval/imitation_gap"] = row["eval/guider_return"] - row["eval/learner_return"]
    row["eval/episodic_length"] = np.mean(learner_episodes.length)
    if has_win_rate:
        row["eval/win_rate"] = np.mean(learner_episodes.won)
    return row


def plot_learning_curve(rows: list, title: str) -> bytes:
    """Draws the returns of guider and learner over environment steps -> a PNG."""
    from matplotlib.figure import Figure  # not pyplot, which would look for a display

    fig = Figure(figsize=(7, 4.2), layout="constrained")
    ax = fig.add_subplot()
    ax.set(title=title, xlabel="environment steps", ylabel="return per evaluation episode")
    steps = [row["global_step"] for row in rows]
    guider_return = [row["eval/guider_return"] for row in rows]
    learner_return = [row["eval/learner_return"] for row in rows]
    ax.plot(steps, guider_return, "--", label="guider, centralized")
    ax.plot(steps, learner_return, "-", label="learner, decentralized")
    ax.grid(alpha=0.3)
    ax.legend()
    file = io.BytesIO()
    fig.savefig(file, dpi=150)
    return file.getvalue()


class Logger:
    """The run's folder, metrics.jsonl, Weights & Biases and the terminal; the same keys everywhere.

    Of several processes the first alone logs.
    """

    def __init__(self, args: Args):
        """Makes the folder; with --resume nothing is changed before `go_on`."""
        self.args = args
        self.is_main = jax.process_index() == 0
        self.rows = []
        self.wandb = None
        self.returns = ""
        self.next_line = time.time() + 60
        if args.resume:
            self.folder = os.path.normpath(args.resume)
        else:
            self.folder = os.path.join(args.run_dir, self.new_name())
            try:
                os.makedirs(self.folder, exist_ok=jax.process_count() > 1)
            except OSError as error:
                reason = f"cannot make {self.folder}: {error.strerror}"
                raise FlagError(f"--run-dir {args.run_dir}: {reason}") from error
        self.metrics_file = os.path.join(self.folder, "metrics.jsonl")
        quiet = not (self.is_main and sys.stderr.isatty())
        self.bar = tqdm(total=args.total_timesteps, unit="step", unit_scale=True, disable=quiet)
        self.bar.set_postfix_str("compiling")
        if self.is_main and not args.resume:
            write_whole(self.metrics_file, b"")
            self.open(wandb_id=None)

    def new_name(self) -> str:
        scenario = re.sub(r"[^\w.=-]", "_", self.args.scenario)
        env_id = re.sub(r"[^\w.=-]", "_", self.args.env_id)
        now = int(time.time())
        if jax.process_count() > 1:
            now = int(multihost_utils.broadcast_one_to_all(np.array(now)))
        return f"{env_id}__{scenario}__{self.args.exp_name}__{self.args.seed}__{now}"

    def open(self, wandb_id: Optional[str]) -> None:
        """Writes args.json, and begins tracking or goes on with it."""
        packages = ("jax", "flax", "optax", "distrax", "jumanji", "numpy")
        devices = jax.devices()[: self.args.num_devices]
        about = {
            "script": os.path.basename(__file__),
            "args": dataclasses.asdict(self.args),
            "command": " ".join(sys.argv),
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "devices": [device.device_kind for device in devices],
            "wandb_id": wandb_id,
        }
        if self.args.track:
            import wandb

            self.wandb = wandb.init(
                project=self.args.wandb_project_name, entity=self.args.wandb_entity, config=about,
                name=os.path.basename(self.folder), id=wandb_id, resume="allow", save_code=True,
                dir=self.folder)
            about["wandb_id"] = self.wandb.id
        about_file = os.path.join(self.folder, "args.json")
        write_whole(about_file, json.dumps(about, indent=2).encode())

    def go_on(self, progress: Progress) -> None:
        """After --resume: cuts off the rows that followed the checkpoint, for they come again."""
        if not self.is_main:
            return
        with open(os.path.join(self.folder, "args.json")) as file:
            wandb_id = json.load(file)["wandb_id"]
        try:
            with open(self.metrics_file, "rb+") as file:
                text = file.read(progress.metrics_bytes)
                if len(text) < progress.metrics_bytes:
                    raise ValueError(f"it lacks {progress.metrics_bytes - len(text)} bytes")
                self.rows = [json.loads(line) for line in text.splitlines()]
                file.truncate()
        except (OSError, ValueError) as error:
            raise FlagError(f"--resume: cannot use {self.metrics_file}: {error}") from error
        self.open(wandb_id)

    def begin(self, done: int, total: int) -> None:
        """Training begins: the time left is reckoned from here."""
        self.total = total
        self.bar.reset(total)
        self.bar.initial = done
        self.bar.update(done)

    def log(self, row: dict) -> int:
        """Adds an evaluation's row, everywhere under the same keys -> bytes written."""
        if not self.is_main:
            return 0
        row = {name: float(x) for name, x in row.items()}
        row["global_step"] = int(row["global_step"])
        self.rows.append(row)
        line = json.dumps(row) + "\n"
        try:
            with open(self.metrics_file, "a") as file:
                file.write(line)
        except OSError as error:
            raise RunError(f"cannot write {self.metrics_file}: {error.strerror}") from error
        if self.wandb:
            self.wandb.log(row, step=row["global_step"])
        self.returns = f"learner {row['eval/learner_return']:.2f}"
        self.returns += f"  guider {row['eval/guider_return']:.2f}"
        self.bar.set_postfix_str(self.returns)
        if self.bar.disable:
            speed = f"SPS {row.get('charts/SPS', 0):.0f}"
            print(f"global_step={row['global_step']}  {self.returns}  {speed}", flush=True)
            self.next_line = time.time() + 60
        return len(line)

    def update(self, num_steps: int, global_step: int, episodes: dict, speed: float) -> None:
        """Shows that num_steps more are done: in the bar, or as a line once a minute.

        episodes: sums over those that ended since the last evaluation; speed: steps per second.
        """
        self.bar.update(num_steps)
        if not self.is_main or (self.bar.disable and time.time() < self.next_line):
            return
        collecting = "no episode has ended"
        if episodes["number"][0] > 0:
            mean = float(episodes["return"][0] / episodes["number"][0])
            collecting = f"collecting {mean:.2f}"
        self.bar.set_postfix_str(f"{self.returns}  {collecting}")
        if self.bar.disable:
            minutes = (self.total - global_step) / speed / 60
            left = f"SPS {speed:.0f}  {minutes:.0f} min left"
            print(f"global_step={global_step}  {collecting}  {left}", flush=True)
            self.next_line = time.time() + 60

    def close(self) -> None:
        self.bar.close()
        if self.wandb:
            self.wandb.finish()
        if self.rows:
            path = os.path.join(self.folder, "learning_curve.png")
            title = os.path.basename(self.folder).rsplit("__", 1)[0]
            write_whole(path, plot_learning_curve(self.rows, title))
            print(f"metrics and learning curve: {self.folder}")


# -------------------- Training --------------------------------------------------------------------
def compile_ahead(function: Callable, *inputs: Any, options: Optional[dict] = None) -> Callable:
    """Compiles a pmapped function; with several processes its first call does, on its clock."""
    if jax.process_count() > 1:
        return function
    return function.lower(*inputs).compile(options)


def make_programs(args: Args, env: TeamEnv, devices: list) -> Tuple[Callable, Callable, Callable]:
    """What runs on the devices: init, iterate and play_episodes; leaves are (D, ...) in and out."""
    guider, learner = make_networks(args, env)
    optimizers = make_optimizers(args)
    init = functools.partial(init_state, args, env, guider, learner, optimizers)
    init = jax.pmap(init, in_axes=(None, 0), devices=devices)
    iterate = functools.partial(train_iteration, args, env, guider, learner, optimizers)
    iterate = jax.pmap(iterate, axis_name="device", devices=devices, donate_argnums=0)

    def evaluate_all(params: Pair, key: jax.Array) -> Tuple[Episodes, Episodes]:
        """The episodes of all devices, (D, eval_episodes / D), on each of them."""
        return jax.lax.all_gather(evaluate(args, env, guider, learner, params, key), "device")

    play_episodes = jax.pmap(evaluate_all, axis_name="device", devices=devices)
    return init, iterate, play_episodes


def own_keys(args: Args, key: jax.Array) -> jax.Array:
    """A key for each device; of those of all processes the ones of this process."""
    share = args.num_devices // jax.process_count()
    first = jax.process_index() * share
    return jax.random.split(key, args.num_devices)[first : first + share]


def start_or_resume(args: Args, init: Callable, iterate: Callable, params_key, keys, logger):
    """State (D, ...), metrics summed since the last evaluation, progress. May raise FlagError."""
    state = jax.eval_shape(init, params_key, keys)
    _, sums = jax.eval_shape(iterate, state)
    if args.resume:
        (state, sums), progress = load_checkpoint(logger.folder, (state, sums))
        logger.go_on(progress)
        return state, sums, progress
    fast = {"xla_backend_optimization_level": 0}  # for a program that runs once
    state = compile_ahead(init, params_key, keys, options=fast)(params_key, keys)
    sums = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), sums)
    return state, sums, Progress()


def end_interval(
    args: Args, env: TeamEnv, play_episodes: Callable, params: Pair, eval_key: jax.Array,
    sums: dict, progress: Progress,
) -> dict:
    """Evaluates -> the row of the interval that ends here; notes in progress that it has ended."""
    check_finite(args, sums, progress)
    steps_per_iteration = args.num_envs * args.num_steps
    row = {"global_step": progress.iteration * steps_per_iteration}
    interval_start = max(progress.last_eval, 0)
    interval = progress.iteration - interval_start
    if interval > 0:
        metrics = jax.tree.map(lambda x: np.asarray(x)[0], sums)
        row |= train_row(args, metrics, interval_start, interval)
        row["charts/SPS"] = interval * steps_per_iteration / progress.interval_seconds

    start = time.time()
    eval_keys = own_keys(args, jax.random.fold_in(eval_key, progress.iteration))
    episodes = play_episodes(params, eval_keys)
    episodes = jax.tree.map(lambda x: np.asarray(x)[0], episodes)  # (D, eval_episodes / D)
    row |= eval_row(*episodes, env.has_win_rate)
    progress.eval_seconds += time.time() - start
    progress.train_seconds += progress.interval_seconds
    row["time/compile_s"] = progress.compile_seconds
    row["time/train_s"] = progress.train_seconds
    row["time/eval_s"] = progress.eval_seconds
    progress.last_eval = progress.iteration
    progress.interval_seconds = 0.0
    return row


def train(args: Args, env: TeamEnv, devices: list, logger: Logger, stop: StopSignal) -> None:
    """Compiles, then alternates intervals of training with evaluation, logs and saves.

    Returns early, having saved, if told to stop. Raises FlagError if it cannot resume, RunError if
    it cannot go on.
    """
    steps_per_iteration = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // steps_per_iteration
    evals = range(1, args.num_evals + 1)
    eval_iterations = {math.ceil(num_iterations * i / args.num_evals) for i in evals}
    init, iterate, play_episodes = make_programs(args, env, devices)
    add = jax.jit(functools.partial(jax.tree.map, jnp.add))

    start = time.time()
    key, params_key, eval_key = jax.random.split(jax.random.PRNGKey(args.seed), 3)
    keys = own_keys(args, key)
    state, sums, progress = start_or_resume(args, init, iterate, params_key, keys, logger)
    iterate = compile_ahead(iterate, state)
    play_episodes = compile_ahead(play_episodes, state.params, keys)
    progress.compile_seconds += time.time() - start
    logger.begin(progress.iteration * steps_per_iteration, num_iterations * steps_per_iteration)

    for interval_end in [0] + sorted(eval_iterations):
        if interval_end <= progress.last_eval or interval_end < progress.iteration:
            continue
        while progress.iteration < interval_end and not stop.is_set():
            start = time.time()
            state, metrics = iterate(state)
            sums = add(sums, metrics)
            jax.block_until_ready(sums)  # so that the clock and the progress bar tell the truth
            seconds = time.time() - start
            progress.iteration += 1
            progress.interval_seconds += seconds
            global_step = progress.iteration * steps_per_iteration
            speed = steps_per_iteration / seconds
            logger.update(steps_per_iteration, global_step, sums["episodes"], speed)
        if stop.is_set():
            break

        row = end_interval(args, env, play_episodes, state.params, eval_key, sums, progress)
        progress.metrics_bytes += logger.log(row)
        sums = jax.tree.map(np.zeros_like, sums)
        is_best = row["eval/learner_return"] >= progress.best_return  # of equals the later one
        if is_best:
            progress.best_return = float(row["eval/learner_return"])
        if args.save and logger.is_main:
            save_networks(logger.folder, "", state.params)
            if is_best:
                save_networks(logger.folder, "best_", state.params)
        if args.save:
            save_checkpoint(logger.folder, (state, sums), progress)

    if args.save and stop.is_set():  # all processes ask: one alone would wait for the others
        check_finite(args, sums, progress)
        save_checkpoint(logger.folder, (state, sums), progress)


# -------------------- Main ------------------------------------------------------------------------
def main() -> int:
    """Parses and checks the flags, trains, and returns the exit status."""
    script = os.path.basename(__file__)
    status = 0
    stop = StopSignal()
    try:
        args = parse_args()
        check_args(args)
        start_jax(args)
        devices = choose_devices(args)
        env = make_env(args.env_id, args.scenario)
        task = f"{args.env_id} {args.scenario}".strip()
        kind = "components of an action" if env.continuous else "actions"
        team = f"{env.num_agents} agents, {env.num_actions} {kind}"
        hardware = f"{args.num_devices} x {devices[0].device_kind}"
        budget = f"{args.guider} guider, {args.total_timesteps} steps"
        print(f"{script}: {task}, {team}, {budget}, {hardware}")
        if args.dry_run:
            return 0
        logger = Logger(args)
        use_cache(args)
        try:
            train(args, env, devices, logger, stop)
        finally:
            logger.close()
        if stop.number:
            how = f"--resume {logger.folder} goes on" if args.save else "nothing was saved"
            print(f"{script}: interrupted, {how}", file=sys.stderr)
            status = 128 + stop.number
    except (FlagError, RunError) as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        status = 2 if isinstance(error, FlagError) else 1
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        print(f"{script}: error: another process is lost: {error}", file=sys.stderr)
        status = 1
    if status == 1 and jax.process_count() > 1:
        os._exit(status)  # a common exit would wait for the other processes
    return status


if __name__ == "__main__":
    sys.exit(main())
