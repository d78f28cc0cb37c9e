"""Social media conversations (multilingual): 50 % of the mixture (paper, Table 2).

Threads as documents, with date markers; raw files are reply trees (JSON lines).

    t5x corpus --gin_file=corpus/conversations.gin --data_dir=raw/conversations
"""

from palm_t5x.corpus import corpus_tasks

corpus_tasks.add_corpus_task('conversations')
