"""Draw pictures with a diffusion model: python tools/sample.py CONFIG CHECKPOINT --num 8 --out grid.png."""
import sys

try:
    from visionssm_launcher import run_tool
except ImportError as error:
    sys.exit(f'{error}\nInstall the checkout first: pip install -e .')

if __name__ == '__main__':
    sys.exit(run_tool('sample'))
