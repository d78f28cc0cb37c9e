"""The quality classifier, and sampling by its scores."""

import functools
import glob
import json
import os
import pathlib
import pickle
import random

import numpy as np
import pytest
from scipy import stats

from palm_t5x import errors
from palm_t5x.corpus import documents, quality, quality_report, web
from palm_t5x.corpus.records import Broken

LIBRARY = pathlib.Path(os.__file__).parent


def prose():
  """Paragraphs of documentation: docstrings and comments of the standard library."""
  for path in sorted(glob.glob(f'{LIBRARY}/*.py'))[:60]:
    text = pathlib.Path(path).read_text(encoding='utf-8', errors='replace')
    for i, piece in enumerate(text.split('"""')[1::2]):
      if len(piece) > 150:
        yield documents.Document(f'{os.path.basename(path)}:{i}', piece)


def noise():
  """What crawls bring: the same words over and over, in no order."""
  rng = random.Random(0)
  stock = [
    'buy',
    'cheap',
    'now',
    'free',
    'online',
    'price',
    'the',
    'of',
    'shop',
    'sale',
  ]
  for i in range(400):
    text = ' '.join(rng.choice(stock) for _ in range(rng.randint(20, 80)))
    yield documents.Document(f'n{i}', text)
  yield Broken('n', 'invalid JSON')


def part_of(which, i, n):
  return list(which())[i::n]


def parts(which, n=3):
  return [
    documents.Part(f'{which.__name__}-{i}', functools.partial(part_of, which, i, n))
    for i in range(n)
  ]


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  path = str(tmp_path_factory.mktemp('quality') / 'model')
  manifest = quality.train(parts(prose), parts(noise), path, num_features=1 << 14)
  return path, manifest


def test_it_tells_curated_from_crawled(model):
  path, manifest = model
  assert manifest['held_out']['auc'] > 0.99
  assert manifest['held_out']['accuracy'] > 0.95
  scorer = quality.Quality(path)
  assert scorer.manifest == manifest
  good = 'This function returns the number of arguments of a module. '
  bad = 'cheap free shop now buy the best online sale of the price '
  assert scorer.score(good * 4) > 0.8 and scorer.score(bad * 4) < 0.2


def test_the_manifest_says_what_it_was_trained_on(model, tmp_path):
  _, manifest = model
  crawled = manifest['data']['crawled']
  assert crawled['documents'] == len({d.text for d in list(noise())[:-1]})
  assert set(crawled['parts']) == {'noise-0', 'noise-1', 'noise-2'}
  kwargs = {'num_features': 1 << 14}
  again = quality.train(
    parts(prose)[::-1], parts(noise)[::-1], str(tmp_path / 'again'), **kwargs
  )
  assert again == manifest  # whatever the order of parts, to the last bit of weights
  other = quality.train(parts(prose), parts(noise)[:2], str(tmp_path / 'o'), **kwargs)
  assert other['data']['crawled']['blake2b'] != crawled['blake2b']
  assert other['data']['curated'] == manifest['data']['curated']


def test_steps_and_bounds_of_training(tmp_path):
  short = web.MinLength(min_characters=250)
  manifest = quality.train(
    parts(prose),
    parts(noise),
    str(tmp_path),
    crawled_steps=(short,),
    max_documents=100,
    num_features=1 << 10,
  )
  assert manifest['data']['curated']['documents'] == 100
  assert 50 < manifest['data']['crawled']['documents'] <= 100
  assert manifest['options']['crawled_steps'] == [repr(short)]
  with pytest.raises(errors.UserError, match='num_features = 1000 is no power'):
    quality.train(parts(prose), parts(noise), str(tmp_path), num_features=1000)
  with pytest.raises(
    errors.UserError, match='too few curated documents to train on: 0'
  ):
    quality.train(parts(prose), parts(prose), str(tmp_path), num_features=1 << 10)


def test_a_score_is_the_same_in_any_company(model):
  path, _ = model
  texts = [d.text for d in prose()] + ['', '   ', '東京は日本の首都', '\x00']
  scorer = quality.Quality(path)
  together = scorer.scores(texts)
  assert scorer.scores(texts[::-1]) == together[::-1]
  assert [s for text in texts[::37] for s in scorer.scores([text])] == together[::37]
  assert all(0 <= score <= 1 for score in together)
  # Only the beginning counts.
  long = 'word ' * 300
  assert scorer.scores([long + 'cheap']) == scorer.scores([long + 'module'])


def test_scripts_without_spaces_have_words_too():
  assert quality.words('A b, a', 100) == ['a', 'b', 'a']
  assert quality.words('東京 x1', 100) == ['東', '京', 'x1']
  assert quality.words('Überall', 4) == ['über']


def test_features_are_words_and_pairs_of_them():
  def found(text):
    return quality.features(text, 1 << 18, 1000).tolist()

  assert [len(found(text)) for text in ('', 'a', 'a b', 'a b c')] == [0, 1, 3, 5]
  one, two, three = (
    found('bees like flowers'),
    found('flowers like bees'),
    found('Bees'),
  )
  assert one[:3] == two[:3][::-1] and not set(one[3:]) & set(two[3:])
  assert three == one[:1]
  # As evenly as chance: 2000 words and their pairs in 2^18 boxes.
  text = ' '.join(f'w{i}' for i in range(2000))
  boxes = quality.features(text, 1 << 18, 10**6)
  assert boxes.min() >= 0 and boxes.max() < 1 << 18
  assert len(set(boxes.tolist())) > 3999 - 60  # 30 collisions are expected
  halves = np.bincount(boxes >> 17, minlength=2)
  assert stats.binomtest(int(halves[0]), 3999).pvalue > 1e-6


