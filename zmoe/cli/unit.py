"""zmoe-node --print-unit: the same command as a service of systemd."""

from __future__ import annotations

import os
import pwd
import sys
from collections.abc import Sequence

from zmoe.cluster.spec import WorkerSpec

_UNIT = """\
[Unit]
Description=zmoe node {rank} of the leader at {leader}
Wants=network-online.target
After=network-online.target

[Service]
ExecStart={command}
WorkingDirectory={folder}
User={user}
{environment}Restart=always
RestartSec=5
# zmoe-node ends so when it is stopped by SIGTERM.
SuccessExitStatus=143
NoNewPrivileges=yes

[Install]
WantedBy=multi-user.target
"""
_VARIABLES = ("ZMOE_LEADER", "ZMOE_RANK", "ZMOE_KEY_FILE", "XDG_STATE_HOME")


def unit(spec: WorkerSpec, arguments: Sequence[str], rank_env: str | None) -> str:
    """A unit that runs zmoe-node with `arguments` here, as this user, and with the variables that
    it reads.
    """
    command = [sys.executable, "-m", "zmoe.cli.node", *arguments]
    names = (*_VARIABLES, rank_env) if rank_env is not None else _VARIABLES
    given = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return _UNIT.format(
        rank=spec.rank,
        leader=_without_specifiers(spec.leader),
        command=" ".join(_quoted(word).replace("$", "$$") for word in command),
        folder=_without_specifiers(os.getcwd()),
        user=pwd.getpwuid(os.getuid()).pw_name,
        environment="".join(f"Environment={_quoted(each)}\n" for each in given),
    )


def _without_specifiers(text: str) -> str:
    return text.replace("%", "%%")


def _quoted(word: str) -> str:
    """Return `word` as systemd reads one, whatever it holds."""
    escaped = "".join(f"\\{c}" if c in '"\\' else c for c in _without_specifiers(word))
    quote = '"' if not word or any(c in " \t\n;'\"\\" for c in word) else ""
    return quote + escaped.replace("\n", "\\n") + quote
