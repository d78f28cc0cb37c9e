"""From raw text to rows of token ids: vocabulary, token stores, and their readers.

No module here imports JAX. `codec`, `storage`, `jobs`, `token_store`, `store_builder`,
`sampling` and `reader` import neither SeqIO nor (so) TensorFlow; `vocabulary`,
`sources` and `prepare` do.
"""
