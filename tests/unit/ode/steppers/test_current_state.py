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
    state.add([(parts, 0.5), (parts, 1.0)])
    torch.testing.assert_close(state.flat, 2.5 * before)
    state.overwrite(lambda array: np.copyto(array, 7.0))
    assert (state.array == 7.0).all()
    state.set(parts)
    state.set_flat(torch.zeros_like(before))
    assert torch.equal(flat(parts), before)


def test_what_is_lent_stays_and_the_state_goes_on_elsewhere(state, parts):
    state.set_flat(flat(parts))
    held = state.parts
    state.share()
    state.add([(parts, 1.0)])
    assert torch.equal(flat(held), flat(parts))
    assert torch.equal(flat(state.parts), 2 * flat(parts))
    place = state.parts[0].data_ptr()
    state.add([(parts, 1.0)])
    assert state.parts[0].data_ptr() == place, "nobody else holds that: it is used again"


def test_parts_after_one_that_is_lent_have_memory_of_their_own(state, parts):
    state.set(parts)
    state.share()
    state.add([(parts, 1.0)])
    assert len({part.untyped_storage().data_ptr() for part in state.parts}) == len(parts)
    assert torch.equal(state.flat, 2 * flat(parts))
    places = [part.data_ptr() for part in state.parts]
    assert [part.data_ptr() for part in state.take()] == places, "nothing is copied"
    state.set(parts)
    state.share()
    state.add([(parts, 1.0)])
    state.set_flat(torch.ones_like(flat(parts)))
    assert all((part == 1).all() for part in state.parts)
    state.overwrite(lambda array: np.copyto(array, 3.0))
    assert (state.array == 3.0).all()


def test_states_of_another_type_or_order_in_memory_are_converted(parts):
    for other in (part.float() for part in parts), (torch.stack([part, part], -1)[..., 0] for part in parts):
        other = tuple(other)
        state = TensorState(layout_of(other)[0])
        state.set(other)
        state.add([(tuple(part.double() for part in other), 1.0)])
        torch.testing.assert_close(state.flat, 2 * flat(other).double())


def test_what_is_taken_is_the_callers_and_no_view(state, parts):
    for own in (False, True):
        state.set(parts)
        if own:
            state.set_flat(flat(parts))
        taken = state.take()
        assert state.parts == ()
        assert not any(part._is_view() for part in taken)
        for part in taken:
            part.zero_()
    assert flat(parts).any()
