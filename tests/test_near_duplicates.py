"""Near-duplicates: what is found, what is left alone, whatever the order."""

import itertools
import os
import pathlib
import random
import subprocess
import sys

import code_samples
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from palm_t5x import errors
from palm_t5x.corpus import documents, jobs, levenshtein, minhash, near_duplicates
from palm_t5x.corpus.documents import Document


@pytest.fixture(scope='module')
def files():
  """A sixth of the standard library's files: path -> text."""
  return dict(list(code_samples.standard_library().items())[::6])


@pytest.fixture(scope='module')
def mixed():
  """1,500 new files, five in a hundred of them edited copies."""
  return list(code_samples.synthetic(1500, seed=3))


def signed(docs, **options):
  """All records of some documents, as the job's first stage makes them."""
  rows = ((i, d.id, d.text) for i, d in enumerate(docs))
  options = near_duplicates.Options(**options)
  names = ('ngram', 'bands', 'rows', 'seed')
  parts = minhash.records(rows, **{name: getattr(options, name) for name in names})
  return np.concatenate(list(parts))


@pytest.mark.parametrize(
  'edit', [code_samples.edit_characters, code_samples.edit_lines]
)
def test_planted_edits_are_found_and_nothing_else(files, edit):
  originals = [Document(path, text) for path, text in files.items()]
  for share, at_least in ((0.02, 0.95), (0.1, 0), (0.3, 0)):
    rng = random.Random(share)
    edited = [
      Document(f'{path}.edited', edit(text, share, rng)) for path, text in files.items()
    ]
    gone = near_duplicates.find([*originals, *edited])
    found = sum(
      gone.get(path, path) == gone.get(f'{path}.edited', f'{path}.edited')
      for path in files
    )
    others = {
      (a, b)
      for a, b in gone.items()
      if a.removesuffix('.edited') != b.removesuffix('.edited')
    }
    texts = {d.id: d.text for d in [*originals, *edited]}
    print(
      f'{edit.__name__} {share:.0%}: {found} of {len(files)} found '
      f'({found / len(files):.1%}), {len(others)} other pairs'
    )
    assert found >= at_least * len(files)
    # Two files of the library may resemble each other of themselves: rapidfuzz knows.
    for a, b in others:
      assert Levenshtein.normalized_similarity(texts[a], texts[b]) >= 0.75, (a, b)
    if share == 0.3 and edit is code_samples.edit_characters:
      assert not found  # their similarity is about 0.7


def test_against_all_pairs():
  """No pair is removed that a comparison of all pairs does not connect."""
  docs = list(code_samples.synthetic(250, seed=1, near_duplicates=0.3))
  cluster = {d.id: d.id for d in docs}

  def root(name):
    while cluster[name] != name:
      name = cluster[name]
    return name

  for a, b in itertools.combinations(docs, 2):
    if Levenshtein.normalized_similarity(a.text, b.text, score_cutoff=0.8):
      cluster[root(a.id)] = root(b.id)
  expected = len(docs) - len({root(d.id) for d in docs})
  gone = near_duplicates.find(docs)
  assert all(root(a) == root(b) for a, b in gone.items())
  assert not set(gone) & set(gone.values())  # what stands for others is kept
  assert expected > 50 and len(gone) >= 0.95 * expected


def test_one_of_a_cluster_is_kept():
  text = '\n'.join(f'value_{i} = compute({i}, {i * i})' for i in range(60))
  docs = [Document(f'copy {i}', f'{text}\n# {i}') for i in range(20)]
  gone = near_duplicates.find(docs)
  assert len(gone) == 19 and len(set(gone.values())) == 1
  smallest = min((d.id for d in docs), key=minhash.key_of)
  assert set(gone.values()) == {smallest}


@pytest.mark.parametrize(
  'texts',
  [
    [],
    ['', ''],
    [' \n', '\t', ''],
    ['x', 'y', 'z'],
    ['import os', 'import sys', 'import re as regex'],
    ['日本語の文章です。' * 5, 'これは別の文章である。' * 5],
  ],
)
def test_small_and_empty_files_are_left_alone(texts):
  assert not near_duplicates.find(Document(str(i), t) for i, t in enumerate(texts))


