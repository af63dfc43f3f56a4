"""The page: a tab for each model, where a history is put together by clicks and the model asked about it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import gradio as gr
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from reclingua.demo.catalogue import MOST_LETTERS, Catalogue
from reclingua.demo.next_item import NextItem
from reclingua.demo.worker import Worker
from reclingua.demo.yes_no import YesOrNo
from reclingua.utils.errors import InputError

HERE = Path(__file__).parent
LOOK = {
    "css_paths": HERE / "page.css",
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
}
WAITING = 32  # requests that wait for a model, and as many for their turn to; one more is told to come back later
SIZES = (5, 10, 20, 50, 100)  # of a list, as far as the search goes
NOTHING_YET = "What comes next is shown here as soon as there is a history; what is popular, at once."
NOTHING_ASKED = "Ask about an item, or take a test rating."
# How events are dealt with. Clicks that change a visit: all of them, one by one. Those that ask a model: of a
# visitor's only the last that waits; they wait in the worker, which knows for how long.
QUICK = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
CHANGES_A_VISIT = QUICK | {"concurrency_id": "visit", "concurrency_limit": 1, "trigger_mode": "multiple"}
ASKS_A_MODEL = {
    "concurrency_id": "model", "concurrency_limit": WAITING, "trigger_mode": "always_last", "api_visibility": "private"
}  # fmt: skip
# The value goes into the page as it is, so the parts below escape what they show. (A template of Gradio's own would
# not do: a title with ${...} in it would be run.)
PICK = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-item]');
  if (button) trigger('pick', {item: button.dataset.item, role: button.dataset.role});
});
"""
loader = FileSystemLoader(HERE)
parts = Environment(
    loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
).get_template("parts.html.jinja")


@dataclass(frozen=True)
class Visit:
    """What a visitor has put together so far."""

    history: tuple[str, ...] = ()
    user: str | None = None  # a test user, if the history is of one
    item: str | None = None  # the item that was really taken next; in the second tab the one in question
    liked: bool | None = None  # whether the user really liked it
    changed: bool = False  # whether the history is not the test user's own any more

    @property
    def whose(self) -> str:
        return f"Test user {self.user}{', history changed' if self.changed else ''}. " if self.user else ""


def part(name: str, *args: object) -> str:
    return getattr(parts.module, name)(*args)


def spoken(name: str, *args: object) -> str:
    """A part that a screen reader reads out when it has changed."""
    return f'<div aria-live="polite">{part(name, *args)}</div>'


def panel(value: str) -> gr.HTML:
    return gr.HTML(value, apply_default_css=False, elem_classes="part", js_on_load=PICK)


def picked(event: gr.EventData, catalogue: Catalogue) -> tuple[str, str]:
    """(item, what it was picked for); ("", "") for what is on no button of the page."""
    given = event._data if isinstance(event._data, dict) else {}
    item, role = given.get("item"), given.get("role")
    return (item, role) if item in catalogue and isinstance(role, str) else ("", "")


def told(work: Callable, *args):
    """work(*args); a warning on the page instead of an InputError."""
    try:
        return work(*args)
    except InputError as error:
        raise gr.Error(escape(str(error)), print_exception=False) from None  # which shows HTML


def reads(items: int, most: int) -> str:
    """What a model makes of a history of so many items."""
    count = f"{items:,} item{'s' if items > 1 else ''}"
    return f"{count}, a click takes one out{f'; the model reads the last {most:,}' if items > most else ''}."


def shelf(
    catalogue: Catalogue,
    roles: list[tuple[str, str]],
    anybody_said: str,
    user_said: str,
    take: Callable[[str], Visit],
    note: Callable[[Visit], str],
) -> gr.State:
    """The left column of a tab: search, history, test user. Returns the visit that is put together there.

    Args:
        roles: what an item that was found can be picked for: (role, what stands on the button). "history" is one.
        anybody_said, user_said: what stands on the button for any test user, and at the box for one.
        take: the visit to a test user of that name, or to any for "".
        note: what to say of a visit below its history.
    """

    def find(query: str) -> str:
        return part("found", [(item, catalogue.title(item)) for item in catalogue.find(query)], roles)

    def show(visit: Visit) -> str:
        newest_first = [(item, catalogue.title(item)) for item in reversed(visit.history)]
        return part("history", newest_first, note(visit))

    def pick(visit: Visit, event: gr.EventData) -> Visit:
        item, role = picked(event, catalogue)
        if role == "history" and item not in visit.history:
            return replace(visit, history=(*visit.history, item), changed=True)
        if role == "ask":
            return replace(visit, item=item, liked=None)
        return visit

    def drop(visit: Visit, event: gr.EventData) -> Visit:
        item, _ = picked(event, catalogue)
        return replace(visit, history=tuple(each for each in visit.history if each != item), changed=True)

    visit = gr.State(Visit())
    query = gr.Textbox(label="Search titles", placeholder="words of a title", max_length=MOST_LETTERS)
    results = panel(find(""))
    gr.Markdown("**History**, newest first")
    history = panel(show(Visit()))
    with gr.Row():
        clear = gr.Button("Clear", size="sm")
        anybody = gr.Button(anybody_said, size="sm")
    user = gr.Textbox(label=user_said, placeholder="a user's id, then Enter", max_length=100)
    query.change(find, query, results, trigger_mode="always_last", **QUICK)
    results.pick(pick, visit, visit, **CHANGES_A_VISIT)
    history.pick(drop, visit, visit, **CHANGES_A_VISIT)
    clear.click(lambda: Visit(), None, visit, **CHANGES_A_VISIT)
    anybody.click(lambda: told(take, ""), None, visit, **CHANGES_A_VISIT)
    user.submit(lambda name: told(take, name), user, visit, **CHANGES_A_VISIT)
    visit.change(show, visit, history, **QUICK)
    return visit


