"""Speed on an accelerator: steps a second, compilation, memory, where the time goes, and one whole
run. Everything ends within ten minutes on a GPU; on a CPU it takes small sizes.

    python benchmark/gpu.py --out gpu
    python benchmark/gpu.py --out gpu --tasks CoordSum-v0/3x10-30 --scripts mappo_ff --whole-run ""
    python benchmark/gpu.py --out cpu --num-envs 8 --num-steps 16 --matrix 512 --whole-run ""

Each configuration is a process of its own. Those of a task and a number of environments compile
side by side, then each is timed while the others wait. The table and the curve of the whole run go
to the folder --out; the table is written again after each figure, so that who stops the program
loses only what was not measured yet. XLA_FLAGS reach all processes, and stand above the table.

The rollout is timed by itself; the update is the rest of the iteration. The operations of the
update are those of its matrix products, counted in the program that JAX traces, and the peak is
what one large product reaches in the same precision, the default one (on a GPU this is TF32). The
first ratio is mu / mu_old before the first step, mean over all samples: 1 if acting and training
agree, whatever the precision.
"""
import dataclasses
import importlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial

import tyro

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = ("magpo_ff/sable", "magpo_ff/mat", "ctds_ff/sable", "mappo_ff", "magpo_rec/sable")


@dataclasses.dataclass
class Options:
    out: str = "gpu"  # folder of the results
    scripts: tuple[str, ...] = (*SCRIPTS, "mappo_rec")  # with the guider, where there is one
    tasks: tuple[str, ...] = (
        "CoordSum-v0/3x10-30", "RobotWarehouse-v0/tiny-2ag", "SMAX/2s3z")  # id/scenario
    num_envs: tuple[int, ...] = (4096, 512, 64)
    num_steps: int = 128  # rollout length T
    min_seconds: float = 1.0  # that each thing is timed for
    matrix: int = 8192  # rows and columns of the matrices whose product is the peak
    # Flags of the whole run of magpo_ff.py (--whole-run="--env-id ..."); "": none
    whole_run: str = (
        "--env-id RobotWarehouse-v0 --delta 1.5 --num-envs 1024 --total-timesteps 20000000")
    compile_seconds: float = 150  # after which what is not compiled yet is given up
    seconds: float = 570  # after which all that runs is stopped


# -------------------- In the process of a configuration -------------------------------------------
def matrix_operations(jaxpr) -> float:
    """Floating-point operations of all matrix products; loops of unknown length count once."""
    import jax

    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            products = equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)
            total += 2 * products
        leaves = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr"))
        inner = [getattr(x, "jaxpr", x) for x in leaves]
        inside = sum(matrix_operations(x) for x in inner if hasattr(x, "eqns"))
        total += equation.params.get("length", 1) * inside
    return total


def seconds_each(run, min_seconds: float) -> float:
    """Mean seconds of a run; the first is not timed."""
    run()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < min_seconds:
        run()
        count += 1
    return (time.perf_counter() - start) / count


def measure(options: Options, setting: tuple, pipe) -> None:
    """Compiles, says so, waits for its turn, and sends the figures."""
    name, task, num_envs = setting
    sys.path[:0] = [str(ROOT), str(ROOT / "baselines")]
    import jax

    stem, _, guider = name.partition("/")
    script = importlib.import_module(stem)
    env_id, _, scenario = task.partition("/")
    args = script.Args(env_id=env_id, scenario=scenario, num_envs=num_envs, num_devices=1)
    args.num_steps = options.num_steps
    args.total_timesteps = 1000 * num_envs * options.num_steps
    args = dataclasses.replace(args, **{"guider": guider} if guider else {})
    env = script.make_env(env_id, scenario)
    parts = (args, env, *script.make_networks(args, env))
    pmap = partial(jax.pmap, axis_name="device", devices=jax.devices()[:1])
    init = pmap(partial(script.init_state, *parts), in_axes=(None, 0))
    key = jax.random.PRNGKey(args.seed)
    state = jax.eval_shape(init, key, key[None])
    iterate = pmap(partial(script.train_iteration, *parts), donate_argnums=0)
    count = len(inspect.signature(script.collect).parameters) - 1
    collect = pmap(partial(script.collect, *parts[:count]))
    operations = matrix_operations(jax.make_jaxpr(iterate)(state).jaxpr)
    operations -= matrix_operations(jax.make_jaxpr(collect)(state).jaxpr)
    start = time.perf_counter()
    iterate = iterate.lower(state).compile()
    compile_seconds = time.perf_counter() - start
    collect = collect.lower(state).compile()
    need = iterate.memory_analysis()
    memory = need.temp_size_in_bytes + need.argument_size_in_bytes + need.output_size_in_bytes
    pipe.send("compiled")
    pipe.recv()

    state = init(key, key[None])
    _, metrics = iterate(jax.tree.map(lambda x: x.copy(), state))
    first_ratio = float(metrics["losses/first_ratio"][0])
    rollout_seconds = seconds_each(
        lambda: jax.block_until_ready(collect(state)), options.min_seconds)

    def run():
        nonlocal state
        state, metrics = iterate(state)
        jax.block_until_ready(metrics)

    seconds = seconds_each(run, options.min_seconds)
    pipe.send({
        "SPS": num_envs * options.num_steps / seconds,
        "compile_s": compile_seconds,
        "MiB": (memory - need.alias_size_in_bytes) / 2**20,
        "rollout": rollout_seconds / seconds,
        "iteration_s": seconds,
        "update FLOP/s": operations / (seconds - rollout_seconds),
        "first_ratio": first_ratio,
    })


