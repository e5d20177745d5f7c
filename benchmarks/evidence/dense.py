"""The dense model of a study: one that is there, or a pretrained one fine-tuned on the photos."""

from pathlib import Path
from typing import Any

import timm
from torch import nn

from vitslim import load
from vitslim.workflow.finetune import finetune
from vitslim.workflow.runtime.context import StageContext

from .recipe import WORLD, tuning_settings

# Layers of a pretrained model learn at equal rates here, for half a dozen epochs are few.
RATE = 5e-5


def dense_model(
    saved: Path | None,
    name: str,
    pretrained: bool,
    size: int | None,
    epochs: int,
    links: Path,
    folder: Path,
    batch_size: int,
) -> nn.Module:
    """Returns the dense model in evaluation mode.

    Args:
        saved: Folder of a model that is trained already, as `vitslim.save` or timm writes it.
        name: Of a timm model that is fine-tuned where there is none.
        pretrained: Whether that one comes with weights, which timm downloads.
        size: Of images, in pixels; None for the model's own.
        epochs: Of fine-tuning.
        links: Folder of the photos.
        folder: Where it is fine-tuned; done or stopped before, it is gone on with.
        batch_size: Of fine-tuning.
    """
    if saved is not None:
        return load(saved).eval()
    more: dict[str, Any] = {} if size is None else {"img_size": size}
    start = timm.create_model(name, pretrained=pretrained, **more)
    settings = tuning_settings(links, 0, batch_size, epochs=epochs, lr=RATE)
    context = StageContext("finetune", settings, WORLD, folder, resume=True)
    return finetune(start, context, base=name).model.eval()
