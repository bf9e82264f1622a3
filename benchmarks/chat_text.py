"""Calibration text in a chat model's own format: questions, and the answers that it gives itself.

Prose has no questions and none of a chat template's marks. These conversations are what the dense
model would say, with its template around them, so that the student meets both:

    python benchmarks/chat_text.py MODEL OUT.txt --tokens 1000000
    python converters/hf_to_bmos.py MODEL DST --stage qat --calibration OUT.txt

vLLM writes the answers by sampling; the same seed asks the same questions. Needs vLLM and a model
directory with a chat template.
"""

import argparse
import os
import random
from pathlib import Path
from typing import Any

from converters.calibration import write_whole

TOPICS = """
the Sun; the Moon; Mercury; Venus; Mars; Jupiter; Saturn; Uranus; Neptune; Pluto; the Milky Way;
black holes; comets; gravity; light; sound; heat; electricity; magnetism; atoms; molecules; the
periodic table; hydrogen; oxygen; carbon; iron; gold; water; salt; acids; evolution; DNA; cells;
bacteria; viruses; vaccines; the heart; the brain; the lungs; bones; sleep; dreams; memory;
exercise; vitamins; bread; cheese; coffee; tea; chocolate; rice; potatoes; apples; cooking pasta;
baking a cake; gardening; trees; flowers; bees; ants; butterflies; birds; eagles; penguins; whales;
dolphins; sharks; elephants; lions; tigers; wolves; dogs; cats; horses; cows; dinosaurs; volcanoes;
earthquakes; rivers; mountains; deserts; oceans; islands; glaciers; rain; snow; clouds; wind; the
seasons; climate change; renewable energy; recycling; France; Germany; Italy; Spain; England;
Scotland; Ireland; Russia; China; Japan; India; Egypt; South Africa; Nigeria; Brazil; Argentina;
Mexico; Canada; the United States; Australia; Paris; London; Rome; Tokyo; New York; Berlin; Moscow;
the Roman Empire; ancient Greece; the Middle Ages; the Renaissance; the Industrial Revolution;
World War I; World War II; the Cold War; democracy; elections; laws; money; banks; taxes; trade;
jobs; computers; the internet; programming; Python; artificial intelligence; robots; telephones;
television; cameras; cars; trains; airplanes; ships; bicycles; bridges; houses; clocks; calendars;
numbers; addition; fractions; geometry; triangles; circles; probability; statistics; Shakespeare;
poetry; novels; fairy tales; theatre; cinema; painting; sculpture; music; the piano; the guitar;
dance; football; basketball; tennis; swimming; chess; the Olympic Games; friendship; family;
school; teachers; homework; holidays; travel; kindness; happiness; fear; time management; health
"""
QUESTIONS = """
What is {}?
Tell me about {}.
Explain {} in simple terms.
Write a short story about {}.
Why does {} matter?
Give me three facts about {}.
Write a short paragraph about {}.
What should a child know about {}?
What is the history of {}?
Write a poem about {}.
What are common mistakes about {}?
How would you describe {}?
I want to learn about {}. Where do I begin?
What is the most interesting thing about {}?
Summarize {} in a sentence.
Is there something dangerous about {}?
Compare {} with {}.
How are {} and {} connected?
Write a letter about {}.
Write two questions about {} and answer them.
Who is known for {}?
"""
TEMPERATURE, TOP_P, LONGEST = 0.7, 0.95, 320  # of an answer; longer ones are cut
ROUND = 512  # conversations that vLLM writes side by side


def questions(count: int, seed: int) -> list[str]:
    """Questions about the topics, drawn by a seed."""
    topics = [topic.strip() for topic in TOPICS.replace("\n", " ").split(";")]
    forms = QUESTIONS.strip().splitlines()
    draw = random.Random(seed)
    chosen = ((draw.choice(forms), draw.sample(topics, 2)) for _ in range(count))
    return [form.format(*pair[: form.count("{}")]) for form, pair in chosen]


def conversation(tokenizer: Any, question: str, answer: str) -> str:
    """A question and its answer between the marks of the model's chat template."""
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer.strip()},
    ]
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def write(model: Path, tokens: int, seed: int) -> str:
    """About `tokens` tokens of conversations with the model."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(model), max_model_len=512, seed=seed)
    tokenizer = llm.get_tokenizer()
    options = SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, max_tokens=LONGEST)
    parts: list[str] = []
    written = 0
    while written < tokens:
        asked = questions(ROUND, seed + len(parts))
        answers = llm.chat([[{"role": "user", "content": q}] for q in asked], options)
        for question, answer in zip(asked, answers, strict=True):
            output = answer.outputs[0]
            written += len(answer.prompt_token_ids or []) + len(output.token_ids)
            if output.finish_reason == "stop":  # an answer that was cut would teach to stop there
                parts.append(conversation(tokenizer, question, output.text))
        print(f"{written} tokens in {len(parts)} conversations", flush=True)
    return "".join(parts)


def main() -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="model directory with a chat template")
    parser.add_argument("out", type=Path, help="text file to write")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="about how many to write")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and the sampling")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    write_whole(args.out, write(args.model, args.tokens, args.seed).encode())


if __name__ == "__main__":
    main()
