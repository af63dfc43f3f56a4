"""Write docs/flags.md, the flags of every command, from their parsers; tests/docs/test_docs.py fails where it is old.

python docs/flags.py
"""

import argparse
import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "Train and test": ("finetune", "grpo", "pretrain", "test", "recommend", "serve", "report", "demo"),
    "Data": ("data.prepare", "data.check", "data.clean", "data.split_cold", "data.intentions"),
    "Semantic IDs": ("index.embed", "index.train", "index.generate", "index.repair", "index.report"),
    "Weights": (
        "convert.smollm2", "convert.scratch", "convert.merge_lora", "convert.make_delta", "convert.merge_delta",
        "convert.publish", "convert.zero_to_fp32",
    ),
}  # fmt: skip
HEAD = """# Flags

This page lists every flag of every command, as `--help` prints them; `python docs/flags.py` generates it. Commands at
the top of the repository are called as `python finetune.py`, those of a folder as `python -m data.prepare`.
`test_ddp.py` takes the flags of `test.py`. `run.sh` has its own: `bash run.sh --help`.
"""
TRAINER = """
`{command}.py` also takes every flag of `transformers.TrainingArguments`, such as `--bf16` or `--report_to`;
`python {command}.py --help` prints them. `--config preset.yaml` supplies defaults; the command line wins.
"""


class ParserBuilt(Exception):
    """Carries the parser of a command out of its main."""


def build_parser(command: str) -> argparse.ArgumentParser:
    """Return the parser that the command's main builds, without running the command."""

    def stop(parser: argparse.ArgumentParser, *args, **kwargs):
        raise ParserBuilt(parser)

    module = importlib.import_module(command)
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        mock.patch.object(sys, "argv", [command]),
    ):
        try:
            module.main()
        except ParserBuilt as built:
            return built.args[0]
    raise RuntimeError(f"{command} parses no flags")


def flag_rows(parser: argparse.ArgumentParser, skipped: set[str]) -> Iterator[str]:
    """Yield a table for each group of flags: flag, default, help."""
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if is_shown(action, skipped)]
        if not actions:
            continue
        yield f"\n**{group.title}**\n\n| flag | default | |\n|---|---|---|"
        for action in actions:
            help_text = formatter._expand_help(action) if action.help else ""
            help_text = re.sub(r" *\(default: .*?\)", "", help_text)  # stands in its own column
            if action.choices:
                help_text += f" ({', '.join(map(str, action.choices))})"
            yield f"| {spellings(action)} | {default_of(action)} | {to_cell(help_text)} |"


def spellings(action: argparse.Action) -> str:
    """Return the names of a flag; of --base_model and --base-model the first."""
    names = list({name.lstrip("-").replace("-", "_"): name for name in reversed(action.option_strings)}.values())
    return ", ".join(f"`{name}`" for name in reversed(names)) or f"`{action.dest}`"


def is_shown(action: argparse.Action, skipped: set[str]) -> bool:
    """Return whether a flag is listed: neither --help nor the --no_x that transformers adds to a boolean x."""
    return action.dest not in {"help", *skipped} and not any(
        name.startswith("--no_") for name in action.option_strings
    )


def default_of(action: argparse.Action) -> str:
    """Return the default of a flag, or `required`, or nothing where the help text states what happens without it."""
    if action.required:
        return "required"
    if action.default is None or action.default in (argparse.SUPPRESS, "", []):
        return ""
    return "`" + str(action.default).replace(f"{ROOT}/", "") + "`"  # a path of the repository


def to_cell(text: str) -> str:
    """Return a text that stays within one cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def trainer_flags() -> set[str]:
    """Return the flags that finetune.py inherits from transformers."""
    from transformers import TrainingArguments

    return {field.name for field in fields(TrainingArguments)}


def build_page() -> str:
    """Return the text of docs/flags.md."""
    lines = [HEAD]
    for title, commands in COMMANDS.items():
        lines.append(f"\n## {title}")
        for command in commands:
            parser = build_parser(command)
            lines.append(f"\n### {command}\n\n{(parser.description or '').strip().splitlines()[0]}")
            if command in ("finetune", "grpo"):
                lines.append(TRAINER.rstrip().format(command=command))
            lines += flag_rows(parser, trainer_flags() if command in ("finetune", "grpo") else set())
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    (ROOT / "docs" / "flags.md").write_text(build_page())
