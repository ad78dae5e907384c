"""One iteration of every script, written plainly, for test_reference.py to compare with.

Loops over devices d, environments b, steps t, agents j and samples; one network call at a time, for
one step of one game; losses, clipping and Adam by hand. It follows the paper (Eq. 9 and 10) and the
numbered details (docs/details.md), and draws random numbers as the scripts do. Networks, their
distributions and the environment are taken as they are.

`iterate` is the iteration. What differs between the algorithms is in their classes: who acts, the
loss of a step, and who learns in which order. A sample is what one game did in one step or, for
networks with memory, in a whole rollout: (steps, hidden before them).
"""

import math
import types
from collections import namedtuple
from functools import partial

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jax import random, tree

# What one iteration hands to the next. params and adam (count, mean mu and mean square nu of
# gradients) are of each network, in HAPPO with an axis for the agents; games are EnvState, hidden
# is what each network remembers, None without memory, both [d][b]; keys [d]; value_scale is the
# mean and size of targets up to now; log_delta the log of the tether's length.
State = namedtuple("State", "params adam games hidden keys value_scale iteration log_delta")

# One step of one game; what each agent has is (N,). team_obs is obs, also where all else is one
# agent's part; log_prob is of the policy that acted; values are as the network tells them, the next
# one that of what followed, also where the episode ended; discount is 0 where it was terminated,
# last is true where it was terminated or truncated; episode is its return, length and win so far;
# factor is HAPPO's M, the joint ratio of the agents before.
FIELDS = """obs team_obs timestep action log_prob value next_value reward discount last episode
    advantage target factor"""
Step = namedtuple("Step", FIELDS, defaults=[None] * 10 + [np.ones(1)])

one = partial(tree.map, lambda x: jnp.asarray(x)[None])  # a batch of one
to_host = partial(tree.map, np.asarray)
stacked = partial(tree.map, lambda *x: np.stack(x))
average = partial(tree.map, lambda *x: sum(x) / len(x))


def pick(trees, i):
    return tree.map(lambda x: x[i], trees)


def put(trees, j, new):
    return tree.map(lambda x, y: np.concatenate([x[:j], y[None], x[j + 1 :]]), trees, new)


def first_of(out, axes):
    """What a network says of a batch of one."""
    if hasattr(out, "distribution"):  # a Gaussian's scale has no batch axes yet
        normal = out.distribution
        out = distrax.Independent(distrax.Normal(normal.loc, normal.scale), 1)
    return pick(out, (0,) * axes)


def sample(policy, noise):
    """An action of each agent, by noise that is Gumbel's or normal."""
    if isinstance(policy, distrax.Categorical):
        return np.argmax(policy.logits + noise, axis=-1)
    return policy.distribution.loc + policy.distribution.scale * noise


# -------------------- Algorithms ------------------------------------------------------------------
class Algorithm:
    """What the algorithms have in common."""

    num_keys = 2  # drawn after a rollout: for the next iteration, and for the minibatches

    def __init__(self, script, args, env, *networks):
        no_tether = {"delta": math.inf, "learner_rl_coef": 0.0}  # in CTDS
        self.args = types.SimpleNamespace(**no_tether | vars(args))
        self.env, self.networks = env, networks
        self.has_memory = hasattr(script, "init_hidden")
        self.reset, self.step = jax.jit(env.reset), jax.jit(env.step)
        self.call = jax.jit(self.call, static_argnums=0)
        self.gradient = jax.grad(self.loss, has_aux=True)
        if self.has_memory:  # all steps of a rollout in one program would take long to compile
            self.step_loss = jax.jit(self.step_loss)
        else:
            self.gradient = jax.jit(self.gradient)

    def call(self, network, params, obs, timestep, hidden):
        """A learner or critic in one step of one game -> policy or value, hidden after it."""
        if not self.has_memory:
            return first_of(network.apply(params, one(obs)), 1), None
        out, hidden = network.apply(params, one(one(obs)), one(one(timestep)), one(hidden))
        return first_of(out, 2), pick(hidden, 0)

    def noise(self, key, num_agents):
        """Of one step on a device: (B, N, A)."""
        draw = random.normal if self.env.continuous else random.gumbel
        num_games = self.args.num_envs // self.args.num_devices
        return np.asarray(draw(key, (num_games, num_agents, self.env.num_actions)))

    def told(self, obs, hidden):
        """What the acting network reads -> obs."""
        return obs

    def value(self, *now):
        """It does not depend on the actions, so any noise does."""
        return self.act(*now, np.zeros((self.env.num_agents, self.env.num_actions)))[2]

    def backtrack(self, state):
        """What precedes the rollout -> params."""
        return state.params

    def update(self, params, adam, minibatch, rate, log_delta, agents):
        """One step of the networks on a minibatch -> params, adam, parts of the loss."""
        return learn(self, params, adam, minibatch, rate, math.exp(log_delta))

    def tether(self, log_delta, metrics):
        """log_delta of the next iteration."""
        return log_delta

    def loss(self, params, steps, hidden, delta):
        """Of a sample -> loss, its parts: means over steps and agents."""
        losses = []
        for step in steps:
            loss, hidden = self.step_loss(params, step, hidden, delta)
            losses.append(loss)
        return average(*losses)


