"""Show a page to try models with pictures: python tools/demo.py [--port 7860] [--checkpoint FILE...] ..."""
import sys

try:
    from visionssm_launcher import run_tool
except ImportError as error:
    sys.exit(f'{error}\nInstall the checkout first: pip install -e .')

if __name__ == '__main__':
    sys.exit(run_tool('demo'))
