"""Rules that `jax.experimental.jet` lacks for a training step."""

from __future__ import annotations

from typing import Any

import jax


def register_rules() -> None:
    """Lets `jax.experimental.jet` differentiate a training step.

    It has no rules for checkpoint_name, optimization_barrier and cond; a rule
    that is already registered stays. It also evaluates `custom_jvp` functions
    outside its own trace, which fails, for `jax.nn.relu` too: seen in JAX
    0.10.2 and 0.11.2. There is no public way to register rules. Where a name is
    gone nothing is registered, and jet raises as it does without jaxbn.
    """
    try:
        from jax._src.ad_checkpoint import name_p
        from jax._src.core import set_current_trace
        from jax._src.lax.lax import optimization_barrier_p
        from jax.experimental import jet
        from jax.lax import cond_p

        rules: Any = jet.jet_rules
        trace: Any = jet.JetTrace
        custom_jvp = trace.process_custom_jvp_call
    except (ImportError, AttributeError):
        return

    def name(primals: Any, series: Any, **params: Any) -> Any:
        return name_p.bind(primals[0], **params), series[0]

    def barrier(primals: Any, series: Any) -> Any:
        return jax.lax.optimization_barrier((list(primals), list(series)))

    def cond(primals: Any, series: Any, *, branches: Any, **_: Any) -> Any:
        import jax.extend.core

        core: Any = jax.extend.core

        def along(branch: Any) -> Any:
            fn = core.jaxpr_as_fun(branch)
            # Rules have series without the factorials of derivatives.
            return lambda primals, series: jet.jet(
                fn, primals, series, factorial_scaled=False
            )

        return jax.lax.switch(
            primals[0], list(map(along, branches)), primals[1:], series[1:]
        )

    def process_custom_jvp_call(self: Any, *args: Any, **params: Any) -> Any:
        with set_current_trace(self):
            return custom_jvp(self, *args, **params)

    for primitive, rule in (
        (name_p, name),
        (optimization_barrier_p, barrier),
        (cond_p, cond),
    ):
        rules.setdefault(primitive, rule)
    trace.process_custom_jvp_call = process_custom_jvp_call
