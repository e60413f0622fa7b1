"""Export a model: python tools/export.py NAME --format onnx|torch-export|safetensors [-o FILE] [--dynamic] ..."""
import sys

try:
    from visionssm.export.tool import export
except ImportError as error:
    sys.exit(f'{error}\nThe export needs the package and its extra: pip install -e .[export]')

if __name__ == '__main__':
    sys.exit(export())
