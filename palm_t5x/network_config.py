"""TransformerConfig: the size and the kind of a decoder, checked where it is made."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from palm_t5x import layers, target
from palm_t5x.errors import UserError

_NAMED = jax.checkpoint_policies.save_only_these_names
REMAT_POLICIES = {  # least memory first; what is not saved is computed again
  'full': None,
  'save_attention': _NAMED('attention'),
  'save_qkv': _NAMED('attention', 'q', 'kv'),
  'save_gated': _NAMED('attention', 'q', 'kv', 'gated'),
  'save_wi': _NAMED('attention', 'q', 'kv', 'wi'),
  'minimal': jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
  'dots': jax.checkpoint_policies.checkpoint_dots,
  'none': None,
}


def _check(ok, message):
  if not ok:
    raise UserError(f'TransformerConfig: {message}')


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Size and kind of a decoder; T5X's field names first, then PaLM's choices.

  Raises UserError, with the value and the fix, for a combination that cannot be built.
  """

  vocab_size: int
  dtype: Any = 'auto'  # 'auto' | 'float32' | 'bfloat16' | 'fast' (CPU), or a jnp dtype
  emb_dim: int = 512
  num_heads: int = 8
  num_layers: int = 6
  head_dim: int = 64
  mlp_dim: int = 2048
  mlp_activations: tuple[str, ...] = ('swish', 'linear')
  dropout_rate: float = 0.0
  logits_via_embedding: bool = True
  num_real_tokens: int | None = None  # rows from here on are padding; None: no padding
  num_kv_heads: int = 1  # 1 multi-query, num_heads multi-head, between grouped
  parallel_block: bool = True
  norm: str = 'rms'  # or 'layer_norm', mean-centred
  final_norm_scale: bool = False
  scan_layers: bool = True  # one stacked tree of parameters, and a loop over it
  scan_unroll: int = (
    0  # layers of the loop laid out in a row; 0: all 16 or fewer on CPU
  )
  remat_policy: str = 'none'
  fused_fan_in: bool = False  # one fan-in for o_wo_fused, not one for each slice
  attention_kernel: str = (
    'auto'  # 'xla', 'splash' (TPU), 'cudnn' (GPU), 'blocked' (CPU)
  )
  segment_masking: bool = True  # packed segments, where given, see only themselves

  def __post_init__(self):
    if not isinstance(self.dtype, str):
      object.__setattr__(self, 'dtype', jnp.dtype(self.dtype).name)
    object.__setattr__(self, 'mlp_activations', tuple(self.mlp_activations))
    for name in [
      'vocab_size',
      'emb_dim',
      'num_heads',
      'num_layers',
      'head_dim',
      'mlp_dim',
    ]:
      value = getattr(self, name)
      _check(
        isinstance(value, int) and value > 0, f'{name}={value!r}: give a count > 0'
      )
    choices = {
      'dtype': ('auto', 'float32', 'bfloat16', 'fast'),
      'norm': ('rms', 'layer_norm'),
      'remat_policy': tuple(REMAT_POLICIES),
      'attention_kernel': ('auto', 'xla', 'blocked', 'cudnn', 'splash'),
    }
    for name, allowed in choices.items():
      value = getattr(self, name)
      _check(value in allowed, f'{name}={value!r}: choose one of {", ".join(allowed)}')
    unknown = [a for a in self.mlp_activations if a not in layers.ACTIVATIONS]
    _check(
      self.mlp_activations and not unknown,
      f'mlp_activations={self.mlp_activations}: use {", ".join(layers.ACTIVATIONS)}',
    )
    _check(self.head_dim % 2 == 0, f'head_dim={self.head_dim}: rotary needs it even')
    _check(
      self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0,
      f'num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}',
    )
    _check(
      not self.parallel_block or self.mlp_dim % self.num_heads == 0,
      f'the parallel block splits mlp_dim={self.mlp_dim} over num_heads='
      f'{self.num_heads}: make it a multiple',
    )
    _check(
      0.0 <= self.dropout_rate < 1.0,
      f'dropout_rate={self.dropout_rate}: give a probability in [0, 1)',
    )
    _check(
      1 < self.real_tokens <= self.vocab_size,
      f'num_real_tokens={self.num_real_tokens} must be between 2 and '
      f'vocab_size={self.vocab_size}',
    )

  @property
  def real_tokens(self):
    """Rows of the embedding that stand for tokens; the rest pad it for sharding."""
    return self.vocab_size if self.num_real_tokens is None else self.num_real_tokens

  @property
  def mode(self):
    """'float32', 'bfloat16' or 'fast'; 'auto' asks what is compiled for."""
    if self.dtype != 'auto':
      return self.dtype
    return 'float32' if target.platform() == 'cpu' else 'bfloat16'

  @property
  def unroll(self):
    """Layers in one trip of the scan. XLA:CPU would copy what a loop hands on."""
    if self.scan_unroll:
      return self.scan_unroll
    on_cpu = self.mode != 'bfloat16'
    return self.num_layers if on_cpu and self.num_layers <= 16 else 1

  @property
  def kernel(self):
    """The attention kernel that 'auto' stands for."""
    if self.attention_kernel != 'auto':
      return self.attention_kernel
    if target.platform() == 'tpu':
      return 'splash'
    return 'xla' if self.mode == 'bfloat16' else 'blocked'

  @property
  def activation_dtype(self):
    """Dtype of the residual stream: bf16 in mode 'bfloat16', else fp32."""
    return jnp.bfloat16 if self.mode == 'bfloat16' else jnp.float32

  @property
  def recomputed(self):
    """(weights, share): what the remat policy has the backward pass compute again.

    Weights of the block's kernels whose products are, and the share of the attention
    products; flash kernels always make the scores again (PaLM App. B: HFU).
    """
    heads = self.num_heads * self.head_dim
    inputs = heads + len(self.mlp_activations) * self.mlp_dim  # one fused product
    kv = 2 * self.num_kv_heads * self.head_dim
    columns = {'full': inputs + kv, 'save_attention': inputs + kv}
    columns |= {'save_qkv': inputs, 'save_gated': inputs}
    share = {'full': 1.0, 'minimal': 1.0, 'none': 0.0, 'dots': 0.0}
    attended = share.get(self.remat_policy, 0.5)
    if self.kernel != 'xla':
      attended = max(attended, 0.5)
    width = columns.get(self.remat_policy, 0)
    return self.num_layers * self.emb_dim * width, attended