@pytest.mark.parametrize('text', ['x', 'import os', '日本語', '=', 'a' * 100_000])
def test_equal_texts_of_any_size_are_found(text):
  gone = near_duplicates.find([Document('a', text), Document('b', text)])
  assert len(gone) == 1


def test_white_space_between_tokens_makes_no_other_shingle():
  a, b = 'f(x, 1)\n  return y\n', 'f( x,1 ) return\t\ty'
  (hashes, offsets) = minhash.shingles([a, b], 3)
  np.testing.assert_array_equal(hashes[: offsets[1]], hashes[offsets[1] :])
  assert offsets.tolist() == [0, 8, 16]
  (other, _) = minhash.shingles(['f(x, 1)\n  returns y\n'], 3)
  assert (other != hashes[:8]).sum() == 3  # the n-grams that hold the changed token


def test_a_batch_makes_no_difference(mixed):
  together, offsets = minhash.shingles([d.text for d in mixed[:50]], 3)
  alone = [minhash.shingles([d.text], 3)[0] for d in mixed[:50]]
  np.testing.assert_array_equal(together, np.concatenate(alone))
  assert offsets[-1] == len(together)


def test_signatures_estimate_the_jaccard_similarity(mixed):
  a = mixed[0].text
  b = code_samples.edit_characters(a, 0.02, random.Random(0))
  sets = [set(minhash.shingles([text], 3)[0].tolist()) for text in (a, b)]
  jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
  signature, any_token = minhash.signatures([a, b], ngram=3, slots=1024, seed=5)
  assert any_token.all()
  assert (signature[0] == signature[1]).mean() == pytest.approx(jaccard, abs=0.06)


def test_another_process_signs_alike(mixed):
  here = signed(mixed[:40]).tobytes()
  code = (
    'import sys, code_samples, test_near_duplicates as t\n'
    'docs = list(code_samples.synthetic(1500, seed=3))[:40]\n'
    'sys.stdout.buffer.write(t.signed(docs).tobytes())'
  )
  for seed in ('1', '2'):
    there = subprocess.run(
      [sys.executable, '-c', code],
      env={**os.environ, 'PYTHONHASHSEED': seed, 'PYTHONPATH': ':'.join(sys.path)},
      capture_output=True,
      check=True,
    )
    assert there.stdout == here


def test_boilerplate_does_not_make_all_pairs():
  docs = [Document(str(i), 'the same licence for everybody ' * 40) for i in range(3000)]
  pairs = minhash.candidates(signed(docs), leaders=4, threshold=0.8)
  assert len(pairs) == 3000 * 4 - (4 + 3 + 2 + 1)
  assert len(near_duplicates.find(docs)) == 2999


def test_lengths_rule_candidates_out():
  docs = [Document('a', 'x = y + z\n' * 50), Document('b', 'x = y + z\n' * 70)]
  assert not len(minhash.candidates(signed(docs), leaders=4, threshold=0.8))
  assert len(minhash.candidates(signed(docs), leaders=4, threshold=0.7)) == 1


@pytest.mark.parametrize('num_inputs,seed', [(1, 0), (5, 1)])
def test_stages_find_what_find_finds(tmp_path, mixed, num_inputs, seed):
  expected = near_duplicates.find(mixed)
  assert len(expected) > 50
  docs = list(mixed)
  random.Random(seed).shuffle(docs)
  assert near_duplicates.find(docs) == expected
  inputs = []
  for i in range(num_inputs):
    inputs.append(str(tmp_path / f'{i}.jsonl.zst'))
    with documents.Writer(inputs[-1]) as writer:
      for document in docs[i::num_inputs]:
        writer.add(document)
  options = near_duplicates.Options(bucket_bytes=1 << 19, text_bytes=1 << 17)
  work = str(tmp_path / 'work')
  stages = near_duplicates.stages(lambda job: inputs, work, options)
  job = jobs.Job(str(tmp_path / 'job'), options.settings())
  assert jobs.run(job, stages)
  assert len(job.done('near_candidates')) > 2 < len(job.done('near_verify'))
  found = [near_duplicates.dropped(work, i) for i in range(num_inputs)]
  for i, part in enumerate(found):
    mine = docs[i::num_inputs]
    assert all(mine[place].id == name for place, (name, _) in part.items())
  assert {name: kept for part in found for name, kept in part.values()} == expected
  facts = job.facts_of('near_cluster', 'all')
  assert facts['dropped'] == len(expected)
  # A unit that is done again, as after a kill, leaves the same bytes.
  before = contents(work)
  for stage in ('near_sign', 'near_candidates', 'near_texts', 'near_verify'):
    (tmp_path / 'job' / stage / '00000.json').unlink()
  (tmp_path / 'job' / 'near_cluster' / 'all.json').unlink()
  assert jobs.run(job, stages) and contents(work) == before


