"""Shows that the tests see what breaks: each change of mutations.txt, made in a copy, has to turn its tests red.

python -m tests.mutations [--only REGEX] [--jobs N] [--check]

The suite itself should be green before. A change that hangs counts as seen.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import NamedTuple

from moondream2 import cli
from moondream2.cli import InputError

ROOT = Path(__file__).parent.parent
LIST = Path(__file__).with_suffix(".txt")
WORDS = ["-x", "-q", "-n", "0", "-m", "", "-p", "no:cacheprovider"]  # for pytest
TIMEOUT = 300  # seconds


class Change(NamedTuple):
    """A change of some words in a file; `tests` is what pytest takes to run those that are meant to see it."""

    kind: str
    file: str
    tests: str
    old: str
    new: str

    def __str__(self):
        old, new = (" ".join(words.split()) for words in (self.old, self.new))
        return f"{self.kind}, {self.file}: {old} -> {new or 'nothing'}"

    def changed(self):
        """The text of the file with the change; raises InputError where the words are not in exactly one place."""
        text = (ROOT / self.file).read_text(encoding="utf-8")
        if (times := text.count(self.old)) != 1:
            raise InputError(f"{LIST.name} is stale: {self.file} has {times} times: {self.old}")
        return text.replace(self.old, self.new)


def read_changes():
    """The list of Changes that mutations.txt holds; its head says how they are written."""
    kind, changes = None, []
    for block in LIST.read_text(encoding="utf-8").strip().split("\n\n"):
        if block.startswith("# "):
            kind = block.removeprefix("# ").split(":")[0]
        elif kind:
            place, *lines = block.split("\n")
            old, new = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
            changes.append(Change(kind, *place.split(": ", 1), old, new))
    return changes


def copy_of_project(folder):
    """A copy without what git ignores."""
    ignored = [".git", *(line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines())]
    return Path(shutil.copytree(ROOT, Path(folder) / "copy", ignore=shutil.ignore_patterns(*ignored)))


class Pytest:
    """A process of tests/forked.py."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen([sys.executable, "tests/forked.py"], cwd=ROOT, env=environment, **pipes)

    def run(self, *task):
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def seen_by(change, idle):
    """(the test that fails with this change, None where none does; the seconds it took).

    Args:
        idle: a queue of Pytest, of which one is taken meanwhile.
    """
    started, pytest = time.monotonic(), idle.get()
    try:
        with TemporaryDirectory() as folder:
            copy = copy_of_project(folder)
            (copy / change.file).write_text(change.changed(), encoding="utf-8")
            status, printed = pytest.run(str(copy), [*WORDS, *shlex.split(change.tests)], TIMEOUT)
    finally:
        idle.put(pytest)
    if status is None:
        return "it hangs", TIMEOUT
    if status not in (0, 1):  # no tests were found, or they can't be imported: seen by none, and the others go on
        print(printed, file=sys.stderr)
        return None, time.monotonic() - started
    failed = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - |$)", printed, re.MULTILINE)
    return failed and failed[1], time.monotonic() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression: only changes in whose line it is found")
    parser.add_argument("--jobs", type=int, default=1, help="how many run at once")
    parser.add_argument("--check", action="store_true", help="only look whether each change still applies")
    words = parser.parse_args()
    changes = [change for change in read_changes() if re.search(words.only, str(change))]
    if words.check:
        for change in changes:
            change.changed()
        return
    started, unseen, idle = time.monotonic(), 0, SimpleQueue()
    for _ in range(words.jobs):
        idle.put(Pytest())
    with ThreadPoolExecutor(words.jobs) as pool:
        for change, (test, seconds) in zip(changes, pool.map(partial(seen_by, idle=idle), changes), strict=True):
            print(f"{change}\n    {f'seen by {test}' if test else 'UNSEEN'}, {seconds:.0f} s", flush=True)
            unseen += test is None
    print(f"{len(changes)} changes, {len(changes) - unseen} seen, {time.monotonic() - started:.0f} s")
    sys.exit(unseen > 0)


if __name__ == "__main__":
    cli.run(main)