def ppo_loss(ratio, near, eps, advantage):
    return -jnp.mean(jnp.minimum(ratio * advantage, jnp.clip(near, 1 - eps, 1 + eps) * advantage))


def distance(ratio, eps):
    """How far the policy has gone from the one that acted."""
    beyond = (ratio < 1 - eps) | (ratio > 1 + eps)
    parts = {"approx_kl": ratio - 1 - jnp.log(ratio), "clipfrac": beyond, "ratio": ratio}
    return tree.map(jnp.mean, parts)


class Magpo(Algorithm):
    """The guider acts; guider and learner learn, tethered to each other."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.guide = jax.jit(self.guide)

    def guide(self, params, obs, action, timestep, hidden):
        """The guider in one step of one game -> policy, value, hidden after it."""
        apply = self.networks[0].apply
        if not self.has_memory:
            policy, value = apply(params, one(obs), one(action))
            return first_of(policy, 1), value[0], None
        (obs, action, timestep), past = one(one((obs, action, timestep))), one(hidden)
        tokens, value, encoder = apply(params, obs, timestep, past["encoder"], method="encode")
        policy, decoder = apply(
            params, tokens, obs, action, timestep, past["decoder"], method="decode")
        return first_of(policy, 2), value[0, 0], pick({"encoder": encoder, "decoder": decoder}, 0)

    def told(self, obs, hidden):
        """D20: the guider also reads what its learner remembers."""
        return obs._replace(remembered=hidden["learner"]) if self.has_memory else obs

    def both(self, params, step, hidden):
        """Guider and learner in one step of one game -> policies, value, hidden after it."""
        mu, value, guider = self.guide(
            params["guider"], step.obs, step.action, step.timestep, hidden["guider"])
        pi, learner = self.call(
            self.networks[1], params["learner"], step.obs, step.timestep, hidden["learner"])
        return mu, pi, value, {"guider": guider, "learner": learner}

    def act(self, params, obs, timestep, hidden, noise):
        """Agent after agent, each told the actions of those before it; later ones are 0 so far.

        -> action, log_prob, value, hidden. The learner watches.
        """
        action = np.zeros_like(self.env.example_action)
        for j in range(len(action)):
            mu, _, value, after = self.both(params, Step(obs, obs, timestep, action), hidden)
            action[j] = sample(mu, noise)[j]
        return action, mu.log_prob(action), value, after

    def step_loss(self, params, step, hidden, delta):
        """Eq. 9 and 10 -> (loss, parts), hidden."""
        args, eps, stop = self.args, self.args.clip_coef, jax.lax.stop_gradient
        mu, pi, value, hidden = self.both(params, step, hidden)
        mu_now, pi_now, mu_old = mu.prob(step.action), pi.prob(step.action), jnp.exp(step.log_prob)
        r, rho = mu_now / mu_old, pi_now / mu_old
        r_near = jnp.clip(mu_now / stop(pi_now), 1 / delta, delta) * stop(pi_now) / mu_old
        mask = (mu_now / pi_now < 1 / delta) | (mu_now / pi_now > delta)
        parts = distance(r, eps) | {
            "guider_policy_loss": ppo_loss(r, r_near, eps, step.advantage),
            "guider_kl": jnp.mean(mask * mu.kl_divergence(stop(pi))),
            "guider_entropy": jnp.mean(mu.entropy()),
            "value_loss": jnp.mean((value - step.target) ** 2) / 2,  # D19: not clipped
            "learner_kl": jnp.mean(stop(mu).kl_divergence(pi)),
            "learner_policy_loss": ppo_loss(rho, rho, eps, step.advantage),
            "learner_entropy": jnp.mean(pi.entropy()),
            "delta_clipfrac": jnp.mean(mask),
        }
        eq_9 = parts["guider_policy_loss"] + parts["guider_kl"]
        eq_9 += args.vf_coef * parts["value_loss"] - args.ent_coef * parts["guider_entropy"]
        eq_10 = parts["learner_kl"] + args.learner_rl_coef * parts["learner_policy_loss"]
        return (eq_9 + eq_10, parts), hidden


class Residual(Magpo):
    """The guider is a base, the learner of the last reset, and a correction."""

    def backtrack(self, state):
        guider, learner = (state.params[name]["params"] for name in ("guider", "learner"))
        if state.iteration % self.args.reset_every == 0:
            correction = tree.map(np.zeros_like, guider["correction"])
            guider = guider | {"base": learner, "correction": correction}
        return state.params | {"guider": {"params": guider}}


class Adaptive(Magpo):
    """The tether gets shorter while the learner is too far away."""

    def tether(self, log_delta, metrics):
        metrics["charts/delta"] = math.exp(log_delta)
        excess = metrics["losses/learner_kl"] - self.args.target_kl
        log_delta -= self.args.tether_rate * excess
        return min(max(log_delta, math.log(1.02)), math.log(self.args.delta))


class Mappo(Algorithm):
    """The learner acts and learns by PPO; the critic sees the whole team."""

    def both(self, params, step, hidden):
        """Learner and critic in one step of one game -> policy, value, hidden after it."""
        policy, learner = self.call(
            self.networks[0], params["learner"], step.obs, step.timestep, hidden["learner"])
        value, critic = self.call(
            self.networks[1], params["critic"], step.team_obs, step.timestep, hidden["critic"])
        return policy, value, {"learner": learner, "critic": critic}

    def act(self, params, obs, timestep, hidden, noise):
        """-> action, log_prob, value, hidden."""
        policy, value, hidden = self.both(params, Step(obs, obs, timestep), hidden)
        action = sample(policy, noise)
        return action, policy.log_prob(action), value, hidden

    def step_loss(self, params, step, hidden, _):
        """-> (loss, parts), hidden."""
        args, eps = self.args, self.args.clip_coef
        policy, value, hidden = self.both(params, step, hidden)
        r = policy.prob(step.action) / jnp.exp(step.log_prob)
        parts = distance(r, eps) | {
            "learner_policy_loss": ppo_loss(r, r, eps, step.factor * step.advantage),
            "learner_entropy": jnp.mean(policy.entropy()),
            "value_loss": jnp.mean((value - step.target) ** 2) / 2,
        }
        loss = parts["learner_policy_loss"] + args.vf_coef * parts["value_loss"]
        return (loss - args.ent_coef * parts["learner_entropy"], parts), hidden


class Happo(Mappo):
    """MAPPO in which each agent has networks of its own, and the agents learn one after the other,
    each by its advantages times M, the joint ratio of those before it."""

    num_keys = 3  # and for the order of the agents

    def noise(self, key, num_agents):
        keys = random.split(key, num_agents)
        return np.concatenate([super(Happo, self).noise(key, 1) for key in keys], axis=1)

    def part_of(self, j, steps, hidden):
        """Agent j's part of a sample, as that of a team of one; its critic sees the whole team."""
        names = ("obs", "action", "log_prob", "advantage", "target")
        parts = [{name: one(pick(getattr(step, name), j)) for name in names} for step in steps]
        steps = [step._replace(**part) for step, part in zip(steps, parts)]
        return steps, {"learner": one(hidden["learner"][j]), "critic": hidden["critic"][j]}

    def act(self, params, obs, timestep, hidden, noise):
        acts = []
        for j in range(self.env.num_agents):
            (step,), past = self.part_of(j, [Step(obs, obs, timestep)], hidden)
            policy, value, past = self.both(pick(params, j), step, past)
            action = sample(policy, one(noise[j]))
            past = {"learner": past["learner"][0], "critic": past["critic"]}
            acts.append((action[0], policy.log_prob(action)[0], value[0], past))
        return stacked(*acts)

    def update(self, params, adam, minibatch, rate, log_delta, agents):
        all_parts, minibatch = [], [(list(steps), hidden) for steps, hidden in minibatch]
        for j in agents:
            own = [self.part_of(j, *sample) for sample in minibatch]
            new, new_adam, parts = learn(self, pick(params, j), pick(adam, j), own, rate, 1.0)
            params, adam = put(params, j, new), put(adam, j, new_adam)
            all_parts.append(parts)
            for (steps, _), (own_steps, hidden) in zip(minibatch, own):
                for t, step in enumerate(own_steps):  # M, now with the ratio of this agent
                    policy, _, hidden = self.both(new, step, hidden)
                    ratio = np.exp(policy.log_prob(step.action) - step.log_prob)
                    steps[t] = steps[t]._replace(factor=steps[t].factor * ratio)
        return params, adam, average(*all_parts)


