"""MODEL_DIR is made, checked for writing, and described."""

import jax
import numpy as np
import pytest

from palm_t5x import partitioning, run_dir
from palm_t5x.errors import UserError


def test_a_relative_path_becomes_absolute_and_exists(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert run_dir.prepare('runs/new') == str(tmp_path / 'runs' / 'new')
  assert (tmp_path / 'runs' / 'new').is_dir()


@pytest.mark.parametrize('path', ['', 'gs://bucket/run'])
def test_what_cannot_be_a_run_directory(path):
  with pytest.raises(UserError, match='MODEL_DIR'):
    run_dir.prepare(path)


def test_model_info_names_shapes_and_mesh_axes(tmp_path):
  partitioner = partitioning.PjitPartitioner(num_partitions=2)
  params = {'kernel': jax.ShapeDtypeStruct((6, 4), np.float32)}
  axes = {'kernel': ('embed', 'mlp')}
  run_dir.write_model_info(str(tmp_path), params, axes, partitioner)
  first, last = (tmp_path / 'model-info.txt').read_text().splitlines()
  assert first.split()[:2] == ['kernel', '24'] and 'embed=6, mlp=4' in first
  assert "'model'" in first and last == 'Total number of parameters: 24'
