"""Wikipedia (multilingual): 4 % of the mixture (paper, Table 2).

Articles under their titles, without redirects, disambiguations and stubs.

    t5x corpus --gin_file=corpus/wikipedia.gin --data_dir=raw/wikipedia
"""

from palm_t5x.corpus import corpus_tasks

corpus_tasks.add_corpus_task('wikipedia')
