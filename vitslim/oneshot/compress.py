"""From a pretrained model to a smaller one without training: scores, rotation, plan, refit."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..calibration import Images, felt_tokens, refit
from ..families import family_of
from ..families.family import head_width
from ..masks import Masks
from ..plan import Plan
from ..planning import threshold
from ..surgery import slim
from ..wrapped import bare
from .importance import importance
from .rotation import rotate


@dataclass(frozen=True)
class Prepared:
    """A model that can be cut to any number of budgets without looking at it again.

    Attributes:
        model: Equal to the model that was given, its heads rotated.
        scores: Of its units.
        images: What is left is refitted on; None for not at all.
        felt: How much the loss feels of each token, see `vitslim.calibration.felt_tokens`.
        quiet: Whether there are no progress bars.
    """

    model: nn.Module
    scores: Masks
    images: Images | None
    felt: Sequence[Sequence[Tensor]] | None
    quiet: bool = False

    def plan(
        self,
        budget: Mapping[str, Any] | str,
        *,
        round_to: int = 8,
        floor: int = 1,
        ranking: str = "macs",
    ) -> Plan:
        """Returns the largest plan within a budget; arguments are those of `vitslim.threshold`."""
        return threshold(
            self.model,
            budget,
            masks=self.scores,
            round_to=round_to,
            floor=floor,
            ranking=ranking,
        )

    def cut(self, plan: Plan) -> Any:
        """Returns the model cut to a plan of `plan`, and refitted."""
        cut = slim(self.model, plan)
        if self.images is not None:
            refit(cut, self.model, self.images, plan=plan, felt=self.felt, quiet=self.quiet)
        return cut


def prepare(
    model: nn.Module,
    data: Any,
    *,
    criterion: str = "obs",
    kinds: Iterable[str] | None = ("attention", "mlp"),
    rotation: bool = True,
    refitted: bool = True,
    score_images: int = 256,
    seed: int = 0,
    quiet: bool = False,
) -> Prepared:
    """Rotates and scores a model, so that it can be cut to budgets.

    Args:
        model: A dense timm vision transformer, wrapped or not, in evaluation mode.
        data: As for `vitslim.importance`; at least as many images as a head is wide.
        criterion: Of `vitslim.importance`.
        kinds: What may be cut, of "attention", "mlp" and "token".
        rotation: Whether heads are rotated first, see `vitslim.rotate`.
        refitted: Whether `Prepared.cut` refits what is left, see `vitslim.slim`.
        score_images: How many of the images rotation and scores look at, at most.
        seed: Of labels that are drawn.
        quiet: Whether there are no progress bars.
    """
    model = bare(model)
    family = family_of(model, "compressed")
    widest = head_width(family.sites(model))
    images = Images(data, model, least=widest, what_for=f"heads {widest} wide")
    fewer = images.evenly(score_images)
    ready = rotate(model, fewer, seed=seed, quiet=quiet) if rotation else model
    scores = importance(ready, fewer, criterion, kinds=kinds, seed=seed, quiet=quiet)
    if not refitted:
        return Prepared(ready, scores, None, None, quiet)
    felt = felt_tokens(ready, family, images, seed=seed, quiet=quiet)
    return Prepared(ready, scores, images, felt, quiet)


def compress(model: nn.Module, images: Any, budget: Mapping[str, Any] | str, **options: Any) -> Any:
    """Returns a smaller model that computes nearly the same, in minutes and without training.

    The heads are rotated (`vitslim.rotate`), all units scored (`vitslim.importance`), a plan is
    made (`vitslim.threshold`, one ranking of all kinds by score per MAC), and what is kept is
    refitted to the model's residual stream (`vitslim.slim` with `calibrate`).

        small = vitslim.compress(model, images, "macs=50%")

    For several budgets, prepare once:

        prepared = vitslim.oneshot.prepare(model, images)
        curve = [prepared.cut(prepared.plan(f"macs={share}%")) for share in (80, 60, 40)]

    Args:
        model: A dense timm vision transformer, wrapped or not, in evaluation mode.
        images: Normalised images [n, channels, height, width], (images, labels), or a list or
            DataLoader of batches of either, of the kind that the model is for. Labels are needed
            for `criterion="taylor"` alone. 256 do, 1,000 do better.
        budget: As for `vitslim.threshold`.
        **options: Of `prepare`.

    Raises:
        VitslimError: The model cannot be cut, the images are not what it takes, or the budget is
            out of reach.
    """
    prepared = prepare(model, images, **options)
    return prepared.cut(prepared.plan(budget))
