"""Evaluate a model: python tools/test.py CONFIG CHECKPOINT, or tools/test.py --model NAME --data FOLDER."""
import sys

try:
    from visionssm.openmmlab.evaluate import evaluate
except ImportError as error:
    sys.exit(f'{error}\nEvaluation needs the package and its extra: pip install -e .[mm]')

if __name__ == '__main__':
    sys.exit(evaluate())