def search_tab(model: NextItem, worker: Worker) -> None:
    """Which item comes next?"""

    def take(name: str) -> Visit:
        user, history, taken = model.test_user(name)
        return Visit(tuple(history), user, taken)

    def note(visit: Visit) -> str:
        if not visit.history:
            return visit.whose + "Click titles above, or take a test user."
        return visit.whose + reads(len(visit.history), model.max_his_len)

    async def recommend(visit: Visit, who: str, k: int, exclude_seen: bool) -> str:
        if not visit.history and who != "popularity":
            return spoken("hint", NOTHING_YET)
        try:
            answer = await worker(model.ask, who, visit.history, k, exclude_seen, visit.item)
        except InputError as error:
            return spoken("problem", str(error))
        taken = model.catalogue.title(visit.item) if visit.item else ""
        return spoken("ranking", answer, who, taken, exclude_seen and visit.item in visit.history)

    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            visit = shelf(model.catalogue, [("history", "add")], "A test user", "A test user by id", take, note)
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                who = gr.Radio(model.recommenders, value=model.name, label="Recommended by", min_width=280)
                sizes = [size for size in SIZES if size < model.num_beams] + [model.num_beams]
                k = gr.Radio(sizes, value=sizes[:2][-1], label="Items", min_width=140)
            exclude_seen = gr.Checkbox(True, label="Leave out what is in the history")
            listed = panel(spoken("hint", NOTHING_YET))
    asked = [visit, who, k, exclude_seen]
    gr.on([each.change for each in asked], recommend, asked, listed, **ASKS_A_MODEL)


def preference_tab(model: YesOrNo, worker: Worker) -> None:
    """Will this user like this item?"""

    def take(name: str) -> Visit:
        rating = model.test_rating(name)
        return Visit(tuple(rating.history), str(rating.user), rating.item, rating.liked)

    def note(visit: Visit) -> str:
        if not visit.history:
            return visit.whose + "Nothing is liked so far: say what is, or take a test rating."
        return visit.whose + reads(len(visit.history), model.record["max_his_len"])

    async def answer(visit: Visit) -> str:
        if visit.item is None:
            return spoken("hint", NOTHING_ASKED)
        user = int(visit.user) if visit.user else None
        try:
            found = await worker(model.ask, user, visit.history, visit.item)
        except InputError as error:
            return spoken("problem", str(error))
        return spoken("verdict", found, model.catalogue.title(visit.item), visit.liked, bool(visit.history))

    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            roles = [("history", "liked"), ("ask", "ask")]
            said = "A test rating", "A test rating of the user with this id"
            visit = shelf(model.catalogue, roles, *said, take, note)
        with gr.Column(scale=3, min_width=320):
            answered = panel(spoken("hint", NOTHING_ASKED))
    visit.change(answer, visit, answered, **ASKS_A_MODEL)


def build(models: dict[str, NextItem | YesOrNo], seconds: float) -> gr.Blocks:
    """The page with a tab for each model, by the tab's name; a request takes `seconds` at most."""
    worker = Worker(seconds)
    with gr.Blocks(title=f"RecLingua: {', '.join(models)}", analytics_enabled=False) as page:
        gr.Markdown("# RecLingua")
        with gr.Tabs():
            for name, model in models.items():
                searches = isinstance(model, NextItem)
                with gr.Tab(f"{name} on {model.dataset.name}: {'what comes next?' if searches else 'Yes or No?'}"):
                    (search_tab if searches else preference_tab)(model, worker)
    return page.queue(max_size=WAITING, api_open=False)
