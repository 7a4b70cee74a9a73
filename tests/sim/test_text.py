import unittest

from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_scheduler.sim.text import Answer, read_prompt, render_chat, tokenize


class TextTest(unittest.TestCase):
    @given(st.text())
    def test_a_text_and_its_token_ids_are_the_same_prompt(self, text: str) -> None:
        self.assertEqual(read_prompt("m", tokenize(text)), read_prompt("m", text))

    @given(st.lists(st.integers(0, 255), min_size=1), st.lists(st.integers(0, 255), min_size=1))
    def test_other_ids_are_another_prompt(self, one: list[int], two: list[int]) -> None:
        self.assertEqual(read_prompt("m", one).tokens, len(one))
        self.assertEqual(read_prompt("m", one) == read_prompt("m", two), one == two)

    @given(st.text(max_size=60), st.text(max_size=60), st.integers(1, 4))
    def test_blocks_are_equal_as_far_as_the_tokens_are(self, one: str, two: str, size: int) -> None:
        tokens = [tokenize(one), tokenize(two)]
        hashes = [read_prompt("m", text).block_hashes(size) for text in (one, two)]
        self.assertEqual(hashes[0], read_prompt("m", tokens[0]).block_hashes(size))
        self.assertEqual(len(hashes[0]), max(1, len(tokens[0])) // size)
        for number, pair in enumerate(zip(*hashes, strict=False), start=1):
            self.assertEqual(pair[0] == pair[1], tokens[0][: number * size] == tokens[1][: number * size])
        self.assertFalse(set(hashes[0]) & set(read_prompt("other", one).block_hashes(size)))

    def test_any_integer_is_an_id(self) -> None:
        self.assertEqual(read_prompt("m", [-1, 0, 2**70]).tokens, 3)

    def test_the_answer_depends_on_prompt_and_model_only(self) -> None:
        text = Answer(read_prompt("m", "hello")).text(30)
        self.assertEqual(text, Answer(read_prompt("m", "hello")).text(30))
        self.assertNotEqual(text, Answer(read_prompt("m", "hellp")).text(30))
        self.assertNotEqual(text, Answer(read_prompt("other", "hello")).text(30))
        self.assertNotEqual(text, Answer(read_prompt("m", "hello"), choice=1).text(30))

    @given(st.text(max_size=20))
    def test_wrong_kv_text_differs_from_its_first_word_on(self, prompt: str) -> None:
        good, bad = (Answer(read_prompt("m", prompt), wrong_kv=wrong_kv) for wrong_kv in (False, True))
        for index in range(10):
            self.assertNotEqual(good.word(index), bad.word(index))

    @given(st.text(max_size=20))
    def test_a_natural_answer_is_whole_sentences(self, prompt: str) -> None:
        answer = Answer(read_prompt("m", prompt))
        self.assertIn(answer.natural_length, range(20, 61))
        self.assertTrue(answer.text(answer.natural_length).endswith("."))

    def test_chat_parts_and_text_are_the_same(self) -> None:
        plain = [{"role": "user", "content": "hi there"}]
        parts = [
            {"role": "user", "content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}]}
        ]
        self.assertEqual(render_chat(plain), render_chat(parts))
        self.assertNotEqual(render_chat(plain), render_chat([{"role": "system", "content": "hi there"}]))


if __name__ == "__main__":
    unittest.main()
