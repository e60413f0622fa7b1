"""Weights: the catalogue of what is released, the cache, and reading and writing of files."""

from .catalogue import Entry, entries, find_entry, list_weights
from .converted import load_pretrained
from .download import DownloadError, add_file, fetch
from .load import CheckpointError, check_fit, load_state_dict, read_checkpoint, save_safetensors, unwrap
from .ultralytics import read_ultralytics

__all__ = ['CheckpointError', 'DownloadError', 'Entry', 'add_file', 'check_fit', 'entries', 'fetch', 'find_entry',
           'list_weights', 'load_pretrained', 'load_state_dict', 'read_checkpoint', 'read_ultralytics',
           'save_safetensors', 'unwrap']
