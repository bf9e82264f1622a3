import chat_text
from chat_text import conversation, questions


def test_a_seed_asks_the_same_questions_and_another_one_others() -> None:
    first = questions(40, 0)
    assert first == questions(40, 0) != questions(40, 1)
    assert len(set(first)) > 30
    assert not any("{" in question or "\n" in question for question in first)


def test_a_question_about_two_topics_names_two() -> None:
    topics = [topic.strip() for topic in chat_text.TOPICS.replace("\n", " ").split(";")]
    assert all(topics) and len(topics) == len(set(topics)) > 150
    pairs = [q for q in questions(400, 0) if q.startswith("Compare ")]
    assert pairs
    for pair in pairs:
        one, other = pair.removeprefix("Compare ").removesuffix(".").split(" with ")
        assert one in topics and other in topics and one != other


def test_a_conversation_has_the_marks_of_the_template() -> None:
    class Tokenizer:
        def apply_chat_template(self, messages, tokenize):
            assert not tokenize
            return "".join(f"<{m['role']}>{m['content']}</>" for m in messages)

    assert conversation(Tokenizer(), "Why?", " So. \n") == "<user>Why?</><assistant>So.</>"
