"""The partitioned twin of a torch module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pnode_dist.errors import ConfigurationError
from pnode_dist.nn import conv, norm, pool
from pnode_dist.nn.activation import POINTWISE
from pnode_dist.nn.field import for_each_axis, require_axes
from pnode_dist.nn.stack import Stack
from pnode_dist.nn.upsample import LINEAR, Upsample
from pnode_dist.partition.grid import GridPartition, Rule

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_CONVOLUTIONS = {nn.Conv1d: conv.Conv1d, nn.Conv2d: conv.Conv2d, nn.Conv3d: conv.Conv3d}
_BATCH_NORMS = {
    nn.BatchNorm1d: norm.BatchNorm1d,
    nn.BatchNorm2d: norm.BatchNorm2d,
    nn.BatchNorm3d: norm.BatchNorm3d,
}
_INSTANCE_NORMS = {nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3}
_POOLS = {
    nn.AvgPool1d: pool.AvgPool1d,
    nn.AvgPool2d: pool.AvgPool2d,
    nn.AvgPool3d: pool.AvgPool3d,
    nn.MaxPool1d: pool.MaxPool1d,
    nn.MaxPool2d: pool.MaxPool2d,
    nn.MaxPool3d: pool.MaxPool3d,
}
_OWN = (*_CONVOLUTIONS.values(), *_BATCH_NORMS.values(), norm.GroupNorm, norm.LayerNorm, norm.GlobalMean, Stack)
_RULES = {"zeros": "zero", "circular": "periodic", "replicate": "replicate", "reflect": "reflect"}


def convert(module: nn.Module, partition: GridPartition) -> nn.Module:
    """The twin of a torch module for fields that are split over ranks.

    `module` takes `[sample, channel, *shape]`; its twin takes this rank's part of the same, channels last
    (`[..., *local, channel]`), and returns this rank's part of the result. It is made of `nn.Sequential`, in any depth,
    convolutions, batch, group and instance norms, layer norms over channels and grid, pooling and upsampling by whole
    factors (what follows is on the coarser or finer grid), dropout with a probability of 0, activations that act on
    each number by itself, and layers of `pnode_dist.nn`, which are left as they are. The parameters and buffers are the
    very same tensors, under the same names: a state_dict goes either way. Not collective; what the twin's `forward` is,
    its layers say.

    Raises `ConfigurationError` naming the layer that has no twin, or the argument of it: a stride, a size that is not
    kept, windows that do not fit the blocks, what torch has beyond the edge of the domain if the partition has
    something else there.
    """
    return _converted(module, partition, "")[0]


def _converted(module: nn.Module, partition: GridPartition, name: str) -> tuple[nn.Module, GridPartition]:
    """Return the twin, and the grid of its result."""
    kind = type(module)
    if kind is nn.Sequential:
        twin: nn.Module = nn.Sequential()
        for child_name, child in module.named_children():
            child, partition = _converted(child, partition, f"{name}.{child_name}" if name else child_name)
            twin.add_module(child_name, child)
        return twin.train(module.training), partition
    if isinstance(module, _DROPOUTS) and module.p:
        raise ConfigurationError(
            f"convert: {_place(name)}: p = {module.p} of {kind.__name__}: must be 0: a right-hand side gives the same "
            "whenever it is evaluated"
        )
    if isinstance(module, pool.Pool | Upsample):
        return module, module.output
    if kind in POINTWISE or kind in _OWN or kind in _DROPOUTS:
        return module, partition
    # The twins' initial values are replaced, so they must not advance the random generator.
    with torch.random.fork_rng(devices=[]):
        try:
            twin = _twin(module, partition)
        except ConfigurationError as error:
            raise ConfigurationError(f"convert: {_place(name)}: {error}") from None
    for parameter_name, parameter in module.named_parameters(recurse=False):
        twin.register_parameter(parameter_name, parameter)
    for buffer_name, buffer in module.named_buffers(recurse=False):
        twin.register_buffer(buffer_name, buffer)
    return twin.train(module.training), twin.output if isinstance(twin, pool.Pool | Upsample) else partition


def _twin(module: nn.Module, partition: GridPartition) -> nn.Module:
    """Return the twin of one layer, with new parameters."""
    kind = type(module)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and kind in _CONVOLUTIONS:
        return _convolution(module, partition)
    if isinstance(module, nn.GroupNorm) and kind is nn.GroupNorm:
        return norm.GroupNorm(partition, module.num_groups, module.num_channels, module.eps, module.affine)
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and kind in _BATCH_NORMS:
        return _BATCH_NORMS[kind](
            partition, module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        )
    if isinstance(module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d) and kind in _INSTANCE_NORMS:
        return _instance_norm(module, partition)
    if isinstance(module, nn.LayerNorm) and kind is nn.LayerNorm:
        return _layer_norm(module, partition)
    if kind in _POOLS:
        return _pool(module, partition)
    if isinstance(module, nn.Upsample) and kind is nn.Upsample:
        return _upsample(module, partition)
    kinds = (*_CONVOLUTIONS, nn.GroupNorm, *_BATCH_NORMS, *_INSTANCE_NORMS, nn.LayerNorm, *_POOLS, nn.Upsample)
    known = ", ".join(known.__name__ for known in (nn.Sequential, *kinds, *POINTWISE))
    raise ConfigurationError(
        f"there is no twin of a {kind.__name__}: must be one of {known}, or a layer of pnode_dist.nn"
    )


def _convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, partition: GridPartition) -> nn.Module:
    kernel, dilation = module.kernel_size, module.dilation
    if any(step != 1 for step in module.stride):
        raise ConfigurationError(f"stride = {module.stride}: must be 1: the grid is kept")
    if any(size % 2 == 0 for size in kernel):
        raise ConfigurationError(f"kernel_size = {kernel}: must be odd: the grid is kept")
    width = tuple(step * (size - 1) // 2 for step, size in zip(dilation, kernel, strict=True))
    padding = width if module.padding == "same" else module.padding
    if padding != width:
        raise ConfigurationError(f"padding = {padding!r}: must be {width} or 'same'")
    twin = _CONVOLUTIONS[type(module)](
        partition,
        module.in_channels,
        module.out_channels,
        kernel,
        dilation,
        module.bias is not None,
        groups=module.groups,
    )
    _check_rules(partition, width, f"padding_mode = {module.padding_mode!r}", _RULES.get(module.padding_mode))
    return twin


def _instance_norm(
    module: nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d, partition: GridPartition
) -> nn.Module:
    require_axes(type(module).__name__, partition, _INSTANCE_NORMS[type(module)])
    if module.track_running_stats:
        raise ConfigurationError("track_running_stats = True: must be False: each sample has its own statistics")
    return norm.GroupNorm(partition, module.num_features, module.num_features, module.eps, module.affine)


def _layer_norm(module: nn.LayerNorm, partition: GridPartition) -> nn.Module:
    channels, *shape = module.normalized_shape
    if tuple(shape) != partition.shape:
        raise ConfigurationError(
            f"normalized_shape = {tuple(module.normalized_shape)}: must be the channels and the whole grid, "
            f"(channels, {', '.join(map(str, partition.shape))})"
        )
    bias = module.bias is not None
    return norm.LayerNorm(partition, channels, module.eps, module.elementwise_affine, bias, channels_first=True)


def _pool(module: nn.Module, partition: GridPartition) -> nn.Module:
    twin = _POOLS[type(module)]
    kernel, stride, padding = (
        for_each_axis(getattr(module, argument), twin.axes) for argument in ("kernel_size", "stride", "padding")
    )
    if stride != kernel:
        raise ConfigurationError(f"stride = {stride}: must be the kernel size, {kernel}: windows lie side by side")
    if any(padding):
        raise ConfigurationError(f"padding = {padding}: must be 0")
    for argument, allowed in (("dilation", 1), ("return_indices", False), ("divisor_override", None)):
        value = getattr(module, argument, allowed)
        if value != allowed:
            raise ConfigurationError(f"{argument} = {value}: must be {allowed}")
    return twin(partition, kernel)


def _upsample(module: nn.Upsample, partition: GridPartition) -> nn.Module:
    axes = len(partition.shape)
    if module.mode not in ("nearest", LINEAR[axes]):
        raise ConfigurationError(f"mode = {module.mode!r}: must be 'nearest' or {LINEAR[axes]!r}")
    if module.align_corners:
        raise ConfigurationError("align_corners = True: must be False")
    factors = _factors(module, partition)
    if module.mode != "nearest":
        _check_rules(partition, [factor - 1 for factor in factors], f"mode = {module.mode!r}", "replicate")
    return Upsample(partition, factors, module.mode)


def _factors(module: nn.Upsample, partition: GridPartition) -> tuple[int, ...]:
    if module.size is not None:
        given = f"size = {module.size}"
        sizes = for_each_axis(module.size, len(partition.shape))
        factors = [size / n for size, n in zip(sizes, partition.shape, strict=False)]
    else:
        given, factor = f"scale_factor = {module.scale_factor}", module.scale_factor
        factors = [*factor] if isinstance(factor, tuple) else [float(factor or 0.0)] * len(partition.shape)
    if len(factors) != len(partition.shape) or any(factor < 1 or factor != int(factor) for factor in factors):
        raise ConfigurationError(f"{given}: must make whole multiples of the grid {partition.shape}")
    return tuple(int(factor) for factor in factors)


def _check_rules(partition: GridPartition, width: Sequence[int], argument: str, rule: Rule | None) -> None:
    """Raise `ConfigurationError` unless torch's padding of a layer is the boundary rule of the partition."""
    for axis, beyond, points in zip(partition.axes, partition.boundary, width, strict=True):
        if points and beyond != rule:
            raise ConfigurationError(
                f"{argument}: must be the partition's rule, {beyond!r} for {axis}{_in_torch(beyond)}"
            )


def _in_torch(rule: Rule) -> str:
    name = next((theirs for theirs, ours in _RULES.items() if ours == rule), None)
    return " (which torch has no name for)" if name is None else f" (torch's name: {name!r})"


def _place(name: str) -> str:
    return f"layer {name!r}" if name else "the module"
