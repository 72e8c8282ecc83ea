"""Files on disk: the cache folder, where public data files are looked for, npz files without pickle, lazy imports."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import uuid
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adamix.errors import InputError

Array = NDArray[Any]


def one_line(error: BaseException) -> str:
    """The text of a foreign exception on one line, for the end of an InputError message."""
    return " ".join(str(error).split()) or type(error).__name__


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """`cache_dir`, else $ADAMIX_CACHE, else ~/.cache/adamix. Not created."""
    return Path(cache_dir or os.environ.get("ADAMIX_CACHE") or Path.home() / ".cache" / "adamix")


def find_data_file(name: str, *, what: str, package: str, system_dir: str, cache_dir: str | Path | None = None) -> Path:
    """Path of a public data file: in $ADAMIX_DATA, the cache folder, or where Debian's `package` puts it.

    Raises InputError with the remedy if it is in none of them.
    """
    cache = cache_root(cache_dir)
    folders = [Path(folder) for folder in (os.environ.get("ADAMIX_DATA"), cache, system_dir) if folder]
    for folder in folders:
        if (path := folder / name).is_file():
            return path
    raise InputError(
        f"{what}: {name} is not in {', '.join(map(str, folders))}; "
        f"install Debian's {package}, or put {name} into {cache}"
    )


def require(module: str, packages: str, needed_by: str) -> ModuleType:
    """Import `module` when it is needed; InputError with the pip command if that fails."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package built for another torch fails with RuntimeError or OSError, not ImportError
        raise InputError(
            f"{needed_by} needs the Python module {module}, which cannot be imported ({one_line(error)}); "
            f"run: pip install {packages}"
        ) from error


def write_npz(path: str | Path, arrays: Mapping[str, Array], *, compress: bool = False) -> None:
    """Write `arrays` to `path` atomically, without pickle and with fixed timestamps.

    Equal arrays give equal bytes (with `compress`: for one zlib version). Creates the folder, owner-only, as features
    of private images may go there. Raises InputError if the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # same folder: os.replace is atomic only there
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with zipfile.ZipFile(temporary, "x") as archive:
            for key, array in arrays.items():
                info = zipfile.ZipInfo(f"{key}.npy")  # the default date is 1980-01-01
                info.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
                with archive.open(info, "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, np.asanyarray(array), allow_pickle=False)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({one_line(error)}); give a writable folder") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_npz(source: str | Path | bytes, name: str, keys: Collection[str]) -> dict[str, Array]:
    """Those of `keys` that an npz file, given as a path or as its bytes, has; never unpickles.

    Raises InputError, starting with `name`, if the file is missing, not an npz file, corrupt, or holds objects.
    """
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise InputError(f"{name}: no such file; check the path")
    arrays: dict[str, Array] = {}
    key = ""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as stream:
            if not zipfile.is_zipfile(stream):  # np.load would also take a bare .npy
                raise zipfile.BadZipFile("not a zip archive")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as archive:
                for key in [key for key in archive.files if key in keys]:
                    arrays[key] = np.asarray(archive[key])
    except Exception as error:  # zip, its compressions, encryption and NumPy's headers each raise their own
        part = f"key {key!r}" if key else "it"
        remedy = "write plain arrays with numpy.savez"
        raise InputError(f"{name}: {part} cannot be read as npz ({one_line(error)}); {remedy}") from error
    return arrays
