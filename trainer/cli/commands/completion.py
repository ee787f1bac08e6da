"""`sdxl-train completion SHELL`: what bash, zsh or fish needs to complete commands, options, files and keys."""

import argparse
import sys
from collections.abc import Iterator, Sequence

from trainer.config.fields import all_keys

_EXAMPLE = """\
examples:
  sdxl-train completion bash >> ~/.bashrc
  sdxl-train completion zsh >> ~/.zshrc
  sdxl-train completion fish > ~/.config/fish/completions/sdxl-train.fish

then, in a new shell:
  sdxl-train configs/4x3090.yaml opt<Tab>lr=1e-6
"""
_BASH = """\
# Completion for sdxl-train.
_sdxl_train() {{
    local word=${{COMP_WORDS[COMP_CWORD]}}
    COMPREPLY=()
    if [[ $word == -* ]]; then
        local command=${{COMP_WORDS[1]}}
        [[ " {commands} " == *" $command "* ]] || command=train
        local options=$("${{COMP_WORDS[0]}}" "$command" --help 2>/dev/null | grep -oE -- '--[a-z][a-z0-9-]*' | sort -u)
        COMPREPLY=($(compgen -W "$options" -- "$word"))
    elif [[ $COMP_CWORD -eq 1 ]]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word") $(compgen -f -X '!*.y*ml' -- "$word"))
        COMPREPLY+=($(compgen -d -S / -- "$word"))
        [[ ${{#COMPREPLY[@]}} -ne 1 || ${{COMPREPLY[0]}} == */ ]] || compopt +o nospace
    elif [[ -n $word && $word != */* ]]; then
        COMPREPLY=($(compgen -S = -W "{keys}" -- "$word"))
    fi
}}
complete -o default -o nospace -F _sdxl_train sdxl-train
"""
_ZSH = """\
autoload -Uz compinit bashcompinit && compinit && bashcompinit
"""


def main(argv: Sequence[str]) -> int:
    """Prints the script of a shell; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train completion",
        description="Print what a shell needs to complete commands, options, files and configuration keys.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    arguments = parser.parse_intermixed_args(argv)
    from trainer.cli.main import COMMANDS

    keys = configuration_keys()
    if arguments.shell == "fish":
        sys.stdout.writelines(_fish(COMMANDS, keys))
        return 0
    script = _BASH.format(commands=" ".join(COMMANDS), keys=" ".join(keys))
    sys.stdout.write((_ZSH if arguments.shell == "zsh" else "") + script)
    return 0


def configuration_keys() -> list[str]:
    """All keys that a command's `section.key=value` may name, dotted; entries of lists have none."""
    return [".".join(map(str, key)) for key in all_keys() if 0 not in key]


def _fish(commands: dict[str, str], keys: Sequence[str]) -> Iterator[str]:
    yield "# Completion for sdxl-train.\n"
    for name, text in commands.items():
        told = text.replace("\\", "\\\\").replace("'", "\\'")
        yield f"complete -c sdxl-train -n __fish_use_subcommand -a {name} -d '{told}'\n"
    words = " ".join(f"{key}=" for key in keys)
    yield f"complete -c sdxl-train -n 'not __fish_use_subcommand' -a '{words}'\n"
