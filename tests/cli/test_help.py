"""Help texts: what a first run needs, examples that parse, and completion for the shell."""
import argparse
import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from timm_robust.cli.main import COMMANDS, main
from timm_robust.cli.timm_train import _add_flags

ROOT = Path(__file__).resolve().parents[2]
PARSED = [name for name in COMMANDS if name != 'timm-train']  # whose parser is timm's


def _parser(name):
    return importlib.import_module(f'timm_robust.cli.{name}').build_parser()


@pytest.mark.parametrize('name', PARSED)
def test_examples_are_command_lines_and_every_flag_says_what_it_does(name):
    parser = _parser(name)
    for example in parser.examples:
        words = shlex.split(example.split(' > ')[0])
        assert words[:2] == ['timm-robust', name]
        parser.parse_args(words[2:])
    assert all(action.help and action.help[0] != ' ' for action in parser._actions)


def test_every_flag_added_to_the_script_of_timm_says_what_it_does():
    parser = argparse.ArgumentParser()
    _add_flags(parser)
    assert len(parser._actions) > 10 and all(action.help for action in parser._actions)


@pytest.mark.parametrize('name', [name for name in PARSED if _parser(name).first])
def test_help_shows_the_flags_of_a_first_run_and_help_all_the_others(name, capsys):
    parser = _parser(name)
    flags = {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}
    assert set(parser.first) <= set(flags), 'a flag that does not exist'
    texts = []
    for flag in ('--help', '--help-all'):
        with pytest.raises(SystemExit):
            main([name, flag])
        texts.append(capsys.readouterr().out)
    first, whole = (text.split('examples:')[0].replace('[', ' ').replace(']', ' ').split() for text in texts)
    for dest, flag in flags.items():
        assert flag in whole
        assert (flag in first) == (dest in (*parser.first, 'help', argparse.SUPPRESS)), flag
    hidden = len(flags) - len(parser.first) - 2
    assert f'--help-all lists {hidden} more flags.' in texts[0] and 'more flags' not in texts[1]


def test_the_list_of_commands_needs_no_torch():
    code = ('import sys, timm_robust_command\ntimm_robust_command.main(["--help"])\n'
            'timm_robust_command.main(["evil"])\nassert not {"torch", "timm", "timm_robust"} & set(sys.modules)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS) and 'evil: unknown command' in done.stderr


def test_completion(capsys, tmp_path):
    assert main(['completion', 'bash']) == 0
    script = capsys.readouterr().out
    (tmp_path / 'completion').write_text(
        script + '\nCOMP_WORDS=(timm-robust eval --worst)\nCOMP_CWORD=2\n_shtab_timm_robust\necho "${COMPREPLY[@]}"\n')
    done = subprocess.run(['bash', str(tmp_path / 'completion')], capture_output=True, text=True)
    assert done.stdout.split() == ['--worst-case'], done.stderr
    assert main(['completion', 'cmd']) == 2
    assert 'SHELL' in capsys.readouterr().err.upper()


@pytest.mark.parametrize('argv', [['--help'], ['train', '--help-all']])
def test_a_reader_that_has_enough_is_no_error(argv):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, '-m', 'timm_robust_command', *argv], stdout=write, stderr=subprocess.PIPE, text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)})
    os.close(write)
    assert done.stderr == '' and done.returncode in (0, 1)  # argparse takes no notice
