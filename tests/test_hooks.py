"""What happens between steps: periods, sums, signals."""

import os
import signal

import pytest

from palm_t5x import hooks
from palm_t5x.metrics import Ratio


def test_periodically_runs_on_multiples_and_not_at_the_excluded_step():
  ran = []
  hook = hooks.periodically(5, ran.append, never_at=15)
  for step in range(1, 21):
    hook(step, {})
  assert ran == [5, 10, 20]


def test_no_period_never_runs():
  hook = hooks.periodically(None, lambda step: 'stop')
  assert all(hook(step, {}) is None for step in range(10))


def test_stats_are_weighted_means_over_the_interval():
  written = []
  hook = hooks.StatsHook(2, 5, lambda *args: written.append(args))
  for step, (total, weight) in enumerate([(2, 1), (6, 3), (5, 5), (0, 5), (7, 1)], 1):
    hook(step, {'loss': Ratio(float(total), float(weight))})
  assert [(step, steps) for step, _, steps in written] == [(2, 2), (4, 2), (5, 1)]
  assert [v['loss'] for _, v, _ in written] == pytest.approx([8 / 4, 5 / 10, 7])
  assert [v['tokens'] for _, v, _ in written] == [4, 10, 1]


def test_signal_ends_after_the_step_and_handlers_come_back():
  before = signal.getsignal(signal.SIGTERM)
  hook = hooks.SignalHook()
  with hook.installed():
    assert hook(1, {}) is None
    os.kill(os.getpid(), signal.SIGTERM)
    assert hook(2, {}) == 'SIGTERM at step 2'
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, 'a second one ends now'
  assert signal.getsignal(signal.SIGTERM) == before


class _Says:
  def __init__(self, stop):
    self._stop = stop

  def run(self, state, metrics):
    return self._stop


class _State:
  step = 3


def test_first_action_that_stops_gives_the_reason():
  assert hooks.run_actions([_Says(False)], _State, {}) is None
  assert hooks.run_actions([_Says(False), _Says(True)], _State, {}) == '_Says at step 3'
