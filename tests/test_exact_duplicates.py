"""Exact duplicates, against a dictionary."""

import random

import numpy as np

from palm_t5x.corpus import documents, exact_duplicates, jobs


def find(folder, parts, monkeypatch=None, bucket=None):
  """part -> ordinals to drop, by the stage."""
  files = []
  for i, texts in enumerate(parts):
    hashes = exact_duplicates.HashFile()
    for text in texts:
      hashes.add(documents.text_hash(text))
    files.append(f'{folder}/hashes/{i}.npy')
    hashes.write(files[-1])
  stage = exact_duplicates.stage(
    f'{folder}/places', lambda job: files, lambda job: sum(map(len, parts))
  )
  job = jobs.Job(f'{folder}/job')
  assert jobs.run(job, [stage])
  found = [
    exact_duplicates.dropped_of(f'{folder}/places', i) for i in range(len(parts))
  ]
  return found, job.facts('duplicates')


def test_all_but_the_first_are_dropped(tmp_path, monkeypatch):
  draw = random.Random(0)
  parts = [[f'text {draw.randrange(40)}' for _ in range(n)] for n in (30, 0, 50, 20)]
  seen, expected = set(), []
  for texts in parts:
    drop = set()
    for i, text in enumerate(texts):
      if text in seen:
        drop.add(i)
      seen.add(text)
    expected.append(drop)
  found, facts = find(tmp_path / 'one', parts)
  assert found == expected and len(facts) == 1
  monkeypatch.setattr(exact_duplicates, '_BUCKET_DOCUMENTS', 7)
  found, facts = find(tmp_path / 'many', parts)
  assert found == expected and len(facts) == 15
  assert sum(f['duplicates'] for f in facts.values()) == sum(map(len, expected))


def test_hashes_at_the_edges_of_buckets(tmp_path, monkeypatch):
  """Hashes 0, the largest, and both sides of the middle fall into some bucket, once."""
  edges = [0, 2**64 - 1, 2**63, 2**63 - 1]
  monkeypatch.setattr(exact_duplicates, '_BUCKET_DOCUMENTS', 4)
  hashes = exact_duplicates.HashFile()
  for high in edges * 2:
    hashes.add(high.to_bytes(8, 'big') + bytes(8))
  hashes.write(str(tmp_path / '0.npy'))
  stage = exact_duplicates.stage(
    str(tmp_path / 'places'), lambda job: [str(tmp_path / '0.npy')], lambda job: 8
  )
  assert jobs.run(jobs.Job(str(tmp_path / 'job')), [stage])
  assert exact_duplicates.dropped_of(str(tmp_path / 'places'), 0) == {4, 5, 6, 7}
  assert np.load(tmp_path / '0.npy')['high'].tolist() == sorted(edges * 2)
