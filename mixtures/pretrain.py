"""Pretraining mixtures. Rates are shares of rows, and so of tokens."""

import seqio
from palm_t5x.tasks import local_text  # noqa: F401  (registers the tasks)

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
