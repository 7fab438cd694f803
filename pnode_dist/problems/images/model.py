"""Network of the images problem: SqueezeNext with residual groups as solves of ordinary differential equations.

A. Gholami, K. Kwon, B. Wu, Z. Tai, X. Yue, P. Jin, S. Zhao, K. Keutzer: SqueezeNext: hardware-aware neural network
design, CVPR workshops (2018), arXiv 1803.10615. As in the PNODE paper (see `pnode_dist.ode.odeint`) a group starts with
an ordinary block that changes the numbers of channels and points. The blocks that change neither are replaced by u(1)
of du/dt = f(t, u), where u(0) is the output of the ordinary block.

States and images have their channels last, `[samples, y, x, channels]`. Convolutions use the same memory in torch's
order of axes, its channels_last format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.nn.activation import ACTIVATIONS
from pnode_dist.nn.field import channels_first, channels_last
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.partition.batch import BatchPartition

Block = Callable[[nn.Module], nn.Module]
"""Makes a module u(0) -> u(1) from a right-hand side f(t, u)."""

Normalisation = Callable[[int], nn.Module]
"""Makes the normalisation of a number of channels, `[samples, channels, y, x]`."""

_AXES = 2

_FIRST_RATE = 0.25


class Bottleneck(nn.Module):
    """SqueezeNext's five convolutions in a row, each normalised, with an activation after all but the last.

    `[samples, inputs, y, x]` -> `[samples, outputs, y, x]`: 1x1 to `squeezed` channels, 1x1 to half of these, 1x3 and
    3x1 to `squeezed` again, 1x1 to `outputs`.
    """

    def __init__(
        self,
        inputs: int,
        squeezed: int,
        outputs: int,
        activation: str,
        normalisation: Normalisation,
        bias: bool = True,
    ) -> None:
        super().__init__()
        half = squeezed // 2
        self.activation = ACTIVATIONS[activation]
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(inputs, squeezed, 1, bias=bias),
                nn.Conv2d(squeezed, half, 1, bias=bias),
                nn.Conv2d(half, squeezed, (1, 3), padding=(0, 1), bias=bias),
                nn.Conv2d(squeezed, squeezed, (3, 1), padding=(1, 0), bias=bias),
                nn.Conv2d(squeezed, outputs, 1, bias=bias),
            ]
        )
        self.normalisations = nn.ModuleList(
            normalisation(layer.out_channels) for layer in self.convolutions if isinstance(layer, nn.Conv2d)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layers."""
        last = len(self.convolutions) - 1
        for number, (convolution, normalise) in enumerate(zip(self.convolutions, self.normalisations, strict=True)):
            x = normalise(convolution(x))
            if number < last:
                x = self.activation(x)
        return x


class SqueezedRate(nn.Module):
    """f(t, u) of a residual group: a `Bottleneck` that keeps the shape of `u` `[samples, y, x, channels]`.

    Each sample is normalised alone (torch.nn.GroupNorm with one group). The paper's code uses batch norms with the same
    number of parameters, but f must not depend on the other samples of a batch or on the number of evaluations. f does
    not depend on t. Its initial mean square is 1/16, so that a chain of many groups depends smoothly on its parameters.
    """

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.bottleneck = Bottleneck(
            channels, channels // 2, channels, activation, lambda features: nn.GroupNorm(1, features)
        )
        last = self.bottleneck.normalisations[-1]
        assert isinstance(last, nn.GroupNorm)
        nn.init.constant_(last.weight, _FIRST_RATE)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """du/dt in the shape of `u`."""
        return channels_last(self.bottleneck(channels_first(u, _AXES)), u, _AXES)


class Transition(nn.Module):
    """Ordinary residual block that changes the numbers of channels and points: a `Bottleneck` beside a 1x1 convolution.

    Squeezes to a quarter if the number of channels decreases, not at all if the number of points decreases, and to half
    otherwise, as in the paper's code.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str, normalisation: Normalisation) -> None:
        super().__init__()
        self.stride = stride
        squeezed = inputs if stride > 1 else inputs // 4 if inputs > outputs else inputs // 2
        self.activation = ACTIVATIONS[activation]
        self.bottleneck = Bottleneck(inputs, squeezed, outputs, activation, normalisation, bias=False)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), normalisation(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[samples, inputs, y, x]` -> `[samples, outputs, y / stride, x / stride]`."""
        # Select the points that a strided 1x1 convolution would use: oneDNN corrupts memory in some derivatives of
        # those.
        x = x[:, :, :: self.stride, :: self.stride]
        return self.activation(self.bottleneck(x) + self.shortcut(x))


