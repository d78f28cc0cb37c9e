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

from palm_t5x.corpus import documents


def _names(text: str) -> frozenset[str]:
  return frozenset(text.split())


# What is never text of the page, and does not end a paragraph.
_DROPPED_INLINE = _names(
  'script style noscript template iframe object embed applet svg math canvas audio '
  'video picture map button select option textarea input head title link meta base'
)
_DROPPED_BLOCKS = _names('nav footer aside form dialog menu')
_HEADINGS = _names('h1 h2 h3 h4 h5 h6')
_BLOCKS = _HEADINGS | _names(
  'p div section article main body html blockquote pre ul ol li dl dt dd table caption '
  'thead tbody tfoot tr hr address details summary center fieldset figure figcaption '
  'header'
)
_ITEMS = _names('li dt dd tr')  # stand together, and are judged together
_KEPT_SHORT = _HEADINGS | _ITEMS | _names('pre caption')
_PAGE = _names('html body main article')
# Words of class and id attributes that say a part is not the page's own text.
_DROPPED_ROLES = re.compile(
  r'(?:^|[\s_-])(?:cookies?|consent|gdpr|banner|popup|modal|newsletter|subscribe|'
  r'sidebar|navbar|nav|navigation|menu|breadcrumbs?|footer|masthead|advert|ads?|'
  r'advertisement|sponsored|promo|social|share|sharing|related|recommended|comments?|'
  r'pagination|pager|widget|toolbar|skip|signup|login|copyright)(?:$|[\s_-])',
  re.IGNORECASE,
)
_DROPPED_ARIA = _names(
  'navigation banner contentinfo complementary search dialog menu menubar alert'
)
# Possessive: a run of comments before other text would be split in every way.
_BEGINS_AS_HTML = re.compile(
  r'\s*+(?:<!--(?:(?!-->).)*+-->\s*+)*+<(?:!doctype\s+html|html|head|body|div|p|table|article|'
  r'section|main|h[1-6]|ul|ol|a|span|script|meta|link|title)\b',
  re.IGNORECASE | re.DOTALL,
)
_CLOSING = re.compile(r'</(?:p|div|a|li|h[1-6]|td|body|span)\s*>', re.IGNORECASE)
_CLOSINGS = 5  # so many make HTML of a text that begins with something else
_SPACES = re.compile('[ \t\n\r\f\v\u00a0]+')
_NOT_XML = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]')
_ENDS_SENTENCE = tuple('.!?…。！？”"»')  # noqa: RUF001 (full-width marks are meant)


def is_html(text: str) -> bool:
  """Whether a text is HTML, by how it begins and by its closing tags."""
  if '<' not in text[:20_000]:
    return False
  if _BEGINS_AS_HTML.match(text, 0, 20_000):
    return True
  found = _CLOSING.finditer(text, 0, 20_000)
  return sum(1 for _ in zip(found, range(_CLOSINGS), strict=False)) == _CLOSINGS


@functools.cache
def _parser():
  return lxml.etree.HTMLParser(
    encoding='utf-8',
    remove_comments=True,
    remove_pis=True,
    no_network=True,
    huge_tree=True,  # else what is nested more than 255 deep ends the page
  )


@dataclasses.dataclass(slots=True)
class _Block:
  """The text between two tags that begin or end a block."""

  tag: str
  pieces: list[str] = dataclasses.field(default_factory=list)
  size: int = 0  # characters, white space at the ends of pieces left out
  linked: int = 0  # those inside links


def _hidden(element, tag: str) -> bool:
  """Whether the attributes of an element say that it is not the page's own text."""
  attributes = dict(element.items())
  if not attributes or (len(attributes) == 1 and 'href' in attributes):
    return False
  get = attributes.get
  names = f'{get("class", "")} {get("id", "")}'
  # Not of the whole page: <body class="no-sidebar">.
  if len(names) > 1 and tag not in _PAGE and _DROPPED_ROLES.search(names):
    return True
  if get('hidden') is not None or get('aria-hidden') == 'true':
    return True
  if get('role', '').lower() in _DROPPED_ARIA:
    return True
  style = get('style')
  return bool(style) and 'display:none' in style.replace(' ', '').lower()


def _blocks(root) -> list[_Block]:
  """The blocks of a page in order."""
  block, stack = _Block('body'), []
  blocks = [block]
  links = pre = articles = 0
  skipped = None
  walk = lxml.etree.iterwalk(root, events=('start', 'end'))
  for event, element in walk:
    tag = element.tag
    if event == 'start':
      if (
        tag in _DROPPED_INLINE
        or tag in _DROPPED_BLOCKS
        or (tag == 'header' and not articles)
        or _hidden(element, tag)
      ):
        skipped = element
        walk.skip_subtree()
        continue
      text = element.text
      if tag in _BLOCKS:
        stack.append(tag)
        block = _Block(tag)
        blocks.append(block)
        pre += tag == 'pre'
        articles += tag in ('article', 'main')
      elif tag == 'a':
        links += 1
      elif tag == 'br':
        block.pieces.append('\n')
      elif tag in ('td', 'th') and block.size:
        block.pieces.append(' | ')
    else:
      text = element.tail
      if skipped is element:
        skipped = None
        if tag in _BLOCKS or tag in _DROPPED_BLOCKS:
          block = _Block(stack[-1] if stack else 'body')
          blocks.append(block)
      elif tag in _BLOCKS:
        stack.pop()
        pre -= tag == 'pre'
        articles -= tag in ('article', 'main')
        block = _Block(stack[-1] if stack else 'body')
        blocks.append(block)
      elif tag == 'a':
        links -= 1
    if text:
      block.pieces.append(text if pre else _SPACES.sub(' ', text))
      size = len(text.strip())
      block.size += size
      if links:
        block.linked += size
  return [block for block in blocks if block.size]


