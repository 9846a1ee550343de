"""What a result depends on beside its settings: hardware, versions and the commit."""

import functools
import os
import pathlib
import platform
import subprocess

import torch

import popgen

GIT_SECONDS = 10.0  # that git is given to name a commit


def hardware(device: torch.device) -> str:
    """Returns what a device is, in words.

    Example:
        >>> "cores" in hardware(torch.device("cpu"))
        True
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} cores, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def commit(package: pathlib.Path = pathlib.Path(popgen.__file__).parent) -> str | None:
    """Returns the commit that code runs from, with "-dirty" behind it where tracked files differ from it.

    It is found at the first call and stays, as the code does that has been imported.

    Args:
        package: the folder of the code.

    Returns:
        None where git does not know the code, as where pip has installed it.

    Example:
        >>> commit(pathlib.Path("/nowhere")) is None
        True
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # whoever works there is not to be disturbed
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # installed code may lie in somebody else's checkout
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def surroundings(device: torch.device) -> dict[str, str | None]:
    """Returns what a result on a device depends on beside its settings: hardware, versions and the commit.

    Example:
        >>> list(surroundings(torch.device("cpu")))
        ['device', 'hardware', 'popgen_version', 'commit', 'torch_version', 'python_version']
    """
    return {
        "device": str(device),
        "hardware": hardware(device),
        "popgen_version": popgen.__version__,
        "commit": commit(),
        "torch_version": torch.__version__,
        "python_version": platform.python_version(),
    }
