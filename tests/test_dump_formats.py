"""Dumps of Wikipedia and of message threads."""

import gzip
import json
import pickle
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_t5x import errors
from palm_t5x.corpus import documents, dump_formats, records
from palm_t5x.corpus.records import Broken

ARTICLES = """\
<doc id="12" url="https://en.wikipedia.org/wiki?curid=12" title="AT&amp;T "old"">
AT&amp;T "old"

A &lt;b&gt; company; see &amp;nbsp;.

Second paragraph.

</doc>
<doc id="25" revid="9" url="https://en.wikipedia.org/wiki?curid=25" title="Empty">
Empty


</doc>
"""


def everything(reader, folder):
  parts = pickle.loads(pickle.dumps(reader.parts(str(folder))))
  return [item for part in parts for item in part.read()]


def good(items):
  return [item for item in items if isinstance(item, documents.Document)]


def broken(items):
  return [(b.place, b.reason) for b in items if isinstance(b, Broken)]


def test_wiki_articles_in_both_forms(tmp_path):
  (tmp_path / 'en' / 'AA').mkdir(parents=True)
  (tmp_path / 'de' / 'AB').mkdir(parents=True)
  (tmp_path / 'en' / 'AA' / 'wiki_00').write_text(ARTICLES)
  line = {'id': '12', 'revid': '1', 'url': 'u', 'title': 'X', 'text': 'Y &lt; Z'}
  with gzip.open(tmp_path / 'de' / 'AB' / 'wiki_07.gz', 'wt') as f:
    f.write(json.dumps(line) + '\n')
  (tmp_path / 'de' / 'log.txt').write_text('no article')
  items = everything(dump_formats.WikiExtractor(), tmp_path)
  assert items == [
    documents.Document('de#12', 'Y < Z', 'u', {'title': 'X'}),
    documents.Document(
      'en#12',
      'A <b> company; see &nbsp;.\n\nSecond paragraph.',
      'https://en.wikipedia.org/wiki?curid=12',
      {'title': 'AT&T "old"'},
    ),
    documents.Document(
      'en#25', '', 'https://en.wikipedia.org/wiki?curid=25', {'title': 'Empty'}
    ),
  ]
  plain = everything(dump_formats.WikiExtractor(unescape=False), tmp_path)
  assert plain[0].text == 'Y &lt; Z'


def test_damaged_wiki_files(tmp_path):
  text = (
    'stray\n'
    '<doc id="1" url="u" title="cut">\ncut\n\nbody\n'
    '<doc id="2" url="u" title="fine">\nfine\n\nbody\n</doc>\n'
    '</doc>\n'
    '<doc id="3">\nno title\n</doc>\n'
    f'<doc id="4" url="u" title="long">\n{"x" * 300}\n</doc>\n'
    f'<doc id="5" url="u" title="tall">\n{("y" * 60 + chr(10)) * 5}</doc>\n'
    '<doc id="6" url="u" title="end">\nhalf'
  )
  (tmp_path / 'wiki_00').write_text(text)
  (tmp_path / 'wiki_01').write_bytes(b'<doc id="1" url="u" title="t">\n\xff\n</doc>\n')
  (tmp_path / 'wiki_02.gz').write_bytes(gzip.compress(ARTICLES.encode())[:-9])
  reader = dump_formats.WikiExtractor(max_document_bytes=200)
  items = everything(reader, tmp_path)
  # The one of the cut-off file comes last, or not at all.
  assert [d.text for d in good(items)][:1] == ['body']
  assert broken(items)[:-1] == [
    ('wiki_00:1', 'text outside of <doc>'),
    ('wiki_00:2', 'no </doc>'),
    ('wiki_00:11', '</doc> without <doc>'),
    ('wiki_00:12', '<doc> without id, url or title'),
    ('wiki_00:15', 'longer than max_document_bytes'),
    ('wiki_00:18', 'longer than max_document_bytes'),
    ('wiki_00:25', 'no </doc>'),
    ('wiki_01:1', 'invalid UTF-8'),
  ]
  assert broken(items)[-1][1] == 'cut-off .gz file'
  with pytest.raises(errors.UserError, match='AA/wiki_00'):
    (tmp_path / 'none').mkdir()
    dump_formats.WikiExtractor().parts(str(tmp_path / 'none'))


def test_a_thread_a_line(tmp_path):
  thread = {
    'id': 't',
    'messages': [
      {'id': 1, 'author': 'ann', 'date': '2019-07-04', 'text': 'Hello'},
      {'id': 2, 'parent': 1, 'user': 'bob', 'timestamp': 1562241600, 'text': 'Hi'},
      {'id': 3, 'parent': 2},
      'what',
    ],
  }
  lines = [json.dumps(thread), '{"id": 5, "messages": []}', '{', '{"messages": 3}']
  (tmp_path / 'x.jsonl').write_text('\n'.join(lines))
  items = everything(dump_formats.Threads(), tmp_path)
  (document,) = good(items)
  assert (document.id, document.text) == ('x.jsonl#t', 'Hello\n\nHi')
  assert document.meta['messages'] == [
    {'id': '1', 'parent': '', 'author': 'ann', 'date': '2019-07-04', 'text': 'Hello'},
    {
      'id': '2',
      'parent': '1',
      'author': 'bob',
      'date': '2019-07-04T12:00:00Z',
      'text': 'Hi',
    },
  ]
  assert broken(items) == [
    ('x.jsonl:1, message 2', 'no text or body or selftext'),
    ('x.jsonl:1, message 3', 'not a JSON object'),
    ('x.jsonl:2', 'no messages'),
    ('x.jsonl:3', 'invalid JSON'),
    ('x.jsonl:4', 'no id or message_id'),
  ]


