"""Copies what the zoo keeps of finished runs, one a task: flags, metrics and the best networks,
rounded to half precision, which takes half of the room.

    python zoo/pick.py zoo/runs/zoo
"""

import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def main():
    zoo = Path(__file__).parent
    sys.path.append(str(zoo.parent / "benchmark"))
    from run import read_run
    runs = {}
    for run in sorted(path.parent for path in Path(sys.argv[1]).glob("*/metrics.jsonl")):
        env_id, scenario, *_ = run.name.split("__")
        folder = zoo / "__".join(filter(None, [env_id, scenario]))
        _, _, complete = read_run(run)
        if not complete or folder in runs:
            sys.exit(f"pick.py: error: {run}: has not finished, or is another of its task")
        runs[folder] = run
    for folder, run in runs.items():
        folder.mkdir(exist_ok=True)
        for name in ("args.json", "metrics.jsonl"):
            shutil.copy(run / name, folder)
        for name in ("best_learner.safetensors", "best_guider.safetensors"):
            arrays = load_file(run / name)
            halves = {key: x.astype(np.float16) for key, x in arrays.items()}
            save_file(halves, folder / name)
        print(folder)


if __name__ == "__main__":
    main()
