"""Tests of `lrnn generate` on a model that `lrnn train` makes.

usage: generate_program_test.py SOURCE_ROOT PROGRAM
"""
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

ROOT, PROGRAM = (pathlib.Path(argument).resolve() for argument in sys.argv[1:3])
PROMPTS = ["Permission is", "T", "THE SOFTWARE", "of this"]


class Generate(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.temporary.cleanup)
        cls.work = pathlib.Path(cls.temporary.name)
        (cls.work / "text.txt").write_bytes((ROOT / "LICENSE").read_bytes() * 50)
        (cls.work / "prompts.txt").write_text("".join(prompt + "\n" for prompt in PROMPTS))
        done = cls.run_program(
            "train", "--device", "cpu", "--data", "text.txt", "--out", "model", "--mixers",
            "Mamba,LRU,attn,S5", "--d-model", "32", "--seqlen", "32", "--batch", "8", "--steps",
            "150", "--lr", "1e-2", "--seed", "1")
        assert done.returncode == 0, done.stderr

    @classmethod
    def run_program(cls, *arguments):
        # On so small a model more threads only wait for one another.
        return subprocess.run([PROGRAM, *arguments], cwd=cls.work, capture_output=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})

    def generate(self, *arguments):
        done = self.run_program("generate", "--device", "cpu", "--model", "model", *arguments)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done

    def results(self, *arguments):
        """title -> text"""
        out = self.generate(*arguments).stdout
        parts = re.split(rb"(?:\A|\n)==> ([^<>]*) <==\n", out)
        self.assertEqual(parts[0], b"")
        return dict(zip(parts[1::2], parts[2::2]))

    def test_prompts_of_a_file_continue_like_prompts_on_their_own(self):
        greedy = ("--max-new-tokens", "40", "--temperature", "0")
        together = self.results("--prompts", "prompts.txt", *greedy)
        self.assertEqual(list(together), [f"prompt {i + 1}".encode() for i in range(len(PROMPTS))])
        for prompt, text in zip(PROMPTS, together.values()):
            self.assertEqual(text, self.generate("--prompt", prompt, *greedy).stdout)
            self.assertTrue(text.startswith(prompt.encode()))
            self.assertEqual(len(text), len(prompt) + 40 + 1)
        self.assertGreater(len({text[-41:] for text in together.values()}), 1)

    def test_samples_are_those_of_the_prompt_given_several_times(self):
        draw = ("--max-new-tokens", "30", "--temperature", "1.3", "--seed", "7")
        samples = self.results("--prompt", "of this", "--num-samples", "3", *draw)
        self.assertEqual(list(samples), [b"sample 1", b"sample 2", b"sample 3"])
        self.assertEqual(len(set(samples.values())), 3)
        (self.work / "repeated.txt").write_text("of this\n" * 3)
        repeated = self.results("--prompts", "repeated.txt", *draw)
        self.assertEqual(list(samples.values()), list(repeated.values()))
        both = self.results("--prompts", "prompts.txt", "--num-samples", "2", *draw)
        self.assertEqual(list(both)[:3],
                         [b"prompt 1, sample 1", b"prompt 1, sample 2", b"prompt 2, sample 1"])
        self.assertEqual(len(both), 2 * len(PROMPTS))

    def test_each_result_ends_where_its_stop_text_does(self):
        texts = self.results("--prompts", "prompts.txt", "--max-new-tokens", "60", "--temperature",
                             "0", "--stop", "e")
        for prompt, text in zip(PROMPTS, texts.values()):
            drawn = text[len(prompt) : -1]
            self.assertLessEqual(drawn.count(b"e"), 1)
            self.assertTrue(drawn.endswith(b"e") or len(drawn) == 60)
        self.assertGreater(len({len(text) for text in texts.values()}), 1)

    def test_speeds_count_the_tokens_of_prefill_and_decode(self):
        speed = r"%d tokens in [0-9.]+ s, [0-9.]+ tokens/s"
        for arguments, prefill, decode in (
                (("--prompt", "of this", "--max-new-tokens", "9"), 7, 8),
                (("--prompt", "of this", "--max-new-tokens", "9", "--num-samples", "3"), 7, 24),
                (("--prompts", "prompts.txt", "--max-new-tokens", "9"),
                 sum(map(len, PROMPTS)), 8 * len(PROMPTS))):
            self.assertRegex(self.generate(*arguments).stderr.decode(),
                             rf"^prefill: {speed % prefill}; decode: {speed % decode}\n$")
        done = self.generate("--prompt", "of this", "--max-new-tokens", "0")
        self.assertEqual((done.stdout, done.stderr), (b"of this\n", b""))

    def test_bad_prompts_are_refused(self):
        (self.work / "hole.txt").write_text("a\n\nb\n")
        (self.work / "empty.txt").write_text("")
        for arguments, word in ((("--prompts", "hole.txt"), "line 2"),
                                (("--prompts", "empty.txt"), "at least one line"),
                                (("--prompts", "none.txt"), "none.txt"),
                                (("--prompt", ""), "--prompt"),
                                (("--prompt", "a", "--prompts", "prompts.txt"), "excludes"),
                                (("--prompt", "a", "--num-samples", "0"), "num-samples")):
            done = self.run_program("generate", "--model", "model", *arguments)
            self.assertEqual((done.returncode, done.stdout), (2, b""), arguments)
            self.assertIn(word, done.stderr.decode())


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[3:]])
