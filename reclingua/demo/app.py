"""Gradio page of the demo: a tab for each model, in which a history is put together and the model is asked."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from reclingua.demo.next_item import NextItem
from reclingua.demo.worker import Worker
from reclingua.demo.yes_no import YesOrNo
from reclingua.inference.catalogue import MAX_QUERY_LENGTH, Catalogue
from reclingua.utils.errors import InputError

FOLDER = Path(__file__).parent
THEME: dict[str, Any] = {
    "css_paths": FOLDER / "page.css",
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
}
MAX_WAITING = 32  # requests that wait for a model, and as many in Gradio's queue; more are refused
LIST_LENGTHS = (5, 10, 20, 50, 100)  # to choose from, up to the number of beams
RANKING_HINT = "Recommendations appear here once the history has an item. Popularity needs no history."
VERDICT_HINT = 'Choose an item by its button "ask", or load a test rating.'
# Options of Gradio's event listeners.
FAST_EVENTS: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
# Clicks that change a session are all processed, one by one.
SESSION_EVENTS = FAST_EVENTS | {"concurrency_id": "session", "concurrency_limit": 1, "trigger_mode": "multiple"}
# Of a visitor's requests to a model only the last one waits. They wait in the worker, which knows for how long.
MODEL_EVENTS: dict[str, Any] = {
    "concurrency_id": "model",
    "concurrency_limit": MAX_WAITING,
    "trigger_mode": "always_last",
    "api_visibility": "private",
}
# Gradio inserts the value of an HTML component unescaped, so parts.html.jinja escapes it. (Gradio's own HTML templates
# would execute a title that contains ${...}.)
ON_LOAD = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-item]');
  if (button) trigger('pick', {item: button.dataset.item, role: button.dataset.role});
});
"""
loader = FileSystemLoader(FOLDER)
parts = Environment(
    loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
).get_template("parts.html.jinja")


@dataclass(frozen=True)
class Session:
    """What a visitor has put together in a tab. Equal sessions trigger no event."""

    history: tuple[str, ...] = ()
    user: str | None = None  # test user that the history was loaded from
    item: str | None = None  # next-item tab: item that the test user took next; Yes/No tab: item in question
    liked: bool | None = None  # whether the test user liked it
    changed: bool = False  # whether the history differs from the test user's

    @property
    def owner_label(self) -> str:
        return f"Test user {self.user}{', history changed' if self.changed else ''}. " if self.user else ""


def render_part(name: str, *args: object) -> str:
    """Return the HTML of a macro of parts.html.jinja."""
    return getattr(parts.module, name)(*args)


def aria_live(name: str, *args: object) -> str:
    """Return the HTML of a part that screen readers read out when it changes."""
    return f'<div aria-live="polite">{render_part(name, *args)}</div>'


def html_panel(value: str) -> gr.HTML:
    """Return a panel that triggers `pick` when one of its item buttons is clicked."""
    return gr.HTML(value, apply_default_css=False, elem_classes="part", js_on_load=ON_LOAD)


def parse_pick(event: gr.EventData, catalogue: Catalogue) -> tuple[str, str]:
    """Return (item, role) of a click on an item button; ("", "") for an event that no button of the page sends."""
    data = event._data if isinstance(event._data, dict) else {}
    item, role = data.get("item"), data.get("role")
    return (item, role) if isinstance(item, str) and item in catalogue and isinstance(role, str) else ("", "")


def or_gradio_error(work: Callable, *args):
    """Return work(*args); an InputError becomes a warning on the page."""
    try:
        return work(*args)
    except InputError as error:
        raise gr.Error(escape(str(error)), print_exception=False) from None  # gr.Error shows HTML


def describe_length(num_items: int, max_his_len: int) -> str:
    """Return the note on the length of a history that is not empty."""
    count = f"{num_items:,} item{'s' if num_items > 1 else ''}"
    truncated = f" The model reads the last {max_his_len:,}." if num_items > max_his_len else ""
    return f"{count}; click an item to remove it.{truncated}"


