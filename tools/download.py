"""Fetch, check and list official weights: python tools/download.py NAME... | --family F | --all | --list."""
import sys

try:
    from visionssm.cli import download
except ImportError as error:
    sys.exit(f'{error}\nDownloads need the package: pip install -e .')

if __name__ == '__main__':
    sys.exit(download())
