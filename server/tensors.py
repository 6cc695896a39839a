"""Tensors of the Open Inference Protocol (v2): bodies of requests, and values as JSON or as bytes.

Texts come in and labels go out as BYTES; numbers go out as FP32. With the protocol's binary extension the
bytes of tensors follow the JSON in the order of the tensors: of each text its length, then UTF-8.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from server.errors import ErrorKind, ServiceError
from server.schemas import Body, Text, Texts
from server.settings import MAX_INPUTS

LENGTH = struct.Struct("<I")
"""In front of each text: its number of bytes."""

Name = Annotated[Text, Field(min_length=1, max_length=64)]


class InputParameters(Body):
    binary_data_size: Annotated[int, Field(ge=0, le=2**31)] | None = None


class InputTensor(Body):
    """Texts, of shape [n] or [n, 1]; `data` may be nested by its shape."""

    name: Literal["text", "text_pair"]
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**20)]], Field(min_length=1, max_length=2)]
    datatype: Literal["BYTES"]
    parameters: InputParameters | None = None
    data: Annotated[list[Text | Texts], Field(max_length=MAX_INPUTS)] | None = None

    @property
    def binary_size(self) -> int | None:
        return None if self.parameters is None else self.parameters.binary_data_size


class OutputParameters(Body):
    binary_data: bool = False


class RequestedOutput(Body):
    name: Name
    parameters: OutputParameters | None = None


class InferParameters(Body):
    binary_data_output: bool = False


class InferRequest(Body):
    """`POST /v2/models/{model}/infer`."""

    id: Annotated[Text, Field(max_length=256)] | None = None
    parameters: InferParameters | None = None
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=2)]
    outputs: Annotated[list[RequestedOutput], Field(min_length=1, max_length=16)] | None = None

    def wants_binary(self, requested: RequestedOutput | None) -> bool:
        """Whether an output is to come as bytes: as its own parameter says, or else that of the request."""
        if requested is not None and requested.parameters is not None:
            return requested.parameters.binary_data
        return self.parameters is not None and self.parameters.binary_data_output


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of an answer, with its values in row-major order."""

    name: str
    datatype: Literal["FP32", "BYTES"]
    shape: tuple[int, ...]
    values: Sequence[float] | Sequence[str]

    def head(self) -> dict[str, Any]:
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}

    def to_bytes(self) -> bytes:
        if self.datatype == "FP32":
            return np.array(self.values, "<f4").tobytes()
        encoded = [str(value).encode() for value in self.values]
        return b"".join(LENGTH.pack(len(value)) + value for value in encoded)


def read_texts(tensors: Sequence[InputTensor], binary: bytes) -> dict[str, list[str]]:
    """The texts of each input by its name; `binary` is what follows the JSON of a request.

    Raises ServiceError naming the input whose data do not fit its shape.
    """
    texts: dict[str, list[str]] = {}
    for tensor in tensors:
        if tensor.name in texts:
            raise _invalid(tensor.name, "given twice")
        if (size := tensor.binary_size) is not None:
            values, binary = _split(tensor, binary[:size], size), binary[size:]
        else:
            values = _flat(tensor)
        if len(values) != prod(tensor.shape) or (len(tensor.shape) == 2 and tensor.shape[1] != 1):
            raise _invalid(tensor.name, f"{len(values)} texts do not fit the shape {tensor.shape}")
        texts[tensor.name] = values
    if binary:
        raise _invalid(tensors[-1].name, f"{len(binary)} bytes belong to no input")
    return texts


def _flat(tensor: InputTensor) -> list[str]:
    if tensor.data is None:
        raise _invalid(tensor.name, "neither data nor binary_data_size is given")
    return list(chain.from_iterable([entry] if isinstance(entry, str) else entry for entry in tensor.data))


def _split(tensor: InputTensor, binary: bytes, size: int) -> list[str]:
    """Texts that each have their length in front."""
    if tensor.data is not None:
        raise _invalid(tensor.name, "both data and binary_data_size are given")
    texts = []
    start = 0
    while start + LENGTH.size <= len(binary):
        [length] = LENGTH.unpack_from(binary, start)
        start += LENGTH.size
        texts.append(binary[start : start + length])
        start += length
    if start != size or len(binary) != size:
        raise _invalid(tensor.name, f"its {size} bytes do not hold whole texts")
    try:
        return [text.decode() for text in texts]
    except UnicodeDecodeError:
        raise _invalid(tensor.name, "not UTF-8") from None


def _invalid(name: str, problem: str) -> ServiceError:
    return ServiceError(ErrorKind.INVALID_REQUEST, f"input {name!r}: {problem}", param="inputs")
