"""Permutations, mixture proportions and batch offsets, against brute force."""

import numpy as np
import pytest

from palm_t5x import errors
from palm_t5x.corpus import sampling


@pytest.mark.parametrize('n', [1, 2, 3, 4, 5, 63, 64, 65, 1000, 4097])
def test_permute_is_a_permutation(n):
  keys = sampling.round_keys(0, 'task', 0)
  assert sorted(sampling.permute(np.arange(n), n, keys)) == list(range(n))


def test_permute_depends_on_seed_name_and_epoch_only():
  base = sampling.permute(np.arange(500), 500, sampling.round_keys(0, 'a', 0))
  again = sampling.permute(np.arange(500), 500, sampling.round_keys(0, 'a', 0))
  one_by_one = [
    int(sampling.permute([i], 500, sampling.round_keys(0, 'a', 0))[0])
    for i in range(500)
  ]
  np.testing.assert_array_equal(base, again)
  np.testing.assert_array_equal(base, one_by_one)
  for other in [(1, 'a', 0), (0, 'b', 0), (0, 'a', 1)]:
    changed = sampling.permute(np.arange(500), 500, sampling.round_keys(*other))
    # A random pair of permutations agrees in one place on average.
    assert (base == changed).sum() < 10


def test_permute_looks_random():
  """Neighbours part: mean |difference| of a random pair is n/3, its spread small."""
  n = 20_000
  out = sampling.permute(np.arange(n), n, sampling.round_keys(3, 'x', 1))
  gap = np.abs(np.diff(out)).mean() / n
  assert abs(gap - 1 / 3) < 0.01
  assert abs(np.corrcoef(np.arange(n), out)[0, 1]) < 0.03


def test_permute_of_a_huge_domain_stays_inside():
  n = (1 << 40) + 12345
  out = sampling.permute(np.arange(n - 1000, n), n, sampling.round_keys(0))
  assert len(set(out.tolist())) == 1000
  assert out.min() >= 0 and out.max() < n


def test_permute_refuses_what_lies_outside():
  with pytest.raises(ValueError, match=r'\[0, 5\)'):
    sampling.permute([5], 5, sampling.round_keys(0))


PALM = [50, 27, 13, 5, 4, 1]  # percent, Table 2 of the paper


@pytest.mark.parametrize(
  'weights', [PALM, [1], [1, 1, 1], [0.7, 0.2, 0.1], [3, 1e-3], [0.123456, 0.8, 0.07]]
)
def test_mixture_proportions_hold_in_every_window(weights):
  schedule = sampling.MixtureSchedule(weights)
  task, rank = schedule.lookup(np.arange(100_000))
  share = np.array(weights) / sum(weights)
  hits = task[:, None] == np.arange(len(weights))
  counts = np.cumsum(hits, axis=0)
  realised = counts[-1] / 100_000
  assert np.abs(realised - share).max() < 1e-3 * 0.1
  ideal = np.arange(1, 100_001)[:, None] * share
  # Tijdeman's bound is one row for any prefix, hence two for any window.
  assert np.abs(counts - ideal).max() < 1.1
  for number in range(len(weights)):
    np.testing.assert_array_equal(
      rank[task == number], np.arange(counts[-1, number]), err_msg='a rank is skipped'
    )


def test_mixture_of_percentages_is_exact():
  schedule = sampling.MixtureSchedule(PALM)
  assert schedule.period == 100
  assert schedule.counts.tolist() == PALM


def test_mixture_with_many_tasks():
  weights = [1] * 60 + [100, 333.3]
  schedule = sampling.MixtureSchedule(weights)
  task, _ = schedule.lookup(np.arange(schedule.period))
  counts = np.cumsum(task[:, None] == np.arange(62), axis=0)
  ideal = np.arange(1, schedule.period + 1)[:, None] * np.array(weights) / sum(weights)
  assert np.abs(counts - ideal).max() < 1.1


def test_mixture_lookup_far_out_is_exact():
  schedule = sampling.MixtureSchedule(PALM)
  task, rank = schedule.lookup([10**12 * 100, 10**12 * 100 + 1])
  near_task, near_rank = schedule.lookup([0, 1])
  np.testing.assert_array_equal(task, near_task)
  np.testing.assert_array_equal(rank - near_rank, 10**12 * schedule.counts[task])


@pytest.mark.parametrize('weights', [[], [0, 1], [-1, 2], [float('nan')]])
def test_mixture_refuses_bad_weights(weights):
  with pytest.raises(errors.UserError, match='positive'):
    sampling.MixtureSchedule(weights)


def test_batches_of_one_size():
  schedule = sampling.BatchSchedule(8)
  assert schedule.offset(5) == 40
  assert schedule.size(5) == 8
  assert schedule.indices(5).tolist() == list(range(40, 48))


def test_batch_ramp_of_the_paper():
  ramp = ((0, 512), (50_000, 1024), (115_000, 2048))
  schedule = sampling.BatchSchedule(ramp)
  assert schedule.offset(50_000) == 25_600_000
  # 775.9 B tokens at step 255,000 (palm.md section 10).
  assert round(schedule.offset(255_000) * 2048 / 1e9, 1) == 775.9
  assert [schedule.size(s) for s in (49_999, 50_000, 115_000)] == [512, 1024, 2048]


