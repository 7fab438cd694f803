"""The partitioned twin of a torch module."""

from __future__ import annotations

import torch
from torch import nn

from pnode_dist.errors import ConfigurationError
from pnode_dist.nn.conv import Conv2d
from pnode_dist.nn.norm import BatchNorm2d, GlobalMean, GroupNorm
from pnode_dist.partition.grid import GridPartition, Rule

_POINTWISE = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardtanh,
    nn.Identity,
    nn.LeakyReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.Sigmoid,
    nn.SiLU,
    nn.Softplus,
    nn.Tanh,
)
_OWN = (Conv2d, GroupNorm, BatchNorm2d, GlobalMean)
_RULES = {"zeros": "zero", "circular": "periodic", "replicate": "replicate", "reflect": "reflect"}


def convert(module: nn.Module, partition: GridPartition) -> nn.Module:
    """The twin of a torch module for fields that are split over ranks.

    `module` takes `[sample, channel, y, x]`; its twin takes this rank's part of the same, channels last
    (`[..., ny_local, nx_local, channel]`), and returns this rank's part of the result. It is made of `nn.Sequential`
    (in any depth), `nn.Conv2d`, `nn.GroupNorm`, `nn.BatchNorm2d`, activations that act on each number by itself, and
    layers of `pnode_dist.nn`, which are left as they are. The parameters and buffers are the very same tensors, under
    the same names: a state_dict goes either way. Not collective; what the twin's `forward` is, its layers say.

    Raises `ConfigurationError` naming the layer that has no twin, or the argument of it: a stride, a size that is not
    kept, padding that is not what the partition has beyond the edge of the domain.
    """
    return _converted(module, partition, "")


def _converted(module: nn.Module, partition: GridPartition, name: str) -> nn.Module:
    kind = type(module)
    if kind is nn.Sequential:
        twin: nn.Module = nn.Sequential()
        for child_name, child in module.named_children():
            twin.add_module(child_name, _converted(child, partition, f"{name}.{child_name}" if name else child_name))
        return twin.train(module.training)
    if kind in _POINTWISE or kind in _OWN:
        return module
    # The twins' own first values are thrown away, and must not move the generator on.
    with torch.random.fork_rng(devices=[]):
        if isinstance(module, nn.Conv2d) and kind is nn.Conv2d:
            twin = _convolution(module, partition, name)
        elif isinstance(module, nn.GroupNorm) and kind is nn.GroupNorm:
            twin = GroupNorm(partition, module.num_groups, module.num_channels, module.eps, module.affine)
        elif isinstance(module, nn.BatchNorm2d) and kind is nn.BatchNorm2d:
            twin = BatchNorm2d(
                partition,
                module.num_features,
                module.eps,
                module.momentum,
                module.affine,
                module.track_running_stats,
            )
        else:
            pointwise = ", ".join(sorted(known.__name__ for known in _POINTWISE))
            raise ConfigurationError(
                f"convert: {_place(name)} is a {kind.__name__}: must be one of Sequential, Conv2d, GroupNorm, "
                f"BatchNorm2d, {pointwise}, or a layer of pnode_dist.nn"
            )
    for parameter_name, parameter in module.named_parameters(recurse=False):
        twin.register_parameter(parameter_name, parameter)
    for buffer_name, buffer in module.named_buffers(recurse=False):
        twin.register_buffer(buffer_name, buffer)
    return twin.train(module.training)


def _convolution(module: nn.Conv2d, partition: GridPartition, name: str) -> Conv2d:
    if module.stride != (1, 1):
        raise ConfigurationError(f"convert: {_place(name)}: stride = {module.stride}: must be 1: the grid is kept")
    kernel, dilation = module.kernel_size, module.dilation
    if any(size % 2 == 0 for size in kernel):
        raise ConfigurationError(f"convert: {_place(name)}: kernel_size = {kernel}: must be odd: the grid is kept")
    width = tuple(step * (size - 1) // 2 for step, size in zip(dilation, kernel, strict=True))
    padding = width if module.padding == "same" else module.padding
    if padding != width:
        raise ConfigurationError(f"convert: {_place(name)}: padding = {padding!r}: must be {width} or 'same'")
    rule = _RULES.get(module.padding_mode)
    for axis, beyond in enumerate(partition.boundary):
        if width[axis] and beyond != rule:
            raise ConfigurationError(
                f"convert: {_place(name)}: padding_mode = {module.padding_mode!r}: must be the partition's rule, "
                f"{beyond!r} for {'yx'[axis]}{_in_torch(beyond)}"
            )
    return Conv2d(
        partition,
        module.in_channels,
        module.out_channels,
        (kernel[0], kernel[1]),
        (dilation[0], dilation[1]),
        module.bias is not None,
        groups=module.groups,
    )


def _in_torch(rule: Rule) -> str:
    name = next((theirs for theirs, ours in _RULES.items() if ours == rule), None)
    return " (which torch has no name for)" if name is None else f" (torch's name: {name!r})"


def _place(name: str) -> str:
    return f"layer {name!r}" if name else "the module"
