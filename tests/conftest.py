"""Where pytest looks for what tests share."""


def pytest_configure(config):
    """All but the process that only hands tests out to others: it takes seconds to import."""
    hands_out = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not hands_out:
        config.pluginmanager.import_plugin("tests.shared")