def test_reddit_comments_come_together(tmp_path):
  post = {'id': 'p1', 'title': 'Why?', 'selftext': 'Tell me.', 'created_utc': 0}
  comments = [
    {'id': 'c1', 'link_id': 't3_p1', 'parent_id': 't3_p1', 'body': '&gt; So.'},
    {'id': 'd1', 'link_id': 't3_p2', 'parent_id': 't3_p2', 'body': 'Else.'},
    {'id': 'c2', 'link_id': 't3_p1', 'parent_id': 't1_c1', 'body': '[deleted]'},
    {'id': 'e1', 'parent_id': 't1_c1', 'body': 'whose?'},
  ]
  path = tmp_path / 'RC_2019-07.gz'
  text = '\n'.join(json.dumps(value) for value in [post, *comments])
  path.write_bytes(gzip.compress(text.encode()))
  items = everything(dump_formats.Threads(unescape=True), tmp_path)
  one, two = good(items)
  assert [m['id'] for m in one.meta['messages']] == ['p1', 'c1', 'c2']
  assert [m['parent'] for m in one.meta['messages']] == ['', 'p1', 'c1']
  assert one.text.startswith('Why?\nTell me.\n\n> So.')
  assert one.meta['messages'][0]['date'] == '1970-01-01T00:00:00Z'
  assert (two.id, two.text) == ('RC_2019-07.gz#p2', 'Else.')
  assert broken(items) == [
    ('RC_2019-07.gz:5', 'no thread_id or link_id or thread or conversation_id')
  ]


@settings(max_examples=20, deadline=None)
@given(
  names=st.lists(st.integers(0, 40), min_size=1, max_size=300),
  memory=st.integers(3000, 60_000),
)
def test_threads_are_grouped_in_bounded_memory(names, memory):
  """Against a dict: the same groups, in the same order within each, at any bound."""
  items, expected = [], {}
  for i, name in enumerate(names):
    message = {'id': str(i), 'text': 'x' * (i % 7)}
    items.append((f't{name}', message))
    expected.setdefault(f't{name}', []).append(message)
  limit = memory // 8
  found = list(dump_formats.grouped(items, memory, limit))
  assert sorted(thread for thread, _, _ in found) == sorted(expected)
  for thread, whole, messages in found:
    size = sum(600 + 2 * len(m['text']) for m in expected[thread])
    assert whole == (size <= limit)
    assert messages == (expected[thread] if whole else [])


def test_a_thread_that_is_too_long_is_broken(tmp_path):
  rng = random.Random(0)
  lines = [{'id': f'a{i}', 'thread': 'a', 'text': 'x' * 900} for i in range(30)]
  lines += [{'id': f'b{i}', 'thread': f'b{i}', 'text': 'y' * 900} for i in range(300)]
  rng.shuffle(lines)
  (tmp_path / 'x.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  reader = dump_formats.Threads(max_document_bytes=10_000, memory_bytes=80_000)
  items = everything(reader, tmp_path)
  assert broken(items) == [('x.jsonl#a', 'thread longer than max_document_bytes')]
  assert sorted(d.id for d in good(items)) == sorted(
    f'x.jsonl#b{i}' for i in range(300)
  )
  assert items == everything(reader, tmp_path)
  with pytest.raises(errors.UserError, match='memory_bytes'):
    dump_formats.Threads(memory_bytes=100)


def test_a_full_temporary_folder_is_one_clear_line(tmp_path, monkeypatch):
  lines = [json.dumps({'id': i, 'thread': i, 'text': 'x'}) for i in range(100)]
  (tmp_path / 'x.jsonl').write_text('\n'.join(lines))

  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(dump_formats.zstandard, 'open', full)
  reader = dump_formats.Threads(max_document_bytes=1000, memory_bytes=8000)
  with pytest.raises(errors.Failure, match=r'No space left.*TMPDIR'):
    everything(reader, tmp_path)


@pytest.mark.parametrize(
  ('value', 'date'),
  [
    ('2019-07-04T01:02:03+02:00', '2019-07-04T01:02:03+02:00'),
    ('1562241600', '2019-07-04T12:00:00Z'),
    (1562241600.5, '2019-07-04T12:00:00Z'),
    (1562241600000, '2019-07-04T12:00:00Z'),
    ('yesterday', ''),
    (None, ''),
    (float('nan'), ''),
    (1e300, ''),
  ],
)
def test_dates(value, date):
  assert dump_formats.iso_date(value) == date


def test_broken_is_counted_across_formats(tmp_path):
  (tmp_path / 'x.jsonl').write_text('{\n' * 200)
  (part,) = dump_formats.Threads().parts(str(tmp_path))
  with pytest.raises(errors.Failure, match='101 of the first 101'):
    list(records.tolerant(part.read()))
