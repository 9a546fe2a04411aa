"""What the commands share."""
import logging

from timm_robust.cli.arguments import start_logging


def test_a_second_command_of_a_process_logs_each_line_once(capsys):
    for _ in range(2):
        start_logging()
    logging.getLogger('timm_robust').info('said')
    assert capsys.readouterr().err.count('said') == 1
