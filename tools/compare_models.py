"""Train the smallest model of every family alike and write docs/comparison.md: python tools/compare_models.py."""
import sys
from pathlib import Path

try:
    from visionssm_launcher import importing

    with importing():
        from visionssm.openmmlab.compare import compare
except ImportError as error:
    sys.exit(f'{error}\nTraining needs the package and its extra: pip install -e .[mm]')

if __name__ == '__main__':
    sys.exit(compare(Path(__file__).with_name('train.py')))
