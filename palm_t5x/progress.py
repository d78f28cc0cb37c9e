"""One line per interval that says how a run is going; on a terminal, a bar too.

step    100/1,600  loss 3.2142  1.58 bits/byte  lr 1.0e-02  grad 0.43  ...
"""

import collections
import sys
import time
from typing import Any, TextIO


def duration(seconds: float) -> str:
  """Seconds as a person reads them: '0:07', '3:12', '1:02:03', '2d 03h'."""
  seconds = round(seconds)
  minutes, s = divmod(seconds, 60)
  hours, m = divmod(minutes, 60)
  days, h = divmod(hours, 24)
  if days:
    return f'{days}d {h:02d}h'
  return f'{hours}:{m:02d}:{s:02d}' if hours else f'{m}:{s:02d}'


class PrepareProgress:
  """Says what a preparation is doing: at its start, then every few seconds.

  Called as progress(label, done, total), as `corpus.prepare` does.
  """

  _SECONDS = 2.0

  def __init__(self, stream: TextIO | None = None, clock=time.monotonic):
    self._stream, self._clock = stream or sys.stdout, clock
    self._label, self._spoke = '', 0.0

  def __call__(self, label: str, done: int = 0, total: int = 0) -> None:
    """`done` of `total` bytes of the work called `label` are done; 0: of unknown."""
    now = self._clock()
    if label != self._label:
      self._label, self._spoke = label, now
      print(f'{label} ...', file=self._stream, flush=True)
    elif done and now - self._spoke > self._SECONDS:
      self._spoke = now
      share = f'{100 * done / total:.0f}%' if total else f'{done / 1e6:,.0f} MB'
      print(f'{label}: {share}', file=self._stream, flush=True)


def _utilisation(mfu, without_attention, hfu) -> str | None:
  """'46.2% (45.7% without attention, HFU 57.8%)', or None."""
  if mfu is None:
    return None
  if without_attention is None or hfu is None:
    return f'{100 * mfu:.1f}%'
  rest = f'{100 * without_attention:.1f}% without attention, HFU {100 * hfu:.1f}%'
  return f'{100 * mfu:.1f}% ({rest})'


class ProgressLine:
  """Prints a run's progress: coloured with a bar on a terminal, plain lines otherwise.

  A context manager. `tick(step)` after every step is cheap (it moves the bar and
  gives the clock that ETA reads, without the compilation before the first); `report`
  prints the line of an interval; `message` prints text without tearing the bar.

  Args:
    total_steps: the step at which the run ends.
    stream: where to write; standard output by default.
    clock: seconds, for tests.
  """

  # The ETA is the mean speed over this many last lines: evaluations and checkpoints
  # are in it, the speed of an hour ago is not.
  _WINDOW = 8

  def __init__(
    self, total_steps: int, stream: TextIO | None = None, clock=time.monotonic
  ):
    self._total = total_steps
    self._stream = stream or sys.stdout
    self._clock = clock
    self._marks = collections.deque(maxlen=self._WINDOW)
    self._console = self._bar = self._task = None
    if self._stream.isatty():
      from rich.console import Console  # only here: 0.1 s of imports

      self._console = Console(file=self._stream, highlight=False)

  def __enter__(self) -> 'ProgressLine':
    if self._console is not None:
      from rich import progress

      self._bar = progress.Progress(
        progress.TextColumn('[dim]{task.description}'),
        progress.BarColumn(bar_width=None),
        progress.MofNCompleteColumn(),
        progress.TextColumn('[dim]{task.fields[eta]}'),
        console=self._console,
        transient=True,
        refresh_per_second=2,
      )
      self._task = self._bar.add_task('training', total=self._total, eta='')
      self._bar.start()
    return self

  def __exit__(self, *exc_info: Any) -> None:
    if self._bar is not None:
      self._bar.stop()
      self._bar = None

  def tick(self, step: int) -> None:
    """`step` steps are done."""
    if not self._marks or step < self._marks[-1][0]:  # the start, or a rewind
      self._marks.clear()
      self._marks.append((step, self._clock()))
    if self._bar is not None:
      self._bar.update(self._task, completed=step)

  def report(
    self,
    step: int,
    *,
    loss: float | None = None,
    bits_per_byte: float | None = None,
    learning_rate: float | None = None,
    grad_norm: float | None = None,
    tokens_per_second: float | None = None,
    mfu: float | None = None,
    mfu_label: str = 'MFU',
    mfu_without_attention: float | None = None,
    hfu: float | None = None,
  ) -> None:
    """Prints the interval that ends at `step`; what is None is left out.

    loss in nats per token; mfu, mfu without attention and hfu (PaLM App. B) as shares
    of 1; `mfu_label` says of which peak ('MFU', or 'of measured peak' on a CPU).
    """
    self.tick(step)
    if step > self._marks[-1][0]:
      self._marks.append((step, self._clock()))
    eta = self.eta_seconds(step)
    width = len(f'{self._total:,}')
    fields = [
      ('step', f'{step:>{width},}/{self._total:,}'),
      ('loss', None if loss is None else f'{loss:.4f}'),
      (None, None if bits_per_byte is None else f'{bits_per_byte:.3f} bits/byte'),
      ('lr', None if learning_rate is None else f'{learning_rate:.2e}'),
      ('grad', None if grad_norm is None else f'{grad_norm:.3g}'),
      (None, None if tokens_per_second is None else f'{tokens_per_second:,.0f} tok/s'),
      (mfu_label, _utilisation(mfu, mfu_without_attention, hfu)),
      ('ETA', None if eta is None else duration(eta)),
    ]
    shown = [(label, value) for label, value in fields if value is not None]
    if self._console is None:
      text = [value if label is None else f'{label} {value}' for label, value in shown]
      self.message('  '.join(text))
      return
    styled = [
      f'[bold]{value}[/]' if label is None else f'[dim]{label}[/] [bold]{value}[/]'
      for label, value in shown
    ]
    if self._bar is not None and eta is not None:
      self._bar.update(self._task, eta=f'ETA {duration(eta)}')
    self._console.print('  '.join(styled), soft_wrap=True)

  def message(self, text: str) -> None:
    """Prints text on a line of its own, above the bar if there is one."""
    if self._console is not None:
      self._console.print(text, markup=False, soft_wrap=True)
    else:
      print(text, file=self._stream, flush=True)

  def eta_seconds(self, step: int) -> float | None:
    """Seconds until total_steps at the recent speed; None before two marks."""
    if len(self._marks) < 2:
      return None
    (first, start), (last, end) = self._marks[0], self._marks[-1]
    return (self._total - step) * (end - start) / (last - first)
