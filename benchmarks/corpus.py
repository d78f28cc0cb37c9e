"""MB per second and core of every stage of a corpus, each beside the obvious way.

    python benchmarks/corpus.py [--megabytes 16] [--files 1000,10000] [--chain 128]

The text is Python's own library and help topics, in as many variations as it takes; all
stages see the same documents. Then near-duplicates among more and more files, and the
whole chain (t5x corpus, t5x cache) on all cores. Only ratios within one run mean
anything.
"""

import argparse
import itertools
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from pydoc_data import topics

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import datasketch
import py3langid

from palm_t5x import places
from palm_t5x.commands import corpus as corpus_command
from palm_t5x.corpus import (
  documents,
  facts,
  language,
  minhash,
  near_duplicates,
  processed,
  quality,
  readers,
  store_builder,
  sub_corpus,
  token_store,
  web,
)

SEQIO_TASK = """
import glob, os
import seqio
seqio.TaskRegistry.add(
  'bench',
  source=seqio.TextLineDataSource({'train': os.environ['BENCH_FILES']}),
  preprocessors=[
    lambda dataset: dataset.map(lambda line: {'targets': line}),
    seqio.preprocessors.tokenize,
    seqio.CacheDatasetPlaceholder(),
  ],
  output_features={
    'targets': seqio.Feature(seqio.SentencePieceVocabulary(os.environ['BENCH_VOCAB']))
  },
)
"""


def texts_of(megabytes: float) -> list[str]:
  """So much text; what is repeated differs in a word of every line."""
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  base = [text for _, text in sorted(topics.topics.items())]
  base += [p.read_text(errors='replace') for p in sorted(root.glob('*.py'))]
  base = [text for text in base if len(text) > 200]
  texts, size = [], 0
  for turn in itertools.count():
    for text in base:
      if size > megabytes * 1e6:
        return texts
      if turn:
        text = re.sub(r'\n(\w+)', rf'\n\1 {turn}', text)
      texts.append(text)
      size += len(text.encode())


def seconds(run, at_least: float = 2.0) -> float:
  """Of one call of `run`: the fastest."""
  best, spent = float('inf'), 0.0
  while spent < at_least:
    start = time.perf_counter()
    run()
    took = time.perf_counter() - start
    best, spent = min(best, took), spent + took
  return best


def line(name: str, size: int, ours, theirs=None, label: str = '') -> None:
  """Prints MB/s of two ways and their ratio."""
  mine = size / seconds(ours) / 1e6
  text = f'{name:28} {mine:8.1f} MB/s'
  if theirs is not None:
    other = size / seconds(theirs) / 1e6
    text += f'   {label:34} {other:8.1f} MB/s   ratio {mine / other:5.1f}'
  print(text, flush=True)


def exhaust(items) -> None:
  """Reads an iterator to its end."""
  for _ in items:
    pass


