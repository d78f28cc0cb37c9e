"""The two ways a run ends badly: the user's mistake, and a failure of the world.

`main` prints either as one line and never a stack trace; everything else that escapes
is a bug of ours and keeps its trace.
"""


class UserError(Exception):
  """A mistake in what was asked for: exit code 2. The text names value, limit, fix."""

  exit_code = 2


class Failure(Exception):  # noqa: N818 (the user reads it as such)
  """Something broke that the user did not ask for (damage, full disk): exit code 1."""

  exit_code = 1
