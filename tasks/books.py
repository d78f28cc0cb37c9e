"""Books (English): 13 % of the mixture (paper, Table 2).

Plain text, without the front and back matter of digital editions.

    t5x corpus --gin_file=corpus/books.gin --data_dir=raw/books
"""

from palm_t5x.corpus import corpus_tasks

corpus_tasks.add_corpus_task('books')
