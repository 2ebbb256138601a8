"""Run an assistant model on IFEval and InFoBench: responses, the evaluator's answers, official figures.

The model writes one response to each prompt and is closed; for InFoBench the evaluator is loaded after it, so two
models need not fit in memory together. What was written is in the store (`replies.py`): the same command goes on where
a run was stopped, and a response of another model, or by other settings, is never taken for this one's.

A thought that a model left in its response (`<think>...</think>` at its beginning) is taken out before it is scored,
and counted. A response that stopped at the limit of tokens is scored as it is, and counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from patarm_lite import __version__
from patarm_lite.errors import UserError
from patarm_lite.evals import ifeval, infobench
from patarm_lite.evals.assistant import Assistant, Drawing, Read, Reply, open_assistant
from patarm_lite.evals.assistant_data import AssistantBenchmark, Loaded
from patarm_lite.evals.drawn import say
from patarm_lite.evals.ifeval import Checkers, Followed, IfevalItem
from patarm_lite.evals.infobench import Evaluated, InfobenchItem
from patarm_lite.evals.named_judge import is_url
from patarm_lite.evals.replies import Replies
from patarm_lite.progress import Progress, span
from patarm_lite.records import Turn
from patarm_lite.store import Job, Store

SCHEMA = 1
EVALUATOR_TOKENS = 64
"""Of one answer of the evaluator, by default: it is asked for one word."""
LIVE = 32
"""Instructions whose questions are asked side by side: as many as llama.cpp keeps in its cache by default."""
_THOUGHT = re.compile(r"\A\s*(?:<think>)?(?:(?!<think>).)*?</think>\s*", re.DOTALL)
_ENDLESS = re.compile(r"\A\s*<think>.*\Z", re.DOTALL)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model that is not loaded yet. `place`: as it was typed. `check` raises UserError once its file is no longer the
    one that was there when it was named."""

    place: str
    load: Callable[[], Assistant]
    check: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Wrote:
    """Which model wrote, how it was asked, how much it wrote now and how long that took."""

    place: str
    fingerprint: str
    backend: str
    tokens: str
    settings: str
    about: str
    needed: int
    drawn: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Response:
    """A response as it is scored. `thought`: whether one was taken out of it."""

    text: str
    ended: bool
    tokens: int
    thought: bool


@dataclass(frozen=True, slots=True)
class Scored:
    """A benchmark with the model's responses and what was found of each."""

    loaded: Loaded
    responses: Sequence[Response]
    found: Sequence[Followed] | Sequence[Evaluated]
    answers: Sequence[Sequence[str]] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def named_model(place: str, **settings: Any) -> NamedModel:
    """A model by its name; `settings` as for `open_assistant`."""
    from patarm_lite.judge.verbs import unchanged

    check = unchanged(None if is_url(place) else Path(place))
    return NamedModel(place, lambda: open_assistant(place, **settings), check)


def check_evaluator(evaluator: NamedModel) -> None:
    """Refuse an evaluator that can't be one, before anything is generated for it. No weights are loaded.

    Raises:
        UserError: nothing there, a file that can't be used, a template without a second question, no server.
    """
    path = Path(evaluator.place)
    if is_url(evaluator.place):
        with evaluator.load():
            return
    if path.is_file():
        from patarm_lite.gguf_file import read_gguf
        from patarm_lite.judge.frame import read_template
        from patarm_lite.judge.loading import check_header

        check_header(path)
        try:
            if read_template(read_gguf(path).metadata).between is None:
                raise UserError("its chat template takes no second question; take another evaluator")
        except UserError as error:
            raise UserError(f"evaluator {path}: {error}") from None
    elif path.is_dir():
        from patarm_lite.judge.transformers_backend import judge_folder

        judge_folder(path)
    elif "/" not in evaluator.place or evaluator.place.endswith(".gguf"):
        raise UserError(f"evaluator {evaluator.place!r} not found; give a GGUF file, a folder, a hub id or a URL")


