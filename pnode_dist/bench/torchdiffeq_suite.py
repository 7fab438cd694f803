"""torchdiffeq's own tests, run with `pnode_dist.torchdiffeq` in its place.

`python -m pnode_dist.bench.torchdiffeq_suite CHECKOUT` takes a checkout of github.com/rtqichen/torchdiffeq and prints a
line for each test: how many of its cases passed, were refused by name, do not apply, or failed. Ends with exit code 1
if one failed.
"""

from __future__ import annotations

import argparse
import re
import sys
import types
import unittest
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from pnode_dist import torchdiffeq as ours
from pnode_dist.errors import ConfigurationError

FILES = ("api_tests", "event_tests", "gradient_tests", "norm_tests", "odeint_tests")
PASSED, REFUSED, OTHER, FAILED = OUTCOMES = ("passed", "refused", "does not apply", "failed")
NOT_OURS = {
    r"TestNorms.test_adjoint_norm": "reads the norm of an adjoint equation inside torchdiffeq's own autograd function",
    r"TestDiscontinuities.test_odeint_jump_t\(adjoint=True": "counts evaluations in the backward pass: none here",
    r"TestDiscontinuities.test_odeint_perturb\(adjoint=True": "asserts times at which an adjoint equation is evaluated",
    r"TestDiscontinuities.test_odeint_perturb\(.*'(implicit_(euler|midpoint)|sdirk2|gl.|radauIIA.)', perturb=False": (
        "asserts an evaluation of func at the start of a step, where the formula needs none"
    ),
}
"""Patterns of the cases that assert how torchdiffeq evaluates func or an adjoint equation, not results; and reasons."""


@dataclass
class Tally:
    """The outcomes of the cases of each test, and the reasons of those that did not pass."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, test: str, outcome: str, reason: str = "") -> None:
        """Count a case."""
        self.counts.setdefault(test, Counter())[outcome] += 1
        if reason:
            self.reasons[outcome, reason] += 1

    def total(self, outcome: str) -> int:
        """Return the number of cases with this outcome."""
        return sum(counts[outcome] for counts in self.counts.values())


class _Result(unittest.TestResult):
    """Counts each sub-test as a case, and a test without sub-tests as one."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally, self._cases = tally, 0

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._cases = 0

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:
        self._cases += 1
        self._count(test, subtest, err)

    def addSuccess(self, test: unittest.TestCase) -> None:
        if self._cases == 0:
            self._tally.add(_name(test), PASSED)

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        self._count(test, test, err)

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        self._count(test, test, err)

    def _count(self, test: unittest.TestCase, case: unittest.TestCase, err: Any) -> None:
        name = _name(test)
        if err is None:
            self._tally.add(name, PASSED)
            return
        error = err[1]
        whole = f"{name}{case.id().partition(' ')[2]}"
        known = next((reason for form, reason in NOT_OURS.items() if re.match(form, whole)), None)
        if isinstance(error, ConfigurationError):
            self._tally.add(name, REFUSED, str(error).partition(":")[0])
        elif known is not None:
            self._tally.add(name, OTHER, f"{name}: {known}")
        else:
            text = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")
            self._tally.add(name, FAILED, f"{whole}: {text[:200]}")


def _name(test: unittest.TestCase) -> str:
    return ".".join(test.id().split(" ")[0].split(".")[-2:])


def run_suite(checkout: Path, files: Sequence[str] = FILES, only: str = "") -> Tally:
    """Run torchdiffeq's tests in `checkout/tests`, those whose name contains `only`, and return their outcomes.

    Raises `ConfigurationError` if the folder does not hold them.
    """
    folder = checkout / "tests"
    for name in files:
        if not (folder / f"{name}.py").is_file():
            raise ConfigurationError(f"checkout = {str(checkout)!r}: must be one of torchdiffeq, with tests/{name}.py")
    adaptor = types.ModuleType("torchdiffeq")
    for function in ours.__all__:
        setattr(adaptor, function, getattr(ours, function))
    tally = Tally()
    before = sys.modules.get("torchdiffeq")
    sys.modules["torchdiffeq"] = adaptor
    sys.path.insert(0, str(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in files:
                suite = unittest.defaultTestLoader.loadTestsFromModule(import_module(name))
                for test in _flat(suite):
                    if only in _name(test):
                        test.run(_Result(tally))
    finally:
        sys.path.remove(str(folder))
        del sys.modules["torchdiffeq"]
        if before is not None:
            sys.modules["torchdiffeq"] = before
        for name in (*files, "problems"):
            sys.modules.pop(name, None)
    return tally


def _flat(suite: unittest.TestSuite) -> list[unittest.TestCase]:
    found: list[unittest.TestCase] = []
    for test in suite:
        found += _flat(test) if isinstance(test, unittest.TestSuite) else [test]
    return found


def table(tally: Tally) -> str:
    """Return the outcomes as a table, and the reasons below."""
    width = max(map(len, [*tally.counts, "all"]))
    rows = [f"{'test':{width}}  " + "  ".join(f"{outcome:>14}" for outcome in OUTCOMES)]
    for name, counts in sorted(tally.counts.items()):
        rows.append(f"{name:{width}}  " + "  ".join(f"{counts[outcome]:14}" for outcome in OUTCOMES))
    rows.append(f"{'all':{width}}  " + "  ".join(f"{tally.total(outcome):14}" for outcome in OUTCOMES))
    for (outcome, reason), count in sorted(tally.reasons.items()):
        rows.append(f"{outcome}, {count}: {reason}")
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests of the checkout that the command line names. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pnode_dist.bench.torchdiffeq_suite", description=__doc__)
    parser.add_argument("checkout", type=Path, help="a checkout of torchdiffeq")
    parser.add_argument("--only", default="", help="run the tests whose name contains this, such as TestGradient")
    given = parser.parse_args(arguments)
    try:
        tally = run_suite(given.checkout, only=given.only)
    except ConfigurationError as error:
        parser.error(str(error))
    print(table(tally))
    return 1 if tally.total(FAILED) else 0


if __name__ == "__main__":
    sys.exit(main())
