"""T5X's parameters and classes that have no meaning here.

They are accepted in Gin, so that T5X files run unchanged, and reported once. A name
that our own function does have is never dropped: this table is asked only when binding
it failed. A parameter that would change results is not in it and stays an error.
"""

_ENGINE = frozenset(
  {
    'use_orbax',
    'concurrent_metrics',
    'get_dataset_fn',
    'train_eval_get_dataset_fn',
    'train_state_initializer_cls',
    'verify_matching_vocabs_fn',
    'fallback_init_rng',
    'checkpoint_ds_iter',
    'keep_aux_as_numpy',
    'output_vocab_feature_name',
    'gc_period',
    'summarize_config_fn',
    'training_evaluator_cls',
  }
)
_CHECKPOINTS = frozenset(
  {
    'checkpointer_cls',
    'checkpoint_manager_cls',
    'keep_dataset_checkpoints',
    'use_gda',
    'is_tensorflow',
  }
)

# By unqualified name of the configurable.
PARAMETERS = {
  'train': _ENGINE,
  'evaluate': _ENGINE,
  'infer': _ENGINE,
  'precompile': _ENGINE,
  'save': _ENGINE,
  'DatasetConfig': frozenset(
    {
      'use_custom_packing_ops',
      'num_prefetch_threads',
      'num_workers',
      'use_memory_cache',
    }
  ),
  'SaveCheckpointConfig': _CHECKPOINTS,
  'RestoreCheckpointConfig': _CHECKPOINTS,
  'PjitPartitioner': frozenset({'params_on_devices', 'backend'}),
  'TransformerConfig': frozenset({'float32_attention_logits', 'param_scan_axis'}),
  'get_gin_config_str': frozenset({'show_provenance'}),
}

# Classes and functions of T5X whose every binding is dropped.
CONFIGURABLES = frozenset(
  {
    'Checkpointer',
    'SaveBestCheckpointer',
    'OrbaxCheckpointManagerInterface',
    'CheckpointManager',
    'LegacyCheckpointManager',
    'TrainStateInitializer',
    'get_training_eval_datasets',
    'verify_matching_vocabs',
    'override_params_axes_names',
  }
)


def is_dropped(selector: str, arg_name: str) -> bool:
  """Whether a binding that found no home here is one of T5X's to be let go."""
  name = selector.rpartition('.')[2]
  return name in CONFIGURABLES or arg_name in PARAMETERS.get(name, ())
