"""Pretraining mixtures. Rates are shares of rows, and so of tokens."""

import seqio
from palm_t5x.tasks import (  # noqa: F401  (registers the tasks)
  arxiv_math,
  books,
  conversations,
  github,
  local_text,
  news,
  web,
  wikipedia,
)

# Percent of the tokens: paper, Table 2. Chosen there so that no sub-corpus repeats
# within 780 B tokens; `t5x describe` says whether that holds for yours.
PALM_780B = {
  'conversations': 50,
  'web': 27,
  'books': 13,
  'github': 5,
  'wikipedia': 4,
  'news': 1,
}
# The mixture with which 62B was trained on, from 600 B to 1,325 B tokens: App. F.
PALM_REFRESHED = {
  'conversations': 40,
  'web': 27,
  'books': 13,
  'github': 10,
  'wikipedia': 4,
  'news': 1,
  'arxiv_math': 5,
}
seqio.MixtureRegistry.add('palm_780b', list(PALM_780B.items()))
seqio.MixtureRegistry.add('palm_refreshed', list(PALM_REFRESHED.items()))

# Most of it code, as most of the text is code. The others weigh about what their sizes
# do, so that no sub-corpus is read twice in a run of a few million tokens (the paper
# chose its weights so, section 3). Prose is the hardest text and the smallest corpus.
seqio.MixtureRegistry.add(
  'palm_tiny',
  [
    ('python_code', 68),
    ('python_docstrings', 14),
    ('python_dialogues', 14),
    ('python_prose', 4),
  ],
)
