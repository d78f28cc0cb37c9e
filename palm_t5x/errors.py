"""The two ways a run ends badly: the user's mistake, and a failure of the world.

`main` prints either as one line and never a stack trace; everything else that escapes
is a bug of ours and keeps its trace.
"""

import re

_DISK = re.compile(
  'No space left on device|Disk quota exceeded|File too large|Read-only file system'
  '|Permission denied|Not a directory|Input/output error'
)


class UserError(Exception):
  """A mistake in what was asked for: exit code 2. The text names value, limit, fix."""

  exit_code = 2


class Failure(Exception):  # noqa: N818 (the user reads it as such)
  """Something broke that the user did not ask for (damage, full disk): exit code 1."""

  exit_code = 1


def disk_problem(error: BaseException | None) -> str | None:
  """What the system says if a disk is at fault, here or down the error's causes.

  Libraries wrap it in errors of their own, with paths and traces; this is the one
  phrase a user can act on, such as 'No space left on device'.
  """
  while error is not None:
    found = _DISK.search(str(error))
    if found:
      return found[0]
    error = error.__cause__ or error.__context__
  return None
