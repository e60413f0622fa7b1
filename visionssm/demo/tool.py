"""`visionssm demo`: the page in the browser."""
import argparse
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..openmmlab.cli import USER_ERRORS
from ..utils.command import Command

__all__ = ['demo']

PREFIX = 'visionssm-demo-'
LOCAL = ('127.0.0.1', 'localhost', '::1')


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--port', type=int, default=7860, help='port of the page (default: 7860)')
    parser.add_argument('--host', default='127.0.0.1', help='address to listen at (default: 127.0.0.1, this machine '
                                                            'alone; the page has no log-in)')
    parser.add_argument('--checkpoint', nargs='+', default=[], metavar='FILE',
                        help='weights to offer besides those in checkpoints/ and the published ones')
    parser.add_argument('--max-size', type=float, default=20, metavar='MB',
                        help='largest file that can be uploaded (default: 20)')
    parser.add_argument('--max-megapixels', type=float, default=50,
                        help='largest picture, by what its header says (default: 50; 0: no limit)')
    parser.add_argument('--device', help='where to compute (default: an accelerator if there is one)')
    parser.add_argument('--no-browser', action='store_true', help='do not open a browser')


def _check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not 1 <= args.port <= 65535:
        parser.error(f'--port {args.port} must be 1 to 65535')
    if args.max_size <= 0 or args.max_megapixels < 0:
        parser.error(f'--max-size {args.max_size:g} must be above 0, and --max-megapixels {args.max_megapixels:g} not '
                     'below')


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened at.

    Args:
        host: The address.
        port: The port.

    Raises:
        OSError: It is in use, or is none of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            # as servers do: connections that ended a moment ago do not count
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        raise OSError(f'the page cannot be shown at {host}, port {port}: {error.strerror or error}. Give another '
                      '--port or --host') from error


def _sweep() -> None:
    """Remove the folders of pages that were killed."""
    if os.name != 'posix':  # elsewhere nothing tells harmlessly whether a process lives
        return
    for folder in Path(tempfile.gettempdir()).glob(f'{PREFIX}*-*'):
        process = folder.name.removeprefix(PREFIX).partition('-')[0]
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (OSError, ValueError):  # another user's, or none of ours
            continue


@contextlib.contextmanager
def _workspace() -> Iterator[Path]:
    """Hold uploads and results in a folder that is removed at the end."""
    # Gradio asks its makers for news and counts visits unless told not to
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    before = os.environ.get('GRADIO_TEMP_DIR')
    _sweep()
    with tempfile.TemporaryDirectory(prefix=f'{PREFIX}{os.getpid()}-') as folder:
        os.environ['GRADIO_TEMP_DIR'] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ['GRADIO_TEMP_DIR']
            else:
                os.environ['GRADIO_TEMP_DIR'] = before


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _orderly_end() -> Iterator[None]:
    """Let an ordinary end of the process remove the uploads too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _demo(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format='%(levelname)s: %(message)s')
    logging.getLogger('httpx').setLevel(logging.WARNING)
    check_port(args.host, args.port)
    app = None
    with _orderly_end(), _workspace() as folder:
        try:
            from .app import build_app, serve
            from .choices import all_choices
            from .engine import Engine
            app = build_app(Engine(folder, args.device, args.max_megapixels), all_choices(args.checkpoint))
            url = serve(app, args.host, args.port, args.max_size, not args.no_browser)
            sys.stdout.write(f'{url}  (Ctrl-C ends it)\n')
            if args.host not in LOCAL:
                sys.stdout.write('All who reach this machine can use the page: it has no log-in.\n')
            sys.stdout.flush()
            threading.Event().wait()
        except KeyboardInterrupt:
            sys.stdout.write('\nended\n')
        finally:
            if app is not None:
                app.close(verbose=False)
    return 0


demo = Command('Show a page in the browser to try models with pictures: classes, boxes, masks, restoration, receptive '
               'fields, scan routes and implicit attention.', _add_options, _demo, _check_options,
               errors=(*USER_ERRORS, ImportError, RuntimeError))
