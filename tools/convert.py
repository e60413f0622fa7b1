"""Convert weights: python tools/convert.py FILE [--family F] -o OUT.safetensors | --to-official -o OUT.pth."""
import sys

try:
    from visionssm_launcher import run_tool
except ImportError as error:
    sys.exit(f'{error}\nInstall the checkout first: pip install -e .')

if __name__ == '__main__':
    sys.exit(run_tool('convert'))
