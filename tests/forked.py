"""Runs pytest again and again, each time in a fork of one process that has imported the libraries already.

Each line of stdin is a JSON list of a folder, what pytest takes there, and the most seconds that it may; each line of
stdout its exit status, None where it took longer, and all that it printed. Nothing of the project is imported before.
"""

import importlib
import json
import os
import signal
import sys
import tempfile
import time

LIBRARIES = (
    *("torch", "torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp"),
    *("transformers", "transformers.modeling_utils", "transformers.generation", "accelerate", "accelerate.utils"),
    *("matplotlib.figure", "pydantic", "jinja2", "PIL.Image", "safetensors.torch", "einops", "pytest"),
)


def run(folder, words, most):
    """(pytest's exit status, None where it took more than `most` seconds; what it printed)."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        child = os.fork()
        if not child:
            in_child(folder, words, printed.fileno())
        status, deadline = None, time.monotonic() + most
        while status is None and time.monotonic() < deadline:
            time.sleep(0.05)
            done, ended = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(ended) if done else None
        if status is None:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        printed.seek(0)
        return status, printed.read()


def in_child(folder, words, printed):
    os.setsid()  # what it starts can be ended with it
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.stdout = sys.stderr = os.fdopen(printed, "w", buffering=1, encoding="utf-8", errors="replace")
    os.chdir(folder)
    sys.path[0] = folder
    sys.argv = ["pytest", *words]
    os._exit(sys.modules["pytest"].main(words))


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)
