"""A torch.distributed process group over mpi4py.

torch wheels are built without their own MPI backend. This one runs every collective on the MPI library that PETSc
uses, so gradient sums take the same fabric as halo exchanges and need no sockets of their own. Operations complete
before they return; the `Work` objects only carry the result. Before a collective operation the ranks of the group agree
that it is the same on all of them (see `pnode_dist.distributed.agreement`), and wait for each other no longer than the
timeout.
"""

# torch declares every collective twice, with options and without; its dispatcher calls the form with options only.
# mypy: disable-error-code="override"

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI

from pnode_dist.distributed import agreement
from pnode_dist.distributed.agreement import Agreement, Description
from pnode_dist.distributed.buffers import bytes_of
from pnode_dist.system.torch_internals import work_of

NAME = "mpi4py"

_OPERATIONS = (
    (dist.ReduceOp.SUM, MPI.SUM),
    (dist.ReduceOp.AVG, MPI.SUM),
    (dist.ReduceOp.PRODUCT, MPI.PROD),
    (dist.ReduceOp.MIN, MPI.MIN),
    (dist.ReduceOp.MAX, MPI.MAX),
    (dist.ReduceOp.BAND, MPI.BAND),
    (dist.ReduceOp.BOR, MPI.BOR),
    (dist.ReduceOp.BXOR, MPI.BXOR),
)
_HALF_TYPES = (torch.float16, torch.bfloat16)


def _mpi_operation(operation: Any) -> MPI.Op:
    for torch_operation, mpi_operation in _OPERATIONS:
        if operation == torch_operation:
            return mpi_operation
    raise NotImplementedError(f"the mpi backend does not reduce with {operation}")


def _completed(result: Any) -> Any:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(result)
    return work_of(future)