# -------------------- Learning --------------------------------------------------------------------
def learn(algorithm, params, adam, minibatch, rate, delta):
    """Each network moves against its mean gradient, of a minibatch of all devices, with advantages
    of mean 0 and deviation 1 -> params, adam, parts of the loss."""
    results = []
    advantages = [step.advantage for steps, _ in minibatch for step in steps]
    mean, std = np.mean(advantages), np.std(advantages)
    for steps, hidden in minibatch:
        steps = [step._replace(advantage=(step.advantage - mean) / (std + 1e-20)) for step in steps]
        results.append(to_host(algorithm.gradient(params, steps, hidden, delta)))
    gradient, parts = average(*results)
    params, adam = dict(params), dict(adam)
    for name in params:
        parts[f"{name}_grad_norm"], params[name], adam[name] = adam_step(
            params[name], adam[name], gradient[name], rate, algorithm.args.max_grad_norm)
    return params, adam, parts


def adam_step(params, adam, gradient, rate, max_norm):
    """A step of Adam (b1 0.9, b2 0.999, eps 1e-5) -> norm of the gradient, params, adam."""
    norm = math.sqrt(sum(np.sum(g**2) for g in tree.leaves(gradient)))
    gradient = tree.map(lambda g: g * min(1.0, max_norm / norm), gradient)
    count = adam["count"] + 1
    mu = tree.map(lambda m, g: 0.9 * m + 0.1 * g, adam["mu"], gradient)
    nu = tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, adam["nu"], gradient)

    def move(x, m, v):
        return x - rate * (m / (1 - 0.9**count)) / (np.sqrt(v / (1 - 0.999**count)) + 1e-5)

    return norm, tree.map(move, params, mu, nu), {"count": count, "mu": mu, "nu": nu}


