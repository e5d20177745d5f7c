"""A vision transformer as ONNX Runtime and OpenVINO run it, the slim one in three forms.

Neither knows heads of unequal widths. So a slim attention is written as groups of heads that are
equally wide once padded with zeros, one product of scores for each group:

    padded    one group, padded to the widest head
    looped    a group for each head, nothing padded
    grouped   heads of the same width once rounded up to 16

What can be done beforehand is done beforehand: weights are put in order and padded, the scale is
in the queries' weights, heads of width 0 are left out, the batch is a constant to the runtime.
On DeiT-T this was as fast as scaled_dot_product_attention in ONNX (opset 18, decomposed; 23, one
Attention) or OpenVINO's reading of the PyTorch model, or faster; ONNX Runtime's optimizer for
transformers made it slower.
"""

import copy
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import shapes
import torch
import torch.nn.functional as F
from harness import Absent, Contender
from torch import Tensor, nn

NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
FORMS = ("padded", "looped", "grouped")
# The first opset with Gelu.
OPSET = 20
# Of the outputs, relative to the largest.
TOLERANCE = 1e-3

Group = tuple[list[int], int]


class GroupedAttention(nn.Module):
    """Attention over groups of heads of equal width.

    Args:
        attn: timm's Attention or a SlimAttention.
        head_dims: The widths of its heads.
        groups: For each group its heads and the width they are padded to.
    """

    def __init__(self, attn: nn.Module, head_dims: Sequence[int], groups: list[Group]) -> None:
        super().__init__()
        self.groups = [(len(heads), width) for heads, width in groups]
        total, rows, columns, scales = sum(head_dims), [], [], []
        for heads, width in groups:
            places = []  # total stands for a zero
            for head in heads:
                begin = sum(head_dims[:head])
                places += range(begin, begin + head_dims[head])
                places += [total] * (width - head_dims[head])
            columns += places
            for part in range(3):
                rows += [3 * total if p == total else part * total + p for p in places]
                scales += [attn.scale if part == 0 else 1.0] * len(places)
        scale = torch.tensor(scales)
        self.qkv, self.proj = nn.Linear(1, 1), nn.Linear(1, 1)
        weight, bias = attn.qkv.weight.detach(), attn.qkv.bias.detach()
        self.qkv.weight.data = F.pad(weight, (0, 0, 0, 1))[rows] * scale.unsqueeze(1)
        self.qkv.bias.data = F.pad(bias, (0, 1))[rows] * scale
        self.proj.weight.data = F.pad(attn.proj.weight.detach(), (0, 1))[:, columns]
        self.proj.bias.data = attn.proj.bias.detach()

    def forward(self, x: Tensor, **_: object) -> Tensor:
        """Maps x [B, N, C] to [B, N, C]."""
        batch, tokens, _ = x.shape
        outs = []
        parts = self.qkv(x).split([3 * heads * width for heads, width in self.groups], 2)
        for part, (heads, width) in zip(parts, self.groups, strict=True):
            q, k, v = part.view(batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
            out = (q @ k.mT).softmax(-1) @ v  # [B, heads, N, width]
            outs.append(out.transpose(1, 2).reshape(batch, tokens, heads * width))
        return self.proj(torch.cat(outs, 2))


def in_form(model: nn.Module, form: str) -> nn.Module:
    """Returns a copy of a dense or slim model with every attention in one of the FORMS."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for block in model.blocks:
        attn = block.attn
        widths = getattr(attn, "head_dims", None) or [attn.head_dim] * attn.num_heads
        block.attn = GroupedAttention(attn, widths, _groups(widths, form))
    return model


def _groups(widths: Sequence[int], form: str) -> list[Group]:
    heads = [head for head, width in enumerate(widths) if width > 0]
    if form == "looped":
        return [([head], widths[head]) for head in heads]
    if form == "padded":
        return [(heads, max(widths))]
    by_width: dict[int, list[int]] = {}
    for head in heads:
        by_width.setdefault(-(-widths[head] // 16) * 16, []).append(head)
    return [(some, width) for width, some in sorted(by_width.items())]


def why_no_export() -> str | None:
    """Returns why no model can be written as ONNX, None if it can."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    return f"{missing[0]} is not installed (make bench-cpu does that)" if missing else None


def write(model: nn.Module, path: Path) -> None:
    """Writes a model as ONNX, for any batch size, unless the file is there."""
    if path.exists():
        return
    program: Any = torch.onnx.export(
        model,
        # A batch of 1 would be taken for a constant.
        (torch.randn(2, 3, shapes.IMAGE, shapes.IMAGE),),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
    )
    path.write_bytes(program.model_proto.SerializeToString())


def contenders(
    model: nn.Module, label: str, forms: Sequence[str], folder: Path, images: Tensor, threads: int
) -> dict[str, Contender | Absent]:
    """Returns a model in every runtime and form, each checked against the model.

    Args:
        model: Dense or slim, for what the calls must return.
        label: Names the model among the files in `folder`.
        forms: Some of FORMS; only one needs no name in the table.
        folder: For the ONNX files, which later calls find there.
        images: [B, 3, H, W].
        threads: For each runtime.
    """
    found: dict[str, Contender | Absent] = {}
    for form in forms:
        path = folder / f"{label}-{form}.onnx"
        reason = why_no_export()
        if reason is None:
            write(in_form(model, form), path)
        for package, session in (("onnxruntime", _onnxruntime), ("openvino", _openvino)):
            name = NAMES[package] if len(forms) == 1 else f"{NAMES[package]}, {form}"
            if importlib.util.find_spec(package) is None:
                reason = reason or f"{package} is not installed (make bench-cpu does that)"
            if reason is not None:
                found[name] = Absent(reason)
                continue
            call = session(path, images, threads)
            _check(name, torch.from_numpy(call()), model(images))
            found[name] = Contender(call)
    return found


def _onnxruntime(path: Path, images: Tensor, threads: int) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_free_dimension_override_by_name("batch", len(images))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"images": images.numpy()}
    return lambda: session.run(None, feed)[0]


def _openvino(path: Path, images: Tensor, threads: int) -> Callable[[], Any]:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(list(images.shape))
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    feed = {0: images.numpy()}
    return lambda: request.infer(feed, share_inputs=True)[0]


def _check(name: str, actual: Tensor, expected: Tensor) -> None:
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error < TOLERANCE, f"{name} differs from the model by {error:.2g}"