def build_history_column(
    catalogue: Catalogue,
    roles: list[tuple[str, str]],
    random_label: str,
    user_label: str,
    load_session: Callable[[str], Session],
    note: Callable[[Session], str],
) -> gr.State:
    """Build the left column of a tab (search, history, test user) and return the state of its session.

    Args:
        roles: (role, label) of the buttons of each item found; "history" adds it to the history, "ask" asks about it.
        random_label: label of the button that loads a random test user.
        user_label: label of the box for the id of a test user.
        load_session: user id -> session of that test user; "" -> that of a random one.
        note: session -> the text below its history.
    """

    def find(query: str) -> str:
        items = [(item, catalogue.title(item)) for item in catalogue.find(query)]
        return render_part("search_results", items, roles)

    def show(session: Session) -> str:
        newest_first = [(item, catalogue.title(item)) for item in reversed(session.history)]
        return render_part("history", newest_first, note(session))

    def pick(session: Session, event: gr.EventData) -> Session:
        item, role = parse_pick(event, catalogue)
        if role == "history" and item not in session.history:
            return replace(session, history=(*session.history, item), changed=True)
        if role == "ask":
            return replace(session, item=item, liked=None)
        return session

    def remove(session: Session, event: gr.EventData) -> Session:
        removed, _ = parse_pick(event, catalogue)
        return replace(session, history=tuple(item for item in session.history if item != removed), changed=True)

    session = gr.State(Session())
    query = gr.Textbox(label="Search titles", placeholder="words of a title", max_length=MAX_QUERY_LENGTH)
    results = html_panel(find(""))
    gr.Markdown("**History**, newest first")
    history = html_panel(show(Session()))
    with gr.Row():
        clear = gr.Button("Clear", size="sm")
        random_user = gr.Button(random_label, size="sm")
    user = gr.Textbox(label=user_label, placeholder="a user's id, then Enter", max_length=100)
    query.change(find, query, results, trigger_mode="always_last", **FAST_EVENTS)
    results.pick(pick, session, session, **SESSION_EVENTS)
    history.pick(remove, session, session, **SESSION_EVENTS)
    clear.click(lambda: Session(), None, session, **SESSION_EVENTS)
    random_user.click(lambda: or_gradio_error(load_session, ""), None, session, **SESSION_EVENTS)
    user.submit(lambda name: or_gradio_error(load_session, name), user, session, **SESSION_EVENTS)
    session.change(show, session, history, **FAST_EVENTS)
    return session


def build_next_item_tab(model: NextItem, worker: Worker) -> None:
    """Build the tab of a next-item model: history on the left, recommendations on the right."""

    def load_session(name: str) -> Session:
        user, history, target = model.test_user(name)
        return Session(tuple(history), user, target)

    def note(session: Session) -> str:
        if not session.history:
            return session.owner_label + "Click titles above to add them, or load a test user."
        return session.owner_label + describe_length(len(session.history), model.max_his_len)

    async def recommend(session: Session, name: str, k: int, exclude_seen: bool) -> str:
        if not session.history and name != "popularity":
            return aria_live("hint", RANKING_HINT)
        try:
            answer = await worker(model.ask, name, session.history, k, exclude_seen, session.item)
        except InputError as error:
            return aria_live("problem", str(error))
        target = model.catalogue.title(session.item) if session.item else ""
        return aria_live("ranking", answer, name, target, exclude_seen and session.item in session.history)

    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            labels = "Load a test user", "Test user ID"
            session = build_history_column(model.catalogue, [("history", "add")], *labels, load_session, note)
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                name = gr.Radio(model.recommenders, value=model.name, label="Recommender", min_width=280)
                lengths = [length for length in LIST_LENGTHS if length < model.num_beams] + [model.num_beams]
                k = gr.Radio(lengths, value=lengths[:2][-1], label="List length", min_width=140)
            exclude_seen = gr.Checkbox(True, label="Exclude items of the history")
            ranking = html_panel(aria_live("hint", RANKING_HINT))
    inputs = [session, name, k, exclude_seen]
    changes = [session.change, name.change, k.change, exclude_seen.change]
    gr.on(changes, recommend, inputs, ranking, **MODEL_EVENTS)


def build_yes_no_tab(model: YesOrNo, worker: Worker) -> None:
    """Build the tab of a Yes/No model: liked items on the left, the predicted probability on the right."""

    def load_session(name: str) -> Session:
        rating = model.test_rating(name)
        return Session(tuple(rating.history), str(rating.user), rating.item, rating.liked)

    def note(session: Session) -> str:
        if not session.history:
            return session.owner_label + "The history is empty: mark items as liked above, or load a test rating."
        return session.owner_label + describe_length(len(session.history), model.max_his_len)

    async def predict(session: Session) -> str:
        if session.item is None:
            return aria_live("hint", VERDICT_HINT)
        user = int(session.user) if session.user else None
        try:
            answer = await worker(model.ask, user, session.history, session.item)
        except InputError as error:
            return aria_live("problem", str(error))
        return aria_live("verdict", answer, model.catalogue.title(session.item), session.liked, bool(session.history))

    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            roles = [("history", "liked"), ("ask", "ask")]
            labels = "Load a test rating", "Test user ID of a rating"
            session = build_history_column(model.catalogue, roles, *labels, load_session, note)
        with gr.Column(scale=3, min_width=320):
            verdict = html_panel(aria_live("hint", VERDICT_HINT))
    session.change(predict, session, verdict, **MODEL_EVENTS)


def build_page(models: dict[str, NextItem | YesOrNo], timeout: float) -> gr.Blocks:
    """Build the page with a tab for each model, by the tab's name; a request can take `timeout` seconds."""
    worker = Worker(timeout)
    with gr.Blocks(title=f"RecLingua: {', '.join(models)}", analytics_enabled=False) as page:
        gr.Markdown("# RecLingua")
        with gr.Tabs():
            for name, model in models.items():
                if isinstance(model, NextItem):
                    with gr.Tab(f"{name} on {model.dataset.name}: next item"):
                        build_next_item_tab(model, worker)
                else:
                    with gr.Tab(f"{name} on {model.dataset.name}: Yes/No"):
                        build_yes_no_tab(model, worker)
    return page.queue(max_size=MAX_WAITING, api_open=False)
