"""What counts as a loss spike: synthetic losses, and a real run without any."""

import math
import pathlib

import numpy as np
import pytest

from palm_t5x.errors import UserError
from palm_t5x.spikes import LossSpikeRecovery, LossSpikes

CONFIG = LossSpikeRecovery()


def first_spike(losses, config=CONFIG, start=1):
  detector = LossSpikes(config)
  for step, loss in enumerate(losses, start):
    spike = detector.observe(step, float(loss))
    if spike:
      return spike
  return None


def decaying(steps, noise, seed=0, heavy=False):
  """Losses that fall as a power of the step, as a language model's do, with noise."""
  rng = np.random.default_rng(seed)
  draw = rng.standard_t(3, steps) if heavy else rng.normal(size=steps)
  return 2 + 6 * np.arange(1, steps + 1) ** -0.3 + noise * draw


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize(('noise', 'heavy'), [(0.02, False), (0.3, False), (0.1, True)])
def test_no_alarm_in_a_falling_noisy_loss(seed, noise, heavy):
  assert first_spike(decaying(5000, noise, seed, heavy)) is None


def test_no_alarm_in_a_whole_run_of_palm_tiny():
  path = pathlib.Path(__file__).parent / 'fixtures' / 'palm_tiny_losses.txt'
  losses = [float(line) for line in path.read_text().split()]
  assert len(losses) == 1400 and losses[0] > 9 and np.mean(losses[-100:]) < 3.1
  assert first_spike(losses) is None
  sensitive = LossSpikeRecovery(threshold=4.0, patience=2, window=50)
  assert first_spike(losses, sensitive) is None


def test_a_spike_is_seen_within_patience_and_dated_back():
  losses = decaying(1000, 0.03)
  losses[700:] += 1.5 * np.exp(-np.arange(300) / 60)
  spike = first_spike(losses)
  assert (spike.began, spike.step) == (701, 700 + CONFIG.patience)
  before = losses[600:700]
  assert spike.median == pytest.approx(np.median(before))
  deviation = 1.4826 * np.median(np.abs(before - np.median(before)))
  assert spike.deviation == pytest.approx(deviation)
  assert spike.limit == pytest.approx(spike.median + max(6 * deviation, 0.2))


def test_a_spike_that_takes_twenty_steps_to_rise_is_seen():
  losses = decaying(1000, 0.03)
  losses[700:720] += np.linspace(0, 2, 20)
  losses[720:] += 2
  spike = first_spike(losses)
  assert 700 < spike.began < 712 and spike.step < 720


def test_outliers_below_patience_are_no_spike():
  losses = decaying(1000, 0.03)
  for length, at in ((1, 300), (CONFIG.patience - 1, 500), (2, 800)):
    losses[at : at + length] += 3
  assert first_spike(losses) is None


def test_outliers_do_not_hide_a_later_spike():
  losses = decaying(1000, 0.03)
  losses[600:700:4] += 3  # a quarter of the window: the median deviation holds
  losses[700:] += 1.5
  assert first_spike(losses).began == 701


def test_a_slow_rise_is_no_spike():
  losses = decaying(2000, 0.03)
  losses[500:] += np.arange(1500) * 0.0005
  assert first_spike(losses) is None


def test_a_rise_below_min_rise_is_no_spike():
  losses = np.full(500, 2.0)  # no deviation at all: only min_rise holds it back
  losses[300:] += 0.19
  assert first_spike(losses) is None
  losses[300:] += 0.02
  assert first_spike(losses).began == 301


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_a_spike_at_once(bad):
  losses = [3.0, 2.9, bad, 2.8]
  spike = first_spike(losses)
  assert (spike.step, spike.began) == (3, 3) and math.isnan(spike.median)
  assert first_spike(losses, LossSpikeRecovery(nonfinite=False)) is None


def test_nothing_is_judged_before_the_window_is_full():
  assert first_spike([9.0] * 50 + [30.0] * 49) is None


@pytest.mark.parametrize('cut', range(695, 706))
def test_state_carries_on_where_it_was(cut):
  """Cut anywhere, in the middle of a spike too: a resumed run sees the same."""
  losses = decaying(1000, 0.03)
  losses[650:652] += 2
  losses[700:] += 1.5
  losses[702] = math.nan
  losses = losses.tolist()
  whole, first = LossSpikes(CONFIG), LossSpikes(CONFIG)
  seen = [whole.observe(s, x) for s, x in enumerate(losses, 1)]
  for step, loss in enumerate(losses[:cut], 1):
    first.observe(step, loss)
  assert repr(first.spike()) == repr(seen[cut - 1])
  second = LossSpikes(CONFIG, first.to_json())
  assert repr(second.spike()) == repr(seen[cut - 1])
  for step, loss in enumerate(losses[cut:], cut + 1):
    assert repr(second.observe(step, loss)) == repr(seen[step - 1])


@pytest.mark.parametrize(
  ('binding', 'name'),
  [
    ({'window': 2}, 'window=2'),
    ({'patience': 0}, 'patience=0'),
    ({'threshold': -1.0}, 'threshold=-1.0'),
    ({'min_rise': math.nan}, 'min_rise=nan'),
    ({'max_rewinds': -1}, 'max_rewinds=-1'),
    ({'skip_batches': 100}, 'at least rewind_steps'),
  ],
)
def test_bad_settings_are_refused(binding, name):
  with pytest.raises(UserError, match=name):
    LossSpikeRecovery(**binding)
