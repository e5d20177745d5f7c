"""torch.compile in training: one graph of the whole model, however its blocks differ."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import vitslim
from vitslim.errors import VitslimError
from vitslim.workflow.runtime.context import StageContext
from vitslim.workflow.search import search
from vitslim.workflow.training.loop import Loop
from vitslim.workflow.training.train import open_stage


@pytest.fixture
def counted(monkeypatch):
    """Compiles to autograd's graphs, without code, and counts how many there are."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    plain = torch.nn.Module.compile

    def compile_counted(self, *args, **kwargs):
        return plain(self, *args, backend=counter, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_counted)
    yield counter
    torch._dynamo.reset()


def _slim(model):
    """A model whose blocks all differ in their heads, hidden units and tokens."""
    masked = vitslim.mask(model)
    with torch.no_grad():
        for parameter in masked.parameters():
            if parameter.ndim <= 2:
                parameter.uniform_(0.1, 1.0, generator=torch.Generator().manual_seed(0))
    plan = vitslim.threshold(masked, "attention=0.6,mlp=0.5,token=0.7", round_to=1)
    return vitslim.slim(masked, plan)


@pytest.mark.parametrize("kind", ["masked", "slim", "distilled"])
def test_training_is_one_graph_without_recompilation(
    tiny, quick, world, tmp_path, counted, kind
) -> None:
    settings = dataclasses.replace(quick, compile=True, epochs=2)
    model = vitslim.mask(tiny) if kind == "masked" else _slim(tiny)
    teacher = tiny if kind == "distilled" else None
    context = StageContext("dense", settings, world, tmp_path, resume=True)
    stage = open_stage(context, {})
    loop = Loop(model, context, stage, teacher=teacher)
    for epoch in range(2):
        loop.learner.update.begin_epoch(epoch)
        for batch in loop.data.epoch(epoch):
            loop.learner.update([batch], loop.done, epoch, where="here")
    # fullgraph=True raises at a graph break, so one frame is one graph of all blocks. A teacher is
    # another model.
    assert counted.frame_count == (2 if teacher else 1)
    loop.background.wait()


@pytest.fixture
def alone():
    """A world of this process, for what wants torch.distributed."""
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    yield
    torch.distributed.destroy_process_group()


@torch._dynamo.config.patch(recompile_limit=1)
def test_blocks_of_a_sharded_model_are_a_graph_each(
    tiny, quick, world, tmp_path, counted, alone
) -> None:
    model, losses = _slim(tiny), []
    for compiled in (False, True):
        settings = dataclasses.replace(quick, fsdp=True, compile=compiled, epochs=2)
        context = StageContext("dense", settings, world, tmp_path, resume=True)
        stage = open_stage(context, {})
        loop = Loop(copy.deepcopy(model), context, stage)
        loop.learner.update.begin_epoch(0)
        batches = [[batch] for batch in loop.data.epoch(0)]
        losses.append([loop.learner.update(batch, 0, 0.0, where="here").loss for batch in batches])
    assert counted.frame_count == len(model.blocks) > 1
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("sharded", [False, True])
def test_what_is_not_finite_is_found_in_a_compiled_model(
    tiny, quick, world, tmp_path, counted, alone, sharded
) -> None:
    settings = dataclasses.replace(quick, fsdp=sharded, compile=True)
    context = StageContext("dense", settings, world, tmp_path, resume=True)
    stage = open_stage(context, {})
    loop = Loop(tiny, context, stage)
    loop.learner.update.criterion = lambda out, target: (0 * out.sum()).sqrt()
    loop.learner.update.begin_epoch(0)
    with pytest.raises(VitslimError, match=r"gradient is not finite in here, .* of head.bias"):
        loop.learner.update(list(itertools.islice(loop.data.epoch(0), 1)), 0, 0.0, where="here")


def test_compiled_training_ends_where_eager_training_does(
    tiny, quick, world, tmp_path, counted
) -> None:
    quick = dataclasses.replace(quick, epochs=1, batch_size=512)
    eager = search(tiny, StageContext("search", quick, world, tmp_path / "eager"))
    compiled = search(
        tiny,
        StageContext(
            "search", dataclasses.replace(quick, compile=True), world, tmp_path / "compiled"
        ),
    )
    assert counted.frame_count
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
