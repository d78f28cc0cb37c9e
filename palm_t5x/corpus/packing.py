"""Fine-tuning examples (inputs and targets), several to a row, loss on targets only.

Which example goes into which row is a plan, a pure function of the store and of the
feature lengths: first fit, in the store's order, among the rows that are still open. It
is computed once per pair of lengths and kept beside the store with its checksum.
"""

import hashlib
import io

import numpy as np

from palm_t5x import errors
from palm_t5x.corpus import reader, storage

_OPEN_ROWS = 64  # rows that first fit chooses among; the fullest is closed beyond it


def first_fit(lengths, row_length: int, open_rows: int = _OPEN_ROWS):
  """Packs items into rows: each into the first open row that has room for it.

  Args:
    lengths: items' lengths in order, each from 1 to `row_length`.
    row_length: what a row holds.
    open_rows: how many rows may be unfinished at a time; 0: one item to a row.

  Returns:
    (items int64 [items] ordered by row, starts int64 [rows + 1]): row r holds
    items[starts[r]:starts[r + 1]].
  """
  rows: list[list[int]] = []
  numbers = np.zeros(0, np.int64)  # of the open rows, oldest first
  room = np.zeros(0, np.int64)
  for item, length in enumerate(np.asarray(lengths).tolist()):
    fits = np.flatnonzero(room >= length)
    if fits.size:
      slot = fits[0]
      rows[numbers[slot]].append(item)
      room[slot] -= length
    else:
      numbers, room = (
        np.append(numbers, len(rows)),
        np.append(room, row_length - length),
      )
      rows.append([item])
    if len(room) > open_rows:
      fullest = np.argmin(room)
      numbers, room = np.delete(numbers, fullest), np.delete(room, fullest)
  starts = np.cumsum([0, *map(len, rows)])
  return np.array([item for row in rows for item in row], np.int64), starts


class PackedRows:
  """The rows of a store of examples, packed for given feature lengths.

  An example's inputs are cut to their first `inputs_length` tokens and its targets to
  their first `targets_length`, as SeqIO does. A row predicts their sum of tokens.

  Args:
    store: a TokenStore; documents without inputs are examples of targets only.
    inputs_length, targets_length: as in TASK_FEATURE_LENGTHS.
    pack: whether rows hold several examples, or one each.
  """

  def __init__(self, store, inputs_length: int, targets_length: int, pack: bool = True):
    if inputs_length < 0 or targets_length < 1:
      raise errors.UserError(
        f'TASK_FEATURE_LENGTHS of {inputs_length} inputs and {targets_length} targets '
        'leave no room for a target: both must be positive.'
      )
    self.length = int(inputs_length) + int(targets_length)
    self._store = store
    offsets, inputs = store.offsets(), store.inputs_lengths()
    self._inputs = np.minimum(inputs, inputs_length)
    self._targets = np.minimum(np.diff(offsets) - inputs, targets_length)
    self._starts_of_inputs, self._starts_of_targets = (
      offsets[:-1],
      offsets[:-1] + inputs,
    )
    self._items, self._starts = self._plan(
      f'packing-{inputs_length}-{targets_length}{"" if pack else "-single"}', pack
    )
    self.num_rows = len(self._starts) - 1

  def _plan(self, name: str, pack: bool):
    """The plan kept under this name; made, and kept, if it is missing or damaged."""
    path = storage.join(self._store.path, name + '.npz')
    data = storage.read_bytes(path)
    if data and hashlib.blake2b(data[16:], digest_size=16).digest() == data[:16]:
      plan = np.load(io.BytesIO(data[16:]), allow_pickle=False)
      return plan['items'], plan['starts']
    open_rows = _OPEN_ROWS if pack else 0
    items, starts = first_fit(self._inputs + self._targets, self.length, open_rows)
    buffer = io.BytesIO()
    np.savez(buffer, items=items, starts=starts)
    data = buffer.getvalue()
    digest = hashlib.blake2b(data, digest_size=16).digest()
    storage.write_bytes(path, digest + data)
    return items, starts

  def examples(self, rows) -> dict[str, np.ndarray]:
    """The rows of these numbers; rows beyond the last are all padding.

    Returns:
      int32 [n, T]: decoder_target_tokens; decoder_input_tokens, shifted right within
      each example, whose first input is the end-of-document id; decoder_segment_ids
      from 1, 0 on padding; decoder_positions from 0 within each example;
      decoder_causal_attention, 1 where the input is given and not predicted (SeqIO's
      prefix, with its first input). float32 [n, T]: decoder_loss_weights, 1 on targets.
    """
    rows = np.asarray(rows, np.int64)
    keys = ('target_tokens', 'input_tokens', 'segment_ids', 'positions')
    out = {
      f'decoder_{key}': np.zeros((len(rows), self.length), np.int32)
      for key in (*keys, 'causal_attention')
    }
    out['decoder_loss_weights'] = np.zeros((len(rows), self.length), np.float32)
    for i, row in enumerate(rows):
      if row < self.num_rows:
        self._fill({key: value[i] for key, value in out.items()}, row)
    return out

  def _fill(self, row_of: dict[str, np.ndarray], row: int) -> None:
    items = self._items[self._starts[row] : self._starts[row + 1]]
    starts = np.stack(
      [self._starts_of_inputs[items], self._starts_of_targets[items]], 1
    )
    counts = np.stack([self._inputs[items], self._targets[items]], 1)
    tokens = self._store.spans(starts.reshape(-1), counts.reshape(-1)).reshape(-1)
    at = 0
    for segment, (inputs, targets) in enumerate(counts.tolist(), start=1):
      n = inputs + targets
      span, ids = slice(at, at + n), tokens[at : at + n].astype(np.int32)
      row_of['decoder_target_tokens'][span] = ids
      row_of['decoder_input_tokens'][span] = [self._store.manifest.eos_id, *ids[:-1]]
      row_of['decoder_segment_ids'][span] = segment
      row_of['decoder_positions'][span] = np.arange(n)
      row_of['decoder_causal_attention'][at : at + min(inputs + 1, n)] = 1
      row_of['decoder_loss_weights'][at + inputs : at + n] = 1
      at += n


