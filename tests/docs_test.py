"""Checks README.md and docs/ against the tree.

usage: docs_test.py SOURCE_ROOT [PROGRAM]

- a C++ block is preceded by <!-- FILE -->, and its lines are consecutive lines of that file
- a path in backticks exists
- a test named Suite.Name in backticks exists
- docs/api.md has a row for every argument and result of lrnnx's page, and each such row a test
- no source of the library calls what prints, exits or aborts
- given PROGRAM, the commands of the shell blocks run, one after the other, and succeed
"""
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import textwrap

ROOT = pathlib.Path(sys.argv[1])
FOLDERS = ("include/", "src/", "cpu/", "cuda/", "tests/", "tools/", "bench/", "docs/")


# What lrnnx's page on LRNNLMHeadModel names, by section of docs/api.md.
PAGE = {
    "Constructor": "d_model d_state n_layer vocab_size mixer_types d_intermediate mixer_kwargs "
                   "mlp_cls norm_epsilon rms_norm fused_add_norm residual_in_fp32 tie_embeddings "
                   "pad_vocab_size_multiple initializer_cfg device dtype",
    "`forward`": "input_ids position_ids inference_params num_last_tokens integration_timesteps "
                 "lengths **mixer_kwargs logits",
    "`step`": "input_ids caches integration_timesteps logits",
    "`allocate_inference_cache`": "batch_size max_seqlen dtype **kwargs",
    "`save_pretrained`, `from_pretrained`": "model.save_pretrained from_pretrained",
}


def cpp_blocks(lines):
    """(line number, file named above or None, text) of every fenced C++ block."""
    for start, line in enumerate(lines):
        if line != "```cpp":
            continue
        end = lines.index("```", start)
        named = re.fullmatch(r"<!-- (\S+) -->", lines[start - 1])
        yield start + 1, named and named.group(1), "\n".join(lines[start + 1 : end])


def contains(source, block):
    """Whether `block`, less its indentation, is a run of whole lines of `source`."""
    wanted = textwrap.dedent(block).strip("\n").split("\n")
    lines = source.split("\n")
    for i in range(len(lines) - len(wanted) + 1):
        if textwrap.dedent("\n".join(lines[i : i + len(wanted)])).split("\n") == wanted:
            return True
    return False


def test_names():
    pattern = re.compile(r"^(?:TYPED_)?TEST(?:_[FP])?\((\w+),\s*(\w+)\)", re.MULTILINE)
    return {
        f"{suite}.{name}"
        for path in (ROOT / "tests").rglob("*.cpp")
        for suite, name in pattern.findall(path.read_text())
    }


def errors(document, tests):
    text = document.read_text()
    name = document.relative_to(ROOT)
    for line, file, block in cpp_blocks(text.split("\n")):
        if file is None:
            yield f"{name}:{line}: C++ without <!-- FILE --> above it"
        elif not (ROOT / file).is_file():
            yield f"{name}:{line}: {file} does not exist"
        elif not contains((ROOT / file).read_text(), block):
            yield f"{name}:{line}: differs from {file}"
    for number, line in enumerate(text.split("\n"), 1):
        for code in re.findall(r"`([^`\s]+)`", line):
            if code.startswith(FOLDERS) and not re.search(r"[*<{]|foo", code):
                if not (ROOT / code).exists():
                    yield f"{name}:{number}: {code} does not exist"
            if re.fullmatch(r"[A-Z]\w+\.[A-Z]\w+", code) and code not in tests:
                yield f"{name}:{number}: there is no test {code}"


def page_rows(text):
    """(section, cells) of every row of the tables that compare with lrnnx's page."""
    section, compares = None, False
    for line in text.split("\n"):
        if line.startswith("## "):
            section = line[3:]
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells:
            compares = False
        elif cells[0] == "page":
            compares = True
        elif compares and not cells[0].startswith("---"):
            yield section, cells


def api_errors(text):
    rows = list(page_rows(text))
    for section, names in PAGE.items():
        for name in names.split():
            if not any(row[0] == section and re.match(rf"`{re.escape(name)}\b", row[1][0])
                       for row in rows):
                yield f"docs/api.md: {section} has no row for {name}"
    for section, cells in rows:
        if len(cells) != 4:
            yield f"docs/api.md: {section}: {len(cells)} cells in the row of {cells[0]}"
        elif cells[0] and cells[1] != "none" and not cells[3]:
            yield f"docs/api.md: {section}: the row of {cells[0]} has no test"


def forbidden_calls():
    """Lines of the library that print or end the program."""
    pattern = re.compile(r"std::(?:cout|cerr|clog|terminate|quick_exit)\b"
                         r"|\b(?:f?printf|f?puts|f?putc|perror|abort|_?exit|_Exit|assert)\(")
    for folder in ("include", "src", "cpu", "cuda"):
        for path in sorted((ROOT / folder).rglob("*.*")):
            for number, line in enumerate(path.read_text().split("\n"), 1):
                if pattern.search(line.split("//")[0]):
                    yield f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def run_commands(document, program):
    """The first command that fails, with what it printed, or None."""
    blocks = re.findall(r"^```sh\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.split("\n") if line]
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        (work / "lrnn").symlink_to(program)
        for name in ("tests", "tools"):
            (work / name).symlink_to(ROOT / name)
        (work / "text.txt").write_bytes((ROOT / "LICENSE").read_bytes() * 100)
        # On models so small more threads only wait for one another.
        environment = {"OMP_NUM_THREADS": "1", **os.environ,
                       "PATH": folder + os.pathsep + os.environ["PATH"]}
        for command in commands:
            done = subprocess.run(command, shell=True, cwd=work, env=environment,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if done.returncode != 0:
                return f"{command}\nexit status {done.returncode}\n{done.stdout.decode(errors='replace')}"
    print(f"{len(commands)} commands ran")
    return None if commands else "no commands were found"


def main():
    if len(sys.argv) > 2:
        error = run_commands(ROOT / "README.md", pathlib.Path(sys.argv[2]).resolve())
        print(error or "")
        return 1 if error else 0
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    tests = test_names()
    found = [error for document in documents for error in errors(document, tests)]
    found += api_errors((ROOT / "docs" / "api.md").read_text())
    found += forbidden_calls()
    print("\n".join(found) or f"{len(documents)} documents agree with the tree")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