@contextmanager
def _contiguous(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a contiguous tensor for `tensor`, and copy it back on exit if it is a copy."""
    if tensor.device.type != "cpu":
        raise NotImplementedError(f"the mpi backend moves CPU tensors, got one on {tensor.device}")
    work = tensor.detach().contiguous()
    yield work
    if work.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(work)


@contextmanager
def _reducible(tensor: torch.Tensor) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the tensor as an array of a type that MPI can reduce: float32 for 16-bit floats, bytes for booleans."""
    with _contiguous(tensor) as work:
        if work.dtype in _HALF_TYPES:
            wide = work.float()
            yield wide.numpy()
            work.copy_(wide)
        elif work.dtype == torch.bool:
            yield work.view(torch.uint8).numpy()
        else:
            yield work.numpy()


class _Arrival:
    """The arrival of a message, as a request for `Agreement.wait`."""

    def __init__(self, comm: MPI.Intracomm, source: int, tag: int) -> None:
        self._probe = partial(comm.Improbe, source, tag)
        self._message: MPI.Message | None = None

    def Test(self) -> bool:
        """Return True if the message has arrived."""
        self._message = self._message or self._probe()
        return self._message is not None

    def receive(self, buffer: Any) -> None:
        """Receive the message after its arrival."""
        assert self._message is not None
        self._message.Recv(buffer)


class MPIProcessGroup(dist.ProcessGroup):
    """torch.distributed's collectives on an mpi4py communicator, which the group owns until `free()`.

    All methods are collective on the group's communicator, except `send` and `recv`. A rank that waits for others
    longer than `timeout` seconds ends the job; None: `pnode_dist.distributed.agreement.default_timeout`, 0: never.
    """

    def __init__(self, comm: MPI.Intracomm, timeout: float | None = None) -> None:
        super().__init__(comm.rank, comm.size)  # type: ignore[call-arg]
        self._comm = comm
        self._agreement = Agreement(comm, timeout, private=comm)
        self._group_name = ""

    def leave(self) -> None:
        """Begin no more collective operations. Other ranks that begin one raise `DisagreementError`."""
        if self._comm != MPI.COMM_NULL and self._comm.size > 1:
            self._agreement.leave()

    def _begin(self, operation: str, tensor: torch.Tensor | None = None, root: int | None = None) -> None:
        """Begin a collective operation, the same on all ranks. Raises `DisagreementError` on all of them otherwise."""
        if self._comm.size == 1:
            return
        self._agreement.begun += 1
        kind = (operation, None if tensor is None else tensor.numel(), None if tensor is None else tensor.dtype, root)
        fingerprint = agreement.numbered(agreement.digest(kind), self._agreement.begun)
        self._agreement.reduced(self._comm, fingerprint, lambda: self._described(*kind))

    def _described(
        self, operation: str, numbers: int | None, dtype: torch.dtype | None, root: int | None
    ) -> Description:
        facts = {"kind": operation, "numbers": numbers, "dtype": dtype, "root": root}
        known = {name: value for name, value in facts.items() if value is not None}
        return Description(
            f"operation {self._agreement.begun} of a process group",
            known,
            ", ".join(f"{name} {value}" for name, value in known.items()),
            agreement.place_in_program(),
        )

    def free(self) -> None:
        """Free the communicator. Collective on the group."""
        if self._comm != MPI.COMM_NULL:
            self._comm.Free()

    # torch stores a group's name in its C++ backends, which a Python group lacks.
    def _set_group_name(self, name: str) -> None:
        self._group_name = name

    @property
    def group_name(self) -> str:
        return self._group_name

    def getBackendName(self) -> str:
        return NAME

    def name(self) -> str:
        return NAME

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Any:
        operation = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        for tensor in tensors:
            self._begin("all_reduce", tensor)
            with _reducible(tensor) as buffer:
                self._comm.Allreduce(MPI.IN_PLACE, buffer, _mpi_operation(operation))
            if operation == dist.ReduceOp.AVG:
                tensor.detach().div_(self._comm.size)
        return _completed(tensors)

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any = None) -> Any:
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: list[torch.Tensor], opts: Any) -> Any:
        for tensor in tensors:
            self._begin("reduce", tensor, opts.rootRank)
            with _reducible(tensor) as buffer:
                operation = _mpi_operation(opts.reduceOp)
                if self._comm.rank == opts.rootRank:
                    self._comm.Reduce(MPI.IN_PLACE, buffer, operation, opts.rootRank)
                else:
                    self._comm.Reduce(buffer, None, operation, opts.rootRank)
            if opts.reduceOp == dist.ReduceOp.AVG and self._comm.rank == opts.rootRank:
                tensor.detach().div_(self._comm.size)
        return _completed(tensors)

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> Any:
        for tensor in tensors:
            self._begin("broadcast", tensor, opts.rootRank)
            with _contiguous(tensor) as work:
                self._comm.Bcast(bytes_of(work), opts.rootRank)
        return _completed(tensors)

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None) -> Any:
        for parts, tensor in zip(outputs, inputs, strict=True):
            self._begin("all_gather", tensor)
            gathered = torch.empty((self._comm.size, *tensor.shape), dtype=tensor.dtype)
            with _contiguous(tensor) as work:
                self._comm.Allgather(bytes_of(work), bytes_of(gathered))
            for part, value in zip(parts, gathered, strict=True):
                part.detach().copy_(value)
        return _completed(outputs)

    def _allgather_base(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None) -> Any:
        self._begin("all_gather", tensor)
        with _contiguous(output) as work, _contiguous(tensor) as source:
            self._comm.Allgather(bytes_of(source), bytes_of(work))
        return _completed([output])

    def all_gather_single(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None) -> Any:
        return self._allgather_base(output, tensor, opts)

    def gather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any) -> Any:
        (tensor,) = inputs
        self._begin("gather", tensor, opts.rootRank)
        at_root = self._comm.rank == opts.rootRank
        gathered = torch.empty((self._comm.size, *tensor.shape), dtype=tensor.dtype) if at_root else None
        with _contiguous(tensor) as work:
            self._comm.Gather(bytes_of(work), bytes_of(gathered) if gathered is not None else None, opts.rootRank)
        if gathered is not None:
            for part, value in zip(outputs[0], gathered, strict=True):
                part.detach().copy_(value)
        return _completed(outputs)

    def scatter(self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any) -> Any:
        (tensor,) = outputs
        self._begin("scatter", tensor, opts.rootRank)
        at_root = self._comm.rank == opts.rootRank
        parts = torch.stack([part.detach() for part in inputs[0]]) if at_root else None
        with _contiguous(tensor) as work:
            self._comm.Scatter(bytes_of(parts) if parts is not None else None, bytes_of(work), opts.rootRank)
        return _completed(outputs)

    def reduce_scatter(self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any) -> Any:
        (tensor,) = outputs
        total = torch.stack([part.detach() for part in inputs[0]])
        self.allreduce([total], opts)
        tensor.detach().copy_(total[self._comm.rank])
        return _completed(outputs)

    def _reduce_scatter_base(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any) -> Any:
        parts = list(tensor.detach().reshape(self._comm.size, *output.shape))
        return self.reduce_scatter([output], [parts], opts)

    def reduce_scatter_single(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any) -> Any:
        return self._reduce_scatter_base(output, tensor, opts)

    def alltoall(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None) -> Any:
        self._begin("all_to_all")
        requests = []
        received = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in outputs]
        sent = [part.detach().contiguous() for part in inputs]
        for rank in range(self._comm.size):
            requests.append(self._comm.Irecv(bytes_of(received[rank]), rank))
            requests.append(self._comm.Isend(bytes_of(sent[rank]), rank))
        MPI.Request.Waitall(requests)
        for part, value in zip(outputs, received, strict=True):
            part.detach().copy_(value)
        return _completed(outputs)

    def send(self, tensors: list[torch.Tensor], destination: int, tag: int = 0) -> Any:
        for tensor in tensors:
            with _contiguous(tensor) as work:
                request = self._comm.Isend(bytes_of(work), destination, tag)
                self._agreement.wait(request, lambda: self._message("to", destination), idle=False)
        return _completed(tensors)

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int = 0) -> Any:
        for tensor in tensors:
            arrival = _Arrival(self._comm, source, tag)
            self._agreement.wait(arrival, lambda: self._message("from", source))
            with _contiguous(tensor) as work:
                arrival.receive(bytes_of(work))
        return _completed(tensors)

    def _message(self, direction: str, other: int) -> Description:
        return Description(
            f"a message {direction} rank {other}", place=agreement.place_in_program(), moment="exchange of"
        )

    def barrier(self, opts: Any = None) -> Any:
        self._begin("barrier")
        if self._comm.size == 1:
            return _completed([])
        return _completed([])


def _create(options: Any, backend_options: Any = None) -> MPIProcessGroup:
    ranks: list[int] = list(options.global_ranks_in_group)
    world = MPI.COMM_WORLD
    timeout = seconds_of(options.timeout)
    if not ranks:
        return MPIProcessGroup(world.Dup(), timeout)
    return MPIProcessGroup(world.Create_group(world.group.Incl(ranks)), timeout)


_WITHOUT_END = timedelta(days=365)


def timedelta_of(timeout: float) -> timedelta:
    """Return a timeout in torch's form. 0 seconds, which disables it, become the longest one."""
    return timedelta(seconds=timeout) if timeout else _WITHOUT_END


def seconds_of(timeout: timedelta) -> float:
    """The reverse of `timedelta_of`."""
    return 0.0 if timeout >= _WITHOUT_END else timeout.total_seconds()


def register() -> None:
    """Register the backend with torch.distributed under the name `mpi4py`. A second call does nothing."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu"])
