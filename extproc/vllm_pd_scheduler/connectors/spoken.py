"""Which protocol a P speaks, as its last hand-off has shown."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import force_setattr as _set


class Spoken(Struct, frozen=True, eq=False):
    """What the last hand-off of one instance has shown. Strategies can only read it."""

    protocol: str = ""
    """The name of its protocol, where its connector finds that out; empty: not known."""
    takes_token_ids: bool = False
    """Whether its D read token ids in a hand-off."""

    def shown(self, protocol: str, takes_token_ids: bool) -> bool:
        """Note what a hand-off shows; return whether its protocol is another one."""
        _set(self, "takes_token_ids", takes_token_ids)
        if self.protocol == protocol:
            return False
        _set(self, "protocol", protocol)
        return True

    def forget(self) -> None:
        """Take nothing for known: the process is another one."""
        self.shown("", False)
