"""A torch.distributed process group that owns an MPI communicator: its agreement, its messages and its end."""

# torch declares every collective twice, with options and without; its dispatcher calls the form with options only.
# mypy: disable-error-code="override"

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial, wraps
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from mpi4py import MPI

from pnode_dist.distributed import agreement
from pnode_dist.distributed.agreement import Agreement, Description
from pnode_dist.distributed.buffers import bytes_of, check_dtypes, check_movable, contiguous
from pnode_dist.distributed.messages import Message
from pnode_dist.distributed.reductions import Reduction

NAME = "mpi4py"
Result = TypeVar("Result")
Method = TypeVar("Method", bound=Callable[..., Any])
_WITHOUT_END = timedelta(days=365)
# The groups that own a communicator, in the order of their creation, which is the same on all their ranks.
_open: list[OwnedGroup] = []


def one_at_a_time(method: Method) -> Method:
    """Make a collective operation wait for those of other threads, such as the saving of a checkpoint."""

    @wraps(method)
    def alone(self: OwnedGroup, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return alone  # type: ignore[return-value]


class OwnedGroup(dist.ProcessGroup):
    """A process group that owns an mpi4py communicator until `free()`, without its collectives.

    A rank that waits for others longer than `timeout` seconds ends the job; None:
    `pnode_dist.distributed.agreement.default_timeout`, 0: never.
    """

    # torch asks the backend of a device for these.
    supports_splitting = supports_coalescing = supports_time_estimate = False

    def __init__(self, comm: MPI.Intracomm, timeout: float | None = None) -> None:
        super().__init__(comm.rank, comm.size)  # type: ignore[call-arg]
        self.comm = comm
        self._agreement = Agreement(comm, timeout, private=comm)
        self._group_name = ""
        self.lock = threading.RLock()
        # MPI reads and writes the memory of messages also when their Work objects are gone.
        self._messages: list[Message] = []
        _open.append(self)

    def leave(self) -> None:
        """Begin no more collective operations. Other ranks that begin one raise `DisagreementError`."""
        if self.comm != MPI.COMM_NULL and self.comm.size > 1:
            self._agreement.leave()

    def agreed(
        self,
        operation: str,
        tensors: Sequence[torch.Tensor],
        prepare: Callable[[], Result],
        root: int | None = None,
        numbers: int | tuple[int, ...] | None = None,
    ) -> Result:
        """Begin a collective operation, the same on all ranks, and return what `prepare` returns.

        `prepare` checks the arguments of this rank. `numbers` are the entries that all ranks must agree on. Raises
        `DisagreementError` on all ranks if they make different calls, and the first error of `prepare` on all ranks.
        """
        result: Any = None
        failure: Exception | None = None
        try:
            check_movable(tensors)
            check_dtypes(tensors)
            result = prepare()
        except (NotImplementedError, TypeError, ValueError) as error:
            failure = error
        if self.comm.size > 1:
            self._agreement.begun += 1
            dtype = tensors[0].dtype if tensors else None
            reduction = result.name if isinstance(result, Reduction) else None
            facts = (operation, numbers, dtype, root, reduction)
            fingerprint = agreement.numbered(agreement.digest(facts), self._agreement.begun)
            describe = partial(self._described, *facts, failure)
            self._agreement.reduced(self.comm, fingerprint, describe, failed=failure is not None)
        if failure is not None:
            raise failure
        return result  # type: ignore[no-any-return]

    def _described(
        self,
        operation: str,
        numbers: int | tuple[int, ...] | None,
        dtype: torch.dtype | None,
        root: int | None,
        reduction: str | None,
        failure: Exception | None,
    ) -> Description:
        facts = {"kind": operation, "numbers": numbers, "dtype": dtype, "root": root, "reduction": reduction}
        known = {name: value for name, value in facts.items() if value is not None}
        return Description(
            f"operation {self._agreement.begun} of a process group",
            known,
            ", ".join(f"{name} {value}" for name, value in known.items()),
            agreement.place_in_program(),
            None if failure is None else (type(failure).__name__, f"{operation}: {failure}"),
        )

    def free(self) -> None:
        """Free the communicator. Collective on the group.

        After a `leave` with which other ranks did not catch up, it ends with the process.
        """
        if self in _open:
            _open.remove(self)
        if self.comm != MPI.COMM_NULL and self._agreement.private is not None:
            self.comm.Free()

    # torch stores a group's name in its C++ backends, which a Python group lacks.
    def _set_group_name(self, name: str) -> None:
        self._group_name = name

    @property
    def group_name(self) -> str:
        return self._group_name

    def getGroupName(self) -> str:
        return self._group_name

    @property
    def _device_types(self) -> list[torch.device]:
        try:
            dist.get_process_group_ranks(self)
        except (KeyError, ValueError):
            # Of a group with devices, torch asks for the C++ backend while it makes the group.
            return []
        return [torch.device("cpu"), torch.device("cuda")]

    def _get_backend(self, device: torch.device) -> OwnedGroup:
        return self

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        return False

    def getBackendName(self) -> str:
        return NAME

    def name(self) -> str:
        return NAME

    def set_timeout(self, timeout: timedelta) -> None:
        self._agreement.timeout = seconds_of(timeout)

    def send(self, tensors: list[torch.Tensor], destination: int, tag: int = 0) -> Any:
        (tensor,) = tensors
        check_movable([tensor])
        values = contiguous(tensor)
        return self._message(
            self.comm.Isend(bytes_of(values), destination, tag), values, None, f"to rank {destination}"
        )

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int = 0) -> Any:
        (tensor,) = tensors
        check_movable([tensor])
        values = contiguous(tensor)
        return self._message(self.comm.Irecv(bytes_of(values), source, tag), values, tensor, f"from {_named(source)}")

    def recv_anysource(self, tensors: list[torch.Tensor], tag: int = 0) -> Any:
        return self.recv(tensors, MPI.ANY_SOURCE, tag)

    def _message(
        self, request: MPI.Request, values: torch.Tensor, target: torch.Tensor | None, direction: str
    ) -> Message:
        place = agreement.place_in_program()
        described = Description(f"a message {direction}", place=place, moment="exchange of")
        message = Message(request, values, target, partial(self._wait, described))
        self._messages = [message, *(other for other in self._messages if not other.Test())]
        return message

    def _wait(self, described: Description, message: Message) -> None:
        # Large messages progress only during tests.
        self._agreement.wait(message, lambda: described, idle=False)


def _named(source: int) -> str:
    return "any rank" if source == MPI.ANY_SOURCE else f"rank {source}"


def timedelta_of(timeout: float) -> timedelta:
    """Return a timeout in torch's form. 0 seconds, which disables it, become the longest one."""
    return timedelta(seconds=timeout) if timeout else _WITHOUT_END


def seconds_of(timeout: timedelta) -> float:
    """The reverse of `timedelta_of`."""
    return 0.0 if timeout >= _WITHOUT_END else timeout.total_seconds()


def free_all() -> None:
    """Free the communicators of all groups, also of those that torch has made. Collective on the world."""
    for group in list(_open):
        group.free()


def forget_all() -> None:
    """Leave the communicators of all groups to the end of the process. Not collective."""
    _open.clear()
