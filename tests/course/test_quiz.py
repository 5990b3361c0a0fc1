"""The quizzes: whole, fair, and clickable."""

import re

import pytest

from realsr_r1.course import notebooks, quiz


@pytest.mark.parametrize("lesson", quiz.QUESTIONS)
def test_questions_are_whole(lesson):
    for q in quiz.QUESTIONS[lesson]:
        assert set(q) == {"question", "options", "answer", "why"}
        assert len(set(q["options"])) == 3 and q["answer"] in range(3)
        assert all(q[k].strip() for k in ("question", "why"))
    printed = quiz.printed(lesson)
    assert printed.index("<details>") > printed.index(quiz.QUESTIONS[lesson][-1]["question"])


def test_the_right_answer_stands_anywhere():
    places = [q["answer"] for v in quiz.QUESTIONS.values() for q in v]
    assert all(places.count(k) > len(places) / 5 for k in range(3))


def test_clicks_are_counted():
    page = quiz.Quiz("03")
    answer = page.questions[0]["answer"]
    page.children[0].children[1].children[(answer + 1) % 3].click()
    assert page.right == 0 and "✗" in page.said[0].value
    page.children[0].children[1].children[answer].click()
    page.chosen(0, answer)
    assert page.right == 1 and "✓" in page.said[0].value
    assert page.score.value == f"1 of {len(page.questions)} right"


def test_a_quiz_can_be_read_where_no_widget_lives():
    found = quiz.Quiz("03")._repr_mimebundle_()
    assert found["text/markdown"] == quiz.printed("03")
    assert "application/vnd.jupyter.widget-view+json" in found


def test_each_notebook_ends_with_its_quiz():
    for path in notebooks.notebooks():
        sources = [c.source for c in notebooks.read(path).cells]
        asked = [re.findall(r'quiz\.ask\("(\d\d)"\)', s) for s in sources]
        assert asked[-1] == [path.name[:2]], f"{path.name}: the quiz stands at the end"
        assert not any(asked[:-1])


def test_another_lesson_is_refused():
    with pytest.raises(ValueError, match="no quiz '9'"):
        quiz.Quiz("9")
