"""Export a model: python tools/export.py NAME --format onnx|torch-export|safetensors [-o FILE] [--dynamic] ..."""
import sys

try:
    from visionssm_launcher import run_tool
except ImportError as error:
    sys.exit(f'{error}\nInstall the checkout first: pip install -e .')

if __name__ == '__main__':
    sys.exit(run_tool('export'))
