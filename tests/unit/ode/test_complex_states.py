"""Complex states, against plain torch that computes with complex numbers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import ConfigurationError, NeuralODE, SplitFunction, Trajectory, odeint
from tests.oracles.right_hand_sides import distance
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

C = torch.complex128
TIMES = [0.0, 0.3, 0.8]
TIGHT = {"snes_rtol": 1e-13, "snes_stol": 1e-15, "ksp_rtol": 1e-13}


def numbers(*shape: int, seed: int = 1, dtype: torch.dtype = C) -> torch.Tensor:
    """Complex normal numbers, the same in every process."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=C).to(dtype)


class Waves(nn.Module):
    """du/dt of complex amplitudes: not holomorphic, not autonomous, with complex and real parameters."""

    def __init__(self, dtype: torch.dtype = C) -> None:
        super().__init__()
        self.matrix = nn.Parameter(0.5 * numbers(3, 3, seed=2, dtype=dtype))
        self.gain = nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=dtype.to_real()))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return 1j * (u @ self.matrix.T) - self.gain * u.abs().square() * u + 0.2 * torch.cos(t) * u.conj()


class Coupled(nn.Module):
    """A complex and a real part."""

    def __init__(self) -> None:
        super().__init__()
        self.waves, self.rate = Waves(), nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, t: torch.Tensor, u: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        psi, density = u
        return self.waves(t, psi) * density.mean(), self.rate * psi.abs().sum(-1) - density


def gradients(
    solve: Callable[[Any], Any], u0: tuple[torch.Tensor, ...], parameters: list[nn.Parameter]
) -> list[torch.Tensor]:
    """The states of a solve, and the gradients of a real loss that is no function of moduli alone."""
    start = tuple(part.detach().clone().requires_grad_() for part in u0)
    states = solve(start if len(start) > 1 else start[0])
    states = states if isinstance(states, tuple) else (states,)
    loss = sum((part.real.sin() + (2 * part.imag if part.is_complex() else part)).sum() for part in states)
    assert isinstance(loss, torch.Tensor)
    return [*(part.detach() for part in states), *torch.autograd.grad(loss, [*start, *parameters])]


@pytest.mark.parametrize("keep", ["solution", "stages", "graph"])
def test_explicit_steps_and_gradients_are_those_of_complex_torch(keep: str) -> None:
    f, u0 = Waves(), (numbers(4, 3),)
    node = NeuralODE(f, method="dopri5", step_size=0.1, trajectory=Trajectory(ram="1MiB", keep=keep))
    found = gradients(lambda u: node(u, TIMES), u0, list(f.parameters()))
    wanted = gradients(lambda u: odeint_plain(f, u, TIMES, TABLEAUX["5dp"], 0.1), u0, list(f.parameters()))
    assert distance(found, wanted) < 1e-12


def test_a_tuple_may_mix_complex_and_real_parts() -> None:
    f, u0 = Coupled(), (numbers(4, 3), numbers(4, seed=3).real.clone())
    found = gradients(lambda u: odeint(f, u, TIMES, step_size=0.1), u0, list(f.parameters()))
    wanted = gradients(lambda u: odeint_plain(f, u, TIMES, TABLEAUX["4"], 0.1), u0, list(f.parameters()))
    assert distance(found, wanted) < 1e-12


def test_complex_numbers_of_single_precision_stay_so() -> None:
    f, u0 = Waves(torch.complex64), (numbers(4, 3, dtype=torch.complex64),)
    found = gradients(lambda u: odeint(f, u, TIMES, step_size=0.1), u0, list(f.parameters()))
    wanted = gradients(lambda u: odeint_plain(f, u, TIMES, TABLEAUX["4"], 0.1), u0, list(f.parameters()))
    assert distance(found, wanted) < 1e-5


def test_f_computes_in_the_complex_type_of_its_compute_type() -> None:
    f, u0 = Waves(), numbers(4, 3)
    found = odeint(f, u0, TIMES, step_size=0.1, compute_dtype=torch.float32)
    narrow = copy.deepcopy(f).to(torch.complex64)
    narrow.gain.data = narrow.gain.data.real
    wanted = odeint_plain(narrow, u0.to(torch.complex64), TIMES, TABLEAUX["4"], 0.1)
    assert found.dtype == C
    assert distance(found.to(torch.complex64), wanted) < 1e-6
    assert distance(found, odeint(f, u0, TIMES, step_size=0.1)) > 1e-9


