# %% [markdown]
# # Fine-tune with frozen statistics, fold, export
#
# A network trained to classify digits is fine-tuned to tell even from odd ones,
# with frozen running statistics, so that small batches do not degrade them.
# Then batch norm is folded into the convolutions, and the result is exported as
# a program that needs neither flax nor jaxbn.

# %%
import pathlib
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets

from jaxbn import Running, convert
from jaxbn.fold import fold

digits = sklearn.datasets.load_digits()
images = (digits.images[..., None] / 16).astype(np.float32)
labels = digits.target.astype(np.int32)
in_test = np.arange(len(labels)) % 5 == 0


# %% [markdown]
# The model only uses flax; `convert` replaces its layers with those of jaxbn.


# %%
class Net(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x, *, train):
        for width in (16, 32):
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.9)
            x = nn.relu(norm(x))
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


def fit(model, variables, targets, *, rate, batch, steps):
    optimizer = optax.adam(rate)

    @jax.jit
    def step(variables, opt_state, x, y):
        def loss_of(params):
            logits, new = model.apply(
                variables | {"params": params},
                x,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean(), new

        grads, new = jax.grad(loss_of, has_aux=True)(variables["params"])
        moved, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], moved)
        return {"params": params, **new}, opt_state

    opt_state = optimizer.init(variables["params"])
    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.choice(np.flatnonzero(~in_test), batch)
        variables, opt_state = step(
            variables, opt_state, images[rows], targets[rows]
        )
    return variables


def accuracy(logits, targets):
    return float((logits.argmax(-1) == targets[in_test]).mean())


# %%
ten = convert.to_jaxbn(Net(10))
variables = ten.init(jax.random.key(0), images[:1], train=False)
variables = fit(ten, variables, labels, rate=3e-3, batch=128, steps=150)
logits = ten.apply(variables, images[in_test], train=False)
print(f"ten digits: {accuracy(logits, labels):.2%}")

# %%
two = convert.to_jaxbn(Net(2), running=Running(mode="frozen"))
start = two.init(jax.random.key(1), images[:1], train=False)
start["params"] |= {
    name: leaf for name, leaf in variables["params"].items() if name != "head"
}
start["batch_stats"] = variables["batch_stats"]
tuned = fit(two, start, labels % 2, rate=1e-3, batch=8, steps=200)
jax.tree.map(
    np.testing.assert_array_equal,
    tuned["batch_stats"],
    variables["batch_stats"],  # unchanged
)
logits = two.apply(tuned, images[in_test], train=False)
print(f"even or odd: {accuracy(logits, labels % 2):.2%}")

# %%
folded = fold(
    lambda variables, x: two.apply(variables, x, train=False),
    tuned,
    images[:2],
)
print("folding changed logits by", folded.max_difference.absolute)

(batch,) = jax.export.symbolic_shape("batch")
program = jax.export.export(folded.apply, platforms=("cpu", "cuda", "tpu"))(
    folded.params, jax.ShapeDtypeStruct((batch, 8, 8, 1), jnp.float32)
)
with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "even_or_odd.bin"
    file.write_bytes(program.serialize())
    loaded = jax.export.deserialize(bytearray(file.read_bytes()))
    again = loaded.call(folded.params, images[in_test])
np.testing.assert_allclose(again, logits, atol=1e-4)
print(f"the exported program: {accuracy(again, labels % 2):.2%}")
