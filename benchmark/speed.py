"""Speed of training, without compilation, and where the time goes; prints a Markdown table.

    python benchmark/speed.py
    python benchmark/speed.py --env-id RobotWarehouse-v0 --scenarios tiny-2ag tiny-4ag \\
        --scripts magpo_rec.py
    python benchmark/speed.py --scripts magpo_rec.py --guiders sable --num-steps 32 128 512 \\
        --rounds 3 --no-breakdown
    python benchmark/speed.py --scripts magpo_rec.py baselines/mappo_rec.py \\
        baselines/happo_rec.py --guiders sable --no-breakdown

All configurations are compiled first and then timed in turn (A B A B ...), a product of two 1024 x
1024 matrices among them, so that a busy moment of the machine strikes all alike. Each figure is a
median over the rounds. Memory is what the compiler sets aside for an iteration, its inputs and
outputs included.
"""
import dataclasses
import functools
import importlib.util
import itertools
import os
import sys
import time
from typing import Any, Callable, Tuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclasses.dataclass
class Options:
    scripts: Tuple[str, ...] = ("magpo_ff.py",)  # scripts to time
    guiders: Tuple[str, ...] = ("mat", "sable")  # guiders to time
    env_id: str = "CoordSum-v0"
    scenarios: Tuple[str, ...] = ("3x10-30",)  # scenarios to time
    num_envs: Tuple[int, ...] = (64,)  # numbers of environments to time
    num_steps: Tuple[int, ...] = (128,)  # rollout lengths T to time
    chunk_steps: int = 0  # of the script with memory; 0: its default
    num_minibatches: int = 2
    update_epochs: int = 4
    num_devices: int = 1  # on a CPU, more than one splits it
    rounds: int = 8  # timed rounds
    # time rollout and environment alone, too, and count the update's operations
    breakdown: bool = True


def load(script: str) -> Any:
    """Imports a script of the repository's root by its file name."""
    sys.path.insert(0, ROOT)
    name = script[: -len(".py")].replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, os.path.join(ROOT, script))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seconds(function: Callable, *inputs: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*inputs))
    return time.perf_counter() - start


def random_policy(env: Any, args: Any, state: Any, key: jax.Array) -> jax.Array:
    """Plays T steps in every environment with random legal actions and no resets -> sum of
    rewards."""

    def step(carry, key):
        env_state, obs = carry
        action = jax.random.categorical(key, jnp.where(obs.action_mask, 0.0, -1e9))  # (B, N)
        env_state, outcome = jax.vmap(env.step)(env_state, action)
        return (env_state, outcome.obs), jnp.sum(outcome.reward)

    return jnp.sum(
        jax.lax.scan(step, (state.env_state, state.obs), jax.random.split(key, args.num_steps))[1]
    )


