"""`t5x corpus`: from raw dumps to a finished sub-corpus, and the facts about it."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from palm_t5x import places
from palm_t5x.corpus import corpus_report, jobs, processed, sub_corpus
from palm_t5x.corpus.token_store import only_builder
from palm_t5x.errors import Failure, UserError
from palm_t5x.progress import PrepareProgress


def corpus(
  *,
  definition: sub_corpus.SubCorpus | None = None,
  before: Sequence[Callable[[], Any]] = (),
  workers: int | None = None,
  shard_id: int = 0,
  num_shards: int = 1,
  runner: Callable[..., bool] | None = None,
  report: bool = False,
) -> None:
  """Reads raw files, keeps what is worth keeping, and says what it dropped and why.

  Restartable: what is finished is not done again. The outcome depends on the files and
  the settings alone, not on workers, shards or interruptions.

  Args:
    definition: what to make; None only with `report`.
    before: called first, such as the training of a quality classifier.
    workers: processes on this machine; None: as many as it has cores.
    shard_id, num_shards: this process's part of the work, over machines that share
      CORPUS_DIR.
    runner: instead, runs the stages elsewhere: see `beam_runner`.
    report: make nothing; print the facts about the finished sub-corpora (`definition`,
      or all in CORPUS_DIR) and write them as JSON, tables and plots.

  Raises:
    UserError: nothing to read, or a sub-corpus made with other settings is there.
    Failure: too many broken records, a full disk, a worker that died.
  """
  if report:
    corpus_report.report([definition.name] if definition else None)
    return
  if definition is None:
    raise UserError(
      't5x corpus needs a sub-corpus to make, such as --gin_file=corpus/books.gin '
      '--data_dir=raw/books; or --report, for those that are finished.'
    )
  output = processed.folder(definition.name)
  if '://' in output:
    raise UserError(
      f'CORPUS_DIR = {os.path.dirname(output)}: sub-corpora need a local or mounted '
      'folder; only token stores may be in a bucket.'
    )
  workers = jobs.default_workers(workers)
  for function in before:
    function()
  shares = definition.shares(places.data_dir())
  how = {'workers': workers, 'shard_id': shard_id, 'num_shards': num_shards}
  if _make(definition, shares, output, runner, how):
    _say(processed.read_manifest(output), output)
  else:
    print(
      f'Shard {shard_id} of {num_shards} has done its part, and others are missing: '
      'run them, then this command again.'
    )


def _make(definition, shares, output: str, runner, how: dict[str, int]) -> bool:
  """Does the stages; False if other shards have yet to do their part.

  Args:
    how: workers, shard_id and num_shards, for `jobs.run`.
  """
  jobs.check_shard(how['shard_id'], how['num_shards'])
  settings = sub_corpus.settings(definition, shares)
  alone = how['num_shards'] == 1
  whole = lambda: processed.read_manifest(output) is not None
  with only_builder(output, shared=not alone):
    work = output + '.work'
    if _is_finished(output, settings):
      if alone and os.path.isdir(work):  # killed between the manifest and the end
        jobs.Job(work).delete()
      return True
    job = jobs.Job(work, settings)
    stages = sub_corpus.stages(definition, shares, job.folder, output)
    try:
      if runner is not None:
        done = runner(job, stages)
      else:
        progress = PrepareProgress()
        done = jobs.run(job, stages, progress=progress, finished=whole, **how)
    except UserError:
      if alone:
        job.delete()  # so that it is read again when the files have been mended
      raise
    except Failure:
      # Another shard may have finished it and deleted what this one was reading.
      if alone or not whole():
        raise
      done = True
    if done:
      job.delete()
  return done


def _is_finished(output: str, settings: dict[str, Any]) -> bool:
  """Whether this very sub-corpus is there.

  Raises:
    UserError: one made with other settings is.
  """
  manifest = processed.read_manifest(output)
  if manifest is None:
    return False
  changed = sorted(
    key
    for key in {*settings, *manifest.settings}
    if settings.get(key) != manifest.settings.get(key)
  )
  if changed:
    raise UserError(
      f'{output} holds a finished sub-corpus that was made from other files or with '
      f'other settings ({", ".join(changed)} differ): delete that folder to make it '
      'again, or name another one with --gin.CORPUS_DIR=FOLDER.'
    )
  return True


def _say(manifest: processed.Manifest, output: str) -> None:
  """What became of the records, as a table."""
  counts = manifest.counts
  rows = [('records read', counts['read'], counts['read_bytes'])]
  rows += [
    (f'dropped: {reason}', entry['documents'], entry['bytes'])
    for reason, entry in sorted(
      manifest.dropped.items(), key=lambda item: -item[1]['documents']
    )
  ]
  rows += [
    ('broken records', counts['broken'], None),
    ('exact duplicates', counts['duplicates'], None),
    ('near-duplicates', counts['near_duplicates'], None),
  ]
  rows += [
    (f'kept for {split}', values['documents'], values['bytes'])
    for split, values in manifest.splits.items()
  ]
  print(f'{manifest.name}: {output}')
  for label, number, size in rows:
    if number or label.startswith(('records', 'kept')):
      shown = '' if size is None else f'{size / 1e6:12,.1f} MB'
      print(f'  {label:44} {number:14,}{shown}')
  print(f'  facts: {os.path.join(output, "report.md")}')
