"""OUTPUT_DIR: what a run has written there may be replaced by a run; everything else is the user's and stays."""

import contextlib
import json
from pathlib import Path

from filelock import FileLock, Timeout

from moondream2.cli import InputError
from moondream2.files import name_of_unfinished, remove, sync, to_json, write_text, write_whole
from moondream2.launch import TRACKED

MARKER = ".finetune_moondream.json"  # says that runs write to the folder, and which names they have written
VERSION = 1  # of the marker
LOCK = ".lock"
MODEL = ".model"  # where a model is saved, whole, before its files move up into OUTPUT_DIR
LAST = "config.json"  # of them: the folder holds a model when it holds this one
NAMES = (  # all that a run writes
    MODEL,
    "checkpoints",
    "training_log.jsonl",
    "predictions.jsonl",
    "test_predictions.jsonl",
    "report.html",
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "modeling_moondream2.py",
    "tokenizer.json",
    "tokenizer_config.json",
    "adapter",
)


class OutputDir:
    """The folder that a run writes to. Only the main process touches it.

    Attributes:
        path: Path of the folder.
        names: set of the names in it that are the run's own, as its marker lists them.
    """

    def __init__(self, path):
        self.path, self.names = Path(path), set()

    @contextlib.contextmanager
    def held(self, model_id, tracker=None):
        """Within it the folder is this run's alone; it is made and marked if need be.

        Args:
            model_id: what the run reads its model from.
            tracker: which one the run has.
        Raises:
            InputError: another run holds it, it has files that no run has written, it holds the model that is to be
                read, or it can't be written to.
        """
        self.look(model_id, tracker)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK).acquire(timeout=0)
        except Timeout:
            raise InputError(f"another run is writing to {self.path}: wait, or give another OUTPUT_DIR") from None
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {error.strerror or error}") from error
        with lock:
            if not (self.path / MARKER).exists():
                self.write_marker()
            folders = self.look(model_id, tracker)  # once more: another run may have ended meanwhile
            self.remove_unfinished()
            for name in folders:
                self.own(name)
            yield

    def look(self, model_id, tracker=None):
        """Raises InputError where a run could not write here, as `held` does, and writes nothing itself.

        Returns:
            the names of the folders that the tracker fills.
        """
        folders = {TRACKED} if tracker == "tensorboard" else set()
        self.refuse_model(model_id)
        if self.path.exists():
            try:
                self.refuse_unmarked()
            except OSError as error:
                raise InputError(f"cannot write to {self.path}: {error.strerror or error}") from error
            self.read_marker()
            self.refuse_taken({*NAMES} | folders)
        return folders

    def refuse_model(self, model_id):
        model, folder = Path(model_id).resolve(), self.path.resolve()
        if model == folder or (model.is_dir() and folder in model.parents):
            raise InputError(f"MODEL_ID {model_id} lies in OUTPUT_DIR {self.path}: give another OUTPUT_DIR")

    def refuse_unmarked(self):
        """A folder without marker must be empty, but for what a run leaves that was killed before it wrote one."""
        names = {path.name for path in self.path.iterdir()}
        others = sorted(name for name in names - {LOCK} if name_of_unfinished(name) != MARKER)
        if others and MARKER not in names:
            raise InputError(
                f"{self.path} is not empty ({some(others)}), and no run of this version has written to it: "
                "give another OUTPUT_DIR, or move what is there elsewhere"
            )

    def read_marker(self):
        marker = self.path / MARKER
        if not marker.exists():
            return
        try:
            saved = json.loads(marker.read_text(encoding="utf-8"))
        except ValueError:
            saved = {}
        if saved.get("version") != VERSION:
            raise InputError(f"{marker} is not of this version of the script: give another OUTPUT_DIR")
        self.names = set(saved["names"])

    def write_marker(self):
        write_text(self.path / MARKER, to_json({"version": VERSION, "names": sorted(self.names)}))

    def refuse_taken(self, names):
        taken = sorted(name for name in names - self.names if exists(self.path / name))
        if taken:
            raise InputError(
                f"{self.path} has files of yours where a run would write ({some(taken)}): "
                "give another OUTPUT_DIR, or move them elsewhere"
            )

    def remove_unfinished(self):
        """Removes what a run was writing when it was killed."""
        for path in self.path.iterdir():
            if path.name == MODEL or name_of_unfinished(path.name) in {MARKER, *self.names}:
                remove(path)

    def own(self, name):
        """The path of a name that is about to be written; what a user has put there meanwhile gets another name."""
        path = self.path / name
        if name not in self.names:
            if exists(path):
                kept = unused(path)
                path.rename(kept)
                print(f"{path} was not written by this run: it is now {kept.name}", flush=True)
            self.names.add(name)
            self.write_marker()
        return path

    def write_text(self, name, text):
        write_text(self.own(name), text)

    def write_lines(self, name, records):
        """A JSON object a line."""
        self.write_text(name, "".join(to_json(record) + "\n" for record in records))

    def remove(self, name):
        """Removes a file or folder that a run has written here."""
        if name in self.names:
            remove(self.path / name)

    def holds_model(self):
        """Whether a run has saved its model here."""
        return LAST in self.names and (self.path / LAST).exists()

    @contextlib.contextmanager
    def new_model(self):
        """Gives a folder to save a model's files in; they then replace those of OUTPUT_DIR.

        When the process dies meanwhile, OUTPUT_DIR holds the model that it held, none, or the new one.
        """
        folder = self.own(MODEL)
        with write_whole(folder) as beside:
            beside.mkdir()
            yield beside
        adapted = (folder / "adapter").exists()
        self.own(LAST).unlink(missing_ok=True)
        sync(self.path)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == LAST):
            if file.is_dir():  # which replaces no other
                remove(self.own(file.name))
            file.replace(self.own(file.name))
        if not adapted:
            self.remove("adapter")  # of the model that this one replaces
        sync(self.path)
        folder.rmdir()


def exists(path):
    return path.exists() or path.is_symlink()


def unused(path):
    """`path` with an ending that makes it a name that does not exist."""
    number = 1
    while exists(path.with_name(f"{path.name}.kept{number}")):
        number += 1
    return path.with_name(f"{path.name}.kept{number}")


def some(names):
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
