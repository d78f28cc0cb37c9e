"""The corpus of palm_tiny: real text from this machine, cleanly split."""

import collections
import time

import pytest
import seqio
from palm_t5x.mixtures import pretrain
from palm_t5x.tasks import local_text

from palm_t5x.corpus import prepare

NAMES = ('python_code', 'python_dialogues', 'python_docstrings', 'python_prose')


@pytest.fixture(scope='module')
def corpus():
  """{task: {split: documents}}, as the token stores are built from it."""
  tasks = {name: seqio.TaskRegistry.get(name) for name in NAMES}
  return {
    name: {
      split: list(task.source.documents(split)) for split in ('train', 'validation')
    }
    for name, task in tasks.items()
  }


def test_the_mixture_names_them_all():
  assert pretrain.__name__ == 'palm_t5x.mixtures.pretrain'
  weighted = prepare.tasks_and_weights('palm_tiny', 'train')
  assert [(task.name, weight) for task, weight in weighted] == [
    ('python_code', 68.0),
    ('python_dialogues', 14.0),
    ('python_docstrings', 14.0),
    ('python_prose', 4.0),
  ]


def test_there_is_enough_of_each(corpus):
  sizes = {name: sum(map(len, splits['train'])) for name, splits in corpus.items()}
  held = {name: sum(map(len, s['validation'])) for name, s in corpus.items()}
  assert 8e6 < sum(sizes.values()) < 25e6, sizes
  assert min(sizes.values()) > 3e5, sizes
  assert min(held.values()) > 5e3, held
  assert 0.01 < sum(held.values()) / sum(sizes.values()) < 0.1


def test_no_validation_line_is_in_training(corpus):
  lines = lambda split: {
    line.strip()
    for splits in corpus.values()
    for text in splits[split]
    for line in text.splitlines()
  }
  train = lines('train')
  shared = {line for line in lines('validation') if len(line) >= 50 and line in train}
  assert not shared, sorted(shared)[:5]


def test_a_file_is_on_one_side_in_every_sub_corpus():
  sides = collections.defaultdict(set)
  for documents in local_text._CORPORA.values():
    for name, _ in documents():
      sides[name].add(local_text.is_validation(name))
  assert all(len(side) == 1 for side in sides.values())
  assert {name.split('/')[0] for name in sides} >= {'stdlib', 'numpy', 'flax', 'optax'}


def test_the_standard_librarys_tests_are_left_out():
  names = [name for name, _ in local_text._code()]
  assert not [n for n in names if '/test/' in n or '/tests/' in n or '/test_' in n]
  assert {'stdlib/json/decoder.py', 'stdlib/asyncio/tasks.py'} <= set(names)


def test_documents_repeat_themselves(corpus):
  for name in NAMES:
    source = seqio.TaskRegistry.get(name).source
    assert list(source.documents('validation')) == corpus[name]['validation']
    assert source.fingerprint('train') == source.fingerprint('validation') != ''


SOURCE = '''
"""Module docstring, which is long enough to be worth reading: it has more
than one hundred characters in it, you see."""

NOT_A_DOCSTRING = """this is the value of a name, and it is long as well: it
has more than one hundred characters in it"""


def add(x, y=0,
        *, z=1):  # a comment
  r"""Adds.

  A longer explanation of what adding means, so that it is not left out as too short.

  Examples
  --------
  >>> add(1, 2)
  3
  >>> for i in range(2):
  ...   add(i)
  0
  1

  That was all there is to it.
  """
  return "# not a comment" + str(x)
'''


def test_docstrings_are_found_under_their_signatures():
  found = list(local_text._docstrings_of(SOURCE))
  assert [signature for signature, _ in found] == ['', 'add(x, y=0, *, z=1)']
  assert found[0][1].startswith('Module docstring')
  prose, sessions = local_text._split_dialogues(found[1][1])
  assert sessions == '>>> add(1, 2)\n3\n>>> for i in range(2):\n...   add(i)\n0\n1'
  assert '>>>' not in prose and prose.endswith('That was all there is to it.')
  assert prose.startswith('Adds.\n\nA longer explanation')


def test_dialogues_are_sessions(corpus):
  for text in corpus['python_dialogues']['train'][:200]:
    assert text.lstrip().startswith('>>>')
    assert not text.endswith('\n\n')


def test_preparing_the_text_is_quick():
  """Not a benchmark: a bound far above the second it takes, to catch a blow-up."""
  local_text._package_docstrings.cache_clear()
  local_text._training_lines.cache_clear()
  start = time.process_time()
  list(seqio.TaskRegistry.get('python_code').source.documents('validation'))
  assert time.process_time() - start < 30
