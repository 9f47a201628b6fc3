"""What a second process costs: bytes sent a step, time spent on exchange, and how evenly the work is shared.

`python -m tests.scaling` runs the sample data through the small checkpoint in two processes over the loopback of a
network namespace of their own, whose counters see nothing else. Two processes on one machine share its cores, so their
speed says nothing; what they send and wait for does.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def sent():
    """Bytes that left by the loopback of this network namespace."""
    (line,) = [line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split()[9])


def measure():
    """In each process: the script's run, whose last epoch is timed and whose bytes are counted."""
    import finetune_moondream as script  # here, as whoever starts these processes does without
    from tests import launched

    train_epoch, finish, result = script.train_epoch, script.finish, {}

    def timed_epoch(engine, steps, encoder, progress, *arguments):
        engine.accelerator.wait_for_everyone()
        before, started = sent(), time.perf_counter()
        train_epoch(engine, steps, encoder, progress, *arguments)
        seconds = time.perf_counter() - started
        engine.accelerator.wait_for_everyone()
        result["bytes sent a step, all processes"] = round((sent() - before) / progress.step)
        result["bytes of gradients"] = sum(p.numel() * p.element_size() for p in engine.text_model.parameters())
        ddp = engine.text_model._get_ddp_logging_data()  # torch's own clocks, of a step in a hundred
        names = ("forward_compute", "backward_compute", "backward_comm", "backward_compute_comm_overlap")
        result["ms a step"] = {name: round(ddp[f"avg_{name}_time"] / 1e6, 1) for name in names}
        result["ms a step"]["all"] = round(1000 * seconds / progress.step, 1)

    def report(*arguments):
        finish(*arguments)
        print(json.dumps(result), file=sys.stderr)

    folder = Path(os.environ["NOTES"])
    os.environ["NOTES"] = str(folder / f"{os.environ['RANK']}.json")
    script.train_epoch, script.finish = timed_epoch, report
    launched.noting()
    script.cli.run(script.main)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    arguments, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--model_id", "tests/tiny_moondream2", "--output_dir", f"{folder}/out", "--epochs", "2", *flags]
        flags = ["--features_dir", f"{folder}/features", "--valid_answers", "0", *flags]
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no"]
        launch += ["--num_machines", "1", "--num_processes", str(arguments.processes)]
        command = shlex.join([*launch, "-m", "tests.scaling", *flags])
        environment = {**os.environ, "NOTES": folder, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        alone = ["unshare", "--net", "sh", "-c", f"ip link set lo up && exec {command}"]
        subprocess.run(alone, cwd=ROOT, env=environment, check=True)
        for file in sorted(Path(folder).glob("*.json")):
            work = {name: count for name, count in json.loads(file.read_text()).items() if name != "steps"}
            print(f"process {file.stem}: {work}")


if __name__ == "__main__":
    measure() if "RANK" in os.environ else main()