def contents(folder):
  paths = sorted(p for p in pathlib.Path(folder).rglob('*') if p.is_file())
  return {str(path): path.read_bytes() for path in paths}


def test_no_documents_at_all(tmp_path):
  path = str(tmp_path / 'in.zst')
  with documents.Writer(path):
    pass
  work = str(tmp_path / 'work')
  assert jobs.run(jobs.Job(str(tmp_path / 'job')), near_duplicates.stages([path], work))
  assert near_duplicates.dropped(work, 0) == {}


def test_a_missing_list_is_one_clear_line(tmp_path):
  with pytest.raises(errors.Failure, match='run the command that wrote it'):
    near_duplicates.dropped(str(tmp_path), 3)


@pytest.mark.parametrize(
  'wrong', [{'threshold': 0}, {'threshold': 1.5}, {'bands': 0}, {'leaders': 0}]
)
def test_options_out_of_range(wrong):
  with pytest.raises(errors.UserError, match=next(iter(wrong))):
    near_duplicates.Options(**wrong)


LINES = st.lists(st.sampled_from('ab;c{xyz '), max_size=6).map(''.join)
TEXTS = st.lists(LINES, max_size=8).map('\n'.join)


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS, st.sampled_from([0, 2, 8]))
def test_similarity_is_never_too_large(a, b, exact_chars):
  bound = levenshtein.similarity(a, b, threshold=0.5, exact_chars=exact_chars)
  exact = Levenshtein.normalized_similarity(a, b)
  assert bound <= exact + 1e-9
  assert bound == 0 or bound >= 0.5
  longest = max(len(a), len(b))
  full = levenshtein.similarity(a, b, threshold=0.5, exact_chars=longest)
  assert full == pytest.approx(exact if exact >= 0.5 else 0)


@pytest.mark.parametrize('joiner', ['\n', '; '])
def test_long_texts_are_compared_nearly_exactly(joiner):
  """With lines, and as a minified file of a single one."""
  text = max(code_samples.standard_library().values(), key=len)[:80_000]
  text = joiner.join(line.strip() for line in text.split('\n'))
  edited = code_samples.edit_characters(text, 0.05, random.Random(0))
  bound = levenshtein.similarity(text, edited, threshold=0.8, exact_chars=4000)
  exact = Levenshtein.normalized_similarity(text, edited)
  assert exact - 0.03 < bound <= exact + 1e-9


@pytest.mark.slow
def test_comparisons_do_not_outgrow_documents():
  """Candidates per document stay small, and copies are found, at any size."""
  for number in (1_000, 10_000, 50_000):
    docs = list(code_samples.synthetic(number))
    options = near_duplicates.Options()
    pairs = minhash.candidates(
      signed(docs), leaders=options.leaders, threshold=options.threshold
    )
    gone = near_duplicates.find(docs, options)
    copies = [d.id for d in docs if d.id.endswith('.copy')]
    found = sum(
      gone.get(c, c) == gone.get(c.removesuffix('.copy'), c.removesuffix('.copy'))
      for c in copies
    )
    print(f'{number}: {len(pairs) / number:.2f} pairs per document', found, len(copies))
    assert len(pairs) < number
    assert found >= 0.95 * len(copies)
    others = {a for a, b in gone.items() if not {f'{a}.copy', f'{b}.copy'} & {a, b}}
    assert len(others) < 0.001 * number
