"""torch.compile, torch.export and AOTInductor take the packed model."""

import io
import shutil

import pytest
import torch
from pack_cases import photographs, slimmed
from test_surgery import make

import vitslim


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["ViT", "DeiT distilled", "average pool", "prr"])
def test_compiles_without_a_graph_break(name, dynamic):
    model = slimmed(name, depth=2)
    packed, x = vitslim.pack(model), photographs(model, 3)
    torch.compiler.reset()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(x), packed(x))
    torch.testing.assert_close(compiled(x[:2]), packed(x[:2]))
    other = slimmed(name, depth=2).state_dict()
    packed.load_state_dict({key: value + 0.01 for key, value in other.items()})
    torch.testing.assert_close(compiled(x), packed(x))


def test_compiling_takes_sizes_that_were_seen():
    packed = vitslim.pack(make(dynamic_img_size=True))
    x = torch.randn(1, 3, 64, 48)
    torch.compiler.reset()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager", dynamic=False)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="run the packed model once on such"):
        compiled(x)
    expected = packed(x)
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_exports_and_loads_again(strict):
    model = slimmed("DeiT", depth=2)
    packed, x = vitslim.pack(model), photographs(model, 3)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(packed, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert set(program.state_dict) == {"head.weight", "head.bias"}
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    loaded = torch.export.load(stored).module()
    torch.testing.assert_close(loaded(x), packed(x))
    torch.testing.assert_close(loaded(x[:1]), packed(x[:1]))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_aot_inductor_packages_it(tmp_path):
    model = slimmed("DeiT", depth=2)
    packed, x = vitslim.pack(model), photographs(model, 3)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(packed, (x,), dynamic_shapes=({0: batch},))
    path = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "model.pt2"),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},  # to compile quickly
    )
    loaded = torch._inductor.aoti_load_package(path)
    torch.testing.assert_close(loaded(x), packed(x))
    torch.testing.assert_close(loaded(x[:1]), packed(x[:1]))
