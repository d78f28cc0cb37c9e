"""Conversations: every message is a new turn once, whatever the tree."""

import itertools
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_t5x import errors
from palm_t5x.corpus import conversations, documents


def message(name, parent='', author='', text=None, date=''):
  text = f'text {name}' if text is None else text
  return {'id': name, 'parent': parent, 'author': author, 'date': date, 'text': text}


def names(messages, paths):
  return [
    (
      ''.join(messages[i]['id'] for i in path.context),
      ''.join(messages[i]['id'] for i in path.turns),
    )
    for path in paths
  ]


#      a - b - c - d - e
#          |   ` - f
#          ` - g - h
TREE = [
  message('a'),
  message('b', 'a'),
  message('g', 'b'),
  message('c', 'b'),
  message('f', 'c'),
  message('d', 'c'),
  message('h', 'g'),
  message('e', 'd'),
]


@pytest.mark.parametrize(
  ('context', 'paths', 'expected'),
  [
    (8, 'all', [('', 'abcde'), ('ab', 'gh'), ('abc', 'f')]),
    (1, 'all', [('', 'abcde'), ('b', 'gh'), ('c', 'f')]),
    (0, 'all', [('', 'abcde'), ('', 'gh'), ('', 'f')]),
    (8, 'longest', [('', 'abcde')]),
  ],
)
def test_a_tree_by_hand(context, paths, expected):
  found = conversations.reply_paths(TREE, context, paths)
  assert names(TREE, found) == expected


def test_odd_trees():
  for messages, expected in (
    ([], []),
    ([message('a', 'a')], [('', 'a')]),
    ([message('a', 'b'), message('b', 'a')], [('', 'ab')]),
    # Into a circle: x answers b, and the circle is cut at its first message.
    (
      [message('x', 'b'), message('b', 'a'), message('a', 'b')],
      [('', 'bx'), ('b', 'a')],
    ),
    ([message('b', 'gone'), message('c', 'b')], [('', 'bc')]),
    ([message('a'), message('a', 'z'), message('b', 'a')], [('', 'ab')]),
    ([message('a'), message('b')], [('', 'a'), ('', 'b')]),
  ):
    paths = conversations.reply_paths(messages)
    assert sorted(names(messages, paths)) == sorted(expected)


@settings(max_examples=200, deadline=None)
@given(
  edges=st.lists(st.tuples(st.integers(0, 20), st.integers(-1, 22)), max_size=25),
  context=st.integers(0, 4),
)
def test_every_message_is_a_new_turn_once(edges, context):
  """On arbitrary graphs, with duplicates, circles and missing parents."""
  messages = [message(str(i), str(parent)) for i, parent in edges]
  paths = conversations.reply_paths(messages, context)
  turns = [messages[i]['id'] for path in paths for i in path.turns]
  assert sorted(turns) == sorted({m['id'] for m in messages})
  for path in paths:
    assert len(path.context) <= context
    chain = (*path.context, *path.turns)
    assert len(set(chain)) == len(chain)
    for before, after in itertools.pairwise(chain):
      assert messages[after]['parent'] == messages[before]['id']


@settings(max_examples=100, deadline=None)
@given(parents=st.lists(st.integers(0, 10**6), min_size=1, max_size=40))
def test_the_longest_path_comes_first(parents):
  """Of random trees, against the paths from the root by their definition."""
  messages, from_root = [message('0')], [[0]]
  for i, parent in enumerate(parents, 1):
    messages.append(message(str(i), str(parent % i)))
    from_root.append([*from_root[parent % i], i])
  paths = conversations.reply_paths(messages, 10**6)
  assert len(paths[0].turns) == max(map(len, from_root))
  inner = {i for path in from_root for i in path[:-1]}
  leaves = [i for i in range(len(messages)) if i not in inner]
  assert sorted(path.turns[-1] for path in paths) == leaves
  for path in paths:
    assert [*path.context, *path.turns] == from_root[path.turns[-1]]


