"""Web pages: their text without markup, and without what is the same on every page.

The paper removes "HTML markup and boilerplate" (App. D) and says no more. The
rules here are of three well-known kinds: parts of a page by their role (navigation,
forms), blocks by their share of links (Kohlschütter et al. 2010), and lines
as in C4 (Raffel et al. 2020).
"""

import dataclasses
import functools
import re

import lxml.etree
import lxml.html

from palm_t5x.corpus import documents

# What is never text of the page.
_DROPPED_TAGS = frozenset(
  'script style noscript template iframe object embed applet svg math canvas audio '
  'video picture map nav header footer aside form button select option textarea input '
  'dialog menu head title figure link meta base'.split()
)
_HEADINGS = frozenset('h1 h2 h3 h4 h5 h6'.split())
_BLOCKS = _HEADINGS | frozenset(
  'p div section article main body html blockquote pre ul ol li dl dt dd table caption '
  'thead tbody tfoot tr td th hr address details summary center fieldset'.split()
)
_KEPT_SHORT = _HEADINGS | {'li', 'dt', 'dd', 'pre', 'td', 'th', 'caption'}
# Words of class and id attributes that say a part is not the page's own text.
_DROPPED_ROLES = re.compile(
  r'(?:^|[\s_-])(?:cookies?|consent|gdpr|banner|popup|modal|newsletter|subscribe|'
  r'sidebar|navbar|nav|navigation|menu|breadcrumbs?|footer|masthead|advert|ads?|'
  r'advertisement|sponsored|promo|social|share|sharing|related|recommended|comments?|'
  r'pagination|pager|widget|toolbar|skip|signup|login|copyright)(?:$|[\s_-])',
  re.IGNORECASE,
)
_DROPPED_ARIA = frozenset(
  'navigation banner contentinfo complementary search dialog menu menubar alert'.split()
)
_MARKUP = re.compile(
  r'<(?:!doctype\s+html|html|head|body|div|p|br|table|script|span|a\s+href|h[1-6])\b',
  re.IGNORECASE,
)
_SPACES = re.compile(r'[ \t\n\r\f\v\u00a0]+')
_DEEPEST = 400  # nested elements; libxml2 itself stops at 255 or so
_NOT_XML = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]')


def is_html(text: str) -> bool:
  """Whether a text looks like HTML: two or more of its usual tags near the beginning."""
  found = _MARKUP.finditer(text, 0, 20_000)
  return next(found, None) is not None and next(found, None) is not None


@functools.cache
def _parser():
  return lxml.html.HTMLParser(
    encoding='utf-8', remove_comments=True, remove_pis=True, no_network=True
  )


@dataclasses.dataclass
class _Block:
  """A run of text between two tags that begin or end a block."""

  tag: str
  pieces: list[str]
  linked: int = 0  # characters inside links


def _hidden(element) -> bool:
  """Whether the attributes of an element say that it is not the page's own text."""
  get = element.get
  if get('hidden') is not None or get('aria-hidden') == 'true':
    return True
  if (get('role') or '').lower() in _DROPPED_ARIA:
    return True
  style = get('style')
  if style and 'display:none' in style.replace(' ', '').lower():
    return True
  # Not of the whole page: <body class="no-sidebar">.
  if element.tag in ('body', 'html', 'article', 'main'):
    return False
  names = f'{get("class") or ""} {get("id") or ""}'
  return len(names) > 1 and _DROPPED_ROLES.search(names) is not None


def _blocks(root) -> list[_Block]:
  """The blocks of a page in order."""
  blocks = [_Block('body', [])]

  def add(text: str | None, links: int, pre: int) -> None:
    if text:
      blocks[-1].pieces.append(text if pre else _SPACES.sub(' ', text))
      if links:
        blocks[-1].linked += len(text.strip())

  # Not recursive: a page may be nested deeper than Python's stack.
  links = pre = depth = 0
  skipped = None
  stack = []
  for event, element in lxml.etree.iterwalk(root, events=('start', 'end')):
    tag = element.tag
    if event == 'start':
      depth += 1
      if skipped is not None:
        continue
      if tag in _DROPPED_TAGS or depth > _DEEPEST or _hidden(element):
        skipped = element
        continue
      if tag == 'a':
        links += 1
      elif tag == 'pre':
        pre += 1
      if tag == 'br':
        blocks[-1].pieces.append('\n')
      elif tag in _BLOCKS:
        stack.append(tag)
        blocks.append(_Block(tag, []))
      add(element.text, links, pre)
      continue
    depth -= 1
    if skipped is not None and skipped is not element:
      continue
    if skipped is element:
      skipped = None
      if tag in _BLOCKS or tag in _DROPPED_TAGS:
        blocks.append(_Block(stack[-1] if stack else 'body', []))
    else:
      if tag == 'a':
        links -= 1
      elif tag == 'pre':
        pre -= 1
      if tag in _BLOCKS:
        stack.pop()
        blocks.append(_Block(stack[-1] if stack else 'body', []))
    add(element.tail, links, pre)
  return blocks


