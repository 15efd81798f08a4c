"""Memory and programs of microbatches."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn import accumulate
from tests.helpers.accumulation import (
    conv,
    jit,
)


def six_convolutions(axis_name, checkpoint, params, x):
    def block(params, x):
        for w, scale, bias in params:
            x, _ = jaxbn.batch_norm(
                conv(x, w), scale, bias, axis_name=axis_name
            )
            x = jax.nn.relu(x)
        return x

    wrapped = jax.checkpoint(block) if checkpoint else block
    x = wrapped(params[3:], wrapped(params[:3], x))
    return (x.mean((1, 2)) ** 3).sum(-1).mean()


def compiled_convolutions(microbatches=None, checkpoint=False, **options):
    """The program, and the bytes of one activation of the whole batch."""
    channels, shape = 8, (32, 16, 16)
    w = jax.ShapeDtypeStruct((3, 3, channels, channels), jnp.float32)
    vector = jax.ShapeDtypeStruct((channels,), jnp.float32)
    x = jax.ShapeDtypeStruct((*shape, channels), jnp.float32)
    if microbatches is None:
        loss = functools.partial(six_convolutions, None, checkpoint)
        step = jax.value_and_grad(loss)
    else:
        exact = options.get("exact", True)
        loss = functools.partial(
            six_convolutions, "micro" if exact else None, checkpoint
        )
        step = accumulate.value_and_grad(
            loss, microbatches=microbatches, **options
        )
    lowered = jit(step).lower([(w, vector, vector)] * 6, x)
    return lowered, 4 * channels * np.prod(shape)


def temporaries(*args, **options):
    """In activations of the whole batch."""
    lowered, unit = compiled_convolutions(*args, **options)
    return lowered.compile().memory_analysis().temp_size_in_bytes / unit


def test_memory():
    whole = temporaries()
    assert whole > 12
    # The inputs of six normalizations, and four of one microbatch.
    assert temporaries(8) < 6 + 4 / 8 + 0.2
    # Of three in a block inside jax.checkpoint, and one gradient.
    assert temporaries(8, checkpoint=True) < 5.2
    assert temporaries(8, exact=False) < 15 / 8


@functools.cache
def compiled_text(microbatches, checkpoint):
    lowered, _ = compiled_convolutions(microbatches, checkpoint)
    return lowered.compile().as_text()


@pytest.mark.parametrize("checkpoint", (False, True))
def test_no_loop_copies_what_it_reads(checkpoint):
    text = compiled_text(8, checkpoint)
    bodies = re.split(r"\n(?=%|ENTRY)", text)
    assert sum(" dynamic-update-slice(" in body for body in bodies) > 6
    for body in bodies:
        stacks = re.findall(r"f32\[8,4,16,16,8\]\S* copy\(", body)
        assert body.startswith("ENTRY") or not stacks


def test_convolutions_in_loops_suit_the_fast_code():
    """Of another order of axes a CPU takes 20 times as long."""
    orders = re.findall(r"dim_labels=(\S+?),", compiled_text(8, False))
    assert len(orders) == 3 * 6 - 1
    assert set(orders) == {"b01f_01io->b01f"}


def test_programs_do_not_grow_with_microbatches():
    two, eight = (
        compiled_convolutions(k)[0].as_text().count("\n") for k in (2, 8)
    )
    assert two == eight


def test_no_convolution_runs_twice():
    lowered, _ = compiled_convolutions(2)
    # Forward, and two backward of which the first layer needs one.
    assert lowered.as_text().count("stablehlo.convolution") == 3 * 6 - 1
