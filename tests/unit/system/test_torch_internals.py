"""Torch's private functions do what its public interface or its manual says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from pnode_dist.system import torch_internals as internals


@pytest.mark.parametrize("enabled", [True, False])
def test_the_grad_mode_is_that_of_the_public_function(enabled: bool) -> None:
    with torch.set_grad_enabled(not enabled):
        internals.set_grad_enabled(enabled)
        found = torch.is_grad_enabled()
        torch.set_grad_enabled(not enabled)
    assert found is enabled


def graph() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    inputs = tuple(torch.tensor(value, requires_grad=True) for value in (2.0, 3.0, 5.0))
    return inputs[0] ** 2 * inputs[1], inputs


def test_gradients_are_those_of_the_public_function() -> None:
    (root, inputs), (other, others) = graph(), graph()
    cotangent = torch.tensor(0.5)
    expected = torch.autograd.grad(other, others, cotangent, allow_unused=True)
    assert internals.gradients((root,), inputs, (cotangent,), keep_graph=False) == expected
    assert expected[2] is None


def test_a_graph_is_kept_only_on_request() -> None:
    root, inputs = graph()
    one = torch.tensor(1.0)
    kept = internals.gradients((root,), inputs, (one,), keep_graph=True)
    assert internals.gradients((root,), inputs, (one,), keep_graph=False) == kept
    with pytest.raises(RuntimeError, match="second time"):
        internals.gradients((root,), inputs, (one,), keep_graph=False)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, cotangent: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return cotangent * 2


@pytest.mark.parametrize("function", [Doubled.apply, torch.exp2], ids=["in Python", "in C++"])
def test_an_edge_alone_keeps_a_graph_alive(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.tensor(3.0, requires_grad=True)
    (expected,) = torch.autograd.grad(function(x), x)
    assert torch.autograd.grad(internals.root_edge(function(x)), x) == (expected,)

    # Without the token that torch 2.6 lacks, and with it.
    node, number = internals.owning_root_edge(function(x))[:2]
    assert torch.autograd.grad(GradientEdge(node, number), x) == (expected,)


@pytest.mark.parametrize("differentiate", [torch.autograd.grad, None], ids=["public", "private"])
def test_a_backward_pass_runs_in_one_of_the_engine_calls(differentiate: Callable[..., object] | None) -> None:
    root, inputs = graph()
    codes = []

    def hook(cotangent: torch.Tensor) -> None:
        frame = sys._getframe()
        while frame is not None:
            codes.append(frame.f_code)
            frame = frame.f_back  # type: ignore[assignment]

    inputs[0].register_hook(hook)
    if differentiate is None:
        internals.gradients((root,), inputs, (torch.tensor(1.0),), keep_graph=False)
    else:
        differentiate(root, inputs, allow_unused=True)
    assert len(set(codes) & set(internals.ENGINE_CALLS)) == 1


def test_callbacks_run_once_at_the_end_of_the_backward_pass() -> None:
    root, inputs = graph()
    order: list[str] = []
    root.register_hook(lambda _: internals.at_end_of_backward(lambda: order.append("end")))
    inputs[0].register_hook(lambda _: order.append("leaf"))
    root.backward()
    assert order == ["leaf", "end"]


def test_backward_passes_have_different_numbers() -> None:
    numbers = []
    for _ in range(2):
        root, _ = graph()
        root.register_hook(lambda _: numbers.append(internals.backward_pass_number()))
        root.backward()
    assert len(set(numbers)) == 2
    assert internals.backward_pass_number() == -1 not in numbers


def test_references_to_tensors_and_storages_are_counted() -> None:
    tensor = torch.ones(3)
    pointer = internals.storage_pointer(tensor.untyped_storage())
    if internals.storage_references is None:
        pytest.skip("this build of torch does not count the references to a storage")
    alone = internals.storage_references(pointer)
    assert internals.tensor_references(tensor) == 1
    view = tensor[1:]
    assert internals.storage_references(pointer) == alone + 1
    assert internals.tensor_references(tensor) == 2
    del view
    assert (internals.storage_references(pointer), internals.tensor_references(tensor)) == (alone, 1)


def test_a_count_that_does_not_follow_the_references_is_not_used() -> None:
    assert internals._counts(lambda pointer: 1) is False
    assert internals.storage_references is None or internals._counts(internals.storage_references)


def test_the_storage_pointer_is_that_of_the_memory_and_not_of_the_tensor() -> None:
    tensor = torch.ones(4)
    pointers = [internals.storage_pointer(other.untyped_storage()) for other in (tensor, tensor[2:], tensor.clone())]
    assert pointers[0] == pointers[1] != pointers[2]


def test_terms_are_added_in_place() -> None:
    targets, terms = [torch.ones(2), torch.ones(3)], [torch.full((2,), 2.0), torch.full((3,), 3.0)]
    before = [target.data_ptr() for target in targets]
    expected = [target + term for target, term in zip(targets, terms, strict=True)]
    internals.add_in_place(targets, terms)
    assert all(map(torch.equal, targets, expected))
    assert [target.data_ptr() for target in targets] == before


def test_hooks_on_a_tensor_can_be_taken_off_and_put_back() -> None:
    (value,) = graph()[1][:1]
    calls: list[torch.Tensor] = []
    value.register_hook(calls.append)
    hooks = internals.hooks_of(value)
    internals.set_hooks(value, None)
    (value * 1.0).backward()
    assert not calls
    internals.set_hooks(value, hooks)
    (value * 1.0).backward()
    assert len(calls) == 1


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm])
def test_the_base_of_batch_norms_is_that_of_the_public_ones(kind: type[nn.Module]) -> None:
    assert issubclass(kind, internals.BatchNorm)


def test_trees_of_tensors_are_walked_in_order() -> None:
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    tree = {"a": (one, "text"), "b": [two]}
    assert internals.tree_leaves(tree) == [one, "text", two]
    assert internals.tree_map_only(torch.Tensor, float, tree) == {"a": (1.0, "text"), "b": [2.0]}


def test_parameters_are_left_out_of_data_parallelism_by_name() -> None:
    module = nn.Linear(2, 2)
    internals.ignore_in_data_parallel(module, ["bias"])
    # The attribute is the one that DistributedDataParallel reads.
    assert module._ddp_params_and_buffers_to_ignore == ["bias"]


@pytest.mark.parametrize(("taken", "warnings"), [(False, 1), (True, 0)])
def test_a_schedule_warns_unless_the_step_was_taken(
    taken: bool, warnings: int, recwarn: pytest.WarningsRecorder
) -> None:
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.5)
    internals.set_step_was_taken(optimiser, taken)
    schedule.step()
    assert sum("optimizer.step()" in str(warning.message) for warning in recwarn) == warnings


def test_a_work_is_done_when_its_future_is() -> None:
    future: torch.futures.Future[list[int]] = torch.futures.Future()
    work = internals.work_of(future)
    assert not work.is_completed()
    future.set_result([1])
    assert work.wait()
    assert work.is_completed()


def test_the_mark_against_tracing_is_that_of_the_public_decorator() -> None:
    program = """
