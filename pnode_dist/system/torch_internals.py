"""Private functions of torch: the only module that calls them.

A release of torch may change any of them. The tests compare each one with torch's public interface. A docstring gives
the price of the public function, where there is one: the time of a call with torch 2.13 on one core, as
`python -m timeit -s "import torch" "torch.set_grad_enabled(True)"` prints it. The other functions have no public form
in the supported releases.

Functions that are called at every stage are bound here without a wrapper, because a Python call takes a noticeable part
of a small stage. The module belongs to this low layer because `distributed`, `exchange` and `ode` all import it.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch
from torch import nn
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.utils import unwrap_dead_wrappers as unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Modes of autograd

set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled
"""Set the grad mode, in 0.1 microseconds. The public `torch.set_grad_enabled` takes 0.36, as a context manager 2.

A step makes two calls, and each recorded stage two more.
"""


# The engine


def gradients(
    roots: Sequence[torch.Tensor | GradientEdge],
    inputs: Sequence[torch.Tensor | GradientEdge],
    cotangents: Sequence[torch.Tensor],
    keep_graph: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Do what `torch.autograd.grad` does with `allow_unused=True`, without its checks.

    The checks take 20 microseconds at every stage: 44 instead of 22 for a small layer.
    """
    found: tuple[torch.Tensor | None, ...] = torch.autograd.Variable._execution_engine.run_backward(
        tuple(roots), tuple(cotangents), keep_graph, False, inputs, allow_unreachable=True, accumulate_grad=False
    )
    return found


ENGINE_CALLS: list[CodeType] = [torch.autograd.graph._engine_run_backward.__code__, gradients.__code__]
"""The code of the functions that wait for autograd's engine."""


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call `callback` when the backward pass that is running has ended."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def backward_pass_number() -> int:
    """Return the number of the backward pass that runs in this thread; -1 outside."""
    return int(torch._C._current_graph_task_id())


def owning_root_edge(tensor: torch.Tensor) -> GradientEdge:
    """Return an edge to differentiate from, which keeps the graph of `tensor` alive.

    Does without the field `ownership_token` of the edge. The node of a `torch.autograd.Function` is freed with the last
    tensor or node that leads to it, although Python still holds it. The edge is then that of a view, so that
    nothing can be differentiated with respect to it.
    """
    if isinstance(tensor.grad_fn, torch._C._FunctionBase):
        with torch.enable_grad():
            tensor = tensor.view_as(tensor)
    return get_gradient_edge(tensor)


root_edge: Callable[[torch.Tensor], GradientEdge] = (
    get_gradient_edge if "ownership_token" in GradientEdge._fields else owning_root_edge
)
"""Return an edge to differentiate from, which keeps the graph of a tensor alive. torch 2.6 has no such token."""


# References to tensors and their memory

tensor_references: Callable[[torch.Tensor], int] = torch.Tensor._use_count  # type: ignore[attr-defined]
"""Return the number of references to the C++ tensor."""
storage_pointer: Callable[[torch.UntypedStorage], int] = attrgetter("_cdata")
"""Return a number that identifies a storage, on any device.

The public `data_ptr` is 0 for every storage without memory, and is not the address of the reference count.
"""


def _count_in_memory(pointer: int) -> int:
    """Return the reference count that follows the first pointer of a c10::StorageImpl, as torch 2.6 lays it out."""
    return ctypes.c_uint32.from_address(pointer + ctypes.sizeof(ctypes.c_void_p)).value


def _counts(count: Callable[[int], int]) -> bool:
    """Return True if `count` follows the references to a storage."""
    tensor = torch.empty(1)
    pointer = storage_pointer(tensor.untyped_storage())
    alone = count(pointer)
    views = [tensor.view(1) for _ in range(3)]
    several = count(pointer)
    del views
    return several == alone + 3 and count(pointer) == alone


def _storage_counter() -> Callable[[int], int] | None:
    # Builds of torch 2.6 without CUDA, such as Debian's, lack the function.
    found: Callable[[int], int] = getattr(torch._C, "_storage_Use_Count", _count_in_memory)
    return found if _counts(found) else None


storage_references = _storage_counter()
"""Return the number of references to the storage of this pointer. None if this build of torch does not tell it."""


def add_in_place(targets: list[torch.Tensor], terms: list[torch.Tensor]) -> None:
    """Add each of `terms` to the tensor at its place in `targets`, in one call.

    The public `Tensor.add_` takes 2 microseconds a tensor of 8 x 8: 17 instead of 10 for eight tensors, 50 instead of
    24 for sixteen, as long for three, and 1.5 less for one.
    """
    torch._foreach_add_(targets, terms)


