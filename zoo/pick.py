"""Copies what the zoo keeps of finished runs: flags, metrics and the best networks.

    python zoo/pick.py benchmark/runs/zoo
"""

import shutil
import sys
from pathlib import Path

KEPT = ["args.json", "metrics.jsonl", "best_learner.safetensors", "best_guider.safetensors"]


def main():
    zoo = Path(__file__).parent
    for run in sorted(Path(sys.argv[1]).iterdir()):
        env_id, scenario, *_ = run.name.split("__")
        folder = zoo / "__".join(filter(None, [env_id, scenario]))
        folder.mkdir(exist_ok=True)
        for name in KEPT:
            shutil.copy(run / name, folder)
        print(folder)


if __name__ == "__main__":
    main()
