"""Where pytest looks for what tests share."""

import gc
import os

# Large tensors keep their memory: to map and clear it anew took a tenth of the suite's processor time.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


def pytest_configure(config):
    """All but the process that only hands tests out to others: it takes seconds to import."""
    hands_out = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if hands_out:
        os.environ.update(ALLOCATOR)  # of the processes that it starts
    else:
        gc.disable()  # until all is imported: of what stays, none need be looked through
        config.pluginmanager.import_plugin("tests.shared")


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_sessionfinish():
    gc.unfreeze()  # as plugins expect that report