def run(
    model: NamedModel,
    evaluator: NamedModel | None,
    benchmarks: Sequence[Loaded],
    drawing: Drawing,
    store: Store,
    seed: int = 1,
    evaluator_tokens: int = EVALUATOR_TOKENS,
) -> tuple[Json, list[Scored]]:
    """Generate, evaluate, score: everything that is said of it as plain JSON values, and the responses.

    Args:
        evaluator: for InFoBench. seed: of the intervals.

    Raises:
        UserError: no evaluator, a library that is missing, instructions that can't be checked, a model that can't go
            on. What was written is kept.
    """
    asked = {loaded.benchmark.name: loaded for loaded in benchmarks}
    checkers = None
    if "ifeval" in asked:
        checkers = Checkers.load()
        checkers.check(_ifeval_items(asked["ifeval"]))
    if "infobench" in asked:
        if evaluator is None:
            raise UserError(
                "InFoBench asks another model yes/no questions about each response: name it with --evaluator MODEL (a "
                "GGUF file, a folder, a hub id or a URL), or leave InFoBench out with --on ifeval"
            )
        check_evaluator(evaluator)
    wrote, responses = _responses(model, benchmarks, drawing, store)
    scored, judged = [], None
    for name, loaded in asked.items():
        if name == "ifeval":
            assert checkers is not None
            scored.append(_checked(loaded, responses[name], checkers))
        else:
            assert evaluator is not None
            judged, one = _evaluated(evaluator, loaded, responses[name], store, Drawing(evaluator_tokens))
            scored.append(one)
    found = {
        "schema": SCHEMA,
        "version": __version__,
        "seed": seed,
        "model": asdict(wrote),
        "evaluator": None if judged is None else asdict(judged),
        "benchmarks": {one.loaded.benchmark.name: _about(one, seed) for one in scored},
    }
    return found, scored


def without_thought(text: str) -> str:
    """A text without the thought at its beginning; nothing where the thought never ends.

    >>> without_thought("<think>so</think>\\n\\nYes."), without_thought("so\\n</think>Yes."), without_thought("Yes.")
    ('Yes.', 'Yes.', 'Yes.')
    >>> without_thought("<think>so and so"), without_thought("Write <think>...</think>.")
    ('', 'Write <think>...</think>.')
    """
    shorter = _THOUGHT.sub("", text, count=1)
    return "" if shorter == text and _ENDLESS.match(text) else shorter


def _ifeval_items(loaded: Loaded) -> list[IfevalItem]:
    return [item for item in loaded.items if isinstance(item, IfevalItem)]


def _infobench_items(loaded: Loaded) -> list[InfobenchItem]:
    return [item for item in loaded.items if isinstance(item, InfobenchItem)]


# --- responses ---


def _responses(
    named: NamedModel, benchmarks: Sequence[Loaded], drawing: Drawing, store: Store
) -> tuple[Wrote, dict[str, list[Response]]]:
    with named.load() as model:
        reads: dict[str, list[Read]] = {}
        for loaded in benchmarks:
            title, name = loaded.benchmark.title, loaded.benchmark.name
            reads[name] = [model.read([Turn("user", item.prompt)]) for item in loaded.items]
            for item, read in zip(loaded.items, reads[name], strict=True):
                if not _fits(model, read, drawing):
                    raise UserError(
                        f"{title}, item {item.id!r}: {len(read)} tokens and up to {drawing.max_tokens} for the "
                        f"response don't fit the context of {model.context}; give a larger --context (as far as the "
                        "model has one) or fewer --max-tokens"
                    )
        every = [read for found in reads.values() for read in found]
        asking = Replies(model, drawing, store, named.check, "responses")
        job = _job(model, benchmarks, drawing.words)
        _say_model("model", named, model, drawing.words)
        for loaded in benchmarks:
            part = f" ({loaded.part})" if loaded.part else ""
            say(f"  {loaded.benchmark.title}{part}: {len(loaded.items)} responses; from {loaded.source}")
        missing = asking.missing(every)
        say(f"  {len(every)} responses needed, {len(every) - missing} in the store, {missing} to be generated")
        _say_store(store, job)
        written = asking.all(every)
        store.finish(job, "", "")
        if asking.drawn:
            say(f"  {asking.drawn} responses in {span(asking.seconds)}")
        found, start = {}, 0
        for name, chats in reads.items():
            found[name] = [_response(reply) for reply in written[start : start + len(chats)]]
            start += len(chats)
        return _wrote(named, asking, len(every)), found


def _response(reply: Reply) -> Response:
    text = without_thought(reply.text)
    return Response(text, reply.ended, reply.tokens, text != reply.text)


def _fits(model: Assistant, read: Read, drawing: Drawing) -> bool:
    """Whether there is room for a reply; a server that gets messages is left to say so itself."""
    return model.form != "exact" or model.context is None or len(read) + drawing.max_tokens <= model.context


def _job(model: Assistant, benchmarks: Sequence[Loaded], settings: str) -> Job:
    what = ",".join(f"{loaded.benchmark.name}:{loaded.sha256[:12]}:{len(loaded.items)}" for loaded in benchmarks)
    return Job("bench-model", what, "-", model.fingerprint, settings)


