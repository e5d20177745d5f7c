"""What is asked of a family of models; whoever asks names no class of timm."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ..plan import Plan


class Site(NamedTuple):
    """A block and where it stands.

    Attributes:
        name: Of the block in its model, such as "blocks.3".
        block: The module; it has `attn` and `mlp`.
        dim: Channels of the tokens in and out.
        tokens: Tokens that it computes, prefix tokens included, while none is dropped.
    """

    name: str
    block: Any
    dim: int
    tokens: int


class Half(NamedTuple):
    """A residual branch of a block: x + scale(layer(norm(x))).

    Attributes:
        kind: "attention" or "mlp".
        norm: What the branch begins with; it takes the gate of the block's tokens, if there is one.
        layer: The attention or the MLP.
        first: Its first layer, whose outputs are q, k and v of all heads, or the hidden units.
        last: Its last layer, which writes to the residual stream.
        scale: The layer scale, or an identity.
    """

    kind: str
    norm: nn.Module
    layer: Any
    first: Any
    last: Any
    scale: nn.Module


def head_width(sites: Iterable[Site]) -> int:
    """Returns the width of the widest head of dense or masked blocks, in dimensions."""
    layers = [site.block.attn for site in sites if hasattr(site.block, "attn")]
    return max((int(attn.proj.in_features) // int(attn.num_heads) for attn in layers), default=1)


class Family(ABC):
    """A family of timm models, dense, masked or slim.

    Attributes:
        title: For sentences: which models these are.
        model_types: timm's classes, the most special first.
        block_types: timm's classes of blocks that can be masked or cut.
        scale_type: timm's class of layer scales.
        kinds: The kinds of masks that make sense, of "attention", "mlp" and "token".
        masked_block: The block with token gates, made of (timm's block, gates).
        slim_block: The block that drops tokens, made of (timm's block, selection).
        masked_methods: A class with the methods of a model that differ while it is masked.
        slim_methods: Likewise while it is slim.
    """

    title: ClassVar[str]
    model_types: ClassVar[tuple[type[nn.Module], ...]]
    block_types: ClassVar[tuple[type[nn.Module], ...]]
    scale_type: ClassVar[type[nn.Module]]
    kinds: ClassVar[tuple[str, ...]]
    masked_block: ClassVar[type[nn.Module]]
    slim_block: ClassVar[type[nn.Module]]
    masked_methods: ClassVar[type]
    slim_methods: ClassVar[type]

    @abstractmethod
    def check(self, model: Any, kinds: tuple[str, ...] = (), done: str = "slimmed") -> None:
        """Raises VitslimError where a model of the family cannot be worked on at all.

        Args:
            model: Of this family.
            kinds: Of masks that are wanted.
            done: What would be done to the model, for the sentence.
        """

    @abstractmethod
    def sites(self, model: Any) -> list[Site]:
        """Returns all blocks in the order in which they are computed."""

    @abstractmethod
    def embed(self, model: Any, images: Tensor) -> Tensor:
        """Returns what enters the first block, [images, tokens, channels]."""

    @abstractmethod
    def halves(self, block: Any) -> tuple[Half, ...]:
        """Returns the residual branches of a block, dense, masked or slim, in their order.

        There are none of a block that is not the family's, which `skip` leaves in a model.
        """

    @abstractmethod
    def why_not_tokens(self, block: Any, token_gate: str) -> str | None:
        """Returns why the tokens of a block cannot be gated, or None if they can."""

    @abstractmethod
    def grid(self, model: Any) -> tuple[int, int]:
        """Returns the patches of an image, down and across."""

    @abstractmethod
    def num_prefix_tokens(self, model: Any) -> int:
        """Returns how many tokens come before the patches: class, distillation, register."""

    @abstractmethod
    def input_shape(self, model: Any) -> tuple[int, int, int]:
        """Returns the size of one image, [channels, height, width]."""

    @abstractmethod
    def ends(self, model: Any) -> tuple[int, int]:
        """Returns the MACs before and after the blocks: fixed ones, and those per final token."""

    @abstractmethod
    def describe(self, model: Any) -> dict[str, Any]:
        """Returns {"model", "args"}: timm's name and arguments, of the model as it stands.

        What these cannot say, such as an activation put in later, is not in them.
        """

    @abstractmethod
    def grid_of(self, base: Mapping[str, Any]) -> tuple[int, int]:
        """Returns the grid of patches of a model that `describe` told of."""

    @abstractmethod
    def check_plan(self, model: Any, plan: Plan, grid: tuple[int, int]) -> None:
        """Raises VitslimError where a plan chose patches of another grid than a model has.

        Args:
            model: Dense.
            plan: Made for a model of this architecture.
            grid: Of the patches of that model.
        """

    @abstractmethod
    def classifiers(self, model: Any) -> tuple[str, ...]:
        """Returns the names of the parts that turn features into classes."""

    @abstractmethod
    def rows_read(self, model: Any) -> int | None:
        """Returns how many leading tokens the head reads, None for all."""

    @abstractmethod
    def resampled(
        self, state: Mapping[str, Tensor], model: Any, grid: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Fits a state dict of another image size to a model, as timm does.

        Args:
            state: Of a model with the same parts.
            model: To be loaded.
            grid: Of the patches when the state was saved.
        """
