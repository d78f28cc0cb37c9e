"""The text that vocabularies are learned from."""

import pytest

from palm_t5x.corpus import documents, jobs, learning, vocabulary_sample
from palm_t5x.corpus.vocabulary_sample import Source


def part(name, texts, size=None):
  """A part that yields these texts; `size` as known beforehand, 0 for unknown."""
  known = sum(len(text.encode()) for text in texts) if size is None else size
  return documents.Part(name, lambda: iter(texts), known)


def sample_of(sources, sample_bytes, folder, **how):
  job = jobs.Job(str(folder))
  stage = vocabulary_sample.stage(sources, sample_bytes, str(folder))
  done = jobs.run(job, [stage], **how)
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
