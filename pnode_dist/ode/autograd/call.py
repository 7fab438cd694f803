"""A solve as a function of tensors, and the solves that compute its derivatives.

Let y = y(x) be the states of a solve, as a function of initial state and parameters x. Its gradient for cotangents w of
y is G(x, w) = J(x)^T w. The tangents J v along a direction v come from a solve of twice the size (see
`pnode_dist.ode.rhs.tangent`). The gradient of that solve for cotangents w of the tangents is the derivative of
<w, J v> with respect to x. This is H v, with H the Hessian of <w, y>. All second derivatives follow from these two, in
any order of differentiation:

- the gradient of <v, G> with respect to w is J v, and with respect to x it is H v;
- the tangent of G along (v, dw) is H v + J^T dw.

The solve of tangents is a solve itself, so third and higher derivatives work in the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from pnode_dist.ode.autograd.batched import batched
from pnode_dist.ode.autograd.transforms import hooks_on_saved_tensors, is_wrapped
from pnode_dist.ode.backward_pass import backward_pass
from pnode_dist.ode.forward_pass import forward_pass
from pnode_dist.ode.recomputation.carried import Carried
from pnode_dist.ode.recomputation.surroundings import Surroundings, uncached_casts
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.layout import Parts
from pnode_dist.ode.rhs.parameters import Parameters
from pnode_dist.ode.rhs.tangent import with_tangent
from pnode_dist.ode.solve import Solve
from pnode_dist.ode.solve_lock import solve_lock
from pnode_dist.ode.solver_key import check_unchanged
from pnode_dist.ode.steppers.step_rule import call_back_reversed

Products = tuple[torch.Tensor | None, ...]


class Prepare(Protocol):
    """A function that prepares the solve of a right-hand side, or with `first` the solve of its tangents.

    `first` runs and returns the solve without tangents. The solve of tangents takes the steps accepted there.
    """

    def __call__(
        self,
        func: Function,
        state: Parts,
        times: torch.Tensor | None,
        args: tuple[Any, ...],
        first: Callable[[], Solve] | None,
    ) -> Solve: ...


@dataclass(frozen=True)
class Asked:
    """The solve asked for: a right-hand side with its arguments, its parameters as they were `found`, and settings.

    A state has `parts` parts; the right-hand side takes them as a tuple if `is_tuple`. `needs_time_gradient`: the times
    are an input too. `surroundings` and `carried` hold f's inputs besides its arguments. They are None and empty if no
    derivative can be asked for. `transformed`: a transform of torch is active, so parameters may depend on one another.
    `folds`: a batch of states may be solved as one state. `only_last`: the outputs have no axis of
    times.
    """

    func: Function
    args: tuple[Any, ...]
    parts: int
    is_tuple: bool
    found: Parameters
    needs_time_gradient: bool
    ranks: int
    prepare: Prepare
    surroundings: Surroundings | None
    carried: Carried
    transformed: bool = False
    folds: bool = False
    only_last: bool = False

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        """The tensors that f is differentiated with respect to."""
        return self.found.tensors


@dataclass
class Run:
    """A solve that was run from `tensors`. `numbers[i]` is the number of the solve's parameter that input i is."""

    solve: Solve
    tensors: tuple[torch.Tensor, ...]
    numbers: tuple[int | None, ...]

    def __del__(self, at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        """Release the checkpoints of a graph that is dropped without a backward pass.

        weakref.finalize would hold the solve, which may lead to this object through f.
        """
        if not at_exit():
            self.solve.abandon()

    def is_of(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return True if `tensors` are the same values in the same memory."""
        return all(map(_same, self.tensors, tensors))


@dataclass
class Call:
    """A solve as a function of tensors: the parts of the initial state, the parameters, and the times if needed.

    - `directions`: each makes this the solve of tangents of the one before. The parts of a tangent follow those of the
      state. The tangents of the parameters with these numbers follow the parameters.
    - `first`: the call of the solve without tangents.
    - `keeps`: the trajectory is kept for a gradient; with `by_directions` also with respect to parameter tangents.
    - `ready`: a solve that was prepared for the first run.
    - `repeats`: restore the surroundings of the original forward pass for f, and undo f's changes afterwards.
    - `drew`: f drew random numbers.
    - `last`: the last run. Of a batch these are `members`, or one call, the `whole`.
    """

    asked: Asked
    keeps: bool
    directions: tuple[tuple[int, ...], ...] = ()
    by_directions: bool = False
    first: Call | None = None
    ready: Solve | None = None
    repeats: bool = False
    drew: bool = False
    last: Run | None = field(default=None, repr=False)
    members: list[Call] = field(default_factory=list, repr=False)
    whole: Call | None = field(default=None, repr=False)

    @property
    def parts(self) -> int:
        """The number of parts of the state."""
        return self.asked.parts << len(self.directions)

    @property
    def parameters(self) -> int:
        """The number of parameters, with their tangents."""
        return len(self.asked.parameters) + sum(map(len, self.directions))

    def separated(self, inputs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """Separate the inputs into those of the state, of the parameters and of the times."""
        end = self.parts + self.parameters
        return inputs[: self.parts], inputs[self.parts : end], inputs[end:]

    def again(self) -> Call:
        """Return the same call for other values of its tensors."""
        first = None if self.first is None else self.first.again()
        return replace(self, ready=None, repeats=True, last=None, members=[], whole=None, first=first)

    def of_batch(self) -> Call:
        """Return the same call for a batch of states, as one state with one more axis."""
        call = self.again()
        func = call.asked.func
        call.asked = replace(call.asked, func=batched(func))
        if call.first is not None:
            call.first.asked = call.asked
        return call

    def tangent(self, numbers: tuple[int, ...], keeps: bool, by_directions: bool) -> Call:
        """Return the call of the tangents, along directions of the parameters with these numbers."""
        first = self if self.first is None else self.first
        return Call(self.asked, keeps, (*self.directions, numbers), by_directions, first, repeats=True)

    def latest(self) -> Solve:
        """Return the last solve that was run; in a batch that of all members, or of the last one."""
        call = self
        while call.last is None:
            call = call.whole or call.members[-1]
        return call.last.solve

    def run(self, tensors: tuple[torch.Tensor, ...]) -> Parts:
        """Run the solve and return its outputs. Collective on the partition's communicator."""
        with solve_lock():
            return self._run(tensors)

    def _run(self, tensors: tuple[torch.Tensor, ...]) -> Parts:
        ready, self.ready = self.ready, None
        if ready is not None:
            return self._forward(Run(ready, tensors, tuple(range(self.parameters))))
        asked, values = self.asked, self.separated(tensors)[1]
        own = [self._stand_in(*pair) for pair in zip(asked.parameters, values, strict=False)]
        replaced = {id(old): new for old, new in zip(asked.parameters, own, strict=True) if new is not old}
        first = self._first(tensors)
        with ExitStack() as stack:
            if asked.surroundings is not None and self.repeats:
                # Restore the carried state first: it restores all bindings, and would undo the replacements.
                stack.enter_context(asked.carried.backward_pass())
                asked.carried.restart()
                stack.enter_context(asked.surroundings.restored(replaced))
            elif asked.surroundings is not None:
                stack.enter_context(asked.surroundings.bindings.installed(replaced))
            drawn = torch.get_rng_state()
            outputs = self._forward(self._prepared(tensors, own, replaced, first))
            self.drew = not torch.equal(torch.get_rng_state(), drawn)
            return outputs

    def reverse(
        self, cotangents: Sequence[torch.Tensor | None], tensors: tuple[torch.Tensor, ...], same: bool = False
    ) -> Products:
        """Return the gradient with respect to each of `tensors`; None is zero. Collective, like `run`.

        `same`: the last run is known to be one of these values.
        """
        if self.last is not None:
            # Check before the solve is recomputed with the present contents.
            check_unchanged(self.last.solve.solver.contents)
        if self.last is None or not self.last.solve.keeps_trajectory or not (same or self.last.is_of(tensors)):
            self.keeps = self.repeats = True
            self.run(tensors)
        run = self.last
        assert run is not None
        with solve_lock(lambda: run.solve.solver.stepper.stepping):
            if run.solve.agreed is not None:
                run.solve.agreed.begin_backward(not run.solve.has_trajectory)
            return self._reverse(run, cotangents)

    def _reverse(self, run: Run, cotangents: Sequence[torch.Tensor | None]) -> Products:
        with _running(run.solve, backward=True):
            if not run.solve.has_trajectory:
                # An earlier backward pass has used up the checkpoints: run the forward pass again.
                run.solve.carried.restart()
                forward_pass(run.solve, run.tensors[: self.parts])
            states, found, times = backward_pass(run.solve, cotangents)
        # Outside of the surroundings of f, which would undo what the callback changes.
        call_back_reversed(run.solve.callbacks.pulled_back, run.solve.grid)
        return (*states, *(None if number is None else found[number] for number in run.numbers), *times)

    def _forward(self, run: Run) -> Parts:
        solve = run.solve
        with _running(solve):
            outputs = forward_pass(solve, run.tensors[: self.parts])
        if solve.surroundings is not None:
            solve.surroundings.end_forward()
        self.last = run
        return outputs

    def _prepared(
        self,
        tensors: tuple[torch.Tensor, ...],
        own: list[torch.Tensor],
        replaced: dict[int, torch.Tensor],
        first: Callable[[], Solve] | None,
    ) -> Run:
        parts, values, times = self.separated(tensors)
        directions = [value.detach().requires_grad_(self.by_directions) for value in values[len(own) :]]
        state = tuple(part.detach().requires_grad_(self.keeps) for part in parts)
        clock = times[0].detach().requires_grad_(self.keeps) if times else None
        with torch.set_grad_enabled(self.keeps):
            func, args = self._function([*own, *directions]), with_replaced(self.asked.args, replaced)
            solve = self.asked.prepare(func, state, clock, args, first)
        places = {id(tensor): number for number, tensor in enumerate(solve.parameters)}
        return Run(solve, tensors, tuple(places.get(id(tensor)) for tensor in (*own, *directions)))

    def _function(self, values: list[torch.Tensor]) -> Function:
        """Return the right-hand side of the state and its tangents."""
        func, is_tuple, known = self.asked.func, self.asked.is_tuple, len(self.asked.parameters)
        for numbers in self.directions:
            along = values[known : known + len(numbers)]
            every = [value for value in values[:known] if value.requires_grad]
            direction = dict(zip((values[number] for number in numbers), along, strict=True))
            func = with_tangent(func, is_tuple, direction, replace(self.asked.found, tensors=tuple(every)))
            is_tuple, known = True, known + len(numbers)
        return func

    def _first(self, tensors: tuple[torch.Tensor, ...]) -> Callable[[], Solve] | None:
        """Return a function that runs the solve without tangents if that has not been done."""
        if self.first is None:
            return None
        parts, values, times = self.separated(tensors)
        own = (*parts[: self.asked.parts], *values[: len(self.asked.parameters)], *times)

        def run() -> Solve:
            assert self.first is not None
            if self.first.last is None or not self.first.last.is_of(own):
                self.first = self.first.again()
                self.first.keeps = False
                self.first.run(own)
            assert self.first.last is not None
            return self.first.last.solve

        return run

    def _stand_in(self, original: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the tensor that replaces `original` for f: a new leaf, unless `original` itself can be used."""
        serves = original.requires_grad and not is_wrapped(original)
        if serves and (original.is_leaf or not self.asked.transformed) and _same(original, value):
            return original
        return value.detach().requires_grad_() if value.is_floating_point() or value.is_complex() else value


@contextmanager
def _running(solve: Solve, backward: bool = False) -> Iterator[None]:
    """Set up the evaluation of f within the context: copies in modules, and in a backward pass the surroundings.

    A solve that fails releases its checkpoints.
    """
    surroundings = solve.surroundings
    try:
        with ExitStack() as stack:
            stack.enter_context(hooks_on_saved_tensors())
            if backward and surroundings is not None:
                stack.enter_context(surroundings.restored())
            if surroundings is not None and surroundings.autocast.on:
                stack.enter_context(uncached_casts())
            stack.enter_context(solve.bound.copies.in_place(writes_back=not backward))
            if backward:
                stack.enter_context(solve.carried.backward_pass())
            yield
    except BaseException:
        # An error that is kept would keep the solve, with its checkpoints, alive.
        solve.abandon()
        raise


def with_replaced(thing: Any, replaced: Mapping[int, torch.Tensor]) -> Any:
    """`thing`, a tensor or a tuple of more, with tensors replaced by their `id`."""
    if type(thing) is tuple:
        return tuple(with_replaced(part, replaced) for part in thing)
    return replaced.get(id(thing), thing)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (
        not is_wrapped(a)
        and not is_wrapped(b)
        and a.dtype is b.dtype
        and a.device == b.device
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.data_ptr() == b.data_ptr()
        and a._version == b._version
    )
