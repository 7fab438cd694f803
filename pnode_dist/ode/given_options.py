"""Checks of PETSc options: each option takes effect, or is refused with the alternative.

Options of other libraries, and options without an effect here because steps are taken outside TSSolve, are refused by
their names. For all others PETSc's own record of options that were read is checked: after the set-up of the solvers,
and after the first linear solve for options that are read then.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from mpi4py import MPI

from pnode_dist.errors import ConfigurationError

_NO_OPTION = "is an argument of its own:"
_TIMES = "put such times into t, where steps end exactly"
_OR_ELSE = "pnode_dist.torchdiffeq.odeint takes it"
_TO_ARGUMENTS: dict[str, str] = {
    # Arguments of odeint.
    "method": f"{_NO_OPTION} method={{value!r}}",
    "step_size": f"{_NO_OPTION} step_size={{value!r}}",
    "rtol": f"{_NO_OPTION} rtol={{value!r}}",
    "atol": f"{_NO_OPTION} atol={{value!r}}",
    "adaptor": f"{_NO_OPTION} adaptor={{value!r}}",
    **{
        name: f"{_NO_OPTION} {name}={{value!r}}"
        for name in ("pcoeff", "icoeff", "dcoeff", "first_step", "dt_min", "dt_max", "max_steps")
    },
    "mass": f"{_NO_OPTION} mass=",
    "preconditioner": f"{_NO_OPTION} preconditioner={{value!r}}",
    "trajectory": f"{_NO_OPTION} trajectory=",
    "compute_dtype": f"{_NO_OPTION} compute_dtype={{value!r}}",
    "state_dtype": f"{_NO_OPTION} state_dtype={{value!r}}",
    "last_only": f"{_NO_OPTION} last_only={{value!r}}",
    "params": f"{_NO_OPTION} params=",
    "args": f"{_NO_OPTION} args=",
    # Options of torchdiffeq.
    "grid_points": _TIMES,
    "grid_constructor": f"put the times that it makes into t, or use step_size=; {_OR_ELSE}",
    "step_t": f"{_TIMES}; {_OR_ELSE}",
    "jump_t": f"{_TIMES}, and solve from jump to jump where f is not to be evaluated on both sides; {_OR_ELSE}",
    "perturb": f"solve from jump to jump, each with its own f: times are not perturbed here; {_OR_ELSE}",
    "interp": f"nothing is interpolated: steps end at every time of t; {_OR_ELSE}",
    "norm": "rtol= and atol= may be tensors of the state's shape; the norm is the root mean square over all ranks; "
    f"{_OR_ELSE}",
    "dtype": "times are doubles; compute_dtype= is the type that f computes in, state_dtype= that of the state",
    "max_num_steps": f"use max_steps={{value!r}}, which counts the steps of the whole solve; {_OR_ELSE}",
    "min_step": "use dt_min={value!r} with rtol= or atol=",
    "max_step": "use dt_max={value!r} with rtol= or atol=",
    "safety": "use options={{'ts_adapt_safety': {value!r}}} with rtol= or atol=",
    "ifactor": "use options={{'ts_adapt_clip': '0.1,{value}'}} with rtol= or atol=",
    "dfactor": "use options={{'ts_adapt_clip': '{value},10'}} with rtol= or atol=",
    "implicit": "choose an implicit method by method=",
    "max_order": "use options={{'ts_bdf_order': {value!r}}} with method='bdf'",
    "max_iters": "use options={{'snes_max_it': {value!r}}} with an implicit method",
    "event_fn": "use pnode_dist.solve_events",
}
_STEPS_ARE_OURS: dict[str, str] = {
    "ts_dt": "use step_size={value!r}",
    "ts_time_step": "use step_size={value!r}",
    "ts_rtol": "use rtol={value!r}",
    "ts_atol": "use atol={value!r}",
    "ts_adapt_type": "use adaptor={value!r} with rtol= or atol=; steps of step_size= are never adapted",
    "ts_max_steps": "a solve ends at t[-1]; use max_steps={value!r} for an error after as many steps",
    "ts_run_steps": "a solve ends at t[-1], after as many steps as t and step_size= make",
    "ts_max_time": "a solve ends at t[-1]",
    "ts_final_time": "a solve ends at t[-1]",
    "ts_init_time": "a solve begins at t[0]",
    "ts_time_span": "the output times are those of t",
    "ts_eval_times": "the output times are those of t",
    "ts_exact_final_time": "steps end at every time of t",
    "ts_equation_type": "it follows from the method and from mass=",
    "ts_save_trajectory": "use trajectory=Trajectory(...)",
    "ts_error_if_step_fails": "a step that fails is always an error",
    "ts_max_snes_failures": "a step whose equations are not solved is an error, or is tried with a smaller size",
    "ts_max_step_rejections": "a step that is rejected too often is a StepSizeError",
    "ts_max_reject": "a step that is rejected too often is a StepSizeError",
}
_OWN = {
    "rk": r"ts_rk_type",
    "ssp": r"ts_ssp_\w+",
    "symplectic": r"(?!)",
    "theta": r"ts_theta_\w+",
    "arkimex": r"ts_arkimex_\w+",
    "dirk": r"ts_(dirk|arkimex)_\w+",
    "irk": r"(?!)",
    "rosw": r"ts_rosw_\w+",
    "bdf": r"ts_bdf_\w+",
}
_READ_LATER = re.compile(r"(^|_)(snes|ksp|pc|mat|vec|dm|is|mg|sub|fieldsplit)_")
_KNOWN = (
    *_TO_ARGUMENTS,
    *_STEPS_ARE_OURS,
    *("ts_type", "ts_rk_type", "ts_arkimex_type", "ts_dirk_type", "ts_rosw_type", "ts_ssp_type"),
    *("ts_theta_theta", "ts_theta_endpoint", "ts_bdf_order", "ts_monitor", "ts_monitor_solution", "ts_adapt_safety"),
    *("ts_adapt_clip", "ts_adapt_dt_min", "ts_adapt_dt_max", "ts_adapt_monitor", "ts_adapt_reject_safety"),
    *("ts_adapt_always_accept", "ts_adapt_wnormtype", "ts_adapt_dsp_filter", "snes_type", "snes_rtol", "snes_atol"),
    *("snes_stol", "snes_max_it", "snes_monitor", "snes_linesearch_type", "snes_converged_reason", "snes_view"),
    *("snes_lag_jacobian", "snes_lag_preconditioner", "ksp_type", "ksp_rtol", "ksp_atol", "ksp_max_it", "ksp_monitor"),
    *("ksp_gmres_restart", "ksp_converged_reason", "ksp_view", "ksp_norm_type", "pc_type", "pc_factor_levels"),
    *("pc_factor_mat_solver_type", "pc_factor_shift_type", "sub_pc_type", "sub_ksp_type", "mg_levels_ksp_type"),
    *("mg_levels_pc_type", "pc_gamg_threshold", "pc_gamg_type", "pc_asm_overlap", "pc_mg_levels", "mg_coarse_pc_type"),
)


def check_options(options: Mapping[str, Any] | None, family: str, adaptive: bool) -> None:
    """Raise `ConfigurationError` for options without an effect, with the alternative.

    `family` is that of the method. `adaptive`: steps have error control.
    """
    if options and _has_refusal(tuple(options), family, adaptive):
        words = (
            f"{name!r}: {why.format(value=value)}"
            for name, value in options.items()
            if (why := _refusal(name, family, adaptive)) is not None
        )
        raise ConfigurationError(f"options: {'; '.join(words)}")


def read_at_set_up(names: Iterable[str]) -> set[str]:
    """Return those names that PETSc reads during the set-up of a solver with steps of fixed size."""
    return {name for name in names if not _bare(name).startswith("ts_adapt_")}


def without_adaptation(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the options for repeating the steps of a solve with error control, without those for adaptation."""
    return {name: (options or {})[name] for name in read_at_set_up(options or ())}