def extract(page: str, max_link_density: float = 0.4, min_characters: int = 25) -> str:
  """The text of an HTML page: headings, paragraphs, lists, tables and code.

  Args:
    page: HTML, whole or a piece, well-formed or not.
    max_link_density: a block is dropped where a larger share of its characters is
      linked; the items of a list and the rows of a table together; headings and code
      are not.
    min_characters: shorter blocks are dropped, unless they are sentences, headings,
      items, rows or code; so are headings that head nothing.

  Returns:
    its blocks with a blank line between them, items and rows on lines of their own;
    '' if there is no text.
  """
  page = _NOT_XML.sub('', page)
  if not page.strip():
    return ''
  try:
    root = lxml.etree.fromstring(page.encode('utf-8', 'replace'), _parser())
  except lxml.etree.LxmlError:
    return ''
  if root is None:  # nothing but comments
    return ''
  kept: list[tuple[str, str]] = []  # from the last block to the first
  for block in reversed(_without_lists_of_links(_blocks(root), max_link_density)):
    text = ''.join(block.pieces)
    if block.tag == 'pre':
      text = text.strip('\n').rstrip()
    else:
      lines = (_SPACES.sub(' ', line).strip() for line in text.split('\n'))
      text = '\n'.join(line for line in lines if line)
    if not text:
      continue
    if block.tag in _HEADINGS:
      # A heading is kept for what it heads: not the end, nor a heading of its rank.
      if not kept or (kept[-1][0] in _HEADINGS and kept[-1][0] <= block.tag):
        continue
    elif (
      len(text) < min_characters
      and block.tag not in _KEPT_SHORT
      and not text.endswith(_ENDS_SENTENCE)
    ):
      continue
    kept.append((block.tag, f'- {text}' if block.tag == 'li' else text))
  result, before = [], ''
  for tag, text in reversed(kept):
    if before:
      result.append('\n' if tag == before and tag in _ITEMS else '\n\n')
    result.append(text)
    before = tag
  return ''.join(result)


def _without_lists_of_links(blocks: list[_Block], limit: float) -> list[_Block]:
  result, run = [], []

  def close():
    # Headings often link to themselves, and names in code to their documentation.
    exempt = run[0].tag in _HEADINGS or run[0].tag == 'pre'
    if exempt or sum(b.linked for b in run) <= limit * sum(b.size for b in run):
      result.extend(run)
    run.clear()

  for block in blocks:
    if run and not (block.tag == run[-1].tag and block.tag in _ITEMS):
      close()
    run.append(block)
  if run:
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


# In lower case. Only lines with a word of the first are searched with the second, which
# is slower.
_BOILERPLATE_WORDS = (
  'javascript',
  'cookie',
  'privacy policy',
  'terms ',
  'rights reserved',
  'sign up for',
  'subscribe to',
  'click here',
  'log in to',
  'login to',
  'share ',
  'powered by',
)
_BOILERPLATE_LINE = re.compile(
  r'(?:enable|require|turn on|disable|without|support).{0,40}javascript'
  r'|javascript.{0,40}(?:enable|disable|require|turned|browser|support)'
  r'|cookies? (?:policy|settings|preferences|notice|consent)'
  r'|(?:use|uses|using|accept|enable|allow)(?: of| all| the| our| your)* cookies'
  r'|privacy policy|terms (?:of (?:use|service)|and conditions|& conditions)'
  r'|all rights reserved|sign up for our|subscribe to our|click here to'
  r'|(?:log in|login) to (?:your|comment|continue|view)'
  r'|share (?:this|on|via)\b.{0,20}(?:twitter|facebook|post|article|page|email|x\b)'
  r'|powered by (?:wordpress|blogger|disqus)'
)
_LONG_LINE = 300  # characters; a longer one says more than the phrase in it
_REPEATS = 30  # characters; lines that are no longer may repeat


def _has_boilerplate(text: str) -> bool:
  for word in _BOILERPLATE_WORDS:
    at = text.find(word)
    while at >= 0:
      end = text.find('\n', at)
      end = len(text) if end < 0 else end
      line = text[text.rfind('\n', 0, at) + 1 : end].strip()
      if len(line) <= _LONG_LINE and _BOILERPLATE_LINE.search(line):
        return True
      at = text.find(word, end)
  return False


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
    lower = text.lower()
    if 'lorem ipsum' in lower:
      return documents.Dropped('lorem ipsum')
    suspicious = _has_boilerplate(lower)
    lines = text.split('\n')
    stripped = list(map(str.strip, lines))
    long = [bare for bare in stripped if len(bare) > _REPEATS]
    if not suspicious and len(set(long)) == len(long):
      return document
    kept, seen, dropped = [], set(), 0
    for line, bare in zip(lines, stripped, strict=True):
      boilerplate = (
        suspicious
        and len(bare) <= _LONG_LINE
        and _BOILERPLATE_LINE.search(bare.lower()) is not None
      )
      # Short lines may well repeat: '}' in code, 'Yes.' in a play.
      if boilerplate or (len(bare) > _REPEATS and bare in seen):
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
