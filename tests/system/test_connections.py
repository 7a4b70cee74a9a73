"""Closing what was accepted at a port, whoever holds it."""

import os
import socket
from contextlib import ExitStack

from vllm_pd_scheduler.system.connections import close_accepted


def test_those_of_the_port_and_no_others() -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        v6 = stack.enter_context(socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True))
        unix = stack.enter_context(socket.socketpair()[0])
        pairs = []
        for server in (servers[0], servers[0], servers[1], v6):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.getsockname()[1])))
            pairs.append((client, stack.enter_context(server.accept()[0])))
        before = sorted(os.listdir("/dev/fd"))

        assert close_accepted(servers[0].getsockname()[1]) == 2
        assert close_accepted(v6.getsockname()[1]) == 1
        assert close_accepted(1) == 0

        assert sorted(os.listdir("/dev/fd")) == before, "and nothing stays open"
        assert unix.fileno() >= 0
        for client, accepted in (*pairs[:2], pairs[3]):
            assert (client.recv(1), accepted.recv(1)) == (b"", b"")
        client, accepted = pairs[2]
        client.sendall(b"x")
        assert accepted.recv(1) == b"x"
        for server in servers:  # and they go on to listen
            socket.create_connection(server.getsockname()).close()