class Linear(nn.Module):
    """du/dt = A u + B conj(u)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(numbers(3, 3, seed=2)), nn.Parameter(numbers(3, 3, seed=5))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u @ self.a.T + u.conj() @ self.b.T


def crank_nicolson(f: Linear, u: torch.Tensor, step: float, steps: int) -> torch.Tensor:
    """The states of all steps, from the linear system of u and its conjugate."""
    matrix = torch.cat([torch.cat([f.a, f.b], 1), torch.cat([f.b.conj(), f.a.conj()], 1)])
    unit, found = torch.eye(6, dtype=C), [u]
    for _ in range(steps):
        both = torch.cat([u, u.conj()], 1) @ (unit + step / 2 * matrix).T
        u = torch.linalg.solve(unit - step / 2 * matrix, both.T).T[:, :3]
        found.append(u)
    return torch.stack(found)


@pytest.mark.parametrize("newton", ["petsc", "batch"])
def test_newtons_method_uses_the_real_jacobian(newton: str) -> None:
    f, u0 = Linear(), (numbers(4, 3),)
    times = [0.0, 0.1, 0.2, 0.3]
    node = NeuralODE(f, method="cn", newton=newton, options=TIGHT if newton == "petsc" else None)
    found = gradients(lambda u: node(u, times), u0, list(f.parameters()))
    wanted = gradients(lambda u: crank_nicolson(f, u, 0.1, 3), u0, list(f.parameters()))
    assert distance(found, wanted) < 1e-11


def test_a_split_function_is_split_for_complex_states_too() -> None:
    f, g, u0 = Linear(), Waves(), (numbers(4, 3),)
    node = NeuralODE(SplitFunction(implicit=f, explicit=g), method="arkimex_4", step_size=0.01)
    found = gradients(lambda u: node(u, TIMES), u0, [*f.parameters(), *g.parameters()])
    wanted = gradients(
        lambda u: odeint_plain(lambda t, v: f(t, v) + g(t, v), u, TIMES, TABLEAUX["5dp"], 0.01),
        u0,
        [*f.parameters(), *g.parameters()],
    )
    assert distance(found, wanted) < 1e-6


class Reals(nn.Module):
    """The same equation, written down in real and imaginary parts `[..., 3, 2]`."""

    def __init__(self, f: Waves) -> None:
        super().__init__()
        self.f = f

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        x, y = u[..., 0], u[..., 1]
        a, b = self.f.matrix.real, self.f.matrix.imag
        damping, drive = self.f.gain * (x * x + y * y), 0.2 * torch.cos(t)
        return torch.stack(
            [-(x @ b.T) - y @ a.T - damping * x + drive * x, x @ a.T - y @ b.T - damping * y - drive * y], -1
        )


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
def test_error_control_takes_real_and_imaginary_parts_as_entries(tensors: bool) -> None:
    f, u0 = Waves(), numbers(4, 3)
    rtol = torch.tensor([1e-6, 1e-5, 1e-7], dtype=torch.float64) if tensors else 1e-6
    of_reals = rtol.unsqueeze(-1) if isinstance(rtol, torch.Tensor) else rtol
    node, twin = NeuralODE(f, rtol=rtol, atol=1e-8), NeuralODE(Reals(f), rtol=of_reals, atol=1e-8)
    found, wanted = node(u0, TIMES), twin(torch.view_as_real(u0), TIMES)
    assert node.last_solve.forward_steps == twin.last_solve.forward_steps > 3
    assert distance(torch.view_as_real(found), wanted) < 1e-12


def test_tangents_are_those_of_torchs_forward_mode() -> None:
    f, u0, along = Waves(), numbers(4, 3), numbers(4, 3, seed=7)
    by_matrix = numbers(3, 3, seed=8)
    node = NeuralODE(f, step_size=0.1)
    found = node.jvp(u0, TIMES, along, {f.matrix: by_matrix})
    transformed = torch.func.jvp(lambda u: node(u, TIMES), (u0,), (along,))

    def plain(u: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return odeint_plain(
            lambda t, v: torch.func.functional_call(f, {"matrix": matrix}, (t, v)), u, TIMES, TABLEAUX["4"], 0.1
        )

    wanted = torch.func.jvp(plain, (u0, f.matrix.detach()), (along, by_matrix))
    assert distance([part.detach() for part in found], [part.detach() for part in wanted]) < 1e-12
    state_alone = torch.func.jvp(lambda u: plain(u, f.matrix.detach()), (u0,), (along,))
    assert distance([part.detach() for part in transformed], [part.detach() for part in state_alone]) < 1e-12


def second(solve: Callable[..., torch.Tensor], u0: torch.Tensor, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """The gradient of the squared norm of a gradient."""
    start = u0.clone().requires_grad_()
    first = torch.autograd.grad(solve(start).abs().square().sum(), [start, *parameters], create_graph=True)
    total = sum(part.abs().square().sum() for part in first)
    assert isinstance(total, torch.Tensor)
    return list(torch.autograd.grad(total, [start, *parameters]))


def test_second_derivatives_are_those_of_complex_torch() -> None:
    f, u0 = Waves(), numbers(2, 3)
    found = second(lambda u: odeint(f, u, TIMES, step_size=0.2), u0, list(f.parameters()))
    wanted = second(lambda u: odeint_plain(f, u, TIMES, TABLEAUX["4"], 0.2), u0, list(f.parameters()))
    assert distance(found, wanted) < 1e-12


def test_a_batch_of_gradients_by_torch_func_is_that_of_complex_torch() -> None:
    f, u0 = Waves(), 0.5 * numbers(2, 4, 3)

    def loss(solve: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda u: solve(u)[-1].abs().square().sum()

    found = torch.func.vmap(torch.func.grad(loss(lambda u: odeint(f, u, TIMES, step_size=0.1))))(u0)
    plain = torch.func.grad(loss(lambda u: odeint_plain(f, u, TIMES, TABLEAUX["4"], 0.1)))
    assert distance(found, torch.stack([plain(u) for u in u0])) < 1e-12


def test_a_diagonal_mass_matrix_multiplies_both_parts() -> None:
    f, u0 = Linear(), numbers(4, 3)
    mass = torch.tensor([[0.5, 2.0, 1.5]], dtype=torch.float64).expand(4, 3).contiguous()
    found = odeint(f, u0, [0.0, 0.1], method="cn", options=TIGHT, mass=mass)
    scaled = copy.deepcopy(f)
    scaled.a.data, scaled.b.data = scaled.a.data / mass[0, :, None], scaled.b.data / mass[0, :, None]
    assert distance(found, crank_nicolson(scaled, u0, 0.1, 1).detach()) < 1e-11


def test_a_model_of_complex_states_has_the_parameters_of_its_function_alone() -> None:
    node = NeuralODE(Waves(), step_size=0.1)
    u0 = numbers(4, 3)
    states = node(u0, TIMES)
    assert list(node.state_dict()) == ["func.matrix", "func.gain"]
    assert [name for name, _ in node.named_modules()] == ["", "func"]
    again = pickle.loads(pickle.dumps(node))
    assert torch.equal(again(u0, TIMES), states)
    assert torch.equal(node.eval()(u0, TIMES), states)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_compiled_solve_of_a_complex_state_is_the_eager_one() -> None:
    f, u0 = Reals(Waves()), (numbers(4, 3),)
    func = lambda t, u: torch.view_as_complex(f(t, torch.view_as_real(u)))  # noqa: E731
    compiled, eager = NeuralODE(func, step_size=0.05, compile="aot_eager"), NeuralODE(func, step_size=0.05)
    found = gradients(lambda u: compiled(u, TIMES), u0, list(f.parameters()))
    wanted = gradients(lambda u: eager(u, TIMES), u0, list(f.parameters()))
    assert distance(found, wanted) < 1e-12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compute_dtype": torch.bfloat16}, "compute_dtype = torch.bfloat16: must be torch.float32"),
        ({"method": "cn", "mass": numbers(4, 3)}, "mass: torch.complex128 of shape .* must be the real diagonal"),
        ({"method": "cn", "mass": torch.eye(3)}, "mass: torch.float32 of shape .* must be the real diagonal"),
        ({"method": "cn", "preconditioner": "assembled"}, "preconditioner: 'assembled' is for real states"),
    ],
)
def test_settings_that_need_a_real_state_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        odeint(Waves(), numbers(4, 3), TIMES, step_size=0.1, **settings)


@pytest.mark.parametrize(
    ("rate", "kind", "message"),
    [
        (lambda t, u: u.real, TypeError, "func returned torch.float64 for a part of torch.complex128"),
        (lambda t, u: u[:1], ValueError, r"func returned shape \(1, 3\) for a state of shape \(4, 3\)"),
        (lambda t, u: 0.0, TypeError, "func returned float for a part"),
    ],
)
def test_rates_that_are_not_complex_of_the_states_shape_are_refused(
    rate: Callable[..., Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        odeint(rate, numbers(4, 3), TIMES, step_size=0.1)
