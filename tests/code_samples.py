"""Source files for tests and benchmarks: real, edited, and any number of new ones."""

import keyword
import pathlib
import random
import re
import sysconfig
from collections.abc import Iterator

from palm_t5x.corpus import documents


def standard_library(smallest: int = 200) -> dict[str, str]:
  """Relative path -> text of Python's own files of at least so many characters."""
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  paths = sorted([*root.glob('*.py'), *root.glob('*/*.py')])
  texts = {
    str(path.relative_to(root)): path.read_text(errors='replace')
    for path in paths
    if path.parent.name not in ('site-packages', 'encodings')
  }
  return {path: text for path, text in texts.items() if len(text) >= smallest}


def edit_characters(text: str, share: float, rng: random.Random) -> str:
  """Replaces, deletes or inserts a character at this share of random places."""
  out = list(text)
  for _ in range(round(len(text) * share)):
    place, kind = rng.randrange(len(out)), rng.randrange(3)
    new = rng.choice('abcdefgh_xyz(). ')
    out[place] = ('', new, out[place] + new)[kind]
  return ''.join(out)


def edit_lines(text: str, share: float, rng: random.Random) -> str:
  """Replaces, deletes or inserts a line at this share of random places."""
  lines = text.split('\n')
  for _ in range(max(1, round(len(lines) * share))):
    place, kind = rng.randrange(len(lines)), rng.randrange(3)
    new = f'  value_{rng.randrange(1000)} = compute({rng.randrange(1000)})'
    lines[place : place + (kind != 2)] = [new] if kind else []
  return '\n'.join(lines)


def synthetic(
  number: int, seed: int = 0, near_duplicates: float = 0.05
) -> Iterator[documents.Document]:
  """New files of about a kilobyte: functions of the standard library, names changed.

  A function appears in many of them, under other names of its own and about it. A
  share of the files are earlier ones with 2 % of their characters edited; their ids
  are the earlier ids and '.copy'.
  """
  pool = [
    function
    for text in standard_library().values()
    for function in re.findall(r'^def .*\n(?:(?:[ \t].*)?\n)+', text, re.MULTILINE)
    if 150 <= len(function) <= 900
  ]
  rng = random.Random(seed)
  earlier: list[documents.Document] = []
  for i in range(number):
    if earlier and rng.random() < near_duplicates:
      before = earlier.pop(rng.randrange(len(earlier)))
      copy = edit_characters(before.text, 0.02, rng)
      yield documents.Document(f'{before.id}.copy', copy)
      continue
    text = '\n'.join(rng.sample(pool, rng.randint(2, 3)))
    new = documents.Document(f'file_{seed}_{i}', _renamed(text, rng))
    if len(earlier) < 1000:
      earlier.append(new)
    yield new


def _renamed(text: str, rng: random.Random) -> str:
  """About two thirds of the names replaced, each by the same name everywhere."""
  names: dict[str, str] = {}

  def new(match):
    name = match[0]
    if keyword.iskeyword(name):
      return name
    if name not in names:
      other = f'{name[:2]}{rng.randrange(10**4)}'
      names[name] = other if rng.random() < 0.67 else name
    return names[name]

  return re.sub(r'[A-Za-z_]\w+', new, text)
