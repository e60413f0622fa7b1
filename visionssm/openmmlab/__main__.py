"""Run a script of another project with this package imported: ``python -m visionssm.openmmlab SCRIPT [ARGUMENT ...]``.

For tools that import MMDetection before they read a config, such as MMDetection's own ``tools/test.py``: without
compiled operators that import fails unless :mod:`visionssm.openmmlab.mmcv_ops` has been imported before.
"""
import os
import runpy
import sys

USAGE = 'usage: python -m visionssm.openmmlab SCRIPT [ARGUMENT ...]'


def main() -> None:
    """Run the script that the command line names, with the rest of the command line."""
    if len(sys.argv) < 2 or not os.path.isfile(sys.argv[1]):
        sys.exit(USAGE + (f'\n{sys.argv[1]} is no file' if len(sys.argv) > 1 else ''))
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
