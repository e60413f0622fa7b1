"""Train several configs one after the other in the same processes, which saves their start-up."""
import sys

from visionssm.openmmlab.cli import train

if __name__ == '__main__':
    split = next((i for i, arg in enumerate(sys.argv) if arg.startswith('--')), len(sys.argv))
    sys.exit(max(train([path, *sys.argv[split:], '--debug']) for path in sys.argv[1:split]))
