"""Train a model: python tools/train.py CONFIG [--work-dir DIR] [--resume] [--amp] [--cfg-options KEY=VALUE ...]."""
import sys

try:
    from visionssm_launcher import run_tool
except ImportError as error:
    sys.exit(f'{error}\nInstall the checkout first: pip install -e .')

if __name__ == '__main__':
    sys.exit(run_tool('train'))
