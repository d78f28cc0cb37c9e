"""The doors that T5X does not have: one file per mode of the `t5x` command."""
