"""TAO's methods: their names, what they need, their options and their reasons to stop."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError


@dataclass(frozen=True)
class TaoMethod:
    """A method of TAO: the derivative that it needs, and if it takes bounds.

    `needs` is "gradient", "hessian" (products with it) or "residual" (the Gauss-Newton method of least squares).
    """

    name: str
    needs: str
    bounds: bool
    description: str


METHODS: dict[str, TaoMethod] = {
    method.name: method
    for method in (
        TaoMethod("blmvm", "gradient", True, "limited-memory quasi-Newton with bounds"),
        TaoMethod("lmvm", "gradient", False, "limited-memory quasi-Newton"),
        TaoMethod("bqnls", "gradient", True, "quasi-Newton line search"),
        TaoMethod("bqnkls", "gradient", True, "quasi-Newton-Krylov line search"),
        TaoMethod("bqnktr", "gradient", True, "quasi-Newton-Krylov trust region"),
        TaoMethod("bqnktl", "gradient", True, "quasi-Newton-Krylov trust region with line search"),
        TaoMethod("bncg", "gradient", True, "nonlinear conjugate gradients"),
        TaoMethod("cg", "gradient", False, "nonlinear conjugate gradients without bounds"),
        TaoMethod("bnls", "hessian", True, "Newton-Krylov line search"),
        TaoMethod("bntr", "hessian", True, "Newton-Krylov trust region"),
        TaoMethod("bntl", "hessian", True, "Newton-Krylov trust region with line search"),
        TaoMethod("nls", "hessian", False, "Newton-Krylov line search without bounds"),
        TaoMethod("ntr", "hessian", False, "Newton-Krylov trust region without bounds"),
        TaoMethod("ntl", "hessian", False, "Newton-Krylov trust region with line search, without bounds"),
        TaoMethod("brgn", "residual", True, "regularised Gauss-Newton"),
    )
}
HESSIANS = ("exact", "gauss_newton")
_REASONS = {
    "CONVERGED_GATOL": "converged: the gradient's norm is at most gatol",
    "CONVERGED_GRTOL": "converged: the gradient's norm is at most grtol times the function's value",
    "CONVERGED_GTTOL": "converged: the gradient's norm is at most gttol times the first one",
    "CONVERGED_STEPTOL": "converged: the step is smaller than steptol",
    "CONVERGED_MINF": "converged: the function's value is below fmin",
    "CONVERGED_USER": "stopped by the callback",
    "DIVERGED_MAXITS": "not converged: the largest number of iterations is reached",
    "DIVERGED_NAN": "not converged: the function or its gradient is not finite",
    "DIVERGED_MAXFCN": "not converged: the largest number of evaluations is reached",
    "DIVERGED_LS_FAILURE": "not converged: the line search found no better point",
    "DIVERGED_TR_REDUCTION": "not converged: the trust region became too small",
    "DIVERGED_USER": "not converged: stopped",
}
# Read by TAO at the end of a solve.
_READ_LATER = re.compile(r"tao_(view|converged_reason)")
_OF_ARGUMENTS = {
    "tao_type": "use method=",
    "tao_test_gradient": "use taylor_test",
    "tao_test_hessian": "use taylor_test",
    "tao_fd_gradient": "gradients are exact",
    "tao_fd_hessian": "Hessian products are exact",
    "tao_mf_hessian": "Hessian products are exact",
    "tao_recycle_history": "each minimisation starts with no history; use record= to go on with one",
}
_KNOWN = (
    *("tao_gatol", "tao_grtol", "tao_gttol", "tao_max_it", "tao_max_funcs", "tao_fmin", "tao_steptol", "tao_monitor"),
    *("tao_monitor_short", "tao_view", "tao_converged_reason", "tao_ls_type", "tao_ls_ftol", "tao_ls_gtol"),
    *("tao_ls_max_funcs", "tao_ls_monitor", "tao_ls_stepmax", "tao_trust0", "tao_bnk_ksp_type", "tao_bnk_pc_type"),
    *("tao_bnk_ksp_rtol", "tao_bnk_ksp_max_it", "tao_bnk_init_type", "tao_bnk_max_cg_its", "tao_bncg_type"),
    *("tao_blmvm_mat_lmvm_hist_size", "tao_bqnls_mat_lmvm_hist_size", "tao_brgn_regularization_type"),
    *("tao_brgn_regularizer_weight", "tao_brgn_lm_regularization_type"),
)


def method_of(name: str, bounded: bool) -> TaoMethod:
    """Return the method of this name. Raises `ConfigurationError` if it is unknown, or takes no bounds."""
    if name not in METHODS:
        raise ConfigurationError(f"method = {name!r}: must be one of {', '.join(METHODS)}")
    method = METHODS[name]
    if bounded and not method.bounds:
        taking = ", ".join(other.name for other in METHODS.values() if other.bounds)
        raise ConfigurationError(f"method = {name!r}: takes no bounds: must be one of {taking}")
    return method


def check_names(options: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` for options that are not TAO's, or have an argument in their place."""
    for name in options:
        if name in _OF_ARGUMENTS:
            raise ConfigurationError(f"options: {name!r}: {_OF_ARGUMENTS[name]}")
        if not name.startswith("tao_"):
            raise ConfigurationError(
                f"options: {name!r}: must begin with tao_; options for solving the equations are those of NeuralODE"
            )


def check_read(unread: set[str]) -> None:
    """Raise `ConfigurationError` for options that TAO has not read while it was set up."""
    for name in sorted(unread):
        if not _READ_LATER.match(name):
            close = get_close_matches(name, _KNOWN, n=1, cutoff=0.75)
            words = f"did you mean {close[0]}?" if close and close[0] != name else "see TAO's manual pages"
            raise ConfigurationError(f"options: {name!r}: nothing reads it with this method: {words}")


def reason_in_words(reason: int) -> str:
    """Return a sentence for one of TAO's reasons to stop."""
    reasons = PETSc.TAO.ConvergedReason
    return next(words for name, words in _REASONS.items() if getattr(reasons, name) == reason)
