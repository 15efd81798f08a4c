"""PyTorch's BatchNorm2d and ResNets, on the device that JAX runs on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax


@functools.cache
def why_not() -> str | None:
    """Returns why PyTorch cannot be measured beside JAX here, or None."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    backend = jax.default_backend()
    if backend == "cpu" or (backend == "gpu" and torch.cuda.is_available()):
        return None
    return f"PyTorch {torch.__version__} does not run on a {backend} here"


def device() -> str | None:
    """Returns PyTorch's name of JAX's device; None where it has none."""
    if why_not() is not None:
        return None
    return "cpu" if jax.default_backend() == "cpu" else "cuda"


def free() -> None:
    """Gives the memory that PyTorch keeps for later back to the card."""
    if device() == "cuda":
        import torch

        torch.cuda.empty_cache()


class Pending:
    """Work that PyTorch has queued; jax.block_until_ready waits for it."""

    def __init__(self, result: Any):
        self.result = result

    def block_until_ready(self) -> Pending:
        import torch

        if device() == "cuda":
            torch.cuda.synchronize()
        return self


def layer(
    shape: tuple[int, ...],
    dtype: str,
    variant: str,
    backward: bool,
    many: int = 1,
) -> Callable[[], Pending]:
    """Returns what runs BatchNorm2d in train mode, in channels_last.

    Args:
      shape: (N, H, W, C) of x.
      dtype: of x; parameters and statistics are float32.
      variant: "norm", "norm, relu" or "norm, add, relu".
      backward: whether gradients of x, of parameters and of what is added
        are taken too.
      many: layers in one call, each with its own x.
    """
    import torch

    n, h, w, c = shape
    where = {"device": device(), "dtype": getattr(torch, dtype)}
    norm = torch.nn.BatchNorm2d(c, momentum=0.01).to(device())

    def draw(like: float) -> torch.Tensor:
        x = like + torch.randn((n, c, h, w), **where)
        return x.to(memory_format=torch.channels_last)

    data = [
        [draw(1.0 + i).requires_grad_(), draw(0.0).requires_grad_()]
        for i in range(many)
    ]
    ct = draw(0.0)

    def forward(x, added):
        y = norm(x)
        if "add" in variant:
            y = y + added
        return torch.relu(y) if "relu" in variant else y

    def run() -> Pending:
        if not backward:
            with torch.no_grad():
                return Pending([forward(*pair) for pair in data])
        results = []
        for x, added in data:
            y = forward(x, added)
            inputs = [x, norm.weight, norm.bias]
            inputs += [added] if "add" in variant else []
            results.append((y, torch.autograd.grad(y, inputs, ct)))
        return Pending(results)

    return run


def _norm(width: int) -> Any:
    import torch

    return torch.nn.BatchNorm2d(width, momentum=0.01)


def resnet(network: Any) -> Any:
    """Returns the torch.nn.Module of a `gpu_nets.Network`."""
    import torch
    from torch import nn

    def conv(a: int, b: int, size: int, stride: int = 1) -> nn.Module:
        return nn.Conv2d(a, b, size, stride, size // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, width_in: int, width: int, stride: int):
            super().__init__()
            out = 4 * width if network.bottleneck else width
            if network.bottleneck:
                sizes = [(width_in, width, 1, 1), (width, width, 3, stride)]
                sizes += [(width, out, 1, 1)]
            else:
                sizes = [(width_in, width, 3, stride), (width, width, 3, 1)]
            parts: list[nn.Module] = []
            for a, b, size, step in sizes:
                parts += [conv(a, b, size, step), _norm(b), nn.ReLU()]
            self.body = nn.Sequential(*parts[:-1])
            self.shortcut = nn.Sequential()
            if stride > 1 or width_in != out:
                self.shortcut = nn.Sequential(
                    conv(width_in, out, 1, stride), _norm(out)
                )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.body(x) + self.shortcut(x))

    width = network.width
    stages = network.stages if network.bottleneck else (2, 2, 2, 2)
    grown = 4 if network.bottleneck else 1
    size, stride = (7, 2) if network.bottleneck else (3, 1)
    parts = [conv(3, width, size, stride), _norm(width), nn.ReLU()]
    if network.bottleneck:
        parts.append(nn.MaxPool2d(3, 2, 1))
    last = width
    for stage, blocks in enumerate(stages):
        for i in range(blocks):
            now = width * 2**stage
            parts.append(Block(last, now, 2 if stage and not i else 1))
            last = grown * now
    parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(last, network.classes))


class Steps:
    """`gpu_step.Steps` in PyTorch: channels_last, autocast to bfloat16.

    Args:
      network: a `gpu_nets.Network`.
      compiled: whether torch.compile makes the network's kernels.
    """

    def __init__(self, network: Any, *, compiled: bool):
        import torch

        # XLA tries out the kernels of a convolution too.
        torch.backends.cudnn.benchmark = True
        size, h, w, c = network.images
        net = resnet(network).to(device(), memory_format=torch.channels_last)
        self._optimizer = torch.optim.SGD(
            net.parameters(), lr=1e-6, momentum=0.9
        )
        self._net = torch.compile(net) if compiled else net
        x = torch.randn((size, c, h, w), device=device())
        self._x = x.to(memory_format=torch.channels_last)
        self._labels = torch.arange(size, device=device()) % 10

    def __call__(self) -> Pending:
        import torch

        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device(), torch.bfloat16):
            logits = self._net(self._x)
            loss = torch.nn.functional.cross_entropy(logits, self._labels)
        loss.backward()
        self._optimizer.step()
        return Pending(loss)
