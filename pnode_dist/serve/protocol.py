"""UM-Bridge's protocol 1.0: the requests, checked before any rank computes, and the answers.

The checks run on the threads of rank 0 that receive requests. A request that passes them is a `Call`, which every rank
computes with the same arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.serve import strict_json
from pnode_dist.train.served_model import EVALUATE, GRADIENT, HESSIAN, JACOBIAN, OPERATIONS, ServedModel

VERSION = 1.0
INFO = "/Info"
QUERIES = ("/ModelInfo", "/InputSizes", "/OutputSizes")
PATHS = (*QUERIES, *(f"/{operation}" for operation in OPERATIONS))
"""The paths of POST requests."""

_INDICES = {
    EVALUATE: (),
    GRADIENT: ("outWrt", "inWrt"),
    JACOBIAN: ("outWrt", "inWrt"),
    HESSIAN: ("outWrt", "inWrt1", "inWrt2"),
}
_VECTORS = {EVALUATE: (), GRADIENT: ("sens",), JACOBIAN: ("vec",), HESSIAN: ("sens", "vec")}

Vector = npt.NDArray[np.float64]


class RequestError(Exception):
    """An answer that is an error of the protocol: HTTP status, type and message, and further headers."""

    def __init__(self, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.headers = status, kind, message, dict(headers or {})


def invalid_input(message: str) -> RequestError:
    """Return the error of a request that is not one, or that does not fit the model."""
    return RequestError(400, "InvalidInput", message)


def invalid_output(message: str) -> RequestError:
    """Return the error of a model that has no valid answer to a valid request."""
    return RequestError(500, "InvalidOutput", message)


@dataclass(frozen=True)
class Call:
    """One of the four operations of a model with checked arguments.

    `indices` are those of output and inputs, `vectors` the given `sens` and `vec`, in the protocol's order. `sizes` are
    the lengths of the vectors of the answer.
    """

    operation: str
    model: str
    config: Mapping[str, Any]
    inputs: Sequence[Vector]
    indices: tuple[int, ...]
    vectors: Sequence[Vector]
    sizes: tuple[int, ...]


def information(models: Mapping[str, ServedModel]) -> dict[str, Any]:
    """Return the answer to `/Info`."""
    return {"protocolVersion": VERSION, "models": list(models)}


def answered_at_once(path: str, body: Any, models: Mapping[str, ServedModel]) -> dict[str, Any]:
    """Return the answer to one of `QUERIES`, which needs no computation. Raises `RequestError`."""
    model = _model(body, models)
    if path == "/ModelInfo":
        # Clients may add the configuration here too, which changes nothing.
        _check_keys(body, ("name", "config"))
        return {"support": {operation: model.refusal(operation) is None for operation in OPERATIONS}}
    config = _config(body)
    _check_keys(body, ("name", "config"))
    sizes = _sizes(model.input_sizes if path == "/InputSizes" else model.output_sizes, config)
    return {"inputSizes" if path == "/InputSizes" else "outputSizes": list(sizes)}


def checked_call(operation: str, body: Any, models: Mapping[str, ServedModel]) -> Call:
    """Return the call that a request asks for. Raises `RequestError`, for the first of its mistakes."""
    model = _model(body, models)
    refusal = model.refusal(operation)
    if refusal is not None:
        raise RequestError(400, "UnsupportedFeature", f"{operation}: {refusal}")
    config = _config(body)
    _check_keys(body, ("name", "config", "input", *_INDICES[operation], *_VECTORS[operation]))
    inputs_sizes, output_sizes = _sizes(model.input_sizes, config), _sizes(model.output_sizes, config)
    given = body.get("input")
    if not isinstance(given, list) or len(given) != len(inputs_sizes):
        raise invalid_input(f"input: must be a list of {len(inputs_sizes)} vectors, one for each input of the model")
    inputs = [
        _vector(f"input[{number}]", value, size)
        for number, (value, size) in enumerate(zip(given, inputs_sizes, strict=True))
    ]
    limits = {name: output_sizes if name == "outWrt" else inputs_sizes for name in _INDICES[operation]}
    indices = {name: _index(name, body.get(name), len(sizes)) for name, sizes in limits.items()}
    lengths = {name: limits[name][index] for name, index in indices.items()}
    # The adjoint starts in the output, a tangent in the input that is differentiated last.
    wanted = {"sens": lengths.get("outWrt"), "vec": lengths.get("inWrt2", lengths.get("inWrt"))}
    vectors = [_vector(name, body.get(name), wanted[name] or 0) for name in _VECTORS[operation]]
    if operation == EVALUATE:
        sizes = output_sizes
    else:
        sizes = (lengths["outWrt"] if operation == JACOBIAN else lengths.get("inWrt1", lengths.get("inWrt", 0)),)
    return Call(operation, model.name, config, inputs, tuple(indices.values()), vectors, sizes)


def computed(call: Call, models: Mapping[str, ServedModel]) -> list[Vector]:
    """Compute a call, the same vectors on every rank. Collective on the world. Raises the errors of the model."""
    model = models[call.model]
    inputs = [torch.from_numpy(value) for value in call.inputs]
    vectors = [torch.from_numpy(value) for value in call.vectors]
    if call.operation == EVALUATE:
        found = model.evaluate(inputs, call.config)
    else:
        operation: Any = {
            GRADIENT: model.gradient,
            JACOBIAN: model.apply_jacobian,
            HESSIAN: model.apply_hessian,
        }[call.operation]
        found = [operation(*call.indices, inputs, *vectors, call.config)]
    return [value.detach().double().numpy() for value in found]


def answer(call: Call, vectors: Sequence[Vector]) -> dict[str, Any]:
    """Return the answer to a call. Raises `RequestError` if the model's result is not one."""
    lengths = tuple(len(vector) for vector in vectors)
    if lengths != call.sizes:
        raise invalid_output(f"{call.model}: returned vectors of lengths {lengths}: must be {call.sizes}")
    for number, vector in enumerate(vectors):
        wrong = np.flatnonzero(~np.isfinite(vector))
        if len(wrong):
            raise invalid_output(f"{call.model}: {vector[wrong[0]]} in entry {wrong[0]} of output {number}")
    found = [vector.tolist() for vector in vectors]
    return {"output": found if call.operation == EVALUATE else found[0]}


