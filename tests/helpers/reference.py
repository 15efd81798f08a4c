"""The public float64 reference with the tests' order of arguments."""

from jaxbn.testing import float64_reference


def batch_norm(x, scale, bias, keep, cotangent, *, epsilon=1e-5):
    return float64_reference(
        x, scale, bias, where=keep, cotangent=cotangent, epsilon=epsilon
    )
