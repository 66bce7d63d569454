"""Versions: Python's and those of the packages that ibft-fast is built on, against the ranges that it asks for."""

import platform
from importlib import metadata

from ibft.doctor.finding import Finding, first_line

DISTRIBUTION = "ibft-fast"


def python() -> Finding:
    from packaging.specifiers import SpecifierSet

    asked, version = metadata.metadata(DISTRIBUTION)["Requires-Python"], platform.python_version()
    if SpecifierSet(asked).contains(version, prereleases=True):
        return Finding("ok", f"{version} ({platform.system()} {platform.machine()})")
    return Finding("missing", f"{version}, needs {asked}", "make a virtual environment with another Python")


def required() -> Finding:
    """Of the packages without which nothing runs. Those of extras say so themselves when they are missed."""
    from packaging.requirements import Requirement

    here, faults, wanted = [], [], []
    for text in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        asked = f"{requirement.name}{requirement.specifier}"
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            faults.append(f"{requirement.name} is not installed")
        else:
            if requirement.specifier.contains(version, prereleases=True):
                here.append(f"{requirement.name} {version}")
                continue
            faults.append(f"{requirement.name} {version}, needs {requirement.specifier}")
        wanted.append(f"'{asked}'")
    if faults:
        return Finding("missing", "; ".join(faults), f"pip install {' '.join(wanted)}")
    return Finding("ok", ", ".join(here))


def torch() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that it needs
        return Finding("missing", f"cannot be imported: {first_line(error)}", "install it: https://pytorch.org")
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    return Finding("ok", f"{torch.__version__}, {built}")
