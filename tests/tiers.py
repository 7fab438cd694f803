"""Which tests run when: all but those marked `nightly`, unless these are asked for; and what each test costs.

Asked for are nightly tests by `--nightly`, by a mark expression that names the mark (`-m nightly`), and by node id
(`test_x.py::test_that_is_long`). What is left out is counted in pytest's summary.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

COST = "processor seconds"
_begun = pytest.StashKey[float]()
_left_out = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="also run the tests marked nightly")
    parser.addoption(
        "--processor-times",
        type=int,
        default=0,
        metavar="N",
        help="list the N tests that take most processor time, which does not depend on what else the machine does",
    )


# After the selection by marks and keywords, so that only what would have run is counted.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--nightly") or "nightly" in config.getoption("markexpr"):
        return
    named = tuple(argument.partition("::")[2] for argument in config.args if "::" in argument)
    left_out = [item for item in items if "nightly" in item.keywords and not _is_one_of(item, named)]
    if left_out:
        config.stash[_left_out] = len(left_out)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _is_one_of(item: pytest.Item, named: tuple[str, ...]) -> bool:
    """Whether a test is one that the command line names, alone or with its other cases."""
    test = item.nodeid.partition("::")[2]
    return any(test == name or test.startswith((f"{name}[", f"{name}::")) for name in named)


def pytest_sessionfinish(session: pytest.Session) -> None:
    # A process that xdist has started, all of which collect the same tests.
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left out"] = session.config.stash.get(_left_out, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[_left_out] = getattr(node, "workeroutput", {}).get("left out", 0)


def processor_seconds() -> float:
    """User and system time of this process and of all processes that it has waited for."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    item.stash[_begun] = processor_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if call.when == "teardown":
        report.user_properties.append((COST, processor_seconds() - item.stash[_begun]))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash.get(_left_out, 0)
    if left_out:
        terminalreporter.write_line(f"left out: {left_out} nightly tests, which --nightly runs")
    most = config.getoption("--processor-times")
    if not most:
        return
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    costs = [
        (cost, report.nodeid)
        for report in reports
        for name, cost in getattr(report, "user_properties", ())
        if name == COST
    ]
    terminalreporter.write_sep("=", f"processor time: {sum(cost for cost, _ in costs):.0f} s of {len(costs)} tests")
    for cost, test in sorted(costs, reverse=True)[:most]:
        terminalreporter.write_line(f"{cost:8.2f} s {test}")
