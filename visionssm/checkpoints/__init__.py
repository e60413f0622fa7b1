"""Reading and writing of weights."""

from .load import CheckpointError, check_fit, load_state_dict, read_checkpoint, save_safetensors, unwrap

__all__ = ['CheckpointError', 'check_fit', 'load_state_dict', 'read_checkpoint', 'save_safetensors', 'unwrap']
