"""The benchmark for accelerators: its arithmetic, and a tiny run of it."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.bench import (
    gpu,
    gpu_exact,
    gpu_layers,
    gpu_nets,
    gpu_run,
    gpu_step,
    gpu_steps,
    gpu_trace,
    layers,
    measure,
    torch_peer,
)

QUICK = ["--quick", "--seconds", "600"]


def test_share_of_the_floor_by_hand():
    copy = np.array([2.0, 2.0, 4.0])  # two passes, 1 s each in two rounds
    seconds = np.array([16.0, 8.0, 64.0])
    assert gpu_layers.share(8, copy, seconds) == 0.5
    assert gpu_layers.share(3, copy, seconds) == 0.1875
    assert str(gpu_layers.Time(1.25, 0.5)) == "1.25 ms 50%"


def test_floors_are_those_of_the_other_benchmark():
    forward, both = measure.FLOOR["forward"], measure.FLOOR["forward+backward"]
    assert gpu_layers.FLOORS["norm"] == (forward, both) == (3, 8)
    assert gpu_layers.FLOORS["norm, relu"] == (3, 8)
    assert gpu_layers.FLOORS["norm, add, relu"] == (4, 10)


def test_small_inputs_share_a_program():
    stem = 256 * 112 * 112 * 64 * 2
    assert gpu_layers.copies(stem, on_cpu=False) == 1
    assert gpu_layers.copies(2**26, on_cpu=False) == 4
    assert gpu_layers.copies(2**20, on_cpu=False) == 8
    assert gpu_layers.copies(2**20, on_cpu=True) == 1


def test_shapes_are_read_off_the_networks():
    large, small = gpu_nets.LARGE
    found = gpu_layers.norm_shapes(large.build("jaxbn"), large.images)
    assert found.total() == 53 and len(found) == 12
    assert sum(s[-1] * times for s, times in found.items()) == 26_560
    assert found[256, 112, 112, 64] == 1 and found[256, 7, 7, 2048] == 4
    found = gpu_layers.norm_shapes(small.build("flax"), small.images)
    assert found.total() == 20
    assert set(found) == {(1024, 32 >> i, 32 >> i, 64 << i) for i in range(4)}


def parameters(network, norm):
    model = network.build(norm)
    x = jax.ShapeDtypeStruct((1, *network.images[1:]), jnp.float32)
    found = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, train=False), x
    )
    size = sum(leaf.size for leaf in jax.tree.leaves(found["params"]))
    return size, "batch_stats" in found


@pytest.mark.parametrize(
    "network, size",
    [(gpu_nets.LARGE[0], 25_557_032), (gpu_nets.LARGE[1], 11_173_962)],
    ids=lambda value: getattr(value, "name", None),
)
def test_networks_of_both_libraries_have_the_published_size(network, size):
    for norm, stats in (("flax", True), ("none", False)):
        assert parameters(network, norm) == (size, stats)
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        theirs = torch_peer.resnet(network)
    assert sum(p.numel() for p in theirs.parameters()) == size
    x = torch.empty(2, 3, *network.images[1:3], device="meta")
    shapes = []
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(
                lambda _, inputs, y: shapes.append(tuple(y.shape[1:]))
            )
    theirs(x)
    ours = gpu_layers.norm_shapes(network.build("jaxbn"), network.images)
    wanted = [(c, h, w) for (_, h, w, c), n in ours.items() for _ in range(n)]
    assert sorted(shapes) == sorted(wanted)


def test_networks_of_both_libraries_compute_the_same():
    torch = pytest.importorskip("torch")
    network = gpu_nets.Network(
        "two", "ResNet-50", (2, 32, 32, 3), 10, 2, (1, 1)
    )
    model = network.build("jaxbn", "float32")
    x = np.random.default_rng(0).normal(size=network.images)
    x = x.astype(np.float32)
    torch.manual_seed(0)
    theirs = torch_peer.resnet(network)
    convs, linear = [], None
    for module in theirs.modules():
        if isinstance(module, torch.nn.Conv2d):
            convs.append(module.weight.detach().numpy().transpose(2, 3, 1, 0))
        if isinstance(module, torch.nn.Linear):
            linear = module.weight.detach().numpy().T
    weights = iter(convs)

    def fill(tree):
        new = dict(tree)
        for name in sorted(n for n in tree if n.startswith("Conv_")):
            new[name] = {"kernel": next(weights)}
        for name in sorted(n for n in tree if n.startswith("Bottleneck_")):
            new[name] = fill(tree[name])
        return new

    init = functools.partial(model.init, train=False)
    abstract = jax.eval_shape(init, jax.random.key(0), x)
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.full(
            leaf.shape, path[-1].key in ("scale", "var"), np.float32
        ),
        abstract,
    )
    params = fill(variables["params"])
    bias = next(m.bias for m in theirs.modules() if hasattr(m, "in_features"))
    params["Dense_0"] = {"kernel": linear, "bias": bias.detach().numpy()}
    ours, _ = jax.jit(
        functools.partial(model.apply, train=True, mutable=["batch_stats"])
    )({**variables, "params": params}, x)
    with torch.no_grad():
        want = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(ours, want.numpy(), atol=1e-4)


@pytest.mark.parametrize("variant", gpu_layers.FLOORS)
def test_program_is_the_norm_with_what_follows(variant):
    layer = layers.build("jaxbn", 3)
    x, ct = measure.inputs((4, 2, 2, 3), "float32", channels_first=False)
    data = [(x, jnp.flip(ct), ct), (2 * x**3, ct, ct)]
    run = jax.jit(gpu_layers.program(layer, variant, True))
    first, second = run(*layer.init(), data)
    y, _, _, dx, dadded = first
    xhat = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    before = xhat + (jnp.flip(ct) if "add" in variant else 0)
    want = np.maximum(before, 0) if "relu" in variant else before
    np.testing.assert_allclose(y, want, atol=1e-5)
    seen = np.where(want > 0, ct, 0) if "relu" in variant else ct
    if "add" in variant:
        np.testing.assert_array_equal(dadded, seen)
    else:
        assert dadded is None
    np.testing.assert_allclose(dx.sum((0, 1, 2)), 0, atol=1e-4)
    assert np.abs(second[0] - y).max() > 0.1
    forward = gpu_layers.program(layer, variant, False)
    np.testing.assert_allclose(
        jax.jit(forward)(*layer.init(), data)[0][0], y, atol=1e-6
    )


def test_torch_layer_does_what_its_name_says():
    pytest.importorskip("torch")
    run = torch_peer.layer((16, 4, 4, 3), "float32", "norm, add, relu", True, 2)
    results = jax.block_until_ready(run()).result
    assert len(results) == 2
    y, grads = results[0]
    assert y.min() == 0 and len(grads) == 4
    forward = torch_peer.layer((16, 4, 4, 3), "float32", "norm", False)
    y = forward().result[0].numpy()
    np.testing.assert_allclose(y.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(y.var((0, 2, 3)), 1, atol=1e-3)


HLO = """HloModule jit_step, is_scheduled=true