import torch
from pnode_dist.system.torch_internals import mark_as_not_traced
from pnode_dist.system.torch_releases import known_options
def plain(x): return x
reason = known_options(torch.compiler.disable, reason="why")
marked = torch.compiler.disable(plain, **reason)
other = lambda x: x
mark_as_not_traced(other, "why")
if not reason:
    del other._torchdynamo_disable_msg  # which that release does not read
print(all(vars(other)[name] == vars(marked)[name] for name in vars(other)), len(vars(other)) - len(reason))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "1"]


def test_the_mark_of_constants_is_that_of_the_public_decorator() -> None:
    program = """
import torch
from pnode_dist.system.torch_internals import evaluated_while_tracing
public = torch.compiler.assume_constant_result(lambda: 1)
print(vars(evaluated_while_tracing(lambda: 1)) == vars(public) != {})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.slow
@pytest.mark.skipif(not internals.TRACES_OBJECTS, reason="used with later releases of torch alone")
def test_a_graph_has_one_identity_forward_and_backward_and_none_outside() -> None:
    seen: list[object] = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            seen.append(internals.functionalization())
            return x * 2

        @staticmethod
        def backward(ctx: object, cotangent: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            seen.append(internals.functionalization())
            return cotangent * 2

    from functorch.compile import aot_function, nop

    x = torch.ones(2, requires_grad=True)
    aot_function(Seen.apply, nop)(x).sum().backward()
    joint = seen[-2:]
    assert joint[0] is joint[1] is not None
    seen.clear()
    Seen.apply(x).sum().backward()
    assert seen == [None, None]


def test_wrappers_of_torch_func_are_seen_inside_a_transform_alone() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(
            (
                internals.under_functorch(),
                internals.is_functorch_wrapper(x),
                internals.is_functorch_batch(x),
                internals.unwrapped(x).shape,
                internals.wrapper_level(x) == internals.current_interpreter().level(),
                internals.is_functionalizing(),
            )
        )
        return x.sum()

    x = torch.ones(2, 3)
    torch.func.grad(look)(x)
    torch.func.vmap(look)(x)
    torch.func.functionalize(look)(x)
    assert [found[:3] for found in seen[:2]] == [(True, True, False), (True, True, True)]
    assert [found[3:] for found in seen] == [(x.shape, True, False)] * 2 + [(x.shape, True, True)]
    assert not internals.under_functorch()
    assert not internals.is_functorch_wrapper(x)


def test_dead_wrappers_are_taken_off() -> None:
    kept = []
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(torch.ones(2))
    (value,) = internals.unwrap_dead_wrappers((kept[0],))
    assert torch.equal(value, torch.ones(2))
    assert not internals.is_functorch_wrapper(value)


def test_the_level_of_forward_mode_rises_inside() -> None:
    assert internals.forward_mode_level() == -1
    with forward_ad.dual_level():
        assert internals.forward_mode_level() == 0
    assert internals.forward_mode_level() == -1


def test_dispatch_tracing_is_seen_while_it_lasts() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(internals.is_dispatch_tracing())
        return x + 1

    look(torch.ones(1))
    torch.jit.trace(look, torch.ones(1), check_trace=False)
    from torch.fx.experimental.proxy_tensor import make_fx

    make_fx(look)(torch.ones(1))
    assert seen == [False, False, True]


def test_legacy_batches_are_split_and_joined() -> None:
    seen: list[tuple[bool, int]] = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: object, cotangent: torch.Tensor) -> torch.Tensor:
            level = internals.legacy_batch_level()
            seen.append((internals.is_legacy_batch(cotangent), level))
            members = internals.remove_batch_axis(cotangent, level, 0, 0)
            return internals.add_batch_axis(2 * members, 0, level)

    x = torch.ones(3, requires_grad=True)
    batch = torch.arange(6.0).view(2, 3)
    (found,) = torch.autograd.grad(Double.apply(x), x, batch, is_grads_batched=True)
    assert seen == [(True, 1)]
    assert torch.equal(found, 2 * batch)
    assert internals.legacy_batch_level() == 0


def test_hooks_on_saved_tensors_can_be_refused_and_allowed() -> None:
    assert internals.saved_tensor_hooks_refusal() is None
    with torch.autograd.graph.disable_saved_tensors_hooks("a reason"):
        assert internals.saved_tensor_hooks_refusal() == "a reason"
        internals.allow_saved_tensor_hooks()
        with saved_tensors_hooks(lambda x: x, lambda x: x):
            pass
        internals.refuse_saved_tensor_hooks("a reason")
        with pytest.raises(RuntimeError, match="a reason"), saved_tensors_hooks(lambda x: x, lambda x: x):
            pass


@pytest.mark.parametrize("asked", [internals.is_checkpointing, internals.is_called_by_checkpoint])
def test_checkpointing_is_found_in_the_first_call_and_in_the_second(asked: Callable[[], bool]) -> None:
    def piece(x: torch.Tensor) -> torch.Tensor:
        found.append(asked())
        return x.sin()

    def called(**options: Any) -> list[bool]:
        found.clear()
        checkpoint(piece, torch.ones(1, requires_grad=True), **options).backward()
        return list(found)

    found: list[bool] = []
    assert not asked()
    assert called(use_reentrant=False) == [True, True]
    assert called(use_reentrant=True) == [False, False]


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason=f"torch {torch.__version__} does not return its hooks on saved tensors",
)
def test_other_hooks_within_checkpointing_are_not_taken_for_it() -> None:
    def piece(x: torch.Tensor) -> torch.Tensor:
        with saved_tensors_hooks(lambda x: x, lambda x: x):
            found.append(internals.is_checkpointing())
        return x.sin()

    found: list[bool] = []
    checkpoint(piece, torch.ones(1, requires_grad=True), use_reentrant=False)
    assert found == [False]


@pytest.mark.slow
def test_the_compiler_is_loaded_by_its_first_use() -> None:
    program = """
import torch
from pnode_dist.system import torch_internals
before = torch_internals.compiler_is_loaded()
torch.compiler.disable(len)
print(before, torch_internals.compiler_is_loaded())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.slow
def test_the_compiler_is_configured_and_its_settings_still_exist() -> None:
    program = """
import torch._dynamo, torch._functorch.config
from pnode_dist.system import torch_internals
before = torch._dynamo.config.suppress_errors, torch._functorch.config.donated_buffer
torch_internals.configure_compiler()
print(before, torch._dynamo.config.suppress_errors, torch._functorch.config.donated_buffer)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split(") ")[1].split() == ["True", "False"]
