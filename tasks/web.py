"""Filtered web pages (multilingual): 27 % of the mixture (paper, Table 2).

Markup and boilerplate removed, sampled by quality; and the documents of C4.

    t5x corpus --gin_file=corpus/web.gin --data_dir=raw/web
"""

from palm_t5x.corpus import corpus_tasks

corpus_tasks.add_corpus_task('web')