def test_long_threads_are_no_trouble():
  messages = [message(str(i), str(i - 1)) for i in range(50_000)]
  (path,) = conversations.reply_paths(messages)
  assert len(path.turns) == 50_000
  step = conversations.Conversation()
  silent = [
    {**m, 'text': '' if 0 < i < 49_999 else 'x'} for i, m in enumerate(messages)
  ]
  (document,) = step(documents.Document('t', '', '', {'messages': silent}))
  assert document.text == 'A: x\nB: x'


def thread():
  return [
    message('1', '', 'ann', 'Hello?', '2019-07-04T12:00:00Z'),
    message('2', '1', 'bob', ' Hi Ann.\nHow are you? ', '2019-07-04T12:01:00Z'),
    message('3', '2', 'AutoModerator', 'Be nice.', '2019-07-04T12:01:30Z'),
    message('4', '3', 'ann', 'Fine {speaker}!', '2019-07-05T09:00:00Z'),
    message('5', '1', '[deleted]', '[deleted]', '2019-07-06T09:00:00Z'),
    message('6', '5', '', 'Who was that?', '2019-07-07T09:00:00Z'),
    message('7', '6', '', 'Who are you?', '2020-01-01T09:00:00Z'),
  ]


def run(step, messages):
  step = pickle.loads(pickle.dumps(step))
  return step(documents.Document('t', 'x', 'src', {'messages': messages, 'k': 1}))


def test_conversations_as_text():
  one, two = run(conversations.Conversation(), thread())
  assert one.text == (
    '[2019-07-05]\nA: Hello?\nB: Hi Ann.\nHow are you?\nA: Fine {speaker}!'
  )
  assert two.text == '[2020-01-01]\nA: Hello?\nB: Who was that?\nC: Who are you?'
  assert (one.id, two.id) == ('t/1', 't/6')
  assert two.meta == {'k': 1, 'turns': 2, 'context_turns': 1, 'date': '2020-01-01'}
  assert two.source == 'src'


def test_formats_and_bounds_are_arguments():
  step = conversations.Conversation(
    paths='longest', date_line='# {year}', turn='<{speaker}> {text}', bots=('bob',)
  )
  (one,) = run(step, thread())
  # Without Bob, the moderator's is the longest, and the earlier one of two equals.
  assert one.text == '# 2019\n<A> Hello?\n<B> Be nice.\n<A> Fine {speaker}!'
  short = conversations.Conversation(max_context_turns=0, min_turns=3, date_line='')
  (one,) = run(short, thread())
  assert one.text.startswith('A: Hello?')
  many = conversations.Conversation(min_turns=9)
  assert run(many, thread()) == documents.Dropped('too few turns')
  assert run(many, []) == documents.Dropped('no messages')
  undated = [message('1', '', 'a', 'x'), message('2', '1', 'b', 'y' * 50)]
  assert run(conversations.Conversation(), undated)[0].text == 'A: x\nB: ' + 'y' * 50
  strict = conversations.Conversation(max_characters=20)
  assert run(strict, undated) == documents.Dropped('too few turns')
  for wrong in ({'paths': 'some'}, {'turn': '{name}'}, {'date_line': '{'}):
    with pytest.raises(errors.UserError, match='Conversation'):
      conversations.Conversation(**wrong)


def test_silence_in_circles_ends():
  messages = [
    message('1', '2', text=''),
    message('2', '1', text=''),
    message('3', '2'),
    message('4', '3'),
  ]
  (document,) = run(conversations.Conversation(), messages)
  assert document.text == 'A: text 3\nB: text 4'


def test_speakers_have_no_names():
  assert [conversations.speaker(i) for i in (0, 25, 26, 51, 52, 701, 702)] == [
    'A', 'Z', 'AA', 'AZ', 'BA', 'ZZ', 'AAA'
  ]  # fmt: skip
