"""How much every unit matters to a model as it stands: scores that no training is needed for."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..allowed import CRITERIA, GRANULARITIES, KINDS
from ..calibration.images import Images
from ..errors import VitslimError
from ..families import Family, family_of
from ..layers.attention import why_not_cut_attention
from ..layers.mlp import why_not_cut_mlp
from ..masks import Masks
from ..wrapped import bare, copy_of


def importance(
    model: nn.Module,
    data: Any = None,
    criterion: str = "fisher",
    *,
    kinds: Iterable[str] | None = ("attention", "mlp"),
    granularity: str = "head_dim",
    batch_size: int = 32,
    seed: int = 0,
    quiet: bool = False,
) -> Masks:
    """Scores every unit of a dense model without training; `vitslim.threshold` takes the scores.

    With z the masks of `vitslim.mask`, all 1, and L_n the loss of image n:

        taylor      1/2 mean_n (dL_n/dz)^2, L the cross-entropy with the labels
        fisher      the same with labels drawn from the model's own output: needs no labels
        activation  root mean square of what the unit gives: a dimension of a head's output, a
                    hidden unit, a token's row before attention and MLP
        magnitude   l2 norm of all weights of the unit; of no tokens, and needs no images
        random      uniform

    The first two are in nats, the loss that is expected to be added when the unit alone is
    removed, so that they compare between kinds: see `ranking="macs"` of `vitslim.threshold`.

    Args:
        model: A dense timm vision transformer, wrapped or not, in evaluation mode.
        data: Normalised images [n, channels, height, width], (images, labels), or a list or
            DataLoader of batches of either. Labels are class numbers [n].
        criterion: As above.
        kinds: Of units, of "attention", "mlp" and "token"; None is all that the criterion and the
            family know.
        granularity: Of the attention's scores: "head_dim", "uniform" or "head".
        batch_size: Images that are computed at once.
        seed: Of labels that are drawn and of random scores.
        quiet: Whether there is no progress bar.

    Raises:
        VitslimError: A criterion or kind does not exist, labels or images are missing, or the
            images are not what the model takes.
    """
    model = bare(model)
    family = family_of(model, "scored")
    chosen = _kinds(family, kinds, criterion)
    if criterion not in CRITERIA:
        raise VitslimError(f"no criterion is called {criterion!r}; use {CRITERIA}")
    if granularity not in GRANULARITIES:
        raise VitslimError(f"no granularity is called {granularity!r}; use {GRANULARITIES}")
    family.check(model, chosen, "scored")
