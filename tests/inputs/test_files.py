"""Files are whole or absent; JSON that is none ends in one line."""
import os
import resource
import signal

import pytest

from timm_robust.errors import InputError
from timm_robust.inputs import read_json, write_bytes, write_json, write_text, written_whole


def test_a_block_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / 'a.json'
    write_json(path, {'x': [1, 2.5]})
    assert path.read_text() == '{\n "x": [ 1, 2.5 ]\n}\n' and read_json(path) == {'x': [1, 2.5]}
    with pytest.raises(KeyboardInterrupt):
        with written_whole(path) as part:
            part.write_text('half')
            raise KeyboardInterrupt
    with pytest.raises(TypeError):
        write_json(path, {'x': object()})
    assert read_json(path) == {'x': [1, 2.5]} and os.listdir(tmp_path) == ['a.json']
    write_bytes(path, b'new')
    assert path.read_bytes() == b'new' and os.listdir(tmp_path) == ['a.json']


def test_the_name_points_to_the_new_file_only_once_it_is_on_the_disk(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, 'fsync', lambda fd: done.append(os.readlink(f'/proc/self/fd/{fd}')))
    monkeypatch.setattr(os, 'replace', lambda a, b: done.append((str(a), str(b))))
    write_text(tmp_path / 'a.txt', 'text \udcff')
    part, (source, target) = done
    assert part == source and target == str(tmp_path / 'a.txt')


def test_a_full_disk_names_the_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"a\.bin'$"):
            write_bytes(tmp_path / 'a.bin', b'x' * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert os.listdir(tmp_path) == []
    with pytest.raises(OSError, match=r"nowhere/a\.bin'$"):
        write_bytes(tmp_path / 'nowhere' / 'a.bin', b'')


@pytest.mark.parametrize('content', [b'', b'{', b'[1]', b'null', b'\xff\xfe', b'[' * 100_000, b'{"a": 1} x'])
def test_what_is_no_json_mapping(tmp_path, content):
    (tmp_path / 'x.json').write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_json(tmp_path / 'x.json', 'results')
    text = str(caught.value)
    assert text.startswith(f"results='{tmp_path}/x.json': ") and '\n' not in text and 'JSON' in text
    with pytest.raises(InputError, match='cannot be read as JSON .No such file'):
        read_json(tmp_path / 'nowhere.json')
    with pytest.raises(InputError, match='Is a directory'):
        read_json(tmp_path)
