"""The networks in float64 numpy, by the equations of their papers."""

import jax
import numpy as np


def conv(x, kernel, stride=1):
    size = len(kernel)
    padding = (size // 2, size // 2)
    x = np.pad(x, ((0, 0), padding, padding, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
    return np.einsum(
        "bhwcij,ijco->bhwo", windows[:, ::stride, ::stride], kernel
    )


def relu(x):
    return np.maximum(x, 0)


class Layers:
    """Layers of a network or a block by name, in float64."""

    def __init__(self, params, stats):
        self._params, self._stats = params, stats

    def inside(self, name):
        return Layers(self._params[name], self._stats[name])

    def conv(self, x, name, stride=1):
        return conv(x, self._params[name]["kernel"], stride)

    def norm(self, x, name):
        mean, var = self._stats[name]["mean"], self._stats[name]["var"]
        scale, bias = self._params[name]["scale"], self._params[name]["bias"]
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    def logits(self, x):
        dense = self._params["Dense_0"]
        return x.mean((1, 2)) @ dense["kernel"] + dense["bias"]


def padded(x, width, stride):
    x = x[:, ::stride, ::stride]
    more = (width - x.shape[-1]) // 2
    return np.pad(x, ((0, 0), (0, 0), (0, 0), (more, more)))


def resnet(net, x):
    x = relu(net.norm(net.conv(x, "Conv_0"), "BatchNorm_0"))
    for i in range(3):
        stride, block = 1 + (i > 0), net.inside(f"Block_{i}")
        y = block.conv(x, "Conv_0", stride)
        y = relu(block.norm(y, "BatchNorm_0"))
        y = block.norm(block.conv(y, "Conv_1"), "BatchNorm_1")
        x = relu(padded(x, y.shape[-1], stride) + y)
    return net.logits(x)


def preact(net, x):
    x = net.conv(x, "Conv_0")
    for i in range(3):
        stride, block = 1 + (i > 0), net.inside(f"PreActBlock_{i}")
        y = relu(block.norm(x, "BatchNorm_0"))
        x = x if i else y
        y = block.conv(y, "Conv_0", stride)
        y = block.conv(relu(block.norm(y, "BatchNorm_1")), "Conv_1")
        x = padded(x, y.shape[-1], stride) + y
    return net.logits(relu(net.norm(x, "BatchNorm_0")))


def preact_bottleneck(net, x):
    x = net.conv(x, "Conv_0")
    for i in range(3):
        stride, block = 1 + (i > 0), net.inside(f"PreActBlock_{i}")
        y = relu(block.norm(x, "BatchNorm_0"))
        x = block.conv(y, "shortcut", stride)
        y = block.conv(y, "Conv_0", stride)
        for j in (1, 2):
            y = block.conv(relu(block.norm(y, f"BatchNorm_{j}")), f"Conv_{j}")
        x = x + y
    return net.logits(relu(net.norm(x, "BatchNorm_0")))


def wide(net, x):
    x = net.conv(x, "Conv_0")
    for i in range(3):
        stride, block = 1 + (i > 0), net.inside(f"PreActBlock_{i}")
        y = relu(block.norm(x, "BatchNorm_0"))
        x = block.conv(y, "shortcut", stride)
        y = block.conv(y, "Conv_0", stride)
        y = block.conv(relu(block.norm(y, "BatchNorm_1")), "Conv_1")
        x = x + y
    return net.logits(relu(net.norm(x, "BatchNorm_0")))


def resnet18(net, x):
    x = relu(net.norm(net.conv(x, "Conv_0"), "BatchNorm_0"))
    for i in range(8):
        stride = 2 if i in (2, 4, 6) else 1
        block = net.inside(f"ProjectionBlock_{i}")
        y = relu(block.norm(block.conv(x, "Conv_0", stride), "BatchNorm_0"))
        y = block.norm(block.conv(y, "Conv_1"), "BatchNorm_1")
        if stride == 2:
            x = block.conv(x, "shortcut", stride)
            x = block.norm(x, "shortcut_norm")
        x = relu(x + y)
    return net.logits(x)


def randomized(variables, rng):
    """Values for the shapes, that no two layers have the same."""

    def one(path, leaf):
        name = path[-1].key
        if name in ("var", "scale"):
            return rng.uniform(0.5, 1.5, leaf.shape)
        spread = np.sqrt(2 / max(np.prod(leaf.shape[:-1]), 1))
        return rng.normal(0, spread if name == "kernel" else 0.3, leaf.shape)

    return jax.tree_util.tree_map_with_path(one, variables)
