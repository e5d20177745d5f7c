"""`pack`: a vision transformer for inference on the CPU, its weights laid out for the kernel."""

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import VitslimError
from ..ops import vit_encoder
from .layout import packed_arrays, start_tokens, takes_any_size
from .packable import ENCODED, check_packable
from .watch import Watch

_ARRAYS = ("start", "vectors", "panels", "layout")
# Methods of timm that run single blocks, which a model without its source has not.
_OF_BLOCKS = ("forward_intermediates", "get_intermediate_layers")
_FORGOTTEN = "this model was packed with keep_source=False, which forgets the weights"


def pack(
    model: VisionTransformer,
    weights: torch.dtype = torch.float32,
    products: torch.dtype = torch.float32,
    keep_source: bool = True,
) -> "PackedVisionTransformer":
    """Returns the model as one kernel call, from the image to the tokens that its head reads.

    Outputs are the model's, up to rounding. Positions for class and patch tokens, blocks and norms
    are packed; the pooling and the head stay timm's. The model itself is left as it is.

    Args:
        model: ViT, DeiT, distilled, DeiT-III, CLIP and so on, dense or slim, in float32 on the CPU.
        weights: torch.bfloat16 halves the memory of the weights; arithmetic stays float32.
        products: torch.bfloat16 also rounds what meets a weight, for processors that multiply
            bfloat16 pairs. Needs weights=torch.bfloat16.
        keep_source: Keep `model` beside the packed weights, for `state_dict` and the methods of
            timm that run single blocks. Other tensors and modules in it, and tensors changed in
            place, are noticed at the next call, for which it looks at all of them: up to 0.3 ms,
            which keep_source=False saves. Call `repack` after changing a single tensor
            through `parameter.data`, which torch does not count, or a part's settings (`norm.eps`).
            Without the source, drop your own reference too, and the weights are held once.

    Raises:
        VitslimError: The model cannot be packed; the sentence says why.
    """
    if isinstance(model, PackedVisionTransformer):
        raise VitslimError("this model is packed already; pack its source, which is model.source")
    for name, dtype in (("weights", weights), ("products", products)):
        if dtype not in (torch.float32, torch.bfloat16):
            raise VitslimError(f"{name} must be torch.float32 or torch.bfloat16, got {dtype}")
    if products == torch.bfloat16 and weights != torch.bfloat16:
        raise VitslimError(
            "products=torch.bfloat16 needs weights=torch.bfloat16: pairs of bfloat16 are multiplied"
        )
    return PackedVisionTransformer(model, weights, products, keep_source)


