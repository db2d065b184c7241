"""Tests of `lrnn train`: what an interruption leaves behind, and the log.

usage: train_program_test.py SOURCE_ROOT PROGRAM
"""
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import unittest

ROOT, PROGRAM = (pathlib.Path(argument).resolve() for argument in sys.argv[1:3])


class Train(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.work = pathlib.Path(temporary.name)
        (self.work / "text.txt").write_bytes((ROOT / "LICENSE").read_bytes() * 20)

    def start(self, *arguments):
        return subprocess.Popen(
            [PROGRAM, "train", "--device", "cpu", "--data", "text.txt", "--mixers", "LRU", "--d-model",
             "16", "--d-state", "4", "--seqlen", "16", "--batch", "2", "--log-every", "5", *arguments],
            cwd=self.work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"})

    def finish(self, process):
        out, err = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 0, err)
        return out, err

    def generate(self, model):
        return subprocess.run(
            [PROGRAM, "generate", "--device", "cpu", "--model", model, "--prompt", "the",
             "--max-new-tokens", "20", "--temperature", "0"],
            cwd=self.work, capture_output=True, check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout

    def test_an_interruption_saves_and_training_goes_on_from_there(self):
        for stop in (signal.SIGINT, signal.SIGTERM):
            out = f"stopped{int(stop)}"
            process = self.start("--out", out, "--steps", "1000000", "--checkpoint-every", "1000000")
            for line in process.stderr:
                if line.startswith("step"):
                    break
            process.send_signal(stop)
            _, err = self.finish(process)
            self.assertRegex(err, rf"stopped after step \d+; the model is saved in {out}\n")
            step = int(err.split("stopped after step ")[1].split(";")[0])
            self.assertGreaterEqual(step, 5)
            self.generate(out)
            # The same steps in one go, and resumed from the interruption.
            total = str(step + 7)
            self.finish(self.start("--out", out, "--steps", total, "--resume"))
            self.finish(self.start("--out", out + "whole", "--steps", total))
            self.assertEqual((self.work / out / "model.safetensors").read_bytes(),
                             (self.work / (out + "whole") / "model.safetensors").read_bytes())

    def test_the_log_holds_one_json_object_per_line(self):
        self.finish(self.start("--out", "model", "--steps", "20", "--log", "log.jsonl"))
        records = [json.loads(line) for line in (self.work / "log.jsonl").read_text().splitlines()]
        steps = [record["step"] for record in records if "loss" in record]
        self.assertEqual([step for step in steps if step % 5 == 0][:4], [5, 10, 15, 20])


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[3:]])
