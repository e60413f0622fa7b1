"""Reading and writing of weights."""

from .load import CheckpointError, check_fit, load_state_dict, read_checkpoint, save_safetensors, unwrap
from .ultralytics import read_ultralytics

__all__ = ['CheckpointError', 'check_fit', 'load_state_dict', 'read_checkpoint', 'read_ultralytics', 'save_safetensors',
           'unwrap']