def check_read(unread: Iterable[str], later: bool = False) -> None:
    """Raise `ConfigurationError` for options that PETSc has not read.

    With `later`, except for those that it may read in its first linear solve. Names without a prefix are read at the
    set-up, so a misspelled one is an error then.
    """
    names = [name for name in unread if not (later and _READ_LATER.search(_bare(name))) or _is_misspelled(_bare(name))]
    if names:
        words = (f"{name!r}: {_unknown(_bare(name))}" for name in sorted(names))
        raise ConfigurationError(f"options: {'; '.join(words)}")


def check_read_by_all(unread: set[str], comm: MPI.Comm) -> None:
    """Apply `check_read` to options that no rank has read. Collective on `comm`. Raises on all ranks alike."""
    if comm.size > 1:
        unread.intersection_update(*comm.allgather(unread))
    check_read(unread)


@lru_cache(maxsize=64)
def _has_refusal(names: tuple[str, ...], family: str, adaptive: bool) -> bool:
    return any(_refusal(name, family, adaptive) is not None for name in names)


def _refusal(name: str, family: str, adaptive: bool) -> str | None:
    """Return the reason why an option has no effect, and the alternative. None to check PETSc's record."""
    bare = _bare(name)
    if bare in _TO_ARGUMENTS or bare in _STEPS_ARE_OURS:
        return {**_TO_ARGUMENTS, **_STEPS_ARE_OURS}[bare]
    if bare.startswith("ts_trajectory_"):
        return "use trajectory=Trajectory(...)"
    if bare.startswith("ts_adjoint_"):
        return "adjoint steps are taken outside of TSAdjointSolve, which alone reads it"
    if bare.startswith("ts_adapt_"):
        return None if adaptive else "sizes of steps are adapted with rtol= or atol= only"
    if bare == "ts_type" and family in ("symplectic", "irk"):
        return "choose the method by name"
    if bare.startswith("ts_monitor") or bare == "ts_type" or re.fullmatch(_OWN[family], bare):
        return None
    if bare.startswith("ts_"):
        return _escaped(_unknown(bare))
    if family in ("rk", "ssp", "symplectic"):
        if _READ_LATER.search(bare):
            return "explicit methods solve no equations: it is for implicit ones (see `pnode-dist methods`)"
        return _escaped(_unknown(bare))
    return None


def _is_misspelled(bare: str) -> bool:
    """Return True for a name without a prefix that is no known option of a solver of equations, but nearly one."""
    if bare in _KNOWN or not bare.startswith(("snes_", "ksp_", "pc_")):
        return False
    return bool(get_close_matches(bare, _KNOWN, n=1, cutoff=0.85))


def _unknown(bare: str) -> str:
    close = get_close_matches(bare, _KNOWN, n=1, cutoff=0.75)
    if not close or close[0] == bare:
        return "nothing reads it with this method: see PETSc's manual pages for the options of TS, SNES, KSP and PC"
    instead = _TO_ARGUMENTS.get(close[0], _STEPS_ARE_OURS.get(close[0]))
    return f"nothing reads it: did you mean {close[0]}?" + ("" if instead is None else " That is no option either")


def _escaped(words: str) -> str:
    return words.replace("{", "{{").replace("}", "}}")


def _bare(name: str) -> str:
    return str(name).removeprefix("-")