def _wrote(named: NamedModel, asking: Replies, needed: int) -> Wrote:
    model = asking.model
    settings, about = asking.drawing.words, model.about
    seconds = round(asking.seconds, 3)
    return Wrote(named.place, model.fingerprint, model.name, model.form, settings, about, needed, asking.drawn, seconds)


def _say_model(what: str, named: NamedModel, model: Assistant, settings: str) -> None:
    about = f"; {model.about}" if model.about else ""
    who = f"{what} {named.place} (fingerprint {model.fingerprint[:12]}, {model.name}, tokens {model.form})"
    say(f"{who}, {settings}{about}")


def _say_store(store: Store, job: Job) -> None:
    say(f"  replies are {'kept nowhere' if store.path is None else f'kept, in clear, in {store.path}'}")
    if store.begin(job) is not None and store.finished(job) is None:
        say("  going on with a run that was stopped")
    for other in store.other_judges(job)[:1]:
        say(f"  the same was begun with another model (fingerprint {other[:12]}); its replies don't count for this one")
    for settings in store.other_settings(job)[:1]:
        say(f"  the same was begun with other settings ({settings}); those replies don't count for these")


# --- IFEval ---


def _checked(loaded: Loaded, responses: Sequence[Response], checkers: Checkers) -> Scored:
    items = _ifeval_items(loaded)
    found = [checkers.followed(item, response.text) for item, response in zip(items, responses, strict=True)]
    counts = checkers.stand_ins(items)
    note = ifeval.stand_in_note(counts, sum(len(item.instructions) for item in items))
    return Scored(loaded, responses, found, about={"stand_in": counts}, notes=[note] if note else [])


# --- InFoBench ---


def _evaluated(
    named: NamedModel, loaded: Loaded, responses: Sequence[Response], store: Store, drawing: Drawing
) -> tuple[Wrote, Scored]:
    items = _infobench_items(loaded)
    with named.load() as model:
        asking = Replies(model, drawing, store, named.check, "answers")
        dialogues = [_Dialogue(model, asking, item, one.text) for item, one in zip(items, responses, strict=True)]
        _say_model("evaluator", named, model, drawing.words)
        questions = sum(len(item.questions) for item in items)
        for dialogue in dialogues:
            dialogue.go_on()
        known = sum(len(dialogue.answers) for dialogue in dialogues)
        left = sum(dialogue.left for dialogue in dialogues)
        say(f"  {questions} questions, {known} answers in the store, at most {left} to be given")
        job = _job(model, [loaded], f"{drawing.words}, about {_digest(responses)}")
        _say_store(store, job)
        _ask(dialogues, asking, left)
        store.finish(job, "", "")
        if asking.drawn:
            say(f"  {asking.drawn} answers in {span(asking.seconds)}")
        wrote = _wrote(named, asking, questions)
    found = [
        Evaluated(item.id, item.subset, tuple(dialogue.verdicts), len(item.questions), item.labels)
        for item, dialogue in zip(items, dialogues, strict=True)
    ]
    too_long = sum(dialogue.too_long for dialogue in dialogues)
    notes = []
    if too_long:
        notes.append(
            f"{too_long} instructions with their response don't fit the evaluator's context of {model.context} tokens: "
            "the question that didn't fit counts as one whose answer can't be read."
        )
    thoughts = sum(dialogue.thoughts for dialogue in dialogues)
    if thoughts:
        notes.append(f"A thought was taken out of {thoughts} answers of the evaluator.")
    answers = [dialogue.answers for dialogue in dialogues]
    return wrote, Scored(loaded, responses, found, answers, {"too_long": too_long}, notes)


def _digest(responses: Sequence[Response]) -> str:
    import hashlib

    return hashlib.sha256("\0".join(one.text for one in responses).encode("utf-8", "replace")).hexdigest()[:12]


class _Dialogue:
    """The growing chat about one instruction.

    Attributes:
        answers: as the evaluator wrote them. verdicts: as they are read. read: what is asked next; None: it is over.
    """

    def __init__(self, model: Assistant, asking: Replies, item: InfobenchItem, response: str) -> None:
        self.model, self.asking, self.item, self.response = model, asking, item, response
        self.answers: list[str] = []
        self.verdicts: list[bool | None] = []
        self.read: Read | None = None
        self.too_long, self.thoughts = False, 0

    @property
    def left(self) -> int:
        """Questions that may still be asked."""
        return 0 if self.read is None else len(self.item.questions) - len(self.answers)

    def go_on(self) -> None:
        """Take in every answer that is kept, up to the question that has none."""
        self.read = None
        while not infobench.is_over(self.item, self.verdicts):
            read = self.model.read(infobench.dialogue(self.item, self.response, self.answers))
            if not _fits(self.model, read, self.asking.drawing):
                self.too_long = True
                self.verdicts.append(None)
                return
            reply = self.asking.known(read)
            if reply is None:
                self.read = read
                return
            answer = without_thought(reply.text)
            self.thoughts += answer != reply.text
            self.answers.append(answer)
            self.verdicts.append(infobench.read_answer(answer))


