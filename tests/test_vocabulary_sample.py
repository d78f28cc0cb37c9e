"""The text that vocabularies are learned from."""

import os
import resource
import threading
import time

import fixture_tasks  # noqa: F401 (registers what is drawn from)
import pytest

from palm_t5x import errors
from palm_t5x.corpus import documents, jobs, learning, vocabulary, vocabulary_sample
from palm_t5x.corpus.vocabulary_sample import Source


def part(name, texts, size=None):
  """A part that yields these texts; `size` as known beforehand, 0 for unknown."""
  known = sum(len(text.encode()) for text in texts) if size is None else size
  return documents.Part(name, lambda: iter(texts), known)


def sample_of(sources, sample_bytes, folder, **how):
  job = jobs.Job(str(folder))
  stages = vocabulary_sample.stages(sources, sample_bytes, str(folder))
  done = jobs.run(job, stages, **how)
  if not done:
    return None
  return list(vocabulary_sample.texts(sources, sample_bytes, str(folder)))


def texts(kind, count):
  return [f'{kind} number {i} ' + 'x' * (i % 50) for i in range(count)]


def test_sample_follows_the_weights(tmp_path):
  sources = learning.vocabulary_sources('fixture_mixture')
  sample = sample_of(sources, 20_000, tmp_path)
  code = [text for text in sample if '>>>' in text or 'def ' in text]
  size = lambda texts: sum(len(text.encode()) for text in texts)
  assert size(sample) == pytest.approx(20_000, rel=0.01)
  assert size(code) / size(sample) == pytest.approx(0.3, abs=0.03)


def test_parts_and_their_order_do_not_matter(tmp_path):
  words = texts('word', 3000)
  whole = [Source('a', 1, [part('0', words)])]
  split = [Source('a', 1, [part(str(i), words[::-1][i::7]) for i in range(7)])]
  one = sample_of(whole, 5_000, tmp_path / 'one')
  assert sum(len(text) for text in one) == 5_000
  assert sample_of(split, 5_000, tmp_path / 'seven') == one
  unknown = [Source('a', 1, [part('0', words, 0)])]
  assert sample_of(unknown, 5_000, tmp_path / 'unknown') == one


def test_every_document_is_as_likely(tmp_path):
  """Thirds of a source of equally long documents give about a third each."""
  words = [f'{i:08d}' for i in range(30_000)]
  sample = sample_of([Source('a', 1, [part('0', words)])], 24_000, tmp_path)
  assert len(sample) == 3_000
  for third in range(3):
    count = sum(int(text) // 10_000 == third for text in sample)
    assert count == pytest.approx(1000, abs=5 * (3_000 * 2 / 9) ** 0.5)


def test_short_sources_give_what_they_have_and_long_documents_are_cut(tmp_path):
  sources = [
    Source('short', 1, [part('0', ['only this'])]),
    Source('long', 1, [part('0', ['y' * 100_000, 'z' * 100_000])]),
  ]
  sample = sample_of(sources, 1_000, tmp_path)
  assert sample[0] == 'only this'
  assert [len(text) for text in sample[1:]] == [500]


def test_shards_draw_their_parts_and_finished_parts_are_not_drawn_again(tmp_path):
  words, drawn = texts('word', 400), []

  def reading(i):
    def read():
      drawn.append(i)
      return iter(words[i::4])

    return documents.Part(str(i), read, 1000)

  sources = [Source('a', 1, [reading(i) for i in range(4)])]
  assert sample_of(sources, 900, tmp_path, shard_id=1, num_shards=2) is None
  assert drawn == [1, 3]
  sample = sample_of(sources, 900, tmp_path, shard_id=0, num_shards=2)
  assert sorted(drawn) == [0, 1, 2, 3]
  plain = [Source('a', 1, [part(str(i), words[i::4], 1000) for i in range(4)])]
  assert sample == sample_of(plain, 900, tmp_path / 'plain')


def test_nothing_to_learn_from():
  assert vocabulary_sample.first(iter([])) is None
  assert vocabulary_sample.first(iter(['', ' \n'])) is None
  assert list(vocabulary_sample.first(iter([' ', 'a', 'b']))) == [' ', 'a', 'b']


def test_duplicates_count_once_wherever_they_lie(tmp_path):
  """Neither in one part nor in two do they take the place of other documents."""
  words = texts('word', 200)
  many = [text for text in words for _ in range(20)]
  expected = sample_of([Source('a', 1, [part('0', words)])], 900, tmp_path / 'once')
  one = [Source('a', 1, [part('0', many)])]
  assert sample_of(one, 900, tmp_path / 'one') == expected
  apart = [Source('a', 1, [part(str(i), many[i::3]) for i in range(3)])]
  assert sample_of(apart, 900, tmp_path / 'apart') == expected


def test_more_parts_than_files_may_be_open(tmp_path):
  words = texts('word', 300)
  expected = sample_of([Source('a', 1, [part('0', words)])], 2_000, tmp_path / 'one')
  sources = [Source('a', 1, [part(str(i), [text]) for i, text in enumerate(words)])]
  assert sample_of(sources, 2_000, tmp_path / 'many') == expected
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  highest = max(map(int, os.listdir('/proc/self/fd')))
  resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, highest + 50), hard))
  try:
    drawn = vocabulary_sample.texts(sources, 2_000, str(tmp_path / 'many'))
    assert list(drawn) == expected
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize('num_parts', [1, 4])
@pytest.mark.parametrize('bloat', [1, 3, 1000])
def test_files_that_hold_more_than_text(tmp_path, monkeypatch, num_parts, bloat):
  """However little of a large source's files is text, it gives its whole share."""
  monkeypatch.setattr(vocabulary_sample, '_SLACK', 0)
  words = texts('word', 2000)
  expected = sample_of([Source('a', 1, [part('0', words, 0)])], 5_000, tmp_path / 'a')
  assert sum(map(len, expected)) == 5_000
  split = [words[i::num_parts] for i in range(num_parts)]
  size = lambda part: bloat * sum(map(len, part))
  parts = [part(str(i), split[i], size(split[i])) for i in range(num_parts)]
  source = Source('a', 1, parts)
  assert source.limit(5_000) < 0.2, 'a large source, of which most is passed over'
  assert sample_of([source], 5_000, tmp_path / 'b') == expected
  # All that it has, where that is less than its share, and once for duplicates.
  again = [part(f'{p.name}x', list(p.read()), p.num_bytes) for p in parts]
  twice = Source('a', 1, [*parts, *again])
  everything = sample_of([twice], 100_000, tmp_path / 'c')
  assert sorted(everything) == sorted(words)


