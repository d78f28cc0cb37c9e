"""Facts about a corpus: counts, what tells people apart, and the report."""

import json
import random

import pytest

from palm_t5x.corpus import code_languages, facts, facts_report, identity_terms
from palm_t5x.corpus.documents import Document


def one(text, **meta):
  return facts.tally(Document('d', text, meta=meta)).counts


def test_sizes_and_languages():
  counts = one('héllo\n', language='fr', tokens=3)
  assert counts['total'] == {
    'documents': 1, 'bytes': 7, 'characters': 6, 'tokens': 3
  }  # fmt: skip
  assert counts['language.bytes'] == {'fr': 7} and counts['language.tokens'] == {
    'fr': 3
  }
  assert counts['length'] == {'2': 1}  # 4 to 7 bytes
  assert 'code_language.bytes' not in counts
  counts = one('x = 1\n', language='Python', repository='o/r')
  assert counts['code_language.bytes'] == {'Python': 6}
  assert one('', repository='o/r')['code_language.documents'] == {'Other': 1}
  assert one('')['language.documents'] == {'und': 1} and one('')['length'] == {'0': 1}


@pytest.mark.parametrize(
  'quality,place', [(0, '0'), (0.049, '0'), (0.05, '1'), (0.999, '19'), (1, '19')]
)
def test_quality(quality, place):
  assert one('', quality=quality)['quality'] == {place: 1}


def test_pronouns_and_terms():
  text = (
    "He said she's here; THEM, 'they' and them. Themes hero the. A Black-and-white cat."
  )
  counts = one(
    text + ' From the Middle Eastern, African\nAmerican women. Schwarz, ärzte.'
  )
  assert counts['pronouns'] == {'he/him': 1, 'she/her': 1, 'they/them': 3}
  assert counts['pronouns.documents'] == {'he/him': 1, 'she/her': 1, 'they/them': 1}
  assert counts['terms'] == {
    'race and ethnicity: black': 1,
    'race and ethnicity: white': 1,
    'race and ethnicity: middle eastern': 1,
    'race and ethnicity: african american': 1,
    'nationality: american': 1,
    'gender: women': 1,
  }


def test_no_term_is_listed_twice():
  words = ' '.join(identity_terms.PRONOUNS.values()).split()
  for _, terms in identity_terms.TERMS.values():
    words += terms.split()
  assert len(words) == len(set(words))


@pytest.mark.parametrize(
  'text,expected',
  [
    ('write to jane.doe+x@mail.example.co.uk.', 'email'),
    ('<a@b.org>', 'email'),
    ('@decorator.name\ndef f(): pass', None),
    ('x @ y.z', None),
    ('a@b', None),
    ('@user@server.org', 'email'),
    ('call 415-555-2671 now', 'phone'),
    ('(415) 555-2671', 'phone'),
    ('+1 415.555.2671', 'phone'),
    ('+44 20 7946 0958', 'phone'),
    ('1-800-555-0199', 'toll_free'),
    ('123-456-7890', None),
    ('2021-10-12 10:00', None),
    ('4155552671', None),
    ('0.415-555-2671', None),
    ('415-555-26712', None),
    ('x = 1 +200 - 3', None),
    ('1600 Pennsylvania Avenue NW', 'address'),
    ('at 221 N. Baker St, London', 'address'),
    ('12 East 42nd Street', 'address'),
    ('3 ways to place an order', None),
    ('the street', None),
  ],
)
def test_addresses_and_numbers(text, expected):
  for around in ('{}', 'Some words before. {} and after', '\n\n{}\n'):
    found = {k for k, n in one(around.format(text))['found'].items() if n}
    assert found - {'phone'} == {expected} - {'phone', None}
    assert ('phone' in found) == (expected in ('phone', 'toll_free'))


def test_merging_in_any_order():
  rng = random.Random(0)
  words = ['he', 'she', 'they', 'them', 'black', 'gay', 'a@b.org', '415-555-2671', 'ok']
  docs = [
    Document(
      str(i), ' '.join(rng.choices(words, k=9)), meta={'language': rng.choice('ab')}
    )
    for i in range(60)
  ]
  whole = facts.Tally()
  for document in docs:
    whole.add(document)
  rng.shuffle(docs)
  merged = facts.Tally()
  for document in docs:
    stored = json.loads(json.dumps(facts.tally(document).to_json()))
    merged.merge(facts.Tally.from_json(stored))
  assert merged.to_json() == whole.to_json()
  assert whole.group('total')['documents'] == 60


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A report: (its folder, the names of its files)."""
  tally, dropped = facts.Tally(), facts.Tally()
  for i in range(100):
    text = (
      'they ' * (i < 41) + 'he ' * (i < 30) + 'she ' * (i < 14) + 'a@b.org' * (i < 1)
    )
    tally.add(Document(str(i), text, meta={'language': 'en', 'quality': i / 100}))
    meta = {'language': 'Java' if i < 19 else 'Go', 'repository': 'r'}
    tally.add(Document(f'c{i}', 'x' * 1000, meta=meta))
    dropped.add(Document(f'd{i}', '', meta={'quality': i / 200}))
  folder = tmp_path_factory.mktemp('report')
  names = facts_report.report(
    tally,
    {'too short': 7, 'a | b': 9},
    {'exact': 5, 'near': 2},
    str(folder),
    dropped_tally=dropped,
    language_rows=[('en', 78.0, 77.98), ('iw', 'not distinguishable', 0.06)],
    title='github',
  )
  return folder, names


def test_report_files(written):
  folder, names = written
  assert sorted(p.name for p in folder.iterdir()) == sorted(names)
  assert {n for n in names if n.endswith('.png')} == {
    'languages.png', 'code_languages.png', 'lengths.png', 'quality.png'
  }  # fmt: skip
  for name in names:
    if name.endswith('.png'):
      assert (folder / name).read_bytes().startswith(b'\x89PNG')


def test_report_numbers(written):
  folder, _ = written
  found = json.loads((folder / 'report.json').read_text())
  assert found['dropped'] == {'too short': 7, 'a | b': 9}
  assert found['duplicates'] == {'exact': 5, 'near': 2}
  assert found['shares']['they/them'] == 20.5 and found['shares']['email'] == 0.5
  assert found['tally']['total']['documents'] == 200
  text = (folder / 'report.md').read_text()
  for line in (
    '# Facts about github',
    '| documents | 200 |',
    '| duplicate (near) | 2 |',
    '| a \\| b | 9 |',
    '| they/them | 20.5 | 41.0 |',
    '| e-mail address | 0.50 | 0.70 |',
    '| Java | 19.0 | 18.8 |',
    '| TCL | 0.00 | <0.1 |',
    '| iw | not distinguishable | 0.06 |',
    '| he/him | 30 | 35.3 | 35.0 |',
  ):
    assert line in text.split('\n'), line
  assert all(f'| {name} |' in text for name in code_languages.LANGUAGES)


def test_report_on_nothing(tmp_path):
  names = facts_report.report(facts.Tally(), {}, {}, str(tmp_path))
  assert names == ['report.json', 'report.md']
  assert 'Nothing.' in (tmp_path / 'report.md').read_text()
