"""Name what is on images: python tools/predict.py IMAGE_OR_FOLDER --model NAME --checkpoint FILE."""
import os
import sys

# OpenMP's threads spin while they wait, which on a busy machine costs a factor of ten; torch reads this when it loads
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

try:
    from visionssm.openmmlab.predict import predict
except ImportError as error:
    sys.exit(f'{error}\nPrediction needs the package and its extra: pip install -e .[mm]')

if __name__ == '__main__':
    sys.exit(predict())
