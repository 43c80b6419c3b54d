"""``pytest -p simulated_gpu -m gpu``: what `make test-gpu-simulated` runs, and what it does not.

Cases that do not make sense here are named in not_run.py, left out, and counted. Whatever else does not run
is a failure: a test that skips itself has not passed.
"""

import os

import not_run
import pytest

_left_out = pytest.StashKey[list[str]]()


def pytest_configure(config):
    if "SIMULATED_GPU" not in os.environ:
        raise pytest.UsageError("SIMULATED_GPU names the folder of what was built: make test-gpu-simulated")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    reasons = {item: not_run.reason_for(item) for item in items}
    left_out = [item for item in items if reasons[item]]
    items[:] = [item for item in items if not reasons[item]]
    config.hook.pytest_deselected(items=left_out)
    lines = [f"  {item.nodeid.rpartition('/')[2]}: {reasons[item]}" for item in left_out]
    config.stash[_left_out] = [f"not run on the simulated GPU: {len(left_out)} cases", *lines]


def pytest_sessionfinish(session):
    """A worker of pytest-xdist tells the process that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[_left_out]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[_left_out] = getattr(node, "workeroutput", {}).get("left_out", [])


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash.get(_left_out, []):
        terminalreporter.write_line(line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skips itself: name it in not_run.py. {report.longrepr}"
    return report
