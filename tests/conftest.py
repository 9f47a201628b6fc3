"""Where pytest looks for what tests share."""

import atexit
import gc
import importlib
import os
import pkgutil
import warnings
from pathlib import Path

# Large tensors keep their memory: to map and clear it anew took a tenth of the suite's processor time.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
# What the CPU says of itself is true: a compiler need not try it out.
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"
PILLOW = []  # its settings before this project is imported, and once all of it is


def pytest_configure(config):
    """All but the process that only hands tests out to others: it takes seconds to import."""
    hands_out = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if hands_out:
        os.environ.update(ALLOCATOR)  # of the processes that it starts
    else:
        gc.disable()  # until all is imported: of what stays, none need be looked through
        PILLOW.append(settings_of_pillow())
        config.pluginmanager.import_plugin("tests.shared")
        for module in pkgutil.iter_modules([str(Path(__file__).parents[1] / "moondream2")]):
            importlib.import_module(f"moondream2.{module.name}")
        PILLOW.append(settings_of_pillow())
        from tests.child import start_server

        start_server()


def settings_of_pillow():
    """What Pillow's modules have as constants that a program may set, and the filters of its warnings."""
    from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin

    modules = Image, ImageFile, JpegImagePlugin, PngImagePlugin
    settings = [{name: str(value) for name, value in vars(each).items() if name.isupper()} for each in modules]
    return settings, [str(each) for each in warnings.filters if "PIL" in str(each)]


def pytest_collection_modifyitems(items):
    """What takes long, and what else its file has, is begun first: no process is to be left with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    gc.freeze()
    gc.enable()
    atexit.register(gc.freeze)  # at the end Python would look through it all, too
