"""Web pages: expected text written by hand beside its page."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_t5x.corpus import documents, web

ARTICLE = """\
<!DOCTYPE html>
<html><head><title>Bees - The Garden</title><style>p { color: red }</style>
<script>var tracking = "<p>not text</p>";</script></head>
<body class="no-sidebar home">
<header><a href="/">The Garden</a><h1>The Garden</h1></header>
<nav><ul><li><a href="/">Home</a></li><li><a href="/bees">Bees</a></li></ul></nav>
<div id="cookie-banner"><p>We would like to put cookies on your machine.</p></div>
<!-- a comment that nobody should read, ever -->
<article>
  <header><h1>Caf&eacute; bees &amp; other   friends</h1></header>
  <p>Bees are <b>very</b> use<i>ful</i> animals<script>count()</script>, as
     <a href="/science">science</a>&nbsp;tells us.<br>They also make honey.</p>
  <h2>An empty section</h2>
  <h2><a href="#need">What they need</a></h2>
  <ul><li>Flowers</li><li>Water, in a <a href="/bowl">bowl</a></li></ul>
  <p>No.</p>
  <p>Read more</p>
  <pre>
def hive(bees):
    return bees &lt; 60_000
</pre>
  <table><tr><th>Bee</th><th>Legs</th></tr><tr><td>Honey bee</td><td>6</td></tr></table>
  <div class="post-body"><blockquote>To bee or not to bee, said the &#8220;poet&#8221;
  of the hive.</blockquote></div>
  <div style="display: none">Hidden text that nobody sees on the page at all.</div>
</article>
<div class="related-posts"><h3>Related</h3><p>Ten other pages about bees and wasps.</p>
</div>
<div><a href="/a">A page about ants</a> <a href="/b">One on beetles</a> and more</div>
<form><p>Your name and your e-mail address, please: <input name="x"></p></form>
<h3>Archives</h3>
<footer><p>Copyright of the garden, all rights are reserved here.</p></footer>
</body></html>
"""
ARTICLE_TEXT = """\
Café bees & other friends

Bees are very useful animals, as science tells us.
They also make honey.

What they need

- Flowers
- Water, in a bowl

No.

def hive(bees):
    return bees < 60_000

Bee | Legs
Honey bee | 6

To bee or not to bee, said the \u201cpoet\u201d of the hive."""

# Tags that are not closed, no html or body, and bytes that XML cannot hold.
SLOPPY = """\
<p>The first paragraph of it goes on for a while
<p>The second one has a <b>bold end that nobody closed, and \x00 in the middle
<div>Then a block <span class=share-buttons>Tweet this now</span> goes on as if nothing
were the matter</div></section>
<li>a stray item
"""
SLOPPY_TEXT = """\
The first paragraph of it goes on for a while

The second one has a bold end that nobody closed, and in the middle

Then a block goes on as if nothing were the matter

- a stray item"""

PLAIN = 'A page that is text already: 1 < 2, and <b>bold</b> is how you write bold.'


@pytest.mark.parametrize(
  ('page', 'text'),
  [
    (ARTICLE, ARTICLE_TEXT),
    (SLOPPY, SLOPPY_TEXT),
    ('<html><body><p></p></body></html>', ''),
    ('<!-- only a comment -->', ''),
    ('<div><ul><li><a href=1>one</a><li><a href=2>two</a></ul></div>', ''),
    ('   ', ''),
  ],
)
def test_the_text_of_a_page(page, text):
  assert web.extract(page) == text


def test_the_limits_are_arguments():
  page = '<p>short one</p><p>A <a href=x>paragraph that is mostly a link</a>, see.</p>'
  assert web.extract(page) == ''
  assert web.extract(page, min_characters=5) == 'short one'
  mostly = 'A paragraph that is mostly a link, see.'
  assert web.extract(page, max_link_density=0.9) == mostly


def test_only_html_is_stripped():
  step = pickle.loads(pickle.dumps(web.StripMarkup()))
  assert step(documents.Document('1', PLAIN)).text == PLAIN
  assert step(documents.Document('2', ARTICLE)).text == ARTICLE_TEXT
  empty = documents.Document('3', '<html><script>x()</script></html>')
  assert step(empty) == documents.Dropped('no text but markup')
  assert web.is_html('\ufeff \n<!-- x --><HTML lang=en>'.lstrip('\ufeff'))
  assert web.is_html('Title first <p>one</p><p>two</p><p>three</p></div></div>')
  assert not web.is_html('x < y > z')


@settings(max_examples=100, deadline=None)
@given(
  pieces=st.lists(
    st.sampled_from(
      ['<p>', '</p>', '<div class=a>', '</div>', '<li>', '<a href=x>', '</a>', '<pre>',
       '<header>', '<article>', '</article>', '<script>', '</script>', '<td>', '<tr>',
       '<table>', '<br>', '&amp;', '<!--', '-->', '<', 'some words, ', '<nav>']
    )
    | st.text(max_size=12),
    max_size=40,
  )
)  # fmt: skip
def test_any_soup_of_tags_is_survived(pieces):
  text = web.extract(''.join(pieces))
  assert text == text.strip('\n')
  assert '\n\n\n' not in text or '<pre>' in pieces


def test_deep_nesting_is_survived():
  deep = '<div>' * 1000 + '<p>Still here, deep down in it.</p>' + '</div>' * 1000
  assert web.extract(deep) == 'Still here, deep down in it.'
  assert isinstance(web.extract('<div>' * 200_000 + 'x'), str)


def test_lines_that_many_pages_share():
  text = """\
How to keep bees, a guide of many words for those who have never had any before.
We use cookies to make this page better. Accept all cookies
Please enable JavaScript to view the comments.
JavaScript is a language that this page says nothing bad about, it is only named.
Bees like flowers, and they like them most in the spring when they are hungry.
Share this on Facebook
Bees like flowers, and they like them most in the spring when they are hungry.
Terms of Service | Privacy Policy
Yes.
Yes.
"""
  step = pickle.loads(pickle.dumps(web.DropBoilerplate()))
  lines = text.split('\n')
  kept = [lines[i] for i in (0, 3, 4, 8, 9)]
  assert step(documents.Document('1', text)).text.split('\n') == kept
  untouched = 'One line.\n\n\n\nAnother, after {gaps}.\n'
  assert step(documents.Document('2', untouched)).text == untouched
  strict = web.DropBoilerplate(curly_braces=False)
  assert strict(documents.Document('3', untouched)).reason == 'curly braces'
  lorem = documents.Document('4', 'Title\nLorem Ipsum dolor sit amet')
  assert step(lorem).reason == 'lorem ipsum'
  notice = documents.Document('5', 'Hi\nWe use cookies on this page, you know.')
  assert step(notice).reason == 'boilerplate'
  # A long line says more than the phrase in it.
  long = 'The history of the privacy policy is long. ' * 10
  assert step(documents.Document('6', long)).text == long


def test_short_documents_are_dropped():
  step = web.MinLength(min_characters=10, min_words=2)
  assert step(documents.Document('1', ' ' * 10 + 'too short')).reason == 'too short'
  assert step(documents.Document('2', 'x' * 400)).reason == 'too few words'
  kept = documents.Document('3', 'long enough')
  assert step(kept) is kept


@pytest.mark.timeout(60)
@pytest.mark.parametrize('unit', ['<!--x-->', '<!--x-->\n', '<!--', '</p ', ' '])
def test_is_html_of_long_runs(unit):
  assert not web.is_html(unit * (100_000 // len(unit)) + 'plain text')
  assert web.is_html(unit * 40 + '<p>x') == (unit not in ('<!--', '</p '))
