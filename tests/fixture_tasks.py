"""SeqIO tasks over the fixture corpus, for tests and for Gin files in tests.

A Gin file imports this module by its name (`import fixture_tasks`) where tests/ is on
the Python path. Registers `fixture_text` (prose, code and sessions; train and
validation), `fixture_mixture` of two parts of it, and, supervised, `fixture_sums` (its
metric is of predictions) and `fixture_scored_sums` (its metric is of scores); and, for
mistakes, `fixture_empty` and `fixture_bytes`, whose vocabulary is not the model's.
"""

import functools
import hashlib
import pathlib

import seqio

from palm_t5x.corpus import sources
from palm_t5x.corpus import vocabulary as vocabulary_lib

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
CORPUS = FIXTURES / 'corpus'
VOCABULARY_PATH = str(FIXTURES / 'vocabulary' / 'fixture.model')
VOCAB_SIZE = 512


def vocabulary() -> vocabulary_lib.SentencePieceVocabulary:
  """The committed vocabulary of 512 pieces, learned from the training split."""
  return vocabulary_lib.SentencePieceVocabulary(VOCABULARY_PATH, VOCAB_SIZE)


def documents(split: str, names: tuple[str, ...] = ()):
  """The documents of a split, of the named files or of all; an eighth is held out."""
  for path in sorted(CORPUS.glob('*.txt')):
    if names and path.stem not in names:
      continue
    for text in path.read_bytes().decode().split('\n%%\n'):
      held_out = hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % 8 == 0
      if held_out == (split == 'validation'):
        yield text


def sums(split: str):
  """Examples with inputs and targets: additions, with their results."""
  for x in range(40):
    for y in range(0, 40, 3):
      if ((x * 7 + y) % 10 == 0) == (split == 'validation'):
        yield {'inputs': f'{x} + {y} =', 'targets': f' {x + y}'}


def accuracy(targets, predictions):
  """Percent of predictions that are right."""
  right = [t.strip() == p.strip() for t, p in zip(targets, predictions, strict=True)]
  return {'accuracy': 100.0 * sum(right) / max(1, len(right))}


def mean_score(targets, scores):
  """Mean log-likelihood of the targets, in nats."""
  return {'log_likelihood': sum(scores) / len(targets)}


def _feature() -> seqio.Feature:
  return seqio.Feature(vocabulary=vocabulary_lib.RunVocabulary(), add_eos=True)


if 'fixture_text' not in seqio.TaskRegistry.names():
  sources.add_text_task('fixture_text', sources.DocumentSource(documents))
  for _name, _files in (
    ('fixture_prose', ('harbour_logs', 'letters', 'notes', 'recipes', 'stories')),
    ('fixture_code', ('functions', 'sessions')),
  ):
    sources.add_text_task(
      _name, sources.DocumentSource(functools.partial(documents, names=_files))
    )
  seqio.MixtureRegistry.add(
    'fixture_mixture', [('fixture_prose', 70), ('fixture_code', 30)]
  )
  seqio.TaskRegistry.add(
    'fixture_bytes',
    source=sources.DocumentSource(sums),
    preprocessors=[seqio.preprocessors.tokenize],
    output_features={'targets': seqio.Feature(seqio.ByteVocabulary())},
    metric_fns=[accuracy],
  )
  sources.add_text_task('fixture_empty', sources.DocumentSource(lambda split: ()))
  for _name, _metrics in (
    ('fixture_sums', [accuracy]),
    ('fixture_scored_sums', [mean_score]),
  ):
    seqio.TaskRegistry.add(
      _name,
      source=sources.DocumentSource(sums),
      preprocessors=[
        seqio.preprocessors.tokenize,
        seqio.preprocessors.append_eos,
      ],
      output_features={
        'inputs': seqio.Feature(vocabulary_lib.RunVocabulary(), add_eos=False),
        'targets': _feature(),
      },
      metric_fns=_metrics,
    )
