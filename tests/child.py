"""The script in child processes that start in no time: forked from a server that has done it all before."""

import multiprocessing
import os
import resource
import select
import signal
import socket
import sys
import time
import warnings
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from unittest.mock import patch

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.warmed"])


def start_server():
    """Makes the server a fork of this process, which has imported already what an interpreter would for seconds."""
    resource_tracker.ensure_running()
    with patch("multiprocessing.util.spawnv_passfds", forked):
        forkserver.ensure_running()


def forked(path, words, descriptors):
    """In place of `spawnv_passfds`: a fork, which runs the code that ends those words once a child is asked for.

    The descriptors are those where that is asked, and one that closes when nobody is left to ask.
    """
    if pid := os.fork():
        return pid
    try:
        asked, alive = descriptors
        for each in [int(path.name) for path in Path("/dev/fd").iterdir()]:
            if each != alive and is_same_file(each, alive):
                os.close(each)  # the asking end: while it is open here, somebody is left
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # pytest's own until now, as are its warnings
        for kind in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        if asked in select.select(descriptors, [], [])[0]:
            exec(words[-1])
    except Exception:
        sys.excepthook(*sys.exc_info())  # which nothing would print on the way out here
    finally:
        os._exit(0)


def is_same_file(one, other):
    try:
        return os.path.samestat(os.fstat(one), os.fstat(other))
    except OSError:  # one that listed them, and is closed by now
        return False


def leave_undrawn(figure, file, **options):
    """In place of `Figure.savefig`, which takes half of a small run: its charts are drawn in the tests of the page."""
    file.write("<svg/>")


def leave_unflushed(file):
    """In place of `os.fsync`, which waits for the disk: only a loss of power would show it. Its calls are tested."""


def run(work, out, file_size, environment, setup):
    """Runs the script's `main` as the command does, its output into a file; no file may grow over `file_size` bytes.

    `work` are the flags, or a function that is run in place of `main`.
    """
    os.environ.update(environment)
    torch.set_num_threads(1)  # makes torch's pool anew, which threads of a fork would else do at once, and fail
    from matplotlib.figure import Figure

    import finetune_moondream
    from moondream2.cli import run as run_script

    Figure.savefig, os.fsync = leave_undrawn, leave_unflushed
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if setup is not None:
        setup()
    if callable(work):
        run_script(work)
    else:
        words = [word for name, value in work.items() for word in (f"--{name}", str(value))]
        sys.argv = ["finetune_moondream.py", *words]
        run_script(finetune_moondream.main)


class Child:
    """A run of the script with these flags, or of a function; `setup` is called before it."""

    def __init__(self, work, out, file_size=None, environment=None, setup=None):
        self.out = Path(out)
        self.process = CONTEXT.Process(target=run, args=(work, str(out), file_size, environment or {}, setup))
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
        return self.out.read_text() if self.out.exists() else ""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Children(list):
    """A run of the script, or of a function, in processes that each have the environment that a launcher gives it."""

    def __init__(self, processes, work, folder, setup=None, **environment):
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": processes}
        shared |= {"LOCAL_WORLD_SIZE": processes, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1} | environment
        for rank in range(processes):
            alone = {"ACCELERATE_USE_CPU": "true", **environment}
            mine = {**shared, "RANK": rank, "LOCAL_RANK": rank} if processes > 1 else alone
            mine = {name: str(value) for name, value in {**mine, "NOTES": folder / f"notes{rank}.json"}.items()}
            self.append(Child(work, folder / f"out{rank}.txt", environment=mine, setup=setup))

    def wait(self, timeout=300):
        """All exit statuses; whoever is left after `timeout` seconds is killed, and counts as hanging."""
        end = time.monotonic() + timeout
        for child in self:
            child.process.join(max(0, end - time.monotonic()))
        hanging = [child for child in self if child.process.exitcode is None]
        for child in hanging:
            child.process.kill()
        assert not hanging, "\n".join(child.text() for child in self)
        return [child.process.exitcode for child in self]
