"""Flags of other trainers: the error names the one of this program, which exists on the command."""

import re

import pytest
import typer

from secondcast import cli
from secondcast.commands.shell.familiar_flags import _BY_COMMAND, _OURS, familiar_advice
from tests.commands.test_cli import secondcast


def commands_with_flags(command=None, name=()):
    """The name and the flags of every command."""
    command = command or typer.main.get_command(cli.app)
    if subcommands := getattr(command, "commands", None):
        for word, subcommand in subcommands.items():
            yield from commands_with_flags(subcommand, (*name, word))
    else:
        yield " ".join(name), {flag for parameter in command.params for flag in parameter.opts}


FLAGS = dict(commands_with_flags())


@pytest.mark.thorough
def test_every_flag_that_is_suggested_exists_on_some_command():
    everywhere = set().union(*FLAGS.values())
    for flags in _OURS:
        assert {flag.partition(" ")[0] for flag in flags} <= everywhere, flags
    for of_commands in _BY_COMMAND.values():
        for command, advice in of_commands.items():
            assert command in FLAGS
            assert set(re.findall(r"--[a-z-]+", advice)) <= FLAGS[command], advice
            for words in re.findall(r": (?:[a-z]+)((?: [A-Z.]+)+)$", advice):
                assert all(word.strip(".") in usage(command) for word in words.split()), advice


def usage(command: str) -> str:
    found = typer.main.get_command(cli.app)
    for word in command.split():
        found = found.commands[word]
    return " ".join(str(parameter.metavar) for parameter in found.params)


@pytest.mark.parametrize("command", FLAGS)
def test_a_suggested_flag_is_one_of_the_same_command(command):
    names = {name for names in _OURS.values() for name in names.split()} | _BY_COMMAND.keys()
    for name in sorted(names):
        advice = familiar_advice(f"--{name}", command, FLAGS[command])
        if advice is not None and (found := re.fullmatch(r"Use (--\S+)", advice)):
            assert found[1] in FLAGS[command]


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("train r --lr 1e-4", "No such option: --lr. Use --learning-rate"),
        ("train r --learning_rate 1e-4", "No such option: --learning_rate. Use --learning-rate"),
        (
            "train r --gradient-checkpointing",
            "No such option: --gradient-checkpointing. Use --activation-checkpointing 1",
        ),
        (
            "train r --gradient_accumulation_steps 4",
            "No such option: --gradient_accumulation_steps. Use --grad-accum-steps",
        ),
        (
            "train r --optimzer adam",
            "No such option: --optimzer. Did you mean --optimizer? The optimizer is AdamW, set by --learning-rate and "
            "--weight-decay",
        ),
        ("train r --batch-sise 9", "No such option: --batch-sise. Did you mean --batch-size?"),
        ("train r --helpp", "No such option: --helpp. Did you mean --help?"),
        # Nothing is close.
        ("train r --zebra", "No such option: --zebra"),
        ("train r --max-train-steps 9", "No such option: --max-train-steps. Use --steps"),
        ("train r --train-batch-size 9", "No such option: --train-batch-size. Use --batch-size"),
        ("train r --mixed-precision bf16", "No such option: --mixed-precision. Use --student-dtype"),
        ("generate s --mixed_precision bf16", "No such option: --mixed_precision. Use --dtype"),
        ("evaluate score s --num-inference-steps 9", "No such option: --num-inference-steps. Use --steps"),
        ("build c --pretrained_model_name_or_path f", "No such option: --pretrained_model_name_or_path. Use --teacher"),
        (
            "train r --resume",
            "No such option: --resume. Give the same command again: it keeps what is finished and resumes from there",
        ),
        (
            "build c --resume_from_checkpoint latest",
            "No such option: --resume_from_checkpoint. Give the same command again: it keeps what is finished and "
            "resumes from there",
        ),
        (
            "train r --output-dir o",
            "No such option: --output-dir. The folder of the run is the first argument: train RUN",
        ),
        ("train r --steps", "Option '--steps' requires an argument."),
        ("generate --student s", "No such option: --student. The student is the first argument: generate STUDENT"),
        ("generate s --output_dir o", "No such option: --output_dir. Use --out"),
    ],
)
def test_a_familiar_flag_is_answered_with_ours(words, advice, capsys):
    code, said, heard = secondcast(*words.split(), capsys=capsys)
    command = re.match(r"[a-z]+( score)?", words)[0]
    assert (code, said) == (2, "")
    assert heard == f"secondcast: {advice} (see secondcast {command} --help)\n"


def test_a_familiar_key_of_a_settings_file_is_answered_with_ours(tmp_path, capsys):
    (tmp_path / "s.toml").write_text("lr = 1e-4\n")
    code, _, heard = secondcast("train", "r", "--config", tmp_path / "s.toml", capsys=capsys)
    assert code == 1
    assert heard == f"secondcast: {tmp_path}/s.toml has the unknown key 'lr': use learning-rate\n"