class SqueezeNext(nn.Module):
    """Images `[samples, y, x, channels]` -> scores `[samples, classes]`. Softmax turns scores into probabilities.

    Consists of a stem of `stem` channels, a group for each of `widths`, and a head of `features` channels that is
    averaged over the image. The first layer of a group has its stride from `strides`. `block(f)` makes the solve of a
    group from its right-hand side. `normalisation(channels)` makes the normalisation of the ordinary layers. On several
    ranks it must be `pnode_dist.nn.SyncBatchNorm`. `widths` and `stem` are multiples of 4.

    The defaults are those of SqNxt_23_1x as the PNODE paper uses it for images of 3 x 32 x 32: 459,474 parameters, of
    which the right-hand sides have 199,800, the paper's number. Parameters are drawn from torch's generator.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        block: Block,
        *,
        stem: int = 64,
        widths: Sequence[int] = (32, 64, 128, 256),
        strides: Sequence[int] = (1, 2, 2, 2),
        features: int = 128,
        activation: str = "relu",
        normalisation: Normalisation = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.stem = nn.Sequential(nn.Conv2d(channels, stem, 3, padding=1, bias=False), normalisation(stem))
        before = (stem, *widths[:-1])
        self.transitions = nn.ModuleList(
            Transition(inputs, outputs, stride, activation, normalisation)
            for inputs, outputs, stride in zip(before, widths, strides, strict=True)
        )
        self.blocks = nn.ModuleList(block(SqueezedRate(width, activation)) for width in widths)
        self.head = nn.Sequential(nn.Conv2d(widths[-1], features, 1, bias=False), normalisation(features))
        self.classify = nn.Linear(features, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight, gain=nn.init.calculate_gain("relu"))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def first_state(self, images: torch.Tensor) -> torch.Tensor:
        """Return the initial state of the first group's solve. Collective as the normalisations are."""
        x = self.activation(self.stem(channels_first(images, _AXES)))
        return channels_last(self.transitions[0](x), images, _AXES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the scores. Collective as the blocks and the normalisations are."""
        u = self.blocks[0](self.first_state(images))
        for transition, block in zip(self.transitions[1:], self.blocks[1:], strict=True):
            u = block(channels_last(transition(channels_first(u, _AXES)), u, _AXES))
        features = self.activation(self.head(channels_first(u, _AXES)))
        scores: torch.Tensor = self.classify(functional.adaptive_avg_pool2d(features, 1).flatten(1))
        return scores


class OdeBlock(nn.Module):
    """u(0) -> u(1) by a `NeuralODE` with `last_only`, for samples distributed over the state ranks of a mesh.

    Each rank holds consecutive samples, split as by `BatchPartition`. `forward` and its backward pass are collective on
    the state ranks.

    Raises `ValueError` if a rank holds a different share of the samples.
    """

    def __init__(self, solve: NeuralODE, mesh: Mesh) -> None:
        super().__init__()
        self.solve = solve
        self._mesh = mesh
        self._partitions: dict[tuple[int, tuple[int, ...]], BatchPartition] = {}

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Return u(1). Collective on the state ranks."""
        self.place(u)
        after: torch.Tensor = self.solve(u, (0.0, 1.0))
        return after

    def place(self, u: torch.Tensor) -> None:
        """Set the partition of the solve to the distribution of the samples of `u`. Collective on the state ranks.

        A replica without samples does not communicate and gets no partition.
        """
        samples = int(self._mesh.sum(torch.tensor([len(u)]), over="state").item())
        self.solve.partition = self._partition(samples, tuple(u.shape[1:])) if samples else None
        partition = self.solve.partition
        if partition is not None and partition.local_shape != tuple(u.shape):
            raise ValueError(
                f"{len(u)} of {samples} samples on state rank {self._mesh.state_rank}: must be "
                f"{partition.local_shape[0]}, its share"
            )

    def _partition(self, samples: int, shape: tuple[int, ...]) -> BatchPartition:
        # Reuse the object: solves are cached by their partition.
        if (samples, shape) not in self._partitions:
            self._partitions[samples, shape] = BatchPartition(self._mesh, samples, shape)
        return self._partitions[samples, shape]
