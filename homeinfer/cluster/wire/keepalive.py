"""Noticing that the other end of a TCP connection is gone."""

from __future__ import annotations

from typing import Any

_IDLE_SECONDS, _EVERY_SECONDS, _TIMES = 3, 2, 3


def keep_alive(socket: Any) -> None:
    """Let the system ask the other end of an idle connection for a sign of life, and give up after some ten seconds.

    Not ZeroMQ's own heartbeats: libzmq 4.3.5 ends the process (Assertion failed: !_io_error) where one meets a full
    receive queue whose peer has left.
    """
    socket.tcp_keepalive = 1
    socket.tcp_keepalive_idle = _IDLE_SECONDS
    socket.tcp_keepalive_intvl = _EVERY_SECONDS
    socket.tcp_keepalive_cnt = _TIMES
    socket.tcp_maxrt = (_IDLE_SECONDS + _EVERY_SECONDS * _TIMES) * 1000
