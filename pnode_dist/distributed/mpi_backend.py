"""A torch.distributed process group over mpi4py.

torch wheels are built without their own MPI backend. This one runs every collective on the MPI library that PETSc
uses, so gradient sums take the same fabric as halo exchanges and need no sockets of their own. Collectives complete
before they return; their `Work` objects only carry the result. Messages between two ranks complete in `wait`. Before a
collective operation the ranks of the group agree that it is the same on all of them (see
`pnode_dist.distributed.agreement`), and wait for each other no longer than the timeout. A rank with invalid arguments
takes part in the agreement, so that all ranks raise its error. Tensors on a GPU are copied to the host's memory, and
back.
"""

# torch declares every collective twice, with options and without; its dispatcher calls the form with options only.
# mypy: disable-error-code="override"

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI

from pnode_dist.distributed.buffers import bytes_of, contiguous, flat, share_memory, store, store_parts
from pnode_dist.distributed.mpi_group import NAME, OwnedGroup, one_at_a_time, seconds_of
from pnode_dist.distributed.reductions import Reduction, reduction_of
from pnode_dist.system.torch_internals import work_of


class MPIProcessGroup(OwnedGroup):
    """torch.distributed's collectives on an mpi4py communicator, which the group owns until `free()`.

    All methods are collective on the group's communicator, except `send`, `recv` and `recv_anysource`. A rank that
    waits for others longer than `timeout` seconds ends the job; None:
    `pnode_dist.distributed.agreement.default_timeout`, 0: never.
    """

    @one_at_a_time
    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Any:
        operation = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        for tensor in tensors:
            prepare = partial(reduction_of, operation, tensor.dtype)
            reduction = self.agreed("all_reduce", [tensor], prepare, numbers=tensor.numel())
            values = reduction.prepared(tensor)
            self.comm.Allreduce(MPI.IN_PLACE, values.numpy(), reduction.operation)
            store(tensor, reduction.finished(values, self.comm.size))
        return _completed(tensors)

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any = None) -> Any:
        return self.allreduce(tensors, opts)

    @one_at_a_time
    def reduce(self, tensors: list[torch.Tensor], opts: Any) -> Any:
        root = opts.rootRank
        for tensor in tensors:
            prepare = partial(reduction_of, opts.reduceOp, tensor.dtype)
            reduction = self.agreed("reduce", [tensor], prepare, root, tensor.numel())
            values = reduction.prepared(tensor)
            if self.comm.rank == root:
                self.comm.Reduce(MPI.IN_PLACE, values.numpy(), reduction.operation, root)
                store(tensor, reduction.finished(values, self.comm.size))
            else:
                self.comm.Reduce(values.numpy(), None, reduction.operation, root)
        return _completed(tensors)

    @one_at_a_time
    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> Any:
        for tensor in tensors:
            self.agreed("broadcast", [tensor], lambda: None, opts.rootRank, tensor.numel())
            values = contiguous(tensor)
            self.comm.Bcast(bytes_of(values), opts.rootRank)
            store(tensor, values)
        return _completed(tensors)

    @one_at_a_time
    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None) -> Any:
        for parts, tensor in zip(outputs, inputs, strict=True):
            sizes = tuple(part.numel() for part in parts)
            prepare = partial(self._check_parts, "outputs", sizes, "input", tensor.numel())
            self.agreed("all_gather", [tensor, *parts], prepare, numbers=_as_one(sizes))
            gathered = torch.empty(sum(sizes), dtype=tensor.dtype)
            counts = [size * tensor.element_size() for size in sizes]
            self.comm.Allgatherv(bytes_of(contiguous(tensor)), (bytes_of(gathered), counts))
            store_parts(parts, gathered)
        return _completed(outputs)

    def allgather_coalesced(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None
    ) -> Any:
        # One list for each rank, with one output for each input.
        return self.allgather([list(parts) for parts in zip(*outputs, strict=True)], inputs, opts)

    @one_at_a_time
    def all_gather_single(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None) -> Any:
        prepare = partial(self._check_whole, "output", output.numel(), "input", tensor.numel())
        self.agreed("all_gather", [tensor, output], prepare, numbers=tensor.numel())
        gathered, values = contiguous(output), contiguous(tensor)
        own = gathered.view(-1)[self.comm.rank * values.numel() :]
        source: Any = bytes_of(values)
        if values.numel() and values.data_ptr() == own.data_ptr():
            # The part of this rank is where it belongs, as torch's FSDP places it.
            source = MPI.IN_PLACE
        elif share_memory(values, gathered):
            source = source.copy()
        self.comm.Allgather(source, bytes_of(gathered))
        store(output, gathered)
        return _completed([output])

    def all_gather_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> Any:
        for output, tensor in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, tensor, opts)
        return _completed(outputs)

    @one_at_a_time
    def gather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any) -> Any:
        (tensor,), root = inputs, opts.rootRank
        parts = outputs[0] if self.comm.rank == root else []
        prepare = partial(self._check_equal, "outputs", parts, tensor)
        self.agreed("gather", [tensor, *parts], prepare, root, tensor.numel())
        gathered = torch.empty(len(parts) * tensor.numel(), dtype=tensor.dtype)
        at_root = bytes_of(gathered) if self.comm.rank == root else None
        self.comm.Gather(bytes_of(contiguous(tensor)), at_root, root)
        store_parts(parts, gathered)
        return _completed(outputs)

    @one_at_a_time
    def scatter(self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any) -> Any:
        (tensor,), root = outputs, opts.rootRank
        parts = inputs[0] if self.comm.rank == root else []
        prepare = partial(self._check_equal, "inputs", parts, tensor)
        self.agreed("scatter", [tensor, *parts], prepare, root, tensor.numel())
        values = contiguous(tensor)
        at_root = bytes_of(flat(parts)) if self.comm.rank == root else None
        self.comm.Scatter(at_root, bytes_of(values), root)
        store(tensor, values)
        return _completed(outputs)

    @one_at_a_time
    def reduce_scatter(self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any) -> Any:
        for output, parts in zip(outputs, inputs, strict=True):
            sizes = tuple(part.numel() for part in parts)
            self._reduce_scatter(output, sizes, parts, opts.reduceOp, partial(flat, parts))
        return _completed(outputs)

    @one_at_a_time
    def reduce_scatter_single(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any) -> Any:
        sizes = (tensor.numel() // self.comm.size,) * self.comm.size
        if sum(sizes) != tensor.numel():
            # Refused on all ranks, because no output has this size.
            sizes = (tensor.numel(),)
        self._reduce_scatter(output, sizes, [tensor], opts.reduceOp, partial(contiguous, tensor))
        return _completed([output])

    def reduce_scatter_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any
    ) -> Any:
        for output, tensor in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, tensor, opts)
        return _completed(outputs)

    def _reduce_scatter(
        self,
        output: torch.Tensor,
        sizes: tuple[int, ...],
        inputs: Sequence[torch.Tensor],
        operation: Any,
        terms: Callable[[], torch.Tensor],
    ) -> None:
        def prepare() -> Reduction:
            self._check_parts("inputs", sizes, "output", output.numel())
            return reduction_of(operation, output.dtype)

        reduction = self.agreed("reduce_scatter", [output, *inputs], prepare, numbers=_as_one(sizes))
        values = reduction.prepared(terms())
        total = torch.empty(output.shape, dtype=values.dtype)
        self.comm.Reduce_scatter(values.numpy(), total.numpy(), sizes, reduction.operation)
        store(output, reduction.finished(total, self.comm.size))

    @one_at_a_time
    def alltoall(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None) -> Any:
        sent, received = ([part.numel() for part in parts] for parts in (inputs, outputs))
        self._agree_on_exchange([*outputs, *inputs], lambda: (sent, received))
        values = torch.empty(sum(received), dtype=outputs[0].dtype)
        self._exchange(values, received, flat(inputs), sent)
        store_parts(outputs, values)
        return _completed(outputs)

    @one_at_a_time
    def all_to_all_single(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        opts: Any = None,
    ) -> Any:
        def splits() -> tuple[list[int], list[int]]:
            return self._entries("input", tensor, input_splits), self._entries("output", output, output_splits)

        sent, received = self._agree_on_exchange([output, tensor], splits)
        values, given = contiguous(output), contiguous(tensor)
        self._exchange(values, received, given.clone() if share_memory(values, given) else given, sent)
        store(output, values)
        return _completed([output])

    # The names in older releases of torch.
    _allgather_base = all_gather_single  # type: ignore[assignment]
    allgather_into_tensor_coalesced = all_gather_single_coalesced  # type: ignore[assignment]
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # type: ignore[assignment]
    alltoall_base = all_to_all_single  # type: ignore[assignment]

    def _agree_on_exchange(
        self, tensors: Sequence[torch.Tensor], splits: Callable[[], tuple[list[int], list[int]]]
    ) -> tuple[list[int], list[int]]:
        """Return the entries sent to and received from each rank, after a check that they fit those of the others."""

        def prepare() -> tuple[list[int], list[int]]:
            sent, received = splits()
            if len(sent) != self.comm.size or len(received) != self.comm.size:
                raise ValueError(f"{len(sent)} inputs and {len(received)} outputs on {self.comm.size} ranks")
            return sent, received

        sent, received = self.agreed("all_to_all", tensors, prepare)
        offered = np.empty(self.comm.size, dtype=np.int64)
        self.comm.Alltoall(np.array(sent, dtype=np.int64), offered)

        def check() -> None:
            if offered.tolist() != received:
                raise ValueError(f"outputs have {received} entries, and the ranks send {offered.tolist()}")

        self.agreed("all_to_all", [], check)
        return sent, received

    def _exchange(self, output: torch.Tensor, received: list[int], tensor: torch.Tensor, sent: list[int]) -> None:
        size = tensor.element_size()
        self.comm.Alltoallv(
            (bytes_of(tensor), [count * size for count in sent]),
            (bytes_of(output), [count * size for count in received]),
        )

    def _entries(self, name: str, tensor: torch.Tensor, splits: Sequence[int]) -> list[int]:
        """Return the entries of each part of a tensor that is split along its first axis, evenly without `splits`."""
        rows = tensor.shape[0] if tensor.dim() else 0
        if not splits and rows % self.comm.size:
            raise ValueError(f"{name} has {rows} rows, which {self.comm.size} ranks do not divide")
        if splits and sum(splits) != rows:
            raise ValueError(f"{name} has {rows} rows, and its splits {list(splits)} have {sum(splits)}")
        row = tensor[0].numel() if rows else 0
        return [count * row for count in splits or [rows // self.comm.size] * self.comm.size]

    def _check_parts(self, of: str, sizes: tuple[int, ...], name: str, own: int) -> None:
        if len(sizes) != self.comm.size or sizes[self.comm.rank] != own:
            raise ValueError(f"{of} have {list(sizes)} entries, and {name} {own}, on {self.comm.size} rank(s)")

    def _check_whole(self, whole: str, entries: int, name: str, own: int) -> None:
        if entries != own * self.comm.size:
            raise ValueError(f"{whole} has {entries} entries, and {name} {own}, on {self.comm.size} rank(s)")

    def _check_equal(self, of: str, parts: Sequence[torch.Tensor], tensor: torch.Tensor) -> None:
        sizes = [part.numel() for part in parts]
        if parts and sizes != [tensor.numel()] * self.comm.size:
            raise ValueError(f"{of} have {sizes} entries: must be {tensor.numel()} for each of {self.comm.size} ranks")

    @one_at_a_time
    def barrier(self, opts: Any = None) -> Any:
        self.agreed("barrier", [], lambda: None)
        return _completed([])


def _completed(result: Any) -> Any:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(result)
    return work_of(future)


def _as_one(sizes: tuple[int, ...]) -> int | tuple[int, ...]:
    """Return the size of equal parts, or all sizes."""
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _create(options: Any, backend_options: Any = None) -> MPIProcessGroup:
    ranks: list[int] = list(options.global_ranks_in_group)
    world = MPI.COMM_WORLD
    timeout = seconds_of(options.timeout)
    if not ranks:
        return MPIProcessGroup(world.Dup(), timeout)
    return MPIProcessGroup(world.Create_group(world.group.Incl(ranks)), timeout)


def register() -> None:
    """Register the backend with torch.distributed under the name `mpi4py`. A second call does nothing."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu", "cuda"])
