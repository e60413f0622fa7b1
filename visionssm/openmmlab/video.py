"""Video files, frame by frame: reading with a clear refusal of what is none, and writing that leaves no half files."""
import logging
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

__all__ = ['VIDEO_SUFFIXES', 'VideoFrames', 'VideoSink', 'is_video']

logger = logging.getLogger('visionssm')

VIDEO_SUFFIXES = {'.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm', '.wmv'}


def is_video(path: str | Path) -> bool:
    """Whether a file's name is that of a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


class VideoFrames:
    """The frames of a video file; it can be iterated again.

    Args:
        path: The file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f'there is no video {path}')
        if self.path.stat().st_size == 0:
            raise ValueError(f'the video {path} is empty: 0 bytes')
        capture = cv2.VideoCapture(str(path))
        try:
            read, frame = capture.read() if capture.isOpened() else (False, None)
            if not read:
                reason = 'no frame in it' if capture.isOpened() else 'no format that it knows'
                raise ValueError(f'{path} cannot be read as a video: OpenCV finds {reason}; convert it, for example to '
                                 'MP4 with H.264')
            self.size = frame.shape[1], frame.shape[0]
            """Width and height."""
            rate = capture.get(cv2.CAP_PROP_FPS)
            self.rate = rate if 0 < rate < 1000 else 25.0
            """Frames a second; 25 where the file does not say it."""
            length = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
            self.length = length if length > 0 else None
            """Number of frames as the file says it, or None."""
        finally:
            capture.release()

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields uint8 arrays (H, W, 3), BGR."""
        capture = cv2.VideoCapture(str(self.path))
        number = 0
        try:
            while True:
                read, frame = capture.read()
                if not read:
                    break
                number += 1
                yield frame
        finally:
            capture.release()
        if self.length is not None and number < self.length:
            logger.warning('%s: only %d of %d frames could be read; is the file cut off?', self.path, number,
                           self.length)


class VideoSink:
    """Writes a video beside its target, and renames it when it is whole.

    Args:
        path: The file; an AVI takes the place of an MP4 where OpenCV cannot write that.
        rate: Frames a second.
        size: Width and height.
    """

    def __init__(self, path: Path, rate: float, size: tuple[int, int]) -> None:
        self.size, self.frames = size, 0
        for suffix, codec in (('.mp4', 'mp4v'), ('.avi', 'MJPG')):
            self.path = path.with_suffix(suffix)
            self.part = path.with_name(f'.{path.stem}.tmp{suffix}')
            self.writer = cv2.VideoWriter(str(self.part), cv2.VideoWriter.fourcc(*codec), rate, size)
            if self.writer.isOpened():
                return
            self.part.unlink(missing_ok=True)
        raise OSError(f'OpenCV can write neither MP4 nor AVI to {path.parent}; is the folder writable, and has the '
                      'disk space?')

    def write(self, frame: np.ndarray) -> None:
        """Adds a frame.

        Args:
            frame: uint8 array (H, W, 3), BGR.
        """
        # OpenCV drops frames of another size, and says so only on the standard error
        if frame.shape != (self.size[1], self.size[0], 3):
            raise ValueError(f'a frame is {frame.shape[1]} x {frame.shape[0]} pixels and the video {self.path} '
                             f'{self.size[0]} x {self.size[1]}')
        self.frames += 1
        self.writer.write(np.ascontiguousarray(frame))

    def __enter__(self) -> 'VideoSink':
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.writer.release()
        try:
            if kind is None:
                self._check()
                self.part.replace(self.path)
        finally:
            self.part.unlink(missing_ok=True)

    def _check(self) -> None:
        """OpenCV reports neither a full disk nor a codec that fails, so the file is read again."""
        try:
            found = VideoFrames(self.part).length
        except ValueError:
            found = 0
        if self.frames and found is not None and found < self.frames:
            raise OSError(f'{self.path} could not be written: {found} of {self.frames} frames arrived; has the disk '
                          'space?')
