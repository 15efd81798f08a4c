"""Programs compiled for TPUs and GPUs: how their text is read, and a TPU's."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from tests.bench import (
    compiled,
    compiled_hlo,
    compiled_table,
    compiled_targets,
    compiled_text,
)

ROOT = pathlib.Path(__file__).parent.parent

# A fusion of 8 floats with 100 cycles, and all that can stand around it.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %double = f32[8]{0} add(%p, %p)
}

%sliced (q: f32[100,8], i: s32[]) -> f32[1,8] {
  %q = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,8]{1,0} dynamic-slice(%q, %i, %zero), \
dynamic_slice_sizes={1,8}
}

%updated (q: f32[100,8], r: f32[1,8], i: s32[]) -> f32[100,8] {
  %q = f32[100,8]{1,0} parameter(0)
  %r = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %put = f32[100,8]{1,0} dynamic-update-slice(%q, %r, %i, %zero)
}

%body (state: (f32[8])) -> (f32[8]) {
  %state = (f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%state), index=0
  %once = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, \
backend_config={"estimated_cycles":"100"}
  ROOT %out = (f32[8]{0}) tuple(%once)
}

%condition (state: (f32[8])) -> pred[] {
  %state = (f32[8]{0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

%below (state: (s32[], f32[8])) -> pred[] {
  %state = (s32[], f32[8]{0}) parameter(0)
  %number = s32[] get-tuple-element(%state), index=0
  %end = s32[] constant(5)
  ROOT %go = pred[] compare(%number, %end), direction=LT
}

%rare (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %all = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add
  ROOT %rarely = f32[8]{0} fusion(%all), kind=kLoop, calls=%fused, \
backend_config={"estimated_cycles":"7"}
}

%common (x: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} parameter(0)
}

ENTRY %main (x: f32[8], table: f32[100,8], i: s32[]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %table = f32[100,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
BODY
}
"""

FUSION = "fusion(%x), kind=kLoop, calls=%fused"
CYCLES = 'backend_config={"estimated_cycles":"100"}'


def program(*lines):
    return PROGRAM.replace("BODY", "\n".join(f"  {line}" for line in lines))


def read(*lines, **options):
    module = compiled_hlo.parse(program(*lines), **options)
    return compiled_text.read_kernels(module)


def decisions(*lines):
    return compiled_text.decisions(compiled_hlo.parse(program(*lines)))


def work(*lines, ordinary=True, **options):
    return compiled_text.work(read(*lines, **options), ordinary=ordinary)


def test_a_fusion_reads_its_operands_and_writes_its_results():
    line = f"ROOT %y = f32[8]{{0}} {FUSION}, {CYCLES}"
    assert work(line) == (100, 8 * 4 + 8 * 4, 1, {})
    (kernel,) = read(line)
    assert kernel.inside == {"fusion", "parameter", "add"}
    assert kernel.operands == (compiled_hlo.Array("f32", (8,)),)


def test_a_tuple_of_results_counts_each():
    line = (
        "%y = (f32[8]{0}, /*index=1*/bf16[2,3]{1,0:T(8,128)(2,1)}) "
        'custom-call(%x), custom_call_target="f"'
    )
    assert work(line).bytes == 8 * 4 + 8 * 4 + 6 * 2


def test_what_lies_on_the_chip_counts_nothing():
    lines = (
        "%start = (f32[8]{0:T(128)S(1)}, f32[8]{0}, u32[]{:S(2)}) "
        "copy-start(%x)",
        "%there = f32[8]{0:T(128)S(1)} copy-done(%start)",
        "ROOT %y = f32[8]{0} fusion(%there), kind=kLoop, calls=%fused",
    )
    assert work(*lines).bytes == 8 * 4 + 8 * 4
    # On GPU the same number is memory that collectives read.
    assert work(*lines, main=(0, 1)).bytes == 4 * 8 * 4


def test_of_a_slice_only_the_slice_counts():
    inside = "%y = f32[1,8] fusion(%table, %i), kind=kLoop, calls=%sliced"
    alone = "%y = f32[1,8] slice(%table), slice={[0:1], [0:8]}"
    assert work(inside).bytes == 2 * 8 * 4 + 4  # and the index
    assert work(alone).bytes == 2 * 8 * 4


def test_an_update_in_place_counts_the_update():
    row = "%row = f32[1,8] fusion(%table, %i), kind=kLoop, calls=%sliced"
    put = (
        "ROOT %y = f32[100,8] fusion(%table, %row, %i), kind=kLoop, "
        "calls=%updated"
    )
    assert work(row, put).bytes - work(row).bytes == 2 * 8 * 4 + 4