def stages(texts: list[str], folder: pathlib.Path) -> None:
  """Every stage on one core."""
  size = sum(len(text.encode()) for text in texts)
  raw = folder / 'raw'
  write(texts, raw)
  reader = readers.Files()

  def plain():
    with open(raw / 'all.jsonl', encoding='utf-8') as f:
      for record in f:
        json.loads(record)

  line(
    'read JSON lines', size,
    lambda: [exhaust(part.read()) for part in reader.parts(str(raw))],
    plain, 'plain Python',
  )  # fmt: skip
  some = texts[: len(texts) // 4]
  part = sum(len(text.encode()) for text in some)
  line(
    'identify languages', part,
    lambda: [language.identify(text) for text in some],
    lambda: [py3langid.classify(text) for text in some], 'py3langid on the whole text',
  )  # fmt: skip
  pages = [
    '<html><body><p>' + t.replace('\n\n', '</p><p>') + '</p></body>' for t in some
  ]
  strip = web.StripMarkup()
  line('strip markup', part, lambda: [
    strip(documents.Document('x', page)) for page in pages
  ])  # fmt: skip
  scored(some, part, folder)
  line('tally facts', part, lambda: [
    facts.Tally().add(documents.Document('x', text)) for text in some
  ])  # fmt: skip
  line('hash exactly', size, lambda: [documents.text_hash(text) for text in texts])
  options = near_duplicates.Options()
  signing = options._signing()
  slots = options.bands * options.rows

  def rows():
    return ((i, str(i), text) for i, text in enumerate(some))

  def sketch():
    for text in some:
      words = text.split()
      grams = {' '.join(words[i : i + 3]) for i in range(len(words) - 2)}
      datasketch.MinHash(num_perm=slots).update_batch(g.encode() for g in grams)

  line(
    'sign for near-duplicates', part,
    lambda: exhaust(minhash.records(rows(), **signing)),
    sketch, 'datasketch, word 3-grams',
  )  # fmt: skip


def write(texts: list[str], raw: pathlib.Path) -> None:
  """The texts as a file of JSON lines."""
  raw.mkdir()
  with open(raw / 'all.jsonl', 'w', encoding='utf-8') as f:
    for i, text in enumerate(texts):
      f.write(json.dumps({'id': i, 'text': text}) + '\n')


def scored(texts: list[str], size: int, folder: pathlib.Path) -> None:
  """Quality scores, beside scikit-learn's own pipeline on whole documents."""
  from sklearn import feature_extraction, linear_model

  def kind(number):
    return [
      documents.Document(str(i), t) for i, t in enumerate(texts) if i % 2 == number
    ]

  parts = [documents.Part(str(n), lambda n=n: iter(kind(n))) for n in (0, 1)]
  quality.train(parts[:1], parts[1:], str(folder / 'quality'))
  step = quality.QualityStep(str(folder / 'quality'), rule='none')
  hasher = feature_extraction.text.HashingVectorizer(
    ngram_range=(1, 2), n_features=1 << 18
  )
  model = linear_model.SGDClassifier(loss='log_loss')
  model.fit(hasher.transform(texts), [i % 2 for i in range(len(texts))])
  line(
    'score quality', size,
    lambda: [step(documents.Document('x', text)) for text in texts],
    lambda: model.predict_proba(hasher.transform(texts)),
    'scikit-learn on whole documents',
  )  # fmt: skip


def stores(texts: list[str], folder: pathlib.Path) -> str:
  """Token stores against SeqIO's cache job; returns the vocabulary's file."""
  from palm_t5x.corpus import vocabulary as vocabulary_lib  # TensorFlow: not in workers

  size = sum(len(text.encode()) for text in texts)
  path = str(folder / 'v.model')
  vocabulary = vocabulary_lib.train(texts[: len(texts) // 8], path, 32_000)
  ids = sum(map(len, vocabulary.encode_batch(texts)))
  took = seconds(lambda: vocabulary.encode_batch(texts, num_threads=1))
  print(f'{"encode, one thread":28} {size / took / 1e6:8.1f} MB/s   '
        f'{ids / took / 1e6:.2f} M tokens/s', flush=True)  # fmt: skip
  number = itertools.count()

  def build():
    where = str(folder / f'store{next(number)}')
    parts = [documents.Part('all', lambda: iter(texts), size)]
    store_builder.build(where, parts, vocabulary, task='bench', split='train')

  wall = seconds(build)
  # SeqIO's job reads lines; what it tokenises is the same text.
  lines = folder / 'lines'
  lines.mkdir()
  for share in range(4):
    flat = (text.replace('\n', '\r') for text in texts[share::4])
    (lines / f'{share}.txt').write_text('\n'.join(flat), encoding='utf-8', newline='')
  (folder / 'bench_tasks.py').write_text(SEQIO_TASK)
  env = {
    **os.environ, 'BENCH_FILES': f'{lines}/*.txt', 'BENCH_VOCAB': path,
    'PYTHONPATH': str(folder),
  }  # fmt: skip
  command = [sys.executable, '-m', 'seqio.scripts.cache_tasks_main']
  command += ['--module_import=bench_tasks', '--tasks=bench']
  start = time.perf_counter()
  done = subprocess.run(
    [*command, f'--output_cache_dir={folder}/seqio'], env=env, capture_output=True
  )
  theirs = time.perf_counter() - start
  if done.returncode:
    raise SystemExit(done.stderr.decode()[-2000:])
  start = time.perf_counter()
  subprocess.run([sys.executable, '-c', 'import seqio'], env=env, check=True)
  theirs -= time.perf_counter() - start  # what it takes to start is not the job
  print(
    f'{"build a token store":28} {size / wall / 1e6:8.1f} MB/s   '
    f'{"cache job of SeqIO (Beam, local)":34} {size / theirs / 1e6:8.1f} MB/s   '
    f'ratio {theirs / wall:5.1f}',
    flush=True,
  )
  return path


def near(counts: list[int]) -> None:
  """Files per second of the search for near-duplicates, at growing numbers of files."""
  draw = random.Random(0)
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  functions = []
  for path in sorted(root.glob('*.py')):
    source = path.read_text(errors='replace')
    functions += [
      f for f in re.split(r'\n(?=    def |def )', source) if 80 < len(f) < 600
    ]
  for count in counts:
    made = (
      documents.Document(str(i), '\n'.join(draw.choices(functions, k=4)))
      for i in range(count)
    )
    start = time.perf_counter()
    found = near_duplicates.find(made)
    took = time.perf_counter() - start
    print(
      f'near-duplicates of {count:8,} files {count / took:10,.0f} files/s   '
      f'({len(found)} found)',
      flush=True,
    )


def chain(texts: list[str], folder: pathlib.Path, vocabulary_path: str) -> None:
  """`t5x corpus` and `t5x cache` on all cores."""
  from palm_t5x.corpus import vocabulary as vocabulary_lib

  vocabulary = vocabulary_lib.SentencePieceVocabulary(vocabulary_path)
  cores, size = os.cpu_count() or 1, sum(len(text.encode()) for text in texts)
  write(texts, folder / 'chain_raw')
  places.use(str(folder / 'chain_raw'), str(folder / 'corpora'))
  steps = (web.MinLength(), language.LanguageStep())
  stream = sub_corpus.Stream(readers.Files(part_bytes=4 << 20), steps)
  start = time.perf_counter()
  corpus_command.corpus(definition=sub_corpus.SubCorpus('bench', (stream,)))
  middle = time.perf_counter()
  where = str(folder / 'chained')
  store_builder.build(
    where, processed.parts('bench', 'train'), vocabulary,
    task='bench', split='train', workers=cores,
  )  # fmt: skip
  end = time.perf_counter()
  tokens = token_store.read_manifest(where).num_tokens
  for name, took in (('t5x corpus', middle - start), ('t5x cache', end - middle)):
    print(f'{name:28} {size / took / 1e6 / cores:8.1f} MB/s and core')
  took = end - start
  print(
    f'{"the whole chain":28} {size / took / 1e6 / cores:8.1f} MB/s and core   '
    f'{tokens / took / 1e6:.2f} M tokens/s with {cores} cores'
  )


def main():
  """Prints a line per stage."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--megabytes', type=float, default=16)
  parser.add_argument('--files', default='1000,10000')
  parser.add_argument('--chain', type=float, default=128, help='megabytes of the chain')
  options = parser.parse_args()
  texts = texts_of(options.megabytes)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    stages(texts, folder)
    path = stores(texts, folder)
    near([int(count) for count in options.files.split(',')])
    chain(texts_of(options.chain), folder, path)


if __name__ == '__main__':
  main()