def _model(body: Any, models: Mapping[str, ServedModel]) -> ServedModel:
    if not isinstance(body, dict):
        raise invalid_input("the request must be a JSON object")
    name = body.get("name")
    if not isinstance(name, str):
        raise invalid_input("name: must be the name of a model, a string")
    if name not in models:
        raise RequestError(400, "ModelNotFound", f"name = {name[:60]!r}: must be one of {', '.join(models)}")
    return models[name]


def _config(body: dict[str, Any]) -> dict[str, Any]:
    config = body.get("config", {})
    if not isinstance(config, dict):
        raise invalid_input("config: must be a JSON object")
    return config


def _check_keys(body: dict[str, Any], known: Sequence[str]) -> None:
    for key in body:
        if key not in known:
            raise invalid_input(f"unknown key {key[:60]!r}: must be one of {', '.join(known)}")


def _sizes(sizes: Any, config: Mapping[str, Any]) -> tuple[int, ...]:
    try:
        return tuple(sizes(config))
    except ConfigurationError as error:
        raise invalid_input(str(error)) from None


def _index(name: str, value: Any, count: int) -> int:
    if type(value) is not int or not 0 <= value < count:
        raise invalid_input(f"{name}: must be an integer from 0 to {count - 1}")
    return value


def _vector(name: str, value: Any, size: int) -> Vector:
    if not isinstance(value, list) or len(value) != size:
        found = f"has {len(value)}" if isinstance(value, list) else "is not a list"
        raise invalid_input(f"{name}: must be a list of {size} numbers, and {found}")
    numbers = [strict_json.number(entry) for entry in value]
    for position, entry in enumerate(numbers):
        if entry is None:
            raise invalid_input(f"{name}: entry {position} is not a finite number")
    return np.array(numbers, dtype=np.float64)
