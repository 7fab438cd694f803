"""The process mesh: the MPI world as state ranks x data replicas, with torch.distributed on top.

The state ranks of one replica have consecutive numbers. They exchange halos in every stage of a step, and are on the
same node if the launcher fills nodes in order.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh

from pnode_dist.distributed import agreement, mpi_group
from pnode_dist.distributed import mpi_backend as mpi_backend
from pnode_dist.distributed.launcher import hide_from_children, singleton_problem
from pnode_dist.errors import ConfigurationError
from pnode_dist.system.abort import abort
from pnode_dist.system.compatibility import check_mpi

Extent = Literal["world", "state", "data"]
BACKENDS = ("mpi", "gloo", "nccl")
if MPI.Is_initialized():
    hide_from_children()


@dataclass(frozen=True)
class _World:
    """The rank of this process among all, and the launcher: MPI, or torchrun without MPI."""

    rank: int
    size: int
    connected_by_mpi: bool


def _find_world() -> _World:
    comm = MPI.COMM_WORLD
    torchrun_size = int(os.environ.get("WORLD_SIZE", "1"))
    if comm.size > 1:
        if "TORCHELASTIC_RUN_ID" in os.environ and torchrun_size != comm.size:
            raise ConfigurationError(
                f"torchrun set WORLD_SIZE={torchrun_size} but MPI connects {comm.size} ranks: use one launcher"
            )
        return _World(comm.rank, comm.size, connected_by_mpi=True)
    if torchrun_size > 1 and "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        return _World(int(os.environ["RANK"]), torchrun_size, connected_by_mpi=False)
    problem = singleton_problem(MPI.get_vendor()[0])
    if problem:
        raise ConfigurationError(problem)
    return _World(0, 1, connected_by_mpi=True)


def _split(size: int, state: int | None, data: int) -> tuple[int, int]:
    if data < 1 or (state is not None and state < 1):
        raise ConfigurationError(f"mesh: state = {state}, data = {data}: both must be at least 1")
    if state is None:
        if size % data:
            raise ConfigurationError(f"mesh: data = {data} does not divide the {size} ranks that were started")
        state = size // data
    if state * data != size:
        raise ConfigurationError(
            f"mesh: state = {state} times data = {data} is {state * data}, but {size} rank(s) were started"
        )
    return state, data


class _TorchDistributed:
    """The default process group, shared by the meshes that are open at the same time."""

    def __init__(self) -> None:
        self.open_meshes = 0
        self.backend: str | None = None

    def acquire(self, world: _World, backend: str, timeout: timedelta) -> None:
        if not dist.is_initialized():
            mpi_backend.register()
            torch_backend = mpi_group.NAME if backend == "mpi" else backend
            store = HashStore() if backend == "mpi" else _rendezvous(world, timeout)
            dist.init_process_group(torch_backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
            self.backend = backend
        elif self.backend is None:
            if (dist.get_rank(), dist.get_world_size()) != (world.rank, world.size):
                raise ConfigurationError(
                    f"torch.distributed is already initialised as rank {dist.get_rank()} of {dist.get_world_size()}, "
                    f"but this is rank {world.rank} of {world.size}"
                )
        elif self.backend != backend:
            raise ConfigurationError(
                f"mesh: backend = {backend!r}, but another Mesh with {self.backend!r} is open: close it first"
            )
        self.open_meshes += 1

    def release(self, free: bool) -> None:
        self.open_meshes -= 1
        if self.open_meshes == 0 and self.backend is not None:
            # Also the groups that a user of torch has made: MPI has about two thousand communicators to give.
            if free:
                mpi_group.free_all()
            else:
                mpi_group.forget_all()
            dist.destroy_process_group()
            self.backend = None


_torch_distributed = _TorchDistributed()


def _rendezvous(world: _World, timeout: timedelta) -> Store:
    """Return the store of torch.distributed: at MASTER_ADDR if set, else at an address of rank 0's.

    No store uses libuv: its server takes no listening socket in torch 2.6, and Debian builds torch without it.
    """
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # Under torchrun the agent may serve this address already.
        serve = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        return TCPStore(host, port, world.size, is_master=serve, timeout=timeout, use_libuv=False)
    if world.size == 1:
        return HashStore()
    comm = MPI.COMM_WORLD
    one_node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    local = one_node.size == comm.size
    one_node.Free()
    store = None
    address: tuple[str, int] | str = ""
    if comm.rank == 0:
        address = host = "127.0.0.1" if local else socket.gethostname()
        # By default the store would listen on every network interface of the machine.
        with suppress(OSError):
            listener = socket.create_server((host, 0))
            address = (host, listener.getsockname()[1])
            store = TCPStore(
                *address,
                world.size,
                is_master=True,
                timeout=timeout,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
                use_libuv=False,
            )
    address = comm.bcast(address, root=0)
    if isinstance(address, str):
        raise ConfigurationError(
            f"mesh: rank 0 cannot listen at {address}, its host: set MASTER_ADDR and MASTER_PORT, or use backend mpi"
        )
    if store is None:
        store = TCPStore(*address, world.size, timeout=timeout, wait_for_workers=False, use_libuv=False)
    return store


def _limit_threads(world: _World) -> None:
    if "OMP_NUM_THREADS" not in os.environ and world.size > 1:
        torch.set_num_threads(1)


class Mesh:
    """The ranks of this job as `state` x `data`. Collective on the MPI world.

    Each of the `data` replicas holds one copy of the state, spread over `state` ranks. `state=None` is the number of
    all ranks divided by `data`. `backend` is that of torch.distributed: `mpi` (mpi4py, the default), `gloo` or `nccl`.
    The ranks of gloo and nccl connect through MPI, or at MASTER_ADDR and MASTER_PORT if these are set. Under torchrun
    without MPI only data replicas are possible: `Mesh(state=1, data=WORLD_SIZE, backend="gloo")`.

    Use the mesh as a context manager, or call `close()`. While a mesh of several ranks is open, an uncaught exception
    prints its traceback with the rank's number, and ends all ranks with exit code 1.

    `timeout` limits the seconds that a rank waits for others, at the beginning of a solve or of its backward pass, and
    in torch.distributed. After that the job ends with a line that names the place in the program, and with exit code 70
    for the backend `mpi`. 0 disables the limit. None is PNODE_DIST_TIMEOUT in the environment, or ten minutes.

    Raises `ConfigurationError` if `state * data` is not the number of ranks, for an unknown backend, and for a timeout
    that is not a number of seconds.
    """

    def __init__(
        self,
        state: int | None = None,
        data: int = 1,
        *,
        backend: str | None = None,
        timeout: float | None = None,
    ) -> None:
        check_mpi()
        world = _find_world()
        backend = backend or "mpi"
        if backend not in BACKENDS:
            raise ConfigurationError(f"mesh: backend = {backend!r}: must be one of {', '.join(BACKENDS)}")
        self.timeout = agreement.default_timeout() if timeout is None else agreement.checked_timeout(timeout, "timeout")
        self.state_ranks, self.data_replicas = _split(world.size, state, data)
        if not world.connected_by_mpi and (self.state_ranks > 1 or backend == "mpi"):
            raise ConfigurationError(
                f"torchrun started {world.size} processes that MPI does not connect: start with launch/mpirun.sh, "
                f"or use Mesh(state=1, data={world.size}, backend='gloo')"
            )
        self.rank, self.size, self.backend = world.rank, world.size, backend
        self.state_rank = world.rank % self.state_ranks
        self.replica = world.rank // self.state_ranks
        _limit_threads(world)
        uncaught = sys.excepthook
        _torch_distributed.acquire(world, backend, mpi_group.timedelta_of(self.timeout))
        # Install this hook after torch.distributed, whose own hook would lose the message.
        self._remove_abort = _install_abort(world, uncaught) if world.size > 1 else _restoring(uncaught)
        source = MPI.COMM_WORLD if world.connected_by_mpi else MPI.COMM_SELF
        self.state_comm = source.Split(self.replica if world.connected_by_mpi else 0, world.rank)
        agreement.join(self.state_comm, self.timeout)
        self.world_group = self._new_group([list(range(world.size))])
        self.state_group = self._new_group(
            [[replica * self.state_ranks + s for s in range(self.state_ranks)] for replica in range(self.data_replicas)]
        )
        self.data_group = self._new_group(
            [[replica * self.state_ranks + s for replica in range(self.data_replicas)] for s in range(self.state_ranks)]
        )
        self._closed = False

    def _new_group(self, members: list[list[int]]) -> dist.ProcessGroup:
        torch_backend = mpi_group.NAME if self.backend == "mpi" else self.backend
        group: dist.ProcessGroup
        group, _ = dist.new_subgroups_by_enumeration(  # type: ignore[no-untyped-call]
            members, timeout=mpi_group.timedelta_of(self.timeout), backend=torch_backend
        )
        return group

    @cached_property
    def device_mesh(self) -> DeviceMesh:
        """The mesh as torch's DeviceMesh, with the dimensions `replica` and `state`. Not collective.

        Its groups are those of this mesh, so that torch's DTensor, `fully_shard` and distributed checkpoints take
        `mesh.device_mesh`, or `mesh.device_mesh["state"]` and `mesh.device_mesh["replica"]`. Its device type is `cpu`,
        or `cuda` with the backend nccl. Raises `ConfigurationError` if the mesh is closed.
        """
        if self._closed:
            raise ConfigurationError("mesh: a closed mesh has no device_mesh")
        return DeviceMesh.from_group(
            [self.data_group, self.state_group],
            "cuda" if self.backend == "nccl" else "cpu",
            torch.arange(self.size).view(self.data_replicas, self.state_ranks),
            mesh_dim_names=("replica", "state"),
        )

    @property
    def is_root(self) -> bool:
        """True on rank 0 of the world, which prints and writes common files."""
        return self.rank == 0

    def _group(self, over: Extent) -> dist.ProcessGroup:
        return {"world": self.world_group, "state": self.state_group, "data": self.data_group}[over]

    def sum(self, value: torch.Tensor, over: Extent = "world") -> torch.Tensor:
        """Return the sum of `value` over ranks, as a new tensor outside the autograd graph. Collective on `over`."""
        return self._reduced(value, dist.ReduceOp.SUM, over)

    def max(self, value: torch.Tensor, over: Extent = "world") -> torch.Tensor:
        """Return the elementwise maximum over ranks, as a new tensor without a graph. Collective on `over`."""
        return self._reduced(value, dist.ReduceOp.MAX, over)

    def _reduced(self, value: torch.Tensor, operation: Any, over: Extent) -> torch.Tensor:
        result = value.detach().clone()
        dist.all_reduce(result, operation, group=self._group(over))
        return result

    def broadcast_object(self, value: Any, source: int | None = None, over: Extent = "world") -> Any:
        """Send a picklable Python object to every rank of `over`. Collective on `over`.

        `source` is the number in the world of the rank that sends, by default the lowest one of `over`.
        """
        group = self._group(over)
        sender = dist.get_global_rank(group, 0) if source is None else source
        box = [value if self.rank == sender else None]
        dist.broadcast_object_list(box, src=sender, group=group)
        return box[0]

    def gather_object(self, value: Any) -> list[Any] | None:
        """Return every rank's picklable Python object, by rank, on rank 0; None elsewhere. Collective on the world."""
        gathered: list[Any] | None = [None] * self.size if self.is_root else None
        dist.gather_object(value, gathered, dst=0, group=self.world_group)
        return gathered

    def barrier(self) -> None:
        """Wait for all ranks. Collective on the world."""
        dist.barrier(group=self.world_group)

    def close(self) -> None:
        """Free the process groups and communicators. Collective on the world. A second call does nothing.

        Ranks that begin a solve or a backward pass instead raise `DisagreementError`.
        """
        if not self._closed:
            self._release(free=True)
            self.state_comm.Free()
            self._remove_abort()

    def _release(self, free: bool) -> None:
        """Leave torch.distributed. With `free`, also free the communicators of the groups, which is collective."""
        self._closed = True
        if free:
            # Not after an error on this rank: it ends the other ranks, and their messages would come before its own.
            agreement.of(self.state_comm).leave()
        for group in (self.data_group, self.state_group, self.world_group):
            if free and isinstance(group, mpi_backend.MPIProcessGroup):
                group.leave()
                group.free()
            dist.destroy_process_group(group)
        _torch_distributed.release(free)

    def __enter__(self) -> Mesh:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or self.size == 1:
            self.close()
            return
        if not self._closed:
            # The other ranks may not close the mesh. Communicators, which only all ranks can free, end with the
            # process.
            self._release(free=False)
        if isinstance(error, SystemExit) and error.code not in (0, None):
            # The other ranks may be waiting for this one, and the interpreter's exit would wait for them: a deadlock.
            if not isinstance(error.code, int):
                print(error.code, file=sys.stderr)
            abort(error.code if isinstance(error.code, int) else 1, MPI.COMM_WORLD)

    def __repr__(self) -> str:
        return f"Mesh(state={self.state_ranks}, data={self.data_replicas}, backend={self.backend!r}, rank={self.rank})"


def _restoring(previous: Callable[..., None]) -> Callable[[], None]:
    """Return a function that replaces the present hook for uncaught exceptions by `previous`."""
    installed = sys.excepthook

    def restore() -> None:
        if sys.excepthook is installed:
            sys.excepthook = previous

    return restore


def _install_abort(world: _World, previous: Callable[..., None]) -> Callable[[], None]:
    """End all ranks after an uncaught exception in any thread. Returns a function that restores `previous`."""
    previous_thread = threading.excepthook

    def end_all(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        host = socket.gethostname()
        sys.stdout.flush()
        sys.stderr.write("".join(f"[rank {world.rank} on {host}] {line}\n" for line in text.splitlines()))
        abort(1, MPI.COMM_WORLD if world.connected_by_mpi else None)

    def end_all_from_thread(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_type is not SystemExit:
            end_all(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)

    sys.excepthook, threading.excepthook = end_all, end_all_from_thread
    restore_main = _restoring(previous)

    def restore() -> None:
        restore_main()
        if threading.excepthook is end_all_from_thread:
            threading.excepthook = previous_thread

    return restore
