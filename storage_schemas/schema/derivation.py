"""Derives latents from noise and velocity by the exact rule of FlowMatchEulerDiscreteScheduler.step.

In bf16: x' = bf16(f32(x) + f32(bf16(bf16(dt) * v))); in fp32: x' = x + dt * v. The scheduler multiplies a
0-dim dt with a prediction, which rounds dt to the prediction's dtype first; `v * dt` in fp32, a Python float
dt or a fused multiply-add give other bits. Another rule is another value of `latent_rule` in the manifest.
"""

from collections.abc import Sequence

import numpy as np

from secondcast.storage_schemas.schema.fields import Array


def step_sizes(sigmas: Sequence[float], dtype: np.dtype) -> Array:
    """Dt of each step, [K], in fp32 from fp32 sigmas, rounded to the dtype of the prediction."""
    values = np.asarray(sigmas, dtype=np.float32)
    return (values[1:] - values[:-1]).astype(dtype)


def euler_step(x: Array, velocity: Array, dt: Array) -> Array:
    """x_{k+1} from x_k and v_k (any shape, bfloat16 or float32) and the rounded dt (0-dim, same dtype)."""
    moved = (np.float32(dt) * velocity.astype(np.float32)).astype(x.dtype)
    return (x.astype(np.float32) + moved.astype(np.float32)).astype(x.dtype)


def derive_latents(noise: Array, velocity: Array, sigmas: Sequence[float]) -> Array:
    """Derive x_0 .. x_K, [..., K + 1, S, C], from noise [..., S, C] and velocity [..., K, S, C]."""
    steps = velocity.shape[-3]
    dt_K = step_sizes(sigmas, noise.dtype)
    latents = np.empty((*velocity.shape[:-3], steps + 1, *velocity.shape[-2:]), dtype=noise.dtype)
    latents[..., 0, :, :] = noise
    for k in range(steps):
        latents[..., k + 1, :, :] = euler_step(latents[..., k, :, :], velocity[..., k, :, :], dt_K[k])
    return latents


def predicted_clean_latent(x_SC: Array, velocity_SC: Array, sigma: float) -> Array:
    """x_k - sigma_k v_k in fp32: the teacher's prediction of the clean latent at step k."""
    return x_SC.astype(np.float32) - np.float32(sigma) * velocity_SC.astype(np.float32)
