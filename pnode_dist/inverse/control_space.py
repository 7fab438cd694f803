"""The space of all controls: one distributed Vec for an initial state, parameters and model errors together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.inverse.control import Bound, Kind, Resolved, joined
from pnode_dist.inverse.covariance import Covariance
from pnode_dist.partition.protocol import Partition, even_ranges
from pnode_dist.petsc import vectors
from pnode_dist.verify.gradcheck import state_direction

Values = list[torch.Tensor]
"""One float64 tensor for each control: this rank's part of a state, the whole of replicated parameters."""


class ControlSpace:
    """The controls of an inversion as one MPI Vec. Collective on `comm`, and so are all methods.

    This rank's part of the Vec holds its part of a state and of sharded parameters, and its share of replicated
    parameters: they are divided evenly over the ranks, so that inner products count each of them once.
    """

    def __init__(self, comm: MPI.Comm, controls: Sequence[Resolved], partition: Partition | None) -> None:
        self.comm, self.controls, self.partition = comm, tuple(controls), partition
        self._blocks = [_Block(control.kind, tuple(control.guess.shape), comm) for control in controls]
        self._ranges = list(pairwise((0, *accumulate(block.local_size for block in self._blocks))))
        self.local_size = self._ranges[-1][1]
        self.size: int = comm.allreduce(self.local_size)

    def create(self) -> PETSc.Vec:
        """Return a zero Vec."""
        return vectors.create_vec(self.comm, self.local_size)

    def pack(self, values: Sequence[torch.Tensor]) -> PETSc.Vec:
        """Return the Vec of `values`, one tensor for each control. Replicated ones are equal on all ranks."""
        return self._joined([block.share(value) for block, value in zip(self._blocks, values, strict=True)])

    def pack_sums(self, contributions: Sequence[torch.Tensor | None]) -> PETSc.Vec:
        """Return the Vec of a gradient, from this rank's contribution to each control; None is zero."""
        return self._joined([block.summed(part) for block, part in zip(self._blocks, contributions, strict=True)])

    def unpack(self, vec: PETSc.Vec) -> Values:
        """Return copies of the values in `vec`, one tensor for each control."""
        local = vectors.view(vec, (self.local_size,))
        return [block.whole(local[slice(*own)]) for block, own in zip(self._blocks, self._ranges, strict=True)]

    def guess(self) -> PETSc.Vec:
        """Return the first guess: the present values of the controls' tensors."""
        return self.pack([control.guess for control in self.controls])

    def bounds(self) -> tuple[PETSc.Vec, PETSc.Vec] | None:
        """Return the lower and the upper bounds of all entries, None without any."""
        given = [control.given.bounds for control in self.controls]
        if all(bound is None for pair in given for bound in pair):
            return None
        lower, upper = (
            self.pack([self._filled(number, pair[side], none) for number, pair in enumerate(given)])
            for side, none in ((0, PETSc.NINFINITY), (1, PETSc.INFINITY))
        )
        return lower, upper

    def random(self, seed: int) -> PETSc.Vec:
        """Return standard normal values, which depend on the seed and global indices alone."""
        return self.pack([self._drawn(number, seed) for number in range(len(self.controls))])

    def _drawn(self, number: int, seed: int) -> torch.Tensor:
        block = self._blocks[number]
        if block.kind == "state" and self.partition is not None:
            leading = len(block.shape) - len(self.partition.local_shape)
            # Several controls may be states: the initial one and model errors.
            return state_direction(self.partition, block.shape[:leading], _mixed(seed, number))
        control = self.controls[number]
        generator = np.random.default_rng([seed, number])
        if not control.shards:
            return torch.from_numpy(generator.standard_normal(block.shape))
        wholes = [
            torch.from_numpy(generator.standard_normal(shard.whole_shape(tensor)))
            for shard, tensor in zip(control.shards, control.tensors, strict=True)
        ]
        return joined(tuple(shard.part_of(whole) for shard, whole in zip(control.shards, wholes, strict=True)))

    def _filled(self, number: int, bound: Bound, none: float) -> torch.Tensor:
        shape = self._blocks[number].shape
        value = torch.as_tensor(none if bound is None else bound, dtype=torch.float64).detach()
        return value.expand(shape) if value.dim() == 0 or value.shape == shape else value.reshape(shape)

    def _joined(self, shares: Sequence[torch.Tensor]) -> PETSc.Vec:
        vec = self.create()
        vectors.fill(vec, torch.cat([share.reshape(-1) for share in shares]))
        return vec


