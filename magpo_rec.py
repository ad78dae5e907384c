"""MAGPO, recurrent: Multi-Agent Guided Policy Optimization (arXiv 2507.18059) in one file.

    python magpo_rec.py --env-id RobotWarehouse-v0 --delta 1.5
    python magpo_rec.py --env-id CoordSum-v0 --scenario 3x10=10 --delta 1.1 --learner-rl-coef 4

Two policies are trained together, for a team of N agents of which each sees a part of the state:

- the guider mu is centralized and autoregressive: the agents decide one after the other, and each
  sees the observations o = (o_1, .., o_N) of all, so far, and the actions of those before it,
  mu(a | o) = prod_j mu(a_j | o, a_1, .., a_{j-1}). It explores, and PPO improves it;
- the learner pi is decentralized: each agent decides alone, from what it has seen itself so far,
  h_j, so pi(a | h) = prod_j pi(a_j | h_j). It follows the guider, and is what gets deployed.

A guider left alone finds strategies that no learner can follow. So it is tethered: for the actions
taken, mu / pi should stay within [1 / delta, delta]. An iteration has four steps:

    1. collect    the guider plays a rollout                           `collect`
    2. improve    the guider by PPO, its ratio clipped twice           `double_clip`, `ppo_loss`
    3. follow     the learner: KL(mu || pi) + lambda * its PPO loss    `minibatch_loss`
    4. backtrack  the guider by a KL, where it is beyond the tether    `minibatch_loss`

Steps 2 to 4 are one gradient step on each minibatch. To backtrack, no parameter is copied: the
double clip stops the PPO gradient that leads further out, and outside the KL pulls the guider back.

Memory (`diff magpo_ff.py magpo_rec.py`): the guider's retention decays over the steps of an episode
(`Mixer`), the learner has a GRU (`Learner`), which the guider may read. Both forget at timestep 0.
Minibatches hold rollouts, whose first hidden states are stale after the first gradient step.

Shapes in comments: T steps of a rollout, B environments on a device, M sequences of a minibatch, N
agents, A actions, O features of an observation, E width of the guider, H heads, C steps of a chunk,
K chunks of a rollout, F width of the learner, D devices, .. any axes. D1, D2, .. are details that
docs/details.md compares with the official code.
"""
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Literal, NamedTuple

import chex
import distrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas
import tyro
from einops import rearrange, repeat
from filelock import FileLock
from flax.linen.initializers import constant, normal, orthogonal
from flax.traverse_util import flatten_dict
from jax import Array, lax, random, tree, vmap
from jax.experimental import multihost_utils
from matplotlib.figure import Figure
from safetensors.numpy import save
from tqdm import tqdm

SCRIPT = Path(__file__).name


# -------------------- Flags -----------------------------------------------------------------------
@dataclasses.dataclass
class Args:  # tyro shows the comment behind a flag as its help; [in brackets]: the official name
    # The run
    exp_name: str = SCRIPT.removesuffix(".py")  # experiment, part of the folder's name
    seed: int = 1  # seed of parameters, environments, actions and minibatches
    run_dir: str = "runs"  # folder in which the run's own folder is made
    num_devices: int = 0  # devices to train on; 0: all there are, as always with --distributed
    distributed: bool = False  # this process is one of several, see docs/usage.md
    resume: str | None = None  # go on with the run in this folder, with its own flags
    dry_run: bool = False  # check all flags and the environment, and stop
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "magpo"  # Weights & Biases project; WANDB_ENTITY is the team
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
    clip_coef: float = 0.2  # epsilon: PPO's clip of the probability ratio [clip_eps]
    ent_coef: float = 0.01  # weight of the guider's entropy bonus; the learner has none
    vf_coef: float = 0.5  # weight of the value loss
    # The networks
    guider: Literal["sable", "mat"] = "sable"  # the guider mixes agents by retention or attention
    embed_dim: int = 64  # E: width of the guider [n_embd]
    num_heads: int = 1  # H: heads of the guider [n_head]
    num_blocks: int = 1  # blocks of the guider's encoder, and of its decoder [n_block]
    guider_mlp: bool = True  # an MLP in each block; Sable's official tuned rows are without
    guider_reads_learner: bool = False  # the guider reads what the learner's GRU remembers
    decay_scaling_factor: float = 0.8  # times the decay of sable's memory per step; 0: no memory
    chunk_steps: int = 0  # most steps of a chunk of sable's, for speed alone; 0: automatic
    learner_hidden_dim: int = 128  # F: width of the learner's three hidden layers, one a GRU


# -------------------- Environment -----------------------------------------------------------------
class Observation(NamedTuple):
    agents_view: Array  # (N, O) float32, the one-hot agent id first
    action_mask: Array  # (N, A) bool, True where legal; for continuous actions everywhere
    remembered: Any = None  # (N, F) what the learner's GRU remembers, which the guider may read


class EnvState(NamedTuple):  # of one game
    game: Any  # the environment's own state
    obs: Observation
    episode: dict  # so far, () float32 each: return, length (the timestep), 1 if it is won


class TeamEnv:
    """A cooperative Jumanji environment as the algorithm sees it: one game, without auto-reset.

    Its observations have agents_view (N, ..) and action_mask (N, A). Actions are (N,) integers, or
    real numbers where action_spec is (N, A). Optional in extras: "won" () bool, "true_reward" ().
    D1: the agent's one-hot id comes first in its view; the rest is passed on as it is.
    D2: each agent gets the sum of all rewards, or its own if the environment has own_rewards set.
    """

    def __init__(self, env):
        self.env = env
        _, timestep = jax.eval_shape(env.reset, random.PRNGKey(0))
        self.num_agents, self.num_actions = timestep.observation.action_mask.shape
        self.example_action = env.action_spec.generate_value()
        self.continuous = self.example_action.ndim == 2
        self.own_rewards = getattr(env, "own_rewards", False)
        self.has_win_rate = "won" in timestep.extras

    def observe(self, timestep):
        view = rearrange(timestep.observation.agents_view, "n ... -> n (...)")
        view = jnp.hstack([jnp.eye(self.num_agents), view])
        return Observation(view, timestep.observation.action_mask)

    def reset(self, key):
        game, timestep = self.env.reset(key)
        episode = dict.fromkeys(("return", "length", "won"), jnp.float32(0))
        return EnvState(game, self.observe(timestep), episode)

    def step(self, state, action):
        """action: (N,) int32 or (N, A) float32 -> EnvState, reward (N,), discount (), last ()."""
        game, timestep = self.env.step(state.game, action)
        last = timestep.last()
        reward = timestep.reward if self.own_rewards else jnp.sum(timestep.reward)
        reward = jnp.full(self.num_agents, reward, jnp.float32)
        # D3: an agent may be done, with discount 0, long before the team's episode is over (in
        # Connector: connected or stuck). The episode terminates once all discounts are 0.
        discount = jnp.where(last, timestep.discount.max(), 1.0)
        told = {"true_reward": jnp.mean(reward), "won": False} | timestep.extras
        now = {"return": told["true_reward"], "length": 1.0, "won": last & told["won"]}
        episode = tree.map(jnp.add, state.episode, now)
        return EnvState(game, self.observe(timestep), episode), reward, discount, last


