"""Compare drawn pictures with real ones: python tools/fid.py DRAWN REAL --extractor vim_pico --checkpoint FILE."""
import sys

try:
    from visionssm_launcher import run_tool
except ImportError as error:
    sys.exit(f'{error}\nInstall the checkout first: pip install -e .')

if __name__ == '__main__':
    sys.exit(run_tool('fid'))
