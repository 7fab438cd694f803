"""The value of an inverse problem as a model for UM-Bridge's clients: a negative log posterior of its controls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.inverse.control import Resolved
from pnode_dist.inverse.inverse import Inverse
from pnode_dist.partition import protocol

MOST_NUMBERS = 100_000
"""Most numbers of an input."""


class NegativeLogPosterior:
    """J of an `Inverse`, the negative logarithm of its posterior density up to a constant.

    It has an input for each control, `[size]`: the entries of the whole field, or of all parameters one after the
    other, in the order of torch and for any number of ranks. The output is J, `[1]`. All inputs and results are the
    same on every rank. Implements `pnode_dist.train.served_model.ServedModel`. Raises `ConfigurationError` for sharded
    parameters, and for a control with too many entries.
    """

    def __init__(self, inverse: Inverse, name: str = "negative_log_posterior") -> None:
        self.name, self._inverse = name, inverse
        self._whole = [_whole_of(inverse, control) for control in inverse.space.controls]

    def refusal(self, operation: str) -> str | None:
        """Return None: every operation is supported."""
        return None

    def input_sizes(self, config: Mapping[str, Any]) -> Sequence[int]:
        """Return the number of entries of each control. Raises `ConfigurationError` for a `config` with keys."""
        for key in config:
            raise ConfigurationError(f"config: unknown key {key!r}: must be empty")
        return [whole.size for whole in self._whole]

    def output_sizes(self, config: Mapping[str, Any]) -> Sequence[int]:
        """Return the length of the output, 1."""
        self.input_sizes(config)
        return [1]

    def evaluate(self, inputs: Sequence[torch.Tensor], config: Mapping[str, Any]) -> Sequence[torch.Tensor]:
        """Compute J. Collective."""
        return [torch.tensor([self._inverse(self._packed(inputs))], dtype=torch.float64)]

    def gradient(
        self,
        out_wrt: int,
        in_wrt: int,
        inputs: Sequence[torch.Tensor],
        sens: torch.Tensor,
        config: Mapping[str, Any],
    ) -> torch.Tensor:
        """Compute `sens` times the gradient with respect to a control. Collective."""
        self._evaluate_at(inputs)
        return sens * self._unpacked(self._inverse.derivative(), in_wrt)

    def apply_jacobian(
        self,
        out_wrt: int,
        in_wrt: int,
        inputs: Sequence[torch.Tensor],
        vec: torch.Tensor,
        config: Mapping[str, Any],
    ) -> torch.Tensor:
        """Compute the derivative of J along `vec` in a control. Collective."""
        self._evaluate_at(inputs)
        return (self._unpacked(self._inverse.derivative(), in_wrt) @ vec).reshape(1)

    def apply_hessian(
        self,
        out_wrt: int,
        in_wrt1: int,
        in_wrt2: int,
        inputs: Sequence[torch.Tensor],
        sens: torch.Tensor,
        vec: torch.Tensor,
        config: Mapping[str, Any],
    ) -> torch.Tensor:
        """Compute `sens` times the derivative along `vec` in control 2 of the gradient in control 1. Collective."""
        self._evaluate_at(inputs)
        along = [torch.zeros(whole.size, dtype=torch.float64) for whole in self._whole]
        along[in_wrt2] = vec
        return sens * self._unpacked(self._inverse.hessian(self._packed(along)), in_wrt1)

    def _evaluate_at(self, inputs: Sequence[torch.Tensor]) -> None:
        m = self._packed(inputs)
        if not self._inverse.is_at(m):
            value = self._inverse(m)
            if not math.isfinite(value):
                raise ArithmeticError(f"J is {value}: it has no derivative there")

    def _packed(self, values: Sequence[torch.Tensor]) -> PETSc.Vec:
        return self._inverse.space.pack([whole.part(value) for whole, value in zip(self._whole, values, strict=True)])

    def _unpacked(self, vec: PETSc.Vec, number: int) -> torch.Tensor:
        return self._whole[number].joined(self._inverse.space.unpack(vec)[number])


class _Whole:
    """A control whose entries are all on every rank, of which this rank's part has `shape`."""

    def __init__(self, size: int, shape: Sequence[int]) -> None:
        self.size, self._shape = size, tuple(shape)

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of the control."""
        return whole.reshape(self._shape)

    def joined(self, part: torch.Tensor) -> torch.Tensor:
        """Return the whole control, flat. Collective."""
        return part.reshape(-1)


class _Distributed(_Whole):
    """A control with a part on each rank, at the `positions` of the whole."""

    def __init__(self, inverse: Inverse, size: int, shape: Sequence[int], positions: torch.Tensor) -> None:
        super().__init__(size, shape)
        self._comm, self._positions = inverse.comm, positions

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of the control."""
        return whole[self._positions].reshape(self._shape)

    def joined(self, part: torch.Tensor) -> torch.Tensor:
        """Return the whole control, flat. Collective."""
        whole = torch.zeros(self.size, dtype=torch.float64).index_add(0, self._positions, part.reshape(-1))
        return torch.from_numpy(self._comm.allreduce(whole.numpy()))


def _whole_of(inverse: Inverse, control: Resolved) -> _Whole:
    shape, partition = tuple(control.guess.shape), inverse.space.partition
    if control.shards:
        raise ConfigurationError(f"{control.name}: sharded parameters cannot be served")
    if control.kind != "state" or partition is None:
        size, positions = math.prod(shape), None
    else:
        leading = shape[: len(shape) - len(partition.local_shape)]
        every = torch.arange(math.prod(leading) * protocol.count(partition.global_shape))
        owned = (*(slice(None),) * len(leading), *partition.owned_slices(inverse.comm.rank))
        size, positions = len(every), every.reshape(*leading, *partition.global_shape)[owned].flatten()
    if size > MOST_NUMBERS:
        raise ConfigurationError(f"{control.name}: has {size} entries: must be at most {MOST_NUMBERS} to be served")
    return _Whole(size, shape) if positions is None else _Distributed(inverse, size, shape, positions)
