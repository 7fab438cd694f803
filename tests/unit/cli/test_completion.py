"""Shell completion, as a shell completes by it."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from pnode_dist.cli.completion import SHELLS, script
from pnode_dist.cli.main import main

SHTAB = tuple(map(int, version("shtab").split(".")[:2]))


def completed(words: list[str], directory: Path) -> list[str]:
    """What bash offers for the last of the words."""
    (directory / "completion.bash").write_text(script("bash"))
    program = (
        "source completion.bash; "
        f"COMP_WORDS=({' '.join(word or chr(39) * 2 for word in words)}); COMP_CWORD={len(words) - 1}; "
        "function compopt() { :; }; "
        "$(complete -p pnode-dist | sed 's/.*-F \\([^ ]*\\) .*/\\1/'); printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "-c", program], cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_names_every_command(shell: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    out, err = capfd.readouterr()

    assert err == ""
    for command in ("train", "gradcheck", "status", "config", "completion"):
        assert command in out


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_names_the_installed_problems(shell: str) -> None:
    if shell == "tcsh" and SHTAB < (1, 10):
        pytest.skip("shtab before 1.10 completes no arguments of nested commands in tcsh")
    assert "burgers" in script(shell)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pnode-dist", "tr"], {"train"}),
        (["pnode-dist", "config", ""], {"init", "reference", "schema"}),
        (["pnode-dist", "config", "init", "gra"], {"graph_diffusion"}),
        (["pnode-dist", "train", "--res"], {"--resume"}),
        (["pnode-dist", "train", "my"], {"my.toml"}),
        (["pnode-dist", "completion", "z"], {"zsh"}),
    ],
)
def test_bash_completes_commands_options_problems_and_files(
    words: list[str], expected: set[str], tmp_path: Path
) -> None:
    (tmp_path / "my.toml").touch()

    assert expected <= set(completed(words, tmp_path))
