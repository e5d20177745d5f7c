"""`pack`: a vision transformer for inference on the CPU, its weights laid out for the kernel."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import VitslimError
from ..families import family_of
from ..ops import vit_encoder
from ..wrapped import bare, copy_of, is_sharded
from .following import ARRAYS, FORGOTTEN, Following
from .layout import packed_arrays, start_tokens, takes_any_size, tokens_kept
from .starts import Starts

_FOR_INFERENCE = "a packed model is for inference: train the model, and pack it again"


def pack(
    model: nn.Module,
    weights: torch.dtype = torch.float32,
    products: torch.dtype = torch.float32,
    keep_source: bool = True,
) -> "PackedVisionTransformer":
    """Returns the model as one kernel call, from the image to the tokens that its head reads.

    Outputs are the model's in eval mode, up to rounding. Positions for class and patch tokens,
    blocks and norms are packed; the pooling and the head stay timm's. The model itself is left as
    it is.

    Args:
        model: ViT, DeiT, distilled, DeiT-III, CLIP and so on, dense or slim, in float32 on the
            CPU. Of one inside torch.compile, DistributedDataParallel or a moving average, the
            model inside is packed; one that FSDP2 has sharded is gathered into a copy first.
        weights: torch.bfloat16 halves the memory of the weights; arithmetic stays float32.
        products: torch.bfloat16 also rounds what meets a weight, for processors that multiply
            bfloat16 pairs. Needs weights=torch.bfloat16.
        keep_source: Keep `model` beside the packed weights, for `state_dict` and the methods of
            timm that run single blocks, and follow it: any change of its tensors, modules, hooks
            and settings is noticed at the next call, which packs again, or says why it cannot.
            That look takes up to 0.3 ms, which keep_source=False saves. Call `repack` after
            changing a single tensor in place where torch does not count it (`parameter.data`,
            numpy), after putting another tensor into a `bias.data`, and after any change before a
            graph made by torch.compile, which cannot look. Without the source, drop your own
            reference too, and the weights are held once; the head can still be changed.

    Raises:
        VitslimError: The model cannot be packed; the sentence says why.
    """
    model = bare(model)
    if isinstance(model, PackedVisionTransformer):
        raise VitslimError("this model is packed already; pack its source, which is model.source")
    for name, dtype in (("weights", weights), ("products", products)):
        if dtype not in (torch.float32, torch.bfloat16):
            raise VitslimError(f"{name} must be torch.float32 or torch.bfloat16, got {dtype}")
    if products == torch.bfloat16 and weights != torch.bfloat16:
        raise VitslimError(
            "products=torch.bfloat16 needs weights=torch.bfloat16: pairs of bfloat16 are multiplied"
        )
    if is_sharded(model):
        model = copy_of(model)
    return PackedVisionTransformer(model, weights, products, keep_source)


class _Facts(NamedTuple):
    """What a call has to know of the model.

    Attributes:
        kind: Its class.
        size: Of its images, None if it takes any.
        own_size: Of the images that it was made for.
        patch: Height and width.
        channels: Of the images.
        kept: How many tokens the last block returns, None for all.
        read: How many leading tokens the head reads, None for all.
        starts: Start tokens of other sizes than its own.
    """

    kind: type[nn.Module]
    size: tuple[int, int] | None
    own_size: tuple[int, int]
    patch: tuple[int, int]
    channels: int
    kept: int | None
    read: int | None
    starts: Starts


class PackedVisionTransformer(Following):
    """A packed model, in eval mode for good; made by `pack`.

    It passes for the timm model that it was made of, its source. What it has not itself is the
    source's, whatever is set on it is set on the source, and methods such as `reset_classifier` are
    the source's: the next call does what the source does then in eval mode, or raises.

    Its own are its hooks, names that start with an underscore, and the modules of its head. These
    share tensors and hooks with the source's and are in eval mode; what is put into them goes to
    the source's. They are what `children`, `modules` and `parameters` give, without gradients and
    as they were at the last call, and what a hook on the head is given. Its buffers are what
    `ops.vit_encoder` takes. It can be copied and pickled, and then brings its source.

    Attributes:
        source: The model that was packed; with keep_source=False its skeleton: the head's weights,
            and all others on "meta".
        start: [N, C].
        vectors: 1-D.
        panels: 1-D, in float32 or bfloat16.
        layout: 1-D, int64.
    """

    _facts: _Facts

    def __init__(
        self,
        model: nn.Module,
        weights: torch.dtype = torch.float32,
        products: torch.dtype = torch.float32,
        keep_source: bool = True,
    ) -> None:
        # Before torch's own, which leaves what it finds.
        self.__dict__.update(_weights=weights, _products=products)
        super().__init__(model, keep_source)

    def _make_arrays(self, model: nn.Module) -> dict[str, Tensor]:
        return dict(
            zip(ARRAYS, (start_tokens(model), *packed_arrays(model, self._weights)), strict=True)
        )

    def _make_facts(self, model: nn.Module) -> None:
        patches = model.patch_embed
        size = tuple(patches.img_size)
        self._facts = _Facts(
            kind=type(model),
            size=None if takes_any_size(model) else size,
            own_size=size,
            patch=tuple(patches.patch_size),
            channels=int(patches.proj.weight.shape[1]),
            kept=tokens_kept(model),
            read=family_of(model).rows_read(model),
            starts=Starts(lambda size: start_tokens(model, size)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps images [B, in_chans, H, W] to what the source returns, [B, num_classes] mostly."""
        self._follow()
        read = self._facts.read
        tokens = self._encode(x, read)
        if read != 1 or not self._is_plain():
            return self._head(tokens)
        # All that timm's forward_head comes to, without the half millisecond that its modules take
        # where a large model has just driven them out of the cache.
        out: Tensor = self._modules["head"](tokens[:, 0])
        return out

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps images [B, in_chans, H, W] to all tokens after the last norm, [B, N, C]."""
        self._follow()
        return self._encode(x, None)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """timm's pooling and head on tokens [B, N, C]."""
        self._follow()
        return self._head(x, pre_logits)

    def pool(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """timm's pooling of tokens [B, N, C]."""
        out: Tensor = self._facts.kind.pool(self, x, *args, **kwargs)
        return out

    def _head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        # timm's own method, which finds the head's modules here.
        out: Tensor = self._facts.kind.forward_head(self, tokens, pre_logits)
        return out

    def _is_plain(self) -> bool:
        """Returns whether nothing but the classifier comes after the class token."""
        modules = self._modules
        norm, drop, head = modules.get("fc_norm"), modules.get("head_drop"), modules.get("head")
        silent = _is_silent(norm, nn.Identity) and _is_silent(drop, nn.Dropout)
        return silent and head is not None

    def _encode(self, images: Tensor, rows: int | None) -> Tensor:
        facts, buffers = self._facts, self._buffers
        height, width = self._checked_size(images)
        start = buffers["start"]
        if (height, width) != facts.own_size:
            start = self._start_for(height, width)
        down, across = height // facts.patch[0], width // facts.patch[1]
        if rows is None:
            rows = start.shape[0] if facts.kept is None else facts.kept
        images = images[..., : down * facts.patch[0], : across * facts.patch[1]]
        arrays = (buffers["vectors"], buffers["panels"], buffers["layout"])
        return vit_encoder(images, start, *arrays, rows, self._products == torch.bfloat16)

    def _start_for(self, height: int, width: int) -> Tensor:
        """Returns the start of images of another size than the model's own."""
        starts = self._facts.starts
        if torch.compiler.is_compiling():
            start = starts.seen((height, width))
            if start is None:
                raise VitslimError(
                    f"images of {height} x {width} were not seen before compiling: run the packed "
                    "model once on such images, and then compile it"
                )
            return start
        if not self._keep_source:
            raise VitslimError(f"{FORGOTTEN}; images of {height} x {width} need them")
        return starts.get((height, width))

    def _checked_size(self, images: Tensor) -> tuple[int, int]:
        shape, facts = list(images.shape), self._facts
        if images.dim() != 4 or shape[1] != facts.channels:
            expected = f"[batch, {facts.channels}, height, width]"
            raise VitslimError(f"images must be {expected}, got {shape}")
        height, width = images.shape[2:]
        if facts.size is not None and facts.size != (height, width):
            fixed = f"{facts.size[0]} x {facts.size[1]}"
            raise VitslimError(f"this model takes images of {fixed}, got {height} x {width}")
        if facts.size is None and (height % facts.patch[0] or width % facts.patch[1]):
            raise VitslimError(
                f"images of {height} x {width} cannot be cut into patches of "
                f"{facts.patch[0]} x {facts.patch[1]}; resize them"
            )
        if images.dtype != torch.float32 or images.device.type != "cpu":
            raise VitslimError(
                f"packed models take float32 images on the CPU, got {images.dtype} on "
                f"{images.device}; call .to('cpu', torch.float32) on them"
            )
        return height, width

    def train(self, mode: bool = True) -> "PackedVisionTransformer":
        """Stays in eval mode; asking for another one raises."""
        if mode:
            raise VitslimError(_FOR_INFERENCE)
        super().train(False)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "PackedVisionTransformer":
        """Stays without gradients; asking for them raises."""
        if requires_grad:
            raise VitslimError(_FOR_INFERENCE)
        return self

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "PackedVisionTransformer":
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

    def extra_repr(self) -> str:
        return f"weights={self._weights}, products={self._products}"


def _is_silent(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    if module is None or type(module) is not kind or "forward" in vars(module):
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)
