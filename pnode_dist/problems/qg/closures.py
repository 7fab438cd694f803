"""Closures of the quasi-geostrophic problem: networks for the forcing of the scales that the grid does not resolve.

A closure is a module that is called with potential vorticity q and velocities u and v, each
`[..., ny_local, nx_local, 2]`, and returns the forcing of dq/dt in the same shape. Its networks see normalised inputs
and return normalised outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.nn import functional

from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange import global_sum, halo
from pnode_dist.nn import Conv2d, GlobalMean
from pnode_dist.nn.field import require_block
from pnode_dist.partition.grid import GridPartition

LAYERS = 2
NAMES = ("none", "cnn", "fcnn")
INPUTS = ("quv", "q")

_CHANNELS, _CONVOLUTIONS, _KERNEL = 32, 4, 3
_FULL_CHANNELS = (128, 64, 32, 32, 32, 32, 32)
_FULL_KERNELS = (5, 5, 3, 3, 3, 3, 3, 3)
_FIRST_OUTPUT = 0.1
_HALF_NORMAL_MEAN = 1 / math.sqrt(2 * math.pi)
_HALF_NORMAL_DEVIATION = math.sqrt(1 / 2 - 1 / (2 * math.pi))


@dataclass(frozen=True)
class Scales:
    """Standard deviations of the upper and the lower layer, which normalise the inputs and outputs of a closure.

    `q` is in 1/s, `u` and `v` in m/s, `forcing`, the sub-grid forcing of dq/dt, in 1/s2. Raises `ConfigurationError`
    for a scale that is not positive and finite.
    """

    q: tuple[float, float] = (1.0, 1.0)
    u: tuple[float, float] = (1.0, 1.0)
    v: tuple[float, float] = (1.0, 1.0)
    forcing: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        for field in fields(self):
            scale = getattr(self, field.name)
            if len(scale) != LAYERS or not all(0 < value < math.inf for value in scale):
                raise ConfigurationError(
                    f"scales: {field.name} = {scale}: must be two positive numbers, one for each layer"
                )


def scales_of(
    partition: GridPartition, q: torch.Tensor, u: torch.Tensor, v: torch.Tensor, forcing: torch.Tensor
) -> Scales:
    """Return the standard deviations of each layer over all times and points. Collective on the partition.

    All arguments are this rank's blocks `[..., ny_local, nx_local, 2]`, and departures from zero: q, u, v and forcing
    have no mean over a periodic domain. Raises `ConfigurationError` for a field that is zero or not finite everywhere.
    """
    values = torch.stack([field.double().square().flatten(0, -2).sum(0) for field in (q, u, v, forcing)])
    count = torch.tensor([float(q[..., 0].numel())], dtype=torch.float64)
    totals = global_sum(torch.cat([values.flatten(), count]), partition.comm)
    rms = (totals[:-1] / totals[-1]).sqrt().reshape(-1, LAYERS).tolist()
    return Scales(*((upper, lower) for upper, lower in rms))


class NoClosure(nn.Module):
    """The closure that is zero: the coarse equations by themselves."""

    def forward(self, q: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return zeros in the shape of `q`. Not collective."""
        return torch.zeros_like(q)


class ChannelScale(nn.Module):
    """Multiply each channel by `weight` and add `bias`, if any: batch norm with fixed statistics.

    A batch norm in a right-hand side would depend on how often the steps are evaluated. Its first effect is kept: the
    initial values normalise the positive parts of standard normal numbers.
    """

    def __init__(self, channels: int, bias: bool = True, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), 1 / _HALF_NORMAL_DEVIATION, dtype=dtype))
        shift = torch.full((channels,), -_HALF_NORMAL_MEAN / _HALF_NORMAL_DEVIATION, dtype=dtype)
        self.bias = nn.Parameter(shift) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale and shift `[..., channels]`. Not collective."""
        scaled = x * self.weight
        return scaled if self.bias is None else scaled + self.bias


class ResidualStack(nn.Module):
    """Convolutions with silu, each but the first added to its input, and one without silu and bias for the output.

    Channels last. Collective on the partition.
    """

    def __init__(
        self, partition: GridPartition, inputs: int, outputs: int, channels: int, layers: int, kernel: int
    ) -> None:
        super().__init__()
        widths = [inputs, *[channels] * (layers - 1)]
        self.hidden = nn.ModuleList(
            Conv2d(partition, before, channels, kernel, dtype=torch.float64) for before in widths[:-1]
        )
        self.output = Conv2d(partition, widths[-1], outputs, kernel, bias=False, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[..., *local, outputs]`."""
        for number, layer in enumerate(self.hidden):
            y = functional.silu(layer(x))
            x = y if number == 0 else x + y
        outputs: torch.Tensor = self.output(x)
        return outputs


