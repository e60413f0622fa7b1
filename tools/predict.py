"""Say what images and videos show, or restore them: tools/predict.py FILE_OR_FOLDER --model NAME --checkpoint FILE."""
import sys

try:
    from visionssm.openmmlab.predict import predict
except ImportError as error:
    sys.exit(f'{error}\nPrediction needs the package and its extra: pip install -e .[mm]')

if __name__ == '__main__':
    sys.exit(predict())
