"""The script in child processes that start in no time: forked from a server that has imported everything."""

import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["finetune_moondream", "child"])


def run(flags, out, file_size):
    """Runs the script's `main` as the command does, its output into a file; no file may grow over `file_size` bytes."""
    import finetune_moondream
    from flags import run as run_script

    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv = ["finetune_moondream.py", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    run_script(finetune_moondream.main)


class Child:
    """A run of the script with these flags."""

    def __init__(self, flags, out, file_size=None):
        self.out = Path(out)
        self.process = CONTEXT.Process(target=run, args=(flags, str(out), file_size))
        self.process.start()

    def wait(self, timeout=300):
        """The exit status; minus the signal's number where one ended it."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, self.text()
        return self.process.exitcode

    def kill(self):
        self.process.kill()
        return self.wait()

    def text(self):
        return self.out.read_text()
