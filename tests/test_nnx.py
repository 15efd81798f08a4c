"""The nnx module against flax's own."""

import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

import jaxbn.linen
from jaxbn.nnx import BatchNorm
from tests.helpers import reference
from tests.helpers.nnx_layers import NOISE, draw, make, running, stats

pytestmark = pytest.mark.sample(3)

OPTIONS = (
    {},
    {"axis": 1, "features": 4},
    {"axis": (1,), "features": 4},
    {"use_bias": False},
    {"use_scale": False},
    {"use_bias": False, "use_scale": False},
    {"momentum": 0.7, "epsilon": 1e-2},
    {"dtype": jnp.bfloat16},
    {"param_dtype": jnp.bfloat16},
    {"scale_init": nnx.initializers.zeros},
    {"scale_metadata": {"note": 1}, "bias_metadata": {"note": 2}},
    {"use_fast_variance": False},
    {"promote_dtype": lambda arrays, dtype: arrays},
)


class DropInTest(parameterized.TestCase):
    def test_takes_the_arguments_of_flax_and_has_its_attributes(self):
        def arguments(function):
            given = inspect.signature(function).parameters.values()
            return {p.name: (p.kind, p.default) for p in given}

        flax = arguments(nnx.BatchNorm.__call__).items()
        assert arguments(BatchNorm.__call__).items() >= flax
        given = {
            name: default
            for name, (_, default) in arguments(nnx.BatchNorm.__init__).items()
            if name not in ("self", "num_features", "rngs")
        }
        assert len(given) >= 14
        explicit = BatchNorm(3, rngs=nnx.Rngs(0), **given)
        want = vars(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        for module in (explicit, BatchNorm(3, rngs=nnx.Rngs(0))):
            assert vars(module).keys() >= want.keys()
            for name in given.keys() & want.keys() - {"promote_dtype"}:
                assert type(vars(module)[name]) is type(want[name])
        with pytest.raises(TypeError, match="epsilom"):
            BatchNorm(3, rngs=nnx.Rngs(0), epsilom=1.0)

    def test_options_of_our_own(self):
        x = draw(8, 3)
        ids = np.arange(8) % 2
        module = BatchNorm(
            3,
            rngs=nnx.Rngs(0),
            sharing=jaxbn.Scope(num_ids=2),
            per_id="both",
            running=jaxbn.Running(skip_nonfinite=True),
            momentum=0.0,
        )
        assert module.scale.shape == module.mean.shape == (2, 3)
        module(x, ids=ids)
        for i in range(2):
            rows = np.asarray(x, np.float64)[ids == i]
            chex.assert_trees_all_close(
                [module.mean[i], module.var[i]],
                [rows.mean(0), rows.var(0)],
                rtol=1e-5,
            )
        before = module.mean[...]
        module(x.at[0].set(jnp.nan), ids=ids)
        chex.assert_trees_all_equal(module.mean[...], before)
        assert module.skipped[...] == 1
        module(x, ids=ids)
        assert module.skipped[...] == 1
        ghost = BatchNorm(
            3, rngs=nnx.Rngs(0), sharing=jaxbn.Scope(normalize_over=4)
        )
        y = np.asarray(ghost(x)).reshape(2, 4, 3)
        np.testing.assert_allclose(y.mean(1), 0, atol=1e-6)

    @parameterized.product(
        options=OPTIONS, dtype=(jnp.float32, jnp.bfloat16), masked=(False, True)
    )
    def test_same_numbers_as_flax_on_one_device(self, options, dtype, masked):
        x = draw(6, 4, 4, 3, dtype=dtype)
        mask = np.arange(6)[:, None, None, None] < 4 if masked else None
        ours, flax = make(**options), make(nnx.BatchNorm, **options)
        chex.assert_trees_all_equal(nnx.state(ours), nnx.state(flax))
        for inference in (False, True):
            got, want = (
                module(x, use_running_average=inference, mask=mask)
                for module in (ours, flax)
            )
            chex.assert_trees_all_equal_dtypes(got, want)
            tolerance = 3e-2 if got.dtype == jnp.bfloat16 else 1e-4
            chex.assert_trees_all_close(
                got.astype(np.float32),
                want.astype(np.float32),
                rtol=tolerance,
                atol=tolerance,
            )
            state = nnx.state(ours), nnx.state(flax)
            chex.assert_trees_all_equal_dtypes(*state)
            # Flax takes its statistics from the rounded input.
            rounded = options.get("dtype") == jnp.bfloat16
            tolerance = 1e-3 if rounded else 1e-5
            chex.assert_trees_all_close(*state, rtol=tolerance, atol=tolerance)

    @parameterized.parameters(1, 10)
    def test_running_statistics_after_steps(self, steps):
        batches = [draw(8, 3, seed=seed) for seed in range(steps)]
        ours, flax = make(), make(nnx.BatchNorm)
        for x in batches:
            ours(x)
            flax(x)
        chex.assert_trees_all_close(stats(ours), running(batches), rtol=1e-5)
        chex.assert_trees_all_close(stats(ours), stats(flax), rtol=1e-4)

    @parameterized.parameters(True, False)
    def test_checkpoints_move_both_ways(self, from_ours):
        class Net(nnx.Module):
            def __init__(self, norm, seed):
                rngs = nnx.Rngs(seed)
                self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
                self.norm = norm(4, rngs=rngs, scale_init=NOISE)

            def __call__(self, x):
                return self.norm(self.conv(x))

        x = draw(4, 6, 6, 3)
        kinds = (BatchNorm, nnx.BatchNorm)
        write, read = kinds if from_ours else reversed(kinds)
        write, read = Net(write, 0), Net(read, 1)
        write(x)
        nnx.update(read, nnx.to_pure_dict(nnx.state(write)))
        write.eval()
        read.eval()
        chex.assert_trees_all_close(read(x), write(x), atol=1e-5)
        # And as it is, into a model that never held other values.
        fresh = nnx.merge(nnx.graphdef(read), nnx.state(write))
        chex.assert_trees_all_equal(fresh(x), read(x))

    def test_same_numbers_as_linen(self):
        for dtype in (jnp.float32, jnp.bfloat16):
            ours = make(dtype=dtype)
            linen = jaxbn.linen.BatchNorm(dtype=dtype)
            params = {"scale": ours.scale[...], "bias": ours.bias[...]}
            variables = {"params": params, "batch_stats": stats(ours)}
            x = draw(8, 3)
            want, state = linen.apply(
                variables, x, False, mutable=["batch_stats"]
            )
            chex.assert_trees_all_equal(ours(x), want)
            chex.assert_trees_all_equal(stats(ours), state["batch_stats"])
            ours.eval()
            want = linen.apply({**variables, **state}, x, True)
            chex.assert_trees_all_equal(ours(x), want)

    def test_integers_are_read_as_flax_reads_them(self):
        x = np.arange(24).reshape(8, 3)
        ours, flax = make(), make(nnx.BatchNorm)
        chex.assert_trees_all_close(ours(x), flax(x), rtol=1e-4)
        chex.assert_trees_all_close(stats(ours), stats(flax), rtol=1e-5)

    @parameterized.parameters(
        *((None, call, call) for call in (True, False)),
        *((own, None, own) for own in (True, False)),
        *((own, not own, not own) for own in (True, False)),
    )
    def test_the_call_goes_before_the_attribute(self, own, call, inference):
        x = draw(8, 3)
        module = make(use_running_average=own)
        before = stats(module)
        y = module(x, call)
        scale, bias = module.scale[...], module.bias[...]
        if inference:
            want = x / np.sqrt(1 + 1e-5) * scale + bias
            chex.assert_trees_all_equal(stats(module), before)
        else:
            want = reference.batch_norm(x, scale, bias, True, x).y
            chex.assert_trees_all_close(stats(module), running([x]), rtol=1e-5)
        chex.assert_trees_all_close(y, want, rtol=1e-5, atol=1e-5)

    def test_train_eval_and_view_choose_the_statistics(self):
        x = draw(8, 3)
        module = make()
        trained = module(x)
        module.eval()
        after = stats(module)
        inferred = module(x)
        chex.assert_trees_all_equal(stats(module), after)
        assert np.abs(inferred - trained).max() > 0.1
        module.train()
        chex.assert_trees_all_equal(
            nnx.view(module, use_running_average=True)(x), inferred
        )
        chex.assert_trees_all_close(module(x), trained, atol=1e-5)
        assert (stats(module)["mean"] != after["mean"]).all()

    def test_use_running_average_must_be_given(self):
        module = make(use_running_average=None)
        message = "None in the constructor and in the call"
        with pytest.raises(ValueError, match=message):
            module(draw(8, 3))

    def test_wrong_mask_is_explained(self):
        module = make()
        with pytest.raises(ValueError, match=re.escape("mask[:, None, None")):
            module(draw(4, 2, 2, 3), mask=jnp.ones(4, bool))
        for module in (make(), make(nnx.BatchNorm)):
            with pytest.raises(ValueError, match="bool"):
                module(draw(8, 3), mask=jnp.ones((8, 1), int))


class PrecisionTest(parameterized.TestCase):
    def test_statistics_are_not_rounded_to_dtype(self):
        x = 300 + draw(64, 3)  # bfloat16 has steps of 2 here
        module = make(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        module(x)
        chex.assert_trees_all_equal_dtypes(
            stats(module), {"mean": np.zeros(3, "f"), "var": np.zeros(3, "f")}
        )
        chex.assert_trees_all_close(stats(module), running([x]), rtol=1e-5)

    def test_narrow_statistics_are_updated_wide_and_rounded_once(self):
        x = draw(64, 3)
        module = make()
        narrow = jax.tree.map(lambda a: a.astype("bfloat16"), nnx.state(module))
        nnx.update(module, narrow)
        module(x)
        want = make()
        want(x)
        chex.assert_trees_all_equal(
            stats(module),
            jax.tree.map(lambda a: a.astype("bfloat16"), stats(want)),
        )

    @parameterized.parameters(np.float64, np.complex64)
    def test_statistics_are_as_wide_as_the_input(self, dtype):
        x = np.asarray(draw(64, 3)).astype(dtype)
        x *= dtype(2 + 1j) if dtype == np.complex64 else 1
        want = {"mean": 0.01 * x.mean(0), "var": 0.99 + 0.01 * x.var(0)}
        with jax.enable_x64(dtype == np.float64):
            module = make()
            module(x)
            chex.assert_trees_all_equal_dtypes(stats(module), want)
            chex.assert_trees_all_close(stats(module), want, rtol=1e-6)

    def test_inference_in_bfloat16_is_rounded_once(self):
        x = (16 + draw(64, 3) / 8).astype(jnp.bfloat16)
        mean, var = np.float32(16.19), np.float32(0.0717)
        wide = np.asarray(x).astype(np.float64)
        want = (wide - mean) / np.sqrt(np.float64(var) + 1e-5)
        error = {}
        for cls in (BatchNorm, nnx.BatchNorm):
            module = cls(3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
            module.mean[...] = jnp.full(3, mean)
            module.var[...] = jnp.full(3, var)
            module.eval()
            got = np.asarray(module(x)).astype(np.float64)
            error[cls] = np.abs(got - want)
        half_a_step = np.abs(want) * 2**-8 + 1e-4
        assert (error[BatchNorm] <= half_a_step).all()
        assert error[BatchNorm].max() < error[nnx.BatchNorm].max() / 4

    def test_backward_pass_keeps_x_in_its_own_dtype(self):
        x = draw(64, 32, 3, dtype=jnp.bfloat16)
        graph, state = nnx.split(make())
        y, vjp = jax.vjp(lambda s, x: nnx.merge(graph, s)(x), state, x)
        assert y.dtype == jnp.float32
        large = [a for a in jax.tree.leaves(vjp) if a.size >= x.size]
        assert sum(a.nbytes for a in large) == x.nbytes
