"""The one kind of error a user can cause."""

from __future__ import annotations


class HomeinferError(Exception):
    """What is wrong, where, and what to do about it, in one line.

    The command line prints the message after "homeinfer: " and exits with 1. Anything else that
    escapes to the user as a traceback is a bug.
    """
