"""What JAX and the model's own code keep does not notice a conversion."""

import functools

import flax.linen as nn
import jax
import numpy as np
from absl.testing import parameterized

from jaxbn import convert
from tests.convert_models import (
    Block,
    data,
)


class CachesTest(parameterized.TestCase):
    def test_compiled_functions_are_not_mixed_up(self):
        # nn.jit keeps what it has traced in the class, jax.jit by argument.
        inner = nn.jit(Block)

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                return inner()(x)

        @functools.partial(jax.jit, static_argnums=0)
        def run(model, variables, x):
            return model.apply(variables, x, mutable=["batch_stats"])[0]

        plain, model, x = Net(), convert.to_jaxbn(Net()), data()
        variables = plain.init(jax.random.key(0), x)
        order = (plain, model, plain, model)
        for models in (order, order[::-1]):
            for m in models:
                for y in (
                    m.apply(variables, x, mutable=["batch_stats"])[0],
                    run(m, variables, x),
                ):
                    assert (abs(np.std(y) - 1) < 1e-2) == (m is model)
