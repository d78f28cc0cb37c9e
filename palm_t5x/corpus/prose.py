"""Steps for encyclopaedias, books and news: what is around the text goes.

The paper says of these only where they are from. The rules here are the ones that the
forms of the usual sources ask for: Wikipedia's kinds of pages, Project Gutenberg's
licence around each book, news agencies' standing lines.
"""

import dataclasses
import re
from collections.abc import Sequence

from palm_t5x.corpus import documents

# In the words of the larger Wikipedias.
_REDIRECT = re.compile(
  r'\s*#\s*(?:redirect|weiterleitung|redirection|redirecci[oó]n|rinvia|doorverwijzing|'
  r'redirecionamento|перенаправление|patrz|omdirigering|転送|重定向|넘겨주기)\b',
  re.IGNORECASE,
)
_DISAMBIGUATION_TITLE = re.compile(
  r'\((?:disambiguation|begriffsklärung|homonymie|desambiguación|disambigua|'
  r'doorverwijspagina|desambiguação|значения|ujednoznacznienie|olika betydelser|'
  r'曖昧さ回避|消歧义)\)\s*$',
  re.IGNORECASE,
)
_DISAMBIGUATION_TEXT = re.compile(
  r'.{0,120}?\b(?:(?:may|can|might) (?:also )?(?:refer|stand|mean)(?: to| for)?:|'
  r'(?:commonly|usually|most often) refers to:|steht für:|bezeichnet:|peut désigner|'
  r'puede referirse a:)',
  re.IGNORECASE | re.DOTALL,
)
_NAMESPACE = re.compile(
  r'(?:Category|Template|Wikipedia|File|Image|Portal|Help|Module|Draft|User|Talk|'
  r'MediaWiki|Kategorie|Vorlage|Datei|Catégorie|Modèle|Categoría|Plantilla|Категория|'
  r'Шаблон)(?: talk)?:\S'
)


@dataclasses.dataclass(frozen=True)
class WikipediaArticle:
  """Keeps articles, with their title (meta['title']) as the first line.

  Redirects, disambiguation pages, pages of other namespaces and stubs are dropped.

  Attributes:
    min_characters: of the text without its title; shorter articles are stubs.
    title_line: whether the title becomes the first line, with a blank one after it.
  """

  min_characters: int = 200
  title_line: bool = True

  def __call__(
    self, document: documents.Document
  ) -> documents.Document | documents.Dropped:
    title, text = document.meta.get('title') or '', document.text.strip()
    if _REDIRECT.match(text):
      return documents.Dropped('redirect')
    if _NAMESPACE.match(title):
      return documents.Dropped('not an article')
    if _DISAMBIGUATION_TITLE.search(title) or _DISAMBIGUATION_TEXT.match(text):
      return documents.Dropped('disambiguation')
    if len(text) < self.min_characters:
      return documents.Dropped('stub')
    if self.title_line and title and not text.startswith(f'{title}\n'):
      text = f'{title}\n\n{text}'
    document.text = text
    return document


_START = re.compile(
  r'^[ \t]*\*{3}[ \t]*START OF (?:THE|THIS) PROJECT GUTENBERG E(?:BOOK|TEXT)'
  r'.*?(?:\*{3}|$)'
  r'|^\*END[ *]*THE SMALL PRINT!.*?\*END\*[ \t]*$',
  re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
_END = re.compile(
  r'^[ \t]*(?:\*{3}[ \t]*)?END OF (?:THE |THIS )?PROJECT GUTENBERG(?:[’\']S)?\b',  # noqa: RUF001
  re.IGNORECASE | re.MULTILINE,
)
_FRONT_MATTER = re.compile(
  r'\s*(?:\[?illustration|produced by|e-?text (?:was )?(?:prepared|produced) by|'
  r'this e-?(?:text|book) was (?:prepared|produced)|transcribed (?:by|from)|'
  r'transcriber|\[transcriber|note:|proofread|credits?:|images? (?:generously )?made|'
  r'https?://|copyright\b|all rights reserved|printed in\b|entered according to act)',
  re.IGNORECASE,
)
_SEARCHED = 60_000  # characters at either end
_FRONT_PARAGRAPHS = 40


@dataclasses.dataclass(frozen=True)
class Book:
  """Takes the licence and the front matter off a book.

  Text outside of Project Gutenberg's START and END lines goes where it has them; so do
  paragraphs of credits, transcriber's notes and copyright in front of the first other
  one.

  Attributes:
    min_characters: what is left must have so many.
  """

  min_characters: int = 2000

  def __call__(
    self, document: documents.Document
  ) -> documents.Document | documents.Dropped:
    text = document.text
    if '\r' in text:
      text = text.replace('\r\n', '\n')
    if starts := list(_START.finditer(text, 0, _SEARCHED)):
      text = text[starts[-1].end() :]
    # Markers at the end are looked for from the end.
    tail = max(len(text) - _SEARCHED, 0)
    if end := _END.search(text, tail):
      text = text[: end.start()]
    text = _without_front_matter(text.strip())
    if len(text) < self.min_characters:
      return documents.Dropped('too short')
    document.text = text
    return document


def _without_front_matter(text: str) -> str:
  position = 0
  for _ in range(_FRONT_PARAGRAPHS):
    if not _FRONT_MATTER.match(text, position):
      break
    gap = text.find('\n\n', position)
    if gap < 0:
      break
    position = gap + 2
    while text.startswith('\n', position):
      position += 1
  return text[position:]


_NEWS_LINE = re.compile(
  r'advertisements?$|story continues below|continue reading|read more[: ]|related:|'
  r'read also|see also:|follow (?:us|@\w+|\w+ \w+ on)|sign up (?:for|to)\b|'
  r'image (?:copyright|source|caption)|(?:photo|picture|image)s?(?: by|:| credit)|'
  r'reporting by .{3,200}(?:editing|writing) by|our standards:|'
  r'this (?:story|article) (?:has been|was) (?:updated|corrected|originally)|'
  r'(?:copyright|©|\(c\)) .{0,80}(?:reserved|press|reuters|news|media|20\d\d)|'
  r'share this (?:story|article)|get (?:the|our) .{0,40}newsletter',
  re.IGNORECASE,
)
_LONGEST_NEWS_LINE = 250


@dataclasses.dataclass(frozen=True)
class NewsArticle:
  """Takes standing lines off news: advertisements, credits, calls to read or follow.

  Attributes:
    min_characters: what is left must have so many.
    drop_lines: more beginnings of lines to drop, in lower case.
  """

  min_characters: int = 200
  drop_lines: Sequence[str] = ()

  def __call__(
    self, document: documents.Document
  ) -> documents.Document | documents.Dropped:
    more = tuple(self.drop_lines)
    lines = document.text.split('\n')
    kept = []
    for line in lines:
      bare = line.strip()
      if len(bare) <= _LONGEST_NEWS_LINE and (
        _NEWS_LINE.match(bare) or (more and bare.lower().startswith(more))
      ):
        continue
      kept.append(line)
    if len(kept) < len(lines):
      document.text = re.sub('\n{3,}', '\n\n', '\n'.join(kept)).strip('\n')
    if len(document.text.strip()) < self.min_characters:
      return documents.Dropped('too short')
    return document
