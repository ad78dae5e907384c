"""Writes benchmark/paper.txt: for each of the paper's 43 tasks one command, with the budget and the
tuned hyperparameters of the official runs.

    python benchmark/paper.py
"""
import os

import pandas as pd

FOLDER = os.path.dirname(os.path.abspath(__file__))
ENV_IDS = {  # suites as tuned_params.csv calls them, in the paper's order
    "rware": "RobotWarehouse-v0",
    "smax": "SMAX",
    "lbf": "LevelBasedForaging-v0",
    "connector": "Connector-v3",
    "coordsum": "CoordSum-v0",
    "mpe": "MPE_simple_spread_v3",
}
# The official names of the CoordSum tasks leave out how far the targets go.
SCENARIOS = {"3x10": "3x10-30", "3x30": "3x30-50", "5x20": "5x20-80", "8x15": "8x15-100"}

HEAD = """\
# The paper's 43 tasks, with the official tuned hyperparameters and budget: 1220 updates of 128
# environments x 128 steps, 19,988,480 in all. Written by benchmark/paper.py from
# benchmark/tuned_params.csv. The paper has 10 seeds.
#
#     python benchmark/run.py benchmark/paper.txt --seeds 1 2 3 4 5 6 7 8 9 10
#     python benchmark/run.py benchmark/paper.txt --only "tiny-2ag " --total-timesteps 2000000
#     python benchmark/plot.py benchmark/runs/paper --export benchmark/results/paper.csv
"""
COMMAND = """\
python magpo_rec.py --env-id {env_id} --scenario {scenario} \\
    --delta {delta} --learner-rl-coef {alpha} --learning-rate {learning_rate} \\
    --max-grad-norm {max_grad_norm} --num-minibatches {num_minibatches} \\
    --update-epochs {ppo_epochs} --clip-coef {clip_eps} --ent-coef {ent_coef} --num-envs 128 \\
    --embed-dim {n_embd} --num-heads {n_head} --num-blocks {n_block} --no-guider-mlp \\
    --decay-scaling-factor {decay_scaling_factor} --eval-episodes 32 --num-evals 122 \\
    --total-timesteps 20000000 --exp-name magpo
"""


def write_commands() -> str:
    """The text of paper.txt, a suite after another."""
    table = pd.read_csv(os.path.join(FOLDER, "tuned_params.csv"), comment="#", dtype=str)
    table = table[table["system_name"] == "magpo"]
    table["env_id"] = table["env_name"].map(ENV_IDS)
    table["scenario"] = table["task"].replace(SCENARIOS)
    # The one learning rate of the CoordSum rows stands in the other column.
    table["learning_rate"] = table["actor_lr"].fillna(table["critic_lr"])
    table = table.sort_values("scenario")
    text = HEAD
    for env_id in ENV_IDS.values():
        rows = table[table["env_id"] == env_id].to_dict("records")
        text += f"\n# {env_id}: {len(rows)} tasks\n"
        for row in rows:
            text += COMMAND.format(**row)
    return text


if __name__ == "__main__":
    with open(os.path.join(FOLDER, "paper.txt"), "w") as file:
        file.write(write_commands())
