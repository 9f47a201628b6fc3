"""OUTPUT_DIR: runs replace there what runs have written, and nothing of the user's."""

import json
import shutil

import pytest

from moondream2 import output_dir
from moondream2.cli import InputError
from moondream2.launch import TRACKED
from moondream2.output_dir import LOCK, MARKER, NAMES, OutputDir
from tests.shared import TINY


@pytest.fixture
def folder(tmp_path):
    return OutputDir(tmp_path / "out")


def held(folder, model_id="hub/model", tracker=None):
    """As a run begins that comes after others."""
    return OutputDir(folder.path).held(model_id, tracker)


def contents(folder):
    """{name: text} of the files that are not the run's bookkeeping."""
    files = {str(path.relative_to(folder.path)): path for path in folder.path.rglob("*") if path.is_file()}
    return {name: path.read_text() for name, path in files.items() if name not in (LOCK, MARKER)}


def save_model(folder, text, names=("README.md", "config.json", "model.safetensors")):
    with folder.new_model() as beside:
        for name in names:
            (beside / name).write_text(text)


# ---------------------------------------------------------------------------------------------------------------------
# At the start
# ---------------------------------------------------------------------------------------------------------------------


def test_a_new_folder_is_made_and_marked(folder):
    with folder.held("hub/model"):
        assert json.loads((folder.path / MARKER).read_text()) == {"version": 1, "names": []}
        folder.write_text("report.html", "report")
    assert json.loads((folder.path / MARKER).read_text())["names"] == ["report.html"]


@pytest.mark.parametrize("name", ["README.md", "checkpoints/notes.txt", "anything"])
def test_a_folder_with_files_and_without_marker_is_refused_and_left_as_it_is(folder, name):
    path = folder.path / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(InputError, match=rf"is not empty \({name.split('/')[0]}\).*OUTPUT_DIR") as said, held(folder):
        pass
    assert "\n" not in str(said.value)
    assert [str(file) for file in folder.path.rglob("*") if file.is_file()] == [str(path)]


def test_what_an_earlier_version_left_is_refused(folder):
    shutil.copytree(TINY, folder.path)
    with pytest.raises(InputError, match=r"no run of this version has written to it: .* move"), held(folder):
        pass


def test_a_name_that_the_user_has_taken_is_refused(folder):
    with folder.held("hub/model"):
        folder.write_text("training_log.jsonl", "log")
    for name in ("README.md", "model.safetensors"):
        (folder.path / name).write_text("mine")
    (folder.path / "notes.txt").write_text("mine")  # no run writes that
    with pytest.raises(InputError, match=r"of yours .* \(README.md, model.safetensors\)"), held(folder):
        pass
    assert contents(folder)["README.md"] == "mine"


def test_a_folder_that_a_tracker_fills_is_the_runs(folder):
    with held(folder):
        pass
    (folder.path / TRACKED).mkdir()  # by whom?
    with pytest.raises(InputError, match=TRACKED), held(folder, tracker="tensorboard"):
        pass
    (folder.path / TRACKED).rmdir()
    with held(folder, tracker="tensorboard"):
        (folder.path / TRACKED).mkdir()
    with held(folder, tracker="tensorboard"):
        pass


@pytest.mark.parametrize("text", ['{"version": 2, "names": []}', "[", "", "{}"])
def test_a_marker_of_another_version_is_one_line(folder, text):
    folder.path.mkdir()
    (folder.path / MARKER).write_text(text)
    with pytest.raises(InputError, match=r"\.json is not of this version of the script"), held(folder):
        pass


@pytest.mark.parametrize("model_id", ["out", "./out/../out", "out/best", "link"])
def test_the_model_that_is_read_is_not_overwritten(folder, model_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with folder.held("hub/model"):
        save_model(folder, "old")
        shutil.copytree(TINY, folder.path / "best")
    (tmp_path / "link").symlink_to(folder.path)
    with pytest.raises(InputError, match="lies in OUTPUT_DIR"), held(folder, model_id):
        pass
    with OutputDir("second").held(model_id):  # a second round, elsewhere
        pass


def test_a_hub_id_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with OutputDir("vikhyatk").held("vikhyatk/moondream2"):
        pass


def test_another_run_in_the_folder_is_one_line(folder):
    with folder.held("hub/model"), pytest.raises(InputError, match="another run is writing to"), held(folder):
        pass
    with held(folder):  # was let go
        pass


def test_what_goes_wrong_elsewhere_is_not_said_of_the_folder(folder):
    with pytest.raises(FileNotFoundError, match="elsewhere"), folder.held("hub/model"):
        (folder.path / "elsewhere").read_text()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(InputError, match="cannot write to .*file/out"),
        OutputDir(tmp_path / "file" / "out").held("a/b"),
    ):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# While it writes
# ---------------------------------------------------------------------------------------------------------------------


def test_a_later_run_replaces_what_runs_have_written_and_nothing_else(folder):
    with held(folder):
        pass
    (folder.path / "notes.txt").write_text("mine")
    for text in ("old", "new"):
        again = OutputDir(folder.path)
        with again.held("hub/model"):
            again.write_lines("training_log.jsonl", [{"loss": text}])
            save_model(again, text)
            assert again.holds_model()
    log = '{"loss": "new"}\n'
    model = dict.fromkeys(("README.md", "config.json", "model.safetensors"), "new")
    assert contents(folder) == {"notes.txt": "mine", "training_log.jsonl": log, **model}