def test_a_missing_or_damaged_model_is_one_clear_line(model, tmp_path):
  path, _ = model
  assert quality.exists(path) and not quality.exists(str(tmp_path))
  with pytest.raises(errors.UserError, match=r'no quality model .*CURATED'):
    quality.Quality(str(tmp_path))
  manifest = json.loads((pathlib.Path(path) / 'manifest.json').read_text())
  weights = (pathlib.Path(path) / manifest['weights']).read_bytes()
  for change, data in (
    ({}, weights[:-1]),
    ({'num_features': 7}, weights),
    ({'format': 2}, weights),
    ({'weights': 'gone.npz'}, weights),
  ):
    (tmp_path / 'manifest.json').write_text(json.dumps({**manifest, **change}))
    (tmp_path / manifest['weights']).write_bytes(data)
    with pytest.raises(errors.Failure, match='is damaged'):
      quality.Quality(str(tmp_path))
  (tmp_path / 'manifest.json').write_text('{')
  with pytest.raises(errors.Failure, match='is damaged'):
    quality.Quality(str(tmp_path))


@pytest.mark.parametrize('rule', ['proportional', 'pareto'])
def test_frequency_of_inclusion_follows_the_score(rule):
  """On 10^5 documents: within what a binomial allows once in a million, by bin."""
  scores = np.random.default_rng(0).beta(0.5, 0.5, 100_000)
  kept = np.array(
    [quality.keeps(s, documents.uniform('salt', i), rule) for i, s in enumerate(scores)]
  )
  expected = np.array([quality.keep_probability(s, rule) for s in scores])
  bins = np.minimum((scores * 20).astype(int), 19)
  for i in range(20):
    inside = bins == i
    n, p = int(inside.sum()), float(expected[inside].mean())
    # Independent draws of unequal chances vary less than a binomial of their mean.
    low, high = stats.binom.interval(1 - 1e-6, n, p)
    assert n > 1000 and low <= kept[inside].sum() <= high
  assert kept[scores < 0.05].any()  # rare, not absent


def test_pareto_is_numpys():
  """GLaM's rule drawn with numpy's own generator has the same frequencies."""
  rng = np.random.default_rng(1)
  for score in (0.0, 0.3, 0.7, 0.95, 1.0):
    draws = rng.pareto(9, 200_000) > 1 - score
    p = quality.keep_probability(score, 'pareto', 9)
    low, high = stats.binom.interval(1 - 1e-6, len(draws), min(p, 1 - 1e-9))
    assert low <= draws.sum() <= high
  assert quality.keep_probability(1.0, 'pareto') == 1
  assert not quality.keeps(0.0, 0.0, 'proportional')


def run(path, items, **kwargs):
  step, tally = quality.QualityStep(path, **kwargs), quality_report.Tally()
  step = pickle.loads(pickle.dumps(step))
  kept = set()
  for item in items:
    item = documents.Document(item.id, item.text)
    found = step(item)
    tally.add(item, isinstance(found, documents.Document))
    if isinstance(found, documents.Document):
      kept.add(item.id)
    else:
      assert found == documents.Dropped('quality')
  return kept, tally


def test_what_is_kept_does_not_depend_on_order_or_shards(model):
  path, _ = model
  items = list(prose()) + list(noise())[:-1]
  kept, tally = run(path, items)
  shuffled = items[:]
  random.Random(1).shuffle(shuffled)
  merged, union = quality_report.Tally(), set()
  for i in range(3):
    some, one = run(path, shuffled[i::3])
    merged.merge(quality_report.Tally(**json.loads(json.dumps(one.facts()))))
    union |= some
  assert union == kept and merged == tally
  assert 0 < len(kept) < len(items)
  assert run(path, items, salt='another')[0] != kept
  assert run(path, items, rule='none')[0] == {d.id for d in items}
  assert run(path, items, rule='pareto')[0] != kept


def test_the_tally_has_a_histogram_and_examples(model):
  path, _ = model
  items = list(prose()) + list(noise())[:-1]
  kept, tally = run(path, items)
  assert sum(tally.kept) == len(kept)
  assert sum(tally.kept) + sum(tally.dropped) == len(items)
  rows = tally.rows()
  assert len(rows) == 20 and rows[19][0] == '0.95-1.00' and rows[19][3] > 0.9
  shown = [e for bands in tally.examples.values() for band in bands for e in band]
  assert shown and all(len(e[3]) <= 300 for e in shown)
  for i, band in enumerate(tally.examples['kept']):
    assert all(e[1] in kept and i / 5 <= e[2] <= (i + 1) / 5 for e in band)
  before = tally.facts()
  tally.add(documents.Document('x', 'never scored'), True)
  assert tally.facts() == before


def test_wrong_options_are_named(model):
  with pytest.raises(errors.UserError, match="rule = 'best'"):
    quality.QualityStep(model[0], rule='best')
  with pytest.raises(errors.UserError, match='alpha = 0'):
    quality.QualityStep(model[0], alpha=0)
