"""Train a model: python tools/train.py CONFIG [--work-dir DIR] [--resume] [--amp] [--cfg-options KEY=VALUE ...]."""
import sys

try:
    from visionssm.openmmlab.cli import train
except ImportError as error:
    sys.exit(f'{error}\nTraining needs the package and its extra: pip install -e .[mm]')

if __name__ == '__main__':
    sys.exit(train())
