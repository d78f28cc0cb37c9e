"""Ratios add up; FLOPs and MFU reproduce the paper's Tables 3 and 22."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_t5x import metrics
from palm_t5x.metrics import Ratio

# Paper Table 1 (layers, heads, head size, parameters as counted) and Table 22
# (TFLOPs per token of the model and with rematerialisation, tokens trained on, FLOPs
# of the run, PFLOP/s-days), with Appendix B's recomputed share of the dense forward.
PALM = {
  '8b': (32, 16, 256, 8.63e9, 0.0550, 0.0561, 780e9, '4.29e+22', 497, 0.0),
  '62b': (64, 32, 256, 62.50e9, 0.388, 0.392, 795e9, '3.08e+23', 3570, 0.0),
  '540b': (118, 48, 256, 540.35e9, 3.28, 4.10, 780e9, '2.56e+24', 29600, 0.75),
}
TOKENS_PER_SECOND, V4_PEAK = 238.3e3, 6144 * 275e12


@pytest.mark.parametrize('size', PALM)
def test_table_22(size):
  layers, heads, head, n, model, hardware, tokens, total, days, dense = PALM[size]
  flops = metrics.model_flops_per_token(n, layers, heads, head, 2048)
  decimals = len(str(model).split('.')[1]) if size != '8b' else 4
  assert round(flops / 1e12, decimals) == model
  remat = metrics.hardware_flops_per_token(
    n, layers, heads, head, 2048, dense_recomputed=dense
  )
  assert round(remat / 1e12, decimals) == hardware
  assert f'{flops * tokens:.2e}' == total
  np.testing.assert_allclose(flops * tokens / (1e15 * 86400), days, rtol=2e-3)


def test_table_3_palm_rows():
  layers, heads, head, n, *_, dense = PALM['540b']
  shape = (n, layers, heads, head, 2048)
  use = lambda flops: round(
    100 * metrics.mfu(TOKENS_PER_SECOND, flops, V4_PEAK),
    1,
  )
  assert use(metrics.model_flops_per_token(*shape)) == 46.2
  assert use(metrics.model_flops_per_token(*shape, attention=False)) == 45.7
  remat = metrics.hardware_flops_per_token(*shape, dense_recomputed=dense)
  assert use(remat) == 57.8


def test_table_3_other_rows():
  """MT-NLG 530B on 2240 A100 (printed truncated), Gopher 280B on 4096 TPU v3 chips."""
  mt_nlg = (530e9, 105, 128, 160, 2048)
  with_attention = metrics.model_flops_per_token(*mt_nlg)
  without = metrics.model_flops_per_token(*mt_nlg, attention=False)
  peak = 2240 * 312e12
  assert math.floor(1000 * metrics.mfu(65.43e3, with_attention, peak)) / 10 == 30.2
  assert math.floor(1000 * metrics.mfu(65.43e3, without, peak)) / 10 == 29.7
  gopher = metrics.model_flops_per_token(280e9, 80, 128, 128, 2048)
  tokens = 0.0152 * 3072 * 2048
  assert round(100 * metrics.mfu(tokens, gopher, 4096 * 123e12), 1) == 32.5


class FakeDevice:
  process_index = 0

  def __init__(self, kind, platform='tpu'):
    self.device_kind, self.platform = kind, platform


@pytest.mark.parametrize(
  'kind, per_chip, devices_per_chip',
  [
    # TFLOP/s bf16 per chip, from the vendors' data sheets.
    ('TPU v2', 45, 2),
    ('TPU v3', 123, 2),
    ('TPU v4', 275, 1),
    ('TPU v5 lite', 197, 1),
    ('TPU v5e', 197, 1),
    ('TPU v5p', 459, 1),
    ('TPU v5', 459, 1),
    ('TPU v6 lite', 918, 1),
    ('TPU v6e', 918, 1),
    ('NVIDIA A100-SXM4-80GB', 312, 1),
    ('NVIDIA H100 80GB HBM3', 989, 1),
    ('NVIDIA H100 PCIe', 756, 1),
    ('NVIDIA H200', 989, 1),
  ],
)
def test_peak_table(kind, per_chip, devices_per_chip):
  peak = metrics.peak_flops([FakeDevice(kind)] * devices_per_chip)
  assert peak == metrics.Peak(per_chip * 1e12, 'table')


def test_peak_given_measured_unknown(monkeypatch):
  assert metrics.peak_flops([FakeDevice('x')] * 3, given=2e12) == metrics.Peak(
    6e12, 'given'
  )
  assert metrics.peak_flops([FakeDevice('Some new chip', 'gpu')]) is None
  monkeypatch.setattr(metrics, '_cpu_flops', {'bfloat16': 7.0}.get)
  cpus = [FakeDevice('cpu', 'cpu') for _ in range(4)]
  # Simulated devices share one machine.
  assert metrics.peak_flops(cpus, cpu_operand_dtype='bfloat16') == metrics.Peak(
    7.0, 'measured'
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gemm_measurement_is_a_plausible_rate(dtype):
  flops = metrics.measure_gemm_flops(dtype, size=128, seconds=0.01)
  assert 1e7 < flops < 1e15


def test_every_pattern_of_the_table_can_match():
  kinds = [
    *('TPU v2', 'TPU v3', 'TPU v4 lite', 'TPU v4', 'TPU v5e', 'TPU v5p', 'TPU v6e'),
    *('Tesla V100-SXM2-16GB', 'NVIDIA A100-PCIE-40GB', 'NVIDIA H100 PCIe'),
    *('NVIDIA H100 NVL', 'NVIDIA GH200 480GB'),
  ]
  patterns = [pattern for pattern, _ in metrics.PEAK_FLOPS_BY_DEVICE_KIND]
  first = [next(p for p in patterns if re.search(p, kind)) for kind in kinds]
  assert first == patterns


def test_ratio_of_parts_is_the_ratio_of_the_whole():
  rng = np.random.default_rng(0)
  losses, weights = rng.normal(size=100), rng.integers(0, 2, 100)
  part = lambda s: Ratio(jnp.sum(losses[s] * weights[s]), jnp.sum(weights[s]))
  a, b = part(slice(0, 13)), part(slice(13, None))
  expected = np.sum(losses * weights) / weights.sum()
  np.testing.assert_allclose((a + b).value(), expected, rtol=1e-6)
  merged = metrics.sum_metrics({'loss': a, 'only': a}, {'loss': b})
  np.testing.assert_allclose(merged['loss'].value(), expected, rtol=1e-6)
  np.testing.assert_allclose(merged['only'].value(), a.value())
  values = metrics.metric_values(merged)
  np.testing.assert_allclose(values['loss'], expected, rtol=1e-6)
  assert np.isnan(Ratio(0.0, 0.0).value())


def test_ratio_is_a_pytree_that_jit_and_scan_carry():
  def body(carry, x):
    return carry + Ratio(x, 1.0), None

  zero = Ratio(jnp.float32(0), jnp.float32(0))
  total, _ = jax.jit(lambda xs: jax.lax.scan(body, zero, xs))(jnp.arange(5.0))
  assert float(total.value()) == 2.0


def test_bits_per_byte():
  # A uniform guess over 256 bytes costs 8 bits each.
  assert metrics.bits_per_byte(10 * math.log(256), 10) == pytest.approx(8)


def test_carbon_estimate_of_the_paper():
  chip_hours = 6144 * 1200 + 3072 * 336
  assert round(metrics.carbon_tco2e(chip_hours, 378.5, 1.08, 0.079), 2) == 271.43
