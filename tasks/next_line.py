"""A few-shot task from the text that is on the machine: which line comes next?

Three lines of a held-out standard library file, and four lines of the same file to go
on with, one of which does. Two solved examples from the training split come first. The
model ranks the four by their log-likelihood; guessing gets 25 %.

    Code:
        def close(self):
            if self._file is None:
                return
    Next: self._file.close()
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
_LONGEST_CONTEXT = 130  # characters, so that prompt and choice fit in 256 tokens


def _rank(*parts) -> bytes:
  """A fixed arbitrary order, the same on every machine."""
  return hashlib.blake2b('\0'.join(map(str, parts)).encode(), digest_size=8).digest()


def _questions(split: str, per_file: int):
  """(context, choices, number of the right one), a few from every file."""
  source = seqio.TaskRegistry.get('python_code').source
  for text in source.documents(split):
    lines = [line for line in text.split('\n') if line.strip()]
    yield from itertools.islice(_questions_of(lines), per_file)


def _questions_of(lines: list[str]):
  """Fair questions about one file, in an arbitrary but fixed order."""
  fit = lambda line: 12 <= len(line.strip()) <= 60
  places = range(_CONTEXT_LINES, len(lines))
  for place in sorted(places, key=lambda n: _rank(n, lines[n]))[:100]:
    context = '\n'.join(lines[place - _CONTEXT_LINES : place])
    answer = lines[place].strip()
    if not fit(lines[place]) or len(context) > _LONGEST_CONTEXT:
      continue
    others = {line.strip() for line in lines if fit(line)} - {answer}
    others -= {line.strip() for line in context.split('\n')}
    wrong = sorted(others, key=lambda line: _rank(answer, line))[: NUM_CHOICES - 1]
    if len(wrong) == NUM_CHOICES - 1:
      choices = sorted([answer, *wrong], key=lambda line: _rank('order', line))
      yield context, choices, choices.index(answer)


def _prompt(context: str) -> str:
  return f'Code:\n{context}\nNext:'


def _documents(split: str):
  """One document per choice: inputs, targets, and which question and choice it is."""
  shots = itertools.islice(_questions('train', 1), NUM_SHOTS)
  solved = [f'{_prompt(c)} {choices[right]}\n\n' for c, choices, right in shots]
  skip = NUM_SHOTS * 4 if split == 'train' else 0
  questions = itertools.islice(_questions(split, 4), skip, skip + NUM_QUESTIONS)
  for number, (context, choices, right) in enumerate(questions):
    for n, choice in enumerate(choices):
      yield {
        'inputs': ''.join(solved) + _prompt(context),
        'targets': ' ' + choice,
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
  source=sources.DocumentSource(_documents),
  preprocessors=[seqio.preprocessors.tokenize],
  postprocess_fn=_postprocess,
  output_features={'inputs': _FEATURE(), 'targets': _FEATURE()},
  metric_fns=[rank_accuracy],
)
