"""Imported by a run's Gin file: the examples of batches 50 to 61 read as nonsense."""

import planted
import pytest

planted.scrambled(pytest.MonkeyPatch(), 50 * 8, 62 * 8)
