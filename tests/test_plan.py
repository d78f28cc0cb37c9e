"""What a run reads of each sub-corpus, against the paper's own tokens."""

import pytest
import seqio
from palm_t5x.mixtures import pretrain

from palm_t5x import errors, gin_files
from palm_t5x.corpus import plan, sampling

RAMP_540B = ((0, 512), (50_000, 1024), (115_000, 2048))
# Table 2's percentages of 780 B tokens, as paper section 3 and Table 11 have them.
PAPER_BILLIONS = {
  'conversations': 390, 'web': 210.6, 'books': 101.4, 'github': 39, 'wikipedia': 31.2,
  'news': 7.8,
}  # fmt: skip


def test_tokens_of_the_paper():
  examples = sampling.BatchSchedule(RAMP_540B).offset(255_000)
  shares = plan.shares(pretrain.PALM_780B, {}, 2048, examples)
  total = sum(share.needed for share in shares)
  assert total == 775_946_240_000
  for share in shares:
    scaled = share.needed * 780e9 / total
    assert scaled == pytest.approx(PAPER_BILLIONS[share.name] * 1e9, rel=1e-6)
    assert share.available is None and share.epochs is None


@pytest.mark.parametrize('name', ['palm_780b', 'palm_refreshed'])
def test_mixtures_are_a_hundred_percent(name):
  mixture = seqio.MixtureRegistry.get(name)
  assert sum(mixture.get_rate(task) for task in mixture.tasks) == 100


def test_any_window_of_1e5_rows_is_within_a_thousandth():
  """Of every sub-corpus, by counting rows one by one, at places all over the run."""
  weights = list(pretrain.PALM_780B.values())
  schedule = sampling.MixtureSchedule(weights)
  for start in (0, 1, 777, 12_345_678, 378_000_000):
    task, _ = schedule.lookup(range(start, start + 100_000))
    for number, weight in enumerate(weights):
      share = (task == number).mean()
      assert share == pytest.approx(weight / 100, rel=1e-3), (start, number)


def test_shares_are_what_the_schedule_reads():
  weights = {'a': 3, 'b': 1, 'c': 0, 'd': 0.5}
  schedule = sampling.MixtureSchedule([3, 1, 0.5])
  for examples in (0, 1, 5, 9, 1234):
    task, _ = schedule.lookup(range(examples))
    shares = plan.shares(weights, {'a': 10, 'b': None, 'd': 0}, 8, examples)
    assert [s.name for s in shares] == ['a', 'b', 'd']
    assert [s.needed for s in shares] == [8 * (task == i).sum() for i in range(3)]
    assert [s.available for s in shares] == [80, None, 0]


def test_too_short_a_sub_corpus_is_named_with_its_shortfall():
  weights = {'books': 1, 'news': 1}
  enough = plan.shares(weights, {'books': 50, 'news': None}, 10, 100)
  plan.check(enough)
  short = plan.shares(weights, {'books': 60, 'news': 20}, 10, 100)
  with pytest.raises(errors.UserError) as error:
    plan.check(short)
  text = str(error.value)
  assert 'news has 200 tokens and 500 are needed (300 short, 2.50 epochs)' in text
  assert 'books' not in text and 'ALLOW_REPEATS' in text


@pytest.mark.parametrize('size', ['8b', '62b', '540b'])
def test_models_of_all_sizes_see_the_same_rows_in_the_same_order(size):
  """Whatever its batches, a run's rows are 0, 1, 2, ... of one and the same order."""
  file = gin_files.scan([f'palm_{size}.gin'], gin_files.SearchPath())
  schedule = sampling.BatchSchedule(file.value('BATCH_SIZE'))
  ramp = [start for start, _ in schedule.ramp[1:]]
  for step in [0, 1, *(start + i for start in ramp for i in (-1, 0, 1))]:
    indices = schedule.indices(step)
    assert indices[0] == schedule.offset(step)
    assert (indices == range(indices[0], schedule.offset(step + 1))).all()
  assert file.value('MIXTURE_OR_TASK_NAME') == 'palm_780b'
  assert file.value('RANDOM_SEED') == 0 and file.value('ALLOW_REPEATS') is False