def make_env(env_id, scenario):
    """Makes any environment by tasks.py, or without it one of Jumanji's that needs no adapter."""
    import jumanji  # here, because it starts JAX's backend, and the devices are set before that
    if find_spec("tasks"):
        import tasks
        with refusing(tasks.TaskError):
            return TeamEnv(tasks.make_trainable(env_id, scenario))
    if (env_id, scenario) != ("RobotWarehouse-v0", ""):
        refuse(f"--env-id {env_id} --scenario {scenario}: needs tasks.py and adapters.py")
    return TeamEnv(jumanji.make(env_id))


# -------------------- Networks --------------------------------------------------------------------
class Dense(nn.Dense):
    """A dense layer on (.., F). It flattens the samples, for a much faster gradient on a CPU."""
    kernel_init: Callable = orthogonal(math.sqrt(2))

    @nn.compact
    def __call__(self, x):
        flat = super().__call__(x.reshape(-1, x.shape[-1]))
        return flat.reshape(*x.shape[:-1], -1)


NORM = {"mat": nn.LayerNorm, "sable": nn.RMSNorm}


def timestep_encoding(timestep, embed_dim):
    """Sines and cosines of the steps since the episode began: (..) -> (.., E) (1706.03762)."""
    feature = jnp.arange(embed_dim)
    frequency = 10_000.0 ** -(2 * (feature // 2) / embed_dim)
    quarter_turn = jnp.pi / 2 * (feature % 2)  # makes every second sine a cosine
    return jnp.sin(timestep[..., None] * frequency + quarter_turn)


def decays(timestep, decay, chunk_steps, num_agents):
    """What each token of a chunk still sees of the past: timestep (M, T), decay (H,) per step.

    within (K, M, H, C * N, C * N): a token of step t sees those of step s of its chunk by
    decay ** (t - s), and 0 if s > t. before (K, M, H, C * N): it sees what the chunks before left
    by decay ** (t + 1).
    D14: step n of an episode sees n steps back, and so nothing of the episode before. With C = 3,
    one agent, and an episode that begins at the chunk's step 1, the rows being t and the columns s:

        within = 1    0    0      before = decay
                 0    1    0               0
                 0  decay  1               0
    """
    t = jnp.repeat(jnp.arange(chunk_steps), num_agents)  # (C * N,) the step of each token
    timestep = repeat(timestep, "m (k t) -> k m 1 (t n)", t=chunk_steps, n=num_agents)
    lag = t[:, None] - t  # t - s
    seen = (lag >= 0) & (lag <= timestep[..., None])
    within = jnp.where(seen, decay[:, None, None] ** jnp.maximum(lag, 0), 0.0)
    before = jnp.where(t < timestep, decay[:, None] ** (t + 1), 0.0)
    return within, before


class Mixer(nn.Module):
    """Lets agents read each other: by attention to those of the same step (mat, arXiv 2205.14953),
    which remembers nothing, or by retention over agents and time (sable, arXiv 2410.01706).
    Retention is attention with a decay per step in place of the softmax: token i of step t_i reads
    sum_j decay^(t_i - t_j) (q_i . k_j) v_j over all tokens j that it may see. The same is q_i S_i
    with a memory S, (E / H, E / H), that decays with each step and gains k_j v_j^T with each token.
    Training goes pair by pair within a chunk of C steps, and through S between chunks, at a cost
    linear in T; acting is a chunk of one step.
    D6: Sable's matrices start as normal(1 / E), each head has a norm, a gate reads what keys read.
    """
    kind: str
    num_heads: int
    decay_scaling_factor: float
    chunk_steps: int

    @nn.compact
    def __call__(self, x, source, timestep, memory, causal):
        """x reads source, (M, T, N, E) both; if causal, no agent reads later ones of its step.

        timestep (M, T); memory: S (M, H, E / H, E / H) before the first step.
        Returns tokens (M, T, N, E), memory after the last step.
        """
        num_steps, num_agents, embed_dim = x.shape[1:]
        is_mat = self.kind == "mat"
        start = orthogonal(0.01) if is_mat else normal(1 / embed_dim)
        dense = partial(Dense, embed_dim, use_bias=False, kernel_init=start)
        chunk_steps = 1 if is_mat else min(self.chunk_steps, num_steps)
        encoding = 0.0 if is_mat else timestep_encoding(timestep, embed_dim)[:, :, None]
        source += encoding

        def heads(name, tokens):
            tokens = dense(name=name)(tokens)
            by_chunk = "m (k t) n (h e) -> k m h (t n) e"
            return rearrange(tokens, by_chunk, h=self.num_heads, t=chunk_steps)

        queries = heads("query", x + encoding) / math.sqrt(embed_dim // self.num_heads)
        keys, values = heads("key", source), heads("value", source)
        scores = queries @ jnp.swapaxes(keys, -1, -2)  # (K, M, H, C * N, C * N)
        if is_mat:
            seen = jnp.tri(num_agents, dtype=bool) if causal else True
            mixed = jax.nn.softmax(jnp.where(seen, scores, -1e9)) @ values
        else:
            decay = 1 - jnp.exp2(jnp.linspace(-5, -9, self.num_heads))  # arXiv 2307.08621
            decay *= self.decay_scaling_factor
            within, before = decays(timestep, decay, chunk_steps, num_agents)
            within = jnp.tril(within) if causal else within  # of a step none sees later agents
            # Between chunks S <- kept S + gain, both as the chunk's last token sees them.
            kept = before[..., -1:, None]
            gain = jnp.swapaxes(keys * within[..., -1, :, None], -1, -2) @ values

            def pass_on(memory, chunk):
                kept, gain = chunk
                return memory * kept + gain, memory

            # The scan hands each chunk the S before it.
            memory, earlier = lax.scan(pass_on, memory, (kept, gain))
            mixed = (scores * within) @ values + queries @ earlier * before[..., None]
        mixed = rearrange(mixed, "k m h (t n) e -> m (k t) n (h e)", t=chunk_steps)
        if not is_mat:
            mixed = nn.GroupNorm(self.num_heads, reduction_axes=-1, name="head_norm")(mixed)
            mixed *= nn.swish(dense(name="gate")(source))
        return NORM[self.kind](name="norm")(x + dense(name="out")(mixed)), memory


class Mlp(nn.Module):
    """A GELU MLP of two layers (mat), or a SwiGLU of three (sable): tokens (.., E) -> (.., E)."""
    kind: str

    @nn.compact
    def __call__(self, x):
        dense = partial(Dense, x.shape[-1])
        up = dense(name="up")(x)
        hidden = nn.gelu(up) if self.kind == "mat" else nn.swish(up) * dense(name="gate")(x)
        out = dense(kernel_init=orthogonal(0.01), name="down")(hidden)  # D18: official Sable: zeros
        return NORM[self.kind](name="norm")(x + out)


class Policy(nn.Module):
    """The last layer of both networks: features (.., F) -> a distribution for each agent."""
    num_actions: int
    continuous: bool

    @nn.compact
    def __call__(self, x, action_mask):
        out = Dense(self.num_actions, kernel_init=orthogonal(0.01), name="out")(x)
        if not self.continuous:  # illegal actions have probability 0
            return distrax.Categorical(jnp.where(action_mask, out, -1e9), dtype=jnp.int32)
        # D17: a Gaussian over u, of which tasks.py does tanh(u); its std is the same in all states.
        log_std = self.param("log_std", constant(-0.5), (self.num_actions,))
        log_std = 1 - jnp.abs(6 - (log_std + 5) % 12)  # reflected at -5 and 1; a clip would stick
        return distrax.Independent(distrax.Normal(out, jnp.exp(log_std)), 1)


class Guider(nn.Module):
    """mu: an encoder of all observations with a value head, and a decoder of agent after agent."""
    kind: str  # sable or mat
    embed_dim: int
    num_heads: int
    num_blocks: int
    decay_scaling_factor: float
    chunk_steps: int
    num_actions: int
    continuous: bool
    has_mlp: bool = True
    reads_learner: bool = False

    def setup(self):
        norm = NORM[self.kind]
        dense = partial(Dense, self.embed_dim)
        mixer = partial(
            Mixer, self.kind, self.num_heads, self.decay_scaling_factor, self.chunk_steps)
        mlp = partial(Mlp, self.kind) if self.has_mlp else norm

        def embed(*first):
            return nn.Sequential([*first, dense(), nn.gelu, norm()])

        self.obs_embed = embed(norm())
        self.memory_embed = dense(use_bias=False)
        self.encoder = [(mixer(), mlp()) for _ in range(self.num_blocks)]
        self.value_head = nn.Sequential([embed(), Dense(1, kernel_init=orthogonal(0.01))])
        self.nobody = self.param("nobody", normal(0.3), (self.num_actions,))  # for the first agent
        self.action_embed = embed()
        self.decoder = [(mixer(), mixer(), mlp()) for _ in range(self.num_blocks)]
        self.policy_embed = embed()
        self.policy = Policy(self.num_actions, self.continuous)

    def encode(self, obs, timestep, hidden):
        """obs (M, T, N, ..) -> observation tokens (M, T, N, E), value (M, T, N), hidden.

        timestep (M, T). hidden: before the first step; returned: after the last one.
        D20: it may read what its learner remembers, and so choose by it.
        """
        x = self.obs_embed(obs.agents_view)
        if self.reads_learner:
            x += self.memory_embed(obs.remembered)
        new_hidden = []
        for (mixer, mlp), memory in zip(self.encoder, hidden):
            x, memory = mixer(x, x, timestep, memory, causal=False)
            x = mlp(x)
            new_hidden.append(memory)
        return x, self.value_head(x)[..., 0], new_hidden

    def decode(self, obs_tokens, obs, action, timestep, hidden):
        """action (M, T, N, ..) -> policies (M, T, N), hidden; the rest as in `encode`.

        Agent j's policy depends on the earlier steps of its episode and, of its own step, on the
        actions of agents < j alone. D7: the agents keep the order in which they acted.
        """
        told = jnp.tanh(action) if self.continuous else jax.nn.one_hot(action, self.num_actions)
        told = jnp.roll(told, 1, axis=-2).at[..., 0, :].set(self.nobody)  # by the agent before
        x = self.action_embed(told)
        new_hidden = []
        for (self_mixer, cross_mixer, mlp), (memory, cross_memory) in zip(self.decoder, hidden):
            x, memory = self_mixer(x, x, timestep, memory, causal=True)
            x, cross_memory = cross_mixer(obs_tokens, x, timestep, cross_memory, causal=True)
            x = mlp(x)
            new_hidden.append((memory, cross_memory))
        return self.policy(self.policy_embed(x), obs.action_mask), new_hidden

    def __call__(self, obs, action, timestep, hidden):
        """obs, action (M, T, N, ..), timestep (M, T) -> policies (M, T, N), value (M, T, N)."""
        obs_tokens, value, _ = self.encode(obs, timestep, hidden["encoder"])
        policy, _ = self.decode(obs_tokens, obs, action, timestep, hidden["decoder"])
        return policy, value


class Learner(nn.Module):
    """pi: one MLP-GRU-MLP for all agents, each of which sees its own observations alone.
    The layers before and after the GRU take all steps at once; the GRU is one cell, scanned over
    time. Where an episode begins, at timestep 0, its hidden state is taken for 0.
    """
    hidden_dim: int
    num_actions: int
    continuous: bool

    @nn.compact
    def __call__(self, obs, timestep, hidden):
        """obs (M, T, N, ..), timestep (M, T), hidden (M, N, F) -> policies (M, T, N), hidden.

        hidden: before the first step; returned: after the last one.
        """
        x = nn.relu(Dense(self.hidden_dim)(obs.agents_view))
        running = timestep[..., None, None] > 0

        def step(cell, hidden, inputs):
            x, running = inputs
            hidden, _ = cell(hidden * running, x)
            return hidden, hidden

        over_time = nn.scan(
            step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
        hidden, x = over_time(nn.GRUCell(self.hidden_dim), hidden, (x, running))
        x = nn.relu(Dense(self.hidden_dim)(x))
        return Policy(self.num_actions, self.continuous)(x, obs.action_mask), hidden


def make_networks(args, env):
    # 32 tokens are fast on a CPU.
    longest = min(args.num_steps, args.chunk_steps or max(32 // env.num_agents, 1))
    chunk_steps = max(c for c in range(1, longest + 1) if args.num_steps % c == 0)
    sizes = (args.embed_dim, args.num_heads, args.num_blocks, args.decay_scaling_factor)
    learner = Learner(args.learner_hidden_dim, env.num_actions, env.continuous)
    options = (env.num_actions, env.continuous, args.guider_mlp, args.guider_reads_learner)
    return Guider(args.guider, *sizes, chunk_steps, *options), learner


def init_hidden(args, env, batch_size):
    """Of the guider a memory S for each mixer, which mat leaves as it is; of the learner's GRU a
    hidden state for each agent. Anything would do, for at timestep 0 it is forgotten.
    """
    width = args.embed_dim // args.num_heads
    memory = jnp.zeros((batch_size, args.num_heads, width, width))
    blocks = args.num_blocks
    guider = {"encoder": [memory] * blocks, "decoder": [(memory, memory)] * blocks}
    learner = jnp.zeros((batch_size, env.num_agents, args.learner_hidden_dim))
    return {"guider": guider, "learner": learner}


def add_time(step):
    """One step as a sequence: (B, ..) -> (B, 1, ..)."""
    return tree.map(lambda x: x[:, None], step)


def guider_act(guider, learner, params, obs, timestep, hidden, key, greedy=False):
    """Agent after agent: obs (B, N, ..), timestep (B,) -> action, log_prob, value, hidden.

    All agents decide at once, again and again with the same random numbers, until nobody changes an
    action: a fixed point of the decoder. It is exact, because agent j needs the final actions of
    agents < j alone, so that pass j settles it at the latest. The memory is that of the last pass.
    They begin with what the learner, which watches, would do with the same random numbers.
    """
    draft, _, learner_hidden = learner_act(
        learner, params["learner"], obs, timestep, hidden["learner"], key, greedy)
    obs = obs._replace(remembered=hidden["learner"])
    obs, timestep, draft = add_time((obs, timestep, draft))
    params, hidden = params["guider"], hidden["guider"]
    obs_tokens, value, encoder_hidden = guider.apply(
        params, obs, timestep, hidden["encoder"], method="encode")

    def undecided(carry):
        passes, changed, *_ = carry
        return changed & (passes < value.shape[-1])

    def decide(carry):
        passes, _, before, *_ = carry
        policy, new_hidden = guider.apply(
            params, obs_tokens, obs, before, timestep, hidden["decoder"], method="decode")
        action = policy.mode() if greedy else policy.sample(seed=key)
        return passes + 1, jnp.any(action != before), action, policy.log_prob(action), new_hidden

    carry = (0, True, draft, jnp.zeros_like(value), hidden["decoder"])
    _, _, action, log_prob, decoder_hidden = lax.while_loop(undecided, decide, carry)
    hidden = {"encoder": encoder_hidden, "decoder": decoder_hidden}
    hidden = {"guider": hidden, "learner": learner_hidden}
    return action[:, 0], log_prob[:, 0], value[:, 0], hidden


def learner_act(learner, params, obs, timestep, hidden, key, greedy=False):
    """Each agent from what it saw: obs (B, N, ..), timestep (B,) -> action, log_prob, hidden."""
    policy, hidden = learner.apply(params, *add_time((obs, timestep)), hidden)
    action = policy.mode() if greedy else policy.sample(seed=key)
    return action[:, 0], policy.log_prob(action)[:, 0], hidden


# -------------------- Losses ----------------------------------------------------------------------
class Transition(NamedTuple):  # one step; a rollout stacks them to (T, B, ..)
    obs: Observation
    timestep: Array  # () steps since the episode began, 0 at its first observation
    action: Array  # (N,) int32, or (N, A) float32 if continuous
    behaviour_log_prob: Array  # (N,) of the guider that acted, mu_old
    value: Array  # (N,) at collection, normalised
    reward: Array  # (N,)
    discount: Array  # () 0 where the episode terminated
    last: Array  # () bool, the episode ended: terminated or truncated
    after: EnvState  # what followed, also at the end of an episode, without its game
    next_value: Array  # (N,) of what followed, normalised
    advantage: Any = None  # (N,), once the rollout is complete
    target: Any = None  # (N,) of the value, normalised
    hidden: Any = None  # at the start of the rollout, (B, ..) or (M, ..)


class TrainState(NamedTuple):  # what one iteration hands to the next, on each device
    params: dict  # of guider and learner
    opt_state: Any
    env_state: EnvState  # (B, ..)
    hidden: dict  # (B, ..)
    key: Array
    value_scale: Array  # (2,) mean and size of recent targets, in which values are told
    iteration: Array  # () int32, iterations done: what a schedule depends on


def gae(rollout, next_value, gamma, gae_lambda):
    """Generalised advantage estimation (arXiv 1506.02438): next_value (T, B, N) -> advantage.

    D8: at a time limit that the environment signals as truncation (last, but discount 1) the value
    of the true last observation is used. The official code takes every end for a termination.
    """

    def backwards(next_advantage, inputs):
        step, next_value = inputs
        error = step.reward + gamma * step.discount[:, None] * next_value - step.value
        advantage = error + gamma * gae_lambda * ~step.last[:, None] * next_advantage
        return advantage, advantage

    start = jnp.zeros_like(next_value[0])
    _, advantage = lax.scan(backwards, start, (rollout, next_value), reverse=True)
    return advantage


def double_clip(guider_log_prob, learner_log_prob, behaviour_log_prob, delta, clip_coef):
    """The guider's ratio mu / mu_old, clipped twice (Eq. 9): to the tether, then as in PPO.

    D9: clip(mu / pi, 1 / delta, delta) * pi, in log space: the nearest log-probability within the
    tether. For delta = inf it is mu itself, to the bit. No gradient goes to the learner.
    """
    center = lax.stop_gradient(learner_log_prob)
    reach = jnp.log(delta)
    tethered = jnp.clip(guider_log_prob, center - reach, center + reach)
    ratio = jnp.exp(tethered - behaviour_log_prob)
    return jnp.clip(ratio, 1 - clip_coef, 1 + clip_coef)


def pooled(x):
    """Mean and std of the numbers of all devices together."""
    mean = lax.pmean(jnp.mean(x), "device")
    return mean, jnp.sqrt(lax.pmean(jnp.mean((x - mean) ** 2), "device"))


def ppo_loss(ratio, clipped_ratio, advantage):
    """Mean of -min(r A, clipped r A); each agent has its own ratio (Corollary 4.2)."""
    return -jnp.mean(jnp.minimum(ratio * advantage, clipped_ratio * advantage))


def minibatch_loss(params, args, guider, learner, mb):
    """Steps 2 to 4 on one minibatch -> total loss, dict of its parts.

    Per sample and agent, for the action taken, with r = mu / mu_old:
    Eq. 9   mean[-min(r A, double_clip A)] + mean[mask KL(mu || pi)] - ent_coef H + vf_coef L_value
    Eq. 10  mean[KL(mu || pi)] + lambda mean[-min(rho A, clip(rho) A)] with rho = pi / mu_old
    D10: one forward pass of each network serves all terms. Eq. 9 moves the guider alone, Eq. 10 the
    learner, because each reads the other's policy through a stop_gradient.
    """
    guider_policy, value = guider.apply(
        params["guider"], mb.obs, mb.action, mb.timestep, mb.hidden["guider"])
    learner_policy, _ = learner.apply(params["learner"], mb.obs, mb.timestep, mb.hidden["learner"])
    guider_log_prob = guider_policy.log_prob(mb.action)  # (M, T, N)
    learner_log_prob = learner_policy.log_prob(mb.action)  # (M, T, N)
    mean, std = pooled(mb.advantage)
    advantage = (mb.advantage - mean) / (std + 1e-20)

    # STEP 2/4: the guider improves
    log_ratio = guider_log_prob - mb.behaviour_log_prob
    ratio = jnp.exp(log_ratio)
    clipped_ratio = double_clip(
        guider_log_prob, learner_log_prob, mb.behaviour_log_prob, args.delta, args.clip_coef)
    guider_policy_loss = ppo_loss(ratio, clipped_ratio, advantage)
    guider_entropy = jnp.mean(guider_policy.entropy())
    value_loss = 0.5 * jnp.mean((value - mb.target) ** 2)
    loss = guider_policy_loss - args.ent_coef * guider_entropy + args.vf_coef * value_loss

    # STEP 3/4: the learner follows. Theorem 4.1 has KL(pi || mu), which picks one mode of mu; this,
    # as in the official code, covers all modes, unless the tether has mu choose one.
    learner_kl = jnp.mean(lax.stop_gradient(guider_policy).kl_divergence(learner_policy))
    learner_ratio = jnp.exp(learner_log_prob - mb.behaviour_log_prob)
    clipped_ratio = jnp.clip(learner_ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    learner_policy_loss = ppo_loss(learner_ratio, clipped_ratio, advantage)
    loss += learner_kl + args.learner_rl_coef * learner_policy_loss

    # STEP 4/4: the guider backtracks, where mu / pi is beyond the tether's end for the action taken
    mask = jnp.abs(guider_log_prob - learner_log_prob) > jnp.log(args.delta)
    guider_kl = jnp.mean(mask * guider_policy.kl_divergence(lax.stop_gradient(learner_policy)))
    loss += guider_kl

    return loss, {
        "guider_policy_loss": guider_policy_loss,
        "guider_entropy": guider_entropy,
        "guider_kl": guider_kl,
        "value_loss": value_loss,
        "learner_kl": learner_kl,
        "learner_policy_loss": learner_policy_loss,
        "learner_entropy": jnp.mean(learner_policy.entropy()),
        "approx_kl": jnp.mean(ratio - 1 - log_ratio),  # http://joschu.net/blog/kl-approx.html
        "clipfrac": jnp.mean(jnp.abs(ratio - 1) > args.clip_coef),
        "delta_clipfrac": jnp.mean(mask),
        "ratio": jnp.mean(ratio),
    }


# -------------------- Iteration -------------------------------------------------------------------
def start_afresh(env, after, last, pool, key):
    """Gives each environment whose episode ended a start that was not used yet -> EnvState, pool.

    D11: a reset inside the step would be computed for every environment in every step. So starts
    come from a pool, B starts and how many are used, which is filled anew when too few are left.
    """
    starts, num_used = pool
    is_short = num_used + jnp.sum(last) > len(last)
    keys = random.split(key, len(last))
    starts = lax.cond(is_short, lambda: vmap(env.reset)(keys), lambda: starts)
    num_used = jnp.where(is_short, 0, num_used) + jnp.cumsum(last)  # (B,) after each environment
    fresh = tree.map(lambda x: x[num_used - 1], starts)
    ready = tree.map(partial(vmap(jnp.where), last), fresh, after)
    return ready, (starts, num_used[-1])


def collect(args, env, guider, learner, state):
    """Plays T steps in B environments -> state, rollout (T, B, ..)."""
    key, steps_key = random.split(state.key)

    def value_of(env_state, hidden):
        """(B, N) in a state with the hidden states before it."""
        obs = env_state.obs._replace(remembered=hidden["learner"])
        now = add_time((obs, env_state.episode["length"]))
        _, value, _ = guider.apply(
            state.params["guider"], *now, hidden["guider"]["encoder"], method="encode")
        return value[:, 0]

    def step(carry, key):
        before, hidden, pool = carry
        key, pool_key = random.split(key)
        now = (before.obs._replace(remembered=hidden["learner"]), before.episode["length"])
        # STEP 1/4: the guider acts
        action, log_prob, value, hidden = guider_act(
            guider, learner, state.params, *now, hidden, key)
        after, reward, discount, last = vmap(env.step)(before, action)
        # What follows is valued by the next step, unless the episode is cut off.
        is_cut_off = jnp.any(last & (discount > 0))
        next_value = lax.cond(is_cut_off, value_of, lambda *_: jnp.zeros_like(value), after, hidden)
        # A new episode begins with nothing that the guider could read.
        hidden["learner"] *= ~last[:, None, None]
        results = (reward, discount, last, after._replace(game=None), next_value)
        transition = Transition(*now, action, log_prob, value, *results)
        ready, pool = start_afresh(env, after, last, pool, pool_key)
        return (ready, hidden, pool), transition

    keys = random.split(steps_key, args.num_steps)
    pool = (state.env_state, args.num_envs // args.num_devices)  # all of it used
    carry = (state.env_state, state.hidden, pool)
    (env_state, hidden, _), rollout = lax.scan(step, carry, keys)
    following = jnp.concatenate([rollout.value[1:], value_of(env_state, hidden)[None]])
    next_value = jnp.where(rollout.last[..., None], rollout.next_value, following)
    rollout = rollout._replace(next_value=next_value)
    return state._replace(env_state=env_state, hidden=hidden, key=key), rollout


def make_optimizer(args, rate):
    """D12: an Adam for each network, so that neither's gradient norm scales the other's step."""
    adam = optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.adam(rate, eps=1e-5))
    return optax.partition({"guider": adam, "learner": adam}, lambda params: {x: x for x in params})


def train_iteration(args, env, guider, learner, state):
    """One rollout and all updates from it, on each device -> state, metrics to add up."""
    hidden = state.hidden
    state, rollout = collect(args, env, guider, learner, state)
    # D19: values are told as (value - mean) / size of recent targets, for a loss of one scale.
    mean, size = state.value_scale
    scaled = rollout._replace(value=mean + size * rollout.value)
    advantage = gae(scaled, mean + size * rollout.next_value, args.gamma, args.gae_lambda)
    target = scaled.value + advantage
    center, spread = pooled(target)
    share = jnp.maximum(0.1, 1 / (state.iteration + 1))  # the first ten iterations count alike
    mean += share * (center - mean)
    # The std of a Gaussian with this fourth moment: the std itself lets rare rewards tower above.
    unit = size + spread + jnp.abs(center - mean) + 1e-20  # of error and size, for float32
    error = (target - mean) / unit
    size = ((1 - share) * (size / unit) ** 4 + share * pooled(error**4)[0] / 3) ** 0.25
    value_scale = jnp.stack([mean, unit * size])
    rollout = rollout._replace(advantage=advantage, target=error / (size + 1e-20))
    samples = tree.map(lambda x: rearrange(x, "t b ... -> b t ..."), rollout)
    # Sequences stay whole, (B, T, ..), each with the hidden states before its first step.
    samples = samples._replace(hidden=hidden)
    key, shuffle_key = random.split(state.key)
    order = jnp.tile(jnp.arange(len(samples.action)), (args.update_epochs, 1))
    order = random.permutation(shuffle_key, order, axis=1, independent=True)
    indices = rearrange(order, "epoch (mb m) -> (epoch mb) m", mb=args.num_minibatches)
    num_iterations = args.total_timesteps // (args.num_envs * args.num_steps)
    rate = args.learning_rate * (1 - args.anneal_lr * state.iteration / num_iterations)

    def update(carry, index):
        params, opt_state = carry
        mb = tree.map(lambda x: x[index], samples)
        grads, losses = jax.grad(minibatch_loss, has_aux=True)(params, args, guider, learner, mb)
        grads, losses = lax.pmean((grads, losses), "device")
        losses |= {f"{name}_grad_norm": optax.tree.norm(grad) for name, grad in grads.items()}
        updates, opt_state = make_optimizer(args, rate).update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), losses

    (params, opt_state), losses = lax.scan(update, (state.params, state.opt_state), indices)
    state = TrainState(
        params, opt_state, state.env_state, state.hidden, key, value_scale, state.iteration + 1)

    losses["first_ratio"] = losses.pop("ratio")[0]  # 1 as long as acting and training agree
    metrics = {f"losses/{name}": jnp.mean(x) for name, x in losses.items()}
    metrics["charts/learning_rate"] = rate
    # The advantage is the target less the value: its variance is what the values do not explain.
    _, unexplained = pooled(advantage)
    metrics["losses/explained_variance"] = 1 - (unexplained / (spread + 1e-9 * unit)) ** 2
    ended = tree.map(lambda x: jnp.sum(x * rollout.last), rollout.after.episode | {"episodes": 1.0})
    views = rollout.obs.agents_view + rollout.after.obs.agents_view
    seen = {"observation": views, "reward": rollout.reward, "target": target}  # is it finite?
    return state, metrics | lax.psum(ended | tree.map(jnp.mean, seen), "device")


def init_state(args, env, guider, learner, params_key, key):
    """The first state. D13: params_key is the same on all devices, key is another on each."""
    key, reset_key = random.split(key)
    batch_size = args.num_envs // args.num_devices
    env_state = vmap(env.reset)(random.split(reset_key, batch_size))
    hidden = init_hidden(args, env, batch_size)
    guider_key, learner_key = random.split(params_key)
    obs = env_state.obs._replace(remembered=hidden["learner"])
    obs, timestep = add_time((obs, env_state.episode["length"]))
    action = env.example_action[None, None]
    params = {"guider": guider.init(guider_key, obs, action, timestep, hidden["guider"])}
    params["learner"] = learner.init(learner_key, obs, timestep, hidden["learner"])
    opt_state = make_optimizer(args, args.learning_rate).init(params)
    return TrainState(params, opt_state, env_state, hidden, key, jnp.zeros(2), jnp.int32(0))


# -------------------- Evaluation ------------------------------------------------------------------
MAX_EPISODE_STEPS = 10_000  # evaluation gives up on longer episodes; raise it if yours are longer


def play(env, act, hidden, num_episodes, key):
    """Plays whole episodes at once, by act(obs, timestep, hidden, key) -> action, .., hidden.

    hidden: before an episode. NaN where an episode does not end.
    """
    key, reset_key = random.split(key)
    env_state = vmap(env.reset)(random.split(reset_key, num_episodes))

    def goes_on(carry):
        env_state, _, ended, _ = carry
        return jnp.any(~ended & (env_state.episode["length"] < MAX_EPISODE_STEPS))

    def step(carry):
        before, hidden, ended, key = carry
        key, act_key = random.split(key)
        action, *_, hidden = act(before.obs, before.episode["length"], hidden, act_key)
        after, _, _, last = vmap(env.step)(before, action)
        episode = tree.map(partial(jnp.where, ended), before.episode, after.episode)
        return after._replace(episode=episode), hidden, ended | last, key

    carry = (env_state, hidden, jnp.zeros(num_episodes, bool), key)
    env_state, _, ended, _ = lax.while_loop(goes_on, step, carry)
    return tree.map(lambda x: jnp.where(ended, x, jnp.nan), env_state.episode)


def evaluate(args, env, guider, learner, params, key):
    """Learner and guider each play eval_episodes, from the same start states -> values to log."""
    hidden = init_hidden(args, env, args.eval_episodes)
    act = partial(learner_act, learner, params["learner"], greedy=args.eval_greedy)
    episode = play(env, act, hidden["learner"], args.eval_episodes, key)
    act = partial(guider_act, guider, learner, params, greedy=args.eval_greedy)
    guider_episode = play(env, act, hidden, args.eval_episodes, key)
    row = {"eval/learner_return": jnp.mean(episode["return"])}
    row["eval/learner_return_std"] = jnp.std(episode["return"])
    row["eval/guider_return"] = jnp.mean(guider_episode["return"])
    row["eval/imitation_gap"] = row["eval/guider_return"] - row["eval/learner_return"]
    row["eval/episodic_length"] = jnp.mean(episode["length"])
    if env.has_win_rate:
        row["eval/win_rate"] = jnp.mean(episode["won"])
    return row


# -------------------- Saving ----------------------------------------------------------------------
def refuse(reason, status=2):
    """Ends the program with one line for the user; status 2: flags cannot work, 1: training."""
    print(f"{SCRIPT}: error: {reason}", file=sys.stderr)
    if status == 1 and jax.distributed.is_initialized():
        os._exit(status)  # a common exit would wait for the other processes
    sys.exit(status)


@contextmanager
def refusing(errors, what="", status=2):
    """Within it such errors become one line for the user."""
    try:
        yield
    except errors as error:
        refuse(f"{what}{error}".splitlines()[0], status)


def write_whole(path, write):
    """Calls write(file name) so that at any moment the old or the new file is there, whole."""
    new = path.with_name(f"new_{path.name}")
    with refusing(OSError, f"cannot write {path}: ", status=1):
        write(new)
        new.replace(path)


def save_checkpoint(path, state, progress):
    """Writes a tree of arrays, and what JSON can hold, as a zip of arrays with checksums."""
    arrays, progress = tree.leaves(state), json.dumps(progress)
    write_whole(path, lambda new: np.savez(new, *arrays, progress=progress))


def load_checkpoint(path, like):
    """Reads a state of the structure, shapes and types of `like`, and the progress."""
    with refusing(Exception, f"--resume: cannot use {path}: "):  # a damaged file may raise any
        with np.load(path) as file:
            progress, *leaves = map(file.get, file.files)
        progress = json.loads(str(progress))
        state = tree.unflatten(tree.structure(like), leaves)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, like)
        multihost_utils.assert_equal(progress[0], "the processes stopped apart")
        return state, progress


# -------------------- Logging ---------------------------------------------------------------------
def open_run(args, starts):
    """Makes the run's folder, or locks it, writes args.json -> folder, lock, W&B's run."""
    name = f"{args.env_id}__{args.scenario}__{args.exp_name}__{args.seed}__".replace(":", "_")
    stem, now = os.path.join(args.run_dir, name), int(time.time())
    # With status 1 it ends at once, for of several processes the others do not know.
    with refusing(OSError, "--run-dir, --resume: in use, or cannot be: ", 2 - args.distributed):
        os.makedirs(args.run_dir, exist_ok=True)
        while jax.process_index() == 0 and not args.resume:
            with suppress(FileExistsError):  # another run began in the same second
                os.mkdir(f"{stem}{now}")
                break
            now += 1
        folder = Path(args.resume or f"{stem}{multihost_utils.broadcast_one_to_all(now)}")
        lock = FileLock(folder / ".lock", timeout=0)
        if jax.process_index() == 0:
            lock.acquire()
    if jax.process_index() > 0:
        return folder, lock, None
    about, tracker = {"script": SCRIPT, "args": vars(args), "starts": starts}, None
    if args.track:
        import wandb
        with refusing(wandb.Error, "--track: "):
            tracker = wandb.init(
                project=args.wandb_project_name, config=about, name=folder.name,
                id=folder.name[-64:], resume="allow")
    write_whole(folder / "args.json", lambda new: new.write_text(json.dumps(about, indent=2)))
    return folder, lock, tracker


def interval_row(args, iteration, sums, rows):
    """Sums over the iterations since the last of the rows -> what the next one says of them."""
    before = Counter(*rows[-1:])
    steps, count = args.num_envs * args.num_steps, sums["iterations"]
    row = {name: x / count for name, x in sums.items() if "/" in name}
    row["global_step"] = iteration * steps
    row["time/train_s"] = before["time/train_s"] + sums["seconds"]
    row["time/eval_s"] = before["time/eval_s"] + sums["eval_seconds"]
    if count > 0:
        row["charts/SPS"] = count * steps / sums["seconds"]
        row["charts/num_episodes"] = sums["episodes"]
    if sums["episodes"] > 0:
        row["charts/episodic_return"] = sums["return"] / sums["episodes"]
        row["charts/episodic_length"] = sums["length"] / sums["episodes"]
    return row


def log(folder, tracker, rows, params):
    """Writes metrics, networks and curve -> what to print of the newest row."""
    row = rows[-1]
    lines = "\n".join(map(json.dumps, rows)) + "\n"
    write_whole(folder / "metrics.jsonl", lambda new: new.write_text(lines))
    is_best = row["eval/learner_return"] == max(row["eval/learner_return"] for row in rows)
    for network, arrays in params.items():  # with names such as params,Dense_0,kernel
        write = partial(Path.write_bytes, data=save(flatten_dict(arrays, sep=",")))
        write_whole(folder / f"{network}.safetensors", write)
        if is_best:  # of equals the later one
            write_whole(folder / f"best_{network}.safetensors", write)
    figure = Figure(layout="constrained")
    returns = ["eval/guider_return", "eval/learner_return"]
    pandas.DataFrame(rows).plot("global_step", returns, ax=figure.subplots(), title=folder.name)
    write_whole(folder / "learning_curve.png", figure.savefig)
    if tracker:
        tracker.log(row, step=row["global_step"])
    returns = f"learner {row['eval/learner_return']:.4g}  guider {row['eval/guider_return']:.4g}"
    return f"global_step={row['global_step']}  {returns}  SPS {row.get('charts/SPS', 0):.0f}"


# -------------------- Starting --------------------------------------------------------------------
def parse_args():
    """Flags, with --resume on top of the run's own -> args, command and versions of all starts."""
    args = tyro.cli(Args)
    versions = {name: version(name) for name in ("jax", "jumanji")}
    starts = [{"command": sys.argv, "versions": versions}]
    if "" in (args.run_dir, args.resume):
        refuse("--run-dir, --resume: must be the name of a folder, not empty")
    if args.resume is None:
        return args, starts
    with refusing(Exception, f"--resume {args.resume}: is no run of this {SCRIPT}: "):
        folder = Path(args.resume).resolve()
        about = json.loads((folder / "args.json").read_text())
        if about["script"] != SCRIPT or about["args"].keys() ^ vars(args):
            raise ValueError(f"{about['script']} or an earlier version made it")
        of_the_run = Args(**about["args"])
    args = tyro.cli(Args, default=of_the_run)
    may_change = "resume total_timesteps num_evals eval_episodes eval_greedy track dry_run".split()
    for name, value in vars(of_the_run).items():
        if getattr(args, name) != value and name not in may_change:
            refuse(f"--{name.replace('_', '-')}: the run has {value}; may change: {may_change}")
    starts = about["starts"] + starts
    before = starts[-2]["versions"]
    if before != versions:
        print(f"{SCRIPT}: goes on with {versions}, was begun with {before}", file=sys.stderr)
    return dataclasses.replace(args, resume=str(folder), run_dir=str(folder.parent)), starts


def start_jax(args):
    """Sets JAX up before its first use, and fills in the number of devices."""
    jax.config.update("jax_enable_x64", False)
    with refusing(Exception, "JAX does not start (--distributed, JAX_PLATFORMS): "):
        if args.distributed:  # JAX finds SLURM, Open MPI, Kubernetes and TPU pods by itself
            jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away
            numbers = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
            numbers = [int(os.environ[name]) for name in numbers if name in os.environ]
            jax.distributed.initialize(None, *numbers, heartbeat_timeout_seconds=30)
        elif args.num_devices > 1:
            jax.config.update("jax_num_cpu_devices", args.num_devices)
        if args.distributed or args.num_devices == 0:
            args.num_devices = jax.device_count()


def check_args(args):
    """Refuses flags that cannot work, before anything is compiled."""

    def check(name, holds, rule):
        if not holds:
            refuse(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {rule}")

    may_be_0 = "seed learner_rl_coef ent_coef vf_coef gamma gae_lambda".split()
    may_be_0 += ["decay_scaling_factor", "chunk_steps"]
    for name, value in vars(args).items():
        if type(value) in (int, float) and name != "delta":
            highest = 1 if name in ("gamma", "gae_lambda", "decay_scaling_factor") else 2**32 - 1
            check(name, 0 <= value <= highest, f"at least 0, and at most {highest}")
            check(name, value > 0 or name in may_be_0, "above 0")
    check("delta", args.delta > 1, "above 1 (1.1 is a short tether, inf is none)")
    check("embed_dim", args.embed_dim / args.num_heads % 2 == 0, "an even multiple of --num-heads")
    steps, devices = args.num_envs * args.num_steps, args.num_devices
    check("total_timesteps", args.total_timesteps >= steps, f"one rollout, {steps}, or more")
    check("num_devices", devices <= jax.device_count(), f"at most {jax.device_count()}")
    check("num_envs", args.num_envs % devices == 0, f"divisible by --num-devices {devices}")
    share = args.num_envs // devices  # whose sequences stay whole
    divides = share % args.num_minibatches == 0 and args.num_minibatches < steps
    check("num_minibatches", divides, f"a divisor of {share} games, with 2 steps or more in each")


# -------------------- Training --------------------------------------------------------------------
def train(args, env, starts):
    """Compiles, trains, evaluates, logs, saves -> number of the signal that stopped it, if any."""
    num_iterations = args.total_timesteps // (args.num_envs * args.num_steps)
    process, processes = jax.process_index(), jax.process_count()
    parts = (args, env, *make_networks(args, env))
    pmap = partial(jax.pmap, axis_name="device", devices=jax.devices()[: args.num_devices])
    init = pmap(partial(init_state, *parts), in_axes=(None, 0))
    iterate = pmap(partial(train_iteration, *parts), donate_argnums=0)
    start = time.time()
    key, params_key, eval_key = random.split(random.PRNGKey(args.seed), 3)
    inputs = params_key, random.split(key, args.num_devices)[process::processes]
    # A row for each evaluation, and the sums of metrics since the last one.
    state, done, rows, sums, checkpoint = None, -1, [], {}, f"checkpoint_{process}.npz"
    if args.resume:
        like = jax.eval_shape(init, *inputs)
        state, (done, rows, sums) = load_checkpoint(Path(args.resume, checkpoint), like)
    if done >= num_iterations:
        return print(f"--total-timesteps {args.total_timesteps}: these are done, nothing to do")
    folder, lock, tracker = open_run(args, starts)  # writes, once all is read and checked
    state, sums = state or init(*inputs), Counter(sums)
    if processes == 1:  # with several the first iteration compiles
        iterate = iterate.lower(state).compile()
    first = partial(tree.map, lambda x: np.asarray(x)[0])  # of what the devices have, (D, ..)
    play_episodes = jax.jit(partial(evaluate, *parts))
    compile_seconds = time.time() - start

    for iteration in tqdm(range(done + 1, num_iterations + 1), disable=process > 0 or None):
        if iteration > 0:
            start = time.time()
            state, metrics = iterate(state)
            metrics = tree.map(float, first(metrics))
            sums.update(metrics, iterations=1, seconds=time.time() - start)
            for name in ("observation", "reward", "target", *metrics):  # the cause comes first
                if not math.isfinite(metrics[name]):
                    refuse(f"{name} is {metrics[name]} in iteration {iteration}", status=1)
        due = iteration * args.num_evals % num_iterations < args.num_evals  # evenly spaced
        if due:
            start = time.time()
            params = first(state.params)
            results = tree.map(float, play_episodes(params, random.fold_in(eval_key, iteration)))
            if not all(map(math.isfinite, results.values())):
                refuse(f"no finite return in {MAX_EPISODE_STEPS} steps an episode: {results}", 1)
            sums["eval_seconds"] = time.time() - start
            results["time/compile_s"] = compile_seconds
            rows.append(results | interval_row(args, iteration, sums, rows))
            sums.clear()
            if process == 0:
                line = log(folder, tracker, rows, params)
        told = int(np.max(multihost_utils.process_allgather(max(STOP))))
        if due or told:
            save_checkpoint(folder / checkpoint, state, (iteration, rows, sums))
        if due and process == 0:  # once all is saved, for nobody may read it (`| head -1`)
            tqdm.write(line)
            sys.stdout.flush()
        if told:
            print(f"{SCRIPT}: interrupted, --resume {folder} goes on", file=sys.stderr)
            break
    lock.release()
    print(f"metrics, networks and learning curve: {folder}")
    return told


STOP = [0]  # and the signals that told this process to stop


def note_signal(number, frame):
    """Ctrl-C, SIGTERM, or what a scheduler sends before it ends a job; the same again kills."""
    STOP.append(number)
    signal.signal(number, signal.SIG_DFL)


def main():
    """Reads and checks the flags, trains, and returns the exit status."""
    args, starts = parse_args()
    start_jax(args)
    check_args(args)
    env = make_env(args.env_id, args.scenario)
    print(f"{SCRIPT}: {env.num_agents} agents, {args.num_devices} x {jax.devices()[0].device_kind}")
    if args.dry_run:
        return 0
    errors = jax.errors.JaxRuntimeError if jax.process_count() > 1 else ()
    with refusing(errors, "another process is lost: ", status=1):
        stopped_by = train(args, env, starts)
    return 128 + stopped_by if stopped_by else 0


if __name__ == "__main__":
    for number in signal.Signals:
        ignored = signal.getsignal(number) == signal.SIG_IGN  # as nohup has it
        if number.name in "SIGINT SIGTERM SIGHUP SIGUSR1".split() and not ignored:
            signal.signal(number, note_signal)
    sys.exit(main())
