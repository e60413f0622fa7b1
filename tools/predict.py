"""Say what images and videos show, or restore them: tools/predict.py FILE_OR_FOLDER --model NAME --checkpoint FILE."""
import sys

try:
    from visionssm_launcher import run_tool
except ImportError as error:
    sys.exit(f'{error}\nInstall the checkout first: pip install -e .')

if __name__ == '__main__':
    sys.exit(run_tool('predict'))
