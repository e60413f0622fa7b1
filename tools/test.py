"""Evaluate a model: python tools/test.py CONFIG CHECKPOINT, or tools/test.py --model NAME --data FOLDER."""
import os
import sys

# OpenMP's threads spin while they wait, which on a busy machine costs a factor of ten; torch reads this when it loads
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

try:
    from visionssm.openmmlab.evaluate import evaluate
except ImportError as error:
    sys.exit(f'{error}\nEvaluation needs the package and its extra: pip install -e .[mm]')

if __name__ == '__main__':
    sys.exit(evaluate())
