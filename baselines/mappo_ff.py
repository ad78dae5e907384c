"""MAPPO, feed-forward: PPO for a team with a central critic (arXiv 2103.01955), in one file.

    python baselines/mappo_ff.py --env-id RobotWarehouse-v0
    python baselines/mappo_ff.py --env-id CoordSum-v0 --scenario 3x10=10

The baseline with centralized training and decentralized execution (CTDE). Two networks are trained
together, for a team of N agents of which each sees a part of the state:

- the learner pi is decentralized: each agent decides alone, from its own observation,
  so pi(a | o) = prod_j pi(a_j | o_j). It acts, PPO improves it, and it is deployed;
- the critic V is centralized: it sees the observations o = (o_1, .., o_N) of all. The
  value V(o) is the team's (of rewards of their own, each agent's). It serves in training alone.

An iteration has three steps:

    1. collect    the learner plays a rollout                          `collect`
    2. improve    the learner by PPO, on the critic's advantages       `ppo_loss`
    3. fit        the critic to the returns                            `minibatch_loss`

Steps 2 and 3 are one gradient step on each minibatch. All else is that of magpo_ff.py.

Shapes in comments: T steps of a rollout, B environments on a device, M samples of a minibatch, N
agents, A actions, O features of an observation, D devices, .. any
axes. D1, D2, .. are details that docs/details.md compares with the official code.
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
from typing import Any, Callable, NamedTuple

import chex
import distrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas
import tyro
from einops import rearrange
from filelock import FileLock
from flax.linen.initializers import constant, orthogonal
from flax.traverse_util import flatten_dict
from jax import Array, lax, random, tree, vmap
from jax.experimental import multihost_utils
from matplotlib.figure import Figure
from safetensors.numpy import save
from tqdm import tqdm

SCRIPT = Path(__file__).name
sys.path.append(str(Path(__file__).resolve().parent.parent))  # to tasks.py


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
    eval_episodes: int = 32  # episodes that the learner plays in an evaluation
    eval_greedy: bool = False  # evaluate the likeliest actions, not sampled [evaluation_greedy]
    # The algorithm
    # D15: these three are larger than the official defaults of 2.5e-4, 0.5 and 2.
    learning_rate: float = 1e-3  # Adam's learning rate, of learner and critic [actor_lr]
    max_grad_norm: float = 10.0  # largest norm of a gradient, for learner and critic separately
    num_minibatches: int = 4  # minibatches per epoch
    anneal_lr: bool = False  # let the learning rate fall linearly to 0 [decay_learning_rates]
    num_steps: int = 128  # T: steps of one rollout in each environment [rollout_length]
    update_epochs: int = 4  # passes over each rollout [ppo_epochs]
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    clip_coef: float = 0.2  # epsilon: PPO's clip of the probability ratio [clip_eps]
    ent_coef: float = 0.01  # weight of the learner's entropy bonus
    vf_coef: float = 1.0  # weight of the value loss
    # The networks
    learner_hidden_dim: int = 128  # width of the learner's two hidden layers
    critic_hidden_dim: int = 128  # width of the critic's hidden layers, as many as the learner's


# -------------------- Environment -----------------------------------------------------------------
class Observation(NamedTuple):
    agents_view: Array  # (N, O) float32, the one-hot agent id first
    action_mask: Array  # (N, A) bool, True where legal; for continuous actions everywhere


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


class Policy(nn.Module):
    """The last layer of the learner: features (.., F) -> a distribution for each agent."""
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


class Learner(nn.Module):
    """pi: one MLP for all agents, each of which sees its own observation alone, its id in it."""
    hidden_dim: int
    num_actions: int
    continuous: bool

    @nn.compact
    def __call__(self, obs):
        """obs (.., N, ..) -> policies (.., N)."""
        x = nn.relu(Dense(self.hidden_dim)(obs.agents_view))
        x = nn.relu(Dense(self.hidden_dim)(x))
        return Policy(self.num_actions, self.continuous)(x, obs.action_mask)


class Critic(nn.Module):
    """V: one MLP, which sees the observations of all agents."""
    hidden_dim: int
    num_values: int  # 1, or one for each agent, if they have rewards of their own

    @nn.compact
    def __call__(self, obs):
        """obs (.., N, ..) -> value (.., N)."""
        x = rearrange(obs.agents_view, "... n o -> ... (n o)")
        x = nn.relu(Dense(self.hidden_dim)(x))
        x = nn.relu(Dense(self.hidden_dim)(x))
        value = Dense(self.num_values, kernel_init=orthogonal(1.0))(x)
        return jnp.broadcast_to(value, obs.agents_view.shape[:-1])


def make_networks(args, env):
    learner = Learner(args.learner_hidden_dim, env.num_actions, env.continuous)
    return learner, Critic(args.critic_hidden_dim, env.num_agents if env.own_rewards else 1)


def learner_act(learner, params, obs, key, greedy=False):
    """Each agent from its own observation: obs (B, N, ..) -> action (B, N, ..), log_prob (B, N)."""
    policy = learner.apply(params, obs)
    action = policy.mode() if greedy else policy.sample(seed=key)
    return action, policy.log_prob(action)


# -------------------- Losses ----------------------------------------------------------------------
class Transition(NamedTuple):  # one step; a rollout stacks them to (T, B, ..)
    obs: Observation
    action: Array  # (N,) int32, or (N, A) float32 if continuous
    behaviour_log_prob: Array  # (N,) of the learner that acted, pi_old
    value: Array  # (N,) at collection, normalised
    reward: Array  # (N,)
    discount: Array  # () 0 where the episode terminated
    last: Array  # () bool, the episode ended: terminated or truncated
    after: EnvState  # what followed, also at the end of an episode, without its game
    advantage: Any = None  # (N,), once the rollout is complete
    target: Any = None  # (N,) of the value, normalised


class TrainState(NamedTuple):  # what one iteration hands to the next, on each device
    params: dict  # of learner and critic
    opt_state: Any
    env_state: EnvState  # (B, ..)
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


def pooled(x):
    """Mean and std of the numbers of all devices together."""
    mean = lax.pmean(jnp.mean(x), "device")
    return mean, jnp.sqrt(lax.pmean(jnp.mean((x - mean) ** 2), "device"))


def ppo_loss(ratio, clipped_ratio, advantage):
    """Mean of -min(r A, clipped r A); each agent has its own ratio (Corollary 4.2)."""
    return -jnp.mean(jnp.minimum(ratio * advantage, clipped_ratio * advantage))


def minibatch_loss(params, args, learner, critic, mb):
    """Steps 2 and 3 on one minibatch -> total loss, dict of its parts.

    Per sample and agent, for the action taken, with r = pi / pi_old:
    learner  mean[-min(r A, clip(r, 1 - eps, 1 + eps) A)] - ent_coef H
    critic   vf_coef L_value
    The networks share nothing, so the first line moves the learner alone, the second the critic.
    """
    policy = learner.apply(params["learner"], mb.obs)
    value = critic.apply(params["critic"], mb.obs)
    log_prob = policy.log_prob(mb.action)  # (M, N)
    mean, std = pooled(mb.advantage)
    advantage = (mb.advantage - mean) / (std + 1e-20)

    # STEP 2/3: the learner improves
    log_ratio = log_prob - mb.behaviour_log_prob
    ratio = jnp.exp(log_ratio)
    clipped_ratio = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    learner_policy_loss = ppo_loss(ratio, clipped_ratio, advantage)
    learner_entropy = jnp.mean(policy.entropy())
    loss = learner_policy_loss - args.ent_coef * learner_entropy

    # STEP 3/3: the critic is fitted
    value_loss = 0.5 * jnp.mean((value - mb.target) ** 2)
    loss += args.vf_coef * value_loss

    return loss, {
        "learner_policy_loss": learner_policy_loss,
        "learner_entropy": learner_entropy,
        "value_loss": value_loss,
        "approx_kl": jnp.mean(ratio - 1 - log_ratio),  # http://joschu.net/blog/kl-approx.html
        "clipfrac": jnp.mean(jnp.abs(ratio - 1) > args.clip_coef),
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


def collect(args, env, learner, critic, state):
    """Plays T steps in B environments -> state, rollout (T, B, ..)."""
    key, steps_key = random.split(state.key)

    def step(carry, key):
        before, pool = carry
        key, pool_key = random.split(key)
        # STEP 1/3: the learner acts
        action, log_prob = learner_act(learner, state.params["learner"], before.obs, key)
        value = critic.apply(state.params["critic"], before.obs)
        after, *results = vmap(env.step)(before, action)
        results.append(after._replace(game=None))  # what the next values are of
        transition = Transition(before.obs, action, log_prob, value, *results)
        ready, pool = start_afresh(env, after, transition.last, pool, pool_key)
        return (ready, pool), transition

    pool = (state.env_state, args.num_envs // args.num_devices)  # all of it used
    (env_state, _), rollout = lax.scan(
        step, (state.env_state, pool), random.split(steps_key, args.num_steps))
    return state._replace(env_state=env_state, key=key), rollout


def make_optimizer(args, rate):
    """D12: an Adam for each network, so that neither's gradient norm scales the other's step."""
    adam = optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.adam(rate, eps=1e-5))
    return optax.partition({"learner": adam, "critic": adam}, lambda params: {x: x for x in params})


def train_iteration(args, env, learner, critic, state):
    """One rollout and all updates from it, on each device -> state, metrics to add up."""
    state, rollout = collect(args, env, learner, critic, state)
    # One pass of the critic gives every next value, also those of the true last observations.
    next_value = critic.apply(state.params["critic"], rollout.after.obs)
    # D19: values are told as (value - mean) / size of recent targets, for a loss of one scale.
    mean, size = state.value_scale
    scaled = rollout._replace(value=mean + size * rollout.value)
    advantage = gae(scaled, mean + size * next_value, args.gamma, args.gae_lambda)
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
    samples = tree.map(lambda x: rearrange(x, "t b ... -> (t b) ..."), rollout)
    key, shuffle_key = random.split(state.key)
    order = jnp.tile(jnp.arange(len(samples.action)), (args.update_epochs, 1))
    order = random.permutation(shuffle_key, order, axis=1, independent=True)
    indices = rearrange(order, "epoch (mb m) -> (epoch mb) m", mb=args.num_minibatches)
    num_iterations = args.total_timesteps // (args.num_envs * args.num_steps)
    rate = args.learning_rate * (1 - args.anneal_lr * state.iteration / num_iterations)

    def update(carry, index):
        params, opt_state = carry
        mb = tree.map(lambda x: x[index], samples)
        grads, losses = jax.grad(minibatch_loss, has_aux=True)(params, args, learner, critic, mb)
        grads, losses = lax.pmean((grads, losses), "device")
        losses |= {f"{name}_grad_norm": optax.tree.norm(grad) for name, grad in grads.items()}
        updates, opt_state = make_optimizer(args, rate).update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), losses

    (params, opt_state), losses = lax.scan(update, (state.params, state.opt_state), indices)
    state = TrainState(params, opt_state, state.env_state, key, value_scale, state.iteration + 1)

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


def init_state(args, env, learner, critic, params_key, key):
    """The first state. D13: params_key is the same on all devices, key is another on each."""
    key, reset_key = random.split(key)
    reset_keys = random.split(reset_key, args.num_envs // args.num_devices)
    env_state = vmap(env.reset)(reset_keys)
    learner_key, critic_key = random.split(params_key)
    params = {"learner": learner.init(learner_key, env_state.obs)}
    params["critic"] = critic.init(critic_key, env_state.obs)
    opt_state = make_optimizer(args, args.learning_rate).init(params)
    return TrainState(params, opt_state, env_state, key, jnp.zeros(2), jnp.int32(0))


# -------------------- Evaluation ------------------------------------------------------------------
MAX_EPISODE_STEPS = 10_000  # evaluation gives up on longer episodes; raise it if yours are longer


def play(env, act, num_episodes, key):
    """Plays whole episodes at once, by act(obs, key) -> action, ..; NaN where one does not end."""
    key, reset_key = random.split(key)
    env_state = vmap(env.reset)(random.split(reset_key, num_episodes))

    def goes_on(carry):
        env_state, ended, _ = carry
        return jnp.any(~ended & (env_state.episode["length"] < MAX_EPISODE_STEPS))

    def step(carry):
        before, ended, key = carry
        key, act_key = random.split(key)
        action, *_ = act(before.obs, act_key)
        after, _, _, last = vmap(env.step)(before, action)
        episode = tree.map(partial(jnp.where, ended), before.episode, after.episode)
        return after._replace(episode=episode), ended | last, key

    carry = (env_state, jnp.zeros(num_episodes, bool), key)
    env_state, ended, _ = lax.while_loop(goes_on, step, carry)
    return tree.map(lambda x: jnp.where(ended, x, jnp.nan), env_state.episode)


def evaluate(args, env, learner, critic, params, key):
    """The learner plays eval_episodes -> values to log."""
    act = partial(learner_act, learner, params["learner"], greedy=args.eval_greedy)
    episode = play(env, act, args.eval_episodes, key)
    row = {"eval/learner_return": jnp.mean(episode["return"])}
    row["eval/learner_return_std"] = jnp.std(episode["return"])
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
    pandas.DataFrame(rows).plot(
        "global_step", "eval/learner_return", ax=figure.subplots(), title=folder.name)
    write_whole(folder / "learning_curve.png", figure.savefig)
    if tracker:
        tracker.log(row, step=row["global_step"])
    returns = f"learner {row['eval/learner_return']:.4g}"
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

    may_be_0 = "seed ent_coef vf_coef gamma gae_lambda".split()
    for name, value in vars(args).items():
        if type(value) in (int, float):
            highest = 1 if name in ("gamma", "gae_lambda") else 2**32 - 1
            check(name, 0 <= value <= highest, f"at least 0, and at most {highest}")
            check(name, value > 0 or name in may_be_0, "above 0")
    steps, devices = args.num_envs * args.num_steps, args.num_devices
    check("total_timesteps", args.total_timesteps >= steps, f"one rollout, {steps}, or more")
    check("num_devices", devices <= jax.device_count(), f"at most {jax.device_count()}")
    check("num_envs", args.num_envs % devices == 0, f"divisible by --num-devices {devices}")
    samples = steps // devices  # of a rollout on a device
    divides = samples % args.num_minibatches == 0 and args.num_minibatches < steps
    check("num_minibatches", divides, f"a divisor of {samples} samples, with 2 or more in each")


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
