"""Every command of docs/publishing.md, in order."""
import re
import shlex
from pathlib import Path

from helpers import make_image_folder
from hub_server import WRITER

from timm_robust.cli.main import main

PAGE = Path(__file__).resolve().parents[2] / 'docs' / 'publishing.md'


def test_every_command_of_the_page(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_TOKEN', WRITER)
    make_image_folder(tmp_path / 'DATA', size=28)
    blocks = re.findall(r'```bash\n(.*?)```', PAGE.read_text(), flags=re.S)
    commands = [c for block in blocks for c in block.replace('\\\n', ' ').strip().split('\n')]
    assert len(commands) == 8
    for command in commands:
        # AutoAttack's minutes are spent elsewhere, and two classes are too few for it
        argv = shlex.split(command.replace('pgd20,autoattack', 'pgd2'))
        assert argv[0] == 'timm-robust'
        more = ['--allow-chance', '--device', 'cpu', '-b', '8'] if argv[1] == 'eval' else []
        assert main([*argv[1:], *more]) == 0, command
    assert list(hub.repos) == ['ME/MINE'] and hub.repos['ME/MINE'].private
    assert (tmp_path / 'loaded' / 'results.json').exists()
