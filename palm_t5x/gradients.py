"""The gradient of a batch: summed over microbatches, then over pods.

Inside a pod XLA's partitioner reduces gradients as the rule table says, so that each
chip ends with the shard of the parameters that it owns. Pods are joined by a network
that is two orders of magnitude slower; only those shards cross it, once per step
however many microbatches there are, in a dtype of choice (PaLM paper §4: each pod
computes and reduces its own gradients, then the pods exchange them and update alike).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from palm_t5x import meshes, target

Batch = Mapping[str, jax.Array]


def _microbatches(batch: Batch, n: int) -> Batch:
  """[B, ...] -> [n, B/n, ...], every device keeping rows that it already holds."""
  return {
    k: jnp.moveaxis(x.reshape(-1, n, *x.shape[1:]), 1, 0) for k, x in batch.items()
  }


def of_microbatches(model, params, batch: Batch, rng, num_microbatches: int = 1):
  """Sums gradients and metrics over microbatches; the loss is a sum, so they add up.

  Returns:
    (gradients of the summed loss, metrics of the whole batch).
  """
  grad_fn = jax.grad(model.sum_loss_fn, has_aux=True)
  if num_microbatches == 1:
    return grad_fn(params, batch, rng)

  def body(total, microbatch_and_index):
    microbatch, index = microbatch_and_index
    part = grad_fn(params, microbatch, jax.random.fold_in(rng, index))
    return jax.tree.map(jnp.add, total, part), None

  split = _microbatches(batch, num_microbatches)
  first = jax.tree.map(lambda x: x[0], split)
  shapes = jax.eval_shape(grad_fn, params, first, rng)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  (grads, metrics), _ = jax.lax.scan(body, zeros, (split, jnp.arange(num_microbatches)))
  return grads, metrics


def _rounded(x, dtype):
  """x rounded to `dtype`; as fp32 on CPU, where XLA cannot reduce bfloat16 here."""
  rounded = x.astype(dtype)
  return rounded.astype(jnp.float32) if target.platform() == 'cpu' else rounded


def of_batch(
  model,
  params,
  batch: Batch,
  rng: jax.Array,
  num_microbatches: int = 1,
  exchange_dtype: Any = 'float32',
):
  """Gradient of the loss summed over a global batch, and its metrics.

  Args:
    model: a models.BaseModel.
    params: its parameters, whole in each pod.
    batch: feature name -> [B, T]; each pod works on its own rows.
    rng: dropout key; pods fold their number into it.
    num_microbatches: pieces to cut each pod's rows into.
    exchange_dtype: what a gradient is rounded to before it crosses between pods.

  Returns:
    (gradients in the parameters' dtypes, alike in all pods; metrics, name -> Ratio).
  """
  if meshes.num_pods() == 1:
    return of_microbatches(model, params, batch, rng, num_microbatches)

  def in_one_pod(params, batch, rng):
    rng = jax.random.fold_in(rng, jax.lax.axis_index(meshes.POD))
    with meshes.inside_pod():
      grads, metrics = of_microbatches(model, params, batch, rng, num_microbatches)
    over_pods = lambda x: jax.lax.psum(x, meshes.POD)
    exchange = lambda g: over_pods(_rounded(g, exchange_dtype)).astype(g.dtype)
    return jax.tree.map(exchange, grads), jax.tree.map(over_pods, metrics)

  everywhere, own_rows = PartitionSpec(), PartitionSpec(meshes.POD)
  return jax.shard_map(
    in_one_pod,
    in_specs=(everywhere, own_rows, everywhere),
    out_specs=everywhere,
    axis_names={meshes.POD},
    check_vma=False,
  )(params, batch, rng)