def test_parameters_tuples_and_scalars_are_no_kernels():
    lines = (
        "%one = f32[] constant(1)",
        "%two = f32[] add(%one, %one)",
        "%b = f32[2,4]{1,0} bitcast(%x)",
        "%t = (f32[8]{0}, f32[]) tuple(%x, %two)",
        "ROOT %y = f32[8]{0} get-tuple-element(%t), index=0",
    )
    assert work(*lines) == (0, 0, 0, {})


@pytest.mark.parametrize(
    "branches",
    [
        "branch_computations={%rare, %common}",
        "true_computation=%rare, false_computation=%common",
    ],
)
def test_branches_are_apart(branches):
    lines = (
        f"%y = f32[8]{{0}} {FUSION}, {CYCLES}",
        f"ROOT %z = f32[8]{{0}} conditional(%i, %y, %y), {branches}",
    )
    assert work(*lines) == (100, 64, 1, {})
    assert work(*lines, ordinary=False) == (7, 128, 2, {"all-reduce": 1})
    assert decisions(*lines) == 1


LOOP = "%z = (f32[8]) while(%t), condition=%condition, body=%body"
TRIPS = 'backend_config={"known_trip_count":{"n":"5"}}'


def test_a_loop_of_known_length_counts_as_often_as_it_runs():
    lines = ("%t = (f32[8]{0}) tuple(%x)", f"{LOOP}, {TRIPS}")
    assert work(*lines) == (500, 5 * 64, 5, {})
    assert work(*lines, ordinary=False) == (0, 0, 0, {})
    assert decisions(*lines) == 0


@pytest.mark.parametrize("start, trips", [("zero", 5), ("two", 3), ("i", 0)])
def test_the_length_of_a_scan_is_read_off_its_condition(start, trips):
    """As TPUs have it; a start that is not fixed leaves the length open."""
    lines = (
        "%zero = s32[] constant(0)",
        "%two = s32[] constant(2)",
        f"%first = s32[] copy(%{start})",
        "%t = (s32[], f32[8]{0}) tuple(%first, %x)",
        "%z = (s32[], f32[8]) while(%t), condition=%below, body=%body",
    )
    assert work(*lines).kernels == trips
    assert work(*lines, ordinary=False).kernels == (0 if trips else 1)


def test_a_loop_of_unknown_length_is_apart():
    lines = ("%t = (f32[8]{0}) tuple(%x)", LOOP)
    assert work(*lines) == (0, 0, 0, {})
    assert work(*lines, ordinary=False) == (100, 64, 1, {})
    assert decisions(*lines) == 1


def test_what_is_called_counts_as_its_caller():
    line = "ROOT %y = f32[8]{0} call(%x), to_apply=%rare"
    assert work(line) == (7, 128, 2, {"all-reduce": 1})


def test_the_start_and_the_end_of_a_collective_are_one():
    lines = (
        "%s = f32[8]{0} all-reduce-start(%x), replica_groups={}, "
        'to_apply=%add, metadata={op_name="jit(f)/jvp(N)/psum"}',
        "%d = f32[8]{0} all-reduce-done(%s)",
        "%g = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), dimensions={0}, "
        'metadata={op_name="jit(f)/transpose(jvp(N))/all_gather"}',
        "ROOT %h = f32[32]{0} all-gather-done(%g)",
    )
    found = work(*lines)
    assert found.collectives == {"all-reduce": 1, "all-gather": 1}
    assert found.bytes == (8 + 8 + 8 + 32) * 4
    assert compiled_text.traffic(read(*lines)) == {
        "all-reduce": {"forward": {32: 1}},
        "all-gather": {"backward": {128: 1}},
    }


SUMS = """\
%alone (p: bf16[64,8]) -> f32[8] {
  %p = bf16[64,8]{1,0} parameter(0)
  %wide = f32[64,8]{1,0} convert(%p)
  %zero = f32[] constant(0)
  ROOT %s = f32[8]{0} reduce(%wide, %zero), dimensions={0}, to_apply=%add
}

%product (p: bf16[64,8], k: bf16[1,8,8]) -> bf16[64,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  %k = bf16[1,8,8]{2,1,0} parameter(1)
  ROOT %c = bf16[64,8]{1,0} convolution(%p, %k), dim_labels=bf_io->bf
}

%joined (p: bf16[64,8], k: bf16[1,8,8]) -> (f32[8], bf16[64,8]) {
  %p = bf16[64,8]{1,0} parameter(0)
  %k = bf16[1,8,8]{2,1,0} parameter(1)
  %y = bf16[64,8]{1,0} fusion(%p, %k), kind=kOutput, calls=%product
  %wide = f32[64,8]{1,0} convert(%y)
  %zero = f32[] constant(0)
  %s = f32[8]{0} reduce(%wide, %zero), dimensions={0}, to_apply=%add
  ROOT %out = (f32[8]{0}, bf16[64,8]{1,0}) tuple(%s, %y)
}

ENTRY %main (x: bf16[64,8], k: bf16[1,8,8]) -> f32[8] {
  %x = bf16[64,8]{1,0} parameter(0)
  %k = bf16[1,8,8]{2,1,0} parameter(1)
  %conv = (f32[8]{0}, bf16[64,8]{1,0}) fusion(%x, %k), kind=kOutput, \
calls=%joined
  %y = bf16[64,8]{1,0} get-tuple-element(%conv), index=1
  ROOT %sums = f32[8]{0} fusion(%y), kind=kLoop, calls=%alone
}
"""