class FullyConvolutional(nn.Module):
    """The network of the benchmark: eight convolutions with relu, each but the last one normalised.

    Ross et al.: Benchmarking of machine learning ocean subgrid parameterizations in an idealized model, J. Adv. Model.
    Earth Syst. 15, e2022MS003258 (2023). `ChannelScale` takes the place of batch norm, which in evaluation is the same
    map. One network serves both layers, where the benchmark trains one for each. Biases that would only change the
    mean of the output are left out. Channels last. Collective on the partition.
    """

    def __init__(self, partition: GridPartition, inputs: int, outputs: int) -> None:
        super().__init__()
        widths = (inputs, *_FULL_CHANNELS, outputs)
        self.convolutions = nn.ModuleList(
            Conv2d(partition, before, after, kernel, dtype=torch.float64)
            for before, after, kernel in zip(widths[:-2], widths[1:-1], _FULL_KERNELS[:-1], strict=True)
        )
        last = len(_FULL_CHANNELS) - 1
        self.norms = nn.ModuleList(
            ChannelScale(width, bias=number < last, dtype=torch.float64) for number, width in enumerate(_FULL_CHANNELS)
        )
        self.output = Conv2d(partition, widths[-2], outputs, _FULL_KERNELS[-1], bias=False, dtype=torch.float64)
        with torch.no_grad():
            for convolution in (*self.convolutions, self.output):
                assert isinstance(convolution, Conv2d)
                convolution.weight.normal_(0, math.prod(convolution.weight.shape[1:]) ** -0.5)
                if convolution.bias is not None:
                    convolution.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[..., *local, outputs]`."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(functional.relu(convolution(x)))
        outputs: torch.Tensor = self.output(x)
        return outputs


class NetworkClosure(nn.Module):
    """The forcing of dq/dt by a network. Collective on the partition.

    The network sees q, u and v, or q alone, of both layers at each point, divided by their scales, in the type of the
    parameters. Its output is turned into a forcing without mean over the domain, in units of the forcing's scale and in
    the type of q:

    - `momentum=False`: the output `[..., 2]` itself less its mean over the domain, as in the benchmark.
    - `momentum=True`: the output `[..., 4]` is a stress T of each layer, its anisotropy A = Tyy - Txx and its shear
      Txy, in units of the forcing times the squared distance of points. The forcing is the curl of its divergence,
      d2A/dxdy + (d2/dx2 - d2/dy2) Txy, in central differences. So each layer's momentum and potential vorticity are
      only moved between points: their sums over the domain are conserved.

    `scaling` is a `Scales`. Parameters are float64 until converted by `to`.
    """

    input_scale: torch.Tensor
    output_scale: torch.Tensor

    def __init__(
        self,
        partition: GridPartition,
        network: nn.Module,
        scaling: Scales,
        inputs: str = "quv",
        momentum: bool = False,
    ) -> None:
        super().__init__()
        self.partition, self.network = partition, network
        self.inputs, self.momentum = inputs, momentum
        self.mean = GlobalMean(partition)
        given = [value for name in inputs for value in getattr(scaling, name)]
        self.register_buffer("input_scale", torch.tensor(given, dtype=torch.float64), persistent=False)
        self.register_buffer("output_scale", torch.tensor(scaling.forcing, dtype=torch.float64), persistent=False)

    def forward(self, q: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the forcing of dq/dt in the shape and type of `q`."""
        require_block("closure", q, self.partition)
        fields = {"q": q, "u": u, "v": v}
        given = torch.cat([fields[name] for name in self.inputs], dim=-1)
        normalised = (given / self.input_scale.to(given.dtype)).to(self._type())
        output = self.network(normalised).to(q.dtype)
        if self.momentum:
            output = stress_curl(output, self.partition)
        else:
            output = output - self.mean(output)[..., None, None, :]
        forcing: torch.Tensor = output * self.output_scale.to(q.dtype)
        return forcing

    def _type(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def extra_repr(self) -> str:
        """Return the kind of closure for `repr`."""
        return f"inputs={self.inputs!r}, momentum={self.momentum}"


def stress_curl(stress: torch.Tensor, partition: GridPartition) -> torch.Tensor:
    """Return the curl of the divergence of a stress in each layer. Collective on the partition.

    `stress` is `[..., *local, 4]`: Tyy - Txx of both layers, then Txy of both. Returns `[..., *local, 2]`, the central
    differences of the neighbours at distance 1, in units of the squared distance of points.
    """
    wide = halo(stress, partition, 1)
    anisotropy, shear = wide[..., :LAYERS], wide[..., LAYERS:]
    mixed: torch.Tensor = (
        anisotropy[..., 2:, 2:, :]
        - anisotropy[..., 2:, :-2, :]
        - anisotropy[..., :-2, 2:, :]
        + anisotropy[..., :-2, :-2, :]
    ) / 4
    along_x = shear[..., 1:-1, 2:, :] + shear[..., 1:-1, :-2, :]
    along_y = shear[..., 2:, 1:-1, :] + shear[..., :-2, 1:-1, :]
    return mixed + (along_x - along_y)


def closure(
    name: str,
    partition: GridPartition,
    *,
    channels: int | None = None,
    layers: int | None = None,
    kernel: int | None = None,
    momentum: bool = False,
    scales: Scales | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    inputs: str = "quv",
) -> nn.Module:
    """Build a closure whose network computes in `dtype`, with initial parameters determined by `seed`.

    - "none": zero. It takes no other arguments.
    - "cnn": `ResidualStack` of `layers` (4) convolutions with `channels` (32) and square `kernel`s (3): 21,000 numbers.
    - "fcnn": `FullyConvolutional`, of fixed size: 281,000 numbers.

    `inputs` is "quv" or "q", and `momentum` as for `NetworkClosure`. The output starts at a tenth of its usual
    initialisation, so that the first solves stay near those without closure. The parameters are drawn in float64 and
    then rounded to `dtype`, so that every rank and every type starts from the same values. Not collective.

    Raises `ConfigurationError` for an unknown name, sizes out of range, and sizes of a network that has fixed ones.
    """
    _check(name, partition, inputs, {"channels": channels, "layers": layers, "kernel": kernel})
    if name == "none":
        return NoClosure()
    given, outputs = LAYERS * len(inputs), 2 * LAYERS if momentum else LAYERS
    network: ResidualStack | FullyConvolutional
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "cnn":
            sizes = channels or _CHANNELS, layers or _CONVOLUTIONS, kernel or _KERNEL
            network = ResidualStack(partition, given, outputs, *sizes)
        else:
            network = FullyConvolutional(partition, given, outputs)
    with torch.no_grad():
        for value in network.output.parameters():
            value.mul_(_FIRST_OUTPUT)
    module = NetworkClosure(partition, network, scales or Scales(), inputs, momentum)
    network.to(dtype)
    return module


def _check(name: str, partition: GridPartition, inputs: str, sizes: dict[str, int | None]) -> None:
    if name not in NAMES:
        raise ConfigurationError(f"[model] closure = {name!r}: must be one of {', '.join(NAMES)}")
    if inputs not in INPUTS:
        raise ConfigurationError(f"[model] inputs = {inputs!r}: must be one of {', '.join(INPUTS)}")
    if partition.boundary != ("periodic", "periodic") or partition.channels != LAYERS:
        raise ConfigurationError(
            f"closure: partition has boundary = {partition.boundary}, channels = {partition.channels}: must be a "
            f"periodic grid of two axes with {LAYERS} channels"
        )
    least = {"channels": 1, "layers": 2, "kernel": 1}
    for key, size in sizes.items():
        if size is None:
            continue
        if name != "cnn":
            raise ConfigurationError(f"[model] {key} = {size}: is for closure = 'cnn', and closure = {name!r}")
        if size < least[key] or (key == "kernel" and size % 2 == 0):
            odd = "odd and " if key == "kernel" else ""
            raise ConfigurationError(f"[model] {key} = {size}: must be {odd}at least {least[key]}")
