"""Causal attention as a Pallas kernel on TPU: JAX's splash attention, per device.

The kernel never writes the [T, S] scores to memory and skips the blocks above the
diagonal. XLA cannot partition a kernel, so each device runs it on its rows and heads.
"""

import functools
import math

import jax
from jax.sharding import PartitionSpec

from palm_t5x import meshes, target

LANES = 128
LARGEST_BLOCK = 512


def fits(length: int) -> bool:
  """Whether the kernel's blocks divide rows of `length`."""
  return length % LANES == 0


def _own_share(q_BTHK, k_BTGK, v_BTGK, *, interpret):
  """softmax(q k) v of one device's rows and heads; q is scaled already."""
  # Here, for it takes half a second that runs on other devices need not wait for.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  B, T, H, K = q_BTHK.shape
  G, block = k_BTGK.shape[2], math.gcd(T, LARGEST_BLOCK)
  R = H // G
  kernel = splash.make_splash_mqa_single_device(
    splash.MultiHeadMask([splash.CausalMask((T, T))] * R),
    block_sizes=splash.BlockSizes(
      block_q=block,
      block_kv=block,
      block_kv_compute=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_kv_dkv_compute=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    # Output and log-sum-exp under the name that rematerialisation policies save.
    residual_checkpoint_name='attention',
    interpret=interpret,
  )
  q_BGRTK = q_BTHK.reshape(B, T, G, R, K).transpose(0, 2, 3, 1, 4)
  k_BGTK, v_BGTK = (x.transpose(0, 2, 1, 3) for x in (k_BTGK, v_BTGK))
  out_BGRTK = jax.vmap(jax.vmap(kernel))(q_BGRTK, k_BGTK, v_BGTK)
  return out_BGRTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def causal_attention(q_BTHK, k_BTGK, v_BTGK, interpret=None):
  """softmax(q k / sqrt(K)) v with a causal mask: [B, T, H, K] in q's dtype.

  Args:
    q_BTHK: queries of H heads; T is a multiple of 128.
    k_BTGK, v_BTGK: keys and values of G heads, each shared by H/G query heads.
    interpret: run the kernel's arithmetic without a TPU (slow: for tests); None: where
      the program is compiled for a CPU.
  """
  if interpret is None:
    interpret = target.platform() == 'cpu'
  q_BTHK = (q_BTHK * (1.0 / math.sqrt(q_BTHK.shape[-1]))).astype(q_BTHK.dtype)
  run = functools.partial(_own_share, interpret=interpret)
  rows, (heads,) = meshes.batch_axes(q_BTHK.shape[0]), meshes.axes_of('heads')
  G = k_BTGK.shape[2]
  if G > 1 and G % meshes.size(heads):
    heads = ()  # a device's query heads would need parts of several groups
  if not rows and not heads:
    return run(q_BTHK, k_BTGK, v_BTGK)
  q_spec = PartitionSpec(rows, None, heads)
  kv_spec = PartitionSpec(rows, None, heads if G > 1 else None)
  return jax.shard_map(
    run,
    in_specs=(q_spec, kv_spec, kv_spec),
    out_specs=q_spec,
    # Mesh axes of one device too, or XLA takes the kernel for one it shall partition.
    axis_names={*rows, *heads} | {a for a, n in meshes.sizes().items() if n == 1},
    check_vma=False,
  )(q_BTHK, k_BTGK, v_BTGK)
