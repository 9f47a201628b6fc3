"""The script in a process that behaves as Windows does, as far as that can be stood in for on Linux.

What is stood in: the modules that Windows lacks; folders that can't be opened; files that are flushed only if they are
open for writing, and neither replaced nor removed while they are open or mapped; the code page 1252 on the terminal;
lines that end in CR LF; names that no file may have; signals that there are none of.
"""

import builtins
import contextlib
import fcntl
import os
import re
import shutil
import signal
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil

OURS = re.compile(r"(moondream2|finetune_moondream)\b")
LACKING = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "readline"}
FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]|[ .]$')  # in a file's name
SIGNALS = {signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGINT, signal.SIGSEGV, signal.SIGTERM}


class WindowsSys:
    """The module `sys` of a Windows."""

    platform = "win32"

    def __getattr__(self, name):
        return getattr(sys, name)


def stand_in():
    """From here on this process behaves as Windows does; our modules are imported anew."""
    for name in [name for name in sys.modules if OURS.match(name)]:
        del sys.modules[name]
    lack_modules()
    treat_files()
    treat_texts()
    set_signal = signal.signal

    def known_signal(signum, handler):
        if signum not in SIGNALS:
            raise ValueError("invalid signal value")
        return set_signal(signum, handler)

    signal.signal = known_signal
    memory = SimpleNamespace(peak_wset=1 << 30)
    import finetune_moondream
    from moondream2 import report

    report.psutil = SimpleNamespace(Process=lambda: SimpleNamespace(memory_info=lambda: memory), **vars_of(psutil))
    for module in [module for name, module in sys.modules.items() if OURS.match(name)]:
        if getattr(module, "sys", None) is sys:
            module.sys = WindowsSys()
    return finetune_moondream


def vars_of(module):
    return {name: value for name, value in vars(module).items() if name != "Process"}


def lack_modules():
    """Only for our own imports: other packages do other things on Windows, and here they are those for Linux."""
    load = builtins.__import__

    def load_if_there(name, globals=None, *arguments, **keywords):
        if OURS.match((globals or {}).get("__name__", "")) and name.split(".")[0] in LACKING:
            raise ModuleNotFoundError(f"No module named '{name}'")
        return load(name, globals, *arguments, **keywords)

    builtins.__import__ = load_if_there


def in_use():
    """The paths of all files that this process has open or mapped."""
    yield from (line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was the one that lists them
            yield str(descriptor.readlink())


def treat_files():
    open_file, flush = os.open, os.fsync

    def open_no_folder(path, *arguments, **keywords):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, *arguments, **keywords)

    def flush_what_is_written(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        assert not stat.S_ISDIR(os.fstat(descriptor).st_mode)
        flush(descriptor)

    def of_unused(function):
        def call(*paths, **keywords):
            for path in (Path(path).absolute() for path in paths):
                if FORBIDDEN.search(path.name):
                    raise OSError(22, "Invalid argument", str(path))
                if any(Path(used).is_relative_to(path) for used in in_use()):
                    raise PermissionError(13, "Permission denied", str(path))
            return function(*paths, **keywords)

        return call

    os.open, os.fsync = open_no_folder, flush_what_is_written
    for name in ("replace", "rename", "unlink", "remove", "rmdir"):
        setattr(os, name, of_unused(getattr(os, name)))
    shutil._use_fd_functions = False


def treat_texts():
    """Lines end in CR LF where nothing else is said; the terminal prints what its code page has."""
    write_text = Path.write_text

    def write_text_lines(self, text, encoding=None, errors=None, newline=None):
        return write_text(self, text, encoding, errors, newline or "\r\n")

    Path.write_text = write_text_lines
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="cp1252", errors="strict")


def train():
    """Trains, is interrupted when all but the model is saved, and goes on; the flags are sys.argv's."""
    script = stand_in()
    from moondream2 import cli

    finish, sys.argv[1:] = script.finish, os.environ["FLAGS"].split("\n")

    def interrupted(*arguments):
        raise cli.InputError("interrupted")

    script.finish = interrupted
    try:
        cli.run(script.main)
    except SystemExit as end:
        assert str(end) == "error: interrupted", end
    script.finish = finish
    cli.run(script.main)
