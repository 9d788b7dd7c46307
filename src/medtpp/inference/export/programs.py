"""Export to torch.export and ONNX."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from medtpp.adapter import Adapter
from medtpp.files import atomic
from medtpp.inference.export.network import (
    IMAGES,
    PROBABILITIES,
    ExportedNetwork,
    Written,
    difference,
    example,
    exported_network,
)

log = logging.getLogger(__name__)

OPSET = 20


def write_program(adapter: Adapter, folder: Path) -> Written:
    """model.pt2: load it by `torch.export.load(path).module()`."""
    path = folder / "model.pt2"
    program, batch = export_program(adapter, exported_network(adapter))
    save_program(program, path)
    found = difference(adapter, torch.export.load(path).module(), batch=batch)
    return Written((path.name,), batch, found, {"load": 'torch.export.load("model.pt2").module()'})


def write_onnx(adapter: Adapter, folder: Path) -> Written:
    """model.onnx: run it by `onnxruntime.InferenceSession(path)`."""
    import onnx
    import onnxruntime

    path = folder / "model.onnx"
    program, batch = export_program(adapter, exported_network(adapter))
    converted = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=[IMAGES],
        output_names=[PROBABILITIES],
        verbose=False,
    )
    if converted is None:
        raise RuntimeError("torch.onnx.export gave no program")
    model = converted.model_proto
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:  # torch numbers its symbols
                axis.dim_param = re.sub(r"\bs\d+\b", "batch", axis.dim_param)
    for node in model.graph.node:
        del node.metadata_props[:]  # paths on this machine
    with atomic(path) as temporary:
        onnx.save(model, temporary)  # one file; protobuf holds up to 2 GB
    onnx.checker.check_model(path)

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {IMAGES: images.numpy()})[0])

    return Written((path.name,), batch, difference(adapter, run, batch=batch), {"opset": OPSET})


def export_program(adapter: Adapter, network: ExportedNetwork) -> tuple[ExportedProgram, bool]:
    """The network's operations and weights, and whether batches may have any size; else one image."""
    try:
        any_size = ({0: Dim("batch", min=1)},)
        program, batch = torch.export.export(network, (example(adapter, 2),), dynamic_shapes=any_size), True
    except RuntimeError as error:  # torch's own class for it is private
        log.debug("the batch size is fixed at 1: %s", error)
        program, batch = torch.export.export(network, (example(adapter, 1),)), False
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths on this machine, which would be saved
    return program, batch


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write a .pt2 file, whole or not at all."""
    with atomic(path) as temporary:
        torch.export.save(program, temporary)
