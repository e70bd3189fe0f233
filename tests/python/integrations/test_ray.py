"""Ray Train: two workers of a local cluster train what one process does."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny import processes
from tiny.models import llama
from tiny.training import assert_trained_alike, losses

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
# A cluster of two processors under a folder of its own; the example finds it, and it ends with the process.
DRIVER = """
import runpy, sys, ray
ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def short_folder() -> Iterator[str]:
    """Ray's sockets lie there: their paths must be short."""
    folder = tempfile.mkdtemp(prefix="ray")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)  # eight processes of Ray's import torch, two of them transformers too
def test_two_workers_train_the_adapter_of_one_process_on_the_joint_batch(short_folder: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "float")
    alone = processes.run(EXAMPLES / "ddp.py", [tmp_path / "float", tmp_path / "one"], tmp_path / "output", 1)[0]
    command = [sys.executable, "-c", DRIVER, short_folder, str(EXAMPLES / "ray_train.py")]
    command += [str(tmp_path / "float"), str(tmp_path / "two")]
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "200"}  # a busy machine is slow
    driver = subprocess.Popen(
        command,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, errors = driver.communicate(timeout=480)
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGTERM)
            driver.wait()
    assert driver.returncode == 0, errors
    saved = Path(next(line for line in printed.splitlines() if line.startswith(str(tmp_path))))
    assert_trained_alike(losses(printed), losses(alone), saved, tmp_path / "one")
