"""Distillation: the formulas, what the teacher sees, and what is trained, saved and copied."""

import copy
import dataclasses
from collections.abc import Iterator

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import TINY
from timm.utils import ModelEmaV3
from torch import nn
from torch._dynamo.testing import CompileCounter

import vitslim
from vitslim.errors import VitslimError
from vitslim.masks import mask_parameters
from vitslim.workflow.options.settings import Settings, settings_for
from vitslim.workflow.training.distill import Distillation, Outputs

RGB = {**TINY, "in_chans": 3}
TYPES = ("soft", "hard", "feature")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def _settings(kind: str = "soft", **more: object) -> Settings:
    given = {"data": "folder:x", "batch_size": 4, "distill_type": kind, **more}
    return settings_for("retrain", given)


def _vit(seed: int = 0, **more: object) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **{**RGB, **more})


def _distilled() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_distilled_patch16_224", **RGB)


def _student(kind: str) -> nn.Module:
    if kind == "distilled":
        return _distilled()
    dense = _vit(global_pool="avg", class_token=False) if kind == "average" else _vit()
    if kind in ("class", "average"):
        return dense
    masked = vitslim.mask(_distilled() if kind == "masked distilled" else dense)
    if kind != "slim":
        return masked
    plan = vitslim.threshold(masked, {"attention": 0.5, "mlp": 0.5, "token": 0.5}, round_to=1)
    return vitslim.slim(masked, plan)


STUDENTS = ("class", "average", "distilled", "masked", "masked distilled", "slim")


def _resnet(**more: object) -> nn.Module:
    torch.manual_seed(3)
    return timm.create_model("test_resnet", **{"num_classes": 10, **more})


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def _loss(distillation: Distillation, images: torch.Tensor) -> tuple[Outputs, torch.Tensor]:
    outputs = distillation(images)
    return outputs, distillation.imitation(images, outputs)


def test_soft_is_the_divergence_times_the_squared_temperature(images) -> None:
    student, teacher = _vit(0), _vit(1)
    # Sure of itself, for between two almost even answers the divergence is nearly symmetric.
    nn.init.normal_(teacher.head.weight)
    _, loss = _loss(Distillation(student, teacher, _settings(distill_temperature=3.0)), images)
    p, q = (F.softmax(model(images) / 3, dim=1) for model in (teacher, student))
    by_hand = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(loss, by_hand)


def test_hard_is_cross_entropy_with_what_the_teacher_would_say(images) -> None:
    student, teacher = _vit(0), _vit(1)
    _, loss = _loss(Distillation(student, teacher, _settings("hard")), images)
    said = teacher(images).argmax(1)
    torch.testing.assert_close(loss, -F.log_softmax(student(images), 1)[range(4), said].mean())


def test_feature_is_half_the_squared_distance_of_normalised_features(images) -> None:
    student, teacher = _vit(0), _vit(1)
    distillation = Distillation(student, teacher, _settings("feature"))
    outputs, loss = _loss(distillation, images)
    f, g = (
        F.normalize(model.forward_head(model.forward_features(images), pre_logits=True))
        for model in (student, teacher)
    )
    torch.testing.assert_close(loss, (f - g).square().sum(1).mean() / 2)
    torch.testing.assert_close(outputs.logits, student(images))
    assert isinstance(distillation.projection, nn.Identity)


