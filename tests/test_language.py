"""Languages: what is told apart, and the paper's table."""

import json
import pathlib
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_t5x.corpus import documents, language

# The first article of the Universal Declaration of Human Rights.
FIXTURE = pathlib.Path(__file__).parent / 'fixtures' / 'languages.json'
ARTICLES = json.loads(FIXTURE.read_text(encoding='utf-8'))


@pytest.mark.parametrize('code', ARTICLES)
def test_languages_by_the_papers_names(code):
  found, confidence = language.identify(ARTICLES[code])
  assert found == code and 0.5 < confidence <= 1


def test_what_is_no_language_is_undetermined():
  for text in ('', '   ', '!!!', '12 34 5.6 7 8', 'http://', '\ud800'):
    assert language.identify(text)[0] == 'und'
  assert language.identify(ARTICLES['en'], min_confidence=1.1)[0] == 'und'


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=300))
def test_any_text_has_a_code_and_a_probability(text):
  code, confidence = language.identify(text, max_bytes=101)
  assert code in language.distinguishable() and 0 <= confidence <= 1


def test_only_the_beginning_counts():
  text = ARTICLES['de'] * 3
  expected = language.identify(text, max_bytes=256)
  assert (
    language.identify('\n ' + text[:256] + ARTICLES['ru'], max_bytes=256) == expected
  )


def test_what_begins_with_no_language_is_looked_at_again():
  names = ' '.join(f'img_{i}.png' for i in range(60))
  text = f'{names} {ARTICLES["de"]} {ARTICLES["de"]} {ARTICLES["de"]}'
  assert language.identify(text, retry_bytes=0)[0] == 'und'
  assert language.identify(text)[0] == 'de'


def test_table_29_is_the_papers():
  table = language.PAPER_TABLE_29
  assert len(table) == 122
  assert sum(table.values()) == pytest.approx(740.96, abs=0.005)
  assert list(table)[:5] == ['en', 'de', 'fr', 'es', 'und']
  assert 100 * table['en'] / language.PAPER_TOTAL == pytest.approx(77.984, abs=5e-4)


def test_what_the_model_cannot_tell_is_never_zero():
  """By the model's own list of languages, whatever its version."""
  from py3langid import langid

  labels = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE).labels
  assert set(language._PAPER_NAMES) <= set(labels)
  rows = {row.code: row for row in language.language_table({'en': 75, 'de': 25})}
  assert set(rows) == set(language.PAPER_TABLE_29)
  unknown = {code for code, row in rows.items() if row.tokens is None}
  renamed = {*language._PAPER_NAMES.values()}
  assert unknown == {c for c in rows if c not in labels and c not in renamed}
  assert {'hi-Latn', 'ceb', 'haw', 'co'} <= unknown
  assert not {'iw', 'no', 'zh', 'sr', 'hr', 'bs', 'und', 'fil'} & unknown
  assert rows['ceb'].cells() == ('ceb', 'not distinguishable', '', '1.012', '0.137 %')
  assert rows['fr'].cells() == ('fr', '0', '0.000 %', '24.094', '3.250 %')
  assert rows['en'].cells() == ('en', '75', '75.000 %', '578.064', '77.984 %')


def test_languages_that_the_paper_does_not_list_come_last():
  rows = language.language_table({'ur': 1, 'ta': 2, 'hi-Latn': 1})
  assert [row.code for row in rows[-2:]] == ['ta', 'ur']
  assert rows[-2].cells() == ('ta', '2', '50.000 %', '', '')
  (latin,) = (row for row in rows if row.code == 'hi-Latn')
  assert latin.tokens == 1  # a reader may know what the model does not
  assert language.language_table({})[0].share == 0


def test_the_step_labels_and_filters():
  step = pickle.loads(pickle.dumps(language.LanguageStep(keep=('en',))))
  document = step(documents.Document('1', ARTICLES['en']))
  assert document.meta['language'] == 'en'
  assert document.meta['language_confidence'] > 0.9
  dropped = step(documents.Document('2', ARTICLES['fr']))
  assert dropped == documents.Dropped('another language')
