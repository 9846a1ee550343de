"""What a record says of where its code ran."""

import pathlib
import subprocess

import pytest

from popgen.provenance import commit


def git(folder: pathlib.Path, *arguments: str) -> str:
    own = ("-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *own, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_code(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own checkout alone: not of one that it is installed in, nor of what was edited after the first call."""
    package, installed = tmp_path / "package", tmp_path / "environment" / "package"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    git(tmp_path, "init")
    assert commit.__wrapped__(package) is None, "nothing is committed"
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "--message=First")
    git(tmp_path, "tag", "v1")
    name = git(tmp_path, "rev-parse", "HEAD")
    (package / "untracked.py").write_text("")
    assert commit(package) == name and len(name) == 40 and commit(installed) is None
    (package / "__init__.py").write_text("x = 1")
    assert commit.__wrapped__(package) == f"{name}-dirty" and commit(package) == name
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit.__wrapped__(package) is None, "there is no git"
