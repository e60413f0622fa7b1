"""Draw what a model sees: python tools/visualize.py NAME erf|routes|attention [IMAGE...] [-o FILE.png] ..."""
import sys

try:
    from visionssm_launcher import run_tool
except ImportError as error:
    sys.exit(f'{error}\nInstall the checkout first: pip install -e .')

if __name__ == '__main__':
    sys.exit(run_tool('visualize'))