def test_what_the_user_puts_there_meanwhile_is_kept_under_another_name(folder, capsys):
    with folder.held("hub/model"):
        (folder.path / "config.json").write_text("mine")
        (folder.path / "vocab.json").write_text("mine")
        (folder.path / "vocab.json.kept1").write_text("mine, too")
        (folder.path / "report.html").mkdir()
        (folder.path / "report.html" / "page").write_text("mine")
        assert not folder.holds_model()
        folder.write_text("report.html", "report")
        save_model(folder, "model", ["config.json", "vocab.json"])
    kept = {"config.json.kept1": "mine", "vocab.json.kept1": "mine, too", "vocab.json.kept2": "mine"}
    kept["report.html.kept1/page"] = "mine"
    assert contents(folder) == {**kept, "config.json": "model", "vocab.json": "model", "report.html": "report"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{folder.path / 'config.json'} was not written by this run: it is now config.json.kept1"
    assert len(lines) == 3


def test_a_model_is_moved_in_with_its_configuration_last(folder, monkeypatch):
    """Whoever looks in between finds no configuration, which makes a folder a model."""
    with folder.held("hub/model"):
        save_model(folder, "old", ["config.json", "a", "z"])
        moved, replace = [], output_dir.Path.replace

        def watched(self, destination):
            if self.parent.name == output_dir.MODEL:
                moved.append((self.name, (folder.path / "config.json").exists()))
            return replace(self, destination)

        monkeypatch.setattr(output_dir.Path, "replace", watched)
        save_model(folder, "new", ["config.json", "a", "z"])
    assert sorted(moved[:2]) == [("a", False), ("z", False)] and moved[2:] == [("config.json", False)]
    assert contents(folder) == dict.fromkeys(("config.json", "a", "z"), "new")


def test_what_a_killed_run_was_writing_goes_when_the_next_one_begins(folder):
    with folder.held("hub/model"):
        folder.write_text("report.html", "report")
        save_model(folder, "model")
    names = [".report.html.0123abcd.part", f".{MARKER}.0123abcd.part", f".{output_dir.MODEL}.0123abcd.part"]
    for name in [*names, ".mine.0123abcd.part", ".report.html.part"]:
        (folder.path / name).write_text("half")
    (folder.path / output_dir.MODEL).mkdir()
    with held(folder):
        pass
    left = {path.name for path in folder.path.iterdir()} - {LOCK, MARKER}
    own = {"report.html", "README.md", "config.json", "model.safetensors"}
    assert left == own | {".mine.0123abcd.part", ".report.html.part"}


def test_a_run_that_was_killed_before_it_marked_its_folder_begins_again(folder):
    folder.path.mkdir()
    (folder.path / LOCK).touch()
    (folder.path / f".{MARKER}.0123abcd.part").touch()
    with held(folder):
        pass


def test_a_file_is_the_runs_from_before_it_is_written(folder, monkeypatch):
    """Killed in between, the next run finds nothing that it would take for the user's."""

    class Killed(BaseException):
        pass

    def killed(path, text):
        write_text(path, text)
        if path.name == "report.html":
            raise Killed

    write_text = output_dir.write_text
    with monkeypatch.context() as patch, pytest.raises(Killed), folder.held("hub/model"):
        patch.setattr(output_dir, "write_text", killed)
        folder.write_text("report.html", "report")
    with held(folder):
        pass


def test_a_run_removes_its_own_file_and_no_users(folder):
    with folder.held("hub/model"):
        (folder.path / "mine.jsonl").write_text("mine")
        folder.write_lines("test_predictions.jsonl", [])
        for name in ("mine.jsonl", "test_predictions.jsonl", "test_predictions.jsonl"):
            folder.remove(name)
    assert {path.name for path in folder.path.iterdir()} == {"mine.jsonl", LOCK, MARKER}


# ---------------------------------------------------------------------------------------------------------------------
# By the script
# ---------------------------------------------------------------------------------------------------------------------


def test_the_script_writes_these_names_and_leaves_the_users(data, run_main, tmp_path):
    flags = {"model_id": TINY, "train_file": data / "train.jsonl", "valid_file": data / "valid.jsonl", "epochs": 1}
    flags["test_file"] = data / "valid.jsonl"
    flags |= {"features_dir": data / "features", "output_dir": data / "out", "batch_size": 4}
    run_main(**flags)
    written = {path.name for path in (data / "out").iterdir()}
    assert written == {*NAMES, LOCK, MARKER} - {"checkpoints", output_dir.MODEL, "adapter"}  # which LORA_RANK makes
    (data / "out" / "notes.txt").write_text("mine")
    (data / "out" / "checkpoints").mkdir()
    (data / "out" / "checkpoints" / "epoch-best").write_text("mine")
    run_main(**{**flags, "overwrite": "true"})
    assert (data / "out" / "notes.txt").read_text() == "mine"
    assert [path.name for path in (data / "out" / "checkpoints").iterdir()] == ["epoch-best"]
    with pytest.raises(InputError, match="lies in OUTPUT_DIR"):
        run_main(**{**flags, "model_id": data / "out", "overwrite": "true"})
    run_main(**{**flags, "model_id": data / "out", "output_dir": tmp_path / "second"})
    assert (tmp_path / "second" / "config.json").exists()


def test_a_model_is_moved_in_by_steps_that_are_flushed(folder, monkeypatch):
    """A power cut leaves no configuration beside another model's weights."""
    with folder.held("hub/model"):
        save_model(folder, "old")
        done, sync, replace = [], output_dir.sync, output_dir.Path.replace
        configuration = folder.path / "config.json"
        monkeypatch.setattr(output_dir, "sync", lambda path: (done.append((path, configuration.exists())), sync(path)))
        monkeypatch.setattr(output_dir.Path, "replace", lambda self, to: (done.append(self.name), replace(self, to))[1])
        save_model(folder, "new")
    assert done[1:] == [(folder.path, False), "README.md", "model.safetensors", "config.json", (folder.path, True)]
