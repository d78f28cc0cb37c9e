"""arXiv and web pages with mathematics: 5 % of the refreshed mixture (App. F).

As plain text or TeX; the paper takes them from the corpus of Minerva.

    t5x corpus --gin_file=corpus/arxiv_math.gin --data_dir=raw/arxiv_math
"""

from palm_t5x.corpus import corpus_tasks

corpus_tasks.add_corpus_task('arxiv_math')
