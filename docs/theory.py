"""The theory of MAGPO (arXiv 2507.18059) as a program: the exact tabular loop in float64, without
samples or networks. `tables.py` plays with it, tests/test_theory.py checks what it promises.

One iteration starts at a product policy mu_k = pi_k. `four_steps` is the loop; each step is one
function:
  1. collect    V and Q of the joint policy mu_k, from the Bellman equations      `evaluate`
  2. guider     mu^ = argmax_mu eta <Q, mu> - KL(mu, mu_k), so
                mu^(a|s) ~ mu_k(a|s) exp(eta Q(s,a))                            `mirror_descent`
  3. learner    pi_{k+1} = argmin KL(pi, mu^) over product policies pi = prod_j pi^j(a_j|s)
                                                                           `project_reverse_kl`
  4. backtrack  mu_{k+1} = pi_{k+1}

Why V cannot fall (Theorem 4.1). Insert mu^ into the KL of step 3: for every joint policy pi, in
every state,
    J(pi) := eta <A, pi> - KL(pi, mu_k) = log Z - KL(pi, mu^),
    Z(s) = E_{mu_k} exp(eta A(s,.)),   J(mu_k) = 0.    (*)
Step 3 is not convex over product policies, but its global minimum is not needed: coordinate descent
started at pi_k gives KL(pi_{k+1}, mu^) <= KL(pi_k, mu^). Because mu_k = pi_k (what step 4 buys),
this is J(pi_{k+1}) >= J(pi_k) = 0, so <A, pi_{k+1}> >= KL(pi_{k+1}, pi_k) / eta >= 0 in every
state. The performance-difference lemma does the rest:
V_{pi_{k+1}} - V_{pi_k} = (I - gamma P_{pi_{k+1}})^-1 <A, pi_{k+1}>,
and that inverse has no negative entry.

Shapes: S states, agents 0..N-1 with A_j actions. A joint quantity is (S, A_0, .., A_{N-1}); a
learner is a list of N arrays (S, A_j). Policies are log-probabilities, so that nearly deterministic
ones do not underflow to log 0.
"""

from collections import namedtuple

import numpy as np
from scipy.special import log_softmax, logsumexp

Game = namedtuple("Game", "reward transition gamma")  # (S, A_0, ..), (S, A_0, .., S), float


def spread(x, j, num_agents):
    """Agent j's (S, A_j) array as (S, 1, .., A_j, .., 1), to broadcast against joint arrays."""
    return x.reshape(len(x), *(-1 if i == j else 1 for i in range(num_agents)))


def joint(log_learner):
    """The product policy: log pi(a|s) = sum_j log pi^j(a_j|s). (S, A_0, .., A_{N-1})"""
    return sum(spread(log_pi, j, len(log_learner)) for j, log_pi in enumerate(log_learner))


def expectation(f, log_learner, agents):
    """E[f(s, a)] over the actions of the given agents, whose axes stay with length 1."""
    for i in agents:
        f = (f * spread(np.exp(log_learner[i]), i, len(log_learner))).sum(axis=1 + i, keepdims=True)
    return f


def expectation_for(j, f, log_learner):
    """E_{a_-j}[f(s, a)] over the actions of all agents but j. (S, A_j)"""
    others = [i for i in range(len(log_learner)) if i != j]
    return expectation(f, log_learner, others).reshape(log_learner[j].shape)


def kl(log_p, log_q):
    """KL(p, q) in each state, for one agent's policies or joint ones. (S,)"""
    return (np.exp(log_p) * (log_p - log_q)).reshape(len(log_p), -1).sum(axis=1)


def evaluate(game, log_mu):
    """Step 1: V = r_mu + gamma P_mu V, solved exactly, and Q = r + gamma P V. (S,),
    (S, A_0, .., A_{N-1})"""
    mu, num_states = np.exp(log_mu), len(log_mu)
    reward_mu = (mu * game.reward).reshape(num_states, -1).sum(axis=1)
    weighted = (mu[..., None] * game.transition).reshape(num_states, -1, num_states)
    matrix = np.eye(num_states) - game.gamma * weighted.sum(axis=1)
    value = np.linalg.solve(matrix, reward_mu)
    return value, game.reward + game.gamma * game.transition @ value


def mirror_descent(log_mu, q, eta):
    """Step 2: log mu^ = log mu_k + eta Q - const(s), over joint actions."""
    log_guider = log_mu + eta * q
    return log_guider - logsumexp(log_guider, axis=tuple(range(1, q.ndim)), keepdims=True)


def coordinate_update(log_learner, log_guider, j):
    """argmin over pi^j alone of KL(prod_i pi^i, mu^): pi^j ~ exp(E_{a_-j}[log mu^]). (S, A_j)"""
    return log_softmax(expectation_for(j, log_guider, log_learner), axis=1)


def sweep(log_learner, log_guider):
    """Every agent once, in turn: agent j answers to new policies of agents < j, old ones of > j."""
    log_learner = list(log_learner)
    for j in range(len(log_learner)):
        log_learner[j] = coordinate_update(log_learner, log_guider, j)
    return log_learner


def project_reverse_kl(log_learner, log_guider, max_sweeps=200):
    """Step 3: a local argmin of KL(pi, mu^) over product policies. No sweep raises the KL."""
    previous = kl(joint(log_learner), log_guider)
    for _ in range(max_sweeps):
        log_learner = sweep(log_learner, log_guider)
        current = kl(joint(log_learner), log_guider)
        if np.all(previous - current < 1e-12):
            break
        previous = current
    return log_learner


def project_forward_kl(log_learner, log_guider):
    """argmin KL(mu^, pi), the imitation loss as coded: the guider's marginals."""
    axes = set(range(1, log_guider.ndim))
    return [logsumexp(log_guider, axis=tuple(axes - {axis})) for axis in sorted(axes)]


def project_simultaneous(log_learner, log_guider):
    """Not MAGPO: every agent answers to the OLD policies of all the others."""
    return [coordinate_update(log_learner, log_guider, j) for j in range(len(log_learner))]


def four_steps(game, log_learner, eta, iterations, project=project_reverse_kl, backtrack=True):
    """Yields (Q_{mu_k}, guider mu^_k, learner pi_{k+1}), k = 0, ..; CTDS without backtracking."""
    log_mu = joint(log_learner)
    for _ in range(iterations):
        _, q = evaluate(game, log_mu)  # STEP 1/4
        log_guider = mirror_descent(log_mu, q, eta)  # STEP 2/4
        log_learner = project(log_learner, log_guider)  # STEP 3/4
        log_mu = joint(log_learner) if backtrack else log_guider  # STEP 4/4
        yield q, log_guider, log_learner


def random_game(seed):
    """A dense game (2-4 states, 2-3 agents, 2-3 actions, V in [0, 10]) and a product policy."""
    rng = np.random.default_rng(seed)
    num_states, actions = rng.integers(2, 5), tuple(rng.integers(2, 4, size=rng.integers(2, 4)))
    reward = rng.uniform(size=(num_states, *actions))
    transition = rng.dirichlet(np.ones(num_states), size=(num_states, *actions))
    learner = [rng.dirichlet(np.ones(n), size=num_states) for n in actions]
    return Game(reward, transition, 0.9), [np.log(policy) for policy in learner]


def sum_game(num_agents, num_actions, target):
    """One state, one step: reward 1 if the actions 0..A-1 sum to the target."""
    total = sum(spread(np.arange(num_actions)[None], j, num_agents) for j in range(num_agents))
    return Game((total == target).astype(float), np.ones((*total.shape, 1)), 0.0)
