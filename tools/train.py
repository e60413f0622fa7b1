"""Train a model: python tools/train.py CONFIG [--work-dir DIR] [--resume] [--amp] [--cfg-options KEY=VALUE ...]."""
import os
import sys

# OpenMP's threads spin while they wait, which on a busy machine costs a factor of ten; torch reads this when it loads
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

try:
    from visionssm.openmmlab.cli import train
except ImportError as error:
    sys.exit(f'{error}\nTraining needs the package and its extra: pip install -e .[mm]')

if __name__ == '__main__':
    sys.exit(train())