class Configuration:
    """One script at one setting, compiled, with the seconds of each of its parts."""

    def __init__(
        self, options: Options, script: str, guider_name: str, scenario: str, num_envs: int,
        num_steps: int,
    ):
        m = load(script)
        args = m.Args(
            env_id=options.env_id, scenario=scenario, num_envs=num_envs, num_steps=num_steps,
            num_minibatches=options.num_minibatches, update_epochs=options.update_epochs,
            num_devices=options.num_devices,
        )
        has_guider = hasattr(args, "guider")  # the baselines have none
        if has_guider:
            args.guider = guider_name
        has_memory = hasattr(m, "Hidden")
        if options.chunk_steps and has_memory:
            args.chunk_steps = options.chunk_steps
        m.check_args(args)
        devices, env = m.choose_devices(args), m.make_env(args.env_id, args.scenario)
        (guider, learner), optimizers = m.make_networks(args, env), m.make_optimizers(args)
        parts, key = (args, env, guider, learner, optimizers), jax.random.PRNGKey(0)
        self.args, self.name = args, script[: -len(".py")] + f" {guider_name}" * has_guider
        networks = (guider, learner) if has_memory else (guider,)

        start = time.perf_counter()
        init = jax.pmap(functools.partial(m.init_state, *parts), in_axes=(None, 0), devices=devices)
        keys = jax.random.split(key, args.num_devices)
        self.state = init.lower(key, keys).compile({"xla_backend_optimization_level": 0})(key, keys)
        iterate = functools.partial(m.train_iteration, *parts)
        self.iterate = (
            jax.pmap(iterate, axis_name="device", devices=devices).lower(self.state).compile()
        )
        self.compile_s = time.perf_counter() - start
        memory = self.iterate.memory_analysis()
        self.memory = (
            memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
        )

        self.times = {"iteration": [], "collect": [], "play": []}
        print(
            f"compiled {self.name} {scenario}, {num_envs} x {num_steps}", file=sys.stderr,
            flush=True,
        )
        self.breakdown = options.breakdown
        if not options.breakdown:
            return
        collect = jax.pmap(lambda state: m.collect(args, env, *networks, state), devices=devices)
        self.collect = collect.lower(self.state).compile()
        play = jax.pmap(
            functools.partial(random_policy, env, args), in_axes=(0, None), devices=devices
        )
        self.play = play.lower(self.state, key).compile()

        # FLOPs of one minibatch's gradient, as the compiler counts them, for XLA counts the body of
        # a loop once.
        def minibatch(state):
            _, rollout, _ = m.collect(args, env, *networks, state)
            inputs = (rollout.value, rollout.value) + ((state.hidden,) if has_memory else ())
            samples, indices = m.make_minibatches(args, rollout, *inputs, key)
            return jax.tree.map(lambda x: x[indices[0]], samples)

        one = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[0]), self.state)
        mb = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(minibatch, one))
        params = one.params
        loss = functools.partial(m.minibatch_loss, args=args, guider=guider, learner=learner)
        grad = jax.vmap(
            jax.grad(lambda params, mb: loss(params, mb=mb)[0]), axis_name="device",
            in_axes=(None, 0),
        )
        analysis = (
            jax.jit(grad)
            .lower(params, jax.tree.map(lambda x: x[None], mb))
            .compile()
            .cost_analysis()
        )
        updates = args.update_epochs * args.num_minibatches
        self.update_flops = analysis["flops"] * updates * args.num_devices

    def time_once(self) -> None:
        self.times["iteration"].append(seconds(self.iterate, self.state))
        if not self.breakdown:
            return
        self.times["collect"].append(seconds(self.collect, self.state))
        self.times["play"].append(seconds(self.play, self.state, jax.random.PRNGKey(1)))

    def row(self, matmul_flops: float) -> list:
        iteration, steps = (
            np.median(self.times["iteration"][1:]),
            self.args.num_envs * self.args.num_steps,
        )
        cells = [
            self.name, self.args.scenario, self.args.num_envs, self.args.num_steps,
            f"{steps / iteration:,.0f}", f"{self.compile_s:.0f}", f"{self.memory / 2**20:,.0f}",
        ]
        if not self.breakdown:
            return cells
        collect, play = (np.median(self.times[name][1:]) for name in ("collect", "play"))
        rate = self.update_flops / (iteration - collect)
        return cells + [
            f"{collect / iteration:.0%}", f"{1 - collect / iteration:.0%}", f"{steps / play:,.0f}",
            f"{rate / 1e9:,.1f}", f"{rate / matmul_flops:.0%}",
        ]


def main() -> None:
    options = tyro.cli(Options)
    if options.num_devices > 1:
        jax.config.update("jax_num_cpu_devices", options.num_devices)
        os.environ["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
        )
    configurations = [Configuration(options, *setting) for setting in itertools.product(
        options.scripts, options.guiders, options.scenarios, options.num_envs, options.num_steps)]
    matrix, products = jax.random.normal(jax.random.PRNGKey(0), (1024, 1024)), []
    product = jax.jit(lambda x: x @ x)
    for _ in range(options.rounds + 1):  # the first is a warm-up
        products.append(min(seconds(product, matrix) for _ in range(5)))
        for configuration in configurations:
            configuration.time_once()
    matmul_flops = 2 * 1024**3 / np.median(products[1:])
    print(
        f"{options.env_id}, {options.update_epochs} epochs, {options.num_minibatches} minibatches, "
        f"{options.num_devices} x {jax.devices()[0].device_kind}, "
        f"jax {jax.__version__}; a 1024^3 matrix product: {matmul_flops / 1e9:,.0f} GFLOP/s\n"
    )
    header = [
        "configuration", "scenario", "environments", "rollout length", "steps/s", "compile s",
        "memory MiB",
    ]
    if options.breakdown:
        header += ["rollout", "update", "environment steps/s", "update GFLOP/s", "of the product's"]
    for cells in [header, ["---"] * len(header)] + [c.row(matmul_flops) for c in configurations]:
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
