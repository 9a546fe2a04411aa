"""A small Hugging Face Hub on this machine: the documented HTTP API as far as publishing and loading a model need it.

Repositories, branches, pull requests, LFS storage, private and gated repositories, and faults on demand.
"""
import base64
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER = 'hf_writer', 'hf_reader'


class Repo:
    """Commits of a repository; the files of a commit are bytes, or the hash of an LFS object."""

    def __init__(self, private=False):
        self.private, self.gated = private, False
        self.commits = {'0' * 40: {'.gitattributes': b'*.safetensors filter=lfs\n'}}
        self.branches, self.pull_requests = {'main': '0' * 40}, []

    def commit_of(self, revision):
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubServer(ThreadingHTTPServer):
    """The server; `faults` holds (method, pattern of the path, what to do), each used once.

    What to do is a status code, 'cut' to break the connection off in the middle of the body, or 'half' to send half of
    the file as if it were all.
    """
    daemon_threads = True

    def __init__(self, port):
        super().__init__(('127.0.0.1', port), Handler)
        self.repos, self.lfs, self.faults, self.log = {}, {}, [], []
        self.url = f'http://127.0.0.1:{port}'
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        """Connections that are cut on purpose are no news."""

    def fault(self, method, path):
        for entry in self.faults:
            if entry[0] == method and re.search(entry[1], path):
                self.faults.remove(entry)
                return entry[2]
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        """Quiet."""

    def do(self, method):
        parts = urlsplit(self.path)
        self.route, self.query = unquote(parts.path), parse_qs(parts.query)
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        self.server.log.append((method, self.route))
        token = (self.headers.get('Authorization') or '').removeprefix('Bearer ')
        self.can_read, self.can_write = token in (READER, WRITER), token == WRITER
        self.wrong_token = bool(token) and not self.can_read
        self.what = self.server.fault(method, self.route)
        if isinstance(self.what, int):
            return self.answer(self.what, {'error': f'injected {self.what}'})
        if self.what == 'cut' and method != 'GET':
            return self.cut()
        for pattern, verb, function in ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and method in verb:
                return function(self, *match.groups())
        return self.answer(404, {'error': 'no such page'})

    def do_GET(self):
        self.do('GET')

    def do_HEAD(self):
        self.do('HEAD')

    def do_POST(self):
        self.do('POST')

    def do_PUT(self):
        self.do('PUT')

    def answer(self, status, content=b'', **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.send_header('Content-Length', str(len(body)))
        self.send_header('Connection', 'close')  # a client must not go on with the server of an earlier test
        self.end_headers()
        if self.command == 'HEAD':
            return
        if self.what == 'cut':
            self.wfile.write(body[:len(body) // 2])
            self.wfile.flush()
            return self.cut()
        self.wfile.write(body)

    def cut(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def missing(self, what):
        self.answer(401 if what == 'RepoNotFound' else 404, {'error': what}, X_Error_Code=what)

    def repo(self, name, write=False):
        """The repository, or None after an answer that says why not."""
        found = self.server.repos.get(name)
        if self.wrong_token or (write and not self.can_read):
            return self.answer(401, {'error': 'Invalid credentials in Authorization header'})
        if found is None or (found.private and not self.can_read):
            return self.missing('RepoNotFound')
        if write and not self.can_write:
            return self.answer(403, {'error': 'this token cannot write'})
        if found.gated and not self.can_write:
            return self.answer(403, {'error': 'gated'}, X_Error_Code='GatedRepo')
        return found

    def create(self):
        if not self.can_write:
            return self.answer(403 if self.can_read else 401, {'error': 'no right to create'})
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.server.repos:
            return self.answer(409, {'error': 'exists', 'url': f'{self.server.url}/{name}'})
        self.server.repos[name] = Repo(wanted.get('visibility') == 'private')
        self.answer(200, {'url': f'{self.server.url}/{name}', 'name': name})

    def validate_yaml(self):
        self.answer(200, {'errors': [], 'warnings': []})

    def branch(self, name, branch):
        repo = self.repo(name, write=True)
        if repo is None:
            return
        if branch in repo.branches:
            return self.answer(409, {'error': 'exists'})
        repo.branches[branch] = repo.branches['main']
        self.answer(200, {})

    def preupload(self, name, revision):
        repo = self.repo(name, write=True)
        if repo is None:
            return
        held = repo.commits[repo.commit_of(revision) or '0' * 40]
        files = []
        for wanted in json.loads(self.body)['files']:
            path = wanted['path']
            mode = 'lfs' if path.endswith(('.safetensors', '.png')) else 'regular'
            files.append({'path': path, 'uploadMode': mode, 'shouldIgnore': False, 'oid': oid_of(held.get(path))})
        self.answer(200, {'files': files})

    def batch(self, name):
        if self.repo(name, write=True) is None:
            return
        objects = []
        for wanted in json.loads(self.body)['objects']:
            upload = {'actions': {'upload': {'href': f"{self.server.url}/storage/{wanted['oid']}", 'header': {}}}}
            objects.append({**wanted, **({} if wanted['oid'] in self.server.lfs else upload)})
        self.answer(200, {'transfer': 'basic', 'objects': objects})

    def store(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer(400, {'error': 'broken upload'})
        self.server.lfs[oid] = self.body
        self.answer(200)

    def commit(self, name, revision):
        repo = self.repo(name, write=True)
        if repo is None:
            return
        files = dict(repo.commits[repo.commit_of(revision) or '0' * 40])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry['value']
            if entry['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif entry['key'] == 'lfsFile':
                if value['oid'] not in self.server.lfs:
                    return self.answer(400, {'error': 'unknown object'})
                files[value['path']] = value['oid']
        oid = hashlib.sha1(repr(sorted(files.items())).encode() + revision.encode()).hexdigest()
        repo.commits[oid] = files
        url = None
        if 'create_pr' in self.query:
            repo.pull_requests.append(oid)
            repo.branches[f'refs/pr/{len(repo.pull_requests)}'] = oid
            url = f'{self.server.url}/{name}/discussions/{len(repo.pull_requests)}'
        else:
            repo.branches[revision] = oid
        self.answer(200, {
            'commitUrl': f'{self.server.url}/{name}/commit/{oid}', 'commitOid': oid, 'pullRequestUrl': url})

    def whoami(self):
        if self.can_read:
            self.answer(200, {'type': 'user', 'name': 'me'})
        else:
            self.answer(401, {'error': 'Invalid credentials in Authorization header'})

    def info(self, name, revision='main'):
        repo = self.repo(name)
        if repo is None:
            return
        oid = repo.commit_of(revision)
        if oid is None:
            return self.missing('RevisionNotFound')
        self.answer(200, {
            'id': name, 'modelId': name, 'sha': oid, 'private': repo.private, 'tags': [], 'downloads': 0,
            'siblings': [{'rfilename': path} for path in sorted(repo.commits[oid])]})

    def resolve(self, name, revision, path):
        repo = self.repo(name)
        if repo is None:
            return
        oid = repo.commit_of(revision)
        if oid is None:
            return self.missing('RevisionNotFound')
        content = repo.commits[oid].get(path)
        if content is None:
            return self.answer(404, {'error': 'no such file'}, X_Error_Code='EntryNotFound', X_Repo_Commit=oid)
        if isinstance(content, str):
            data = self.server.lfs[content]
            return self.answer(
                302, b'', Location=self.server.url.replace('127.0.0.1', 'localhost') + f'/cdn/{content}',
                X_Repo_Commit=oid,
                X_Linked_Etag=f'"{content}"', X_Linked_Size=len(data))
        self.answer(200, content, ETag=f'"{oid_of(content)}"', X_Repo_Commit=oid)

    def cdn(self, oid):
        data = self.server.lfs[oid]
        self.answer(200, data[:len(data) // 2] if self.what == 'half' else data, ETag=f'"{oid}"')


def oid_of(content):
    """Git's name of a file, or that of an LFS object."""
    if content is None or isinstance(content, str):
        return content
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


_ID = r'([\w.-]+/[\w.-]+)'
ROUTES = (
    (r'/api/repos/create', ('POST',), Handler.create),
    (r'/api/whoami-v2', ('GET',), Handler.whoami),
    (r'/api/validate-yaml', ('POST',), Handler.validate_yaml),
    (rf'/api/models/{_ID}/branch/(.+)', ('POST',), Handler.branch),
    (rf'/api/models/{_ID}/preupload/(.+)', ('POST',), Handler.preupload),
    (rf'/api/models/{_ID}/commit/(.+)', ('POST',), Handler.commit),
    (rf'/api/models/{_ID}', ('GET',), Handler.info),
    (rf'/api/models/{_ID}/revision/(.+)', ('GET',), Handler.info),
    (rf'/{_ID}\.git/info/lfs/objects/batch', ('POST',), Handler.batch),
    (r'/storage/(\w+)', ('PUT',), Handler.store),
    (r'/cdn/(\w+)', ('GET', 'HEAD'), Handler.cdn),
    (rf'/{_ID}/resolve/([^/]+|refs/pr/\d+)/(.+)', ('GET', 'HEAD'), Handler.resolve),
)