def test_drawing_again_goes_on_after_a_kill(tmp_path, monkeypatch):
  monkeypatch.setattr(vocabulary_sample, '_SLACK', 0)
  words, reads = texts('word', 400), []

  def reading(i):
    def read():
      reads.append(i)
      if reads == [0, 1, 2, 0, 1]:
        raise KeyboardInterrupt
      return iter(words[i::3])

    return documents.Part(str(i), read, 1_000_000)

  sources = [Source('a', 1, [reading(i) for i in range(3)])]
  with pytest.raises(KeyboardInterrupt):
    sample_of(sources, 3_000, tmp_path / 'a')
  sample = sample_of(sources, 3_000, tmp_path / 'a')
  assert reads == [0, 1, 2, 0, 1, 1, 2]
  plain = [Source('a', 1, [part('0', words)])]
  assert sample == sample_of(plain, 3_000, tmp_path / 'plain')


def _vocabulary(path):
  return vocabulary.SentencePieceVocabulary(str(path), 400)


def test_one_of_two_shards_learns(tmp_path, monkeypatch):
  """Both find all text drawn at the same time, after a kill while learning."""
  words = [f'Sentence {i} about boats and the sea.\n' * 3 for i in range(300)]
  sources = [Source('a', 1, [part(str(i), words[i::2]) for i in range(2)])]
  train, run = vocabulary.train, jobs.run
  learn = lambda shard, count=2, path='v.model': learning.learn(
    _vocabulary(tmp_path / path), sources, 'x', 20_000, shard_id=shard, num_shards=count
  )

  def killed(*args, **kwargs):
    raise KeyboardInterrupt

  monkeypatch.setattr(vocabulary, 'train', killed)
  assert not learn(1)
  with pytest.raises(KeyboardInterrupt):
    learn(0)

  trained, ended, together = [], [], threading.Barrier(2)

  def run_together(*args, **kwargs):
    done = run(*args, **kwargs)
    together.wait(20)
    return done

  def train_slowly(*args, **kwargs):
    trained.append(args[1])
    time.sleep(0.3)
    train(*args, **kwargs)

  monkeypatch.setattr(jobs, 'run', run_together)
  monkeypatch.setattr(vocabulary, 'train', train_slowly)
  shards = [
    threading.Thread(target=lambda i=i: ended.append(learn(i))) for i in range(2)
  ]
  for thread in shards:
    thread.start()
  for thread in shards:
    thread.join(60)
  assert ended == [True, True] and len(trained) == 1
  assert not (tmp_path / 'v.model.sample').exists()
  monkeypatch.setattr(jobs, 'run', run)
  assert learn(0, 1, 'alone.model')
  alone = (tmp_path / 'alone.model').read_bytes()
  assert (tmp_path / 'v.model').read_bytes() == alone


def test_shards_without_text_all_say_so(tmp_path, monkeypatch):
  sources = [Source('a', 1, [part(str(i), [' ']) for i in range(2)])]
  run, said = jobs.run, []
  one, together = threading.Lock(), threading.Barrier(2)

  def learn(shard):
    return learning.learn(
      _vocabulary(tmp_path / 'v'), sources, 'x', 900, shard_id=shard, num_shards=2
    )

  def run_together(job, stages, **how):
    with one:  # threads have one process id, which names temporary files
      for shard in range(2):
        run(job, stages, **{**how, 'shard_id': shard})
    together.wait(20)
    return True

  def both(shard):
    with pytest.raises(errors.UserError, match='no text'):
      learn(shard)
    said.append(shard)

  assert not learn(1)
  monkeypatch.setattr(jobs, 'run', run_together)
  shards = [threading.Thread(target=both, args=(i,)) for i in range(2)]
  for thread in shards:
    thread.start()
  for thread in shards:
    thread.join(60)
  assert sorted(said) == [0, 1]


def test_shards_need_a_folder_that_they_share():
  sources = [Source('a', 1, [part('0', ['text'])])]
  remote = _vocabulary('gs://bucket/v.model')
  with pytest.raises(errors.UserError, match='lies in a bucket') as e:
    learning.learn(remote, sources, 'x', 900, shard_id=0, num_shards=2)
  assert '--num_shards=1' in str(e.value)
