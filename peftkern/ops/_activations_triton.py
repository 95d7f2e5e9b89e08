"""The activations of `bottleneck_adapter` in Triton, and their slopes: fp32, without libdevice."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Without the cancellation that exp has near 0."""
    e = tl.exp(-2 * tl.abs(x))
    far = tl.where(x < 0, e - 1, 1 - e) / (1 + e)
    square = x * x
    return tl.where(tl.abs(x) < 0.05, x * (1 - square * (1 / 3 - square * (2 / 15 - square * 17 / 315))), far)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """f(x) in fp32; "" is the identity."""
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        near = tl.minimum(tl.maximum(x, -30.0), 30.0)
        x = 0.5 * x * (1 + tanh(0.7978845608028654 * (near + 0.044715 * near * near * near)))
    elif ACTIVATION == "silu":
        x = x / (1 + tl.exp(-x))
    elif ACTIVATION == "tanh":
        x = tanh(x)
    return x


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """f'(x) in fp32."""
    if ACTIVATION == "relu":
        result = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        result = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "gelu_tanh":
        # Beyond this the tangent is 1, and the cube may not be finite.
        near = tl.minimum(tl.maximum(x, -30.0), 30.0)
        value = tanh(0.7978845608028654 * (near + 0.044715 * near * near * near))
        inner = 0.7978845608028654 * (1 + 3 * 0.044715 * near * near)
        result = 0.5 * (1 + value) + 0.5 * near * (1 - value * value) * inner
    elif ACTIVATION == "silu":
        value = 1 / (1 + tl.exp(-x))
        result = value * (1 + x * (1 - value))
    else:
        value = tanh(x)
        result = 1 - value * value
    return result
