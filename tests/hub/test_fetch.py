"""The authors' checkpoints, from a stand-in for Google Drive on this machine; the real folder was never tried."""
import io
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
import timm
import torch

from timm_robust.cli.main import main
from timm_robust.errors import InputError
from timm_robust.hub import fetch
from timm_robust.inputs import weights_sha256
from timm_robust.models import weights_store

requests = pytest.importorskip('requests')
pytest.importorskip('gdown')


def checkpoint(model, **extra):
    file = io.BytesIO()
    torch.save({'state_dict': {f'module.{k}': v for k, v in model.state_dict().items()}, **extra}, file)
    return file.getvalue()


@pytest.fixture
def drive(monkeypatch):
    """Google Drive as far as gdown asks for it: folders of files and folders, by path."""
    files = {}

    def identifier(path):
        return path.replace('/', '-').replace('.', '-').replace('*', '-').ljust(33, '_')

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            url, body, headers = urlsplit(self.path), b'', {'Content-Type': 'text/html'}
            asked = parse_qs(url.query).get('id', [''])[0]
            if url.path == '/embeddedfolderview':
                top = {p.split('/')[0] for p in files} if asked.startswith('12hX') else {
                    p for p in files if '/' in p and identifier(p.split('/')[0]) == asked}
                title = next((p.split('/')[0] for p in top if p in files and '/' in p), 'NoFrost')
                links = [f'file/d/{identifier(p)}/view' if p in files else f'drive/folders/{identifier(p)}'
                         for p in sorted(top)]
                body = f'<title>{title}</title>' + ''.join(
                    f'<a href="https://drive.google.com/{link}">{p.split("/")[-1]}</a>'
                    for link, p in zip(links, sorted(top)))
                body = body.encode()
            else:
                path = next(p for p in files if identifier(p) == asked)
                body, headers = files[path], {
                    'Content-Type': 'application/octet-stream',
                    'Content-Disposition': f'attachment; filename="{path.split("/")[-1]}"'}
            self.send_response(200)
            for key, value in {**headers, 'Content-Length': str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    send = requests.adapters.HTTPAdapter.send

    def to_this_machine(self, request, **kwargs):
        url = urlsplit(request.url)
        assert url.hostname.endswith(('google.com', 'googleusercontent.com'))
        request.url = f'http://127.0.0.1:{server.server_address[1]}{url.path}?{url.query}'
        return send(self, request, **kwargs)

    monkeypatch.setattr(requests.adapters.HTTPAdapter, 'send', to_this_machine)
    yield files
    server.shutdown()
    server.server_close()
    shutil.rmtree(weights_store(), ignore_errors=True)


def test_a_fetched_checkpoint_is_what_pretrained_loads(drive, capsys):
    model = timm.create_model('nf_resnet26')
    drive.update({'NoFrost_ResNet26/best_RA.pth': checkpoint(model, epoch=89), 'NoFrost_ResNet26/train_log.txt': b'log',
                  'NoFrostStar_ResNet26/best_RA.pth': b'', 'AT_ResNet50_BN.pth': b''})
    assert main(['fetch', 'nofrost_resnet26']) == 0
    out = capsys.readouterr().out
    name = 'nofrost_resnet26.nofrost_linf8_in1k'
    assert 'Stored NoFrost_ResNet26/best_RA.pth as' in out and f'--model {name}' in out
    for asked in ('nofrost_resnet26', name):
        loaded = timm.create_model(asked, pretrained=True)
        assert weights_sha256(loaded) == weights_sha256(model)
    known = json.loads((weights_store() / f'{name}.json').read_text())
    assert known['weights_sha256'] == weights_sha256(model) and known['file'] == 'NoFrost_ResNet26/best_RA.pth'
    main(['models', name])
    assert 'in the local store' in capsys.readouterr().out


def test_the_figure_of_others_is_told(drive):
    drive['NoFrost_ResNet50.pth'] = checkpoint(timm.create_model('nf_resnet50'))
    assert '1.28 % robust accuracy under AutoAttack' in fetch('nofrost_resnet50').known


@pytest.mark.parametrize('files, kwargs, problem', [
    ({'a.pth': b'x'}, {}, 'no file name matches; .* has a.pth; name one of them'),
    ({'nofrost_resnet26.pth': b'x', 'old/resnet26_nofrost.pt': b'x'}, {}, '2 files fit; .*26.pth, old/resnet26_'),
    ({'nofrost_resnet26.pth': b'x'}, {'file': 'b.pth'}, "file='b.pth': no such file"),
    ({'nofrost_resnet26.pth': b'<!DOCTYPE html>'}, {}, 'checkpoint'),
    ({'nofrost_resnet26.pth': 'other network'}, {}, 'checkpoint')])
def test_what_does_not_fit_is_refused(drive, files, kwargs, problem):
    drive.update({k: checkpoint(timm.create_model('nf_resnet50')) if v == 'other network' else v
                  for k, v in files.items()})
    with pytest.raises(InputError, match=problem):
        fetch('nofrost_resnet26', **kwargs)
    assert not list(weights_store().glob('*'))


def test_no_network_and_no_such_weights(monkeypatch):
    with pytest.raises(InputError, match="name='resnet50'"):
        fetch('resnet50')

    def offline(*args, **kwargs):
        raise requests.exceptions.ConnectionError('Name or service not known')

    monkeypatch.setattr(requests.adapters.HTTPAdapter, 'send', offline)
    with pytest.raises(InputError, match='cannot be read: Name or service not known'):
        fetch('nofrost_resnet26')
