"""What JAX and the model's own code keep does not notice a conversion."""

import abc
import functools
import pickle
import subprocess
import sys
import textwrap
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from jaxbn import convert
from tests.helpers.flax_models import Block, data, std

pytestmark = pytest.mark.sample(2)

KEY = jax.random.key(0)
MUTABLE = dict(mutable=["batch_stats"])
JitBlock = nn.jit(Block)


class Decorated(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return Block()(x)


class OfAFunction(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.jit(call)(Block(), x)


def call(module, x):
    return module(x)


class InCompact(nn.Module):
    @nn.compact
    def __call__(self, x):
        return JitBlock()(x)


class InSetup(nn.Module):
    def setup(self):
        self.layers = [JitBlock()]

    def __call__(self, x):
        return self.layers[0](x)


class AsField(nn.Module):
    block: nn.Module

    def __call__(self, x):
        return self.block(x)


class AsArgument(nn.Module):
    """Hands a bound part to another that may be converted."""

    outer: Any

    def setup(self):
        self.block = JitBlock()
        self.caller = self.outer(Caller())

    def __call__(self, x):
        return self.caller(self.block, x)


class Caller(nn.Module):
    @nn.compact
    def __call__(self, block, x):
        return block(x)


@pytest.mark.parametrize(
    "make",
    [
        Decorated,
        OfAFunction,
        InCompact,
        InSetup,
        lambda: AsField(JitBlock()),
        lambda: AsField(nn.Sequential((JitBlock(),))),
        lambda: JitBlock(),
        lambda: nn.Sequential((Decorated(),)),
    ],
)
def test_compiled_functions_are_not_mixed_up(make):
    # nn.jit keeps what it has traced in the class, jax.jit by argument.
    @functools.partial(jax.jit, static_argnums=0)
    def run(model, variables, x):
        return model.apply(variables, x, **MUTABLE)[0]

    plain, model, x = make(), convert.to_jaxbn(make()), data()
    half = convert.to_jaxbn(make(), momentum=0.5)
    variables = plain.init(KEY, x)
    means: dict[Any, set[float]] = {}
    for m in (plain, model, half) * 2 + (half, model, plain) * 2:
        y, new = m.apply(variables, x, **MUTABLE)
        assert (abs(np.std(y) - 1) < 1e-3) == (m is not plain)
        assert (abs(std(run, m, variables, x) - 1) < 1e-3) == (m is not plain)
        means.setdefault(m, set()).add(float(jax.tree.leaves(new)[0][0]))
    (slow,), (fast,) = means[model], means[half]
    np.testing.assert_allclose(5 * slow, fast, rtol=1e-4)
    # Of a bound model, whose setup may have run before any method.
    bound = model.bind(variables, **MUTABLE)
    if hasattr(bound, "layers"):
        assert abs(std(bound.layers[0], x) - 1) < 1e-3
    assert abs(std(model.bind(variables, **MUTABLE), x) - 1) < 1e-3
    assert abs(std(plain.bind(variables, **MUTABLE), x) - 1) > 1e-3


def test_a_part_that_is_called_in_both_worlds():
    x = data()
    plain, model = AsArgument(lambda m: m), AsArgument(convert.to_jaxbn)
    variables = plain.init(KEY, x)
    for m in (plain, model, plain, model):
        y = m.apply(variables, x, **MUTABLE)[0]
        assert (abs(np.std(y) - 1) < 1e-3) == (m is model)
        y = m.apply(variables, x, method=lambda m, x: m.block(x), **MUTABLE)[0]
        assert abs(np.std(y) - 1) > 1e-3


def test_nothing_is_compiled_again():
    script = """
        import jax, numpy as np, flax.linen as nn

        events = []
        jax.monitoring.register_event_duration_secs_listener(
            lambda name, *_, **__: events.append(name)
        )

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.BatchNorm(False)(nn.Dense(3)(x))

        model, x = Net(), np.ones((4, 3), np.float32)
        variables = jax.jit(model.init)(jax.random.key(0), x)
        step = jax.jit(lambda v, x: model.apply(v, x, mutable=["batch_stats"]))

        def check(what):
            step(variables, x)
            before = len(events)
            step(variables, x)
            jax.eval_shape(step, variables, x)
            assert events[before:] == [], (what, events[before:])

        step(variables, x)
        jax.eval_shape(step, variables, x)
        assert events
        before = len(events)
        from jaxbn import convert
        step(variables, x)
        assert len(events) == before, events[before:]
        converted = convert.to_jaxbn(model)
        y, _ = converted.apply(variables, x, mutable=["batch_stats"])
        jax.jit(converted.apply, static_argnames="mutable")(
            variables, x, mutable=("batch_stats",)
        )
        before = len(events)
        step(variables, x)
        assert len(events) == before, events[before:]
        check("step")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


REGISTER: dict[str, type] = {}
MADE: list[type] = []


class Meta(abc.ABCMeta):
    def __init__(cls, *args, **kwargs):
        super().__init__(*args, **kwargs)
        MADE.append(cls)


class Registered(nn.Module, metaclass=Meta):
    def __init_subclass__(cls, *, key=None, **kwargs):
        super().__init_subclass__(**kwargs)
        if key is None or key in REGISTER:
            raise TypeError(f"{cls} has the key {key}")
        REGISTER[key] = cls


class Entry(Registered, key="entry"):
    features: int = 3

    def __post_init__(self):
        super().__post_init__()
        assert super().__thisclass__ is Entry

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(False)(nn.Dense(self.features)(x))


def test_the_authors_code_does_not_hear_of_it():
    register, made, x = dict(REGISTER), list(MADE), data()
    model = convert.to_jaxbn(Entry())
    variables = model.init(KEY, x)
    assert abs(std(model.apply, variables, x, **MUTABLE) - 1) < 1e-3
    assert (register, made) == (REGISTER, MADE)
    assert isinstance(model, Entry) and not isinstance(Block(), type(model))
    assert isinstance(model, type(model)) and issubclass(type(model), nn.Module)
    twin = pickle.loads(pickle.dumps(model.clone(features=2)))
    assert twin.features == 2 and type(twin) is type(model)
    # A class that is derived from it is announced as any other.

    class Derived(type(model), key="derived"):
        more: int = 1

    assert REGISTER.pop("derived") is Derived
    assert Derived(features=2, more=3).more == 3
