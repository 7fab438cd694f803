"""The current state in torch's memory: what others hold stays as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pnode_dist.ode.rhs.layout import layout_of
from pnode_dist.ode.steppers.current_state import TensorState
from tests.oracles.right_hand_sides import random

SHAPES = {"a tensor": ((2, 3),), "a tuple": ((2, 3), (4,))}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def parts(request):
    return tuple(random(*shape, seed=seed) for seed, shape in enumerate(request.param))


@pytest.fixture
def state(parts):
    return TensorState(layout_of(parts)[0])


def flat(parts):
    return torch.cat([part.reshape(-1) for part in parts])


def test_what_is_set_is_not_copied_and_never_written(state, parts):
    before = flat(parts)
    state.set(parts)
    assert [part.data_ptr() for part in state.parts] == [part.data_ptr() for part in parts]
    assert torch.equal(state.flat, before)
    state.overwrite(lambda array: np.copyto(array, 7.0))
    assert (state.array == 7.0).all()
    state.set(parts)
    state.set_flat(torch.zeros_like(before))
    assert not state.flat.any()
    assert torch.equal(flat(parts), before)


def test_a_result_that_nothing_else_holds_is_handed_over_without_a_copy(state, parts):
    state.replace(parts, shared=False)
    assert [part.data_ptr() for part in state.take()] == [part.data_ptr() for part in parts]
    state.replace(parts, shared=True)
    assert not {part.data_ptr() for part in state.take()} & {part.data_ptr() for part in parts}


def test_states_of_another_type_or_order_in_memory_are_converted(parts):
    for other in (part.float() for part in parts), (torch.stack([part, part], -1)[..., 0] for part in parts):
        other = tuple(other)
        state = TensorState(layout_of(other)[0])
        state.set(other)
        assert all(part.is_contiguous() and part.dtype is torch.float64 for part in state.parts)
        torch.testing.assert_close(state.flat, flat(other).double())


def test_what_is_taken_is_the_callers_and_no_view(state, parts):
    for own in (False, True):
        state.set(parts)
        if own:
            state.set_flat(flat(parts))
        taken = state.take()
        assert state.parts == ()
        assert len({part.untyped_storage().data_ptr() for part in taken}) == len(parts)
        for part in taken:
            part.zero_()
    assert flat(parts).any()
