"""Evaluate a model: python tools/test.py CONFIG CHECKPOINT, or tools/test.py --model NAME --data FOLDER."""
import sys

try:
    from visionssm_launcher import run_tool
except ImportError as error:
    sys.exit(f'{error}\nInstall the checkout first: pip install -e .')

if __name__ == '__main__':
    sys.exit(run_tool('test'))
