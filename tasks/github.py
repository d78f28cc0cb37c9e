"""Code of GitHub: 5 % of the mixture (paper, Table 2).

Permissive repositories, 24 languages, near-duplicates removed by Levenshtein.

    t5x corpus --gin_file=corpus/github.gin --data_dir=raw/github
"""

from palm_t5x.corpus import corpus_tasks

corpus_tasks.add_corpus_task('github')