class BlockCovariance:
    """The covariances of all controls, applied to Vecs of a `ControlSpace`. All methods are collective.

    The identity stands for a covariance of None; with `zero` its inverse is zero, that of a control without a prior.
    """

    def __init__(self, space: ControlSpace, covariances: Sequence[Covariance | None], zero: bool = False) -> None:
        self.space, self.covariances, self._zero = space, tuple(covariances), zero

    @property
    def is_identity(self) -> bool:
        """True if no control has a covariance."""
        return not self._zero and all(covariance is None for covariance in self.covariances)

    def root(self, vec: PETSc.Vec) -> PETSc.Vec:
        """Return L x."""
        return self._applied(vec, lambda covariance, x: covariance.root(x))

    def root_transpose(self, vec: PETSc.Vec) -> PETSc.Vec:
        """Return L^T x."""
        return self._applied(vec, lambda covariance, x: covariance.root_transpose(x))

    def root_solve(self, vec: PETSc.Vec) -> PETSc.Vec:
        """Return L^-1 x."""
        return self._applied(vec, lambda covariance, x: covariance.root_solve(x), inverse=True)

    def root_solve_transpose(self, vec: PETSc.Vec) -> PETSc.Vec:
        """Return L^-T x."""
        return self._applied(vec, lambda covariance, x: covariance.root_solve_transpose(x), inverse=True)

    def multiply(self, vec: PETSc.Vec) -> PETSc.Vec:
        """Return C x."""
        return self._applied(vec, lambda covariance, x: covariance.multiply(x))

    def solve(self, vec: PETSc.Vec) -> PETSc.Vec:
        """Return C^-1 x."""
        return self._applied(vec, lambda covariance, x: covariance.solve(x), inverse=True)

    def _applied(
        self, vec: PETSc.Vec, apply: Callable[[Covariance, torch.Tensor], torch.Tensor], inverse: bool = False
    ) -> PETSc.Vec:
        images = []
        for value, covariance in zip(self.space.unpack(vec), self.covariances, strict=True):
            if covariance is not None:
                images.append(apply(covariance, value))
            else:
                images.append(torch.zeros_like(value) if inverse and self._zero else value)
        return self.space.pack(images)


def check_covariance(covariance: Covariance | None, like: torch.Tensor, name: str) -> None:
    """Raise `ConfigurationError` if a covariance does not take vectors of the shape of `like`. Collective if it is."""
    if covariance is None:
        return
    try:
        shape = tuple(covariance.root_solve(torch.zeros_like(like)).shape)
    except RuntimeError as error:
        raise ConfigurationError(f"{name}: does not take {tuple(like.shape)}: {str(error).splitlines()[0]}") from None
    if shape != tuple(like.shape):
        raise ConfigurationError(
            f"{name}: its shape {shape}: must be {tuple(like.shape)}, or one that broadcasts to it"
        )


def _mixed(seed: int, number: int) -> int:
    return seed if number == 0 else int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint32)[0])


class _Block:
    """The part of the Vec that holds one control, on this rank `local_size` entries of a tensor of `shape`."""

    def __init__(self, kind: Kind, shape: tuple[int, ...], comm: MPI.Comm) -> None:
        self.kind, self.shape, self.comm = kind, shape, comm
        ranges = even_ranges(math.prod(shape), comm.size) if kind == "replicated" else [(0, math.prod(shape))]
        self.own = ranges[comm.rank if kind == "replicated" else 0]
        self.counts = [stop - start for start, stop in ranges]
        self.local_size = self.own[1] - self.own[0]

    def share(self, value: torch.Tensor) -> torch.Tensor:
        """Return this rank's entries of `value`."""
        if tuple(value.shape) != self.shape:
            raise ConfigurationError(f"control: values of shape {tuple(value.shape)}: must be {self.shape}")
        return value.detach().reshape(-1)[slice(*self.own)].double()

    def summed(self, contribution: torch.Tensor | None) -> torch.Tensor:
        """Return this rank's entries of the sum of all ranks' contributions; of a state, those of its own part."""
        if contribution is None:
            contribution = torch.zeros(self.shape, dtype=torch.float64)
        flat = contribution.detach().to("cpu", torch.float64).reshape(-1).contiguous()
        if self.kind != "replicated" or self.comm.size == 1:
            return flat
        part = torch.empty(self.local_size, dtype=torch.float64)
        self.comm.Reduce_scatter(flat.numpy(), part.numpy(), self.counts, MPI.SUM)
        return part

    def whole(self, share: torch.Tensor) -> torch.Tensor:
        """Return the tensor whose entries on this rank are `share`, as a copy."""
        if self.kind != "replicated" or self.comm.size == 1:
            return share.clone().view(self.shape)
        whole = torch.empty(math.prod(self.shape), dtype=torch.float64)
        self.comm.Allgatherv(share.contiguous().numpy(), [whole.numpy(), self.counts])
        return whole.view(self.shape)