def hooks_of(tensor: torch.Tensor) -> Any:
    """Return the hooks that `Tensor.register_hook` has added; None or empty if there are none."""
    return tensor._backward_hooks


def set_hooks(tensor: torch.Tensor, hooks: Any) -> None:
    """Replace the hooks on a tensor by those that `hooks_of` returned."""
    tensor._backward_hooks = hooks


# Modules and optimisers

BatchNorm = nn.modules.batchnorm._BatchNorm
"""The base class of torch's batch norms. Each public class takes inputs of one number of axes."""
tree_leaves = _pytree.tree_leaves
tree_map_only = _pytree.tree_map_only


def ignore_in_data_parallel(module: nn.Module, names: list[str]) -> None:
    """Make DistributedDataParallel leave out the parameters of these names."""
    ignore = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(module, names)  # type: ignore[no-untyped-call]


def set_step_was_taken(optimiser: torch.optim.Optimizer, taken: bool) -> None:
    """Set the flag by which a learning-rate schedule warns if it is stepped before the optimiser."""
    optimiser._opt_called = taken  # type: ignore[attr-defined]


def work_of(future: torch.futures.Future[Any]) -> Any:
    """Return a `torch.distributed.Work` that is done when `future` is."""
    return _create_work_from_future(future)


def mark_as_not_traced(function: Any, reason: str) -> None:
    """Leave the mark of `torch.compiler.disable` on a function, which loads torch's compiler: 4 seconds at import."""
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = reason


# Transforms of torch.func

under_functorch: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Return True while a transform of `torch.func` is active."""
is_functorch_wrapper: Callable[[torch.Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
is_functorch_batch: Callable[[torch.Tensor], bool] = torch._C._functorch.is_batchedtensor
unwrapped: Callable[[torch.Tensor], torch.Tensor] = torch._C._functorch.get_unwrapped
wrapper_level: Callable[[torch.Tensor], int] = torch._C._functorch.maybe_get_level
current_interpreter: Callable[[], Any] = retrieve_current_functorch_interpreter


def forward_mode_level() -> int:
    """Return the innermost level of forward mode; -1 if it is not active."""
    return forward_ad._current_level


def is_functionalizing() -> bool:
    """Return True under `torch.func.functionalize`."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(interpreter.key() == TransformType.Functionalize for interpreter in stack)


def is_dispatch_tracing() -> bool:
    """Return True while make_fx, torch.export or torch.func.linearize record operations."""
    key = torch._C._TorchDispatchModeKey
    return torch._C._get_dispatch_mode(key.PROXY) is not None or torch._C._get_dispatch_mode(key.FAKE) is not None


# Batches of torch.autograd.grad with is_grads_batched, which are not those of torch.func.vmap

