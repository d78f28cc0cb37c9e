"""News (English): 1 % of the mixture (paper, Table 2).

Articles without markup and boilerplate.

    t5x corpus --gin_file=corpus/news.gin --data_dir=raw/news
"""

from palm_t5x.corpus import corpus_tasks

corpus_tasks.add_corpus_task('news')