def _ask(dialogues: Sequence[_Dialogue], asking: Replies, left: int) -> None:
    """Ask what is still to be asked, some instructions side by side, question by question."""
    waiting = [dialogue for dialogue in dialogues if dialogue.read is not None]
    asking.progress = Progress(asking.label, left, even=False) if left else None
    for start in range(0, len(waiting), LIVE):
        live = waiting[start : start + LIVE]
        while live:
            asking.draw([dialogue.read for dialogue in live if dialogue.read is not None])
            for dialogue in live:
                dialogue.go_on()
            live = [dialogue for dialogue in live if dialogue.read is not None]
        rest = sum(dialogue.left for dialogue in waiting)
        if not start and rest:
            each = asking.seconds / max(1, asking.drawn)
            say(f"  warm-up: {1 / each:.2f} answers a second; the other {rest} take about {span(rest * each)} at most")


# --- what is said ---


def _about(scored: Scored, seed: int) -> Json:
    """A benchmark's figures and all that must stand beside them, as plain JSON values."""
    loaded, responses = scored.loaded, scored.responses
    truncated = sum(not response.ended for response in responses)
    thoughts = sum(response.thought for response in responses)
    empty = sum(not response.text.strip() for response in responses)
    notes = list(scored.notes)
    if truncated:
        notes.insert(0, f"{truncated} of {len(responses)} responses stopped at the limit of tokens.")
    if thoughts:
        notes.insert(0, f"A thought (<think>) was taken out of {thoughts} of {len(responses)} responses.")
    return {
        **known_of(loaded.benchmark, loaded.part),
        "drawn": loaded.drawn,
        "items": len(loaded.items),
        "source": loaded.source,
        "sha256": loaded.sha256,
        "truncated": truncated,
        "thoughts": thoughts,
        "empty": empty,
        **scored.about,
        **figures(scored.found, seed),
        "notes": notes,
    }


def known_of(benchmark: AssistantBenchmark, part: str | None) -> Json:
    """What a benchmark is, and how much of it is there."""
    row, column = benchmark.headline
    return {
        "title": benchmark.title,
        "part": part,
        "rule": benchmark.rule,
        "headline": {"row": row, "column": column},
    }


def figures(found: Sequence[Followed] | Sequence[Evaluated], seed: int) -> Json:
    """Columns and rows of a benchmark, with intervals (see `ifeval.figures`, `infobench.figures`)."""
    followed = [one for one in found if isinstance(one, Followed)]
    if followed:
        return ifeval.figures(followed, seed)
    return infobench.figures([one for one in found if isinstance(one, Evaluated)], seed)


def rows_of(scored: Scored, model: Wrote | Mapping[str, Any]) -> list[Json]:
    """Responses and what was found of them, one record an item, as `bench score` reads them again."""
    about = model if isinstance(model, Mapping) else asdict(model)
    rows = []
    for place, (item, response, found) in enumerate(
        zip(scored.loaded.items, scored.responses, scored.found, strict=True)
    ):
        written = {"ended": response.ended, "tokens": response.tokens, "thought_removed": response.thought}
        who = {"model": about["place"], "fingerprint": about["fingerprint"]}
        if isinstance(item, IfevalItem) and isinstance(found, Followed):
            lists = {name: list(truths) for name, truths in found.lists.items()}
            head = {"key": item.id, "prompt": item.prompt, "response": response.text}
            rows.append({**head, "instruction_id_list": list(item.instructions), **lists, **written, **who})
        elif isinstance(item, InfobenchItem) and isinstance(found, Evaluated):
            head = {"id": item.id, "subset": item.subset, "instruction": item.instruction, "input": item.input}
            questions = {"decomposed_questions": list(item.questions), "output": response.text}
            labels = {"question_label": [list(names) for names in item.labels]} if item.labels else {}
            said = {"eval": list(found.answers), "answers": list(scored.answers[place])}
            rows.append({**head, **questions, **labels, **said, **written, **who})
    return rows
