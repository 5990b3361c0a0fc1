"""The two-minute quiz at the end of a notebook: buttons to choose with, and a version for print."""

import json
from functools import partial
from pathlib import Path

import ipywidgets as widgets
from IPython.display import display

QUESTIONS = json.loads(Path(__file__).with_name("quiz.json").read_text(encoding="utf-8"))
LETTERS = "abc"


class Quiz(widgets.VBox):
    """The questions of a lesson ("00" to "07"). `chosen(i, k)` is what a click on answer k of
    question i does; `right` tells how many are right so far. Where no widget can live, on
    GitHub and in print, `printed` stands in."""

    def __init__(self, lesson: str):
        if lesson not in QUESTIONS:
            raise ValueError(f"no quiz {lesson!r}: take one of {', '.join(QUESTIONS)}")
        self.lesson, self.questions, self.solved, rows = lesson, QUESTIONS[lesson], set(), []
        self.said = [widgets.HTML() for _ in self.questions]
        for i, q in enumerate(self.questions):
            wide = widgets.Layout(width="auto")
            buttons = [widgets.Button(description=o, layout=wide) for o in q["options"]]
            for k, button in enumerate(buttons):
                button.on_click(partial(lambda i, k, _: self.chosen(i, k), i, k))
            title = widgets.HTML(f"<b>{i + 1} · {q['question']}</b>")
            rows.append(widgets.VBox([title, widgets.HBox(buttons), self.said[i]]))
        self.score = widgets.HTML()
        super().__init__([*rows, self.score])

    def _repr_mimebundle_(self, **more) -> dict:
        return super()._repr_mimebundle_(**more) | {"text/markdown": printed(self.lesson)}

    @property
    def right(self) -> int:
        return len(self.solved)

    def chosen(self, i: int, k: int) -> None:
        q = self.questions[i]
        if k == q["answer"]:
            self.solved.add(i)
        self.said[i].value = f"✓ {q['why']}" if k == q["answer"] else "✗ not this one: think again"
        self.score.value = f"{self.right} of {len(self.questions)} right"


def printed(lesson: str) -> str:
    """The quiz as Markdown, answers folded."""
    lines, answers = [], []
    for i, q in enumerate(QUESTIONS[lesson], 1):
        options = " · ".join(f"({a}) {o}" for a, o in zip(LETTERS, q["options"], strict=True))
        lines.append(f"{i}. {q['question']}<br>{options}")
        answers.append(f"{i}. ({LETTERS[q['answer']]}) {q['why']}")
    fold = "<details><summary>Answers</summary>\n\n" + "\n".join(answers) + "\n\n</details>"
    return "\n".join(lines) + "\n\n" + fold


def ask(lesson: str) -> None:
    """Show the quiz of a lesson ("00" to "07")."""
    display(Quiz(lesson))
