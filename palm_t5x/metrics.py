"""What a step measures: sum/weight metrics that survive any split of the batch.

A metric travels as a numerator and a denominator (`Ratio`), so microbatches, hosts
and evaluation batches of unequal token counts add up to exactly the metric of one big
batch. Below it, the FLOP accounting that turns tokens per second into MFU.
"""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Ratio:
  """A mean in two parts: `total / weight`, both fp32 scalars that simply add.

  `loss` over tokens has total = sum of token losses, weight = sum of loss weights.
  """

  total: jax.Array | float
  weight: jax.Array | float

  def value(self) -> jax.Array:
    """The mean, fp32 scalar; NaN where nothing was counted (weight 0)."""
    return jnp.asarray(self.total, jnp.float32) / jnp.asarray(self.weight, jnp.float32)

  def merge(self, other: 'Ratio') -> 'Ratio':
    """The same metric over both sets of examples."""
    return Ratio(self.total + other.total, self.weight + other.weight)

  __add__ = merge


Metrics = Mapping[str, Ratio]


def sum_metrics(a: Metrics, b: Metrics) -> dict[str, Ratio]:
  """Metrics over the union of two sets of examples; a name may be in one only."""
  merged = {**a, **b}
  for name in a.keys() & b.keys():
    merged[name] = a[name].merge(b[name])
  return merged


def metric_values(metrics: Metrics) -> dict[str, jax.Array]:
  """Each metric's mean, on the device: `{name: fp32 scalar}`."""
  return {name: ratio.value() for name, ratio in metrics.items()}


def bits_per_byte(loss_nats: float, num_bytes: int) -> float:
  """Bits per UTF-8 byte of text whose tokens cost `loss_nats` in all (a sum)."""
  return loss_nats / math.log(2) / num_bytes


# -- Model FLOPs (PaLM §4.1 and Appendix B) --


def model_flops_per_token(
  num_params: int,
  num_layers: int,
  num_heads: int,
  head_dim: int,
  length: int,
  attention: bool = True,
) -> float:
  """FLOPs that training on one token needs: 6N + 12·L·H·Q·T (PaLM App. B).

  N = `num_params` (kernels and the embedding, once), T = `length`: 2N forward, 4N
  backward, and the attention products without a discount for causality. The second
  term is left out with `attention=False` ("MFU without attention"). Recomputation
  does not count: this is the work of the model, not of the hardware.
  """
  attended = num_layers * num_heads * head_dim * length if attention else 0
  return 6.0 * num_params + 12.0 * attended


def hardware_flops_per_token(
  num_params: int,
  num_layers: int,
  num_heads: int,
  head_dim: int,
  length: int,
  dense_recomputed: float = 0.0,
  attention_recomputed: float = 1.0,
) -> float:
  """FLOPs per token with rematerialisation, what HFU counts (PaLM App. B).

  `dense_recomputed` and `attention_recomputed` are the shares of the forward pass
  that the backward pass computes again: (0.75, 1) for PaLM 540B, (0, 1) for 8B, 62B.
  """
  shape = (num_params, num_layers, num_heads, head_dim, length)
  attended = num_layers * num_heads * head_dim * length
  again = dense_recomputed * 2.0 * num_params + attention_recomputed * 4.0 * attended
  return model_flops_per_token(*shape) + again


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float) -> float:
  """Share of the machine's peak that the model's FLOPs use, 0..1 (PaLM §4.1).

  Observed tokens/s over R = peak_flops / flops_per_token, all of them totals over
  the machine. The result is MFU, MFU without attention or HFU, as `flops_per_token`
  came from `model_flops_per_token` or `hardware_flops_per_token`.
  """
  return tokens_per_second * flops_per_token / peak_flops


def carbon_tco2e(
  chip_hours: float, watts: float, pue: float, tco2e_per_mwh: float
) -> float:
  """Tonnes of CO2 equivalent of a run (PaLM App. B; 271.43 for the 540B model).

  Args:
    chip_hours: hours times chips, downtime and repetitions included.
    watts: mean draw of a chip with its share of the host and the network.
    pue: the building's power over the machines' power.
    tco2e_per_mwh: carbon intensity of the power that was bought.
  """
  return chip_hours * watts / 1e6 * pue * tco2e_per_mwh


# Dense bf16 peak per JAX device (a device is half a chip on TPU v2 and v3), from the
# vendors' data sheets. First match of the pattern in `device_kind` wins.
PEAK_FLOPS_BY_DEVICE_KIND = (
  (r'TPU v2', 22.5e12),
  (r'TPU v3', 61.5e12),
  (r'TPU v4 lite', 138e12),
  (r'TPU v4', 275e12),
  (r'TPU v5 ?(lite|e)', 197e12),
  (r'TPU v5', 459e12),
  (r'TPU v6', 918e12),
  (r'V100', 125e12),
  (r'A100', 312e12),
  (r'H100 PCIe', 756e12),
  (r'H100 NVL', 835e12),
  (r'H100|H200|GH200', 989e12),
)


@dataclasses.dataclass(frozen=True)
class Peak:
  """FLOP/s of the whole machine, and how we know: 'given', 'table' or 'measured'."""

  flops: float
  source: str


def measure_gemm_flops(
  operand_dtype: str = 'float32', size: int = 2048, seconds: float = 0.3
) -> float:
  """FLOP/s of the best square matmul with fp32 result in `seconds`, on this process.

  `operand_dtype='bfloat16'` measures the peak of the CPU's fast mode.
  """
  matmul = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
  x = jnp.full((size, size), 0.5, operand_dtype)
  matmul(x).block_until_ready()
  best, spent = math.inf, 0.0
  while spent < seconds:
    start = time.perf_counter()
    matmul(x).block_until_ready()
    took = time.perf_counter() - start
    best, spent = min(best, took), spent + took
  return 2.0 * size**3 / best


def peak_flops(
  devices: Sequence[jax.Device],
  given: float | None = None,
  cpu_operand_dtype: str = 'float32',
) -> Peak | None:
  """The peak that MFU divides by, over all `devices`; None where nobody knows it.

  `given` (Gin's PEAK_FLOPS) is FLOP/s per device and wins. Accelerators are looked
  up by their kind. On CPU one process's matmul rate is measured once (about 0.3 s),
  for all its simulated devices share the same cores.
  """
  if given:
    return Peak(given * len(devices), 'given')
  if devices[0].platform == 'cpu':
    processes = len({device.process_index for device in devices})
    return Peak(_cpu_flops(cpu_operand_dtype) * processes, 'measured')
  for pattern, flops in PEAK_FLOPS_BY_DEVICE_KIND:
    if re.search(pattern, devices[0].device_kind):
      return Peak(flops * len(devices), 'table')
  return None


@functools.cache
def _cpu_flops(operand_dtype: str) -> float:
  return measure_gemm_flops(operand_dtype)
