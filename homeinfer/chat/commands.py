"""The commands of a conversation, such as /save FILE."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import msgspec

from homeinfer.chat.session import Session
from homeinfer.errors import HomeinferError


class CommandHelp(msgspec.Struct, frozen=True):
    """A command as /help shows it. argument: what may follow, in brackets where nothing need follow.
    aliases: other names for it."""

    name: str
    argument: str
    what: str
    aliases: tuple[str, ...] = ()


class Command(msgspec.Struct, frozen=True):
    """A command as it was typed; `name` without the slash."""

    name: str
    argument: str


class Reply(msgspec.Struct, frozen=True):
    """What a command has to say, and whether the conversation is over."""

    text: str
    leave: bool = False


COMMANDS = (
    CommandHelp("help", "", "show this"),
    CommandHelp("clear", "", "forget what was said; the system message stays"),
    CommandHelp("system", "[TEXT]", "show the system message or set it; /system - takes it away"),
    CommandHelp("save", "FILE", "write the conversation to a file"),
    CommandHelp("load", "FILE", "go on with a conversation that was saved"),
    CommandHelp("stats", "", "show tokens, speed, context and devices"),
    CommandHelp("exit", "", "leave; so does Ctrl-D", ("quit", "bye")),
)

_KEYS = """\
Enter sends. Alt-Enter, Ctrl-J, or a backslash before Enter begins a new line.
Ctrl-C stops an answer. Put a space before a message that begins with a slash."""

_NAMES = {name: command for command in COMMANDS for name in (command.name, *command.aliases)}


def parse_command(text: str) -> Command | None:
    """The command in what was typed, None for a message. A slash that more than letters follow (/etc/hosts)
    begins a message. Raises HomeinferError for a command that there is not, or that lacks its argument."""
    match = re.fullmatch(r"/([A-Za-z]*)(?:\s+(.*))?", text.rstrip(), re.DOTALL)
    if match is None:
        return None
    typed, argument = match[1].lower(), (match[2] or "").strip()
    command = _NAMES.get(typed)
    if command is None:
        close = difflib.get_close_matches(typed, _NAMES, n=1, cutoff=0.5)
        raise HomeinferError(f"there is no /{typed}: " + (f"did you mean /{close[0]}?" if close else "see /help"))
    if argument and not command.argument:
        raise HomeinferError(f"/{typed} takes nothing after it")
    if not argument and command.argument and not command.argument.startswith("["):
        raise HomeinferError(f"/{typed} needs a file: /{typed} {command.argument}")
    return Command(command.name, argument)


def run_command(command: Command, session: Session) -> Reply:
    """Do it. Raises HomeinferError, leaving the session as it was."""
    match command.name:
        case "clear":
            session.clear()
            kept = "; the system message stays" if session.system is not None else ""
            return Reply(f"forgot what was said{kept}")
        case "system":
            return Reply(_system(command.argument, session))
        case "save":
            session.save(Path(command.argument))
            return Reply(f"saved {_messages(len(session.messages))} to {command.argument}")
        case "load":
            loaded = session.load(Path(command.argument))
            held_with = "" if loaded.model == session.model else f", held with {loaded.model}"
            return Reply(f"loaded {_messages(len(loaded.messages))}{held_with}")
        case "stats":
            return Reply(stats_text(session))
        case "exit":
            return Reply("", leave=True)
        case _:
            return Reply(help_text())


def _system(text: str, session: Session) -> str:
    if not text:
        return session.system if session.system is not None else "there is no system message"
    session.set_system(None if text == "-" else text)
    return "the system message is gone" if text == "-" else "the system message is set"


def _messages(n: int) -> str:
    return "1 message" if n == 1 else f"{n} messages"


def help_text() -> str:
    """What /help shows."""
    rows = []
    for command in COMMANDS:
        also = f" (also {', '.join(f'/{alias}' for alias in command.aliases)})" if command.aliases else ""
        rows.append((f"/{command.name} {command.argument}".rstrip(), command.what + also))
    return f"{_columns(rows)}\n{_KEYS}"


def stats_text(session: Session) -> str:
    """What /stats shows."""
    stats = session.stats
    rows = [
        ("answers", f"{stats.answers:,}"),
        ("prompt tokens", f"{stats.prompt_tokens:,} ({stats.reused_tokens:,} still in memory)"),
        ("generated tokens", f"{stats.generated_tokens:,}"),
        ("decode rate", f"{stats.tokens_per_second:.1f} tokens/s" if stats.tokens_per_second else "none yet"),
        ("last TTFT", f"{stats.last_ttft_ms / 1e3:.2f} s" if stats.last_ttft_ms else "none yet"),
        ("context", f"{stats.context_used:,} of {stats.n_ctx:,} tokens"),
    ]
    for device in stats.devices:
        layers = ", ".join(f"{a}–{b - 1}" if b - a > 1 else f"{a}" for a, b in device.windows)
        rows.append((device.name, f"layers {layers}"))
    return _columns(rows)


def _columns(rows: list[tuple[str, str]]) -> str:
    width = max(len(left) for left, _ in rows)
    return "\n".join(f"{left:<{width}}  {right}" for left, right in rows)