def test_skips_leave_out_just_those_examples():
  ramp = ((0, 2), (3, 4))
  plain = sampling.BatchSchedule(ramp)
  schedule = sampling.BatchSchedule(ramp, skip_batches=[(4, 5), (1, 2)])
  skipped = set(plain.indices(1)) | set(plain.indices(4))
  read = np.concatenate([schedule.indices(step) for step in range(8)])
  expected = [i for i in range(100) if i not in skipped][: len(read)]
  assert read.tolist() == expected
  assert schedule.skips == ((2, 4), (10, 14))
  again = sampling.BatchSchedule(ramp, skips=schedule.skips)
  for step in range(8):
    assert again.indices(step).tolist() == schedule.indices(step).tolist()
    assert schedule.offset(step) == schedule.indices(step)[0]


def test_skips_of_whole_batches_shift_by_whole_batches():
  schedule = sampling.BatchSchedule(4, skip_batches=[(2, 5)])
  assert schedule.indices(2).tolist() == [20, 21, 22, 23]


@pytest.mark.parametrize('bad', [0, (), ((1, 4),), ((0, 4), (0, 8)), 'x', ((0, 0),)])
def test_bad_batch_sizes_are_refused(bad):
  with pytest.raises(errors.UserError, match='BATCH_SIZE'):
    sampling.BatchSchedule(bad)


def test_bad_skip_is_refused():
  with pytest.raises(errors.UserError, match='5:5'):
    sampling.BatchSchedule(4, skip_batches=[(5, 5)])


@pytest.mark.parametrize(
  ('texts', 'ranges'),
  [
    (['3:5'], [(3, 5)]),
    ('3:5', [(3, 5)]),
    (['3:5,8:9', '20:21'], [(3, 5), (8, 9), (20, 21)]),
    ([(3, 5)], [(3, 5)]),
    ([], []),
  ],
)
def test_ranges_of_batches_are_read(texts, ranges):
  assert sampling.parse_ranges(texts) == ranges


@pytest.mark.parametrize(
  'text', ['5', '5:3', '3:3', '-1:3', 'a:b', '1:2:3', '', '1.5:2']
)
def test_what_is_no_range_is_refused(text):
  with pytest.raises(errors.UserError, match=r'--skip_batches=.*a:b'):
    sampling.parse_ranges([text])


RAMP = ((0, 2), (3, 4), (7, 8))


def _read_in(schedule, start, stop):
  return np.concatenate([schedule.indices(s) for s in range(start, stop)]).tolist()


@pytest.mark.parametrize('begun', range(11))
def test_a_skip_given_late_moves_nothing_that_was_read(begun):
  """Against brute force: what is behind stays, what is ahead goes, across the ramp."""
  plain = sampling.BatchSchedule(RAMP)
  behind = _read_in(plain, 0, begun) if begun else []
  skipped = set(_read_in(plain, 2, 5)) | set(_read_in(plain, 8, 9))
  late = sampling.BatchSchedule(RAMP, skip_batches=[(2, 5), (8, 9)], begun=begun)
  ahead = [i for i in range(400) if i not in behind and i not in skipped]
  read = _read_in(late, begun, 14)
  assert read == ahead[: len(read)]
  missed = {i for a, b in late.missed for i in range(a, b)}
  assert missed == skipped & set(behind)


@pytest.mark.parametrize('begun', range(2, 11))
def test_a_skip_given_again_changes_nothing(begun):
  first = sampling.BatchSchedule(RAMP, skip_batches=[(2, 5), (8, 9)], begun=2)
  again = sampling.BatchSchedule(
    RAMP, skips=first.skips, skip_batches=[(2, 5), (8, 9)], begun=begun
  )
  assert again.skips == first.skips and again.missed == ()
  assert _read_in(again, begun, 14) == _read_in(first, begun, 14)


def test_batch_numbers_are_those_of_the_unskipped_run():
  plain = sampling.BatchSchedule(RAMP)
  for start in range(12):
    for stop in range(start + 1, 13):
      examples = plain.examples_of_steps(start, stop)
      assert plain.batch_numbers(*examples) == (start, stop)
  # Half a batch counts as the batch it lies in.
  assert plain.batch_numbers(1, 3) == (0, 2)
  skipping = sampling.BatchSchedule(RAMP, skips=[(2, 5)])
  assert skipping.examples_of_steps(1, 2) == (5, 7)
  assert skipping.batch_numbers(5, 7) == (2, 4)


def test_next_size_of_a_ramp():
  schedule = sampling.BatchSchedule(RAMP)
  assert [schedule.next_size(s) for s in (0, 2, 3, 6, 7, 99)] == [
    4,
    4,
    8,
    8,
    None,
    None,
  ]


def test_batch_numbers_go_on_where_another_schedule_began():
  """Resumed at step 4 with batches of 16: batch 5 is what step 5 would have read."""
  shift = 4 * 8 - 4 * 16
  schedule = sampling.BatchSchedule(16, skip_batches=[(5, 6)], shift=shift, begun=4)
  assert schedule.skips == ((48, 64),) and schedule.offset(4) == 32
  assert schedule.batch_numbers(48, 64) == (5, 6)
