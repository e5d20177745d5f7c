"""Writes a model for other runtimes, torch.export or ONNX, and checks that it computes the same."""

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from timm.layers.config import is_exportable, set_exportable
from torch import Tensor, nn

from ..errors import VitslimError
from ..files import atomic_write
from .latency import evaluating, example_input

logger = logging.getLogger(__name__)

# Largest difference accepted after export, relative to the largest output.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def export(
    model: nn.Module,
    path: str | Path,
    format: Literal["pt2", "onnx"] = "pt2",
    batch_size: int | None = None,
) -> float:
    """Exports a model, runs the exported file once and compares it with the model.

    Args:
        model: A dense, masked or slim vision transformer. It is left as it is.
        path: File to write. It appears whole and verified, or not at all.
        format: `"pt2"` for torch.export, `"onnx"` for ONNX.
        batch_size: The only batch size the file takes; None lets the file take any.

    Returns:
        The largest absolute difference between the outputs of the file and of the model.
    """
    exporters = {"pt2": _to_pt2, "onnx": _to_onnx}
    if format not in exporters:
        raise VitslimError(f"format must be one of {', '.join(exporters)}, not {format!r}")
    if batch_size is not None and batch_size < 1:
        raise VitslimError(f"batch_size must be at least 1 or None, not {batch_size}")
    exportable = is_exportable()  # type: ignore[no-untyped-call]
    set_exportable(True)
    try:
        with evaluating(model), torch.no_grad():
            # torch.export takes a traced batch of 1 for a constant, hence 2 for a free batch size.
            traced = example_input(model, batch_size or 2)
            content, run = exporters[format](model, traced, batch_size is None)
            images = example_input(model, batch_size or 3)
            difference = _compare(run(images), model(images), format)
    finally:
        set_exportable(exportable)
    atomic_write(Path(path), content)
    logger.info("%s: %s, largest absolute difference %.2g", path, format, difference)
    return difference


def _to_pt2(
    model: nn.Module, images: Tensor, dynamic: bool
) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    program = torch.export.export(model, (images,), dynamic_shapes=_free_batch(dynamic))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    content = buffer.getvalue()
    return content, torch.export.load(io.BytesIO(content)).module()


def _to_onnx(
    model: nn.Module, images: Tensor, dynamic: bool
) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise VitslimError(
            "ONNX export needs packages that are not installed: "
            "run `pip install onnxscript onnxruntime`"
        ) from None
    program: Any = torch.onnx.export(
        model,
        (images,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=_free_batch(dynamic),
        dynamo=True,
        verbose=False,
    )
    content = program.model_proto.SerializeToString()
    return content, lambda batch: _run_onnx(content, batch)


def _free_batch(dynamic: bool) -> tuple[dict[int, Any]] | None:
    return ({0: torch.export.Dim("batch", min=1)},) if dynamic else None


def _run_onnx(content: bytes, images: Tensor) -> Tensor:
    """Runs an ONNX file with ONNX Runtime where it is installed, else with ONNX's own evaluator."""
    feed = {"images": images.cpu().numpy()}
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        return torch.from_numpy(ReferenceEvaluator(content).run(None, feed)[0])
    session = InferenceSession(content, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, feed)[0])


def _compare(actual: Tensor, expected: Tensor, format: str) -> float:
    expected = expected.double().cpu()
    difference = float((actual.double().cpu() - expected).abs().max())
    allowed = TOLERANCE[actual.dtype] * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:
        raise VitslimError(
            f"the exported {format} model differs from the model by {difference:.2g}, at most "
            f"{allowed:.2g} is accepted, so nothing was written"
        )
    return difference
