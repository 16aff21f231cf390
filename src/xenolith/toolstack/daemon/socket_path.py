"""Where the daemon's socket is. Nothing heavy is imported here, for clients that have to start in milliseconds."""

from __future__ import annotations

import os

SOCKET_VARIABLE = "XENOLITH_SOCKET"


def default_socket_path() -> str:
    """XENOLITH_SOCKET, or control.sock in this user's runtime directory.

    Root has one place whoever asks, since services have no XDG_RUNTIME_DIR and login shells do; other users have the
    directory that their sessions share, if there is one.
    """
    if chosen := os.environ.get(SOCKET_VARIABLE):
        return os.path.abspath(chosen)
    user = os.getuid()
    given = os.environ.get("XDG_RUNTIME_DIR")
    if given and user:
        return os.path.join(given, "xenolith", "control.sock")
    usual = f"/run/user/{user}" if user else "/run"
    if os.access(usual, os.W_OK | os.X_OK):
        return os.path.join(usual, "xenolith", "control.sock")
    from tempfile import gettempdir

    return os.path.join(gettempdir(), f"xenolith-{user}", "control.sock")