is_legacy_batch: Callable[[torch.Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
add_batch_axis: Callable[[torch.Tensor, int, int], torch.Tensor] = torch._add_batch_dim
remove_batch_axis: Callable[[torch.Tensor, int, int, int], torch.Tensor] = torch._remove_batch_dim


def legacy_batch_level() -> int:
    """Return the number of such batches that are active."""
    level: int = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


# Hooks on saved tensors

saved_tensor_hooks_refusal: Callable[[], str | None] = (
    torch._C._autograd._saved_tensors_hooks_get_disabled_error_message
)
"""Return the reason why hooks on saved tensors are disabled, None if they are allowed."""
allow_saved_tensor_hooks: Callable[[], None] = torch._C._autograd._saved_tensors_hooks_enable
refuse_saved_tensor_hooks: Callable[[str], None] = torch._C._autograd._saved_tensors_hooks_disable
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def is_checkpointing() -> bool:
    """Return True if the innermost hooks on saved tensors are those of `torch.utils.checkpoint`.

    torch 2.6 does not return its hooks. There, return True within non-reentrant checkpointing, also if other hooks were
    set in it.
    """
    if _top_hooks is None:
        return is_called_by_checkpoint()
    hooks = _top_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def is_called_by_checkpoint() -> bool:
    """Return True within a function that non-reentrant `torch.utils.checkpoint` calls, first or again."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return frame.f_code.co_name in ("checkpoint", "recompute_fn")
        frame = frame.f_back
    return False


# The compiler, whose modules take seconds to load


def compiler_is_loaded() -> bool:
    """Return True once other code has loaded torch's compiler."""
    return "torch._dynamo" in sys.modules


def _release() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def configure_compiler() -> None:
    """Set up torch.compile for right-hand sides. Loads torch's compiler."""
    from torch import _dynamo, _functorch

    # Run a piece that cannot be compiled as it is. Calling all of f again would repeat exchanges between ranks.
    _dynamo.config.suppress_errors = True
    # A graph is used twice if products with respect to state and parameters are computed separately.
    _functorch.config.donated_buffer = False


def scan_operator() -> Any:
    """Return torch's scan: a loop in a graph, with the states, the inputs of each turn, and constants as lists."""
    from torch._higher_order_ops.scan import scan_op

    return scan_op


def mark_length_as_dynamic(tensor: torch.Tensor) -> None:
    """Compile for any length, above one, of the tensor's first axis."""
    torch._dynamo.mark_dynamic(tensor, 0)


def traces_inner_derivatives() -> AbstractContextManager[Any]:
    """Return a context in which torch's compiler traces calls of torch.autograd.grad, where it can."""
    from torch import _dynamo

    if not hasattr(_dynamo.config, "trace_autograd_ops"):
        return nullcontext()
    context: AbstractContextManager[Any] = _dynamo.config.patch(trace_autograd_ops=True)
    return context


def backend_of(
    name: str, options: dict[str, Any], decompositions: dict[Any, Callable[..., Any]]
) -> Callable[[Any, Any], Any]:
    """Return a backend of torch.compile. Inductor gets options, and operations to replace by others."""
    from torch._dynamo import lookup_backend

    if name != "inductor":
        found: Callable[[Any, Any], Any] = lookup_backend(name)
        return found
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    own = "".join(inspect.getsource(function) for function in decompositions.values())

    def backend(graph: Any, inputs: Any) -> Any:
        table = _Decompositions(own, {**select_decomp_table(), **decompositions})
        return compile_fx(graph, inputs, decompositions=table, config_patches={**options, **_cache_options(graph)})

    return backend


class _Decompositions(dict[Any, Any]):
    """A table of operations to replace, which inductor's cache compares by the source of `own` entries.

    The functions of the whole table cannot be pickled, and inductor would cache nothing.
    """

    def __init__(self, own: str, table: dict[Any, Any]) -> None:
        super().__init__(table)
        self._own = own

    def __reduce_ex__(self, protocol: Any) -> tuple[type[str], tuple[str]]:
        return str, (self._own,)


def _cache_options(graph: Any) -> dict[str, Any]:
    """Return options by which inductor caches the code of a graph with a scan, for other processes.

    By itself inductor caches no graph with a scan, because it does not compare what is scanned. The key here has that.
    """
    bodies = [module for module in graph.modules() if module is not graph]
    if not bodies or any(True for body in bodies for _ in (*body.parameters(), *body.buffers())):
        return {}
    key = hashlib.sha256("\n".join(body.code for body in bodies).encode()).hexdigest()
    scan = scan_operator()
    return {"unsafe_marked_cacheable_functions": {f"{scan.__module__}.{scan.__name__}": key}}


TRACES_OBJECTS = _release() >= (2, 13)
"""True if code that is traced may pass any object to a function marked by `evaluated_while_tracing`.

torch 2.6 cannot. 2.13 and later releases were tested."""


def evaluated_while_tracing(function: _Function) -> _Function:
    """Mark a function that torch.compile calls instead of tracing it, and whose result is a constant of the code.

    Compiled code is valid for the same objects as arguments. The mark is that of
    `torch.compiler.assume_constant_result`, which would load torch's compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_traced_apart() -> bool:
    """Return True if torch.compile traces a function by itself within a graph, such as a checkpointed one."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return InstructionTranslator.current_tx().output.current_tracer.parent is not None


def functionalization() -> Any | None:
    """Return an object that identifies the graph that AOTAutograd traces; None elsewhere.

    It is the same for the forward and the backward pass of one graph.
    """
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL)


def compiler_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions for code that cannot be compiled in one piece. Loads torch's compiler."""
    from torch._dynamo import exc

    # The error for too many versions of one function is no TorchDynamoException.
    names = ("TorchDynamoException", "FailOnRecompileLimitHit")
    return tuple(getattr(exc, name) for name in names if hasattr(exc, name))


def find_cpp_compiler() -> None:
    """Raise an error if torch's compiler finds no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    get_cpp_compiler()