# -------------------- Iteration -------------------------------------------------------------------
def play(algorithm, params, games, hidden, key):
    """A rollout of T steps on one device -> rollout [b][t], games, hidden, key.

    D11: each game that ends takes the next fresh start; if too few are left, all are made anew.
    """
    games, hidden, starts, rollout = list(games), list(hidden), [], [[] for _ in games]
    key, steps_key = random.split(key)
    for step_key in random.split(steps_key, algorithm.args.num_steps):
        act_key, starts_key = random.split(step_key)
        noise = algorithm.noise(act_key, algorithm.env.num_agents)
        for b in range(len(games)):
            step, games[b], hidden[b] = play_step(algorithm, params, games[b], hidden[b], noise[b])
            rollout[b].append(step)
        ended = [b for b in range(len(games)) if rollout[b][-1].last]
        if len(starts) < len(ended):
            starts = [algorithm.reset(key) for key in random.split(starts_key, len(games))]
        for b in ended:
            games[b] = starts.pop(0)
    return rollout, games, hidden, key


def play_step(algorithm, params, game, hidden, noise):
    """-> Step, game and hidden after it."""
    obs = algorithm.told(game.obs, hidden)
    now = (obs, obs, game.episode["length"])
    action, log_prob, value, hidden = algorithm.act(params, *now[1:], hidden, noise)
    game, *results = algorithm.step(game, action)
    then = algorithm.told(game.obs, hidden)
    next_value = algorithm.value(params, then, game.episode["length"], hidden)
    step = to_host(Step(*now, action, log_prob, value, next_value, *results, game.episode))
    if step.last and isinstance(algorithm, Magpo) and algorithm.has_memory:
        hidden = hidden | {"learner": 0 * hidden["learner"]}
    return to_host((step, game, hidden))


