"""Export of models: ONNX, archives of torch.export, safetensors."""

from .archive import export_archive, export_onnx, export_weights
from .compare import Comparison, compare_onnx
from .inputs import example_inputs

__all__ = ['Comparison', 'compare_onnx', 'example_inputs', 'export_archive', 'export_onnx', 'export_weights']