@pytest.mark.parametrize("kind", ["soft", "feature"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(images, kind: str) -> None:
    student = _vit()
    _, loss = _loss(Distillation(student, copy.deepcopy(student), _settings(kind)), images)
    assert abs(loss.item()) < 1e-6


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("student", STUDENTS)
def test_every_parameter_learns_and_none_of_the_teachers(images, student: str, kind: str) -> None:
    teacher = _vit(1, embed_dim=24)
    distillation = Distillation(_student(student), teacher, _settings(kind)).train()
    outputs, loss = _loss(distillation, images)
    assert loss.dtype == torch.float32
    (loss + F.cross_entropy(outputs.logits, torch.arange(4))).backward()
    for name, parameter in distillation.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_labels_teach_one_head_and_the_teacher_the_other(images, kind: str) -> None:
    student = _distilled()
    distillation = Distillation(student, _vit(1), _settings(kind)).train()
    outputs, loss = _loss(distillation, images)
    loss.backward(retain_graph=True)
    assert student.head.weight.grad is None
    assert student.head_dist.weight.grad.abs().sum() > 0
    student.zero_grad()
    outputs.logits.sum().backward()
    assert student.head.weight.grad.abs().sum() > 0
    assert student.head_dist.weight.grad is None


@pytest.mark.parametrize("kind", TYPES)
def test_two_heads_are_averaged_without_training_or_without_a_teacher(images, kind: str) -> None:
    student = _distilled()
    distillation = Distillation(student, _vit(1), _settings(kind)).train()
    assert (distillation(images).distilled is None) == (kind == "feature")
    tokens = student.forward_features(images)
    average = (student.head(tokens[:, 0]) + student.head_dist(tokens[:, 1])) / 2
    torch.testing.assert_close(student(images), average)
    outputs = distillation.eval()(images)
    assert outputs.distilled is None
    torch.testing.assert_close(outputs.logits, average)


def test_an_error_in_the_student_leaves_it_as_it_was(images) -> None:
    student = _distilled()
    distillation = Distillation(student, _vit(1), _settings())
    with pytest.raises(AssertionError):
        distillation(images[..., :4])
    assert student.distilled_training is False


def test_the_teacher_sees_images_normalised_as_it_expects(images) -> None:
    student, teacher = _vit(0), _vit(1, pretrained_cfg_overlay=IMAGENET)
    assert student.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    pixels = images * 0.5 + 0.5
    mean, std = (torch.tensor(IMAGENET[name]).view(3, 1, 1) for name in ("mean", "std"))
    seen = Distillation(student, teacher, _settings()).teacher(images)
    torch.testing.assert_close(seen, teacher((pixels - mean) / std))
    assert not torch.allclose(seen, teacher(images), atol=1e-3)


def test_equal_normalisation_changes_not_one_bit(images) -> None:
    teacher = _vit(1)
    assert torch.equal(Distillation(_vit(0), teacher, _settings()).teacher(images), teacher(images))


def test_digits_and_grey_images_are_normalised_alike_for_both() -> None:
    grey = torch.randn(2, 1, 8, 8)
    for data, overlay in (("digits", {"mean": (0.3,), "std": (0.4,)}), ("folder:x", IMAGENET)):
        student = _vit(0, in_chans=1)
        teacher = _vit(1, in_chans=1, pretrained_cfg_overlay=overlay)
        seen = Distillation(student, teacher, _settings(data=data)).teacher(grey)
        assert torch.equal(seen, teacher(grey))


def test_a_teacher_of_a_fixed_size_sees_resized_images_and_says_so(images) -> None:
    teacher = _vit(1, img_size=16)
    frozen = Distillation(_vit(0), teacher, _settings()).teacher
    resized = F.interpolate(images, (16, 16), mode="bicubic", antialias=True)
    torch.testing.assert_close(frozen(images), teacher(resized))
    assert frozen.note == "the teacher sees images resized from 8 pixels to 16 pixels"


@pytest.mark.parametrize(
    "teacher", [_resnet, _distilled, lambda: _vit(img_size=16, dynamic_img_size=True)]
)
def test_a_teacher_of_any_size_sees_images_as_they_are(images, teacher) -> None:
    teacher = teacher()
    frozen = Distillation(_vit(0, pretrained_cfg_overlay=IMAGENET), teacher, _settings()).teacher
    assert frozen.note is None
    assert frozen(images).shape == (4, 10)


@pytest.mark.parametrize("kind", TYPES)
def test_a_convolutional_teacher_stays_frozen_while_the_student_trains(images, kind: str) -> None:
    teacher = _resnet()
    distillation = Distillation(_vit(), teacher, _settings(kind)).train()
    before = copy.deepcopy(teacher.state_dict())
    _loss(distillation, images)[1].backward()
    assert not distillation.teacher(images.requires_grad_()).requires_grad
    assert distillation.student.training
    assert not any(module.training for module in teacher.modules())
    distillation.teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (lambda: _vit(num_classes=7), "soft", "has 7 classes and the student 10"),
        (lambda: _vit(num_classes=7), "hard", "--distill-type feature"),
        (
            lambda: _vit(in_chans=1),
            "soft",
            "cannot take the student's images of 3 channels and 8 pixels",
        ),
        (lambda: nn.Conv2d(3, 3, 1), "feature", "cannot take the student's images"),
        (lambda: _resnet(global_pool=""), "feature", "take a teacher with global pooling"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_in_a_sentence(make, kind, sentence) -> None:
    with pytest.raises(VitslimError, match=sentence):
        Distillation(_vit(), make(), _settings(kind))


def test_a_student_cannot_be_its_own_teacher() -> None:
    student = _vit()
    with pytest.raises(VitslimError, match="share weights"):
        Distillation(student, student, _settings())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(VitslimError, match="must be above 0, not 0"):
        Distillation(_vit(0), _vit(1), _settings(distill_temperature=0.0))


def test_feature_teachers_may_have_other_classes(images) -> None:
    distillation = Distillation(_vit(0), _vit(1, num_classes=7), _settings("feature"))
    assert _loss(distillation, images)[1].isfinite()


def test_only_student_and_projection_are_saved_and_counted(images) -> None:
    student = _vit(0)
    wide = Distillation(student, _vit(1, embed_dim=24), _settings("feature"))
    names = {f"student.{name}" for name in student.state_dict()}
    assert set(wide.state_dict()) == {*names, "projection.weight", "projection.bias"}
    assert set(Distillation(student, _vit(1), _settings()).state_dict()) == names
    assert len(list(wide.modules())) == len(list(student.modules())) + 2
    average = ModelEmaV3(wide.student).module
    assert set(average.state_dict()) == set(student.state_dict())
    assert not any(module is wide.teacher for module in average.modules())
    assert torch.equal(average.eval()(images), student.eval()(images))


def test_the_projection_depends_on_the_seed_alone() -> None:
    def made(seed: int) -> torch.Tensor:
        settings = _settings("feature", seed=seed)
        student, teacher = _vit(0), _resnet()
        state = torch.get_rng_state()
        projection = Distillation(student, teacher, settings).projection
        assert torch.equal(torch.get_rng_state(), state)
        return projection.weight

    first = made(1)
    torch.manual_seed(99)
    assert torch.equal(made(1), first)
    assert not torch.equal(made(2), first)


def test_masks_and_undecayed_parameters_are_found_through_the_wrapper() -> None:
    masked = vitslim.mask(_vit())
    distillation = Distillation(masked, _vit(1), _settings())
    undecayed = distillation.no_weight_decay()
    assert "student.pos_embed" in undecayed
    assert {name for name, _ in mask_parameters(distillation)} <= undecayed


def test_the_teacher_follows_device_and_dtype(images) -> None:
    teacher = _vit(1)
    distillation = Distillation(_vit(0), teacher, _settings()).to(torch.float64)
    assert {p.dtype for p in teacher.parameters()} == {torch.float64}
    _, loss = _loss(distillation, images.double())
    assert loss.dtype == torch.float32
    distillation.to("meta")
    assert {p.device.type for p in teacher.parameters()} == {"meta"}


def test_a_teacher_in_half_precision_teaches_a_student_in_full(images) -> None:
    teacher = _vit(1)
    exact = _loss(Distillation(_vit(0), copy.deepcopy(teacher), _settings()), images)[1]
    distillation = Distillation(_vit(0), teacher.bfloat16(), _settings())
    loss = _loss(distillation, images)[1]
    assert distillation.teacher(images).dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("kind", TYPES)
def test_the_loss_is_float32_under_autocast(images, kind: str) -> None:
    distillation = Distillation(_vit(0), _vit(1, embed_dim=24), _settings(kind))
    with torch.autocast("cpu", torch.bfloat16):
        outputs, loss = _loss(distillation, images)
    assert outputs.logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, _loss(distillation, images)[1], rtol=0.1, atol=1e-2)


@pytest.mark.parametrize("kind", ["soft", "feature"])
@pytest.mark.parametrize("student", ["masked distilled", "slim"])
def test_the_wrapper_compiles_as_one_graph(images, student: str, kind: str) -> None:
    torch._dynamo.reset()
    teacher = _vit(1, embed_dim=24)
    distillation = Distillation(_student(student), teacher, _settings(kind)).train()
    expected, loss = _loss(distillation, images)
    counter = CompileCounter()
    distillation.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        outputs, compiled = _loss(distillation, images)
    assert counter.frame_count == 1
    assert (outputs.distilled is None) == (expected.distilled is None)
    torch.testing.assert_close(outputs.logits, expected.logits)
    torch.testing.assert_close(compiled, loss)
    assert not getattr(distillation.student, "distilled_training", False)


def test_the_teacher_is_compiled_where_the_student_is(monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    distillation = Distillation(_vit(0), _vit(1), _settings(compile=True))
    assert compiled == [distillation.teacher]
    Distillation(_vit(0), _vit(1), dataclasses.replace(_settings(), compile=False))
    assert len(compiled) == 1


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("student", ["masked distilled", "slim"])
def test_distributed_training_waits_for_no_parameter(
    one_process, images, student: str, kind: str
) -> None:
    settings = _settings(kind)
    alone = Distillation(_student(student), _vit(1, embed_dim=24), settings).train()
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(alone))
    # The second backward is the one that complains of parameters the first left out.
    for _ in range(2):
        for net, distillation in ((alone, alone), (wrapped, wrapped.module)):
            net.zero_grad()
            outputs = net(images)
            loss = distillation.imitation(images, outputs)
            (loss + F.cross_entropy(outputs.logits, torch.arange(4))).backward()
    gradients = zip(alone.parameters(), wrapped.module.parameters(), strict=True)
    assert all(torch.equal(ours.grad, theirs.grad) for ours, theirs in gradients)
