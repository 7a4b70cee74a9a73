import unittest

from vllm_pd_scheduler.models import InstanceRole, InstanceState, PDInstance, is_ip, join_address


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
        self.assertEqual([str(role) for role in InstanceRole], ["prefill", "decode"])
        self.assertEqual([str(s) for s in InstanceState], ["starting", "healthy", "unhealthy", "draining"])

    def test_is_ip(self) -> None:
        for host in ("10.0.0.1", "::1", "fe80::1"):
            self.assertTrue(is_ip(host), host)
        for host in ("localhost", "10.0.0", "10.0.0.1:80", "[::1]", "", "1"):
            self.assertFalse(is_ip(host), host)


if __name__ == "__main__":
    unittest.main()
