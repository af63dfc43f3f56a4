"""A `python` for tests of shell scripts: its processes are forked from one that has imported the libraries already.

Importing torch and transformers takes longer than most commands on toy data, and run.sh starts twenty of them.
"""

import json
import os
import runpy
import socket
import stat
import subprocess
import sys
import traceback
from pathlib import Path

from tests.helpers.scripts import redirect_output

CLIENT = """#!{python} -S
# Ask the process behind the socket to run this command; anything but a script or a module is for the real python.
import json, os, socket, sys
argv = sys.argv[1:]
if argv[0] != "-m" and not argv[0].endswith(".py"):
    os.execv({python!r}, [{python!r}, *argv])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([argv, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(request)
    sys.exit(int(server.recv(8) or 1))
"""


def run_with_preloaded_python(command: list[str], folder: Path, short: dict[str, list[str]], **environment: str):
    """Run a command in a folder whose .venv has this `python`; `short` holds further flags by command name."""
    address = str(folder / "python.socket")
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(exist_ok=True)
    (binaries / "python").write_text(CLIENT.format(python=sys.executable, address=address))
    (binaries / "python").chmod(stat.S_IRWXU)
    (binaries / "activate").write_text(f"PATH={binaries}:$PATH\n")
    out, err = folder / "printed", folder / "errors"
    with socket.socket(socket.AF_UNIX) as server, out.open("w") as stdout, err.open("w") as stderr:
        server.bind(address)
        server.listen()
        server.settimeout(0.2)
        process = subprocess.Popen(command, cwd=folder, stdout=stdout, stderr=stderr, env=os.environ | environment)
        while process.poll() is None:
            try:
                client, _ = server.accept()
            except TimeoutError:
                continue
            with client:
                client.settimeout(None)
                client.sendall(str(_run_forked(client, short)).encode())
    os.unlink(address)
    return subprocess.CompletedProcess(command, process.returncode, out.read_text(), err.read_text())


def _run_forked(client: socket.socket, short: dict[str, list[str]]) -> int:
    """Run the command that a client sends, in a process with its folder and streams; return its exit code."""
    size, files, _, _ = socket.recv_fds(client, 4, 3)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += client.recv(65536)
    argv, folder, environment = json.loads(request)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = _run_command(argv, folder, environment, files, short)
        finally:
            os._exit(code)
    for file in files:
        os.close(file)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run_command(argv, folder, environment, files, short) -> int:
    os.dup2(files[0], 0)
    redirect_output(*files[1:])
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    is_module = argv[0] == "-m"
    name, *flags = argv[1:] if is_module else argv
    sys.argv = [name, *flags, *short.get(name, [])]
    try:
        if is_module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