def with_advantages(steps, scale, args):
    """The steps of one game with advantages and targets: GAE, backwards (D8)."""
    mean, size = scale
    done, advantage = [], 0.0
    for step in reversed(steps):
        value, next_value = mean + size * step.value, mean + size * step.next_value
        error = step.reward + args.gamma * step.discount * next_value - value
        advantage = error + (0.0 if step.last else args.gamma * args.gae_lambda * advantage)
        done.insert(0, step._replace(advantage=advantage, target=value + advantage))
    return done


def follow(scale, targets, iteration):
    """D19: the mean follows the targets by a tenth, and at first faster; the size is the std that a
    Gaussian with the targets' fourth moment has."""
    mean, size = scale
    share = max(0.1, 1 / (iteration + 1))
    mean = (1 - share) * mean + share * np.mean(targets)
    fourth = np.mean((np.array(targets) - mean) ** 4) / 3
    return np.array([mean, ((1 - share) * size**4 + share * fourth) ** 0.25])


def samples_of(algorithm, rollout, hidden, scale):
    """What one device learns from, with targets told in the scale."""
    mean, size = scale
    unit = size + 1e-20
    rollout = [[s._replace(target=(s.target - mean) / unit) for s in steps] for steps in rollout]
    if algorithm.has_memory:  # begin with what was remembered before the rollout
        return list(zip(rollout, hidden))
    return [([step], hidden[b]) for steps in zip(*rollout) for b, step in enumerate(steps)]


def orders_of(key, length, args):
    """In each epoch another: (update_epochs, length)."""
    numbers = np.tile(np.arange(length), (args.update_epochs, 1))
    return np.asarray(random.permutation(key, numbers, axis=1, independent=True))


def iterate(algorithm, state):
    """-> State, metrics."""
    args, adam, params = algorithm.args, state.adam, algorithm.backtrack(state)
    devices = zip(state.games, state.hidden, state.keys)
    played = [play(algorithm, params, *device) for device in devices]
    rollouts, games, hidden, keys = map(list, zip(*played))
    rollouts = [[with_advantages(steps, state.value_scale, args) for steps in x] for x in rollouts]
    seen = [step for rollout in rollouts for steps in rollout for step in steps]
    scale = follow(state.value_scale, [step.target for step in seen], state.iteration)
    samples = [samples_of(algorithm, *device, scale) for device in zip(rollouts, state.hidden)]

    keys = [random.split(key, algorithm.num_keys) for key in keys]
    orders = [orders_of(own_keys[1], len(own), args) for own_keys, own in zip(keys, samples)]
    # HAPPO's order of the agents is that of the first device on all.
    agents = orders_of(keys[0][-1], algorithm.env.num_agents, args)
    num_iterations = args.total_timesteps // (args.num_envs * args.num_steps)
    rate = args.learning_rate * (1 - args.anneal_lr * state.iteration / num_iterations)
    all_parts = []
    for epoch in range(args.update_epochs):
        shares = [np.split(order[epoch], args.num_minibatches) for order in orders]
        for indices in zip(*shares):  # equally many of each device
            minibatch = [own[i] for own, chosen in zip(samples, indices) for i in chosen]
            params, adam, parts = algorithm.update(
                params, adam, minibatch, rate, state.log_delta, agents[epoch])
            all_parts.append(parts)
    metrics = metrics_of(all_parts, seen) | {"charts/learning_rate": rate}
    after = (params, adam, games, hidden, [own_keys[0] for own_keys in keys], scale)
    return State(*after, state.iteration + 1, algorithm.tether(state.log_delta, metrics)), metrics


def metrics_of(all_parts, steps):
    """Means over minibatches, how well values explain targets, and sums over ended episodes."""
    metrics = {f"losses/{name}": x for name, x in average(*all_parts).items() if name != "ratio"}
    metrics["losses/first_ratio"] = all_parts[0]["ratio"]
    unexplained = np.std([step.advantage for step in steps])
    total = np.std([step.target for step in steps])
    metrics["losses/explained_variance"] = 1 - (unexplained / (total + 1e-20)) ** 2
    ended = [step.episode for step in steps if step.last]
    for name in ("return", "length", "won"):
        metrics[name] = sum(episode[name] for episode in ended)
    return metrics | {"episodes": len(ended)}
