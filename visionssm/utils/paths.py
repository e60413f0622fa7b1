"""Finding the files that belong to the package: configs and embedded data, in a wheel or in a checkout."""
import difflib
from pathlib import Path

__all__ = ['config_root', 'data_file', 'find_config']

PACKAGE = Path(__file__).resolve().parent.parent


def config_root() -> Path:
    """The folder of the configs: inside the installed package, else at the root of the checkout."""
    candidates = [PACKAGE / 'configs', PACKAGE.parent / 'configs']
    for folder in candidates:
        if (folder / '_base_').is_dir():
            return folder
    raise FileNotFoundError(f'no configs beside the package: looked at {", ".join(map(str, candidates))}. '
                            'Install visionssm again, or give the path of a config file')


def find_config(name: str | Path) -> Path:
    """Finds a config by path or by its name among those that come with the package.

    Args:
        name: An existing file, or a name such as `'classification/vim-pico_fashion-mnist.py'`; the folder and the
            suffix may be left out.

    Returns:
        The path of the file.
    """
    path = Path(name)
    if path.is_file():
        return path
    root = config_root()
    wanted = path.with_suffix('.py') if path.suffix == '.py' else path.with_name(path.name + '.py')
    parts = wanted.parts[1:] if wanted.parts[:1] == ('configs',) else wanted.parts
    known = [file for file in sorted(root.rglob('*.py')) if '_base_' not in file.parts]
    matches = [file for file in known if file.parts[-len(parts):] == parts]
    if len(matches) == 1:
        return matches[0]
    names = [file.relative_to(root).as_posix() for file in matches or known]
    near = names if matches else difflib.get_close_matches(wanted.as_posix(), names, n=3, cutoff=0.4) or names
    raise FileNotFoundError(f'config {str(name)!r} {"is ambiguous" if matches else "not found"} in {root}; '
                            f'{"give one of" if matches else "nearest"}: {", ".join(near)}')


def data_file(name: str) -> Path:
    """The path of a data file that ships inside the package.

    Args:
        name: File name in `visionssm/data`.

    Returns:
        The path; it exists.
    """
    path = PACKAGE / 'data' / name
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing: the installation of visionssm is incomplete, install it again')
    return path
