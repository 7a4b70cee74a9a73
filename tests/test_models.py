import ipaddress
import socket
import unittest

from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_scheduler.models import (
    InstanceRole,
    InstanceState,
    PDInstance,
    canonical_host,
    canonical_ip,
    is_ip,
    join_address,
)


class PDInstanceTest(unittest.TestCase):
    def test_as_the_library_interface_has_it(self) -> None:
        one = PDInstance(instance_id="p0", role=InstanceRole.PREFILL, host="10.0.0.1", port=8100)
        self.assertEqual(one.url, "http://10.0.0.1:8100")
        self.assertIsNone(one.api_key)
        self.assertEqual(one, PDInstance("p0", InstanceRole.PREFILL, "10.0.0.1", 8100))
        self.assertNotEqual(one, PDInstance("p0", InstanceRole.DECODE, "10.0.0.1", 8100))

    def test_ipv6_is_in_brackets(self) -> None:
        self.assertEqual(PDInstance("p0", InstanceRole.PREFILL, "::1", 80).url, "http://[::1]:80")
        self.assertEqual(join_address("name", 1), "name:1")
        self.assertEqual(join_address("fe80::1", 1), "[fe80::1]:1")

    def test_the_api_key_is_not_shown(self) -> None:
        one = PDInstance("p0", InstanceRole.PREFILL, "h", 1, "sk-secret")
        self.assertNotIn("sk-secret", repr(one) + str(one))

    def test_it_cannot_be_changed(self) -> None:
        with self.assertRaises(AttributeError):
            PDInstance("p0", InstanceRole.PREFILL, "h", 1).port = 2  # type: ignore[misc]


class NamesTest(unittest.TestCase):
    def test_roles_and_states_read_as_in_files_and_urls(self) -> None:
        self.assertEqual([str(role) for role in InstanceRole], ["prefill", "decode", "encode"])
        self.assertEqual([str(s) for s in InstanceState], ["starting", "healthy", "unhealthy", "draining"])

    def test_a_host_has_one_spelling(self) -> None:
        for host, kept in (
            ("10.0.0.1", "10.0.0.1"),
            ("::1", "::1"),
            ("0:0:0:0:0:0:0:1", "::1"),
            ("[::1]", "::1"),
            ("FD00:0::0A", "fd00::a"),
            ("1:0:0:2:0:0:0:3", "1:0:0:2::3"),
            ("::ffff:10.0.0.1", "10.0.0.1"),
            ("::FFFF:A00:1", "10.0.0.1"),
            ("VLLM-0", "vllm-0"),
            ("Vllm-0.Pool.", "vllm-0.pool."),
        ):
            with self.subTest(host):
                self.assertEqual(canonical_host(host), kept)
                self.assertEqual(PDInstance("d0", InstanceRole.DECODE, host, 80).host, kept)

    def test_addresses_that_no_server_has_are_none(self) -> None:
        zones = ("fe80::1%eth0", "fe80::1%1", "::1%0")
        nobody = ("0.0.0.0", "::", "::ffff:0.0.0.0", "224.0.0.1", "ff02::1", "255.255.255.255", "::10.0.0.1")
        others = ("10.0.11", "010.0.0.1", "0", "", "[::1]", "name", "10.0.0.1:80", "1.2.3.4.5")
        for text in (*zones, *nobody, *others):
            with self.subTest(text):
                self.assertIsNone(canonical_ip(text))

    @given(st.integers(0, 2**128 - 1) | st.integers(0, 2**48), st.booleans())
    def test_it_is_the_spelling_of_the_c_library(self, number: int, exploded: bool) -> None:
        """Envoy prints addresses by ``inet_ntop``, and compares what it prints."""
        address = ipaddress.IPv6Address(number)
        kept = canonical_ip(address.exploded if exploded else str(address))
        if kept is not None:
            family = socket.AF_INET6 if ":" in kept else socket.AF_INET
            self.assertEqual(kept, socket.inet_ntop(family, socket.inet_pton(family, kept)))
            self.assertEqual(canonical_ip(kept), kept)

    def test_is_ip(self) -> None:
        for host in ("10.0.0.1", "::1", "fe80::1"):
            self.assertTrue(is_ip(host), host)
        for host in ("localhost", "10.0.0", "10.0.0.1:80", "[::1]", "", "1"):
            self.assertFalse(is_ip(host), host)


if __name__ == "__main__":
    unittest.main()
