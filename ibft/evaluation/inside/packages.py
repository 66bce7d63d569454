"""What a program or test may import beside the standard library: single packages, and nothing that lies beside them."""

import os
import sys
from importlib.machinery import PathFinder


class Finder:
    """folders: of each package, the one that holds it. Not on sys.path, where all in it could be imported."""

    def __init__(self, folders):
        self.folders = folders

    def find_spec(self, name, path=None, target=None):
        return PathFinder.find_spec(name, [self.folders[name]]) if name in self.folders else None


def allow(folders):
    # numpy's linear algebra takes address space for each of its threads, one a core, of which there is little here
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    sys.meta_path.append(Finder(folders))