def extract(page: str, max_link_density: float = 0.4, min_characters: int = 25) -> str:
  """The text of an HTML page: headings, paragraphs, lists, tables and code.

  Args:
    page: HTML, whole or in pieces, well-formed or not.
    max_link_density: a block is dropped where a larger share of its characters is
      linked; list items together.
    min_characters: shorter blocks are dropped, unless they are headings, list items,
      cells or code; so are headings that nothing follows.

  Returns:
    one line per block, a blank line between paragraphs; '' if there is no text.
  """
  page = _NOT_XML.sub('', page)
  if not page.strip():
    return ''
  try:
    root = lxml.html.document_fromstring(page.encode('utf-8', 'replace'), _parser())
  except (lxml.etree.ParserError, lxml.etree.XMLSyntaxError):
    return ''
  kept: list[tuple[str, str]] = []
  for block in _without_link_lists(_blocks(root), max_link_density):
    text = ''.join(block.pieces)
    if block.tag == 'pre':
      text = text.strip('\n').rstrip()
    else:
      lines = (_SPACES.sub(' ', line).strip() for line in text.split('\n'))
      text = '\n'.join(line for line in lines if line)
    if not text:
      continue
    if len(text) < min_characters and block.tag not in _KEPT_SHORT:
      continue
    kept.append((block.tag, text))
  # A heading is kept for what it heads.
  while kept and kept[-1][0] in _HEADINGS:
    kept.pop()
  result = []
  for i, (tag, text) in enumerate(kept):
    level = kept[i + 1][0] if i + 1 < len(kept) else ''
    if tag in _HEADINGS and level in _HEADINGS and level <= tag:
      continue
    together = result and tag == before and tag in ('li', 'dt', 'dd', 'td', 'th')
    result.append(f'{"" if not result else chr(10) if together else 2 * chr(10)}')
    result.append(f'- {text}' if tag == 'li' else text)
    before = tag
  return ''.join(result)


def _without_link_lists(blocks: list[_Block], limit: float) -> list[_Block]:
  """Drops blocks of links; items of one list are judged together."""
  result, run = [], []

  def close():
    size = sum(len(piece.strip()) for block in run for piece in block.pieces)
    linked = sum(block.linked for block in run)
    if not size or linked <= limit * size:
      result.extend(run)
    run.clear()

  for block in blocks:
    if not any(piece.strip() for piece in block.pieces):
      continue
    items = {'li', 'td', 'th'}
    if run and not (block.tag == run[-1].tag and block.tag in items):
      close()
    run.append(block)
  close()
  return result


@dataclasses.dataclass(frozen=True)
class StripMarkup:
  """Turns HTML into text; a document that is no HTML passes as it is.

  Attributes:
    max_link_density, min_characters: see `extract`.
  """

  max_link_density: float = 0.4
  min_characters: int = 25

  def __call__(
    self, document: documents.Document
  ) -> documents.Document | documents.Dropped:
    if not is_html(document.text):
      return document
    text = extract(document.text, self.max_link_density, self.min_characters)
    if not text:
      return documents.Dropped('no text but markup')
    document.text = text
    return document


_BOILERPLATE_LINE = re.compile(
  r'javascript|cookies? (?:policy|settings|preferences|notice|consent)'
  r'|(?:use|uses|using|accept|enable|allow)(?: of| all| the| our| your)* cookies'
  r'|privacy policy|terms (?:of (?:use|service)|and conditions|& conditions)'
  r'|all rights reserved|sign up for our|subscribe to our|click here to|log ?in to'
  r'|share (?:this|on) (?:twitter|facebook|on|via)|powered by wordpress',
  re.IGNORECASE,
)
_LONG_LINE = 300  # characters; a longer one says more than the phrase in it


@dataclasses.dataclass(frozen=True)
class DropBoilerplate:
  """Drops lines that many pages share, and pages that are nothing else.

  Lines of cookie, script, terms and sharing notices go, and lines that the page has
  said already. C4's rules for whole pages: 'lorem ipsum', and, if asked for, any curly
  brace.

  Attributes:
    curly_braces: whether a page with '{' is kept; C4 drops it as code.
    max_dropped_share: a page of whose characters more are dropped goes altogether.
  """

  curly_braces: bool = True
  max_dropped_share: float = 0.6

  def __call__(
    self, document: documents.Document
  ) -> documents.Document | documents.Dropped:
    text = document.text
    if not self.curly_braces and '{' in text:
      return documents.Dropped('curly braces')
    if 'lorem ipsum' in text.lower():
      return documents.Dropped('lorem ipsum')
    kept, seen, dropped = [], set(), 0
    for line in text.split('\n'):
      bare = line.strip()
      boilerplate = len(bare) <= _LONG_LINE and _BOILERPLATE_LINE.search(bare)
      # Short lines may well repeat: '}' in code, 'Yes.' in a play.
      if boilerplate or (len(bare) > 30 and bare in seen):
        dropped += len(bare)
        continue
      seen.add(bare)
      kept.append(line)
    if not dropped:
      return document
    if dropped > self.max_dropped_share * (dropped + sum(map(len, kept))):
      return documents.Dropped('boilerplate')
    document.text = re.sub('\n{3,}', '\n\n', '\n'.join(kept)).strip('\n')
    return document


@dataclasses.dataclass(frozen=True)
class MinLength:
  """Drops documents that are too short, and cuts nothing.

  Attributes:
    min_characters: fewer, without the white space around them, are too few.
    min_words: likewise, words between white space; languages without spaces between
      words need 0.
  """

  min_characters: int = 200
  min_words: int = 0

  def __call__(
    self, document: documents.Document
  ) -> documents.Document | documents.Dropped:
    text = document.text
    if len(text) < self.min_characters or len(text.strip()) < self.min_characters:
      return documents.Dropped('too short')
    if self.min_words and len(text[: 100 * self.min_words].split()) < self.min_words:
      return documents.Dropped('too few words')
    return document