def measure_peak(options: Options, pipe) -> None:
    """Sends the name of the device and the operations a second of a large matrix product."""
    import jax

    matrix = jax.random.normal(jax.random.PRNGKey(0), (options.matrix, options.matrix))
    product = jax.jit(lambda x: x @ x)
    seconds = seconds_each(lambda: product(matrix).block_until_ready(), options.min_seconds)
    versions = f"jax {jax.__version__}, {os.cpu_count()} CPU cores"
    versions += ", XLA_FLAGS=" + os.environ["XLA_FLAGS"] if "XLA_FLAGS" in os.environ else ""
    pipe.send((f"{jax.devices()[0].device_kind}, {versions}", 2 * options.matrix**3 / seconds))


# -------------------- In the main process ---------------------------------------------------------
def start(context, target, *args):
    """Starts target(*args, pipe) in a process of its own -> process, pipe."""
    here, there = context.Pipe()
    process = context.Process(target=target, args=(*args, there))
    process.start()
    there.close()
    return process, here


def receive(pipe, deadline: float):
    """What the process says; None if it has failed or the time is over."""
    try:
        return pipe.recv() if pipe.poll(max(0, deadline - time.time())) else None
    except EOFError:
        return None


def whole_run(options: Options, out: pathlib.Path, deadline: float) -> str:
    """The command a user types, until it ends or the time is over -> a line about it."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*options.whole_run.split(), "--run-dir", folder]
        command = [sys.executable, "magpo_ff.py", *flags]
        begin = time.time()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            process.wait(max(0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
        seconds = time.time() - begin
        kept = out / "whole_run"
        shutil.rmtree(kept, ignore_errors=True)
        large = shutil.ignore_patterns("*.npz", "*.safetensors")
        for path in pathlib.Path(folder).glob("*/metrics.jsonl"):
            shutil.copytree(path.parent, kept, ignore=large)
    if not kept.exists():
        return "The whole run has failed."
    row = json.loads((kept / "metrics.jsonl").read_text().splitlines()[-1])
    times = (row["time/compile_s"], row["time/train_s"], row["time/eval_s"])
    compiling, training, evaluating = map(round, times)
    learner, guider = row["eval/learner_return"], row["eval/guider_return"]
    return (
        f"`python magpo_ff.py {options.whole_run}`: {row['global_step']:,} steps in {seconds:.0f} "
        f"s (compilation {compiling}, training {training}, evaluation {evaluating}); learner "
        f"{learner:.2f}, guider {guider:.2f}.")


def table(device: str, peak: float, results: dict, about_whole_run: str) -> str:
    """All results as Markdown."""
    header = ["script", "task", "environments", "steps/s", "compile s", "memory MiB"]
    header += ["iteration s", "rollout", "update TFLOP/s", "of the peak", "first ratio - 1"]
    lines = [f"{device}; a matrix product reaches {peak / 1e12:.1f} TFLOP/s.", ""]
    lines += ["| " + " | ".join(x) + " |" for x in (header, ["---"] * len(header))]
    for (script, task, num_envs), x in results.items():
        cells = [script, task, f"{num_envs:,}"]
        if x is None:
            cells += ["not measured"] + [""] * (len(header) - 4)
        else:
            cells += [f"{x['SPS']:,.0f}", f"{x['compile_s']:.0f}", f"{x['MiB']:,.0f}"]
            cells += [f"{x['iteration_s']:.3f}", f"{x['rollout']:.0%}"]
            cells += [f"{x['update FLOP/s'] / 1e12:.2f}", f"{x['update FLOP/s'] / peak:.1%}"]
            cells += [f"{x['first_ratio'] - 1:.0e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", about_whole_run, ""])


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    deadline = time.time() + options.seconds
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the processes share the memory
    context = multiprocessing.get_context("spawn")
    process, pipe = start(context, measure_peak, options)
    device, peak = receive(pipe, deadline) or ("?", math.nan)
    process.join()
    line = whole_run(options, out, deadline) if options.whole_run else ""
    results = {}

    def write():
        text = table(device, peak, results, line)
        (out / "gpu.md").write_text(text)
        return text

    print(write(), flush=True)
    for num_envs, task in itertools.product(options.num_envs, options.tasks):
        settings = [(script, task, num_envs) for script in options.scripts]
        started = [start(context, measure, options, setting) for setting in settings]
        limit = min(deadline, time.time() + options.compile_seconds)
        compiled = [receive(pipe, limit) for _, pipe in started]
        for setting, (process, pipe), ready in zip(settings, started, compiled):
            if ready:
                pipe.send("your turn")
            results[setting] = receive(pipe, deadline) if ready else None
            process.kill()
            process.join()
            write()
            print(setting, results[setting], flush=True)
    print(write())


if __name__ == "__main__":
    main()
