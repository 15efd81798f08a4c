# %% [markdown]
# # Data parallel training with flax.nnx and jit
#
# Arrays are sharded over all devices, and `nnx.jit` compiles one program for
# them. Under `jit` an array is the whole batch, so batch norm needs no
# `axis_name`. To simulate eight devices on a CPU:
#
#     NPROC=16 JAX_NUM_CPU_DEVICES=8 python nnx_data_parallel.py

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn.nnx

# %%
digits = sklearn.datasets.load_digits()
images = (digits.images[..., None] / 16).astype(np.float32)
labels = digits.target.astype(np.int32)
in_test = np.arange(len(labels)) % 5 == 0


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([])
        for inputs, width in ((1, 16), (16, 32), (32, 32)):
            self.layers.append(
                nnx.Conv(inputs, width, (3, 3), use_bias=False, rngs=rngs)
            )
            self.layers.append(
                jaxbn.nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
            )
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in zip(self.layers[::2], self.layers[1::2]):
            x = nnx.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


# %%
mesh = jax.make_mesh(
    (jax.device_count(),), ("data",), axis_types=(AxisType.Auto,)
)
everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

model = Net(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
# Model and optimizer are replicated.
state = jax.device_put(nnx.state((model, optimizer)), everywhere)
nnx.update((model, optimizer), state)


@nnx.jit
def step(model: Net, optimizer: nnx.Optimizer, x, y) -> jax.Array:
    def loss_of(model: Net) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
        return losses.mean()

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def answers(model: Net, x) -> jax.Array:
    return model(x).argmax(-1)


# %%
BATCH = 128  # over all devices
train = np.flatnonzero(~in_test)
rng = np.random.default_rng(0)
for epoch in range(4):
    model.train()
    order = rng.permutation(train)
    for start in range(0, len(order) - BATCH + 1, BATCH):
        rows = order[start : start + BATCH]
        x, y = jax.device_put((images[rows], labels[rows]), split)
        loss = step(model, optimizer, x, y)
    model.eval()
    right = answers(model, jnp.asarray(images[in_test])) == labels[in_test]
    accuracy = float(right.mean())
    print(f"epoch {epoch + 1}  loss {loss:.3f}  accuracy {accuracy:.2%}")