class SupervisedReader(reader.MixtureReader):
  """Training rows of packed examples of several stores, mixed by weight.

  As `MixtureReader`, over the rows of `PackedRows`; weights are shares of rows.

  Args:
    stores: (name, TokenStore, weight) for each task.
    inputs_length, targets_length: as in TASK_FEATURE_LENGTHS.
    seed: of the order of rows in each epoch.
    pack: whether rows hold several examples.
  """

  def __init__(
    self, stores, inputs_length: int, targets_length: int, seed: int = 0, pack=True
  ):
    stores = [entry for entry in stores if entry[2]]
    self._packed = [
      PackedRows(store, inputs_length, targets_length, pack) for _, store, _ in stores
    ]
    super().__init__(stores, inputs_length + targets_length, seed)

  def _count_rows(self, number: int) -> int:
    return self._packed[number].num_rows

  def examples(self, indices) -> dict[str, np.ndarray]:
    """The batch of these global example indices, as `PackedRows.examples` gives it."""
    out: dict[str, np.ndarray] = {}
    for packed, (where, rows) in zip(self._packed, self.locate(indices), strict=True):
      for key, value in packed.examples(rows).items():
        out.setdefault(key, np.empty((len(indices), self.length), value.dtype))
        out[key][where] = value
    return out


class SupervisedEvalReader(reader.EvalReader):
  """Every example of a store once, in its order, packed into rows.

  Args:
    store: a TokenStore.
    inputs_length, targets_length: as in TASK_FEATURE_LENGTHS; what they cut off is not
      predicted, so that bits per byte hold only where nothing is cut.
    pack: whether rows hold several examples.
  """

  def __init__(self, store, inputs_length: int, targets_length: int, pack=True):
    super().__init__(store, inputs_length + targets_length)
    self._packed = PackedRows(store, inputs_length, targets_length, pack)
    self.num_rows = self._packed.num_rows
    self.num_tokens = store.num_tokens - int(store.inputs_lengths().sum())

  def examples(self, row_ids) -> dict[str, np.ndarray]:
    """Rows as `PackedRows.examples` gives them; beyond the last, all padding."""
    return self._packed.examples(row_ids)
