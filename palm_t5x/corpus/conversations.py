"""Conversations from trees of replies, with the date they took place.

The paper takes its conversations from Adiwardana et al. (2020, Meena): paths through a
tree of replies, in which every message is one turn. It says that they carry date
markers, not what these look like, nor how paths are chosen (App. D). Here each message
is a *new* turn of exactly one document: the longest path through the tree comes
first, then what branches off it, with a few turns of context in front.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from palm_t5x import errors
from palm_t5x.corpus import documents

_EMPTY = frozenset({'', '[deleted]', '[removed]', '[deleted by user]'})
_BOT_AUTHORS = frozenset({'automoderator', 'remindmebot', 'autotldr', 'wikitextbot'})


@dataclasses.dataclass(frozen=True)
class Path:
  """A conversation in a thread: the places of its messages, in order.

  Attributes:
    context: turns that are new in another conversation, and lead up to this one.
    turns: the new ones; never empty.
  """

  context: tuple[int, ...]
  turns: tuple[int, ...]


def reply_paths(
  messages: Sequence[Mapping[str, Any]],
  max_context_turns: int = 8,
  paths: str = 'all',
) -> list[Path]:
  """The conversations of a thread; each message is a new turn in at most one.

  A message whose parent is not there begins a conversation; of messages with one id the
  first counts; parents in a circle are cut where the circle begins. Where a
  message has several replies, the one with the longest conversation below it goes on,
  the earlier one of equals.

  Args:
    messages: dicts with 'id' and 'parent'.
    max_context_turns: how many turns a branch repeats of what it answers.
    paths: 'all', or 'longest': one conversation per thread.

  Returns:
    the longest first, then the order of their first new turns; positions in `messages`.
  """
  first: dict[str, int] = {}
  for i, message in enumerate(messages):
    first.setdefault(message['id'], i)
  nodes = sorted(first.values())
  parents = {i: first.get(messages[i].get('parent', '')) for i in nodes}
  _cut_circles(parents)
  # From the leaves up, so that no thread is too deep for Python's stack.
  children: dict[int, list[int]] = {i: [] for i in nodes}
  for i in nodes:
    if parents[i] is not None:
      children[parents[i]].append(i)
  order = [i for i in nodes if parents[i] is None]
  for i in order:  # it grows: every message comes after its parent
    order.extend(children[i])
  height = dict.fromkeys(nodes, 1)
  for i in reversed(order):
    if parents[i] is not None:
      height[parents[i]] = max(height[parents[i]], height[i] + 1)
  found = []
  for i in order:
    parent = parents[i]
    if parent is None or i != _next(children[parent], height):
      found.append(_path(i, parents, children, height, max_context_turns))
  found.sort(key=lambda path: (-len(path.turns), path.turns))
  if paths == 'longest':
    return found[:1]
  return found[:1] + sorted(found[1:], key=lambda path: path.turns)


def _cut_circles(parents: dict[int, int | None]) -> None:
  """Makes the first message of every circle of parents one without a parent."""
  safe: set[int] = set()
  for start in parents:
    path, node = [], start
    on_path: set[int] = set()
    while node is not None and node not in safe and node not in on_path:
      path.append(node)
      on_path.add(node)
      node = parents[node]
    if node is not None and node in on_path:
      parents[min(path[path.index(node) :])] = None
    safe.update(path)


def _next(replies: Sequence[int], height: Mapping[int, int]) -> int:
  return max(replies, key=lambda i: (height[i], -i))


def _path(start, parents, children, height, max_context_turns) -> Path:
  context, node = [], parents[start]
  while node is not None and len(context) < max_context_turns:
    context.append(node)
    node = parents[node]
  turns = [start]
  while children[turns[-1]]:
    turns.append(_next(children[turns[-1]], height))
  return Path(tuple(reversed(context)), tuple(turns))


def speaker(number: int) -> str:
  """'A' for 0, ..., 'Z' for 25, then 'AA', 'AB', ..."""
  name = ''
  while number >= 0:
    name = chr(ord('A') + number % 26) + name
    number = number // 26 - 1
  return name


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Makes conversations of a thread, whose messages are in meta['messages'].

  A document begins with its date, that of its last new turn, on a line of its own, so
  that a prompt can ask for one; then a turn a line or more, each with its speaker: A,
  B, ... in the order of their first words. Names of authors are in neither.

  A message without text, deleted or by a bot is left out with what it says; replies to
  it answer what it answered.

  Attributes:
    paths: 'all', or 'longest': only the longest conversation of each thread.
    max_context_turns: how many turns a branch repeats of what it answers.
    min_turns: shorter conversations are dropped, context counted.
    date_line: with {date}, as 2019-07-04, or {year}; '' leaves it out; so does a
      message without a date.
    turn: with {speaker} and {text}.
    bots: authors, in lower case, that are bots; so are names that end in 'bot' after
      '-' or '_'.
    max_characters: longer messages are left out.
  """

  paths: str = 'all'
  max_context_turns: int = 8
  min_turns: int = 2
  date_line: str = '[{date}]'
  turn: str = '{speaker}: {text}'
  bots: Sequence[str] = tuple(sorted(_BOT_AUTHORS))
  max_characters: int = 100_000

  def __post_init__(self):
    if self.paths not in ('all', 'longest'):
      raise errors.UserError(
        f"Conversation.paths = {self.paths!r}: it is 'all' or 'longest'."
      )
    try:
      self.date_line.format(date='', year='')
      self.turn.format(speaker='', text='')
    except (KeyError, IndexError, ValueError) as e:
      raise errors.UserError(
        f'Conversation.date_line = {self.date_line!r} may hold {{date}} and {{year}}, '
        f'and Conversation.turn = {self.turn!r} {{speaker}} and {{text}}: {e} is not '
        'one of them.'
      ) from e

  def __call__(
    self, document: documents.Document
  ) -> list[documents.Document] | documents.Dropped:
    messages = self._without_silence(document.meta.get('messages') or [])
    if not messages:
      return documents.Dropped('no messages')
    found = reply_paths(messages, self.max_context_turns, self.paths)
    result = []
    for path in found:
      members = [messages[i] for i in (*path.context, *path.turns)]
      if len(members) < self.min_turns:
        continue
      meta = {k: v for k, v in document.meta.items() if k != 'messages'}
      meta['turns'], meta['context_turns'] = len(path.turns), len(path.context)
      date = members[-1].get('date') or ''
      if date:
        meta['date'] = date[:10]
      # Named after its first new turn, which is in no other conversation.
      name = f'{document.id}/{messages[path.turns[0]]["id"]}'
      text = self._render(members, date[:10])
      result.append(documents.Document(name, text, document.source, meta))
    return result or documents.Dropped('too few turns')

  def _without_silence(self, messages) -> list[dict[str, Any]]:
    """The messages that say something, each with the nearest such one as its parent."""
    parents, silent = {}, set()
    for message in messages:
      name = message['id']
      if name not in parents:
        parents[name] = message.get('parent', '')
        if self._is_silent(message):
          silent.add(name)
    answered: dict[str, str] = {}

    def nearest(name: str) -> str:
      passed = []
      while name in silent and name not in answered:
        if len(passed) > len(silent):
          name = ''  # they answer each other in a circle
          break
        passed.append(name)
        name = parents[name]
      name = answered.get(name, name)
      answered.update(dict.fromkeys(passed, name))
      return name

    kept, seen = [], set()
    for message in messages:
      name = message['id']
      if name in seen or name in silent:
        continue
      seen.add(name)
      kept.append({**message, 'parent': nearest(message.get('parent', ''))})
    return kept

  def _is_silent(self, message) -> bool:
    text = message['text'].strip()
    author = (message.get('author') or '').lower()
    return (
      text.lower() in _EMPTY
      or len(text) > self.max_characters
      or author in self.bots
      or author.endswith(('_bot', '-bot'))
    )

  def _render(self, messages, date: str) -> str:
    speakers: dict[str, str] = {}
    lines = []
    if date and self.date_line:
      lines.append(self.date_line.format(date=date, year=date[:4]))
    for message in messages:
      # Who has no name is somebody else in each message.
      author = message.get('author') or ''
      if author.lower() in ('', '[deleted]'):
        author = f'\0{message["id"]}'
      label = speakers.setdefault(author, speaker(len(speakers)))
      lines.append(self.turn.format(speaker=label, text=message['text'].strip()))
    return '\n'.join(lines)