%fused_computation (p.0: f32[8]) -> f32[8] {
  %p.0 = f32[8]{0} parameter(0)
  ROOT %m = f32[8]{0} maximum(%p.0, %p.0), metadata={op_name="jit(f)/relu"}
}

%fused_computation.1 (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  %a = f32[8]{0} add(%p.1, %p.1), metadata={op_name="j/BatchNorm_3/jit(run)/a"}
  ROOT %b = f32[8]{0} maximum(%a, %a), metadata={op_name="jit(f)/relu"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %fusion = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused_computation
  %fusion.1 = f32[8]{0} fusion(%fusion), kind=kLoop, calls=%fused_computation.1
  %c = f32[8]{0} convolution(%fusion.1), metadata={op_name="j/BatchNorm_0/c"}
  ROOT %cc = f32[8]{0} custom-call(%c), custom_call_target="__cudnn$convForward"
}
"""


def test_kernels_are_told_apart():
    matmul, norm, other = gpu_trace.KINDS
    found = gpu_trace.kinds(HLO)
    assert {k: found[k] for k in ("fusion", "fusion.1", "c", "cc")} == {
        "fusion": other,
        "fusion.1": norm,
        "c": matmul,
        "cc": matmul,
    }
    events = [("fusion", 1.0), ("fusion.1", 2.0), ("cc", 4.0), ("unknown", 1.0)]
    assert gpu_trace.add_up(events, found) == {
        matmul: (4.0, 0.5),
        norm: (2.0, 0.25),
        other: (2.0, 0.25),
    }
    with pytest.raises(ValueError, match="holds no kernel"):
        gpu_trace.add_up([], found)


def test_kernels_of_a_graph_are_told_apart_by_their_own_names():
    name = gpu_trace.instruction
    assert name("fusion.3", "any kernel") == "fusion.3"
    assert (
        name("command_buffer_9", "loop_add_fusion_12") == "loop_add_fusion.12"
    )
    assert name("command_buffer_9", "loop_add_fusion") == "loop_add_fusion"


def test_errors_in_a_few_words():
    gone = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying")
    assert gpu_run.short(gone) == "out of memory"
    assert gpu_run.short(ValueError("one\ntwo")) == "ValueError: one"
    assert gpu_run.short(KeyError()) == "KeyError: "


def test_a_failure_leaves_the_other_sections(monkeypatch, tmp_path, capsys):
    def fails(run):
        """Fails."""
        yield {"MiB": 1}
        raise RuntimeError("the card is gone")

    monkeypatch.setitem(gpu.SECTIONS, "copy", (fails, 1))
    build = layers.build

    def without_haiku(name, *args, **options):
        if name == "haiku":
            raise ImportError("no haiku here")
        return build(name, *args, **options)

    monkeypatch.setattr(layers, "build", without_haiku)
    file = tmp_path / "rows.json"
    result = gpu.main(
        [*QUICK, "--only", "copy", "--only", "norm", "--json", str(file)]
    )
    assert result["copy"] == [
        {"MiB": 1},
        {"note": "copy failed: RuntimeError: the card is gone"},
    ]
    rows = result["norm"]
    assert [row["what"] for row in rows] == [
        "norm, forward+backward",
        "norm, forward",
    ]
    for row in rows:
        assert row["haiku"] == "ImportError: no haiku here"
        for name in ("jaxbn", "flax fast", "flax stable"):
            assert row[name].ms > 0 and row[name].share > 0
        assert row["copy GB/s"] > 0
    shown = capsys.readouterr().out
    assert "the card is gone" in shown and rows[0]["x"] in shown
    assert set(json.loads(file.read_text())) == {"header", "copy", "norm"}


def test_bandwidth_is_measured_and_shown(capsys):
    rows = gpu.main(["--quick", "--only", "copy"])["copy"]
    assert rows and all(row["copy GB/s"] > 0 for row in rows)
    assert "copy GB/s" in capsys.readouterr().out


def test_the_layers_are_held_to_float64():
    rows = gpu.main(["--quick", "--only", "exact"])["exact"]
    assert rows[-1] == {"note": "all right"}
    assert len(rows) == 7 * len(gpu_exact.OFFSETS) + 2


def test_a_wrong_layer_is_found(monkeypatch):
    def off(x, *rest):
        y, (mean, var) = function(x, *rest)
        return y, (mean, var * (1 + 2e-5))

    function = gpu_exact._function
    monkeypatch.setattr(gpu_exact, "_function", off)
    rows = gpu.main(["--quick", "--only", "exact"])["exact"]
    wrong = [row["case"] for row in rows if row.get("right") is False]
    assert wrong == [f"batch_norm, offset {o:g}" for o in gpu_exact.OFFSETS]


def test_steps_without_the_second_pass_decide_nothing():
    networks = gpu_nets.QUICK
    names = ["jaxbn", "jaxbn, conditional", "jaxbn, one pass"]
    found = gpu_step.compile_all(networks, names)
    ours, same, none = (
        found[networks[0], name].compiled.as_text().count(" conditional(")
        for name in names
    )
    assert ours == same > 0  # on CPUs
    assert none == 0


def test_unknown_section(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "norms"])
    assert "invalid choice: 'norms'" in capsys.readouterr().err


def test_no_time_left_is_said():
    result = gpu.main(["--quick", "--seconds", "0", "--only", "steps"])
    notes = [row["note"] for row in result["steps"]]
    assert notes == ["no time left to compile"]


@pytest.mark.slow
def test_quick_run_from_end_to_end(tmp_path):
    file = tmp_path / "rows.json"
    trace = tmp_path / "trace"
    result = gpu.main([*QUICK, "--json", str(file), "--trace", str(trace)])
    assert set(result) == {"header", *gpu.SECTIONS}
    failed = [
        row["note"]
        for name in gpu.SECTIONS
        for row in result[name]
        if "failed" in row.get("note", "")
    ]
    assert not failed
    speeds = {r["norm"]: r for r in result["steps"] if "images/s" in r}
    assert {"jaxbn", "flax", "jaxbn, recomputed"} <= set(speeds)
    assert all(math.isfinite(r["images/s"]) for r in speeds.values())
    memory = [r for r in result["steps"] if "temporary GiB" in r]
    assert all(0 < r["temporary GiB"] < r["all GiB"] for r in memory)
    for row in result["trace"]:
        parts = [float(row[k].split()[2][:-1]) for k in gpu_trace.KINDS]
        assert min(parts) > 0 and 98 <= sum(parts) <= 102
    assert list(trace.glob("**/*.xplane.pb"))
    assert [r["outcome"] for r in result["batch"][:-1]] == ["ran", "ran"]
    assert result["batch"][-1]["note"].endswith("batch 8 ran")


def test_a_batch_that_does_not_fit_ends_the_search(monkeypatch):
    class Full:
        total = 2**30

        def __init__(self, *args, batch=4, **fields):
            self.size = batch

        def compile(self):
            return self

        def __call__(self):
            if self.size > 8:
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return jnp.zeros(())

    monkeypatch.setattr(gpu_steps, "Steps", Full)
    monkeypatch.setattr(
        gpu_steps,
        "compile_all",
        lambda networks, names: {(networks[0], names[0]): Full()},
    )
    run = gpu_run.Run(quick=False, seconds=60)
    run.networks = gpu_nets.QUICK
    rows = list(gpu_steps.largest_batch(run))
    found = [row.get("outcome", row.get("note")) for row in rows]
    assert found[:4] == [
        "ran",
        "ran",
        "out of memory",
        "one bottleneck, jaxbn: batch 8 ran",
    ]
    assert len(found) == 12
