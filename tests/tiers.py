"""Which tests run when, and what each of them costs.

All run but those marked `nightly`, unless these are asked for: by `--nightly`, by a mark expression that names the mark
(`-m nightly`), or by node id (`test_x.py::test_that_is_long`). With `--some-cases` of a test with many cases four run:
the first, the last and two between. With `--quick` three run, and neither do those that are marked `slow` or start
ranks of their own. What is left out is counted at the end.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Generator, Iterable
from typing import Any

import pytest

COST = "processor seconds"
_begun = pytest.StashKey[float]()
_left_out = pytest.StashKey[list[str]]()


def at_night(cases: Iterable[Any], but: Collection[Any]) -> list[Any]:
    """The cases of a test, all of which run at night, and those in `but` always."""
    return [case if case in but else pytest.param(case, marks=pytest.mark.nightly) for case in cases]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="also run the tests marked nightly")
    parser.addoption("--some-cases", action="store_true", help="run up to four cases of each test")
    parser.addoption("--quick", action="store_true", help="run up to three cases of each test that is not slow")
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
    named = tuple(argument.partition("::")[2] for argument in config.args if "::" in argument)
    if not config.getoption("--nightly") and "nightly" not in config.getoption("markexpr"):
        long = [item for item in items if "nightly" in item.keywords and not _is_one_of(item, named)]
        leave_out(config, items, long, "nightly tests, which --nightly runs")
    if config.getoption("--some-cases"):
        some = {item for cases in cases_by_test(items) for item in spread(cases, 4)}
        rest = [item for item in items if item not in some and not _is_one_of(item, named)]
        leave_out(config, items, rest, "further cases, which run without --some-cases")
    if config.getoption("--quick"):
        quick = {item for cases in cases_by_test(items) for item in spread(cases, 3)}
        rest = [item for item in items if (item not in quick or _is_slow(item)) and not _is_one_of(item, named)]
        leave_out(config, items, rest, "slow tests and further cases, which run without --quick")


def leave_out(config: pytest.Config, items: list[pytest.Item], chosen: list[pytest.Item], what: str) -> None:
    """Take the chosen tests out of `items`, and say at the end how many these were."""
    if chosen:
        config.stash[_left_out] = [*config.stash.get(_left_out, []), f"{len(chosen)} {what}"]
        config.hook.pytest_deselected(items=chosen)
        gone = set(chosen)
        items[:] = [item for item in items if item not in gone]


def cases_by_test(items: list[pytest.Item]) -> list[list[pytest.Item]]:
    """The cases of each test function."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return list(tests.values())


def spread(cases: list[pytest.Item], most: int) -> list[pytest.Item]:
    """Up to `most` of the cases: the first, the last, and those at equal distances between."""
    if len(cases) <= most:
        return cases
    return [cases[round(number * (len(cases) - 1) / (most - 1))] for number in range(most)]


def _is_slow(item: pytest.Item) -> bool:
    return "slow" in item.keywords or "mpirun" in getattr(item, "fixturenames", ())


def _is_one_of(item: pytest.Item, named: tuple[str, ...]) -> bool:
    """Whether a test is one that the command line names, alone or with its other cases."""
    test = item.nodeid.partition("::")[2]
    return any(test == name or test.startswith((f"{name}[", f"{name}::")) for name in named)


def pytest_sessionfinish(session: pytest.Session) -> None:
    # A process that xdist has started, all of which collect the same tests.
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left out"] = session.config.stash.get(_left_out, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[_left_out] = getattr(node, "workeroutput", {}).get("left out", [])


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
    for what in config.stash.get(_left_out, []):
        terminalreporter.write_line(f"left out: {what}")
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
