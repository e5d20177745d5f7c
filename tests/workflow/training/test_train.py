"""The epoch loop: what it learns, what it refuses, and that processes do not change it."""

import dataclasses
import itertools

import pytest
import timm
import torch

import vitslim
from vitslim.errors import VitslimError
from vitslim.masks import mask_parameters
from vitslim.workflow.options.settings import settings_for
from vitslim.workflow.runtime.context import StageContext
from vitslim.workflow.runtime.journal import read_summary
from vitslim.workflow.search import search
from vitslim.workflow.training.loop import Loop
from vitslim.workflow.training.optimise import make_optimizer, make_scheduler
from vitslim.workflow.training.penalty import Penalty
from vitslim.workflow.training.prepare import prepare
from vitslim.workflow.training.train import open_stage, train


def test_search_shrinks_masks_and_says_how_it_goes(tiny, quick, world, tmp_path, capsys) -> None:
    settings = dataclasses.replace(quick, l1_attention=1e-2, l1_mlp=1e-2, l1_token=1e-2)
    masked = search(tiny, StageContext("search", settings, world, tmp_path))
    masks = vitslim.Masks.load(tmp_path / "masks.safetensors")
    assert max(mask.max() for mask in masks.mlp) < 1
    assert all(
        torch.equal(a, b) for a, b in zip(masks.mlp, vitslim.Masks.of(masked).mlp, strict=True)
    )
    rows = read_summary(tmp_path / "summary.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[2]["penalty"]) < float(rows[0]["penalty"])
    assert "search: epoch 3/3" in capsys.readouterr().out
    assert float(rows[2]["loss"]) < float(rows[0]["loss"])


def test_masks_have_no_decay_and_a_rate_of_their_own(tiny, quick) -> None:
    masked = vitslim.mask(tiny)
    settings = dataclasses.replace(quick, weight_decay=0.5, lr=1e-3, mask_lr_scale=10.0)
    optimizer = make_optimizer(masked, settings, 256)
    names = {id(parameter): name for name, parameter in masked.named_parameters()}
    where = {
        names[id(parameter)]: (group["weight_decay"], group["lr"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert set(where) == set(names.values())
    for name, _ in mask_parameters(masked):
        assert where[name] == (0.0, pytest.approx(1e-2))
    assert where["blocks.0.mlp.fc1.weight"] == (0.5, 1e-3)
    assert where["pos_embed"] == (0.0, 1e-3)


@pytest.mark.parametrize(
    ("poison", "where"),
    [
        ("blocks.1.mlp.fc1.weight", "the parameter blocks.1.mlp.fc1.weight"),
        (None, "the output of blocks.0.norm2"),
    ],
)
def test_a_loss_that_is_not_finite_names_step_and_layer(
    tiny, quick, world, tmp_path, poison, where
) -> None:
    masked = vitslim.mask(tiny)
    with torch.no_grad():
        if poison:
            dict(masked.named_parameters())[poison][0, 0] = float("nan")
        else:
            # Finite outputs whose variance, in the next norm, is not.
            masked.blocks[0].attn.proj.weight.fill_(3e38)
    context = StageContext("dense", quick, world, tmp_path, resume=True)
    stage = open_stage(context, {})
    with pytest.raises(VitslimError, match=f"epoch 1, step 1, first in {where}"):
        train(masked, context, stage, penalty=Penalty(quick))


def test_the_last_state_outlives_a_loss_that_is_not_finite(tiny, quick, world, tmp_path) -> None:
    class Breaking(Penalty):
        def __call__(self, model: torch.nn.Module, progress: float) -> torch.Tensor:
            return super().__call__(model, progress) * (float("nan") if progress > 1.3 else 1)

    masked = vitslim.mask(tiny)
    context = StageContext("dense", quick, world, tmp_path, resume=True)
    stage = open_stage(context, {})
    with pytest.raises(VitslimError, match="epoch 2, step 3, first in the loss itself"):
        train(masked, context, stage, penalty=Breaking(quick))
    assert stage.latest()[0].update == 5
    outcome = train(masked, context, stage, penalty=Penalty(quick))
    assert all(torch.isfinite(p).all() for p in outcome.model.parameters())


def test_a_gradient_that_is_not_finite_names_its_layer(tiny, quick, world, tmp_path) -> None:
    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 0

    tiny.blocks[0].mlp.fc1.register_forward_hook(lambda m, i, output: Root.apply(output))
    context = StageContext("dense", quick, world, tmp_path, resume=True)
    stage = open_stage(context, {})
    with pytest.raises(VitslimError, match=r"gradient is not finite.*blocks.0.mlp.fc1.bias"):
        train(tiny, context, stage)


def test_the_average_is_the_result(tiny, quick, world, tmp_path) -> None:
    settings = dataclasses.replace(quick, model_ema=True, model_ema_decay=0.9)
    context = StageContext("dense", settings, world, tmp_path, resume=True)
    stage = open_stage(context, {})
    outcome = train(tiny, context, stage)
    assert outcome.model is not tiny
    assert not torch.equal(outcome.model.head.weight, tiny.head.weight)


def test_amp_trains_in_bfloat16_with_masks_in_float32(tiny, quick, world, tmp_path) -> None:
    seen = []
    tiny.head.register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    settings = dataclasses.replace(quick, amp=True, epochs=1)
    masked = search(tiny, StageContext("search", settings, world, tmp_path))
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in masked.parameters()} == {torch.float32}
    row = read_summary(tmp_path / "summary.csv")[0]
    assert float(row["loss"]) < 10


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_ends_near_float32(tiny, quick, world, tmp_path, dtype) -> None:
    losses = []
    start = {name: value.clone() for name, value in tiny.state_dict().items()}
    for amp in (False, True):
        tiny.load_state_dict(start)
        settings = dataclasses.replace(quick, amp=amp, amp_dtype=dtype, epochs=2, lr=1e-2)
        masked = search(tiny, StageContext("search", settings, world, tmp_path / str(amp)))
        losses.append([float(row["loss"]) for row in read_summary(tmp_path / f"{amp}/summary.csv")])
        assert {parameter.dtype for parameter in masked.parameters()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1] != losses[0]


def test_an_overflow_in_float16_skips_one_update(tiny, quick, world, tmp_path) -> None:
    """The scaler starts so high that the first gradients overflow, and comes down."""
    settings = dataclasses.replace(quick, amp=True, amp_dtype="float16", epochs=1, clip_grad=1.0)
    context = StageContext("dense", settings, world, tmp_path, resume=True)
    stage = open_stage(context, {})
    loop = Loop(tiny, context, stage)
    loop.learner.update.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    start = tiny.head.weight.clone()
    batch = list(itertools.islice(loop.data.epoch(0), 1))
    loop.learner.update.begin_epoch(0)
    loop.learner.update(batch, 0, 0.0, where="here")
    assert torch.equal(tiny.head.weight, start)
    assert loop.learner.update.scaler.get_scale() == 2.0**39
    assert loop.learner.update.state()["scaler"]["scale"] == 2.0**39


def test_a_gradient_that_is_infinite_at_every_scale_of_float16_stops(
    tiny, quick, world, tmp_path
) -> None:
    settings = dataclasses.replace(quick, amp=True, amp_dtype="float16", epochs=4)
    tiny.blocks[0].mlp.register_full_backward_hook(lambda m, gradients, _: (gradients[0] / 0,))
    context = StageContext("dense", settings, world, tmp_path, resume=True)
    stage = open_stage(context, {})
    start = {name: value.clone() for name, value in tiny.state_dict().items()}
    # Sixteen updates of five an epoch take the scale from 2**16 to 1; the next one is not left out.
    with pytest.raises(VitslimError, match=r"gradient is not finite in epoch 4, step 2, first in"):
        train(tiny, context, stage)
    assert all(torch.equal(start[name], value) for name, value in tiny.state_dict().items())


@pytest.mark.parametrize("more", [{"grad_checkpointing": True}, {"channels_last": True}])
def test_what_saves_time_or_memory_changes_nothing(tiny, quick, world, tmp_path, more) -> None:
    quick = dataclasses.replace(quick, drop_path=0.3)
    plain = search(tiny, StageContext("search", quick, world, tmp_path / "plain"))
    other = search(
        tiny, StageContext("search", dataclasses.replace(quick, **more), world, tmp_path / "other")
    )
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_two_batches_make_the_update_of_one_large_one(tiny, quick, world, tmp_path) -> None:
    quick = dataclasses.replace(quick, drop_path=None, opt="sgd", lr=0.1, mixup=0.0, cutmix=0.0)
    halves = dataclasses.replace(quick, batch_size=128, grad_accum_steps=2)
    one, two = (
        search(tiny, StageContext("search", settings, world, tmp_path / str(settings.batch_size)))
        for settings in (quick, halves)
    )
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    rows = [read_summary(tmp_path / name / "summary.csv") for name in ("256", "128")]
    assert [row["accuracy"] for row in rows[0]] == [row["accuracy"] for row in rows[1]]


def test_a_global_batch_is_shared(quick) -> None:
    shared = dataclasses.replace(quick, global_batch_size=1024, grad_accum_steps=4)
    assert shared.among(2).batch_size == 128
    assert shared.images_per_update(2) == shared.images_per_update(8) == 1024
    assert shared.binding(2) == shared.binding(4)
    with pytest.raises(VitslimError, match="1024 cannot be shared among 3 processes"):
        shared.among(3)


def test_mixing_ends_when_it_is_told_to(tiny, quick, world, tmp_path) -> None:
    settings = dataclasses.replace(quick, mixup=0.8, mixup_off_epoch=2)
    context = StageContext("dense", settings, world, tmp_path, resume=True)
    stage = open_stage(context, {})
    loop = Loop(tiny, context, stage)
    on = []
    for epoch in range(4):
        loop.learner.update.begin_epoch(epoch)
        on.append(loop.learner.update.mixup.mixup_enabled)
    assert on == [True, True, False, False]


def test_the_penalty_grows_and_can_move_the_masks_itself(tiny, quick, world, tmp_path) -> None:
    settings = dataclasses.replace(
        quick,
        l1_step="proximal",
        l1_warmup_epochs=2.0,
        l1_attention=1e-2,
        l1_mlp=1e-3,
        mask_lr_scale=50.0,
    )
    penalty = Penalty(settings)
    assert [penalty.scale(progress) for progress in (0, 0.5, 2, 5)] == [0, 0.25, 1, 1]
    masked = search(tiny, StageContext("search", settings, world, tmp_path))
    masks = torch.cat([mask.flatten() for mask in vitslim.Masks.of(masked).mlp])
    assert 0 < (masks == 0).sum() < masks.numel()


def test_mixup_and_a_teacher_train(tiny, world, tmp_path) -> None:
    settings = settings_for(
        "retrain",
        {"epochs": 1, "batch_size": 256, "mixup": 0.8, "cutmix": 1.0, "distill_loss_weight": 1.0},
    )
    teacher = timm.create_model("vit_tiny_patch16_224", **tiny_kwargs(tiny))
    contexts = [
        StageContext(name, settings, world, tmp_path / name) for name in ("with", "without")
    ]
    losses = [
        train(
            timm.create_model("vit_tiny_patch16_224", **tiny_kwargs(tiny)),
            context,
            open_stage(context, {}),
            teacher=each,
        ).accuracy
        for context, each in zip(contexts, (teacher, None), strict=True)
    ]
    with_teacher, without = (
        float(read_summary(context.output / "summary.csv")[0]["loss"]) for context in contexts
    )
    assert with_teacher > without
    assert all(0 <= accuracy <= 100 for accuracy in losses)


def tiny_kwargs(model: torch.nn.Module) -> dict[str, int]:
    from vitslim.description import base_of

    torch.manual_seed(0)
    return base_of(model)["args"]


def test_a_stage_is_prepared_as_it_is_told_whatever_the_one_before_was(tiny, quick) -> None:
    def rates(model):
        drops = [getattr(b, name) for b in model.blocks for name in ("drop_path1", "drop_path2")]
        return [getattr(drop, "drop_prob", 0.0) for drop in drops]

    prepare(tiny, dataclasses.replace(quick, drop_path=0.3, grad_checkpointing=True))
    assert rates(tiny) == [0.0, 0.0, 0.3, 0.3]
    assert tiny.grad_checkpointing
    prepare(tiny, dataclasses.replace(quick, drop_path=0.0))
    assert rates(tiny) == [0.0] * 4
    assert not tiny.grad_checkpointing


def test_a_search_gives_what_is_read_from_its_folder(tiny, quick, world, tmp_path) -> None:
    settings = dataclasses.replace(quick, epochs=1, drop_path=0.3)
    masked = search(tiny, StageContext("search", settings, world, tmp_path))
    assert isinstance(tiny.blocks[1].drop_path1, torch.nn.Identity)
    assert repr(masked) == repr(vitslim.load(tmp_path))


def test_the_average_begins_with_the_first_update(tiny, quick, world, tmp_path) -> None:
    settings = dataclasses.replace(quick, model_ema=True, model_ema_decay=0.75)
    context = StageContext("dense", settings, world, tmp_path, resume=True)
    stage = open_stage(context, {})
    loop = Loop(tiny, context, stage)
    batches, seen = loop.data.epoch(0), []
    for step in range(3):
        loop._update([next(batches)], 0, step)
        seen.append(tiny.head.weight.detach().clone())
    expected = 0.75 * (0.75 * seen[0] + 0.25 * seen[1]) + 0.25 * seen[2]
    torch.testing.assert_close(loop.learner.average.module.head.weight.detach(), expected)


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_constant_rate_may_be_warmed_up(tiny, quick, epochs) -> None:
    settings = dataclasses.replace(quick, sched="none", lr=1.0, warmup_epochs=epochs, warmup_lr=0.0)
    optimizer = torch.optim.SGD(tiny.parameters(), lr=1.0)
    scheduler = make_scheduler(optimizer, settings, updates=4)
    rates = []
    for update in range(12):
        if scheduler is not None:
            scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    warm = [update / (4 * epochs) for update in range(4 * epochs)]
    assert rates == pytest.approx([*warm, *[1.0] * (12 - len(warm))])


def test_adaptive_clipping_leaves_the_classifier_alone(tiny, quick, world, tmp_path) -> None:
    settings = dataclasses.replace(
        quick, opt="sgd", lr=1.0, weight_decay=0.0, clip_grad=1e-4, clip_mode="agc"
    )
    context = StageContext("dense", settings, world, tmp_path, resume=True)
    stage = open_stage(context, {})
    loop = Loop(tiny, context, stage)
    loop._update([next(loop.data.epoch(0))], 0, 0)
    fc = tiny.blocks[1].mlp.fc2
    assert fc.weight.grad.norm() <= 1.01e-4 * fc.weight.norm()
    assert tiny.head.weight.grad.norm() > 1e-2 * tiny.head.weight.norm()
    assert tiny.head.bias.grad.norm() > 1e-2