class PackedVisionTransformer(nn.Module):
    """A packed model, in eval mode for good; made by `pack`.

    Attributes that it has not itself are its source's, so that it passes for the timm model that
    it was made of. Its buffers are what `ops.vit_encoder` takes.

    Attributes:
        source: The model that was packed; with keep_source=False its skeleton on "meta".
        start: [N, C].
        vectors: 1-D.
        panels: 1-D, in float32 or bfloat16.
        layout: 1-D, int64.
    """

    def __init__(
        self,
        model: VisionTransformer,
        weights: torch.dtype = torch.float32,
        products: torch.dtype = torch.float32,
        keep_source: bool = True,
    ) -> None:
        super().__init__()
        self._weights, self._products, self._keep_source = weights, products, keep_source
        self._lock = threading.RLock()
        self._watch: Watch | None = None
        for name in _ARRAYS:
            self.register_buffer(name, None, persistent=False)
        self._pack(model)
        self.eval()

    def _pack(self, model: VisionTransformer) -> None:
        """Packs `model` and takes it, or its skeleton, for the source."""
        check_packable(model)
        # Looked at first, so that what another thread changes meanwhile is seen at the next call.
        watch = Watch(model) if self._keep_source else None
        # What is made in inference mode could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            arrays, start = packed_arrays(model, self._weights), start_tokens(model)
            source = model if self._keep_source else _with_parameters(model, _ghost)
            head = {
                name: _with_parameters(child, _shared).eval()
                for name, child in model.named_children()
                if name not in ENCODED
            }
        # Not as a submodule: neither `parameters` nor torch.export shall see it.
        self.__dict__["source"] = source
        self._kind = type(model)
        self._size = None if takes_any_size(model) else tuple(model.patch_embed.img_size)
        self._patch = tuple(model.patch_embed.patch_size)
        self._chans = int(model.patch_embed.proj.in_channels)
        self._kept, self._read = arrays.kept, _rows_read(model)
        self._plain_head = self._read == 1 and _is_plain(model)
        self._starts: dict[tuple[int, int], Tensor] = {tuple(model.patch_embed.img_size): start}
        packed = (start, arrays.vectors, arrays.panels, arrays.layout)
        # Each in one step, for a thread that is just taking them.
        self._modules = head
        self._buffers = dict(zip(_ARRAYS, packed, strict=True))
        self._watch = watch

    def repack(self) -> None:
        """Packs the source again; a call does so by itself where it notices a change."""
        if not self._keep_source:
            raise VitslimError(f"{_FORGOTTEN}; use load_state_dict, or pack a model again")
        with self._lock:
            self._pack(self.source)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images [B, in_chans, H, W] to what the source returns, [B, num_classes] mostly."""
        tokens = self._encode(x, self._refreshed()._read)
        if not self._plain_head:
            return self._head(tokens)
        # All that timm's forward_head comes to, without the half millisecond that its modules take
        # where a large model has just driven them out of the cache.
        out: Tensor = self.head(tokens[:, 0])
        return out

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps images [B, in_chans, H, W] to all tokens after the last norm, [B, N, C]."""
        self._refreshed()
        return self._encode(x, None)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """timm's pooling and head on tokens [B, N, C]."""
        return self._refreshed()._head(x, pre_logits)

    def pool(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """timm's pooling of tokens [B, N, C]."""
        out: Tensor = self._kind.pool(self, x, *args, **kwargs)
        return out

    def _head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        # timm's own method, which finds the head's modules here.
        out: Tensor = self._kind.forward_head(self, tokens, pre_logits)
        return out

    def _encode(self, images: Tensor, rows: int | None) -> Tensor:
        height, width = self._checked_size(images)
        buffers = self._buffers
        start = buffers["start"]
        if self._size is None:
            start = self._start_for(height, width)
        down, across = height // self._patch[0], width // self._patch[1]
        if rows is None:
            rows = start.shape[0] if self._kept is None else self._kept
        images = images[..., : down * self._patch[0], : across * self._patch[1]]
        arrays = (buffers["vectors"], buffers["panels"], buffers["layout"])
        return vit_encoder(images, start, *arrays, rows, self._products == torch.bfloat16)

    def _start_for(self, height: int, width: int) -> Tensor:
        """Returns the start of images of any size, made once for each size."""
        start = self._starts.get((height, width))
        if start is None:
            if torch.compiler.is_compiling():
                raise VitslimError(
                    f"images of {height} x {width} were not seen before compiling: run the packed "
                    "model once on such images, and then compile it"
                )
            if not self._keep_source:
                raise VitslimError(f"{_FORGOTTEN}; images of {height} x {width} need them")
            with torch.inference_mode(False):
                start = self._starts[height, width] = start_tokens(self.source, (height, width))
        return start

    def _checked_size(self, images: Tensor) -> tuple[int, int]:
        shape, channels = list(images.shape), self._chans
        if images.dim() != 4 or shape[1] != channels:
            raise VitslimError(f"images must be [batch, {channels}, height, width], got {shape}")
        height, width = images.shape[2:]
        if self._size is not None and self._size != (height, width):
            fixed = f"{self._size[0]} x {self._size[1]}"
            raise VitslimError(f"this model takes images of {fixed}, got {height} x {width}")
        if self._size is None and (height % self._patch[0] or width % self._patch[1]):
            raise VitslimError(
                f"images of {height} x {width} cannot be cut into patches of "
                f"{self._patch[0]} x {self._patch[1]}; resize them"
            )
        if images.dtype != torch.float32 or images.device.type != "cpu":
            raise VitslimError(
                f"packed models take float32 images on the CPU, got {images.dtype} on "
                f"{images.device}; call .to('cpu', torch.float32) on them"
            )
        return height, width

    def _refreshed(self) -> "PackedVisionTransformer":
        """Packs again if the source has changed. A compiled graph holds what was packed before."""
        if not torch.compiler.is_compiling() and self._changed():
            with self._lock:
                if self._changed():
                    self._pack(self.source)
        return self

    def _changed(self) -> bool:
        return self._watch is not None and self._watch.changed()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the source's state dict."""
        if not self._keep_source:
            raise VitslimError(f"{_FORGOTTEN}; save the model before it is packed")
        return self.source.state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads the source's state dict, and packs it. Arguments and result are torch's."""
        with self._lock:
            if self._keep_source:
                result = self.source.load_state_dict(state_dict, strict, assign)
                self._pack(self.source)
                return result
            # A skeleton takes tensors only as its own, in the precision of the packed model.
            own = {
                name: value.detach().to("cpu", torch.float32, copy=True)
                if value.is_floating_point()
                else value
                for name, value in state_dict.items()
            }
            model = copy.deepcopy(self.source)
            result = model.load_state_dict(own, strict, assign=True)
            missing = [name for name, each in model.named_parameters() if each.is_meta]
            if missing:
                raise VitslimError(f"{_FORGOTTEN}; a state dict without {missing[0]} is not enough")
            self._pack(model)
            return result

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads a packed model that is part of another model."""
        own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        try:
            missing, unexpected = self.load_state_dict(own, False, assign)
        except RuntimeError as error:
            error_msgs.append(str(error))
            return
        missing_keys += [prefix + name for name in missing]
        unexpected_keys += [prefix + name for name in unexpected]

    def train(self, mode: bool = True) -> "PackedVisionTransformer":
        """Stays in eval mode; asking for another one raises."""
        if mode:
            raise VitslimError(
                "a packed model is for inference: train the model, and pack it again"
            )
        super().train(False)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedVisionTransformer":
        try:
            probe = fn(torch.empty(0))
        except (RuntimeError, AssertionError) as error:
            raise VitslimError(f"a packed model stays in float32 on the CPU: {error}") from error
        if probe.device.type != "cpu" or probe.dtype != torch.float32:
            raise VitslimError(
                f"a packed model stays in float32 on the CPU, it cannot go to {probe.dtype} on "
                f"{probe.device}; move the model that was packed"
            )
        return self

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        for kind in ("_modules", "_buffers"):
            if name in own.get(kind, ()):
                return own[kind][name]
        source = own.get("source")
        if source is None or not hasattr(source, name):
            return super().__getattr__(name)  # which raises
        if name in _OF_BLOCKS and not self._keep_source:
            raise VitslimError(f"{_FORGOTTEN}; {name} needs them")
        return getattr(source, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedVisionTransformer":
        if self._keep_source:
            source = copy.deepcopy(self.source, memo)
            twin = type(self)(source, self._weights, self._products)
        else:
            twin = type(self).__new__(type(self))
            state = {name: value for name, value in vars(self).items() if name != "_lock"}
            twin.__dict__.update(copy.deepcopy(state, memo), _lock=threading.RLock())
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise VitslimError(
            "a packed model is not pickled: vitslim.save its source, and pack it when it is loaded"
        )

    def extra_repr(self) -> str:
        return f"weights={self._weights}, products={self._products}"


def _rows_read(model: VisionTransformer) -> int | None:
    """Returns how many leading tokens the head reads, None for all."""
    if isinstance(model, VisionTransformerDistilled):
        return 2
    return 1 if model.attn_pool is None and model.global_pool == "token" else None


def _is_plain(model: VisionTransformer) -> bool:
    """Returns whether nothing but the classifier comes after the class token."""
    silent = type(model.fc_norm) is nn.Identity and type(model.head_drop) is nn.Dropout
    hooks = (model.fc_norm._forward_hooks, model.head_drop._forward_hooks)
    return silent and not any(hooks)


def _with_parameters(module: nn.Module, new: Callable[[Tensor], nn.Parameter]) -> Any:
    """Returns a copy of a module in which `new(p)` stands for each parameter p."""
    memo: dict[int, Any] = {id(each): new(each) for each in module.parameters()}
    return copy.deepcopy(module, memo)


def _shared(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), requires_grad=False)


def _ghost(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
