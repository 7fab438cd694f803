"""Controls of an inversion: an initial state or parameters, with a prior, bounds and an inner product."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from pnode_dist.distributed.sharding import Shard, shards_of
from pnode_dist.errors import ConfigurationError
from pnode_dist.inverse.covariance import Covariance, CovarianceLike, covariance_of
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.ode.rhs.parameters import find_parameters

Bound = float | torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A normal distribution of a control: its `mean`, and its `covariance` or variance.

    `mean` is a number, or a tensor like the control. None is the control's first guess. A control of several tensors
    is one flat tensor here, in their order.
    """

    mean: float | torch.Tensor | None = None
    covariance: CovarianceLike = 1.0


@dataclass(frozen=True, eq=False)
class Control:
    """A control of an inversion: the initial state, or parameters of the right-hand side.

    - `values`: this rank's part of the initial state, a tensor; or one parameter, several, or a module that holds them.
      The present values are the first guess. Parameters take the values of the last evaluation.
    - `prior`: the distribution before the observations, which adds |L^-1 (m - mean)|^2 / 2. None adds nothing.
    - `bounds`: the lower and the upper bound, each a number, a tensor like the control, or None.
    - `inner_product`: the covariance (or variance) C whose inverse defines the inner product <a, C^-1 b> in which TAO
      works. The steps of a minimisation on a refined grid are those on the coarse one if it is an inner product of
      functions: one over the area of a cell gives that of L2. "prior" is that of the prior. None is the sum over
      entries.
    """

    values: torch.Tensor | Iterable[torch.Tensor] | nn.Module
    prior: Gaussian | None = None
    bounds: tuple[Bound, Bound] = (None, None)
    inner_product: CovarianceLike | Literal["prior"] | None = None


Kind = Literal["state", "replicated", "sharded"]


@dataclass(frozen=True, eq=False)
class Resolved:
    """A control whose tensors and covariances are known. `kind` names the distribution of its tensors over ranks.

    `shards` are those of sharded tensors. `is_model_error`: it is added to the state at a later time.
    """

    name: str
    kind: Kind
    tensors: tuple[torch.Tensor, ...]
    given: Control
    prior: Covariance | None
    inner_product: Covariance | None
    shards: tuple[Shard, ...] = ()
    is_model_error: bool = False

    @property
    def guess(self) -> torch.Tensor:
        """The first guess as one float64 tensor."""
        return joined(self.tensors)


def joined(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return a copy of the tensors of a control as one float64 tensor: flat unless there is one alone."""
    copies = [tensor.detach().to("cpu", torch.float64, copy=True) for tensor in tensors]
    return copies[0].contiguous() if len(copies) == 1 else torch.cat([copy.reshape(-1) for copy in copies])


def resolved(controls: Iterable[Control], node: NeuralODE) -> list[Resolved]:
    """Find out which controls are parameters of `node`, and which one is the initial state. Not collective.

    Raises `ConfigurationError` for a control that cannot be varied, or is given twice.
    """
    shards = shards_of(node)
    sharded = {id(parameter): shards[name] for name, parameter in node.named_parameters() if name in shards}
    known = {id(tensor) for tensor in find_parameters(node.func, tuple(node.settings.params or ()), lambda _: True)}
    results: list[Resolved] = []
    seen: set[int] = set()
    for number, control in enumerate(controls):
        name = f"controls[{number}]"
        tensors = _tensors(control.values, name)
        held = [id(tensor) in known for tensor in tensors]
        kind: Kind = "state"
        if any(held):
            kind = _kind_of_parameters(tensors, held, [id(tensor) in sharded for tensor in tensors], name)
        elif len(tensors) != 1 or isinstance(tensors[0], nn.Parameter):
            raise ConfigurationError(
                f"{name}: {len(tensors)} tensors that the right-hand side does not hold: must be its parameters, or "
                "one tensor, the initial state (detach a parameter to use its values as one)"
            )
        if seen & {id(tensor) for tensor in tensors} or (kind == "state" and any(r.kind == "state" for r in results)):
            raise ConfigurationError(f"{name}: is a control already; there can be one initial state")
        seen.update(id(tensor) for tensor in tensors)
        own = tuple(sharded[id(tensor)] for tensor in tensors) if kind == "sharded" else ()
        results.append(replace(_with_covariances(name, kind, tensors, control), shards=own))
    if not results:
        raise ConfigurationError("controls: must name the initial state or parameters of the right-hand side")
    return results


def _tensors(values: torch.Tensor | Iterable[torch.Tensor] | nn.Module, name: str) -> tuple[torch.Tensor, ...]:
    if isinstance(values, nn.Module):
        values = [parameter for parameter in values.parameters() if parameter.requires_grad]
    tensors = (values,) if isinstance(values, torch.Tensor) else tuple(values)
    if not tensors or not all(isinstance(t, torch.Tensor) and t.is_floating_point() for t in tensors):
        raise ConfigurationError(f"{name}: values: must be floating-point tensors, at least one")
    return tensors


def _kind_of_parameters(tensors: tuple[torch.Tensor, ...], held: list[bool], sharded: list[bool], name: str) -> Kind:
    if not all(held) or len(set(sharded)) > 1:
        raise ConfigurationError(
            f"{name}: values: must all be whole parameters of the right-hand side, or all sharded ones, or one initial "
            "state: give a control for each kind"
        )
    for tensor in tensors:
        if not (tensor.requires_grad and tensor.is_leaf):
            raise ConfigurationError(
                f"{name}: a parameter of shape {tuple(tensor.shape)} that requires no gradient, or is no leaf: must be "
                "a leaf with requires_grad"
            )
    return "sharded" if sharded[0] else "replicated"


def _with_covariances(name: str, kind: Kind, tensors: tuple[torch.Tensor, ...], control: Control) -> Resolved:
    prior = None if control.prior is None else covariance_of(control.prior.covariance, f"{name}: prior.covariance")
    given = control.inner_product
    if isinstance(given, str):
        if given != "prior" or prior is None:
            raise ConfigurationError(
                f'{name}: inner_product = {given!r}: must be a covariance, or "prior" with a prior'
            )
        return Resolved(name, kind, tensors, control, prior, prior)
    product = None if given is None else covariance_of(given, f"{name}: inner_product")
    return Resolved(name, kind, tensors, control, prior, product)
