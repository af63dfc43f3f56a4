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
THEME = {
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
SESSION_EVENTS = QUICK | {"concurrency_id": "visit", "concurrency_limit": 1, "trigger_mode": "multiple"}
MODEL_EVENTS = {
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
class Session:
    """What a visitor has put together so far."""

    history: tuple[str, ...] = ()
    user: str | None = None  # a test user, if the history is of one
    item: str | None = None  # the item that was really taken next; in the second tab the one in question
    liked: bool | None = None  # whether the user really liked it
    changed: bool = False  # whether the history is not the test user's own any more

    @property
    def owner_label(self) -> str:
        return f"Test user {self.user}{', history changed' if self.changed else ''}. " if self.user else ""


def part(name: str, *args: object) -> str:
    return getattr(parts.module, name)(*args)


def aria_live(name: str, *args: object) -> str:
    """A part that a screen reader reads out when it has changed."""
    return f'<div aria-live="polite">{part(name, *args)}</div>'


def html_panel(value: str) -> gr.HTML:
    return gr.HTML(value, apply_default_css=False, elem_classes="part", js_on_load=PICK)


def picked(event: gr.EventData, catalogue: Catalogue) -> tuple[str, str]:
    """(item, what it was picked for); ("", "") for what is on no button of the page."""
    given = event._data if isinstance(event._data, dict) else {}
    item, role = given.get("item"), given.get("role")
    return (item, role) if item in catalogue and isinstance(role, str) else ("", "")


def or_gradio_error(work: Callable, *args):
    """work(*args); a warning on the page instead of an InputError."""
    try:
        return work(*args)
    except InputError as error:
        raise gr.Error(escape(str(error)), print_exception=False) from None  # which shows HTML


def reads(items: int, most: int) -> str:
    """What a model makes of a history of so many items."""
    count = f"{items:,} item{'s' if items > 1 else ''}"
    return f"{count}, a click takes one out{f'; the model reads the last {most:,}' if items > most else ''}."


def build_history_column(
    catalogue: Catalogue,
    roles: list[tuple[str, str]],
    anybody_said: str,
    user_said: str,
    take: Callable[[str], Session],
    note: Callable[[Session], str],
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

    def show(session: Session) -> str:
        newest_first = [(item, catalogue.title(item)) for item in reversed(session.history)]
        return part("history", newest_first, note(session))

    def pick(session: Session, event: gr.EventData) -> Session:
        item, role = picked(event, catalogue)
        if role == "history" and item not in session.history:
            return replace(session, history=(*session.history, item), changed=True)
        if role == "ask":
            return replace(session, item=item, liked=None)
        return session

    def drop(session: Session, event: gr.EventData) -> Session:
        item, _ = picked(event, catalogue)
        return replace(session, history=tuple(each for each in session.history if each != item), changed=True)

    session = gr.State(Session())
    query = gr.Textbox(label="Search titles", placeholder="words of a title", max_length=MOST_LETTERS)
    results = html_panel(find(""))
    gr.Markdown("**History**, newest first")
    history = html_panel(show(Session()))
    with gr.Row():
        clear = gr.Button("Clear", size="sm")
        anybody = gr.Button(anybody_said, size="sm")
    user = gr.Textbox(label=user_said, placeholder="a user's id, then Enter", max_length=100)
    query.change(find, query, results, trigger_mode="always_last", **QUICK)
    results.pick(pick, session, session, **SESSION_EVENTS)
    history.pick(drop, session, session, **SESSION_EVENTS)
    clear.click(lambda: Session(), None, session, **SESSION_EVENTS)
    anybody.click(lambda: or_gradio_error(take, ""), None, session, **SESSION_EVENTS)
    user.submit(lambda name: or_gradio_error(take, name), user, session, **SESSION_EVENTS)
    session.change(show, session, history, **QUICK)
    return session


def next_item_tab(model: NextItem, worker: Worker) -> None:
    """Which item comes next?"""

    def take(name: str) -> Session:
        user, history, taken = model.test_user(name)
        return Session(tuple(history), user, taken)

    def note(session: Session) -> str:
        if not session.history:
            return session.owner_label + "Click titles above, or take a test user."
        return session.owner_label + reads(len(session.history), model.max_his_len)

    async def recommend(session: Session, who: str, k: int, exclude_seen: bool) -> str:
        if not session.history and who != "popularity":
            return aria_live("hint", NOTHING_YET)
        try:
            answer = await worker(model.ask, who, session.history, k, exclude_seen, session.item)
        except InputError as error:
            return aria_live("problem", str(error))
        taken = model.catalogue.title(session.item) if session.item else ""
        return aria_live("ranking", answer, who, taken, exclude_seen and session.item in session.history)

    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            session = build_history_column(
                model.catalogue, [("history", "add")], "A test user", "A test user by id", take, note
            )
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                who = gr.Radio(model.recommenders, value=model.name, label="Recommended by", min_width=280)
                sizes = [size for size in SIZES if size < model.num_beams] + [model.num_beams]
                k = gr.Radio(sizes, value=sizes[:2][-1], label="Items", min_width=140)
            exclude_seen = gr.Checkbox(True, label="Leave out what is in the history")
            listed = html_panel(aria_live("hint", NOTHING_YET))
    asked = [session, who, k, exclude_seen]
    gr.on([each.change for each in asked], recommend, asked, listed, **MODEL_EVENTS)


def yes_no_tab(model: YesOrNo, worker: Worker) -> None:
    """Will this user like this item?"""

    def take(name: str) -> Session:
        rating = model.test_rating(name)
        return Session(tuple(rating.history), str(rating.user), rating.item, rating.liked)

    def note(session: Session) -> str:
        if not session.history:
            return session.owner_label + "Nothing is liked so far: say what is, or take a test rating."
        return session.owner_label + reads(len(session.history), model.record["max_his_len"])

    async def answer(session: Session) -> str:
        if session.item is None:
            return aria_live("hint", NOTHING_ASKED)
        user = int(session.user) if session.user else None
        try:
            found = await worker(model.ask, user, session.history, session.item)
        except InputError as error:
            return aria_live("problem", str(error))
        return aria_live("verdict", found, model.catalogue.title(session.item), session.liked, bool(session.history))

    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            roles = [("history", "liked"), ("ask", "ask")]
            said = "A test rating", "A test rating of the user with this id"
            session = build_history_column(model.catalogue, roles, *said, take, note)
        with gr.Column(scale=3, min_width=320):
            answered = html_panel(aria_live("hint", NOTHING_ASKED))
    session.change(answer, session, answered, **MODEL_EVENTS)


def build(models: dict[str, NextItem | YesOrNo], seconds: float) -> gr.Blocks:
    """The page with a tab for each model, by the tab's name; a request takes `seconds` at most."""
    worker = Worker(seconds)
    with gr.Blocks(title=f"RecLingua: {', '.join(models)}", analytics_enabled=False) as page:
        gr.Markdown("# RecLingua")
        with gr.Tabs():
            for name, model in models.items():
                searches = isinstance(model, NextItem)
                with gr.Tab(f"{name} on {model.dataset.name}: {'what comes next?' if searches else 'Yes or No?'}"):
                    (next_item_tab if searches else yes_no_tab)(model, worker)
    return page.queue(max_size=WAITING, api_open=False)