def test_sums_in_a_pass_of_their_own_are_found():
    kernels = compiled_text.read_kernels(compiled_hlo.parse(SUMS))
    (found,) = compiled_text.sums_alone(kernels, rows=64)
    assert found.instruction.name == "sums"
    assert not compiled_text.sums_alone(kernels, rows=65)


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        compiled_hlo.parse("nothing")


def test_a_gpu_is_described_by_its_data_sheet():
    text = compiled_targets.target_config(compiled_targets.TARGETS["h100"])
    assert "core_count: 132\n" in text
    assert "cuda_compute_capability { major: 9 }" in text
    assert text.count("{") == text.count("}")


def row(norm, cycles, apart=0):
    part = {"cycles": cycles, "bytes": 0, "kernels": 1, "collectives": {}}
    rest = {"cycles": 0, "bytes": 0, "kernels": apart, "collectives": {}}
    return {
        "target": "v5e",
        "program": "net",
        "norm": norm,
        "ordinary": part,
        "apart": rest,
        "xla_bytes": None,
        "temporary_bytes": 0,
        "decisions": apart,
        "traffic": {},
        "sums_alone": {"kernels": 0},
    }


def test_the_table_has_ratios_to_flax():
    error = {"target": "v5e", "program": "net", "norm": "none", "error": "big"}
    rows = [row("flax", 2_000_000), row("jaxbn", 3_000_000, apart=4), error]
    lines = compiled_table.table(rows).splitlines()
    assert lines[2] == "| norm | cycles, M | kernels | collectives | apart |"
    assert lines[4] == "| flax | 2.000 | 1 | none | nothing |"
    assert lines[5].startswith(
        "| jaxbn | 3.000 (1.500) | 1 (1.000) | none | decisions: 4,"
    )
    assert lines[-1] == "none: big"


def run(*argv):
    """Runs the program in a process of its own: it imports JAX its own way."""
    return subprocess.run(
        [sys.executable, "-m", "tests.bench.compiled", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        compiled.arguments(["--targets", "v5x"])
    assert "'v5x' is not one of v5e" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["v5e", "h100"])
def test_one_line_says_what_to_install(name):
    if not compiled_targets.missing(name):
        pytest.skip("its compiler is installed")
    got = run("--targets", name, "--quick")
    extra = {"v5e": "compile-tpu", "h100": "compile-gpu"}[name]
    assert got.returncode == 1 and not got.stdout
    assert got.stderr.count("\n") == 1
    assert f"pip install -e '.[{extra}]'" in got.stderr


@pytest.fixture(scope="module")
def on_v5e(tmp_path_factory):
    """Programs of the five-layer net by norm, and what was written of them."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    folder = tmp_path_factory.mktemp("compiled")
    argv = "--targets v5e --programs net --norms flax,jaxbn,stable"
    files = ["--json", str(folder / "all.json"), "--text", str(folder)]
    got = run(*argv.split(), *files)
    assert got.returncode == 0, got.stderr
    rows = json.loads((folder / "all.json").read_text())
    texts = {
        each["norm"]: next(folder.glob(f"*-{each['norm']}.txt")).read_text()
        for each in rows
    }
    return rows, texts


@pytest.mark.slow
def test_on_tpu_statistics_and_backward_sums_fuse_into_convolutions(on_v5e):
    """Convolutions sum what they write, forward and backward.

    Only the last layer's backward sums take a pass of their own: what is
    behind that layer is no convolution. E[x^2] - E[x]^2 is fused so, and
    deviations from a mean that is not known before are not.
    """
    rows, _ = on_v5e
    alone = {each["norm"]: each["sums_alone"]["kernels"] for each in rows}
    assert alone["flax"] == 1
    assert alone["stable"] >= 1 + 5  # so that the count can fail
    assert alone["jaxbn"] == 1


@pytest.mark.slow
def test_on_tpu_every_layer_has_one_all_reduce_each_way(on_v5e):
    """And two are of gradients, float32 and bfloat16."""
    rows, texts = on_v5e
    for each in rows:
        if each["norm"] != "stable":
            count = each["ordinary"]["collectives"]["all-reduce"]
            assert 10 <= count <= 12, each["norm"]
    kernels = compiled_text.read_kernels(compiled_hlo.parse(texts["jaxbn"]))
    sizes = compiled_text.traffic(kernels)["all-reduce"]["forward"]
    assert sum(sizes.values()) == 5
