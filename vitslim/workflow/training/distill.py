"""Distillation: a student that learns from the answers of a frozen teacher beside the labels.

With student and teacher logits s and t, temperature T, and features f and g before the classifier:

    soft     T^2 KL(softmax(t / T) || softmax(s / T)), mean over images    (DeiT, equation 2)
    hard     cross entropy of s with argmax(t)                             (DeiT, equation 3)
    feature  1 - cos(P f, g), mean over images; P is linear, and the identity at equal widths

The cosine is half the squared distance of the normalised features, without the division by their
width that a mean squared error brings: one weight of the loss means the same for every teacher.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import Tensor, nn

from ...errors import VitslimError
from ..data.batches import image_statistics
from ..image_size import pixels
from ..latency import input_shape
from ..options.settings import Settings


class Outputs(NamedTuple):
    """What a student says of images.

    Attributes:
        logits: [B, classes], for the labels.
        distilled: [B, classes] of the distillation token's own head, for the teacher; None where
            one head answers to both.
        features: [B, teacher's width], for the teacher, where features are imitated.
    """

    logits: Tensor
    distilled: Tensor | None = None
    features: Tensor | None = None


class Distillation(nn.Module):
    """A student and what it takes to imitate a teacher; this is what is trained, instead of it.

    The teacher is frozen for good and no submodule: nothing of it is trained, saved, averaged
    over processes or compiled into the student's graph. It does follow `to`.

    Args:
        student: A timm vision transformer, dense, masked or slim, with one head or with two.
        teacher: Any timm model. For logits its classes must be the student's.
        settings: `distill_type` and `distill_temperature`; `seed` is that of the projection.

    Raises:
        VitslimError: The teacher cannot teach this student.
    """

    teacher: "Teacher"

    def __init__(self, student: nn.Module, teacher: nn.Module, settings: Settings) -> None:
        super().__init__()
        if settings.distill_temperature <= 0:
            raise VitslimError(
                f"--distill-temperature must be above 0, not {settings.distill_temperature}."
            )
        self.student = student
        self.projection: nn.Module = nn.Identity()
        self.kind, self.temperature = settings.distill_type, settings.distill_temperature
        # Past nn.Module's own __setattr__, which would make it a submodule.
        object.__setattr__(self, "teacher", Teacher(teacher, student, settings))
        if self.kind == "feature" and self.teacher.width != student.head_hidden_size:
            self.projection = _projection(student, self.teacher.width, settings.seed)

    def forward(self, images: Tensor) -> Outputs:
        """Maps images [B, C, H, W] to outputs; while training, two heads answer one by one."""
        student = self.student
        if self.kind == "feature":
            tokens = student.forward_features(images)
            features = student.forward_head(tokens, pre_logits=True)
            # No logits are imitated, so that labels teach both heads of a distilled student.
            return Outputs(student.forward_head(tokens), None, self.projection(features))
        if not hasattr(student, "distilled_training"):
            return Outputs(student(images))
        # Only for the moment: a student, and every copy of it, must work without a teacher too.
        student.distilled_training = True
        try:
            heads = student(images)
        finally:
            student.distilled_training = False
        return Outputs(*heads) if isinstance(heads, tuple) else Outputs(heads)

    def imitation(self, images: Tensor, outputs: Outputs) -> Tensor:
        """Returns the float32 loss of imitating the teacher, before any weight.

        Args:
            images: As the student saw them. The teacher sees them under the caller's autocast.
            outputs: What `forward` made of them.
        """
        wanted = self.teacher(images)
        if outputs.features is not None:
            return (1 - F.cosine_similarity(outputs.features.float(), wanted)).mean()
        given = (outputs.logits if outputs.distilled is None else outputs.distilled).float()
        if self.kind == "hard":
            return F.cross_entropy(given, wanted.argmax(1))
        given, wanted = (F.log_softmax(each / self.temperature, dim=1) for each in (given, wanted))
        loss = F.kl_div(given, wanted, reduction="batchmean", log_target=True)
        return loss * self.temperature**2

    def no_weight_decay(self) -> set[str]:
        """The student's parameters without weight decay, under their names here."""
        names: set[str] = self.student.no_weight_decay()
        return {f"student.{name}" for name in names}

    def _apply(self, fn: Any, recurse: bool = True) -> "Distillation":
        """Moves and casts the teacher along with the student."""
        super()._apply(fn, recurse)
        self.teacher._apply(fn, recurse)
        return self


class Teacher(nn.Module):
    """A frozen model that is shown the student's images as it was trained to see them.

    Args:
        model: Any timm model.
        student: Whose images they are: their size, and the mean and deviation they have.
        settings: What is asked of it, and of which data.

    Attributes:
        size: What images are resized to, [height, width], or None.
        note: That they are, as a sentence, or None.
        width: Of its features, or its number of classes.
    """

    def __init__(self, model: nn.Module, student: nn.Module, settings: Settings) -> None:
        super().__init__()
        if not {id(p) for p in model.parameters()}.isdisjoint(map(id, student.parameters())):
            raise VitslimError("The teacher and the student share weights: teach by a copy.")
        self.model = model.requires_grad_(False)
        self.features = settings.distill_type == "feature"
        classes = getattr(model, "num_classes", None)
        if not self.features and classes != student.num_classes:
            raise VitslimError(
                f"The teacher has {classes} classes and the student {student.num_classes}: "
                "take a teacher of the same classes, or --distill-type feature."
            )
        shape = input_shape(student)
        (given_mean, given_std), (mean, std) = (
            torch.tensor(image_statistics(each, settings, shape[0]), dtype=torch.float64)
            for each in (student, model)
        )
        like = next(model.parameters()).new_empty(0)
        # Of the student's x, the teacher sees (x given_std + given_mean - mean) / std.
        for name, values in (("scale", given_std / std), ("shift", (given_mean - mean) / std)):
            self.register_buffer(name, values.view(-1, 1, 1).to(like), persistent=False)
        self.size: tuple[int, int] | None = None
        self.note: str | None = None
        self.eval()
        self.width = self._find_size(shape)
        if settings.compile:
            self.compile()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Maps the student's images [B, C, H, W] to logits or features, in float32."""
        if self.size is not None:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        images = torch.addcmul(self.shift, images.to(self.scale.dtype), self.scale)
        if self.features:
            answer = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        else:
            answer = self.model(images)
        return answer.float()

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in evaluation mode: a teacher has neither dropout nor running statistics."""
        return super().train(False)

    def _find_size(self, shape: tuple[int, int, int]) -> int:
        """Tries the student's size, then the teacher's own; returns the width of the answer.

        No attribute of timm's says of every model whether its size is fixed, so one blank image
        is shown to it.
        """
        own = _own_size(self.model)
        blank = torch.zeros(1, *shape, dtype=self.scale.dtype, device=self.scale.device)
        for self.size in (None, own):
            try:
                answer = self(blank)
            except Exception as error:
                reason = str(error).split("\n")[0] or type(error).__name__
            else:
                break
        else:
            raise VitslimError(
                f"The teacher {type(self.model).__name__} cannot take the student's images of "
                f"{shape[0]} channels and {pixels(shape)} ({reason}): take another teacher."
            )
        if answer.ndim != 2:
            raise VitslimError(
                f"The teacher {type(self.model).__name__} gives {list(answer.shape)} for an image "
                "instead of one row: take a teacher with global pooling."
            )
        if self.size is not None:
            self.note = (
                f"the teacher sees images resized from {pixels(shape)} to {pixels(self.size)}"
            )
        return int(answer.shape[1])


def _own_size(model: nn.Module) -> tuple[int, int]:
    try:
        return input_shape(model)[1:]
    except VitslimError:
        height, width = resolve_data_config(model=model)["input_size"][1:]
        return height, width


def _projection(student: nn.Module, width: int, seed: int) -> nn.Linear:
    """Makes P, the same for a seed whatever was drawn before, and drawing nothing itself."""
    projection: nn.Linear = nn.utils.skip_init(nn.Linear, student.head_hidden_size, width)
    generator = torch.Generator().manual_seed(seed)
    nn.init.xavier_uniform_(projection.weight, generator=generator)
    nn.init.zeros_(projection.bias)
    return projection.to(next(student.parameters()))
