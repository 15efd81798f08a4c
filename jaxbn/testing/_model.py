"""A model of flax as the function that a certificate is about."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any


def as_function(
    apply_fn: Any,
    variables: Any,
    *,
    call: Callable[[Any, Any, bool], Any] | None,
    rngs: Any,
    mutable: Collection[str],
) -> tuple[Callable[[Any, Any], tuple[Any, Any]], Any]:
    """Returns (variables, batch) -> (outputs, new variables), and variables.

    Args:
      apply_fn: such a function, or a model of flax.linen or flax.nnx.
      variables: for it; None for an nnx model.
      call: of a model, see `jaxbn.doctor.examine`.
      rngs: of a linen model.
      mutable: of a linen model.

    Raises:
      ValueError: an option is given for a function, or does not fit the model.
    """
    from flax import linen as nn
    from flax import nnx

    from jaxbn._call import pure

    if isinstance(apply_fn, (nn.Module, nnx.Module)):
        apply, variables = pure(
            apply_fn, variables, call=call, rngs=rngs, mutable=mutable
        )
        return lambda variables, batch: apply(variables, batch), variables
    if call is not None or rngs is not None or mutable:
        raise ValueError(
            "call, rngs and mutable are only for flax models; got a "
            f"{type(apply_fn).__name__}, which is called as it is."
        )
    return apply_fn, variables
