"""Events of complex states: the solve sees real views, and `g` and `reset` complex tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.hybrid.event import Event, EventSolution
from pnode_dist.ode.complex_state import ComplexForm, RealCall


def on_real_views(event: Event, form: ComplexForm) -> Event:
    """Return the event of the real views of a state of this form."""
    # The functions themselves: their parameters are found in the closures.
    g, reset, name = event.g, event.reset, event.name

    def real_g(t: torch.Tensor, u: Any, *args: Any) -> Any:
        return g(t, form.complex(u), *args)

    def real_reset(t: torch.Tensor, u: Any, *args: Any) -> Any:
        assert reset is not None
        after = reset(t, form.complex(u), *args)
        try:
            return form.real(after)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            raise ConfigurationError(
                f"event {name!r}: reset must return a state of the form of u0, with the same complex parts"
            ) from None

    return replace(event, g=real_g, reset=None if reset is None else real_reset)


def complex_solution(solution: EventSolution, call: RealCall) -> EventSolution:
    """Return the solution in the form of the caller's state."""
    if call.form is None:
        return solution
    states = {name: call.form.complex(getattr(solution, name)) for name in ("u_before", "u_after", "u_end")}
    return replace(solution, u=call.outputs(solution.u), **states)
