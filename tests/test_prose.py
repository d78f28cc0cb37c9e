"""Steps for Wikipedia, books and news."""

import pickle

import pytest

from palm_t5x.corpus import documents, prose

BODY = 'Bees are insects with six legs that live almost everywhere on the earth. ' * 4


def run(step, text, title=''):
  step = pickle.loads(pickle.dumps(step))
  return step(documents.Document('1', text, '', {'title': title} if title else {}))


@pytest.mark.parametrize(
  ('title', 'text', 'reason'),
  [
    ('Bee', '#REDIRECT [[Bees]]', 'redirect'),
    ('Biene', ' #Weiterleitung [[Bienen]]', 'redirect'),
    ('Bee (disambiguation)', BODY, 'disambiguation'),
    ('Biene (Begriffsklärung)', BODY, 'disambiguation'),
    ('Bee', f'Bee may refer to:\n\nBee, a town. {BODY}', 'disambiguation'),
    ('Category:Bees', BODY, 'not an article'),
    ('Template talk:Bees', BODY, 'not an article'),
    ('Bee', 'Bee is a town.', 'stub'),
    ('Bee', '', 'stub'),
  ],
)
def test_pages_of_wikipedia_that_are_no_articles(title, text, reason):
  assert run(prose.WikipediaArticle(), text, title) == documents.Dropped(reason)


def test_articles_of_wikipedia_keep_their_title():
  step = prose.WikipediaArticle()
  assert run(step, BODY, 'Bee').text == f'Bee\n\n{BODY.strip()}'
  assert run(step, f'Bee\n\n{BODY}', 'Bee').text == f'Bee\n\n{BODY.strip()}'
  assert run(step, BODY).text == BODY.strip()
  untitled = prose.WikipediaArticle(title_line=False)
  assert run(untitled, BODY, 'Bee').text == BODY.strip()
  # A title may hold a colon, and a text speak of what a word may refer to.
  assert run(step, BODY, '2001: A Space Odyssey').text.startswith('2001: A Space')
  assert run(step, BODY + 'It may refer to: bees.', 'Bee').text.startswith('Bee')


BOOK = """\
\ufeffThe Project Gutenberg eBook of The Bees

This eBook is for the use of anyone anywhere.\r

*** START OF THE PROJECT GUTENBERG EBOOK THE BEES ***

Produced by Ann and Bob

[Illustration: a bee]

[Transcriber's note: none]

THE BEES

CHAPTER I

It was a hive. Produced by bees, it stood alone.

*** END OF THE PROJECT GUTENBERG EBOOK THE BEES ***

Updated editions will replace the previous one.
"""
OLD_BOOK = """\
**The Project Gutenberg Etext of The Bees**

*START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START*
Why is this "Small Print!" statement here?
*END THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*

The Bees

It was a hive.

End of The Project Gutenberg Etext of The Bees
"""


def test_books_without_their_licence():
  step = prose.Book(min_characters=10)
  assert run(step, BOOK).text == (
    'THE BEES\n\nCHAPTER I\n\nIt was a hive. Produced by bees, it stood alone.'
  )
  assert run(step, OLD_BOOK).text == 'The Bees\n\nIt was a hive.'
  assert run(step, BODY).text == BODY.strip()
  far = f'{BODY * 1000}\n\n***END OF THE PROJECT GUTENBERG EBOOK X***\nmore'
  assert run(step, far).text == (BODY * 1000).strip()
  assert run(prose.Book(), BOOK) == documents.Dropped('too short')


def test_news_without_standing_lines():
  text = f"""\
Bees win the cup
Image caption: The winners
{BODY}

ADVERTISEMENT

Read more: Ants lose the cup
They said they would sign up for another game, and follow up on it.
Reporting by Ann Bee; Editing by Bob Ant
Copyright 2020 The Hive. All rights reserved.
Exclusive to the Hive
"""
  step = prose.NewsArticle(drop_lines=('exclusive to',))
  assert run(step, text).text == (
    f'Bees win the cup\n{BODY}\n\n'
    'They said they would sign up for another game, and follow up on it.'
  )
  assert run(prose.NewsArticle(), 'Advertisement\nNothing.').reason == 'too short'
  assert run(prose.NewsArticle(), BODY).text == BODY
