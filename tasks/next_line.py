"""A few-shot task from the text that is on the machine: which line comes next?

Three lines of a held-out standard library file, and four lines to go on with, one of
which does; the others come from other files. Two solved examples from the training
split come first. The model ranks the four by log-likelihood; guessing gets 25 %.

    # Code
        def close(self):
            if self._file is None:
                return
            self._file.close()
"""

import functools
import hashlib
import itertools

import seqio

from palm_t5x.corpus import sources
from palm_t5x.corpus import vocabulary as vocabulary_lib

NUM_QUESTIONS = 48
NUM_SHOTS = 2
NUM_CHOICES = 4
_CONTEXT_LINES = 3
_MOST_FILES = 40  # to read; enough for all questions
_LONGEST_CONTEXT = 130  # characters, so that prompt and choice fit in 256 tokens


def _rank(*parts) -> bytes:
  """A fixed arbitrary order, the same on every machine."""
  return hashlib.blake2b('\0'.join(map(str, parts)).encode(), digest_size=8).digest()


def _fits(line: str) -> bool:
  return 12 <= len(line.strip()) <= 60


def _questions(split: str, per_file: int):
  """(context, choices, number of the right one), a few from every file."""
  source = seqio.TaskRegistry.get('python_code').source
  files = [
    [line for line in text.split('\n') if line.strip()]
    for text in itertools.islice(source.documents(split), _MOST_FILES)
  ]
  for number, lines in enumerate(files):
    others = {line.strip() for other in files if other is not lines for line in other}
    others = {line for line in others if _fits(line)} - {s.strip() for s in lines}
    asked = _questions_of(lines, sorted(others), number)
    yield from itertools.islice(asked, per_file)


def _questions_of(lines: list[str], others: list[str], number: int):
  """Questions about one file, in an arbitrary but fixed order.

  Wrong choices are lines of other files that are about as long as the right one, for a
  log-likelihood is a sum and would favour short ones.
  """
  places = range(_CONTEXT_LINES, len(lines))
  for place in sorted(places, key=lambda n: _rank(number, n, lines[n])):
    context = '\n'.join(lines[place - _CONTEXT_LINES : place])
    answer = lines[place].strip()
    if not _fits(answer) or len(context) > _LONGEST_CONTEXT:
      continue
    alike = [line for line in others if abs(len(line) - len(answer)) <= 2]
    wrong = sorted(alike, key=lambda line: _rank(answer, line))[: NUM_CHOICES - 1]
    if len(wrong) == NUM_CHOICES - 1:
      choices = sorted([answer, *wrong], key=lambda line: _rank('order', line))
      right = choices.index(answer)
      margin = lines[place][: -len(lines[place].lstrip())]
      yield context, [margin + choice for choice in choices], right


def _prompt(context: str) -> str:
  return f'# Code\n{context}\n'


def _documents(split: str):
  """One document per choice: inputs, targets, and which question and choice it is."""
  shots = itertools.islice(_questions('train', 1), NUM_SHOTS)
  solved = [f'{_prompt(c)}{choices[right]}\n\n' for c, choices, right in shots]
  questions = itertools.islice(_questions(split, 4), NUM_QUESTIONS)
  for number, (context, choices, right) in enumerate(questions):
    for n, choice in enumerate(choices):
      yield {
        'inputs': ''.join(solved) + _prompt(context),
        'targets': choice + '\n',
        'question': str(number),
        'correct': str(int(n == right)),
      }


def _postprocess(target: str, example=None, is_target: bool = False):
  """(question, whether this choice is right), for the metric to group by."""
  del target, is_target
  text = lambda key: (
    example[key].decode() if isinstance(example[key], bytes) else (example[key])
  )
  return int(text('question')), text('correct') == '1'


def rank_accuracy(targets, scores) -> dict[str, float]:
  """Percent of questions whose right choice has the highest log-likelihood."""
  best: dict[int, tuple[float, bool]] = {}
  for (question, correct), score in zip(targets, scores, strict=True):
    if question not in best or score > best[question][0]:
      best[question] = (score, correct)
  right = sum(correct for _, correct in best.values())
  return {'accuracy': 100.0 * right / max(1, len(best)), 'questions': float(len(best))}


_FEATURE = functools.partial(
  seqio.Feature, vocabulary=vocabulary_lib.RunVocabulary(), add_eos=False
)

seqio.TaskRegistry.add(
  'python_next_line',
  source=sources.DocumentSource(_documents, splits=('validation',)),
  preprocessors=[seqio.preprocessors.tokenize],
  postprocess_fn=_postprocess,
  output_features={'inputs': _FEATURE(), 'targets': _FEATURE()},
  metric_fns=[rank_accuracy],
)
